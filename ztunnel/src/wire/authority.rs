//! The `:authority` of a CONNECT. Takes its text, gives an address or a host name with a port, and
//! back; never resolves the name.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use super::malformed::Malformed;
use crate::model::canonical;

/// Where a CONNECT asks to go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    /// A service by its host name.
    Host {
        /// The host name.
        name: Arc<str>,
        /// A port of the service.
        port: u16,
    },
    /// An address, canonical.
    Ip(SocketAddr),
}

impl Authority {
    /// The address form; an IPv4-mapped address becomes IPv4.
    #[must_use]
    pub fn ip(addr: SocketAddr) -> Self {
        Self::Ip(canonical(addr))
    }

    /// The host name form.
    ///
    /// # Errors
    /// When the name cannot stand in an authority.
    pub fn host(name: &Arc<str>, port: u16) -> Result<Self, Malformed> {
        if !is_host_name(name) {
            return Err(Malformed::AuthorityHost(name.to_string()));
        }
        Ok(Self::Host {
            name: Arc::clone(name),
            port,
        })
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        match self {
            Self::Host { port, .. } => *port,
            Self::Ip(addr) => addr.port(),
        }
    }
}

impl FromStr for Authority {
    type Err = Malformed;

    // PROTOCOL.md#authority: a socket address first, else a host and an explicit port.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(Malformed::AuthorityNoHost);
        }
        if text.len() > MAX_AUTHORITY_BYTES {
            return Err(Malformed::AuthorityTooLong(text.len()));
        }
        // A zone belongs to the peer's machine and means nothing on this one.
        if !text.contains('%')
            && let Ok(addr) = text.parse::<SocketAddr>()
        {
            if addr.port() == 0 {
                return Err(Malformed::AuthorityPort(text.to_owned()));
            }
            return Ok(Self::ip(addr));
        }
        let (name, port) = text
            .rsplit_once(':')
            .filter(|(_, port)| !port.is_empty() && !port.ends_with(']'))
            .ok_or_else(|| Malformed::AuthorityNoPort(text.to_owned()))?;
        if name.is_empty() {
            return Err(Malformed::AuthorityNoHost);
        }
        if !is_host_name(name) {
            return Err(Malformed::AuthorityHost(text.to_owned()));
        }
        match port_number(port) {
            Some(port) => Ok(Self::Host {
                name: name.into(),
                port,
            }),
            None => Err(Malformed::AuthorityPort(text.to_owned())),
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host { name, port } => write!(f, "{name}:{port}"),
            Self::Ip(addr) => canonical(*addr).fmt(f),
        }
    }
}

/// Whether a text can stand as host in an authority and in a header, unquoted. A wildcard can: a
/// service may be called `*.example.com`.
pub(super) fn is_host_name(name: &str) -> bool {
    (1..=MAX_HOST_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'*'))
}

/// Digits only: the standard parser would take a plus sign.
fn port_number(text: &str) -> Option<u16> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
        .filter(|port| *port != 0)
}

/// The longest name that DNS carries (RFC 1035 2.3.4, in text form).
const MAX_HOST_BYTES: usize = 253;
/// Such a name, a colon and five digits.
const MAX_AUTHORITY_BYTES: usize = MAX_HOST_BYTES + 6;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Reason, ToReason as _};

    #[test]
    fn addresses_and_host_names_need_a_port() {
        for (text, want) in [
            (
                "10.0.0.1:8080",
                Authority::Ip("10.0.0.1:8080".parse().unwrap()),
            ),
            (
                "[fd00::1]:80",
                Authority::Ip("[fd00::1]:80".parse().unwrap()),
            ),
            (
                "[::ffff:10.0.0.1]:80",
                Authority::Ip("10.0.0.1:80".parse().unwrap()),
            ),
            (
                "cart.shop.svc.cluster.local:80",
                Authority::Host {
                    name: "cart.shop.svc.cluster.local".into(),
                    port: 80,
                },
            ),
            (
                "*.example.com:443",
                Authority::Host {
                    name: "*.example.com".into(),
                    port: 443,
                },
            ),
            // Not an address to the standard library, so a name that no service has.
            (
                "010.0.0.1:80",
                Authority::Host {
                    name: "010.0.0.1".into(),
                    port: 80,
                },
            ),
        ] {
            assert_eq!(text.parse::<Authority>().unwrap(), want, "{text}");
        }
    }

    #[test]
    fn malformed_authorities_are_bad_requests() {
        let host = |text: &str| Malformed::AuthorityHost(text.to_owned());
        let no_port = |text: &str| Malformed::AuthorityNoPort(text.to_owned());
        let port = |text: &str| Malformed::AuthorityPort(text.to_owned());
        let long = format!("{}:80", "a".repeat(254));
        let longer = "a".repeat(10_000);
        for (text, want) in [
            ("", Malformed::AuthorityNoHost),
            (":80", Malformed::AuthorityNoHost),
            ("10.0.0.1", no_port("10.0.0.1")),
            ("[fd00::1]", no_port("[fd00::1]")),
            ("cart", no_port("cart")),
            ("cart:", no_port("cart:")),
            ("cart:http", port("cart:http")),
            ("cart:+80", port("cart:+80")),
            ("cart:-1", port("cart:-1")),
            ("cart:0", port("cart:0")),
            ("10.0.0.1:0", port("10.0.0.1:0")),
            ("cart:65536", port("cart:65536")),
            ("fd00::1:80", host("fd00::1:80")),
            ("[fe80::1%1]:80", host("[fe80::1%1]:80")),
            ("user@cart:80", host("user@cart:80")),
            ("ca rt:80", host("ca rt:80")),
            ("cärt:80", host("cärt:80")),
            ("a/b:80", host("a/b:80")),
            (&long, host(&long)),
            (&longer, Malformed::AuthorityTooLong(10_000)),
        ] {
            let got = text.parse::<Authority>().unwrap_err();
            assert_eq!(got, want, "{text}");
            assert_eq!(got.to_reason(), Reason::BadRequest);
        }
    }

    #[test]
    fn only_names_that_can_be_sent_make_an_authority() {
        let name = |text: &str| Authority::host(&text.into(), 80).map(|a| a.to_string());
        assert_eq!(name("cart.shop").unwrap(), "cart.shop:80");
        for bad in ["", "a:b", "a;b", "a b"] {
            assert_eq!(name(bad), Err(Malformed::AuthorityHost(bad.to_owned())));
        }
    }

    proptest! {
        #[test]
        fn an_address_survives_the_wire(addr: SocketAddr) {
            prop_assume!(addr.port() != 0);
            let sent = Authority::ip(SocketAddr::new(addr.ip(), addr.port()));
            prop_assert_eq!(sent.to_string().parse::<Authority>().unwrap(), sent);
        }

        #[test]
        fn a_host_name_survives_the_wire(name in "[a-z][a-zA-Z0-9._*-]{0,252}", port in 1_u16..) {
            let sent = Authority::host(&name.into(), port).unwrap();
            prop_assert_eq!(sent.to_string().parse::<Authority>().unwrap(), sent);
        }

        #[test]
        fn any_text_parses_or_is_refused(text in ".*") {
            if let Ok(authority) = text.parse::<Authority>() {
                prop_assert_eq!(authority.to_string().parse::<Authority>().unwrap(), authority);
            }
        }
    }
}
