//! What the CONNECT and its answer look like on the wire, and what is refused.

use proptest::prelude::*;

use super::*;
use crate::model::ToReason as _;

const TRACE: Traceparent = Traceparent::new(0xabc, 0xdef);

fn connect<'a>(authority: &'a Authority, baggage: &'a HeaderValue) -> Connect<'a> {
    Connect {
        authority,
        baggage,
        source: ClientAddr::new("10.0.0.1:4000".parse().unwrap()),
        host: None,
        traceparent: TRACE,
        network: None,
    }
}

fn received(method: Method, uri: &str, headers: &[(&'static str, &[u8])]) -> request::Parts {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn decode(headers: &[(&'static str, &[u8])]) -> ConnectRequest {
    ConnectRequest::decode(&received(Method::CONNECT, "10.0.0.2:80", headers)).unwrap()
}

#[test]
fn the_request_has_two_pseudo_headers_and_three_headers_in_order() {
    let authority = "10.0.0.2:8080".parse().unwrap();
    let baggage = HeaderValue::from_static("service.name=web");
    let request = connect(&authority, &baggage).encode().unwrap();
    assert_eq!(request.method(), Method::CONNECT);
    assert_eq!(request.version(), Version::HTTP_2);
    assert_eq!(request.uri().authority().unwrap(), "10.0.0.2:8080");
    assert_eq!((request.uri().scheme(), request.uri().path()), (None, ""));
    let headers: Vec<_> = request
        .headers()
        .iter()
        .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
        .collect();
    assert_eq!(
        headers,
        [
            ("baggage", "service.name=web"),
            ("forwarded", "for=\"10.0.0.1:4000\""),
            (
                "traceparent",
                "00-00000000000000000000000000000abc-0000000000000def-00"
            ),
        ]
    );
}

#[test]
fn an_empty_baggage_is_sent_too() {
    let authority = "10.0.0.2:8080".parse().unwrap();
    let baggage = Baggage::default().encode();
    let request = connect(&authority, &baggage).encode().unwrap();
    assert_eq!(request.headers()["baggage"], "");
}

#[test]
fn ipv6_stands_in_brackets_and_a_service_is_named() {
    let authority = "[fd00::2]:8080".parse().unwrap();
    let baggage = HeaderValue::from_static("");
    let request = Connect {
        host: Some(&"cart.shop".into()),
        ..connect(&authority, &baggage)
    }
    .encode()
    .unwrap();
    assert_eq!(request.uri().to_string(), "[fd00::2]:8080");
    assert_eq!(
        request.headers()["forwarded"],
        "for=\"10.0.0.1:4000\";host=cart.shop"
    );
}

#[test]
fn the_network_is_told_only_where_asked_even_if_it_is_empty() {
    let authority = "cart.shop:80".parse().unwrap();
    let baggage = HeaderValue::from_static("");
    for (network, want) in [(None, None), (Some(""), Some("")), (Some("n1"), Some("n1"))] {
        let connect = Connect {
            network,
            ..connect(&authority, &baggage)
        };
        let request = connect.encode().unwrap();
        let got = request.headers().get("x-forwarded-network");
        assert_eq!(got.map(|v| v.to_str().unwrap()), want);
    }
}

#[test]
fn a_host_name_that_cannot_be_sent_is_an_error() {
    let authority = Authority::Host {
        name: "not a host".into(),
        port: 80,
    };
    let baggage = HeaderValue::from_static("");
    let error = connect(&authority, &baggage).encode().unwrap_err();
    assert_eq!(error, Malformed::AuthorityHost("not a host:80".to_owned()));
}

