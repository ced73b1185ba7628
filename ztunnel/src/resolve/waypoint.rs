//! Waypoints and network gateways: the proxies that stand between. Takes the place that the mesh
//! names for one, gives the workload behind it; never goes on without it.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{
    GatewayAddress, GatewayDestination, Service, SpiffeId, WeightedWaypoint, Workload,
};

use super::balance::{Purpose, Search};
use super::explain::Trace;
use super::{Query, Snapshot};

/// The workload of a waypoint or gateway, and how it is spoken to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Proxy<'a> {
    pub(super) workload: &'a Arc<Workload>,
    /// The service that it was found by.
    pub(super) service: Option<&'a Arc<Service>>,
    /// Its HBONE port.
    pub(super) port: u16,
    /// The family of this address is preferred.
    pub(super) asked: IpAddr,
}

impl Proxy<'_> {
    /// The identities of which it must prove one.
    pub(super) fn expected(&self) -> Vec<SpiffeId> {
        let mut expected = self.service.map_or_else(Vec::new, |s| identities(s));
        expected.extend(self.workload.identity.clone());
        expected
    }
}

/// The waypoint of a service for this connection, and whether it was drawn among several.
// PROTOCOL.md#weighted-waypoints
pub(super) fn of_service(service: &Service, dice: u64) -> Option<(&GatewayAddress, bool)> {
    let weight = |waypoint: &WeightedWaypoint| u64::from(waypoint.weight);
    let total: u64 = service.weighted_waypoints.iter().map(weight).sum();
    let single = || service.waypoint.as_ref().map(|waypoint| (waypoint, false));
    let Some(mut ticket) = dice.checked_rem(total) else {
        return single();
    };
    for waypoint in &service.weighted_waypoints {
        match ticket.checked_sub(weight(waypoint)) {
            Some(left) => ticket = left,
            None => return Some((&waypoint.destination, true)),
        }
    }
    single()
}

/// What stands at the place of a waypoint or gateway.
enum Found<'a> {
    Service(&'a Arc<Service>),
    Workload(&'a Arc<Workload>),
}

/// Whoever may see it: the mesh has chosen it, not the client.
fn find<'a>(snapshot: &'a Snapshot, destination: &GatewayDestination) -> Option<Found<'a>> {
    match destination {
        GatewayDestination::Address(at) => {
            let service = snapshot.services_at(&at.network, at.ip).next();
            let workload = || snapshot.workload_at(&at.network, at.ip);
            service
                .map(Found::Service)
                .or_else(|| workload().map(Found::Workload))
        }
        GatewayDestination::Hostname(name) => {
            let service = snapshot.service(name);
            let workload = || snapshot.workload_named(name);
            service
                .map(Found::Service)
                .or_else(|| workload().map(Found::Workload))
        }
    }
}

/// The workload behind a waypoint or gateway for one connection.
// PROTOCOL.md#waypoint-address
pub(super) fn reach<'a, T: Trace>(
    snapshot: &'a Snapshot,
    query: &'a Query<'a>,
    (gateway, purpose, dice): (&GatewayAddress, Purpose, u64),
    trace: &mut T,
) -> Option<Proxy<'a>> {
    let asked = match &gateway.destination {
        GatewayDestination::Address(at) => at.ip,
        GatewayDestination::Hostname(_) => query.destination.ip(),
    };
    match find(snapshot, &gateway.destination)? {
        Found::Service(service) => {
            let search = Search {
                snapshot,
                query,
                purpose,
                service,
                port: gateway.hbone_mtls_port,
                asked,
                dice,
            };
            let chosen = search.choose(trace)?;
            Some(Proxy {
                workload: chosen.workload,
                service: Some(service),
                port: chosen.port,
                asked,
            })
        }
        Found::Workload(workload) => {
            let tried = query.avoid.iter().any(|tried| tried.uid == workload.uid);
            (!tried).then_some(Proxy {
                workload,
                service: None,
                port: gateway.hbone_mtls_port,
                asked,
            })
        }
    }
}

/// Whether a workload that connects from `from` is the waypoint at this place: it has both the
/// identity and an address of the waypoint's workload, or of an endpoint of its service.
// PROTOCOL.md#source-is-waypoint
pub(super) fn is_at(
    snapshot: &Snapshot,
    waypoint: &GatewayAddress,
    source: &Workload,
    from: IpAddr,
) -> bool {
    let is_it = |workload: &Arc<Workload>| {
        source.identity.is_some()
            && workload.identity == source.identity
            && workload.ips.contains(&from)
    };
    match find(snapshot, &waypoint.destination) {
        Some(Found::Service(service)) => snapshot.endpoints(&service.key).any(is_it),
        Some(Found::Workload(workload)) => is_it(workload),
        None => false,
    }
}

/// Whether a waypoint's place leads to this workload.
pub(super) fn leads_to(snapshot: &Snapshot, waypoint: &GatewayAddress, local: &Workload) -> bool {
    match find(snapshot, &waypoint.destination) {
        Some(Found::Service(service)) => local.services.contains_key(&service.key),
        Some(Found::Workload(workload)) => workload.uid == local.uid,
        None => false,
    }
}

/// The identities that a service lends to its endpoints; what is no SPIFFE ID cannot match.
pub(super) fn identities(service: &Service) -> Vec<SpiffeId> {
    service
        .subject_alt_names
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests;
