//! Any text is an authority that survives the wire, or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::wire::Authority;

fuzz_target!(|text: &str| {
    let Ok(authority) = text.parse::<Authority>() else {
        return;
    };
    assert_ne!(authority.port(), 0);
    let sent = authority.to_string();
    assert!(sent.len() <= 259, "longer than a host name and a port");
    assert_eq!(sent.parse::<Authority>().as_ref(), Ok(&authority));
    assert!(sent.parse::<http::uri::Authority>().is_ok());
});
