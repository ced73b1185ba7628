//! What is measured: a table of loads, each with the metrics that it gives, where its server is and who takes part.
//! Pure data; the names are those of the published tables.

use crate::contenders::{Contender, Place};

/// One kind of work, done once per contender and repetition.
#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) title: &'static str,
    pub(crate) place: Place,
    pub(crate) load: Load,
    /// The number that a load gives goes to the metric of the same place in the list.
    pub(crate) metrics: &'static [Metric],
    /// Whether `--quick` does it.
    pub(crate) quick: bool,
    pub(crate) bounded: Bounded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// iperf3 with this many streams. Gives Gb/s, then machine's and proxies' CPU nanoseconds per byte.
    Bulk(u32),
    /// sockperf, 1 KB on one connection. Gives p50 and p99 in microseconds.
    PingPong,
    /// wrk, 1 KB answers on this many connections. Gives requests per second, p99 in milliseconds, then machine's and
    /// proxies' CPU microseconds per request.
    Requests(u32),
    /// 1 KB messages on 64 connections at a rate that everybody can keep. Gives p50 and p99 in microseconds.
    Steady,
    /// New connections. Gives connections per second, then machine's and proxies' CPU microseconds per connection.
    Connects,
    /// A first connection after a start. Gives microseconds to the first byte.
    Cold,
    /// A ping-pong alone and beside a stream that nobody reads. Gives p99 beside over p99 alone, and p99 in microseconds.
    Unread,
}

/// Whether `limit` takes part: it bounds what moves bytes, not what makes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bounded {
    Yes,
    No,
}

/// A number with its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Metric {
    pub(crate) scenario: &'static str,
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    Higher,
    Lower,
}

impl Better {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Higher => "higher",
            Self::Lower => "lower",
        }
    }
}

impl Scenario {
    /// Whether `contender` takes part. With the node-local path off, only what stays on the node is different.
    pub(crate) fn admits(&self, contender: Contender) -> bool {
        match contender {
            Contender::None | Contender::Ours | Contender::Envoy | Contender::Peer => true,
            Contender::OursCrypto => self.place == Place::Local,
            Contender::Limit => self.bounded == Bounded::Yes,
        }
    }

    /// Whether one of its metrics belongs to one of these; all do when there are none.
    pub(crate) fn is_wanted(&self, only: &[String]) -> bool {
        wanted(self.metrics, only)
    }
}

/// Whether one of these metrics belongs to a wanted scenario.
pub(crate) fn wanted(metrics: &[Metric], only: &[String]) -> bool {
    only.is_empty()
        || metrics.iter().any(|metric| {
            only.iter()
                .any(|id| id.eq_ignore_ascii_case(metric.scenario))
        })
}

/// Every name that `--only` may hold.
pub(crate) fn names() -> Vec<&'static str> {
    let all = SCENARIOS.iter().flat_map(|scenario| scenario.metrics);
    let mut names: Vec<_> = all.chain(MEMORY).map(|metric| metric.scenario).collect();
    names.dedup();
    names
}

const fn up(scenario: &'static str, name: &'static str, unit: &'static str) -> Metric {
    Metric {
        scenario,
        name,
        unit,
        better: Better::Higher,
    }
}

const fn down(scenario: &'static str, name: &'static str, unit: &'static str) -> Metric {
    Metric {
        scenario,
        name,
        unit,
        better: Better::Lower,
    }
}

