//! Any header lines are baggage that survives the wire.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::wire::Baggage;

fuzz_target!(|data: &[u8]| {
    let lines = data
        .split(|b| *b == b'\n')
        .filter_map(|line| HeaderValue::from_bytes(line).ok());
    let read = Baggage::decode(&headers(lines));
    let sent = read.encode();
    assert!(sent.len() <= 7 * 300, "seven bounded values");
    assert_eq!(Baggage::decode(&headers([sent])), read);
});

fn headers(lines: impl IntoIterator<Item = HeaderValue>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(HeaderName::from_static("baggage"), line);
    }
    headers
}
