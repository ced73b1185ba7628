//! A workload for tests of any room. Takes a namespace, gives the plainest valid workload; never
//! compiled into the product.

use std::collections::BTreeMap;

use super::{Health, Locality, NetworkMode, Protocol, Workload, WorkloadUid};

/// A healthy HBONE workload at 10.0.0.2 of which nothing else is known.
pub(crate) fn workload(namespace: &str) -> Workload {
    Workload {
        uid: WorkloadUid(format!("uid/{namespace}").into()),
        name: "pod".into(),
        namespace: namespace.into(),
        identity: None,
        ips: vec!["10.0.0.2".parse().unwrap()],
        network: "".into(),
        protocol: Protocol::Hbone,
        network_mode: NetworkMode::Standard,
        workload_name: "".into(),
        workload_type: "".into(),
        canonical_name: "".into(),
        canonical_revision: "".into(),
        hostname: "".into(),
        node: "".into(),
        cluster_id: "".into(),
        waypoint: None,
        network_gateway: None,
        application_tunnel: None,
        native_tunnel: false,
        authorization_policies: Vec::new(),
        health: Health::Healthy,
        locality: Locality::default(),
        capacity: 1,
        services: BTreeMap::new(),
    }
}
