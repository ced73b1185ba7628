//! A service in the dump, with its endpoints. Takes one of the model and the snapshot that it is in,
//! gives what serde writes; never decides which endpoint would be used.

use std::collections::BTreeMap;

use serde::Serialize;

use super::workload::{GatewayView, health};
use crate::model::{
    HealthPolicy, IpFamilies, LoadBalancer, LoadBalancerMode, NamespacedHostname, PortMap,
    RoutingScope, Service, Visibility, Workload,
};
use crate::resolve::Snapshot;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceView<'a> {
    name: &'a str,
    namespace: &'a str,
    hostname: &'a str,
    vips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cidr_vips: Vec<String>,
    ports: &'a PortMap,
    endpoints: BTreeMap<&'a str, EndpointView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    subject_alt_names: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayView>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    weighted_waypoints: Vec<WeightedView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancer: Option<LoadBalancerView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip_families: Option<&'static str>,
    canonical: bool,
    visibility: &'static str,
}

impl<'a> ServiceView<'a> {
    pub(super) fn of(service: &'a Service, snapshot: &'a Snapshot) -> Self {
        let endpoints = snapshot.endpoints(&service.key);
        Self {
            name: &service.name,
            namespace: &service.key.namespace,
            hostname: &service.key.hostname,
            vips: service
                .vips
                .iter()
                .map(|vip| format!("{}/{}", vip.network, vip.ip))
                .collect(),
            cidr_vips: service
                .cidr_vips
                .iter()
                .map(|(network, cidr)| format!("{network}/{cidr}"))
                .collect(),
            ports: &service.ports,
            endpoints: endpoints
                .filter_map(|workload| {
                    let view = EndpointView::of(workload, &service.key)?;
                    Some((&*workload.uid.0, view))
                })
                .collect(),
            subject_alt_names: service
                .subject_alt_names
                .iter()
                .map(AsRef::as_ref)
                .collect(),
            waypoint: service.waypoint.as_ref().map(GatewayView::of),
            weighted_waypoints: service
                .weighted_waypoints
                .iter()
                .map(|weighted| WeightedView {
                    destination: GatewayView::of(&weighted.destination),
                    weight: weighted.weight,
                })
                .collect(),
            load_balancer: LoadBalancerView::of(&service.load_balancer),
            ip_families: service.ip_families.map(|families| match families {
                IpFamilies::Dual => "Dual",
                IpFamilies::Ipv4Only => "IPv4",
                IpFamilies::Ipv6Only => "IPv6",
            }),
            canonical: service.canonical,
            visibility: match service.visibility {
                Visibility::Namespace => "Namespace",
                Visibility::Public => "Public",
            },
        }
    }
}

/// A workload as an endpoint.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointView<'a> {
    workload_uid: &'a str,
    port: &'a PortMap,
    status: &'static str,
}

impl<'a> EndpointView<'a> {
    /// `None` when the workload is no endpoint of that service.
    pub(super) fn of(workload: &'a Workload, service: &NamespacedHostname) -> Option<Self> {
        Some(Self {
            workload_uid: &workload.uid.0,
            port: workload.services.get(service)?,
            status: health(workload.health),
        })
    }
}

#[derive(Serialize)]
struct WeightedView {
    destination: GatewayView,
    weight: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LoadBalancerView {
    routing_preferences: Vec<&'static str>,
    mode: &'static str,
    health_policy: &'static str,
}

impl LoadBalancerView {
    fn of(balancer: &LoadBalancer) -> Option<Self> {
        (*balancer != LoadBalancer::default()).then(|| Self {
            routing_preferences: balancer
                .routing_preferences
                .iter()
                .map(|scope| match scope {
                    RoutingScope::Cluster => "Cluster",
                    RoutingScope::Network => "Network",
                    RoutingScope::Node => "Node",
                    RoutingScope::Region => "Region",
                    RoutingScope::Subzone => "Subzone",
                    RoutingScope::Zone => "Zone",
                })
                .collect(),
            mode: match balancer.mode {
                LoadBalancerMode::Failover => "Failover",
                LoadBalancerMode::Passthrough => "Passthrough",
                LoadBalancerMode::Standard => "Standard",
                LoadBalancerMode::Strict => "Strict",
            },
            health_policy: match balancer.health_policy {
                HealthPolicy::AllowAll => "AllowAll",
                HealthPolicy::OnlyHealthy => "OnlyHealthy",
            },
        })
    }
}
