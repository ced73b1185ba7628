//! What the node knows of the mesh at one moment, indexed for look-ups. Takes workloads and
//! services, gives an immutable value, and from it the next one by what changed; never changes
//! once built.

use std::net::IpAddr;
use std::sync::Arc;

use super::index::{Endpoints, Map, Network, Rank, Ranked, add, take};
use crate::model::{
    NamespacedHostname, NetworkMode, PodRef, Protocol, Service, Visibility, Workload, WorkloadUid,
};

/// Workloads and services of one moment. Cloning it is cheap: copies share what they have in
/// common.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    node_network: Arc<str>,
    workloads: Map<WorkloadUid, Arc<Workload>>,
    services: Map<NamespacedHostname, Arc<Service>>,
    networks: Map<Arc<str>, Network>,
    endpoints: Map<NamespacedHostname, Endpoints>,
    pods: Map<PodRef, Ranked<Arc<Workload>>>,
    /// Services by host name alone.
    hosts: Map<Arc<str>, Ranked<Arc<Service>>>,
    /// Workloads that have a host name, by it and their namespace.
    named: Map<NamespacedHostname, Ranked<Arc<Workload>>>,
}

/// One thing that is different in the next snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// There is no service of this key any more. Its endpoints stay known, should it come back.
    NoService(NamespacedHostname),
    /// There is no workload of this UID any more.
    NoWorkload(WorkloadUid),
    /// This service is new, or replaces the one of its key.
    Service(Arc<Service>),
    /// This workload is new, or replaces the one of its UID.
    Workload(Arc<Workload>),
}

impl Snapshot {
    /// Indexes everything. `node_network` is the network that this node is on; of several
    /// workloads with one address, pods win, then those that speak HBONE, then the greatest UID.
    #[must_use]
    pub fn new(
        node_network: Arc<str>,
        workloads: impl IntoIterator<Item = Arc<Workload>>,
        services: impl IntoIterator<Item = Arc<Service>>,
    ) -> Self {
        let empty = Self {
            node_network,
            ..Self::default()
        };
        let workloads = workloads.into_iter().map(Change::Workload);
        empty.apply(workloads.chain(services.into_iter().map(Change::Service)))
    }

