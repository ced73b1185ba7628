//! Services. Takes the control plane's words, already checked, gives VIPs, ports and endpoints;
//! never chooses one.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use super::addr::NetworkAddr;
use super::workload::{GatewayAddress, NamespacedHostname};

/// Service port → target port; target 0 is a named port that each endpoint maps itself.
pub type PortMap = BTreeMap<u16, u16>;

/// Who may see a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Visibility {
    /// Only clients of its own namespace.
    Namespace,
    /// Everybody.
    #[default]
    Public,
}

/// Which addresses clients may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpFamilies {
    /// Both families.
    Dual,
    /// IPv4.
    Ipv4Only,
    /// IPv6.
    Ipv6Only,
}

/// What a client and an endpoint should have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingScope {
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
    /// Same node.
    Node,
    /// Same region.
    Region,
    /// Same part of a zone.
    Subzone,
    /// Same zone.
    Zone,
}

/// What the preferences decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadBalancerMode {
    /// The best-matching group that exists.
    Failover,
    /// Nothing is balanced: the connection goes where it was going.
    Passthrough,
    /// All endpoints.
    #[default]
    Standard,
    /// Only endpoints that match every preference.
    Strict,
}

/// Whether unhealthy endpoints are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HealthPolicy {
    /// They are.
    AllowAll,
    /// They are not.
    #[default]
    OnlyHealthy,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadBalancer {
    /// What client and endpoint should have in common, most important first.
    pub routing_preferences: Vec<RoutingScope>,
    /// What the preferences decide.
    pub mode: LoadBalancerMode,
    /// Whether unhealthy endpoints are used.
    pub health_policy: HealthPolicy,
}

/// One of several waypoints and its share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedWaypoint {
    /// Where it is.
    pub destination: GatewayAddress,
    /// Its share of the sum of weights.
    pub weight: u32,
}

/// A name with VIPs and ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Short name.
    pub name: Arc<str>,
    /// `namespace/hostname`: the primary key.
    pub key: NamespacedHostname,
    /// Exact VIPs.
    pub vips: Vec<NetworkAddr>,
    /// VIP ranges by network.
    pub cidr_vips: Vec<(Arc<str>, IpNet)>,
    /// Ports.
    pub ports: PortMap,
    /// Identities that its endpoints may prove beside their own.
    pub subject_alt_names: Vec<Arc<str>>,
    /// The L7 proxy in front of it.
    pub waypoint: Option<GatewayAddress>,
    /// Several of them, by weight; wins over the single one.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How an endpoint is chosen.
    pub load_balancer: LoadBalancer,
    /// Which addresses clients may be given; `None` is no restriction.
    pub ip_families: Option<IpFamilies>,
    /// It owns its host name among namespaces that share it.
    pub canonical: bool,
    /// Who may see it.
    pub visibility: Visibility,
}
