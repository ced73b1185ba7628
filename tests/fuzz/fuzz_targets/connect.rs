//! Any request is a CONNECT that survives the wire, or is refused. The first line is method and
//! authority, each further one a header.
#![no_main]

use http::{HeaderName, HeaderValue, Method, Request};
use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::model::{ClientAddr, ToReason as _};
use ztunnel_fuzz::wire::{Connect, ConnectRequest, Forwarded, Traceparent, refused};

fuzz_target!(|data: &[u8]| {
    let Some(request) = request(data) else {
        return;
    };
    let read = match ConnectRequest::decode(&request.into_parts().0) {
        Ok(read) => read,
        Err(error) => {
            assert_eq!(refused(error.to_reason()).status(), 400);
            return;
        }
    };
    let source = read
        .forwarded
        .source
        .unwrap_or_else(|| ClientAddr::new(([127, 0, 0, 1], 1).into()));
    let traceparent = read.traceparent.unwrap_or_else(|| Traceparent::new(1, 1));
    let sent = Connect {
        authority: &read.authority,
        baggage: &read.baggage.encode(),
        source,
        host: read.forwarded.host.as_ref(),
        traceparent,
        network: None,
    };
    let sent = sent.encode().expect("what was read can be sent");
    let again = ConnectRequest::decode(&sent.into_parts().0);
    let want = ConnectRequest {
        forwarded: Forwarded {
            source: Some(source),
            ..read.forwarded
        },
        traceparent: Some(traceparent),
        network: None,
        ..read
    };
    assert_eq!(again, Ok(want));
});

fn request(data: &[u8]) -> Option<Request<()>> {
    let mut lines = data.split(|b| *b == b'\n');
    let first = lines.next()?;
    let (method, uri) = match first.iter().position(|b| *b == b' ') {
        Some(end) => (
            Method::from_bytes(first.get(..end)?).ok()?,
            first.get(end + 1..)?,
        ),
        None => (Method::CONNECT, first),
    };
    let mut request = Request::builder().method(method).uri(uri).body(()).ok()?;
    for line in lines {
        let mut parts = line.splitn(2, |b| *b == b':');
        let name = HeaderName::from_bytes(parts.next()?).ok()?;
        let value = HeaderValue::from_bytes(parts.next()?).ok()?;
        request.headers_mut().try_append(name, value).ok()?;
    }
    Some(request)
}