    /// The snapshot that follows this one. It is the same as one that was built anew from all
    /// that is there then; it costs what the changes cost, however large the mesh is. Changes
    /// apply in their order.
    #[must_use]
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut next = self.clone();
        for change in changes {
            match change {
                Change::NoService(key) => next.take_service(&key),
                Change::NoWorkload(uid) => next.take_workload(&uid),
                Change::Service(service) => {
                    next.take_service(&service.key);
                    next.add_service(service);
                }
                Change::Workload(workload) => {
                    next.take_workload(&workload.uid);
                    next.add_workload(workload);
                }
            }
        }
        next
    }

    fn add_workload(&mut self, workload: Arc<Workload>) {
        if workload.network_mode == NetworkMode::Standard {
            self.in_network(&workload.network, |network| {
                for ip in distinct(&workload.ips) {
                    add(&mut network.addresses, ip, Arc::clone(&workload));
                }
            });
        }
        for service in workload.services.keys() {
            match self.endpoints.get_mut(service) {
                Some(endpoints) => endpoints.insert(Arc::clone(&workload)),
                None => {
                    let mut endpoints = Endpoints::default();
                    endpoints.insert(Arc::clone(&workload));
                    self.endpoints.insert_mut(service.clone(), endpoints);
                }
            }
        }
        if let Some(pod) = workload.pod() {
            add(&mut self.pods, pod, Arc::clone(&workload));
        }
        if let Some(name) = host_name(&workload) {
            add(&mut self.named, name, Arc::clone(&workload));
        }
        self.workloads.insert_mut(workload.uid.clone(), workload);
    }

    fn take_workload(&mut self, uid: &WorkloadUid) {
        let Some(workload) = self.workloads.get(uid).map(Arc::clone) else {
            return;
        };
        self.workloads.remove_mut(uid);
        if workload.network_mode == NetworkMode::Standard {
            self.in_network(&workload.network, |network| {
                for ip in distinct(&workload.ips) {
                    take(&mut network.addresses, &ip, uid);
                }
            });
        }
        for service in workload.services.keys() {
            let Some(endpoints) = self.endpoints.get_mut(service) else {
                continue;
            };
            endpoints.remove(uid);
            if endpoints.is_empty() {
                self.endpoints.remove_mut(service);
            }
        }
        if let Some(pod) = workload.pod() {
            take(&mut self.pods, &pod, uid);
        }
        if let Some(name) = host_name(&workload) {
            take(&mut self.named, &name, uid);
        }
    }

    fn add_service(&mut self, service: Arc<Service>) {
        for vip in &service.vips {
            self.in_network(&vip.network, |network| {
                take(&mut network.vips, &vip.ip, service.id());
                add(&mut network.vips, vip.ip, Arc::clone(&service));
            });
        }
        for (network, net) in &service.cidr_vips {
            self.in_network(network, |network| {
                network.take_range(*net, &service);
                network.add_range(*net, Arc::clone(&service));
            });
        }
        let host = Arc::clone(&service.key.hostname);
        add(&mut self.hosts, host, Arc::clone(&service));
        self.services.insert_mut(service.key.clone(), service);
    }

    fn take_service(&mut self, key: &NamespacedHostname) {
        let Some(service) = self.services.get(key).map(Arc::clone) else {
            return;
        };
        self.services.remove_mut(key);
        for vip in &service.vips {
            self.in_network(&vip.network, |network| {
                take(&mut network.vips, &vip.ip, key);
            });
        }
        for (network, net) in &service.cidr_vips {
            self.in_network(network, |network| network.take_range(*net, &service));
        }
        take(&mut self.hosts, &service.key.hostname, key);
    }

    /// Changes what is known of a network; one of which nothing is known is forgotten.
    fn in_network(&mut self, name: &Arc<str>, change: impl FnOnce(&mut Network)) {
        if let Some(network) = self.networks.get_mut(&**name) {
            change(network);
            if network.is_empty() {
                self.networks.remove_mut(&**name);
            }
            return;
        }
        let mut network = Network::default();
        change(&mut network);
        if !network.is_empty() {
            self.networks.insert_mut(Arc::clone(name), network);
        }
    }

    /// The network that this node is on.
    #[must_use]
    pub const fn node_network(&self) -> &Arc<str> {
        &self.node_network
    }

    /// How many workloads there are.
    #[must_use]
    pub fn workload_count(&self) -> usize {
        self.workloads.size()
    }

    /// How many services there are.
    #[must_use]
    pub fn service_count(&self) -> usize {
        self.services.size()
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// A workload by its key.
    #[must_use]
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload of a pod of this node, by what enrolment knows of it.
    #[must_use]
    pub fn pod(&self, pod: &PodRef) -> Option<&Arc<Workload>> {
        self.pods.get(pod).map(Ranked::best)
    }

    /// The workload that has an address of its own.
    #[must_use]
    pub fn workload_at(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.networks
            .get(network)?
            .addresses
            .get(&ip.to_canonical())
            .map(Ranked::best)
    }

    /// A workload by its host name and namespace.
    #[must_use]
    pub fn workload_named(&self, name: &NamespacedHostname) -> Option<&Arc<Workload>> {
        self.named.get(name).map(Ranked::best)
    }

    /// A service by its key.
    #[must_use]
    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The services of one host name, in the order of their namespaces.
    pub fn services_named(&self, hostname: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.hosts
            .get(hostname)
            .into_iter()
            .flat_map(|services| services.iter())
    }

    /// The workloads that call themselves endpoints of a service, healthy or not, in the order of
    /// their UIDs.
    pub fn endpoints(&self, key: &NamespacedHostname) -> impl Iterator<Item = &Arc<Workload>> {
        self.endpoints
            .get(key)
            .into_iter()
            .flat_map(|endpoints| endpoints.iter())
    }

    /// The services that have an address as their VIP, whoever may see them: those with the exact
    /// VIP first, then those with a range around it, the longest first.
    pub fn services_at(&self, network: &str, ip: IpAddr) -> impl Iterator<Item = &Arc<Service>> {
        let ip = ip.to_canonical();
        self.networks.get(network).into_iter().flat_map(move |at| {
            let exact = at.vips.get(&ip).into_iter().flat_map(|vips| vips.iter());
            exact.chain(at.ranges_around(ip).map(|(_, service)| service))
        })
    }

    /// The service that a client of `namespace` means by an address: an exact VIP first, then the
    /// ranges. Its own namespace wins, then (of ranges) the longer prefix, then the canonical one.
    // PROTOCOL.md#vip-choice
    #[must_use]
    pub fn service_at(&self, network: &str, ip: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        let ip = ip.to_canonical();
        let network = self.networks.get(network)?;
        let exact = network
            .vips
            .get(&ip)
            .into_iter()
            .flat_map(|vips| vips.iter())
            .filter(|service| is_visible(service, namespace))
            .max_by_key(|service| (*service.key.namespace == *namespace, service.canonical));
        exact.or_else(|| {
            network
                .ranges_around(ip)
                .filter(|(_, service)| is_visible(service, namespace))
                .max_by_key(|(bits, service)| {
                    let own = *service.key.namespace == *namespace;
                    (own, *bits, service.canonical)
                })
                .map(|(_, service)| service)
        })
    }

    /// The service of this host name that a client of `namespace` means: that of its own
    /// namespace, then the canonical one.
    #[must_use]
    pub fn service_named(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        self.services_named(hostname)
            .filter(|service| is_visible(service, namespace))
            .max_by_key(|service| (*service.key.namespace == *namespace, service.canonical))
    }

    /// The service of this host name that a workload serves, as a client of its namespace sees it.
    #[must_use]
    pub fn service_of(&self, workload: &Workload, hostname: &str) -> Option<&Arc<Service>> {
        self.services_named(hostname)
            .filter(|service| workload.services.contains_key(&service.key))
            .filter(|service| is_visible(service, &workload.namespace))
            .max_by_key(|service| {
                let own = *service.key.namespace == *workload.namespace;
                (own, service.canonical)
            })
    }
}

