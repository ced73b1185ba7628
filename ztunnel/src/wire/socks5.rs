//! What an application says to a SOCKS5 proxy, and the answers. Takes the bytes that have come, gives
//! a value, or how many more belong to it for certain, so that nobody reads past it; never
//! resolves a name.
// PROTOCOL.md#socks5

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use thiserror::Error;

use super::authority::is_host_name;
use crate::model::{Reason, ToReason, canonical};

/// What was read so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socks<T> {
    /// All of it.
    Complete(T),
    /// So many bytes more belong to it at least; never 0.
    Incomplete(usize),
}

/// Where a request asks to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocksTarget {
    /// A name and a port.
    Host(Arc<str>, u16),
    /// An address, canonical.
    Ip(SocketAddr),
}

/// How a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocksReply {
    /// From here on it is the application's connection.
    Success,
    /// This node cannot serve anybody of the pod.
    Failure,
    /// The name leads nowhere.
    HostUnreachable,
    /// Not understood, or not done.
    NotSupported,
}

/// What is not understood, or not done.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SocksFault {
    /// A kind of address that does not exist.
    #[error("there is no address of type {0}")]
    AddressType(u8),
    /// Another command than CONNECT.
    #[error("command {0}, only CONNECT is served")]
    Command(u8),
    /// A name that no host has.
    #[error("what stands for a host name is none")]
    HostName,
    /// The client insists on proving who it is.
    #[error("it is not offered to come without authentication")]
    Method,
    /// Port 0.
    #[error("port 0")]
    Port,
    /// Another version of the protocol, or another protocol.
    #[error("version {0}, only SOCKS5 is spoken")]
    Version(u8),
}

impl SocksReply {
    /// Its bytes; the address in it is nobody's.
    #[must_use]
    pub const fn encode(self) -> [u8; 10] {
        let code = match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::HostUnreachable => 4,
            Self::NotSupported => 7,
        };
        [VERSION, code, 0, IPV4, 0, 0, 0, 0, 0, 0]
    }
}

impl ToReason for SocksFault {
    fn to_reason(&self) -> Reason {
        match self {
            Self::AddressType(_)
            | Self::Command(_)
            | Self::HostName
            | Self::Method
            | Self::Port
            | Self::Version(_) => Reason::BadRequest,
        }
    }
}

/// The answer to a greeting that offers to come without authentication.
pub const SOCKS_WELCOME: [u8; 2] = [VERSION, NO_AUTHENTICATION];

/// Reads a greeting, which must offer to come without authentication.
///
/// # Errors
/// It does not, or it is none.
pub fn socks_greeting(bytes: &[u8]) -> Result<Socks<()>, SocksFault> {
    let Some((version, rest)) = bytes.split_first() else {
        return Ok(Socks::Incomplete(1));
    };
    if *version != VERSION {
        return Err(SocksFault::Version(*version));
    }
    let Some((count, methods)) = rest.split_first() else {
        return Ok(Socks::Incomplete(1));
    };
    let count = usize::from(*count);
    match methods.get(..count) {
        None => Ok(Socks::Incomplete(count - methods.len())),
        Some(methods) if methods.contains(&NO_AUTHENTICATION) => Ok(Socks::Complete(())),
        Some(_) => Err(SocksFault::Method),
    }
}

/// Reads a request, which must be a CONNECT.
///
/// # Errors
/// It is something else.
pub fn socks_request(bytes: &[u8]) -> Result<Socks<SocksTarget>, SocksFault> {
    let Some(([version, command, _, kind], rest)) = bytes.split_first_chunk() else {
        return Ok(Socks::Incomplete(HEAD - bytes.len()));
    };
    match (*version, *command) {
        (VERSION, CONNECT) => {}
        (VERSION, command) => return Err(SocksFault::Command(command)),
        (version, _) => return Err(SocksFault::Version(version)),
    }
    match *kind {
        IPV4 => fixed(rest, |octets: [u8; 4]| IpAddr::from(octets)),
        IPV6 => fixed(rest, |octets: [u8; 16]| IpAddr::from(octets)),
        NAME => named(rest),
        kind => Err(SocksFault::AddressType(kind)),
    }
}

/// An address of so many bytes, and a port.
fn fixed<const N: usize>(
    bytes: &[u8],
    ip: impl Fn([u8; N]) -> IpAddr,
) -> Result<Socks<SocksTarget>, SocksFault> {
    let address = bytes.split_first_chunk::<N>();
    let Some((octets, Some(bytes))) = address.map(|(octets, rest)| (octets, rest.first_chunk()))
    else {
        return Ok(Socks::Incomplete(N + PORT - bytes.len()));
    };
    let address = SocketAddr::new(ip(*octets), port(*bytes)?);
    Ok(Socks::Complete(SocksTarget::Ip(canonical(address))))
}

