//! Single fields of resources. Takes numbers and bytes from the wire, gives values of the model, or says what they are
//! not; never wraps, rounds or drops one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};

use super::{Interner, Rejected, refuse};
use crate::model::{GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddr};
use crate::proto::workload as wire;
use wire::gateway_address::Destination;

/// Four or sixteen bytes.
pub(super) fn ip(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Rejected> {
    let ip = if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        IpAddr::V4(Ipv4Addr::from(v4))
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        IpAddr::V6(Ipv6Addr::from(v6))
    } else {
        let reason = format!(
            "an address of {} bytes is neither IPv4 nor IPv6",
            bytes.len()
        );
        return Err(refuse(field, reason));
    };
    Ok(ip.to_canonical())
}

/// An address and the length of its prefix.
pub(super) fn net(field: &'static str, bytes: &[u8], length: u32) -> Result<IpNet, Rejected> {
    let raw = match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => IpAddr::V6(Ipv6Addr::from(v6)),
        Err(_) => ip(field, bytes)?,
    };
    let net = u8::try_from(length)
        .ok()
        .and_then(|length| IpNet::new(raw, length).ok())
        .ok_or_else(|| refuse(field, format!("{raw} has no prefix of {length} bits")))?;
    Ok(canonical(net))
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

/// A port that can be dialled.
pub(super) fn port(field: &'static str, number: u32) -> Result<u16, Rejected> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(refuse(
            field,
            format!("{number} is not a port from 1 to 65535"),
        )),
    }
}

/// A port, or 0 for one that somebody else maps.
pub(super) fn target_port(field: &'static str, number: u32) -> Result<u16, Rejected> {
    u16::try_from(number)
        .map_err(|_wide| refuse(field, format!("{number} is not a port from 0 to 65535")))
}

/// A name that is not empty.
pub(super) fn name<'a>(field: &'static str, text: &'a str) -> Result<&'a str, Rejected> {
    if text.is_empty() {
        return Err(refuse(field, "is empty"));
    }
    Ok(text)
}

/// Where a waypoint or a network gateway is.
pub(super) fn gateway(
    interner: &mut Interner,
    field: &'static str,
    from: wire::GatewayAddress,
) -> Result<GatewayAddress, Rejected> {
    let destination = match from.destination {
        Some(Destination::Address(address)) => {
            let ip = ip(field, &address.address)?;
            let network = interner.text(&address.network);
            GatewayDestination::Address(NetworkAddr::new(network, ip))
        }
        Some(Destination::Hostname(name)) => GatewayDestination::Hostname(hostname(
            interner,
            field,
            &name.namespace,
            &name.hostname,
        )?),
        None => return Err(refuse(field, "has no destination")),
    };
    Ok(GatewayAddress {
        destination,
        hbone_mtls_port: port(field, from.hbone_mtls_port)?,
    })
}

/// A service's key from its two parts.
pub(super) fn hostname(
    interner: &mut Interner,
    field: &'static str,
    namespace: &str,
    hostname: &str,
) -> Result<NamespacedHostname, Rejected> {
    if hostname.is_empty() || hostname.contains('/') {
        return Err(refuse(field, format!("{hostname:?} is no host name")));
    }
    if namespace.contains('/') {
        return Err(refuse(field, format!("{namespace:?} is no namespace")));
    }
    Ok(NamespacedHostname {
        namespace: interner.text(namespace),
        hostname: interner.text(hostname),
    })
}

/// `::ffff:0:0/96` (RFC 4291 2.5.5.2).
const MAPPED_PREFIX_BITS: u8 = 96;