/// Pods before other things, HBONE before plain TCP.
// PROTOCOL.md#address-conflict
impl Rank for Arc<Workload> {
    type Id = WorkloadUid;

    fn id(&self) -> &WorkloadUid {
        &self.uid
    }

    fn precedes(&self, other: &Self) -> bool {
        let rank = |workload: &Workload| {
            (
                workload.uid.0.contains("//Pod/"),
                workload.protocol == Protocol::Hbone,
            )
        };
        (rank(self), &self.uid) > (rank(other), &other.uid)
    }
}

impl Rank for Arc<Service> {
    type Id = NamespacedHostname;

    fn id(&self) -> &NamespacedHostname {
        &self.key
    }

    fn precedes(&self, other: &Self) -> bool {
        self.key < other.key
    }
}

fn host_name(workload: &Workload) -> Option<NamespacedHostname> {
    (!workload.hostname.is_empty()).then(|| NamespacedHostname {
        namespace: Arc::clone(&workload.namespace),
        hostname: Arc::clone(&workload.hostname),
    })
}

/// A workload that names an address twice has it once.
fn distinct(ips: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    ips.iter().enumerate().filter_map(|(at, ip)| {
        let ip = ip.to_canonical();
        let again = ips
            .iter()
            .take(at)
            .any(|before| before.to_canonical() == ip);
        (!again).then_some(ip)
    })
}

/// Whether clients of `namespace` may know of a service.
#[must_use]
pub fn is_visible(service: &Service, namespace: &str) -> bool {
    match service.visibility {
        Visibility::Public => true,
        Visibility::Namespace => *service.key.namespace == *namespace,
    }
}

#[cfg(test)]
#[path = "snapshot/tests.rs"]
mod tests;
