//! What is counted of questions. Takes each question of a worker, gives the rows of the metrics page;
//! labels come from closed lists and the snapshot, never from a name that was asked for.

use std::borrow::Cow;
use std::collections::BTreeMap;
#[expect(
    clippy::disallowed_types,
    reason = "a worker's own table, which only a scrape ever contends for"
)]
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::account::{Distribution, Family, Kind, Row, Source};
use crate::model::Workload;
use crate::wire::dns::Transport;

/// The tallies of all workers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Counts(Arc<[Tally]>);

/// One worker's tally. Cheap to clone; clones stay on the worker.
#[derive(Clone, Debug, Default)]
pub struct Tally(Arc<Table>);

#[derive(Debug, Default)]
#[repr(align(64))] // no cache line is written by two workers
#[expect(
    clippy::disallowed_types,
    reason = "a worker's own table, which only a scrape ever contends for"
)]
struct Table {
    numbers: Mutex<BTreeMap<Labels, Numbers>>,
    refused: [AtomicU64; Refused::ALL.len()],
}

/// Why a pod was not even heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It has too many connections to resolvers.
    Connections,
    /// Too many of its questions wait.
    Questions,
}

impl Refused {
    const ALL: [Self; 2] = [Self::Connections, Self::Questions];

    const fn label(self) -> &'static str {
        match self {
            Self::Connections => "too_many_connections",
            Self::Questions => "too_many_questions",
        }
    }
}

/// Who asked for what, and how.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Labels {
    query_type: &'static str,
    transport: Transport,
    service: Arc<str>,
    revision: Arc<str>,
}

#[derive(Clone, Debug, Default)]
struct Numbers {
    requests: u64,
    forwarded: u64,
    failed: u64,
    took: [u64; BUCKETS.len()],
    took_sum: Duration,
}

impl Counts {
    /// Tallies for so many workers.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| Tally::default()).collect())
    }

    /// The tally of a worker.
    #[must_use]
    pub fn tally(&self, worker: usize) -> Tally {
        self.0.get(worker).cloned().unwrap_or_default()
    }
}

impl Tally {
    /// A question was asked.
    pub(super) fn asked(&self, query_type: &'static str, by: Transport, client: &Workload) {
        self.of(query_type, by, client, |numbers| numbers.requests += 1);
    }

    /// A pod was not heard.
    pub(super) fn refused(&self, why: Refused) {
        let of = Refused::ALL.iter().zip(&self.0.refused);
        for (_, count) in of.filter(|(reason, _)| **reason == why) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A question was passed on; `answered` says whether something came back in that time.
    pub(super) fn forwarded(
        &self,
        query_type: &'static str,
        by: Transport,
        client: &Workload,
        (answered, took): (bool, Duration),
    ) {
        self.of(query_type, by, client, |numbers| {
            numbers.forwarded += 1;
            numbers.failed += u64::from(!answered);
            numbers.took_sum += took;
            let seconds = took.as_secs_f64();
            let buckets = BUCKETS.iter().zip(&mut numbers.took);
            if let Some((_, count)) = buckets.into_iter().find(|(upto, _)| seconds <= **upto) {
                *count += 1;
            }
        });
    }

    fn of(
        &self,
        query_type: &'static str,
        transport: Transport,
        client: &Workload,
        change: impl FnOnce(&mut Numbers),
    ) {
        let labels = Labels {
            query_type,
            transport,
            service: Arc::clone(&client.canonical_name),
            revision: Arc::clone(&client.canonical_revision),
        };
        let mut table = self
            .0
            .numbers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let labels = match table.len() < MAX_LABELS || table.contains_key(&labels) {
            true => labels,
            false => Labels {
                service: "".into(),
                revision: "".into(),
                ..labels
            },
        };
        change(table.entry(labels).or_default());
    }
}

impl Counts {
    fn refused(&self) -> Family {
        let total = |at: usize| {
            let counts = self.0.iter().filter_map(|tally| tally.0.refused.get(at));
            counts.map(|count| count.load(Ordering::Relaxed)).sum()
        };
        let rows = Refused::ALL.iter().enumerate().map(|(at, why)| Row {
            labels: vec![("reason", Cow::Borrowed(why.label()))],
            value: total(at),
        });
        Family {
            name: "ztunnel_dns_refused",
            help: "Questions and connections of pods beyond what a pod may have at a time",
            kind: Kind::Counter,
            rows: rows.collect(),
        }
    }

