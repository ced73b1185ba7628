//! Any text is an identity with three parts that survives the wire, or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::model::SpiffeId;

fuzz_target!(|text: &str| {
    let Ok(id) = text.parse::<SpiffeId>() else {
        return;
    };
    assert_eq!(id.to_string(), text);
    for part in [
        id.trust_domain().as_str(),
        id.namespace(),
        id.service_account(),
    ] {
        assert!(!part.is_empty() && !part.contains('/'));
    }
});