/// A name after its length, and a port.
fn named(bytes: &[u8]) -> Result<Socks<SocksTarget>, SocksFault> {
    let Some((length, rest)) = bytes.split_first() else {
        return Ok(Socks::Incomplete(1));
    };
    let length = usize::from(*length);
    let split = rest.split_at_checked(length);
    let Some((name, Some(bytes))) = split.map(|(name, rest)| (name, rest.first_chunk())) else {
        return Ok(Socks::Incomplete(length + PORT - rest.len()));
    };
    let port = port(*bytes)?;
    let name = std::str::from_utf8(name).map_err(|_not_text| SocksFault::HostName)?;
    // Clients that take whatever the user typed for a name.
    let typed = name.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = typed.parse::<IpAddr>() {
        let address = SocketAddr::new(ip, port);
        return Ok(Socks::Complete(SocksTarget::Ip(canonical(address))));
    }
    if !is_host_name(name) || name.contains('*') {
        return Err(SocksFault::HostName);
    }
    Ok(Socks::Complete(SocksTarget::Host(name.into(), port)))
}

fn port(bytes: [u8; 2]) -> Result<u16, SocksFault> {
    match u16::from_be_bytes(bytes) {
        0 => Err(SocksFault::Port),
        port => Ok(port),
    }
}

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;
/// Bytes of a request before the address.
const HEAD: usize = 4;
/// Bytes of a port.
const PORT: usize = 2;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(kind: u8, address: &[u8], port: u16) -> Vec<u8> {
        [&[5, 1, 0, kind], address, &port.to_be_bytes()].concat()
    }

    #[test]
    fn a_connect_by_address_or_name_is_understood() {
        let ip = |text: &str| SocksTarget::Ip(text.parse().unwrap());
        let v6: std::net::Ipv6Addr = "fd00::7".parse().unwrap();
        let mapped: std::net::Ipv6Addr = "::ffff:10.0.0.7".parse().unwrap();
        for (bytes, target) in [
            (request(1, &[10, 0, 0, 7], 80), ip("10.0.0.7:80")),
            (request(4, &v6.octets(), 443), ip("[fd00::7]:443")),
            (request(4, &mapped.octets(), 80), ip("10.0.0.7:80")),
            (request(3, b"\x0810.0.0.7", 80), ip("10.0.0.7:80")),
            (request(3, b"\x09[fd00::7]", 80), ip("[fd00::7]:80")),
            (
                request(3, b"\x09bank.shop", 80),
                SocksTarget::Host("bank.shop".into(), 80),
            ),
        ] {
            assert_eq!(socks_request(&bytes), Ok(Socks::Complete(target)));
        }
    }

    #[test]
    fn what_is_not_served_is_named() {
        for (bytes, fault) in [
            (&b"\x04\x01"[..], SocksFault::Version(4)),
            (b"GET / HTTP/1.1", SocksFault::Version(b'G')),
            (b"\x05\x01\x02", SocksFault::Method),
            (b"\x05\x00", SocksFault::Method),
        ] {
            assert_eq!(socks_greeting(bytes), Err(fault));
        }
        let mut bind = request(1, &[10, 0, 0, 7], 80);
        bind[1] = 2;
        let mut associate = bind.clone();
        associate[1] = 3;
        let mut old = bind.clone();
        old[0] = 4;
        for (bytes, fault) in [
            (bind, SocksFault::Command(2)),
            (associate, SocksFault::Command(3)),
            (old, SocksFault::Version(4)),
            (request(2, b"", 80), SocksFault::AddressType(2)),
            (request(1, &[10, 0, 0, 7], 0), SocksFault::Port),
            (request(3, b"\x00", 80), SocksFault::HostName),
            (request(3, b"\x01*", 80), SocksFault::HostName),
            (request(3, b"\x02a\n", 80), SocksFault::HostName),
            (request(3, b"\x01\xff", 80), SocksFault::HostName),
        ] {
            assert_eq!(socks_request(&bytes), Err(fault.clone()));
            assert_eq!(fault.to_reason(), Reason::BadRequest);
        }
    }

    proptest! {
        /// Whoever reads exactly what is missing ends at the end of the message.
        #[test]
        fn nobody_reads_past_a_message(name in "[a-z.]{1,60}[a-z]", port in 1_u16.., more: Vec<u8>) {
            let length = u8::try_from(name.len()).unwrap();
            let message = request(3, &[&[length], name.as_bytes()].concat(), port);
            let stream = [&message[..], &more].concat();
            let mut read = 0;
            while let Ok(Socks::Incomplete(missing)) = socks_request(&stream[..read]) {
                prop_assert!(missing > 0);
                read += missing;
                prop_assert!(read <= message.len());
            }
            prop_assert_eq!(read, message.len());
        }
    }
}
