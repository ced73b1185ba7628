//! Who may ask a pod how it is, whatever its policies say. Takes what the operator listed, gives what
//! a connection would have to prove for it; never proves it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{Flow, PodRef, ProbeSource, Workload};

/// The sources of probes into the pods of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probes {
    /// By namespace and name.
    by_pod: HashMap<(Arc<str>, Arc<str>), Vec<ProbeSource>>,
    translated: Vec<IpAddr>,
}

/// What makes a connection a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// That its other end is a socket of this node: its source is listed for the pod and the port.
    IfHeldByThisNode,
    /// Its source alone: the node's CNI agent gives it to connections of the node.
    Translated,
}

impl Probes {
    /// What the pods' entries list, and the addresses that stand for the node itself.
    pub fn new<'a>(
        pods: impl IntoIterator<Item = (&'a PodRef, &'a [ProbeSource])>,
        translated: Vec<IpAddr>,
    ) -> Self {
        let listed = pods.into_iter().filter(|(_, sources)| !sources.is_empty());
        let by_pod = listed.map(|(pod, sources)| {
            let key = (Arc::clone(&pod.namespace), Arc::clone(&pod.name));
            (key, sources.to_vec())
        });
        Self {
            by_pod: by_pod.collect(),
            translated,
        }
    }

    /// What would make this connection a probe, if anything can.
    #[must_use]
    pub fn of(&self, destination: &Workload, flow: &Flow) -> Option<Probe> {
        // Who says who he is, is judged by that.
        if flow.source_identity.is_some() {
            return None;
        }
        let (source, port) = (flow.source.ip(), flow.destination.port());
        if self.translated.contains(&source) {
            return Some(Probe::Translated);
        }
        let mut listed = self.listed(destination).iter();
        let is_it = |listed: &ProbeSource| listed.address == source && listed.ports.contains(&port);
        listed.any(is_it).then_some(Probe::IfHeldByThisNode)
    }

    /// Every address from which this pod may be probed.
    pub fn sources(&self, destination: &Workload) -> impl Iterator<Item = IpAddr> {
        let listed = self.listed(destination).iter();
        listed
            .map(|listed| listed.address)
            .chain(self.translated.iter().copied())
    }

    fn listed(&self, destination: &Workload) -> &[ProbeSource] {
        if self.by_pod.is_empty() {
            return &[];
        }
        let key = (
            Arc::clone(&destination.namespace),
            Arc::clone(&destination.name),
        );
        self.by_pod.get(&key).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authz::testing::workload;
    use crate::model::{ClientAddr, OrigDst};

    fn flow(source: &str, port: u16) -> Flow {
        Flow {
            source: ClientAddr::new(format!("{source}:40000").parse().unwrap()),
            source_identity: None,
            destination: OrigDst::new(([10, 0, 0, 2], port).into()),
        }
    }

    #[test]
    fn a_probe_is_from_a_listed_source_to_a_listed_port_of_its_pod() {
        let mut pod = workload("shop", &[]);
        pod.name = "cart-1".into();
        let listed = PodRef {
            name: "cart-1".into(),
            namespace: "shop".into(),
            service_account: "cart".into(),
        };
        let source = ProbeSource {
            address: "10.0.0.1".parse().unwrap(),
            ports: vec![8080, 9090],
        };
        let translated = vec!["169.254.7.127".parse().unwrap()];
        let probes = Probes::new([(&listed, &[source][..])], translated);
        let of = |source, port| probes.of(&pod, &flow(source, port));
        assert_eq!(of("10.0.0.1", 8080), Some(Probe::IfHeldByThisNode));
        assert_eq!(of("10.0.0.1", 9090), Some(Probe::IfHeldByThisNode));
        assert_eq!(of("10.0.0.1", 80), None, "another port");
        assert_eq!(of("10.0.0.9", 8080), None, "another source");
        assert_eq!(of("169.254.7.127", 80), Some(Probe::Translated));
        let mut named = flow("10.0.0.1", 8080);
        named.source_identity = Some("spiffe://td/ns/a/sa/b".parse().unwrap());
        assert_eq!(probes.of(&pod, &named), None, "a proven identity is judged");
        pod.name = "cart-2".into();
        assert_eq!(
            probes.of(&pod, &flow("10.0.0.1", 8080)),
            None,
            "another pod"
        );
        assert_eq!(Probes::default().of(&pod, &flow("169.254.7.127", 80)), None);
    }
}
