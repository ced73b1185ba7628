//! A workload from the wire. Takes the control plane's message, gives a checked workload, or the field that is wrong.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::leaf::{gateway, hostname, ip, name, port, target_port};
use super::{Interner, Rejected, refuse};
use crate::model::{
    AppProtocol, ApplicationTunnel, Health, InvalidSpiffeId, Locality, NamespacedHostname,
    NetworkMode, PolicyKey, PortMap, Protocol, Workload, WorkloadUid,
};
use crate::proto::workload as wire;

// PROTOCOL.md#workload-conversion
pub(super) fn convert(interner: &mut Interner, from: wire::Workload) -> Result<Workload, Rejected> {
    let uid: Arc<str> = name("uid", &from.uid)?.into();
    let protocol = protocol(from.tunnel_protocol)?;
    let network_mode = match wire::NetworkMode::try_from(from.network_mode) {
        Ok(wire::NetworkMode::Standard) => NetworkMode::Standard,
        Ok(wire::NetworkMode::HostNetwork) => NetworkMode::HostNetwork,
        Err(_) => return Err(unknown("network_mode", from.network_mode)),
    };
    let health = match wire::WorkloadStatus::try_from(from.status) {
        Ok(wire::WorkloadStatus::Healthy) => Health::Healthy,
        Ok(wire::WorkloadStatus::Unhealthy) => Health::Unhealthy,
        Err(_) => return Err(unknown("status", from.status)),
    };
    let identity = interner
        .identity(
            or(&from.trust_domain, DEFAULT_TRUST_DOMAIN),
            &from.namespace,
            or(&from.service_account, DEFAULT_SERVICE_ACCOUNT),
        )
        .map_err(|error| refuse(identity_field(error), error.to_string()))?;
    let ips = from
        .addresses
        .iter()
        .map(|bytes| ip("addresses", bytes))
        .collect::<Result<_, _>>()?;
    let policies = from
        .authorization_policies
        .iter()
        .map(|text| policy_key(interner, text))
        .collect::<Result<_, _>>()?;
    let locality = from.locality.unwrap_or_default();
    Ok(Workload {
        uid: WorkloadUid(uid),
        name: from.name.into(),
        namespace: interner.text(&from.namespace),
        identity,
        ips,
        network: interner.text(&from.network),
        protocol,
        network_mode,
        workload_name: interner.text(&from.workload_name),
        workload_type: interner.text(kind(from.workload_type)),
        canonical_name: interner.text(&from.canonical_name),
        canonical_revision: interner.text(&from.canonical_revision),
        hostname: interner.text(&from.hostname),
        node: interner.text(&from.node),
        cluster_id: interner.text(or(&from.cluster_id, DEFAULT_CLUSTER_ID)),
        waypoint: from
            .waypoint
            .map(|from| gateway(interner, "waypoint", from))
            .transpose()?,
        network_gateway: from
            .network_gateway
            .map(|from| gateway(interner, "network_gateway", from))
            .transpose()?,
        application_tunnel: from.application_tunnel.as_ref().map(tunnel).transpose()?,
        native_tunnel: from.native_tunnel,
        authorization_policies: policies,
        health,
        locality: Locality {
            region: interner.text(&locality.region),
            zone: interner.text(&locality.zone),
            subzone: interner.text(&locality.subzone),
        },
        capacity: from.capacity.unwrap_or(DEFAULT_CAPACITY),
        services: services(interner, &from.services)?,
    })
}

fn protocol(number: i32) -> Result<Protocol, Rejected> {
    match wire::TunnelProtocol::try_from(number) {
        Ok(wire::TunnelProtocol::None) => Ok(Protocol::Tcp),
        Ok(wire::TunnelProtocol::Hbone) => Ok(Protocol::Hbone),
        Ok(wire::TunnelProtocol::LegacyIstioMtls) => Err(refuse(
            "tunnel_protocol",
            "LEGACY_ISTIO_MTLS is not spoken here",
        )),
        Err(_) => Err(unknown("tunnel_protocol", number)),
    }
}

/// The name of the owner's kind; an unknown one is the first.
fn kind(number: i32) -> &'static str {
    match wire::WorkloadType::try_from(number) {
        Ok(wire::WorkloadType::Deployment) | Err(_) => "deployment",
        Ok(wire::WorkloadType::Cronjob) => "cronjob",
        Ok(wire::WorkloadType::Pod) => "pod",
        Ok(wire::WorkloadType::Job) => "job",
    }
}

fn policy_key(interner: &mut Interner, text: &str) -> Result<PolicyKey, Rejected> {
    let key: PolicyKey = text
        .parse()
        .map_err(|error| refuse("authorization_policies", format!("{error}")))?;
    Ok(PolicyKey {
        namespace: interner.text(&key.namespace),
        name: interner.text(&key.name),
    })
}

fn tunnel(from: &wire::ApplicationTunnel) -> Result<ApplicationTunnel, Rejected> {
    use wire::application_tunnel::Protocol as Wire;
    let field = "application_tunnel";
    let protocol = match Wire::try_from(from.protocol) {
        Ok(Wire::None) => AppProtocol::None,
        Ok(Wire::Proxy) => AppProtocol::Proxy,
        Err(_) => return Err(unknown(field, from.protocol)),
    };
    let port = match from.port {
        0 => None,
        number => Some(port(field, number)?),
    };
    Ok(ApplicationTunnel { protocol, port })
}

fn services(
    interner: &mut Interner,
    from: &std::collections::HashMap<String, wire::PortList>,
) -> Result<BTreeMap<NamespacedHostname, PortMap>, Rejected> {
    let mut services = BTreeMap::new();
    for (key, list) in from {
        let Some((namespace, host)) = key.split_once('/') else {
            return Err(refuse(
                "services",
                format!("{key:?} is not namespace/hostname"),
            ));
        };
        let key = hostname(interner, "services", namespace, host)?;
        let mut ports = PortMap::new();
        for pair in &list.ports {
            let service = port("services", pair.service_port)?;
            let target = target_port("services", pair.target_port)?;
            // A named port that this workload does not have: it serves nothing there.
            if target != 0 {
                ports.insert(service, target);
            }
        }
        services.insert(key, ports);
    }
    Ok(services)
}

fn unknown(field: &'static str, number: i32) -> Rejected {
    refuse(field, format!("{number} is not known here"))
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn identity_field(error: InvalidSpiffeId) -> &'static str {
    match error {
        InvalidSpiffeId::Character("trust domain") | InvalidSpiffeId::Empty("trust domain") => {
            "trust_domain"
        }
        InvalidSpiffeId::Character("namespace") | InvalidSpiffeId::Empty("namespace") => {
            "namespace"
        }
        InvalidSpiffeId::Character(_) | InvalidSpiffeId::Empty(_) | InvalidSpiffeId::Form => {
            "service_account"
        }
    }
}

// PROTOCOL.md#workload-defaults
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_SERVICE_ACCOUNT: &str = "default";
const DEFAULT_CLUSTER_ID: &str = "Kubernetes";
const DEFAULT_CAPACITY: u32 = 1;
