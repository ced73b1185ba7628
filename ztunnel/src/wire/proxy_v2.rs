//! The PROXY header, version 2: what an application that proxies for others reads in front of the
//! bytes. Takes who connects, where to and under which identity, gives bytes; never reads one.

use std::net::SocketAddr;

use super::malformed::Malformed;
use crate::model::{ClientAddr, SpiffeId};

/// What an application is told of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ProxyHeader<'a> {
    /// Where it comes from.
    pub source: ClientAddr,
    /// Where it was going.
    pub destination: SocketAddr,
    /// Who it is from; only what mutual TLS proved.
    pub identity: Option<&'a SpiffeId>,
}

impl ProxyHeader<'_> {
    /// The header, to be written before any other byte.
    ///
    /// # Errors
    /// When the identity is too long for it.
    // PROTOCOL.md#proxy-v2
    pub fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let addresses = addresses(self.source.addr(), self.destination);
        let identity = self.identity.map(ToString::to_string);
        let mut body = addresses.bytes;
        if let Some(identity) = &identity {
            let too_long = |_| Malformed::ProxyIdentity(identity.len());
            let length = u16::try_from(identity.len()).map_err(too_long)?;
            body.push(SOURCE_IDENTITY);
            body.extend_from_slice(&length.to_be_bytes());
            body.extend_from_slice(identity.as_bytes());
        }
        let too_long = |_| Malformed::ProxyIdentity(body.len());
        let length = u16::try_from(body.len()).map_err(too_long)?;
        let mut header = SIGNATURE.to_vec();
        header.push(VERSION_2_PROXY);
        header.push(addresses.family | STREAM);
        header.extend_from_slice(&length.to_be_bytes());
        header.append(&mut body);
        Ok(header)
    }
}

struct Addresses {
    family: u8,
    bytes: Vec<u8>,
}

/// Both addresses, then both ports. Of two families the header can carry neither.
fn addresses(source: SocketAddr, destination: SocketAddr) -> Addresses {
    let (family, mut bytes) = match (source, destination) {
        (SocketAddr::V4(source), SocketAddr::V4(destination)) => {
            let ips = [source.ip().octets(), destination.ip().octets()];
            (INET, ips.concat())
        }
        (SocketAddr::V6(source), SocketAddr::V6(destination)) => {
            let ips = [source.ip().octets(), destination.ip().octets()];
            (INET6, ips.concat())
        }
        (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => {
            let (family, bytes) = (UNSPECIFIED, Vec::new());
            return Addresses { family, bytes };
        }
    };
    bytes.extend_from_slice(&source.port().to_be_bytes());
    bytes.extend_from_slice(&destination.port().to_be_bytes());
    Addresses { family, bytes }
}

/// HAProxy's proxy-protocol.txt, 2.2.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const VERSION_2_PROXY: u8 = 0x21;
const UNSPECIFIED: u8 = 0x00;
const INET: u8 = 0x10;
const INET6: u8 = 0x20;
const STREAM: u8 = 0x01;
/// Of the types for applications' own use: the SPIFFE ID of the source.
const SOURCE_IDENTITY: u8 = 0xd0;

#[cfg(test)]
mod tests {
    use super::*;

    fn header(source: &str, destination: &str, identity: Option<&str>) -> Vec<u8> {
        let identity = identity.map(|id| id.parse().unwrap());
        let header = ProxyHeader {
            source: ClientAddr::new(source.parse().unwrap()),
            destination: destination.parse().unwrap(),
            identity: identity.as_ref(),
        };
        header.encode().unwrap()
    }

    #[test]
    fn a_header_is_what_the_specification_says_byte_by_byte() {
        let mut want = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
        let id = b"spiffe://td/ns/a/sa/b";
        want.extend_from_slice(&[0, 12 + 3 + 21]);
        want.extend_from_slice(&[10, 0, 0, 1, 10, 96, 0, 1, 0x30, 0x39, 0, 80]);
        want.extend_from_slice(&[0xd0, 0, 21]);
        want.extend_from_slice(id);
        let got = header(
            "10.0.0.1:12345",
            "10.96.0.1:80",
            Some("spiffe://td/ns/a/sa/b"),
        );
        assert_eq!(got, want);
        // A mapped source is the IPv4 address that it stands for.
        let mapped = "[::ffff:10.0.0.1]:12345";
        let got = header(mapped, "10.96.0.1:80", Some("spiffe://td/ns/a/sa/b"));
        assert_eq!(got, want);
    }

    #[test]
    fn ipv6_is_longer_and_two_families_are_unspecified() {
        let v6 = header("[fd00::1]:1", "[fd00::2]:2", None);
        assert_eq!(v6[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!((v6.len(), v6[48..].to_vec()), (52, vec![0, 1, 0, 2]));
        let mixed = header("10.0.0.1:1", "[fd00::2]:2", None);
        assert_eq!(mixed[12..], [0x21, 0x01, 0, 0]);
    }

    #[test]
    fn an_identity_that_does_not_fit_is_refused() {
        for length in [65_000, 70_000] {
            let id = format!("spiffe://td/ns/a/sa/{}", "b".repeat(length));
            let id: SpiffeId = id.parse().unwrap();
            let header = ProxyHeader {
                source: ClientAddr::new("10.0.0.1:1".parse().unwrap()),
                destination: "10.0.0.2:2".parse().unwrap(),
                identity: Some(&id),
            };
            let fits = length < 65_500;
            assert_eq!(header.encode().is_ok(), fits);
        }
    }
}
