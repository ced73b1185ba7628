//! Single values of the local file. Takes the text of a scalar, gives a value of the model, or
//! says which text is no such value; never rounds, wraps or drops one.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Deserializer, de};

use crate::model::{
    Action, AppProtocol, GatewayDestination, Health, HealthPolicy, IpFamilies, LoadBalancerMode,
    NamespacedHostname, NetworkAddr, NetworkMode, PolicyKey, Protocol, RoutingScope, Scope,
    Visibility,
};

/// A scalar that is read by [`FromText`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Leaf<T>(pub(super) T);

/// A port that can be dialled: not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Port(pub(super) u16);

/// A port of a service's endpoints; 0 stands for a named port that each endpoint maps itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TargetPort(pub(super) u16);

/// A range of a service's VIPs on a network.
#[derive(Clone, Debug)]
pub(super) struct CidrVip(pub(super) Arc<str>, pub(super) IpNet);

/// A name that is not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name(pub(super) Arc<str>);

/// What a text stands for.
pub(super) trait FromText: Sized {
    /// The error says what the text is not.
    fn from_text(text: &str) -> Result<Self, String>;
}

impl<'de, T: FromText> Deserialize<'de> for Leaf<T> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let text = String::deserialize(source)?;
        T::from_text(&text).map(Self).map_err(de::Error::custom)
    }
}

impl FromText for IpAddr {
    fn from_text(text: &str) -> Result<Self, String> {
        match text.parse::<Self>() {
            Ok(ip) => Ok(ip.to_canonical()),
            Err(_) => Err(format!("{text:?} is not an IP address")),
        }
    }
}

impl FromText for IpNet {
    fn from_text(text: &str) -> Result<Self, String> {
        match text.parse::<Self>() {
            Ok(net) => Ok(canonical(net)),
            Err(_) => Err(format!(
                "{text:?} is not a CIDR such as 10.0.0.0/8 or fd00::/8"
            )),
        }
    }
}

impl FromText for CidrVip {
    fn from_text(text: &str) -> Result<Self, String> {
        let (network, net) = text
            .split_once('/')
            .ok_or_else(|| format!("{text:?} is not of the form network/ip/length"))?;
        Ok(Self(network.into(), IpNet::from_text(net)?))
    }
}

impl FromText for Port {
    fn from_text(text: &str) -> Result<Self, String> {
        match number(text) {
            Some(port) if port != 0 => Ok(Self(port)),
            _ => Err(format!("{text:?} is not a port from 1 to 65535")),
        }
    }
}

impl FromText for TargetPort {
    fn from_text(text: &str) -> Result<Self, String> {
        number(text)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not a port from 0 to 65535"))
    }
}

impl FromText for Name {
    fn from_text(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a name cannot be empty".to_owned());
        }
        Ok(Self(text.into()))
    }
}

impl FromText for GatewayDestination {
    fn from_text(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<NetworkAddr>() {
            return Ok(Self::Address(address));
        }
        match text.parse::<NamespacedHostname>() {
            Ok(hostname) => Ok(Self::Hostname(hostname)),
            Err(_) => Err(format!(
                "{text:?} is neither of the form network/ip nor namespace/hostname"
            )),
        }
    }
}

/// Values whose own parser says what is wrong.
macro_rules! parsed {
    ($($name:ty),+) => {$(
        impl FromText for $name {
            fn from_text(text: &str) -> Result<Self, String> {
                text.parse().map_err(|error| format!("{error}"))
            }
        }
    )+};
}

parsed!(NamespacedHostname, NetworkAddr, PolicyKey);

/// Values with names from a closed list.
macro_rules! named {
    ($($name:ident { $($text:literal => $variant:ident),+ })+) => {$(
        impl FromText for $name {
            fn from_text(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(format!("{text:?} is none of {}", [$($text),+].join(", "))),
                }
            }
        }
    )+};
}

named! {
    Action { "Allow" => Allow, "Deny" => Deny }
    AppProtocol { "NONE" => None, "PROXY" => Proxy }
    Health { "Healthy" => Healthy, "Unhealthy" => Unhealthy }
    HealthPolicy { "AllowAll" => AllowAll, "OnlyHealthy" => OnlyHealthy }
    IpFamilies { "Dual" => Dual, "IPv4" => Ipv4Only, "IPv6" => Ipv6Only }
    LoadBalancerMode {
        "Failover" => Failover,
        "Passthrough" => Passthrough,
        "Standard" => Standard,
        "Strict" => Strict
    }
    NetworkMode { "HostNetwork" => HostNetwork, "Standard" => Standard }
    Protocol { "HBONE" => Hbone, "TCP" => Tcp }
    RoutingScope {
        "Cluster" => Cluster,
        "Network" => Network,
        "Node" => Node,
        "Region" => Region,
        "Subzone" => Subzone,
        "Zone" => Zone
    }
    Scope {
        "Global" => Global,
        "Namespace" => Namespace,
        "WorkloadSelector" => WorkloadSelector
    }
    Visibility { "Namespace" => Namespace, "Public" => Public }
}

/// Plain decimal digits, written in one way only, so that no two keys mean one port.
fn number(text: &str) -> Option<u16> {
    text.parse::<u16>()
        .ok()
        .filter(|number| number.to_string() == text)
}

/// A network of IPv4-mapped addresses is the IPv4 network that it stands for.
fn canonical(net: IpNet) -> IpNet {
    match net {
        IpNet::V6(v6) => v6
            .addr()
            .to_ipv4_mapped()
            .zip(v6.prefix_len().checked_sub(MAPPED_PREFIX_BITS))
            .and_then(|(addr, bits)| Ipv4Net::new(addr, bits).ok())
            .map_or(net, IpNet::V4),
        IpNet::V4(_) => net,
    }
}

/// `::ffff:0:0/96` (RFC 4291 2.5.5.2).
const MAPPED_PREFIX_BITS: u8 = 96;
