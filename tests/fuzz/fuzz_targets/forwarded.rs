//! Any header is a `forwarded` that survives the wire.
#![no_main]

use http::HeaderValue;
use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::wire::Forwarded;

fuzz_target!(|data: &[u8]| {
    let Ok(line) = HeaderValue::from_bytes(data) else {
        return;
    };
    let read = Forwarded::decode(&line);
    let sent = read.encode();
    assert!(sent.len() <= 400, "an address and a host name");
    assert_eq!(Forwarded::decode(&sent), read);
});
