//! Rows of other rooms for the metrics page. Takes handles of those rooms, gives families at scrape
//! time; never stores a number.

use std::borrow::Cow;
use std::sync::Arc;

use tracing::warn;

use crate::account::{Family, Kind, Row, Source};
use crate::capture::{Capture, CountSource};
use crate::control::{Counts, Ended};
use crate::enrol::{Census, Tally};

/// What the kernel programs counted.
#[must_use]
pub fn kernel(capture: Capture) -> Box<dyn Source> {
    Box::new(Kernel(capture))
}

/// How the pods of this node are.
#[must_use]
pub fn enrolment(census: Arc<Census>) -> Box<dyn Source> {
    Box::new(Pods(census))
}

/// How it goes with the node agent.
#[must_use]
pub fn agent(tally: Arc<Tally>) -> Box<dyn Source> {
    Box::new(Agent(tally))
}

/// What this program is, and of which release of the mesh.
#[must_use]
pub fn build(istio_version: &str) -> Box<dyn Source> {
    Box::new(Build(istio_version.to_owned()))
}

#[derive(Debug)]
struct Pods(Arc<Census>);

impl Source for Pods {
    fn families(&self) -> Vec<Family> {
        let row = |state, value| Row {
            labels: vec![("state", Cow::Borrowed(state))],
            value,
        };
        vec![
            Family {
                name: "ztunnel_enrol_pods",
                help: "Pods of this node: served; captured and not served, so closed; wanted and not as \
                       they should be",
                kind: Kind::Gauge,
                rows: vec![
                    row("enrolled", self.0.enrolled()),
                    row("closed", self.0.closed()),
                    row("troubled", self.0.troubled()),
                ],
            },
            Family::single(
                "ztunnel_enrol_repairs",
                "How often rules, routes or sysctls that a pod had changed were put back",
                Kind::Counter,
                self.0.repairs(),
            ),
            // PROTOCOL.md#pod-families
            Family::single(
                "workload_manager_active_proxy_count",
                "Pods that are served",
                Kind::Gauge,
                self.0.enrolled(),
            ),
            Family::single(
                "workload_manager_pending_proxy_count",
                "Pods that should be served and are not",
                Kind::Gauge,
                self.0.troubled(),
            ),
            Family::single(
                "workload_manager_proxies_started",
                "Pods that began to be served",
                Kind::Counter,
                self.0.started(),
            ),
            Family::single(
                "workload_manager_proxies_stopped",
                "Pods that ceased to be served",
                Kind::Counter,
                self.0.stopped(),
            ),
        ]
    }
}

#[derive(Debug)]
struct Agent(Arc<Tally>);

impl Source for Agent {
    fn families(&self) -> Vec<Family> {
        vec![
            Family::single(
                "ztunnel_enrol_agent_connections",
                "How often the node agent was connected to",
                Kind::Counter,
                self.0.connections(),
            ),
            Family::single(
                "ztunnel_enrol_agent_failures",
                "How often the node agent could not be connected to, or a connection to it ended",
                Kind::Counter,
                self.0.failures(),
            ),
            Family::single(
                "ztunnel_enrol_agent_refusals",
                "How often a request of the node agent was answered with an error",
                Kind::Counter,
                self.0.refusals(),
            ),
        ]
    }
}

#[derive(Debug)]
struct Build(String);

impl Source for Build {
    fn families(&self) -> Vec<Family> {
        vec![Family {
            name: "istio_build",
            help: "The version of this component; always 1",
            kind: Kind::Gauge,
            rows: vec![Row {
                labels: vec![
                    ("component", Cow::Borrowed("ztunnel")),
                    ("tag", Cow::Owned(self.0.clone())),
                ],
                value: 1,
            }],
        }]
    }
}

#[derive(Debug)]
struct Kernel(Capture);

impl Source for Kernel {
    fn families(&self) -> Vec<Family> {
        let counts = match self.0.counters() {
            Ok(counts) => counts,
            Err(error) => {
                warn!(%error, "the kernel's counters cannot be read");
                return Vec::new();
            }
        };
        let rows = counts
            .into_iter()
            .map(|count| {
                let netns_cookie = match count.source {
                    CountSource::Node => Cow::Borrowed(""),
                    CountSource::Pod(cookie) => Cow::Owned(cookie.0.to_string()),
                };
                Row {
                    labels: vec![
                        ("verdict", Cow::Borrowed(count.verdict)),
                        ("netns_cookie", netns_cookie),
                    ],
                    value: count.total,
                }
            })
            .collect();
        vec![Family {
            name: "ztunnel_capture_verdicts",
            help: "Verdicts of the kernel programs, by pod where one program serves one pod",
            kind: Kind::Counter,
            rows,
        }]
    }
}

/// What the control plane's stream counted.
// PROTOCOL.md#xds-metrics
#[must_use]
pub fn control_plane(counts: Arc<Counts>) -> Box<dyn Source> {
    Box::new(ControlPlane(counts))
}

#[derive(Debug)]
struct ControlPlane(Arc<Counts>);

impl Source for ControlPlane {
    fn families(&self) -> Vec<Family> {
        let Self(counts) = self;
        let terminations = Ended::ALL.map(|how| Row {
            labels: vec![("reason", Cow::Borrowed(how.label()))],
            value: counts.terminations(how),
        });
        let by_type = counts.by_type();
        let of_type = |column: fn(&[u64; 3]) -> u64| {
            let row = |(url, values): &(&'static str, [u64; 3])| Row {
                labels: vec![("url", Cow::Borrowed(*url))],
                value: column(values),
            };
            by_type.iter().map(row).collect()
        };
        let counter = |name, help, rows| Family {
            name,
            help,
            kind: Kind::Counter,
            rows,
        };
        vec![
            counter(
                "istio_xds_connection_terminations",
                "Streams to the control plane that ended, by how",
                terminations.into(),
            ),
            counter(
                "istio_xds_message",
                "Responses of the control plane",
                of_type(|[messages, _, _]| *messages),
            ),
            counter(
                "istio_xds_message_bytes",
                "Bytes of resources in the control plane's responses",
                of_type(|[_, bytes, _]| *bytes),
            ),
            counter(
                "ztunnel_control_rejected_resources",
                "Resources of the control plane that were refused",
                of_type(|[_, _, rejected]| *rejected),
            ),
            Family::single(
                "ztunnel_control_connected",
                "1 while a stream to the control plane is open",
                Kind::Gauge,
                counts.is_connected(),
            ),
        ]
    }
}
