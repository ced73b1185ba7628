//! Choosing one endpoint of a service. Takes the snapshot, the client's workload and a random
//! number, gives an endpoint and its port; never prefers one that policy or health leaves out.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{
    Health, HealthPolicy, IpFamilies, LoadBalancerMode, RoutingScope, Service, Workload,
};

use super::Snapshot;

/// An endpoint and the port that it serves the asked service port on.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    pub(super) workload: Arc<Workload>,
    pub(super) port: u16,
}

/// The endpoint for one connection, by capacity among the best-ranked; `dice` decides.
// PROTOCOL.md#load-balancing
pub(super) fn choose(
    snapshot: &Snapshot,
    source: &Workload,
    service: &Service,
    port: u16,
    dice: u64,
) -> Option<Chosen> {
    let balancer = &service.load_balancer;
    let mut candidates: Vec<(Rank, Chosen)> = Vec::new();
    for workload in snapshot.endpoints(&service.key) {
        if workload.health == Health::Unhealthy
            && balancer.health_policy == HealthPolicy::OnlyHealthy
        {
            continue;
        }
        let Some(target) = target_port(service, workload, port) else {
            continue;
        };
        if workload.ips.is_empty() && workload.hostname.is_empty() {
            continue;
        }
        let rank = Rank::of(&balancer.routing_preferences, source, workload);
        let kept = match balancer.mode {
            LoadBalancerMode::Strict => rank.all,
            LoadBalancerMode::Failover
            | LoadBalancerMode::Passthrough
            | LoadBalancerMode::Standard => true,
        };
        if kept {
            let workload = Arc::clone(workload);
            candidates.push((
                rank,
                Chosen {
                    workload,
                    port: target,
                },
            ));
        }
    }
    let ranked = matches!(
        balancer.mode,
        LoadBalancerMode::Failover | LoadBalancerMode::Strict
    );
    if ranked && let Some(best) = candidates.iter().map(|(rank, _)| *rank).max() {
        candidates.retain(|(rank, _)| *rank == best);
    }
    by_capacity(candidates, dice)
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

/// The address of a workload for a connection to `asked`: that address if it has it, else one of
/// the same family, else any that the service allows.
pub(super) fn address(
    workload: &Workload,
    families: Option<IpFamilies>,
    asked: IpAddr,
) -> Option<IpAddr> {
    if workload.ips.contains(&asked) {
        return Some(asked);
    }
    let allowed = |ip: &&IpAddr| match families {
        None | Some(IpFamilies::Dual) => true,
        Some(IpFamilies::Ipv4Only) => ip.is_ipv4(),
        Some(IpFamilies::Ipv6Only) => ip.is_ipv6(),
    };
    workload
        .ips
        .iter()
        .filter(allowed)
        .find(|ip| ip.is_ipv4() == asked.is_ipv4())
        .or_else(|| workload.ips.iter().find(allowed))
        .copied()
}

/// How well an endpoint fits the preferences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Preferences met, counted from the first and stopping at the first miss. A first preference
    /// for the network is special: met, it outweighs all others; missed, it is passed over.
    score: usize,
    /// None was missed.
    all: bool,
}

impl Rank {
    fn of(preferences: &[RoutingScope], source: &Workload, endpoint: &Workload) -> Self {
        let mut score = 0;
        for (position, scope) in preferences.iter().enumerate() {
            let network_first = position == 0 && *scope == RoutingScope::Network;
            match (in_common(*scope, source, endpoint), network_first) {
                (true, true) => score += preferences.len(),
                (true, false) => score += 1,
                (false, true) => {}
                (false, false) => break,
            }
        }
        let all = preferences
            .iter()
            .all(|scope| in_common(*scope, source, endpoint));
        Self { score, all }
    }
}

fn in_common(scope: RoutingScope, source: &Workload, endpoint: &Workload) -> bool {
    match scope {
        RoutingScope::Cluster => source.cluster_id == endpoint.cluster_id,
        RoutingScope::Network => source.network == endpoint.network,
        RoutingScope::Node => source.node == endpoint.node,
        RoutingScope::Region => source.locality.region == endpoint.locality.region,
        RoutingScope::Subzone => source.locality.subzone == endpoint.locality.subzone,
        RoutingScope::Zone => source.locality.zone == endpoint.locality.zone,
    }
}

/// One of the candidates with a chance in proportion to its capacity; 0 is never chosen.
fn by_capacity(candidates: Vec<(Rank, Chosen)>, dice: u64) -> Option<Chosen> {
    let capacity = |chosen: &Chosen| u64::from(chosen.workload.capacity);
    let total: u64 = candidates.iter().map(|(_, chosen)| capacity(chosen)).sum();
    let mut left = dice.checked_rem(total)?;
    for (_, chosen) in candidates {
        match left.checked_sub(capacity(&chosen)) {
            Some(rest) => left = rest,
            None => return Some(chosen),
        }
    }
    None
}
