//! A service from the wire. Takes the control plane's message, gives a checked service, or the field that is wrong.

use std::net::IpAddr;

use super::leaf::{gateway, hostname, ip, net, port, target_port};
use super::{Interner, Rejected, refuse};
use crate::model::{
    HealthPolicy, IpFamilies, LoadBalancer, LoadBalancerMode, NetworkAddr, PortMap, RoutingScope,
    Service, Visibility, WeightedWaypoint,
};
use crate::proto::workload as wire;

// PROTOCOL.md#service-conversion
pub(super) fn convert(interner: &mut Interner, from: wire::Service) -> Result<Service, Rejected> {
    let key = hostname(interner, "hostname", &from.namespace, &from.hostname)?;
    let mut vips = Vec::new();
    let mut cidr_vips = Vec::new();
    for address in &from.addresses {
        let network = interner.text(&address.network);
        let exact = ip("addresses", &address.address)?;
        match address.length {
            Some(length) if length != host_bits(&address.address) => {
                cidr_vips.push((network, net("addresses", &address.address, length)?));
            }
            _ => vips.push(NetworkAddr::new(network, exact)),
        }
    }
    let mut ports = PortMap::new();
    for pair in &from.ports {
        let service = port("ports", pair.service_port)?;
        ports.insert(service, target_port("ports", pair.target_port)?);
    }
    let weighted = from.weighted_waypoints.into_iter().map(|waypoint| {
        let field = "weighted_waypoints";
        let destination = waypoint
            .destination
            .ok_or_else(|| refuse(field, "has no destination"))?;
        Ok(WeightedWaypoint {
            destination: gateway(interner, field, destination)?,
            weight: waypoint.weight,
        })
    });
    let weighted_waypoints = weighted.collect::<Result<_, Rejected>>()?;
    Ok(Service {
        name: interner.text(&from.name),
        key,
        vips,
        cidr_vips,
        ports,
        subject_alt_names: from
            .subject_alt_names
            .iter()
            .map(|name| interner.text(name))
            .collect(),
        waypoint: from
            .waypoint
            .map(|from| gateway(interner, "waypoint", from))
            .transpose()?,
        weighted_waypoints,
        load_balancer: from
            .load_balancing
            .as_ref()
            .map(load_balancer)
            .transpose()?
            .unwrap_or_default(),
        ip_families: match wire::IpFamilies::try_from(from.ip_families) {
            Ok(wire::IpFamilies::Automatic) | Err(_) => None,
            Ok(wire::IpFamilies::Ipv4Only) => Some(IpFamilies::Ipv4Only),
            Ok(wire::IpFamilies::Ipv6Only) => Some(IpFamilies::Ipv6Only),
            Ok(wire::IpFamilies::Dual) => Some(IpFamilies::Dual),
        },
        canonical: from.canonical,
        visibility: match wire::service::Visibility::try_from(from.visibility) {
            Ok(wire::service::Visibility::Public) | Err(_) => Visibility::Public,
            Ok(wire::service::Visibility::Namespace) => Visibility::Namespace,
        },
    })
}

fn load_balancer(from: &wire::LoadBalancing) -> Result<LoadBalancer, Rejected> {
    use wire::load_balancing as lb;
    let field = "load_balancing";
    let routing_preferences = from
        .routing_preference
        .iter()
        .map(|number| scope(*number))
        .collect::<Result<_, _>>()?;
    let mode = match lb::Mode::try_from(from.mode) {
        Ok(lb::Mode::UnspecifiedMode) => LoadBalancerMode::Standard,
        Ok(lb::Mode::Strict) => LoadBalancerMode::Strict,
        Ok(lb::Mode::Failover) => LoadBalancerMode::Failover,
        Ok(lb::Mode::Passthrough) => LoadBalancerMode::Passthrough,
        Err(_) => {
            return Err(refuse(
                field,
                format!("mode {} is not known here", from.mode),
            ));
        }
    };
    let health_policy = match lb::HealthPolicy::try_from(from.health_policy) {
        Ok(lb::HealthPolicy::OnlyHealthy) => HealthPolicy::OnlyHealthy,
        Ok(lb::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
        Err(_) => {
            let reason = format!("health policy {} is not known here", from.health_policy);
            return Err(refuse(field, reason));
        }
    };
    Ok(LoadBalancer {
        routing_preferences,
        mode,
        health_policy,
    })
}

fn scope(number: i32) -> Result<RoutingScope, Rejected> {
    use wire::load_balancing::Scope;
    match Scope::try_from(number) {
        Ok(Scope::Region) => Ok(RoutingScope::Region),
        Ok(Scope::Zone) => Ok(RoutingScope::Zone),
        Ok(Scope::Subzone) => Ok(RoutingScope::Subzone),
        Ok(Scope::Node) => Ok(RoutingScope::Node),
        Ok(Scope::Cluster) => Ok(RoutingScope::Cluster),
        Ok(Scope::Network) => Ok(RoutingScope::Network),
        Ok(Scope::UnspecifiedScope) | Err(_) => Err(refuse(
            "load_balancing",
            format!("scope {number} is not known here"),
        )),
    }
}

/// How many bits the prefix of a single address has.
fn host_bits(address: &[u8]) -> u32 {
    match ip("", address) {
        Ok(IpAddr::V4(_)) if address.len() == 4 => 32,
        _ => 128,
    }
}
