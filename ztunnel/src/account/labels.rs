//! The labels of the `istio_tcp_*` families. Takes what a connection learned, gives a label set
//! that is hashed without being copied and copied once; never takes a value from the wire, except
//! a proven identity.

use std::hash::{Hash, Hasher};

use prometheus_client::encoding::{EncodeLabel as _, EncodeLabelSet, LabelSetEncoder};

use super::ledger::Learned;
use crate::model::{Direction, SpiffeId, Workload};

/// A label set that belongs to a connection: borrowed, to look up the counters with.
#[derive(Debug)]
pub(super) struct View<'a> {
    direction: Direction,
    security: &'static str,
    identities: [Option<&'a SpiffeId>; 2],
    texts: [&'a str; TEXTS],
}

/// A label set that belongs to its counters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Labels {
    direction: Direction,
    security: &'static str,
    identities: [Option<SpiffeId>; 2],
    texts: [Box<str>; TEXTS],
}

/// A label set as one metric shows it: with the flags of an ending.
#[derive(Debug)]
pub(super) struct Series<'a> {
    pub(super) labels: &'a Labels,
    pub(super) response_flags: &'static str,
}

impl<'a> View<'a> {
    pub(super) fn new(direction: Direction, learned: &'a Learned) -> Self {
        let [
            s_workload,
            s_name,
            s_revision,
            s_namespace,
            s_cluster,
            s_region,
            s_zone,
        ] = end(learned.source.as_deref());
        let [
            d_workload,
            d_name,
            d_revision,
            d_namespace,
            d_cluster,
            d_region,
            d_zone,
        ] = end(learned.destination.as_deref());
        let [service, service_namespace, service_name] =
            learned.service.as_deref().map_or([""; 3], |service| {
                [&service.key.hostname, &service.key.namespace, &service.name]
            });
        Self {
            direction,
            security: learned.security.as_str(),
            identities: [
                learned.proven_source_identity(),
                learned.proven_destination_identity(),
            ],
            texts: [
                s_workload,
                s_name,
                s_revision,
                s_namespace,
                s_cluster,
                service,
                service_namespace,
                service_name,
                d_workload,
                d_name,
                d_revision,
                d_namespace,
                d_cluster,
                s_region,
                s_zone,
                d_region,
                d_zone,
            ],
        }
    }

    pub(super) fn to_labels(&self) -> Labels {
        Labels {
            direction: self.direction,
            security: self.security,
            identities: self.identities.map(Option::<&SpiffeId>::cloned),
            texts: self.texts.map(Box::from),
        }
    }
}

impl Labels {
    /// Whether an end is nobody whom the mesh knows: a workload, by namespace and name, that does
    /// not exist any more, or an identity of which nothing else was known.
    pub(super) fn names_nobody(&self, exists: &dyn Fn(&str, &str) -> bool) -> bool {
        let [s_workload, _, _, s_namespace, ..] = &self.texts;
        let [.., d_workload, _, _, d_namespace, _, _, _, _, _] = &self.texts;
        let [source, destination] = &self.identities;
        let ends = [
            (s_namespace, s_workload, source),
            (d_namespace, d_workload, destination),
        ];
        ends.into_iter().any(|(namespace, workload, identity)| {
            if workload.is_empty() {
                identity.is_some()
            } else {
                !exists(namespace, workload)
            }
        })
    }
}

impl Hash for View<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self {
            direction,
            security,
            identities,
            texts,
        } = self;
        (direction, security, identities, texts).hash(state);
    }
}

impl PartialEq<Labels> for View<'_> {
    fn eq(&self, other: &Labels) -> bool {
        self.direction == other.direction
            && self.security == other.security
            && self.texts == other.texts.each_ref().map(|text| &**text)
            && self.identities == other.identities.each_ref().map(Option::as_ref)
    }
}

// PROTOCOL.md#traffic-labels
impl EncodeLabelSet for Series<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> std::fmt::Result {
        let Labels {
            direction,
            security,
            identities: [source_identity, destination_identity],
            texts,
        } = self.labels;
        let [
            s_workload,
            s_name,
            s_revision,
            s_namespace,
            s_cluster,
            service,
            service_namespace,
            service_name,
            d_workload,
            d_name,
            d_revision,
            d_namespace,
            d_cluster,
            s_region,
            s_zone,
            d_region,
            d_zone,
        ] = texts.each_ref().map(|text| &**text);
        let source_principal = principal(source_identity.as_ref());
        let destination_principal = principal(destination_identity.as_ref());
        for (name, value) in [
            ("reporter", direction.reporter()),
            ("source_workload", s_workload),
            ("source_canonical_service", s_name),
            ("source_canonical_revision", s_revision),
            ("source_workload_namespace", s_namespace),
            ("source_principal", &source_principal),
            ("source_app", s_name),
            ("source_version", s_revision),
            ("source_cluster", s_cluster),
            ("destination_service", service),
            ("destination_service_namespace", service_namespace),
            ("destination_service_name", service_name),
            ("destination_workload", d_workload),
            ("destination_canonical_service", d_name),
            ("destination_canonical_revision", d_revision),
            ("destination_workload_namespace", d_namespace),
            ("destination_principal", &destination_principal),
            ("destination_app", d_name),
            ("destination_version", d_revision),
            ("destination_cluster", d_cluster),
            ("request_protocol", "tcp"),
            ("response_flags", self.response_flags),
            ("connection_security_policy", security),
        ] {
            let value = if value.is_empty() { "unknown" } else { value };
            (name, value).encode(encoder.encode_label())?;
        }
        for (name, value) in [
            ("source_region", s_region),
            ("source_zone", s_zone),
            ("destination_region", d_region),
            ("destination_zone", d_zone),
        ] {
            if !value.is_empty() {
                (name, value).encode(encoder.encode_label())?;
            }
        }
        Ok(())
    }
}

/// What the labels say of one end.
fn end(workload: Option<&Workload>) -> [&str; 7] {
    workload.map_or([""; 7], |workload| {
        [
            &workload.workload_name,
            &workload.canonical_name,
            &workload.canonical_revision,
            &workload.namespace,
            &workload.cluster_id,
            &workload.locality.region,
            &workload.locality.zone,
        ]
    })
}

fn principal(identity: Option<&SpiffeId>) -> String {
    identity.map_or_else(String::new, ToString::to_string)
}

/// Seven texts for each end and three for the service.
const TEXTS: usize = 17;
