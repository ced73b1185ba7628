//! Addresses by the part they play. Takes socket and IP addresses, gives newtypes whose
//! IPv4-mapped form is already canonical; never resolves or connects.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// Makes an IPv4-mapped IPv6 address the plain IPv4 address it stands for.
#[must_use]
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

macro_rules! role {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(SocketAddr);

        impl $name {
            /// Takes any socket address; an IPv4-mapped one becomes IPv4.
            #[must_use]
            pub fn new(addr: SocketAddr) -> Self {
                Self(canonical(addr))
            }

            /// The address and port.
            #[must_use]
            pub const fn addr(self) -> SocketAddr {
                self.0
            }

            /// The address without its port.
            #[must_use]
            pub const fn ip(self) -> IpAddr {
                self.0.ip()
            }

            /// The port.
            #[must_use]
            pub const fn port(self) -> u16 {
                self.0.port()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

role! {
    /// Where the application, or the HBONE peer, connected from.
    ClientAddr
}
role! {
    /// Where the application meant to go, before capture.
    OrigDst
}
role! {
    /// Where one of our listeners accepts.
    ListenAddr
}
role! {
    /// The next hop that we dial for an outbound connection.
    UpstreamAddr
}
role! {
    /// The application that we dial for an inbound connection.
    AppAddr
}

/// An IP address on a named network; the empty name is the default network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddr {
    /// The network that the address belongs to.
    pub network: Arc<str>,
    /// The address, canonical.
    pub ip: IpAddr,
}

/// Why a text is not `network/ip`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidNetworkAddr {
    /// The part behind the last slash is not an IP address.
    #[error("{0:?} is not an IP address")]
    Ip(String),
    /// There is no slash between network and address.
    #[error("{0:?} is not of the form network/ip")]
    Slash(String),
}

impl NetworkAddr {
    /// Joins a network and an address; an IPv4-mapped address becomes IPv4.
    #[must_use]
    pub fn new(network: Arc<str>, ip: IpAddr) -> Self {
        Self {
            network,
            ip: ip.to_canonical(),
        }
    }
}

impl FromStr for NetworkAddr {
    type Err = InvalidNetworkAddr;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (network, ip) = text
            .rsplit_once('/')
            .ok_or_else(|| InvalidNetworkAddr::Slash(text.to_owned()))?;
        let Ok(ip) = ip.parse::<IpAddr>() else {
            return Err(InvalidNetworkAddr::Ip(ip.to_owned()));
        };
        Ok(Self::new(network.into(), ip))
    }
}

impl fmt::Display for NetworkAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_become_ipv4_on_entry() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(OrigDst::new(mapped).to_string(), "10.0.0.1:80");
        assert_eq!(
            ClientAddr::new(mapped).ip(),
            "10.0.0.1".parse::<IpAddr>().unwrap()
        );
    }

    #[test]
    fn network_address_is_network_slash_ip() {
        let addr: NetworkAddr = "/10.0.0.1".parse().unwrap();
        assert_eq!(
            (&*addr.network, addr.to_string()),
            ("", "/10.0.0.1".to_owned())
        );
        let addr: NetworkAddr = "net/fd00::1".parse().unwrap();
        assert_eq!(&*addr.network, "net");
        assert!("10.0.0.1".parse::<NetworkAddr>().is_err());
        assert!("net/ten".parse::<NetworkAddr>().is_err());
    }
}