    fn sums(&self) -> BTreeMap<Labels, Numbers> {
        let mut sums = BTreeMap::<Labels, Numbers>::new();
        for tally in &*self.0 {
            let table = tally
                .0
                .numbers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            for (labels, numbers) in &*table {
                sums.entry(labels.clone()).or_default().add(numbers);
            }
        }
        sums
    }
}

impl Numbers {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.forwarded += other.forwarded;
        self.failed += other.failed;
        self.took_sum += other.took_sum;
        for (sum, more) in self.took.iter_mut().zip(other.took) {
            *sum += more;
        }
    }
}

impl Labels {
    fn pairs(&self) -> Vec<(&'static str, Cow<'static, str>)> {
        let transport = match self.transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        let text = |text: &str| match text {
            "" => Cow::Borrowed("unknown"),
            text => Cow::Owned(text.to_owned()),
        };
        vec![
            ("request_query_type", Cow::Borrowed(self.query_type)),
            ("request_protocol", Cow::Borrowed(transport)),
            ("source_canonical_service", text(&self.service)),
            ("source_canonical_revision", text(&self.revision)),
        ]
    }
}

// PROTOCOL.md#dns-metrics
impl Source for Counts {
    fn families(&self) -> Vec<Family> {
        let sums = self.sums();
        let family = |name, help, value: fn(&Numbers) -> u64| Family {
            name,
            help,
            kind: Kind::Counter,
            rows: sums
                .iter()
                .map(|(labels, numbers)| Row {
                    labels: labels.pairs(),
                    value: value(numbers),
                })
                .collect(),
        };
        vec![
            family("istio_dns_requests", "Questions of pods", |n| n.requests),
            family(
                "istio_dns_upstream_requests",
                "Questions of pods that were passed on to the resolver that was asked",
                |n| n.forwarded,
            ),
            family(
                "istio_dns_upstream_failures",
                "Questions that were passed on and not answered",
                |n| n.failed,
            ),
            self.refused(),
        ]
    }

    fn distributions(&self) -> Vec<Distribution> {
        let sums = self.sums();
        let forwarded = sums.iter().filter(|(_, numbers)| numbers.forwarded > 0);
        forwarded
            .map(|(labels, numbers)| Distribution {
                name: "istio_dns_upstream_request_duration_seconds",
                help: "How long the resolver that was asked took",
                labels: labels.pairs(),
                sum: numbers.took_sum.as_secs_f64(),
                count: numbers.forwarded,
                buckets: BUCKETS.into_iter().zip(numbers.took).collect(),
            })
            .collect()
    }
}

/// Pods come and go; of a worker that has met so many the new ones are counted without their names.
const MAX_LABELS: usize = 4096;
/// Upper bounds in seconds.
const BUCKETS: [f64; 7] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0, f64::INFINITY];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_beyond_is_counted_has_no_names() {
        let tally = Tally::default();
        let counts = Counts([tally.clone()].into());
        for number in 0..MAX_LABELS + 10 {
            let mut client = crate::model::testing::workload("shop");
            client.canonical_name = format!("service-{number}").into();
            tally.asked("A", Transport::Udp, &client);
        }
        let families = counts.families();
        let requests = &families[0].rows;
        assert_eq!(requests.len(), MAX_LABELS + 1);
        let unknown = |row: &&Row| row.labels.iter().any(|(_, value)| value == "unknown");
        let nameless: Vec<_> = requests.iter().filter(unknown).collect();
        assert_eq!(nameless.iter().map(|row| row.value).max(), Some(10));
    }

    #[test]
    fn who_was_not_heard_is_counted_by_reason() {
        let counts = Counts::new(2);
        counts.tally(0).refused(Refused::Questions);
        counts.tally(1).refused(Refused::Questions);
        counts.tally(1).refused(Refused::Connections);
        let families = counts.families();
        let refused = families.last().unwrap();
        let values: Vec<_> = refused.rows.iter().map(|row| row.value).collect();
        assert_eq!(
            (refused.name, &*values),
            ("ztunnel_dns_refused", &[1, 2][..])
        );
    }
}
