//! The metrics page. Takes all books and the rows of other rooms, gives OpenMetrics text; never
//! holds a worker up for longer than it takes to copy a list of pointers.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabel as _, EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::book::{Book, Traffic};
use super::labels::{Labels, Series};
use super::source::{Distribution, Family, Kind, Row};
use crate::model::{Direction, Reason, SecurityPolicy};

/// The page of these books and rows.
pub(super) fn encode(
    books: &[Book],
    families: Vec<Family>,
    distributions: Vec<Distribution>,
) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Page {
        traffic: books.iter().flat_map(Book::all_traffic).collect(),
        families: own(books).into_iter().chain(families).collect(),
        distributions,
    }));
    let mut text = String::new();
    if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &registry) {
        // Writing to a String does not fail; a page without its end is refused by the scraper.
        tracing::error!(%error, "metrics page is incomplete");
    }
    text
}

#[derive(Debug)]
struct Page {
    traffic: Vec<Arc<Traffic>>,
    families: Vec<Family>,
    distributions: Vec<Distribution>,
}

/// The sum of one label set over all workers.
#[derive(Default)]
struct Sum {
    opened: u64,
    received_bytes: u64,
    sent_bytes: u64,
    closed: BTreeMap<&'static str, u64>,
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut sums = BTreeMap::<&Labels, Sum>::new();
        for traffic in &self.traffic {
            sums.entry(&traffic.labels).or_default().add(traffic);
        }
        for (name, help, value) in TRAFFIC {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, sum) in &sums {
                value(sum).try_for_each(|(response_flags, value)| {
                    let series = Series {
                        labels,
                        response_flags,
                    };
                    encode_value(&mut metric.encode_family(&series)?, Kind::Counter, value)
                })?;
            }
        }
        let mut families = BTreeMap::<_, Vec<&Family>>::new();
        for family in &self.families {
            families.entry(family.name).or_default().push(family);
        }
        for (name, same_name) in families {
            let Some(first) = same_name.first() else {
                continue;
            };
            let kind = match first.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
            };
            let mut metric = encoder.encode_descriptor(name, first.help, None, kind)?;
            for row in same_name.iter().flat_map(|family| &family.rows) {
                if row.labels.is_empty() {
                    encode_value(&mut metric, first.kind, row.value)?;
                } else {
                    encode_value(&mut metric.encode_family(row)?, first.kind, row.value)?;
                }
            }
        }
        let mut distributions = BTreeMap::<_, Vec<&Distribution>>::new();
        for distribution in &self.distributions {
            let same_name = distributions.entry(distribution.name).or_default();
            same_name.push(distribution);
        }
        for (name, same_name) in distributions {
            let help = same_name.first().map_or("", |first| first.help);
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for row in same_name {
                metric.encode_family(row)?.encode_histogram::<NoLabelSet>(
                    row.sum,
                    row.count,
                    &row.buckets,
                    None,
                )?;
            }
        }
        Ok(())
    }
}

impl Sum {
    fn add(&mut self, traffic: &Traffic) {
        self.opened += traffic.opened.get();
        self.received_bytes += traffic.received_bytes.get();
        self.sent_bytes += traffic.sent_bytes.get();
        for (reason, count) in traffic.closed.get().filter(|(_, count)| *count > 0) {
            *self.closed.entry(reason.response_flags()).or_default() += count;
        }
    }
}

impl EncodeLabelSet for Row {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        encode_labels(&self.labels, encoder)
    }
}

impl EncodeLabelSet for Distribution {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        encode_labels(&self.labels, encoder)
    }
}

fn encode_labels(
    labels: &[(&'static str, Cow<'static, str>)],
    encoder: &mut LabelSetEncoder<'_>,
) -> fmt::Result {
    let mut labels = labels.iter();
    labels.try_for_each(|(name, value)| (*name, &**value).encode(encoder.encode_label()))
}

