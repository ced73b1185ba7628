//! The way into a pod. Takes a CONNECT's authority and the pod that was dialled, gives the
//! application's address; never leaves the pod.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{
    AppAddr, AppProtocol, ApplicationTunnel, GatewayAddress, NetworkAddr, OrigDst, Service,
    Workload, canonical,
};

use super::{Error, Snapshot, balance, waypoint};

/// The authority of a CONNECT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A service's host name and port.
    Host(String, u16),
    /// An address.
    Ip(SocketAddr),
}

/// An inbound HBONE request.
#[derive(Clone, Debug)]
pub struct InboundQuery<'a> {
    /// The workload of the pod that was dialled.
    pub local: &'a Workload,
    /// Where the peer connected to: the pod's IP and 15008.
    pub dialled: OrigDst,
    /// What the peer asks for.
    pub asked: Asked,
    /// The host name that the peer says its application dialled.
    pub forwarded_host: Option<&'a str>,
}

/// Where an inbound connection is delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The application.
    pub app: AppAddr,
    /// The service that the client dialled, if the pod serves it.
    pub service: Option<Arc<Service>>,
    /// Where the connection was going, for an application that wants to read that first, in a
    /// PROXY header.
    pub announced: Option<SocketAddr>,
}

/// Finds the application of one inbound HBONE request.
///
/// # Errors
/// When the authority is not this pod's to serve.
// PROTOCOL.md#inbound-validation
pub fn deliver(snapshot: &Snapshot, query: &InboundQuery<'_>) -> Result<Delivery, Error> {
    let pod = query.dialled.ip();
    let Target {
        port,
        service,
        going_to,
    } = match &query.asked {
        Asked::Ip(asked) => by_address(snapshot, query, *asked)?,
        Asked::Host(host, port) => by_host(snapshot, query, host, *port)?,
    };
    let tunnel = query.local.application_tunnel;
    let taken = tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port);
    for port in [port, taken] {
        if OWN_PORTS.contains(&port) {
            return Err(Error::OwnPort(port));
        }
    }
    let announced = match tunnel {
        Some(ApplicationTunnel {
            protocol: AppProtocol::Proxy,
            ..
        }) => Some(going_to.ok_or_else(|| unknown(&query.asked))?),
        Some(ApplicationTunnel {
            protocol: AppProtocol::None,
            ..
        })
        | None => None,
    };
    let service = service.or_else(|| {
        query
            .forwarded_host
            .and_then(|host| snapshot.service_of(query.local, host))
    });
    Ok(Delivery {
        app: AppAddr::new(SocketAddr::new(pod, taken)),
        service: service.map(Arc::clone),
        announced,
    })
}

/// What the authority means at this pod.
struct Target<'a> {
    port: u16,
    service: Option<&'a Arc<Service>>,
    /// Where the connection was going before it came here.
    going_to: Option<SocketAddr>,
}

fn by_address<'a>(
    snapshot: &'a Snapshot,
    query: &InboundQuery<'_>,
    asked: SocketAddr,
) -> Result<Target<'a>, Error> {
    let asked = canonical(asked);
    let pod = query.dialled.ip();
    let served = asked.ip() == pod
        || query.local.application_tunnel.is_some()
        || fronts_address(snapshot, query.local, asked.ip());
    if !served {
        return Err(Error::WrongPod {
            asked: asked.ip(),
            pod,
        });
    }
    Ok(Target {
        port: asked.port(),
        service: None,
        going_to: Some(asked),
    })
}

/// A service that the pod serves, or whose waypoint it is; a pod that takes connections for others
/// takes any that it may see.
fn by_host<'a>(
    snapshot: &'a Snapshot,
    query: &InboundQuery<'_>,
    host: &str,
    port: u16,
) -> Result<Target<'a>, Error> {
    let local = query.local;
    let taken = || snapshot.service_named(host, &local.namespace);
    let fronted = |service: &&Arc<Service>| {
        local.application_tunnel.is_some() || fronts(snapshot, local, service)
    };
    let service = snapshot
        .service_of(local, host)
        .or_else(|| taken().filter(fronted))
        .ok_or_else(|| unknown(&query.asked))?;
    // An application that takes all connections on one port has no use for a target.
    let one_for_all = || {
        let tunnel = local.application_tunnel?;
        tunnel.port.filter(|_| service.ports.contains_key(&port))
    };
    let target = balance::target_port(service, local, port)
        .or_else(one_for_all)
        .ok_or_else(|| unknown(&query.asked))?;
    Ok(Target {
        port: target,
        service: Some(service),
        going_to: vip(service, &local.network).map(|ip| SocketAddr::new(ip, port)),
    })
}

/// Whether the pod is the waypoint of whatever has this address.
fn fronts_address(snapshot: &Snapshot, local: &Workload, ip: IpAddr) -> bool {
    let mut services = snapshot.services_at(&local.network, ip);
    services.any(|service| fronts(snapshot, local, service))
        || snapshot
            .workload_at(&local.network, ip)
            .and_then(|workload| workload.waypoint.as_ref())
            .is_some_and(|waypoint| waypoint::leads_to(snapshot, waypoint, local))
}

/// Whether the pod is a waypoint of a service.
fn fronts(snapshot: &Snapshot, local: &Workload, service: &Service) -> bool {
    let leads_here = |waypoint: &GatewayAddress| waypoint::leads_to(snapshot, waypoint, local);
    let mut weighted = service.weighted_waypoints.iter();
    service.waypoint.as_ref().is_some_and(leads_here)
        || weighted.any(|waypoint| leads_here(&waypoint.destination))
}

/// The address that stands for a service: one on this network, IPv4 before IPv6, else any.
fn vip(service: &Service, network: &str) -> Option<IpAddr> {
    let here = |vip: &&NetworkAddr| *vip.network == *network;
    let vips = || service.vips.iter().filter(here).map(|vip| vip.ip);
    vips()
        .find(IpAddr::is_ipv4)
        .or_else(|| vips().next())
        .or_else(|| service.vips.first().map(|vip| vip.ip))
}

fn unknown(asked: &Asked) -> Error {
    let (host, port) = match asked {
        Asked::Host(host, port) => (host.clone(), *port),
        Asked::Ip(addr) => (addr.ip().to_string(), addr.port()),
    };
    Error::UnknownHost { host, port }
}

/// Ports that would lead back into the node proxy.
// PROTOCOL.md#ports
pub(crate) const OWN_PORTS: [u16; 4] = [15001, 15006, 15008, 15080];
