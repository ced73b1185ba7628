//! What the node knows of the mesh at one moment, indexed for look-ups. Takes workloads and
//! services, gives an immutable value; never changes once built.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{
    NamespacedHostname, NetworkAddr, NetworkMode, PodRef, Protocol, Service, Visibility, Workload,
    WorkloadUid,
};

/// Namespace and name of a pod.
type PodName = (Arc<str>, Arc<str>);

/// Workloads and services of one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    node_network: Arc<str>,
    workloads: HashMap<WorkloadUid, Arc<Workload>>,
    by_addr: HashMap<NetworkAddr, Arc<Workload>>,
    by_pod: HashMap<PodName, Vec<Arc<Workload>>>,
    services: HashMap<NamespacedHostname, Arc<Service>>,
    by_vip: HashMap<NetworkAddr, Vec<Arc<Service>>>,
    by_cidr: Vec<(Arc<str>, IpNet, Arc<Service>)>,
    endpoints: HashMap<NamespacedHostname, Vec<Arc<Workload>>>,
}

impl Snapshot {
    /// Indexes everything. `node_network` is the network that this node is on; of several
    /// workloads with one address, pods win, then those that speak HBONE, then the last.
    #[must_use]
    pub fn new(
        node_network: Arc<str>,
        workloads: impl IntoIterator<Item = Arc<Workload>>,
        services: impl IntoIterator<Item = Arc<Service>>,
    ) -> Self {
        let mut snapshot = Self {
            node_network,
            ..Self::default()
        };
        for workload in workloads {
            snapshot.add_workload(workload);
        }
        for service in services {
            snapshot.add_service(service);
        }
        snapshot
    }

    fn add_workload(&mut self, workload: Arc<Workload>) {
        if workload.network_mode == NetworkMode::Standard {
            for ip in &workload.ips {
                let addr = NetworkAddr::new(Arc::clone(&workload.network), *ip);
                let better = self
                    .by_addr
                    .get(&addr)
                    .is_none_or(|held| address_rank(&workload) >= address_rank(held));
                if better {
                    self.by_addr.insert(addr, Arc::clone(&workload));
                }
            }
        }
        for service in workload.services.keys() {
            self.endpoints
                .entry(service.clone())
                .or_default()
                .push(Arc::clone(&workload));
        }
        self.by_pod
            .entry((Arc::clone(&workload.namespace), Arc::clone(&workload.name)))
            .or_default()
            .push(Arc::clone(&workload));
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn add_service(&mut self, service: Arc<Service>) {
        for vip in &service.vips {
            self.by_vip
                .entry(vip.clone())
                .or_default()
                .push(Arc::clone(&service));
        }
        for (network, cidr) in &service.cidr_vips {
            self.by_cidr
                .push((Arc::clone(network), *cidr, Arc::clone(&service)));
        }
        self.services.insert(service.key.clone(), service);
    }

    /// The network that this node is on.
    #[must_use]
    pub fn node_network(&self) -> &Arc<str> {
        &self.node_network
    }

    /// How many workloads there are.
    #[must_use]
    pub fn workload_count(&self) -> usize {
        self.workloads.len()
    }

    /// How many services there are.
    #[must_use]
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    /// A workload by its key.
    #[must_use]
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload of a pod of this node, by what enrolment knows of it.
    #[must_use]
    pub fn pod(&self, pod: &PodRef) -> Option<&Arc<Workload>> {
        self.by_pod
            .get(&(Arc::clone(&pod.namespace), Arc::clone(&pod.name)))?
            .iter()
            .find(|workload| workload.is(pod))
    }

    /// The workload that has an address of its own.
    #[must_use]
    pub fn workload_at(&self, network: &Arc<str>, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_addr.get(&NetworkAddr::new(Arc::clone(network), ip))
    }

    /// A service by its key.
    #[must_use]
    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The workloads that call themselves endpoints of a service, healthy or not.
    #[must_use]
    pub fn endpoints(&self, key: &NamespacedHostname) -> &[Arc<Workload>] {
        self.endpoints.get(key).map_or(&[], Vec::as_slice)
    }

    /// The service that a client of `namespace` means by an address: an exact VIP first, then the
    /// ranges. Its own namespace wins, then (of ranges) the longer prefix, then the canonical one.
    // PROTOCOL.md#vip-choice
    #[must_use]
    pub fn service_at(
        &self,
        network: &Arc<str>,
        ip: IpAddr,
        namespace: &str,
    ) -> Option<&Arc<Service>> {
        let exact = self
            .by_vip
            .get(&NetworkAddr::new(Arc::clone(network), ip))
            .into_iter()
            .flatten()
            .filter(|service| visible(service, namespace))
            .max_by_key(|service| (*service.key.namespace == *namespace, service.canonical));
        exact.or_else(|| {
            self.by_cidr
                .iter()
                .filter(|(at, cidr, service)| {
                    at == network && cidr.contains(&ip) && visible(service, namespace)
                })
                .max_by_key(|(_, cidr, service)| {
                    (
                        *service.key.namespace == *namespace,
                        cidr.prefix_len(),
                        service.canonical,
                    )
                })
                .map(|(_, _, service)| service)
        })
    }

    /// The service of this host name that a workload serves, as a client of its namespace sees it.
    #[must_use]
    pub fn service_of(&self, workload: &Workload, hostname: &str) -> Option<&Arc<Service>> {
        workload
            .services
            .keys()
            .filter(|key| *key.hostname == *hostname)
            .filter_map(|key| self.services.get(key))
            .filter(|service| visible(service, &workload.namespace))
            .max_by_key(|service| {
                (
                    *service.key.namespace == *workload.namespace,
                    service.canonical,
                )
            })
    }
}

/// Pods before other things, HBONE before plain TCP.
fn address_rank(workload: &Workload) -> (bool, bool) {
    (
        workload.uid.0.contains("//Pod/"),
        workload.protocol == Protocol::Hbone,
    )
}

fn visible(service: &Service, namespace: &str) -> bool {
    match service.visibility {
        Visibility::Public => true,
        Visibility::Namespace => *service.key.namespace == *namespace,
    }
}
