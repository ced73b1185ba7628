//! The mesh at one moment, as the workers are given it. Takes checked nouns, gives an immutable
//! pair of indexes; never edits one that is in use.

use std::collections::HashMap;
use std::sync::Arc;

use super::apply::Change;
use crate::authz::{Policies, Probes};
use crate::model::{NamespacedHostname, Policy, PolicyKey, Service, Workload, WorkloadUid};
use crate::resolve::{self, Snapshot};

/// Workloads, services and policies of one moment. Cloning copies pointers.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Counts replacements.
    pub generation: u64,
    /// Who is where.
    pub snapshot: Arc<Snapshot>,
    /// Who may.
    pub policies: Arc<Policies>,
}

impl World {
    /// A world of which nothing is known but the network that this node is on.
    #[must_use]
    pub fn new(node_network: Arc<str>) -> Self {
        Self {
            snapshot: Arc::new(Snapshot::new(node_network, [], [])),
            ..Self::default()
        }
    }

    /// The world that follows this one by these changes; `None` if they change nothing. Of several changes of one
    /// thing the last counts.
    #[must_use]
    pub fn apply(&self, changes: Vec<Change>) -> Option<Self> {
        let mut addresses = HashMap::new();
        let mut policies = HashMap::new();
        for change in changes {
            match &change {
                Change::AddressGone(name) => addresses.insert(Arc::clone(name), change),
                Change::Service(service) => {
                    addresses.insert(service.key.to_string().into(), change)
                }
                Change::Workload(workload) => addresses.insert(Arc::clone(&workload.uid.0), change),
                Change::PolicyGone(name) => policies.insert(Arc::clone(name), change),
                Change::Policy(policy) => policies.insert(policy.key.to_string().into(), change),
            };
        }
        let addresses: Vec<_> = addresses
            .into_values()
            .filter_map(|change| self.address_change(change))
            .collect();
        let policies = self.next_policies(policies.into_values());
        if addresses.is_empty() && policies.is_none() {
            return None;
        }
        Some(Self {
            generation: self.generation + 1,
            snapshot: if addresses.is_empty() {
                Arc::clone(&self.snapshot)
            } else {
                Arc::new(self.snapshot.apply(addresses))
            },
            policies: policies.map_or_else(|| Arc::clone(&self.policies), Arc::new),
        })
    }

    /// The world that follows this one with these sources of probes; `None` if it has them.
    #[must_use]
    pub fn with_probes(&self, probes: &Arc<Probes>) -> Option<Self> {
        if self.policies.probes() == probes {
            return None;
        }
        let policies = Policies::clone(&self.policies).with_probes(Arc::clone(probes));
        Some(Self {
            generation: self.generation + 1,
            snapshot: Arc::clone(&self.snapshot),
            policies: Arc::new(policies),
        })
    }

    /// What a change means for the snapshot, if it is not there already.
    // PROTOCOL.md#address-removal
    fn address_change(&self, change: Change) -> Option<resolve::Change> {
        match change {
            Change::Service(service) => {
                let same = self.snapshot.service(&service.key) == Some(&service);
                (!same).then_some(resolve::Change::Service(service))
            }
            Change::Workload(workload) => {
                let same = self.snapshot.workload(&workload.uid) == Some(&workload);
                (!same).then_some(resolve::Change::Workload(workload))
            }
            Change::AddressGone(name) => {
                let uid = WorkloadUid(name);
                if self.snapshot.workload(&uid).is_some() {
                    return Some(resolve::Change::NoWorkload(uid));
                }
                let key: NamespacedHostname = uid.0.parse().ok()?;
                let held = self.snapshot.service(&key).is_some();
                held.then_some(resolve::Change::NoService(key))
            }
            Change::Policy(_) | Change::PolicyGone(_) => None,
        }
    }

    fn next_policies(&self, changes: impl Iterator<Item = Change>) -> Option<Policies> {
        let mut next: Option<ByKey> = None;
        let mut edit = |edit: &dyn Fn(&mut ByKey)| {
            edit(next.get_or_insert_with(|| {
                let held = self.policies.iter();
                held.map(|policy| (policy.key.clone(), Arc::clone(policy)))
                    .collect()
            }));
        };
        for change in changes {
            match change {
                Change::Policy(policy) if self.policies.get(&policy.key) != Some(&policy) => {
                    edit(&|map| drop(map.insert(policy.key.clone(), Arc::clone(&policy))));
                }
                Change::PolicyGone(name) => {
                    if let Ok(key) = name.parse::<PolicyKey>()
                        && self.policies.get(&key).is_some()
                    {
                        edit(&|map| drop(map.remove(&key)));
                    }
                }
                Change::AddressGone(_)
                | Change::Policy(_)
                | Change::Service(_)
                | Change::Workload(_) => {}
            }
        }
        let probes = || Arc::clone(self.policies.probes());
        next.map(|map| Policies::new(map.into_values()).with_probes(probes()))
    }

    /// The world that follows this one, with everything replaced.
    #[must_use]
    pub fn next(
        &self,
        node_network: Arc<str>,
        workloads: Vec<Arc<Workload>>,
        services: Vec<Arc<Service>>,
        policies: Vec<Arc<Policy>>,
    ) -> Self {
        Self {
            generation: self.generation + 1,
            snapshot: Arc::new(Snapshot::new(node_network, workloads, services)),
            policies: Arc::new(Policies::new(policies)),
        }
    }
}

type ByKey = HashMap<PolicyKey, Arc<Policy>>;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::authz::{PlaintextVerdict, plaintext_verdict};
    use crate::control::parse;

    #[test]
    fn the_annotated_example_is_a_mesh_whose_server_takes_no_plaintext() {
        let text = include_str!("../../../deploy/mesh.yaml");
        let state = parse(Path::new("deploy/mesh.yaml"), text).unwrap();
        assert_eq!(state.pods.len(), 1);
        let world =
            World::default().next("".into(), state.workloads, state.services, state.policies);
        assert_eq!(world.generation, 1);
        let verdict_of = |uid: &str| {
            let workload = world.snapshot.workload(&WorkloadUid(uid.into())).unwrap();
            plaintext_verdict(&world.policies, workload)
        };
        assert_eq!(verdict_of("cart-1"), PlaintextVerdict::Drop);
        assert_eq!(verdict_of("web-1"), PlaintextVerdict::Proxy);
    }
}
