//! The shape of the local file: which keys stand where, and which may be absent. Takes what serde
//! gives, gives values of the model; never looks from one entry at another.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_saphyr::Spanned;

use super::leaf::{CidrVip, Leaf, Name, Port, TargetPort};
use super::parse::PodEntry;
use crate::model::{
    Action, AppProtocol, ApplicationTunnel, Clause, GatewayAddress, GatewayDestination, Health,
    HealthPolicy, InvalidSpiffeId, IpFamilies, LoadBalancer, LoadBalancerMode, Locality, Match,
    NamespacedHostname, NetworkAddr, NetworkMode, PodRef, Policy, PolicyKey, ProbeSource, Protocol,
    RoutingScope, Rule, Scope, Service, ServiceAccountMatch, StringMatch, Visibility,
    WeightedWaypoint, Workload, WorkloadUid,
};

/// A key of an entry, and what is wrong with its value.
type KeyFault = (&'static str, String);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct File {
    #[serde(default)]
    pub(super) workloads: Vec<Spanned<FileWorkload>>,
    #[serde(default)]
    pub(super) services: Vec<Spanned<FileService>>,
    #[serde(default)]
    pub(super) policies: Vec<Spanned<FilePolicy>>,
    #[serde(default)]
    pub(super) pods: Vec<Spanned<FilePod>>,
}