#[test]
fn only_a_connect_to_host_and_port_is_understood() {
    for (method, uri, want) in [
        (Method::POST, "10.0.0.2:80", Malformed::Method(Method::POST)),
        (
            Method::GET,
            "https://a.b:80/",
            Malformed::Method(Method::GET),
        ),
        (Method::CONNECT, "/", Malformed::AuthorityNoHost),
        (
            Method::CONNECT,
            "cart",
            Malformed::AuthorityNoPort("cart".to_owned()),
        ),
        (
            Method::CONNECT,
            "user@cart:80",
            Malformed::AuthorityHost("user@cart:80".to_owned()),
        ),
    ] {
        let error = ConnectRequest::decode(&received(method, uri, &[])).unwrap_err();
        assert_eq!(error, want, "{uri}");
        assert_eq!(error.to_reason(), Reason::BadRequest);
        assert_eq!(refused(error.to_reason()).status(), StatusCode::BAD_REQUEST);
    }
}

#[test]
fn headers_that_cannot_be_read_are_absent() {
    let bare = decode(&[]);
    assert_eq!(
        bare,
        ConnectRequest {
            authority: "10.0.0.2:80".parse().unwrap(),
            baggage: Baggage::default(),
            forwarded: Forwarded::default(),
            traceparent: None,
            network: None,
        }
    );
    let zeros = [b'0'; 55];
    for traceparent in [&zeros[..], b"", b"00-", &[0xff; 55]] {
        let odd = decode(&[
            ("traceparent", traceparent),
            ("forwarded", b"host=\xff"),
            ("baggage", b"\xff"),
        ]);
        assert_eq!(odd, bare);
    }
}

#[test]
fn the_first_forwarded_and_every_baggage_line_count() {
    let read = decode(&[
        ("forwarded", b"host=first"),
        ("forwarded", b"host=second"),
        ("baggage", b"service.name=web"),
        ("baggage", b"cloud.region=eu"),
        ("x-forwarded-network", b""),
    ]);
    assert_eq!(read.forwarded.host.as_deref(), Some("first"));
    assert_eq!(read.baggage.service.as_deref(), Some("web"));
    assert_eq!(read.baggage.region.as_deref(), Some("eu"));
    assert_eq!(read.network.as_deref(), Some(""));
}

#[test]
fn answers_are_a_status_and_at_most_baggage() {
    let baggage = HeaderValue::from_static("service.name=cart");
    let yes = accepted(Some(&baggage));
    assert_eq!(yes.status(), StatusCode::OK);
    assert_eq!(yes.headers().len(), 1);
    assert_eq!(yes.headers()["baggage"], baggage);
    assert!(accepted(None).headers().is_empty());
    for reason in Reason::ALL {
        let no = refused(reason);
        assert_eq!(no.status().as_u16(), reason.http_status(), "{reason}");
        assert!(no.headers().is_empty(), "{reason}");
    }
}

proptest! {
    #[test]
    fn a_connect_survives_the_wire(
        source: std::net::SocketAddr,
        port in 1_u16..,
        name in "[a-z0-9][a-z0-9.-]{0,60}",
        addressed: bool,
        ids: (u128, u64),
        network in proptest::option::of("[a-z0-9]{0,9}"),
    ) {
        let name: Arc<str> = name.into();
        let authority = format!("{name}:{port}").parse().unwrap();
        let baggage = Baggage { service: Some("web".into()), ..Baggage::default() };
        let source = std::net::SocketAddr::new(source.ip(), source.port());
        let sent = Connect {
            authority: &authority,
            baggage: &baggage.encode(),
            source: ClientAddr::new(source),
            host: addressed.then_some(&name),
            traceparent: Traceparent::new(ids.0, ids.1),
            network: network.as_deref(),
        };
        let read = ConnectRequest::decode(&sent.encode().unwrap().into_parts().0).unwrap();
        let want = ConnectRequest {
            authority: authority.clone(),
            baggage,
            forwarded: Forwarded {
                source: Some(sent.source),
                host: sent.host.cloned(),
            },
            traceparent: Some(sent.traceparent),
            network: network.as_deref().map(Arc::from),
        };
        prop_assert_eq!(read, want);
    }
}
