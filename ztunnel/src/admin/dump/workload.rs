//! A workload in the dump: the keys of the local file, without those that say nothing. Takes one of
//! the model, gives what serde writes; never copies its texts.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;

use crate::model::{
    AppProtocol, GatewayAddress, GatewayDestination, Health, Locality, NetworkMode, Protocol,
    Workload,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WorkloadView<'a> {
    workload_ips: &'a [IpAddr],
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_gateway: Option<GatewayView>,
    protocol: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_mode: Option<&'static str>,
    uid: &'a str,
    name: &'a str,
    namespace: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    trust_domain: &'a str,
    service_account: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    network: &'a str,
    workload_name: &'a str,
    workload_type: &'a str,
    canonical_name: &'a str,
    canonical_revision: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    hostname: &'a str,
    node: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    native_tunnel: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    application_tunnel: Option<TunnelView>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    authorization_policies: Vec<String>,
    status: &'static str,
    cluster_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    locality: Option<LocalityView<'a>>,
    services: BTreeMap<String, &'a BTreeMap<u16, u16>>,
    capacity: u32,
}

impl<'a> WorkloadView<'a> {
    pub(super) fn of(workload: &'a Workload) -> Self {
        let identity = workload.identity.as_ref();
        Self {
            workload_ips: &workload.ips,
            waypoint: workload.waypoint.as_ref().map(GatewayView::of),
            network_gateway: workload.network_gateway.as_ref().map(GatewayView::of),
            protocol: match workload.protocol {
                Protocol::Hbone => "HBONE",
                Protocol::Tcp => "TCP",
            },
            network_mode: match workload.network_mode {
                NetworkMode::HostNetwork => Some("HostNetwork"),
                NetworkMode::Standard => None,
            },
            uid: &workload.uid.0,
            name: &workload.name,
            namespace: &workload.namespace,
            trust_domain: identity.map_or("", |id| id.trust_domain().as_str()),
            service_account: identity.map_or("", |id| id.service_account()),
            network: &workload.network,
            workload_name: &workload.workload_name,
            workload_type: &workload.workload_type,
            canonical_name: &workload.canonical_name,
            canonical_revision: &workload.canonical_revision,
            hostname: &workload.hostname,
            node: &workload.node,
            native_tunnel: workload.native_tunnel,
            application_tunnel: workload.application_tunnel.map(|tunnel| TunnelView {
                protocol: match tunnel.protocol {
                    AppProtocol::None => "NONE",
                    AppProtocol::Proxy => "PROXY",
                },
                port: tunnel.port,
            }),
            authorization_policies: workload
                .authorization_policies
                .iter()
                .map(ToString::to_string)
                .collect(),
            status: health(workload.health),
            cluster_id: &workload.cluster_id,
            locality: LocalityView::of(&workload.locality),
            services: workload
                .services
                .iter()
                .map(|(key, ports)| (key.to_string(), ports))
                .collect(),
            capacity: workload.capacity,
        }
    }
}

/// A waypoint or a network gateway.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GatewayView {
    destination: String,
    hbone_mtls_port: u16,
}

impl GatewayView {
    pub(super) fn of(gateway: &GatewayAddress) -> Self {
        let destination = match &gateway.destination {
            GatewayDestination::Address(address) => format!("{}/{}", address.network, address.ip),
            GatewayDestination::Hostname(name) => name.to_string(),
        };
        Self {
            destination,
            hbone_mtls_port: gateway.hbone_mtls_port,
        }
    }
}

#[derive(Serialize)]
struct TunnelView {
    protocol: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

#[derive(Serialize)]
struct LocalityView<'a> {
    region: &'a str,
    zone: &'a str,
    subzone: &'a str,
}

impl<'a> LocalityView<'a> {
    fn of(locality: &'a Locality) -> Option<Self> {
        (*locality != Locality::default()).then(|| Self {
            region: &locality.region,
            zone: &locality.zone,
            subzone: &locality.subzone,
        })
    }
}

pub(super) const fn health(health: Health) -> &'static str {
    match health {
        Health::Healthy => "Healthy",
        Health::Unhealthy => "Unhealthy",
    }
}
