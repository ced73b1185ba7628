//! Any header is a trace identity that survives the wire, or none.
#![no_main]

use http::HeaderValue;
use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::wire::Traceparent;

fuzz_target!(|data: &[u8]| {
    let Ok(line) = HeaderValue::from_bytes(data) else {
        return;
    };
    let Some(read) = Traceparent::decode(&line) else {
        return;
    };
    assert_eq!(data.len(), 55);
    assert_ne!(read.trace_id(), 0);
    assert_eq!(Traceparent::decode(&read.encode()), Some(read));
});
