//! Any bytes are a greeting or request of SOCKS5, or wait for more of it, or are refused; what was
//! understood does not change with what follows, and nobody waits for more than a message can have.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::wire::{Socks, SocksTarget, socks_greeting, socks_request};

fuzz_target!(|bytes: &[u8]| {
    follow(bytes, socks_greeting);
    follow(bytes, socks_request);
    if let Ok(Socks::Complete(SocksTarget::Host(name, port))) = socks_request(bytes) {
        assert!(port != 0 && !name.is_empty());
        assert!(name.bytes().all(|b| b.is_ascii_graphic()));
    }
});

/// Reads as the server does: what is missing, and no more.
fn follow<T: PartialEq + std::fmt::Debug, E: PartialEq + std::fmt::Debug>(
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<Socks<T>, E>,
) {
    let mut read = 0;
    while let Some(seen) = bytes.get(..read) {
        match decode(seen) {
            Ok(Socks::Incomplete(missing)) => {
                assert!(missing > 0);
                read += missing;
                assert!(read <= LONGEST);
            }
            told => {
                assert_eq!(told, decode(bytes));
                return;
            }
        }
    }
}

/// A request for a name of 255 bytes; a greeting is shorter.
const LONGEST: usize = 4 + 1 + 255 + 2;
