//! The `forwarded` header: for whom a CONNECT is made, and which service was addressed. Takes and
//! gives its one element; never believed for judging, only for telemetry.

use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderValue;

use super::authority::is_host_name;
use crate::model::ClientAddr;

/// For whom a connection is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Where the application connected from.
    pub source: Option<ClientAddr>,
    /// The host name of the service that it addressed.
    pub host: Option<Arc<str>>,
}

impl Forwarded {
    /// The header value; a host that it cannot carry is left out.
    // PROTOCOL.md#forwarded: the address quoted, the host not.
    #[must_use]
    pub fn encode(&self) -> HeaderValue {
        let mut text = String::new();
        if let Some(source) = self.source {
            text = format!("for=\"{source}\"");
        }
        if let Some(host) = self.host.as_ref().filter(|host| is_host_name(host)) {
            if !text.is_empty() {
                text.push(';');
            }
            text.push_str("host=");
            text.push_str(host);
        }
        // Addresses and host names are visible ASCII, so the fallback is never taken.
        HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// Reads the first element of the first `forwarded` line; whatever cannot be read is absent.
    // PROTOCOL.md#forwarded: keys are case-sensitive, quotes optional; not ASCII, not read.
    #[must_use]
    pub fn decode(line: &HeaderValue) -> Self {
        let mut forwarded = Self::default();
        let Some(line) = std::str::from_utf8(line.as_bytes())
            .ok()
            .filter(|line| line.is_ascii())
        else {
            return forwarded;
        };
        for pair in pairs(line) {
            let Some((key, value)) = pair.split_once('=') else {
                continue;
            };
            let value = unquoted(value.trim());
            match key.trim() {
                "for" if forwarded.source.is_none() => {
                    forwarded.source = value.parse::<SocketAddr>().ok().map(ClientAddr::new);
                }
                "host" if forwarded.host.is_none() && is_host_name(value) => {
                    forwarded.host = Some(value.into());
                }
                _ => {}
            }
        }
        forwarded
    }
}

/// The `key=value` pairs of the first element: up to a comma, parted by semicolons, both outside
/// quotes.
fn pairs(line: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    let mut ended = false;
    line.split(move |c| {
        quoted ^= c == '"';
        !quoted && matches!(c, ';' | ',')
    })
    .scan(0_usize, move |start, pair| {
        if ended {
            return None;
        }
        let end = start.saturating_add(pair.len());
        ended = line.as_bytes().get(end) == Some(&b',');
        *start = end.saturating_add(1);
        Some(pair)
    })
}

fn unquoted(value: &str) -> &str {
    value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'))
        .unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use proptest::option::of;
    use proptest::prelude::*;

    use super::*;

    fn forwarded(source: &str, host: &str) -> Forwarded {
        Forwarded {
            source: (!source.is_empty()).then(|| ClientAddr::new(source.parse().unwrap())),
            host: (!host.is_empty()).then(|| host.into()),
        }
    }

    #[test]
    fn the_address_is_quoted_and_the_host_is_not() {
        for (source, host, want) in [
            ("10.0.0.1:4000", "", "for=\"10.0.0.1:4000\""),
            ("[fd00::1]:4000", "", "for=\"[fd00::1]:4000\""),
            ("[::ffff:10.0.0.1]:4000", "", "for=\"10.0.0.1:4000\""),
            (
                "10.0.0.1:4000",
                "cart.shop",
                "for=\"10.0.0.1:4000\";host=cart.shop",
            ),
            ("10.0.0.1:4000", "not a;host", "for=\"10.0.0.1:4000\""),
            ("", "cart", "host=cart"),
            ("", "", ""),
        ] {
            assert_eq!(forwarded(source, host).encode(), want);
        }
    }

    #[test]
    fn reading_takes_the_first_element_and_skips_what_it_cannot_read() {
        for (line, source, host) in [
            ("for=\"10.0.0.1:4000\";host=cart", "10.0.0.1:4000", "cart"),
            ("host=\"cart\" ; for=10.0.0.1:4000", "10.0.0.1:4000", "cart"),
            ("for=\"[fd00::1]:1\"", "[fd00::1]:1", ""),
            ("for=_hidden;by=x;proto=https;host=cart", "", "cart"),
            ("Host=cart", "", ""),
            ("host=", "", ""),
            ("host=\"\"", "", ""),
            ("host=\"", "", ""),
            ("host", "", ""),
            ("", "", ""),
            (";;;", "", ""),
            ("for=10.0.0.1", "", ""),
            ("host=a, host=b", "", "a"),
            ("by=x, host=b", "", ""),
            ("by=\"a;host=evil,b\";host=cart", "", "cart"),
            ("by=\"a;host=evil", "", ""),
            ("host=a;host=b", "", "a"),
            ("host=not/a/host;host=b", "", "b"),
        ] {
            let got = Forwarded::decode(&HeaderValue::from_str(line).unwrap());
            assert_eq!(got, forwarded(source, host), "{line}");
        }
        for line in [&b"host=c\xc3\xa4rt"[..], b"host=cart;by=\xff"] {
            let got = Forwarded::decode(&HeaderValue::from_bytes(line).unwrap());
            assert_eq!(got, Forwarded::default(), "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn it_survives_the_wire(addr: Option<SocketAddr>, host in of("[a-z0-9.*_-]{1,253}")) {
            let sent = Forwarded {
                source: addr.map(|a| ClientAddr::new(SocketAddr::new(a.ip(), a.port()))),
                host: host.map(Arc::from),
            };
            prop_assert_eq!(Forwarded::decode(&sent.encode()), sent);
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes: Vec<u8>) {
            if let Ok(line) = HeaderValue::from_bytes(&bytes) {
                let read = Forwarded::decode(&line);
                prop_assert_eq!(Forwarded::decode(&read.encode()), read);
            }
        }
    }
}