// PROTOCOL.md#file-workload
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct FileWorkload {
    pub(super) workload_ips: Vec<Spanned<Leaf<IpAddr>>>,
    namespace: Leaf<Name>,
    services: BTreeMap<Leaf<NamespacedHostname>, BTreeMap<Leaf<Port>, Leaf<Port>>>,
    #[serde(default)]
    uid: Arc<str>,
    #[serde(default)]
    name: Arc<str>,
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    network: Arc<str>,
    #[serde(default)]
    workload_name: Arc<str>,
    #[serde(default)]
    workload_type: String,
    #[serde(default)]
    canonical_name: Arc<str>,
    #[serde(default)]
    canonical_revision: Arc<str>,
    #[serde(default)]
    hostname: Arc<str>,
    #[serde(default)]
    node: Arc<str>,
    #[serde(default)]
    cluster_id: Arc<str>,
    #[serde(default)]
    protocol: Leaf<Protocol>,
    #[serde(default)]
    network_mode: Leaf<NetworkMode>,
    waypoint: Option<FileGateway>,
    network_gateway: Option<FileGateway>,
    #[serde(default)]
    native_tunnel: bool,
    application_tunnel: Option<FileTunnel>,
    #[serde(default)]
    authorization_policies: Vec<Leaf<PolicyKey>>,
    #[serde(default)]
    status: Leaf<Health>,
    #[serde(default)]
    locality: FileLocality,
    capacity: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileGateway {
    destination: Leaf<GatewayDestination>,
    hbone_mtls_port: Leaf<Port>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileTunnel {
    protocol: Leaf<AppProtocol>,
    port: Option<Leaf<Port>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileLocality {
    #[serde(default)]
    region: Arc<str>,
    #[serde(default)]
    zone: Arc<str>,
    #[serde(default)]
    subzone: Arc<str>,
}

// PROTOCOL.md#file-service
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct FileService {
    name: Leaf<Name>,
    namespace: Leaf<Name>,
    hostname: Leaf<Name>,
    vips: Vec<Leaf<NetworkAddr>>,
    ports: BTreeMap<Leaf<Port>, Leaf<TargetPort>>,
    #[serde(default)]
    cidr_vips: Vec<Leaf<CidrVip>>,
    #[serde(default)]
    subject_alt_names: Vec<Arc<str>>,
    waypoint: Option<FileGateway>,
    #[serde(default)]
    weighted_waypoints: Vec<FileWeightedWaypoint>,
    load_balancer: Option<FileLoadBalancer>,
    ip_families: Option<Leaf<IpFamilies>>,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    visibility: Leaf<Visibility>,
    #[serde(default)]
    endpoints: BTreeMap<String, IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileWeightedWaypoint {
    destination: FileGateway,
    weight: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileLoadBalancer {
    routing_preferences: Vec<Leaf<RoutingScope>>,
    mode: Leaf<LoadBalancerMode>,
    health_policy: Leaf<HealthPolicy>,
}

// PROTOCOL.md#file-policy
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct FilePolicy {
    name: Leaf<Name>,
    namespace: Leaf<Name>,
    scope: Leaf<Scope>,
    action: Leaf<Action>,
    rules: Vec<Vec<Vec<FileMatch>>>,
    #[serde(default)]
    dry_run: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileMatch {
    #[serde(default)]
    namespaces: Vec<FileString>,
    #[serde(default)]
    not_namespaces: Vec<FileString>,
    #[serde(default)]
    principals: Vec<FileString>,
    #[serde(default)]
    not_principals: Vec<FileString>,
    #[serde(default)]
    service_accounts: Vec<FileServiceAccount>,
    #[serde(default)]
    not_service_accounts: Vec<FileServiceAccount>,
    #[serde(default)]
    source_ips: Vec<Leaf<IpNet>>,
    #[serde(default)]
    not_source_ips: Vec<Leaf<IpNet>>,
    #[serde(default)]
    destination_ips: Vec<Leaf<IpNet>>,
    #[serde(default)]
    not_destination_ips: Vec<Leaf<IpNet>>,
    #[serde(default)]
    destination_ports: Vec<Leaf<Port>>,
    #[serde(default)]
    not_destination_ports: Vec<Leaf<Port>>,
}

#[derive(Debug, Deserialize)]
enum FileString {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Presence([(); 0]),
    Suffix(Arc<str>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileServiceAccount {
    namespace: Leaf<Name>,
    service_account: Leaf<Name>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct FilePod {
    name: Leaf<Name>,
    namespace: Leaf<Name>,
    #[serde(default)]
    service_account: Arc<str>,
    netns: Leaf<Name>,
    #[serde(default)]
    exclude_outbound_cidrs: Vec<Leaf<IpNet>>,
    #[serde(default)]
    exclude_outbound_ports: Vec<Leaf<Port>>,
    #[serde(default)]
    exclude_inbound_ports: Vec<Leaf<Port>>,
    #[serde(default)]
    exclude_inbound_cidrs: Vec<Leaf<IpNet>>,
    #[serde(default)]
    probe_sources: Vec<FileProbe>,
    #[serde(default = "yes")]
    dns_capture: bool,
}

const fn yes() -> bool {
    true
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileProbe {
    address: Leaf<IpAddr>,
    ports: Vec<Leaf<Port>>,
}

impl FileWorkload {
    pub(super) fn into_workload(self) -> Result<Workload, KeyFault> {
        let namespace = self.namespace.0.0;
        let identity = Workload::identity_of(
            or(&self.trust_domain, DEFAULT_TRUST_DOMAIN),
            &namespace,
            or(&self.service_account, DEFAULT_SERVICE_ACCOUNT),
        )
        .map_err(|error| (identity_key(error), error.to_string()))?;
        let uid = match (&*self.uid, &*self.name) {
            ("", "") => return Err(("uid", "neither uid nor name is given".to_owned())),
            ("", name) => format!("file/{namespace}/{name}").into(),
            _ => self.uid,
        };
        Ok(Workload {
            uid: WorkloadUid(uid),
            name: self.name,
            namespace,
            identity,
            ips: self.workload_ips.into_iter().map(|ip| ip.value.0).collect(),
            network: self.network,
            protocol: self.protocol.0,
            network_mode: self.network_mode.0,
            workload_name: self.workload_name,
            workload_type: self.workload_type.to_ascii_lowercase().into(),
            canonical_name: self.canonical_name,
            canonical_revision: self.canonical_revision,
            hostname: self.hostname,
            node: self.node,
            cluster_id: self.cluster_id,
            waypoint: self.waypoint.map(FileGateway::into_gateway),
            network_gateway: self.network_gateway.map(FileGateway::into_gateway),
            application_tunnel: self.application_tunnel.map(|tunnel| ApplicationTunnel {
                protocol: tunnel.protocol.0,
                port: tunnel.port.map(|port| port.0.0),
            }),
            native_tunnel: self.native_tunnel,
            authorization_policies: leaves(self.authorization_policies),
            health: self.status.0,
            locality: Locality {
                region: self.locality.region,
                zone: self.locality.zone,
                subzone: self.locality.subzone,
            },
            capacity: self.capacity.unwrap_or(DEFAULT_CAPACITY),
            services: self
                .services
                .into_iter()
                .map(|(service, ports)| {
                    let ports = ports
                        .into_iter()
                        .map(|(port, target)| (port.0.0, target.0.0));
                    (service.0, ports.collect())
                })
                .collect(),
        })
    }
}

impl FileGateway {
    fn into_gateway(self) -> GatewayAddress {
        GatewayAddress {
            destination: self.destination.0,
            hbone_mtls_port: self.hbone_mtls_port.0.0,
        }
    }
}

impl FileService {
    pub(super) fn into_service(self) -> Result<Service, KeyFault> {
        let namespace = self.namespace.0.0;
        let hostname = self.hostname.0.0;
        if hostname.contains('/') {
            return Err(("hostname", format!("{hostname:?} is not a host name")));
        }
        if !self.endpoints.is_empty() {
            let reason = "endpoints are those workloads that list the service";
            return Err(("endpoints", reason.to_owned()));
        }
        Ok(Service {
            name: self.name.0.0,
            key: NamespacedHostname {
                namespace,
                hostname,
            },
            vips: leaves(self.vips),
            cidr_vips: self
                .cidr_vips
                .into_iter()
                .map(|vip| (vip.0.0, vip.0.1))
                .collect(),
            ports: self
                .ports
                .into_iter()
                .map(|(port, target)| (port.0.0, target.0.0))
                .collect(),
            subject_alt_names: self.subject_alt_names,
            waypoint: self.waypoint.map(FileGateway::into_gateway),
            weighted_waypoints: self
                .weighted_waypoints
                .into_iter()
                .map(|waypoint| WeightedWaypoint {
                    destination: waypoint.destination.into_gateway(),
                    weight: waypoint.weight,
                })
                .collect(),
            load_balancer: self
                .load_balancer
                .map(|balancer| LoadBalancer {
                    routing_preferences: leaves(balancer.routing_preferences),
                    mode: balancer.mode.0,
                    health_policy: balancer.health_policy.0,
                })
                .unwrap_or_default(),
            ip_families: self.ip_families.map(|families| families.0),
            canonical: self.canonical,
            visibility: self.visibility.0,
        })
    }
}

impl FilePolicy {
    pub(super) fn into_policy(self) -> Policy {
        let clause = |matches: Vec<FileMatch>| Clause {
            matches: matches.into_iter().map(FileMatch::into_match).collect(),
        };
        let rule = |clauses: Vec<Vec<FileMatch>>| Rule {
            clauses: clauses.into_iter().map(clause).collect(),
        };
        Policy {
            key: PolicyKey {
                namespace: self.namespace.0.0,
                name: self.name.0.0,
            },
            scope: self.scope.0,
            action: self.action.0,
            dry_run: self.dry_run,
            rules: self.rules.into_iter().map(rule).collect(),
        }
    }
}

impl FileMatch {
    fn into_match(self) -> Match {
        let strings = |list: Vec<FileString>| list.into_iter().map(StringMatch::from).collect();
        let accounts = |list: Vec<FileServiceAccount>| {
            let account = |account: FileServiceAccount| ServiceAccountMatch {
                namespace: account.namespace.0.0,
                service_account: account.service_account.0.0,
            };
            list.into_iter().map(account).collect()
        };
        Match {
            namespaces: strings(self.namespaces),
            not_namespaces: strings(self.not_namespaces),
            principals: strings(self.principals),
            not_principals: strings(self.not_principals),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            source_ips: leaves(self.source_ips),
            not_source_ips: leaves(self.not_source_ips),
            destination_ips: leaves(self.destination_ips),
            not_destination_ips: leaves(self.not_destination_ips),
            destination_ports: ports(self.destination_ports),
            not_destination_ports: ports(self.not_destination_ports),
        }
    }
}

impl From<FileString> for StringMatch {
    fn from(text: FileString) -> Self {
        match text {
            FileString::Exact(text) => Self::Exact(text),
            FileString::Prefix(text) => Self::Prefix(text),
            FileString::Presence([]) => Self::Presence,
            FileString::Suffix(text) => Self::Suffix(text),
        }
    }
}

impl FilePod {
    pub(super) fn into_pod(self) -> Result<PodEntry, KeyFault> {
        let probes = self.probe_sources.into_iter().map(FileProbe::into_probe);
        let probe_sources = probes.collect::<Result<_, _>>()?;
        let service_account = or(&self.service_account, DEFAULT_SERVICE_ACCOUNT).into();
        Ok(PodEntry {
            pod: PodRef {
                name: self.name.0.0,
                namespace: self.namespace.0.0,
                service_account,
            },
            netns: PathBuf::from(&*self.netns.0.0),
            exclude_outbound_cidrs: leaves(self.exclude_outbound_cidrs),
            exclude_outbound_ports: ports(self.exclude_outbound_ports),
            exclude_inbound_ports: ports(self.exclude_inbound_ports),
            exclude_inbound_cidrs: leaves(self.exclude_inbound_cidrs),
            probe_sources,
            dns_capture: self.dns_capture,
        })
    }
}

impl FileProbe {
    fn into_probe(self) -> Result<ProbeSource, KeyFault> {
        let address = self.address.0.to_canonical();
        let fault = |what: String| Err(("probeSources", what));
        if !ProbeSource::can_be(address) {
            return fault(format!("nobody asks a pod from {address}"));
        }
        if self.ports.is_empty() {
            return fault(format!("no port may be asked from {address}"));
        }
        Ok(ProbeSource {
            address,
            ports: ports(self.ports),
        })
    }
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn leaves<T>(list: Vec<Leaf<T>>) -> Vec<T> {
    list.into_iter().map(|leaf| leaf.0).collect()
}

fn ports(list: Vec<Leaf<Port>>) -> Vec<u16> {
    list.into_iter().map(|port| port.0.0).collect()
}

fn identity_key(error: InvalidSpiffeId) -> &'static str {
    match error {
        InvalidSpiffeId::Character("trust domain") | InvalidSpiffeId::Empty("trust domain") => {
            "trustDomain"
        }
        InvalidSpiffeId::Character("namespace") | InvalidSpiffeId::Empty("namespace") => {
            "namespace"
        }
        InvalidSpiffeId::Character(_) | InvalidSpiffeId::Empty(_) | InvalidSpiffeId::Form => {
            "serviceAccount"
        }
    }
}

// PROTOCOL.md#workload-defaults: what a control plane means when it sends nothing.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_SERVICE_ACCOUNT: &str = "default";
const DEFAULT_CAPACITY: u32 = 1;
