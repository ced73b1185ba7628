//! Choosing one endpoint of a service. Takes the snapshot, the client's workload and a random
//! number, gives an endpoint and its port; never prefers one that health, capacity or preferences
//! leave out.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{
    Health, HealthPolicy, IpFamilies, LoadBalancerMode, RoutingScope, Service, Workload,
};

use super::explain::{Fate, LeftOut, Step, Trace};
use super::{Query, Snapshot};

/// An endpoint and the port that it serves the asked service port on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen<'a> {
    pub(super) workload: &'a Arc<Workload>,
    pub(super) port: u16,
}

/// What an endpoint is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The connection ends there.
    Endpoint,
    /// It enters another network there.
    Gateway,
    /// L7 policy is applied there.
    Waypoint,
}

/// One question for an endpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Search<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) query: &'a Query<'a>,
    pub(super) purpose: Purpose,
    pub(super) service: &'a Service,
    /// The service port.
    pub(super) port: u16,
    /// The address that was asked for: its family is preferred.
    pub(super) asked: IpAddr,
    pub(super) dice: u64,
}

impl<'a> Search<'a> {
    /// The endpoint, by capacity among the best-ranked.
    // PROTOCOL.md#load-balancing
    pub(super) fn choose<T: Trace>(&self, trace: &mut T) -> Option<Chosen<'a>> {
        let mut best = None;
        let mut total = 0_u64;
        for workload in self.endpoints() {
            let Ok(fit) = self.fit(workload) else {
                continue;
            };
            if best.is_none_or(|best| fit.score > best) {
                best = Some(fit.score);
                total = 0;
            }
            if best == Some(fit.score) {
                total += u64::from(workload.capacity);
            }
        }
        let chosen = best.and_then(|best| self.draw(best, self.dice.checked_rem(total)?));
        trace.step(|| self.explained(best, chosen));
        chosen
    }

    fn endpoints(&self) -> impl Iterator<Item = &'a Arc<Workload>> + use<'a> {
        self.snapshot.endpoints(&self.service.key)
    }

    /// The endpoint of this rank that holds the ticket.
    fn draw(&self, rank: usize, mut ticket: u64) -> Option<Chosen<'a>> {
        for workload in self.endpoints() {
            let Ok(fit) = self.fit(workload) else {
                continue;
            };
            if fit.score != rank {
                continue;
            }
            match ticket.checked_sub(u64::from(workload.capacity)) {
                Some(left) => ticket = left,
                None => {
                    let port = fit.port;
                    return Some(Chosen { workload, port });
                }
            }
        }
        None
    }

    fn explained(&self, best: Option<usize>, chosen: Option<Chosen<'_>>) -> Step {
        let fate = |workload: &Arc<Workload>| match self.fit(workload) {
            Err(why) => Fate::LeftOut(why),
            Ok(fit) if best.is_some_and(|best| fit.score < best) => {
                Fate::LeftOut(LeftOut::Outranked)
            }
            Ok(_) if chosen.is_some_and(|chosen| Arc::ptr_eq(chosen.workload, workload)) => {
                Fate::Chosen
            }
            Ok(_) => Fate::NotDrawn,
        };
        Step::Balanced {
            service: self.service.key.clone(),
            port: self.port,
            mode: self.service.load_balancer.mode,
            endpoints: self
                .endpoints()
                .map(|workload| (workload.uid.clone(), fate(workload)))
                .collect(),
        }
    }

    /// How well an endpoint fits, or why it is left out.
    fn fit(&self, workload: &Workload) -> Result<Fit, LeftOut> {
        let balancer = &self.service.load_balancer;
        if self
            .query
            .avoid
            .iter()
            .any(|tried| tried.uid == workload.uid)
        {
            return Err(LeftOut::Tried);
        }
        if workload.health == Health::Unhealthy
            && balancer.health_policy == HealthPolicy::OnlyHealthy
        {
            return Err(LeftOut::Unhealthy);
        }
        if workload.capacity == 0 {
            return Err(LeftOut::NoCapacity);
        }
        let port = self.target_port(workload).ok_or(LeftOut::NoPort)?;
        self.reachable(workload)?;
        let score = match balancer.mode {
            LoadBalancerMode::Passthrough | LoadBalancerMode::Standard => 0,
            LoadBalancerMode::Failover => {
                score(&balancer.routing_preferences, self.query.source, workload)
            }
            LoadBalancerMode::Strict => {
                let preferences = &balancer.routing_preferences;
                let missed =
                    |scope: &&RoutingScope| !is_shared(**scope, self.query.source, workload);
                if let Some(scope) = preferences.iter().find(missed) {
                    return Err(LeftOut::Elsewhere(*scope));
                }
                0
            }
        };
        Ok(Fit { score, port })
    }

    fn target_port(&self, workload: &Workload) -> Option<u16> {
        target_port(self.service, workload, self.port).or_else(|| {
            // A waypoint may take HBONE on a port that its service does not tell.
            let taken = self.purpose == Purpose::Waypoint
                && workload
                    .application_tunnel
                    .is_some_and(|tunnel| tunnel.port.is_some());
            taken.then_some(self.port)
        })
    }

    fn reachable(&self, workload: &Workload) -> Result<(), LeftOut> {
        let far = self.purpose != Purpose::Gateway && workload.network != self.query.source.network;
        if far {
            return match workload.network_gateway {
                Some(_) => Ok(()),
                None => Err(LeftOut::NoGateway),
            };
        }
        match place(workload, self.service.ip_families, self.asked) {
            Some(_) => Ok(()),
            None => Err(LeftOut::NoAddress),
        }
    }
}

