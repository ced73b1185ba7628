//! The state of the node as one JSON document, in the shape that the established proxy's tools read.
//! Takes handles of the state, gives the document as it is at that moment; never holds a worker up,
//! and never shows a key or a token.

mod certificate;
mod policy;
mod service;
mod workload;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::Value;
use tokio::sync::watch;

use self::certificate::CertificateView;
use self::policy::PolicyView;
use self::service::{EndpointView, ServiceView};
use self::workload::WorkloadView;
use crate::account::{Accounts, OpenConnection};
use crate::control::World;
use crate::identity::Store;
use crate::model::{Direction, NamespacedHostname, PodRef, PodUid, Policy, Service, Workload};
use crate::resolve::Snapshot;

/// What a dump is made of.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The mesh.
    pub world: watch::Receiver<World>,
    /// The pods of this node.
    pub pods: watch::Receiver<Arc<[PodStatus]>>,
    /// Certificates.
    pub store: Arc<Store>,
    /// Connections.
    pub accounts: Accounts,
    /// The settings, without secrets.
    pub config: Value,
    /// What the operator says the version of the mesh is.
    pub istio_version: String,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// What its source tells it from others by.
    pub uid: PodUid,
    /// Which pod.
    pub pod: PodRef,
    /// Whether it is served.
    pub up: bool,
}

impl Sources {
    /// The document. It takes long for a large mesh: call it where nothing waits.
    ///
    /// # Errors
    /// None that is known; the library may give one.
    // PROTOCOL.md#config-dump
    pub fn dump(&self) -> serde_json::Result<Vec<u8>> {
        let world = self.world.borrow().clone();
        let pods = Arc::clone(&self.pods.borrow());
        let connections = self.accounts.open_connections();
        let certificates = self.store.states();
        let snapshot = &*world.snapshot;
        let mut workloads: Vec<&Workload> = snapshot.workloads().map(Arc::as_ref).collect();
        workloads.sort_by(|one, other| one.uid.cmp(&other.uid));
        let mut services: Vec<&Service> = snapshot.services().map(Arc::as_ref).collect();
        let by_name = |service: &Service| (Arc::clone(&service.key.hostname), service.key.clone());
        services.sort_by_cached_key(|service| by_name(service));
        let policies: Vec<&Policy> = world.policies.iter().map(Arc::as_ref).collect();
        let document = Document {
            certificates: certificates.iter().map(CertificateView::of).collect(),
            config: &self.config,
            policies: Policies(policies),
            services: Services(services, snapshot),
            staged_services: staged(&workloads, snapshot),
            static_config: StaticConfig::default(),
            version: version(&self.istio_version),
            workload_state: pod_states(&pods, &connections),
            workloads: Workloads(workloads),
        };
        serde_json::to_vec_pretty(&document)
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    workloads: Workloads<'a>,
    services: Services<'a>,
    policies: Policies<'a>,
    staged_services: BTreeMap<String, BTreeMap<&'a str, EndpointView<'a>>>,
    static_config: StaticConfig,
    version: VersionView<'a>,
    config: &'a Value,
    certificates: Vec<CertificateView>,
    workload_state: BTreeMap<&'a str, PodView<'a>>,
}

/// What the local file of the established proxy holds; here it is part of the state.
#[derive(Default, Serialize)]
struct StaticConfig {
    workloads: [(); 0],
    services: [(); 0],
    policies: [(); 0],
}

struct Workloads<'a>(Vec<&'a Workload>);

impl Serialize for Workloads<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().copied().map(WorkloadView::of))
    }
}

struct Services<'a>(Vec<&'a Service>, &'a Snapshot);

impl Serialize for Services<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let view = |service| ServiceView::of(service, self.1);
        serializer.collect_seq(self.0.iter().copied().map(view))
    }
}

struct Policies<'a>(Vec<&'a Policy>);

impl Serialize for Policies<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().copied().map(PolicyView::of))
    }
}

/// Endpoints of services that are not there.
fn staged<'a>(
    workloads: &[&'a Workload],
    snapshot: &Snapshot,
) -> BTreeMap<String, BTreeMap<&'a str, EndpointView<'a>>> {
    let mut staged = BTreeMap::<String, BTreeMap<_, _>>::new();
    for workload in workloads {
        let missing = |key: &&NamespacedHostname| snapshot.service(key).is_none();
        for key in workload.services.keys().filter(missing) {
            let endpoints = staged.entry(key.to_string()).or_default();
            if let Some(view) = EndpointView::of(workload, key) {
                endpoints.insert(&*workload.uid.0, view);
            }
        }
    }
    staged
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct VersionView<'a> {
    version: &'static str,
    git_revision: &'static str,
    rust_version: &'static str,
    build_profile: &'static str,
    build_status: &'static str,
    istio_version: &'a str,
    crypto_provider: &'static str,
}

fn version(istio_version: &str) -> VersionView<'_> {
    VersionView {
        version: env!("CARGO_PKG_VERSION"),
        // Not told to the build: a released source tree has no repository around it.
        git_revision: "unknown",
        rust_version: env!("CARGO_PKG_RUST_VERSION"),
        build_profile: if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        },
        build_status: "unknown",
        istio_version,
        crypto_provider: "aws-lc-rs",
    }
}

#[derive(Serialize)]
struct PodView<'a> {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    connections: Option<ConnectionsView>,
    info: PodInfo<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodInfo<'a> {
    name: &'a str,
    namespace: &'a str,
    service_account: &'a str,
}

#[derive(Default, Serialize)]
struct ConnectionsView {
    inbound: Vec<ConnectionView>,
    outbound: Vec<ConnectionView>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConnectionView {
    src: String,
    original_dst: Option<String>,
    actual_dst: String,
    protocol: &'static str,
}

fn pod_states<'a>(
    pods: &'a [PodStatus],
    connections: &[OpenConnection],
) -> BTreeMap<&'a str, PodView<'a>> {
    let mut by_pod = BTreeMap::<_, ConnectionsView>::new();
    for connection in connections {
        let Some(workload) = connection.pod() else {
            continue;
        };
        let of_pod = by_pod
            .entry((&*workload.namespace, &*workload.name))
            .or_default();
        let view = ConnectionView {
            src: connection.source().to_string(),
            original_dst: connection.original(),
            actual_dst: connection.actual(),
            protocol: if connection.is_tunnelled() {
                "HBONE"
            } else {
                "TCP"
            },
        };
        match connection.direction() {
            Direction::Inbound => of_pod.inbound.push(view),
            Direction::Outbound => of_pod.outbound.push(view),
        }
    }
    let view = |status: &'a PodStatus| {
        let pod = &status.pod;
        let connections = by_pod.remove(&(&*pod.namespace, &*pod.name));
        let view = PodView {
            state: if status.up { "Up" } else { "Pending" },
            connections: status.up.then(|| connections.unwrap_or_default()),
            info: PodInfo {
                name: &pod.name,
                namespace: &pod.namespace,
                service_account: &pod.service_account,
            },
        };
        (&*status.uid.0, view)
    };
    pods.iter().map(view).collect()
}

#[cfg(test)]
mod tests;
