//! The way out of a pod. Takes what the application dialled, gives the next hop and who must be
//! there; never falls back to plain TCP for a destination of the mesh.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::{
    LoadBalancerMode, OrigDst, Protocol, Service, SpiffeId, UpstreamAddr, Workload,
};

use super::{Error, Snapshot, balance};

/// What an application of this node dialled.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Its workload.
    pub source: &'a Workload,
    /// The address that it dialled.
    pub destination: OrigDst,
    /// A random number: the choice among endpoints.
    pub dice: u64,
}

/// How the next hop is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hop {
    /// By HBONE.
    Hbone {
        /// The authority of the CONNECT.
        authority: SocketAddr,
        /// The identities of which the peer must prove one.
        expected: Vec<SpiffeId>,
    },
    /// In plain TCP.
    Plain,
}

/// The way of one outbound connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// What to dial.
    pub upstream: UpstreamAddr,
    /// How to speak there.
    pub hop: Hop,
    /// The workload that was chosen, if the mesh knows the destination.
    pub workload: Option<Arc<Workload>>,
    /// The service that was dialled, if one was.
    pub service: Option<Arc<Service>>,
}

/// Finds the way of one outbound connection.
///
/// # Errors
/// When the destination belongs to the mesh and cannot be reached as it must be.
// PROTOCOL.md#outbound-routing
pub fn route(snapshot: &Snapshot, query: &Query<'_>) -> Result<Route, Error> {
    let asked = query.destination;
    let network = &query.source.network;
    let service = snapshot.service_at(network, asked.ip(), &query.source.namespace);
    let Some(service) = service else {
        return match snapshot.workload_at(network, asked.ip()) {
            Some(workload) => to_workload(query, workload),
            None => Ok(plain(asked)),
        };
    };
    if service.waypoint.is_some() || !service.weighted_waypoints.is_empty() {
        return Err(Error::Unsupported("a waypoint"));
    }
    if service.load_balancer.mode == LoadBalancerMode::Passthrough {
        return Ok(Route {
            service: Some(Arc::clone(service)),
            ..plain(asked)
        });
    }
    let chosen = balance::choose(snapshot, query.source, service, asked.port(), query.dice);
    let chosen = chosen.ok_or_else(|| Error::NoEndpoint {
        service: service.key.clone(),
        port: asked.port(),
    })?;
    let ip = balance::address(&chosen.workload, service.ip_families, asked.ip())
        .ok_or_else(|| Error::NoAddress(chosen.workload.uid.clone()))?;
    let mut expected = service_identities(service);
    expected.extend(chosen.workload.identity.clone());
    let target = SocketAddr::new(ip, chosen.port);
    let mut route = direct(query, &chosen.workload, target, expected)?;
    route.service = Some(Arc::clone(service));
    Ok(route)
}

fn to_workload(query: &Query<'_>, workload: &Arc<Workload>) -> Result<Route, Error> {
    if workload.waypoint.is_some() {
        return Err(Error::Unsupported("a waypoint"));
    }
    let expected = workload.identity.clone().into_iter().collect();
    direct(query, workload, query.destination.addr(), expected)
}

fn direct(
    query: &Query<'_>,
    workload: &Arc<Workload>,
    target: SocketAddr,
    expected: Vec<SpiffeId>,
) -> Result<Route, Error> {
    if workload.network != query.source.network {
        return Err(Error::Unsupported("a network gateway"));
    }
    let (upstream, hop) = match workload.protocol {
        Protocol::Hbone => (
            SocketAddr::new(target.ip(), HBONE_PORT),
            Hop::Hbone {
                authority: target,
                expected,
            },
        ),
        Protocol::Tcp => (target, Hop::Plain),
    };
    Ok(Route {
        upstream: UpstreamAddr::new(upstream),
        hop,
        workload: Some(Arc::clone(workload)),
        service: None,
    })
}

fn plain(asked: OrigDst) -> Route {
    Route {
        upstream: UpstreamAddr::new(asked.addr()),
        hop: Hop::Plain,
        workload: None,
        service: None,
    }
}

/// The identities that the service lends to its endpoints; what is no SPIFFE ID cannot match.
fn service_identities(service: &Service) -> Vec<SpiffeId> {
    service
        .subject_alt_names
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect()
}

/// Where workloads take HBONE.
// PROTOCOL.md#ports
const HBONE_PORT: u16 = 15008;

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