/// Our own families: every connection, also those that ended before their labels were known.
fn own(books: &[Book]) -> [Family; 6] {
    let mut closed = Vec::new();
    let mut opened = Vec::new();
    let mut open = Vec::new();
    let mut sockets = Vec::new();
    let mut by_path = Vec::new();
    let mut revoked = Vec::new();
    for direction in [Direction::Inbound, Direction::Outbound] {
        let tallies = || books.iter().map(|book| book.tally(direction));
        // Endings are read before beginnings, so that their difference is never negative.
        let endings = endings(books, direction);
        let beginnings: u64 = tallies().map(|tally| tally.opened.get()).sum();
        let ended: u64 = endings.values().sum();
        let labels = vec![("direction", Cow::Borrowed(direction.as_str()))];
        opened.push(Row {
            labels: labels.clone(),
            value: beginnings,
        });
        open.push(Row {
            labels: labels.clone(),
            value: beginnings.saturating_sub(ended),
        });
        revoked.push(Row {
            labels: vec![("reporter", Cow::Borrowed(direction.reporter()))],
            value: endings.get(&Reason::CertRevoked).copied().unwrap_or(0),
        });
        closed.extend(endings.into_iter().map(|(reason, value)| {
            let mut labels = labels.clone();
            labels.push(("reason", Cow::Borrowed(reason.as_str())));
            Row { labels, value }
        }));
        by_path.extend(routed(books, direction));
        sockets.push(Row {
            labels: vec![("reporter", Cow::Borrowed(direction.reporter()))],
            value: tallies().map(|tally| tally.sockets.get()).sum(),
        });
    }
    let family = |name, help, kind, rows| Family {
        name,
        help,
        kind,
        rows,
    };
    [
        family(
            "ztunnel_connections",
            "Connections that ended, by direction and reason",
            Kind::Counter,
            closed,
        ),
        family(
            "ztunnel_connections_opened",
            "Connections that began, by direction",
            Kind::Counter,
            opened,
        ),
        family(
            "ztunnel_connections_routed",
            "Connections whose route was found, by direction and how their bytes go",
            Kind::Counter,
            by_path,
        ),
        family(
            "ztunnel_connections_open",
            "Connections that are open, by direction",
            Kind::Gauge,
            open,
        ),
        family(
            "istio_tcp_sockets_open",
            "Accepted sockets that are open",
            Kind::Gauge,
            sockets,
        ),
        family(
            "istio_crl_policy_rejections",
            "Connections that were refused or cut because a certificate is revoked",
            Kind::Counter,
            revoked,
        ),
    ]
}

/// Connections by how their bytes go.
fn routed(books: &[Book], direction: Direction) -> impl Iterator<Item = Row> {
    SecurityPolicy::ALL.into_iter().map(move |path| {
        let tallies = books.iter().map(|book| book.tally(direction));
        let counts = tallies.flat_map(|tally| tally.by_path.get());
        Row {
            labels: vec![
                ("direction", Cow::Borrowed(direction.as_str())),
                ("path", Cow::Borrowed(path.path())),
            ],
            value: counts
                .filter(|(each, _)| *each == path)
                .map(|(_, n)| n)
                .sum(),
        }
    })
}

fn endings(books: &[Book], direction: Direction) -> BTreeMap<Reason, u64> {
    let mut sums = BTreeMap::new();
    for (reason, count) in books
        .iter()
        .flat_map(|book| book.tally(direction).closed.get())
    {
        *sums.entry(reason).or_default() += count;
    }
    sums
}

fn encode_value(metric: &mut MetricEncoder<'_>, kind: Kind, value: u64) -> fmt::Result {
    match kind {
        Kind::Counter => metric.encode_counter::<NoLabelSet, _, u64>(&value, None),
        Kind::Gauge => metric.encode_gauge(&value),
    }
}

/// Name, help, and the values by response flags of each `istio_tcp_*` counter.
type TrafficFamily = (
    &'static str,
    &'static str,
    fn(&Sum) -> Box<dyn Iterator<Item = (&'static str, u64)> + '_>,
);

/// The flags of a connection that ended well, and of one that has not ended.
const NO_FLAGS: &str = "-";

// PROTOCOL.md#traffic-families: bytes received are those of the side that opened the connection,
// whoever reports; flags are final in closed and failed, and `-` in the others.
const TRAFFIC: [TrafficFamily; 5] = [
    (
        "istio_tcp_connections_opened",
        "TCP connections opened",
        |sum| Box::new(std::iter::once((NO_FLAGS, sum.opened))),
    ),
    (
        "istio_tcp_connections_closed",
        "TCP connections closed",
        |sum| Box::new(sum.closed.iter().map(|(flags, value)| (*flags, *value))),
    ),
    (
        "istio_tcp_connections_failed",
        "TCP connections that failed",
        |sum| {
            let failed = sum.closed.iter().filter(|(flags, _)| **flags != NO_FLAGS);
            Box::new(failed.map(|(flags, value)| (*flags, *value)))
        },
    ),
    (
        "istio_tcp_received_bytes",
        "Bytes received from the side that opened the connection",
        |sum| Box::new(std::iter::once((NO_FLAGS, sum.received_bytes))),
    ),
    (
        "istio_tcp_sent_bytes",
        "Bytes sent to the side that opened the connection",
        |sum| Box::new(std::iter::once((NO_FLAGS, sum.sent_bytes))),
    ),
];