/// In the order in which they are done.
pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        title: "bulk to the other node, 1 stream",
        place: Place::Cross,
        load: Load::Bulk(1),
        metrics: &[
            up("S1", "throughput_1", "Gb/s"),
            down("S1c", "cpu_machine", "ns/B"),
            down("S1c", "cpu_proxies", "ns/B"),
        ],
        quick: true,
        bounded: Bounded::Yes,
    },
    Scenario {
        title: "bulk to the other node, 4 streams",
        place: Place::Cross,
        load: Load::Bulk(4),
        metrics: &[up("S2", "throughput_4", "Gb/s")],
        quick: true,
        bounded: Bounded::Yes,
    },
    Scenario {
        title: "bulk to the other node, 16 streams",
        place: Place::Cross,
        load: Load::Bulk(16),
        metrics: &[up("S2", "throughput_16", "Gb/s")],
        quick: false,
        bounded: Bounded::Yes,
    },
    Scenario {
        title: "1 KB there and back, 1 connection",
        place: Place::Cross,
        load: Load::PingPong,
        metrics: &[down("S3", "p50", "µs"), down("S3", "p99", "µs")],
        quick: true,
        bounded: Bounded::Yes,
    },
    Scenario {
        title: "1 KB requests, 16 connections",
        place: Place::Cross,
        load: Load::Requests(16),
        metrics: &[up("S4", "requests_16", "1/s"), down("S4", "p99_16", "ms")],
        quick: false,
        bounded: Bounded::Yes,
    },
    Scenario {
        title: "1 KB requests, 64 connections",
        place: Place::Cross,
        load: Load::Requests(64),
        metrics: &[
            up("S4", "requests_64", "1/s"),
            down("S4", "p99_64", "ms"),
            down("S4c", "cpu_machine", "µs/request"),
            down("S4c", "cpu_proxies", "µs/request"),
        ],
        quick: true,
        bounded: Bounded::Yes,
    },
    Scenario {
        title: "1 KB requests, 256 connections",
        place: Place::Cross,
        load: Load::Requests(256),
        metrics: &[up("S4", "requests_256", "1/s"), down("S4", "p99_256", "ms")],
        quick: false,
        bounded: Bounded::Yes,
    },
    Scenario {
        title: "1 KB at a fixed rate, 64 connections",
        place: Place::Cross,
        load: Load::Steady,
        metrics: &[down("S5", "p50", "µs"), down("S5", "p99", "µs")],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "new connections, warm",
        place: Place::Cross,
        load: Load::Connects,
        metrics: &[
            up("S6", "connections", "1/s"),
            down("S6c", "cpu_machine", "µs/connection"),
            down("S6c", "cpu_proxies", "µs/connection"),
        ],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "first connection of a pair",
        place: Place::Cross,
        load: Load::Cold,
        metrics: &[down("S7", "first_byte", "µs")],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "1 KB beside a stream that nobody reads",
        place: Place::Cross,
        load: Load::Unread,
        metrics: &[
            down("S8", "p99_beside_over_alone", "×"),
            down("S8", "p99_beside", "µs"),
        ],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "bulk within the node, 1 stream",
        place: Place::Local,
        load: Load::Bulk(1),
        metrics: &[up("S20", "throughput_1", "Gb/s")],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "bulk within the node, 4 streams",
        place: Place::Local,
        load: Load::Bulk(4),
        metrics: &[up("S20", "throughput_4", "Gb/s")],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "1 KB within the node, 1 connection",
        place: Place::Local,
        load: Load::PingPong,
        metrics: &[down("S21", "p50", "µs"), down("S21", "p99", "µs")],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "1 KB requests within the node, 64 connections",
        place: Place::Local,
        load: Load::Requests(64),
        metrics: &[up("S22", "requests_64", "1/s"), down("S22", "p99_64", "ms")],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "new connections within the node",
        place: Place::Local,
        load: Load::Connects,
        metrics: &[up("S23", "connections", "1/s")],
        quick: true,
        bounded: Bounded::No,
    },
    Scenario {
        title: "bulk to a server outside the mesh",
        place: Place::Outside,
        load: Load::Bulk(1),
        metrics: &[
            up("S31", "throughput_1", "Gb/s"),
            down("S31", "cpu_machine", "ns/B"),
        ],
        quick: true,
        bounded: Bounded::No,
    },
];

/// Of the process that has more of it: before, with and after many idle connections.
pub(crate) const MEMORY: &[Metric] = &[
    down("S9", "rss_per_10000_idle", "MB"),
    down("S9b", "rss_at_rest", "MB"),
    down("S9b", "rss_after", "MB"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scenario_is_wanted_by_any_of_its_names() {
        let only = |ids: &[&str]| -> Vec<_> {
            let ids: Vec<_> = ids.iter().map(|id| (*id).to_owned()).collect();
            SCENARIOS
                .iter()
                .filter(|scenario| scenario.is_wanted(&ids))
                .map(|scenario| scenario.load)
                .collect()
        };
        assert_eq!(only(&["s4c"]), [Load::Requests(64)]);
        assert_eq!(only(&["S22", "S3"]), [Load::PingPong, Load::Requests(64)]);
        assert_eq!(only(&[]).len(), SCENARIOS.len());
    }

    #[test]
    fn without_its_fast_path_the_mesh_is_measured_where_that_matters() {
        for scenario in SCENARIOS {
            let local = scenario.place == Place::Local;
            assert_eq!(scenario.admits(Contender::OursCrypto), local);
            assert!(!(local && scenario.admits(Contender::Limit)));
        }
    }
}
