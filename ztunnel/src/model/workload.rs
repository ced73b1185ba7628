//! Workloads and what they point at. Takes the control plane's words, already checked, gives the
//! nouns of routing; never looks anything up.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use super::addr::NetworkAddr;
use super::identity::{InvalidSpiffeId, SpiffeId, TrustDomain};
use super::policy::PolicyKey;
use super::service::PortMap;

/// The control plane's primary key of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadUid(pub Arc<str>);

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is not `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not of the form namespace/name")]
pub struct InvalidName(pub String);

/// A service's key: `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    /// The namespace of the service.
    pub namespace: Arc<str>,
    /// Its full host name.
    pub hostname: Arc<str>,
}

impl FromStr for NamespacedHostname {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, hostname)) if !hostname.is_empty() && !hostname.contains('/') => {
                Ok(Self {
                    namespace: namespace.into(),
                    hostname: hostname.into(),
                })
            }
            _ => Err(InvalidName(text.to_owned())),
        }
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// A pod as enrolment names it: what a node agent knows without a control plane.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodRef {
    /// The pod's name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What a node agent tells a pod of its node from others by, also from an earlier one of its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(pub Arc<str>);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a workload is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 CONNECT in mutual TLS on port 15008.
    Hbone,
    /// Plain TCP.
    #[default]
    Tcp,
}

/// Whose IP a workload has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// The node's: not to be found by IP.
    HostNetwork,
    /// Its own.
    #[default]
    Standard,
}

/// Whether a workload wants traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// It does.
    #[default]
    Healthy,
    /// Only a service that allows all endpoints uses it.
    Unhealthy,
}

/// Where a workload runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    /// Region, or empty.
    pub region: Arc<str>,
    /// Zone, or empty.
    pub zone: Arc<str>,
    /// Part of a zone, or empty.
    pub subzone: Arc<str>,
}

/// What the application behind an app tunnel wants in front of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppProtocol {
    /// The bytes as they are.
    None,
    /// A PROXY v2 header.
    Proxy,
}

/// How an inbound connection is delivered to an application that proxies for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// What stands in front of the bytes.
    pub protocol: AppProtocol,
    /// The port that takes them, when it is not the one that was asked for.
    pub port: Option<u16>,
}

/// What a waypoint or network gateway is found by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// An address on a network.
    Address(NetworkAddr),
    /// A service, or a workload by its host name.
    Hostname(NamespacedHostname),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(name) => name.fmt(f),
        }
    }
}

/// A waypoint or a network gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// Where it is.
    pub destination: GatewayDestination,
    /// The port that speaks HBONE.
    pub hbone_mtls_port: u16,
}

/// A thing with IPs and an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Primary key.
    pub uid: WorkloadUid,
    /// The pod's name.
    pub name: Arc<str>,
    /// The namespace that it runs in.
    pub namespace: Arc<str>,
    /// Who it is; `None` when the control plane gave no service account or trust domain.
    pub identity: Option<SpiffeId>,
    /// Its IPs.
    pub ips: Vec<IpAddr>,
    /// The network of those IPs.
    pub network: Arc<str>,
    /// How it is reached.
    pub protocol: Protocol,
    /// Whose IP it has.
    pub network_mode: NetworkMode,
    /// The owner's name, such as the deployment's.
    pub workload_name: Arc<str>,
    /// The owner's kind, lower-case.
    pub workload_type: Arc<str>,
    /// The service that it calls itself.
    pub canonical_name: Arc<str>,
    /// The revision of that service.
    pub canonical_revision: Arc<str>,
    /// A DNS name to use when there is no IP, or empty.
    pub hostname: Arc<str>,
    /// The node that it runs on.
    pub node: Arc<str>,
    /// The cluster that it runs in.
    pub cluster_id: Arc<str>,
    /// The L7 proxy in front of it.
    pub waypoint: Option<GatewayAddress>,
    /// Where its network is entered.
    pub network_gateway: Option<GatewayAddress>,
    /// How its application takes inbound connections for others.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// It speaks HBONE itself.
    pub native_tunnel: bool,
    /// The policies that select it by name.
    pub authorization_policies: Vec<PolicyKey>,
    /// Whether it wants traffic.
    pub health: Health,
    /// Where it runs.
    pub locality: Locality,
    /// Its share of a service's connections; 0 receives none.
    pub capacity: u32,
    /// The services that it is an endpoint of, with its own ports.
    pub services: BTreeMap<NamespacedHostname, PortMap>,
}

impl Workload {
    /// The identity from a control plane's words, where empty means "not told".
    ///
    /// # Errors
    /// When a part is there but cannot stand in a SPIFFE ID.
    pub fn identity_of(
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Option<SpiffeId>, InvalidSpiffeId> {
        if trust_domain.is_empty() || service_account.is_empty() {
            return Ok(None);
        }
        SpiffeId::new(TrustDomain::new(trust_domain)?, namespace, service_account).map(Some)
    }

    /// The pod that it is to enrolment, if it has an identity.
    #[must_use]
    pub fn pod(&self) -> Option<PodRef> {
        let identity = self.identity.as_ref()?;
        Some(PodRef {
            name: Arc::clone(&self.name),
            namespace: Arc::clone(&self.namespace),
            service_account: identity.service_account().into(),
        })
    }
}
