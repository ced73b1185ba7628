//! The mesh at one moment, as the workers are given it. Takes checked nouns, gives an immutable
//! pair of indexes; never edits one that is in use.

use std::sync::Arc;

use crate::authz::Policies;
use crate::model::{Policy, Service, Workload};
use crate::resolve::Snapshot;

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::authz::{PlaintextVerdict, plaintext_verdict};
    use crate::control::parse;
    use crate::model::WorkloadUid;

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