/// An endpoint that could be chosen.
#[derive(Clone, Copy, Debug)]
struct Fit {
    score: usize,
    port: u16,
}

/// The target port of a service port at one workload: the workload's own map, then the service's
/// target unless that is 0, a named port.
pub(super) fn target_port(service: &Service, workload: &Workload, port: u16) -> Option<u16> {
    let of_service = *service.ports.get(&port)?;
    let of_workload = workload
        .services
        .get(&service.key)
        .and_then(|ports| ports.get(&port))
        .copied();
    of_workload
        .or(Some(of_service))
        .filter(|target| *target != 0)
}

/// Where a workload is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    At(IpAddr),
    Named(Arc<str>),
}

/// Where a workload is for a connection to `asked`: at that address if it has it, else at one of
/// the same family, else at any that the service allows, else by its host name.
// PROTOCOL.md#address-choice
pub(super) fn place(
    workload: &Workload,
    families: Option<IpFamilies>,
    asked: IpAddr,
) -> Option<Place> {
    if workload.ips.contains(&asked) {
        return Some(Place::At(asked));
    }
    let allowed = |ip: &&IpAddr| match families {
        None | Some(IpFamilies::Dual) => true,
        Some(IpFamilies::Ipv4Only) => ip.is_ipv4(),
        Some(IpFamilies::Ipv6Only) => ip.is_ipv6(),
    };
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == asked.is_ipv4();
    let of_family = workload.ips.iter().filter(allowed).find(same_family);
    if let Some(ip) = of_family.or_else(|| workload.ips.iter().find(allowed)) {
        return Some(Place::At(*ip));
    }
    (!workload.hostname.is_empty()).then(|| Place::Named(Arc::clone(&workload.hostname)))
}

/// How well an endpoint fits the preferences: those met, counted from the first and stopping at the
/// first miss. A first preference for the network is special: met, it outweighs all others;
/// missed, it is passed over.
fn score(preferences: &[RoutingScope], source: &Workload, endpoint: &Workload) -> usize {
    let mut score = 0;
    for (position, scope) in preferences.iter().enumerate() {
        let network_first = position == 0 && *scope == RoutingScope::Network;
        match (is_shared(*scope, source, endpoint), network_first) {
            (true, true) => score += preferences.len(),
            (true, false) => score += 1,
            (false, true) => {}
            (false, false) => break,
        }
    }
    score
}

fn is_shared(scope: RoutingScope, source: &Workload, endpoint: &Workload) -> bool {
    match scope {
        RoutingScope::Cluster => source.cluster_id == endpoint.cluster_id,
        RoutingScope::Network => source.network == endpoint.network,
        RoutingScope::Node => source.node == endpoint.node,
        RoutingScope::Region => source.locality.region == endpoint.locality.region,
        RoutingScope::Subzone => source.locality.subzone == endpoint.locality.subzone,
        RoutingScope::Zone => source.locality.zone == endpoint.locality.zone,
    }
}
