//! Any bytes are records and messages of TLS, or are refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| ztunnel_fuzz::tls::read(data));
