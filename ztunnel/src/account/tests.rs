//! What a scrape and a log reader see of connections: pages parsed back, lines compared to the letter.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::logging::Format;
use crate::logging::tests::logged;
use crate::model::{
    ClientAddr, Direction, Health, LoadBalancer, Locality, Meter as _, NetworkMode, OrigDst,
    Protocol, Reason, SecurityPolicy, Service, SpiffeId, UpstreamAddr, Visibility, Workload,
    WorkloadUid,
};

fn opening(direction: Direction) -> Opening {
    Opening {
        direction,
        source: ClientAddr::new("10.0.0.1:40000".parse().unwrap()),
        destination: OrigDst::new("10.96.0.9:80".parse().unwrap()),
        trace_id: 0xab,
    }
}

fn workload(name: &str) -> Workload {
    Workload {
        uid: WorkloadUid(name.into()),
        name: format!("{name}-pod").into(),
        namespace: "shop".into(),
        identity: Some(identity(name)),
        ips: Vec::new(),
        network: "".into(),
        protocol: Protocol::Hbone,
        network_mode: NetworkMode::Standard,
        workload_name: name.into(),
        workload_type: "deployment".into(),
        canonical_name: format!("{name}-app").into(),
        canonical_revision: "v1".into(),
        hostname: "".into(),
        node: "".into(),
        cluster_id: "east".into(),
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

fn identity(name: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{name}")
        .parse()
        .unwrap()
}

fn service() -> Service {
    Service {
        name: "cart".into(),
        key: "shop/cart.shop.svc.cluster.local".parse().unwrap(),
        vips: Vec::new(),
        cidr_vips: Vec::new(),
        ports: BTreeMap::new(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: LoadBalancer::default(),
        ip_families: None,
        canonical: false,
        visibility: Visibility::Public,
    }
}

fn learned() -> Learned {
    Learned {
        source: Some(Arc::new(workload("web"))),
        source_identity: Some(identity("web")),
        destination: Some(Arc::new(workload("cart"))),
        destination_identity: Some(identity("cart")),
        service: Some(Arc::new(service())),
        dst_addr: UpstreamAddr::new("10.0.1.2:15008".parse().unwrap()),
        hbone_addr: Some("10.0.1.2:8080".to_owned()),
        security: SecurityPolicy::MutualTls,
    }
}

fn plaintext() -> Learned {
    Learned {
        hbone_addr: None,
        service: None,
        source: None,
        security: SecurityPolicy::Unknown,
        ..learned()
    }
}

/// Metric name and labels in the page's order → value.
type Samples = BTreeMap<(String, Vec<(String, String)>), u64>;

/// Reads a page as a scraper does; panics where a scraper would refuse it.
fn scrape(accounts: &Accounts) -> Samples {
    let page = accounts.encode();
    let body = page
        .strip_suffix("# EOF\n")
        .expect("the page ends in # EOF");
    let mut samples = Samples::new();
    let mut types = BTreeMap::new();
    for line in body.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap();
            assert_eq!(types.insert(name, kind), None, "{name} is declared twice");
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (name, labels, value) = sample(line);
        let declared = name.strip_suffix("_total").map_or_else(
            || types.get(&*name) == Some(&"gauge"),
            |name| types.get(name) == Some(&"counter"),
        );
        assert!(declared, "{line}");
        assert_eq!(samples.insert((name, labels), value), None, "{line}");
    }
    samples
}

fn sample(line: &str) -> (String, Vec<(String, String)>, u64) {
    let Some((name, rest)) = line.split_once('{') else {
        let (name, value) = line.split_once(' ').unwrap();
        return (name.to_owned(), Vec::new(), value.parse().unwrap());
    };
    let mut labels = Vec::new();
    let mut rest = rest;
    loop {
        let (label, after) = rest.split_once("=\"").unwrap();
        let mut value = String::new();
        let mut chars = after.chars();
        loop {
            match chars.next().unwrap() {
                '\\' => match chars.next().unwrap() {
                    'n' => value.push('\n'),
                    c @ ('"' | '\\') => value.push(c),
                    c => panic!("\\{c} in {line}"),
                },
                '"' => break,
                c => value.push(c),
            }
        }
        labels.push((label.to_owned(), value));
        rest = chars.as_str();
        match rest.strip_prefix(',') {
            Some(next) => rest = next,
            None => break,
        }
    }
    let value = rest.strip_prefix("} ").unwrap().parse().unwrap();
    (name.to_owned(), labels, value)
}

/// The values of a metric whose labels include these.
fn values(samples: &Samples, metric: &str, labels: &[(&str, &str)]) -> Vec<u64> {
    samples
        .iter()
        .filter(|((name, _), _)| name == metric)
        .filter(|((_, has), _)| {
            labels
                .iter()
                .all(|(name, value)| has.iter().any(|(n, v)| n == name && v == value))
        })
        .map(|(_, value)| *value)
        .collect()
}

fn ended(samples: &Samples, direction: &str) -> BTreeMap<String, u64> {
    samples
        .iter()
        .filter(|((name, labels), value)| {
            name == "ztunnel_connections_total"
                && **value > 0
                && labels.contains(&("direction".to_owned(), direction.to_owned()))
        })
        .map(|((_, labels), value)| (labels[1].1.clone(), *value))
        .collect()
}

#[test]
fn a_success_opens_once_closes_once_and_never_fails() {
    let accounts = Accounts::new(1);
    let ledger = accounts.book(0).open(opening(Direction::Outbound));
    ledger.learn(learned());
    ledger.learn(plaintext());
    ledger.received(11);
    ledger.sent(22);
    ledger.close(Reason::Complete, None);
    let samples = scrape(&accounts);
    for (metric, value) in [
        ("istio_tcp_connections_opened_total", vec![1]),
        ("istio_tcp_connections_closed_total", vec![1]),
        ("istio_tcp_connections_failed_total", vec![]),
        ("istio_tcp_received_bytes_total", vec![11]),
        ("istio_tcp_sent_bytes_total", vec![22]),
    ] {
        assert_eq!(values(&samples, metric, &[]), value, "{metric}");
        assert_eq!(
            values(
                &samples,
                metric,
                &[
                    ("response_flags", "-"),
                    ("reporter", "source"),
                    ("connection_security_policy", "mutual_tls"),
                ]
            ),
            value,
            "{metric}"
        );
    }
    assert_eq!(
        ended(&samples, "outbound"),
        BTreeMap::from([("complete".to_owned(), 1)])
    );
    assert_eq!(ended(&samples, "inbound"), BTreeMap::new());
}

#[test]
fn labels_are_those_of_the_established_proxy_in_its_order() {
    let accounts = Accounts::new(1);
    let book = accounts.book(0);
    let mut with_locality = workload("cart");
    with_locality.locality.region = "r1".into();
    book.open(opening(Direction::Inbound)).learn(Learned {
        destination: Some(Arc::new(with_locality)),
        ..learned()
    });
    let samples = scrape(&accounts);
    let labels = samples
        .keys()
        .find(|(name, _)| name == "istio_tcp_connections_opened_total")
        .map(|(_, labels)| labels.clone())
        .unwrap();
    let expected = [
        ("reporter", "destination"),
        ("source_workload", "web"),
        ("source_canonical_service", "web-app"),
        ("source_canonical_revision", "v1"),
        ("source_workload_namespace", "shop"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
        ("source_app", "web-app"),
        ("source_version", "v1"),
        ("source_cluster", "east"),
        ("destination_service", "cart.shop.svc.cluster.local"),
        ("destination_service_namespace", "shop"),
        ("destination_service_name", "cart"),
        ("destination_workload", "cart"),
        ("destination_canonical_service", "cart-app"),
        ("destination_canonical_revision", "v1"),
        ("destination_workload_namespace", "shop"),
        (
            "destination_principal",
            "spiffe://cluster.local/ns/shop/sa/cart",
        ),
        ("destination_app", "cart-app"),
        ("destination_version", "v1"),
        ("destination_cluster", "east"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
        ("destination_region", "r1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(labels, expected);
}

#[test]
fn what_is_absent_reads_unknown_and_locality_is_left_out() {
    let accounts = Accounts::new(1);
    accounts
        .book(0)
        .open(opening(Direction::Inbound))
        .learn(Learned {
            destination: None,
            ..plaintext()
        });
    let samples = scrape(&accounts);
    let (_, labels) = samples
        .keys()
        .find(|(name, _)| name == "istio_tcp_connections_opened_total")
        .unwrap();
    assert_eq!(labels.len(), 23);
    for (name, value) in labels {
        let expected = match &**name {
            "reporter" => "destination",
            "request_protocol" => "tcp",
            "response_flags" => "-",
            _ => "unknown",
        };
        assert_eq!(value, expected, "{name}");
    }
}

#[test]
fn a_denial_has_its_flags_in_closed_and_failed_only() {
    let accounts = Accounts::new(1);
    let ledger = accounts.book(0).open(opening(Direction::Inbound));
    ledger.learn(learned());
    ledger.close(Reason::PolicyDenied, None);
    let samples = scrape(&accounts);
    let denied = [("response_flags", "DENY")];
    for (metric, value) in [
        ("istio_tcp_connections_opened_total", vec![]),
        ("istio_tcp_connections_closed_total", vec![1]),
        ("istio_tcp_connections_failed_total", vec![1]),
    ] {
        assert_eq!(values(&samples, metric, &denied), value, "{metric}");
    }
}

#[test]
fn every_reason_counts_once_in_ours_and_by_its_flags() {
    let accounts = Accounts::new(1);
    let book = accounts.book(0);
    let mut by_flags = BTreeMap::<_, u64>::new();
    for reason in Reason::ALL {
        let ledger = book.open(opening(Direction::Outbound));
        ledger.learn(learned());
        ledger.close(reason, None);
        *by_flags.entry(reason.response_flags()).or_default() += 1;
    }
    let samples = scrape(&accounts);
    let expected: BTreeMap<_, _> = Reason::ALL
        .iter()
        .map(|reason| (reason.as_str().to_owned(), 1))
        .collect();
    assert_eq!(ended(&samples, "outbound"), expected);
    for (flags, count) in by_flags {
        let labels = [("response_flags", flags)];
        let closed = values(&samples, "istio_tcp_connections_closed_total", &labels);
        assert_eq!(closed, [count], "{flags}");
        let failed = values(&samples, "istio_tcp_connections_failed_total", &labels);
        let expected = if flags == "-" { vec![] } else { vec![count] };
        assert_eq!(failed, expected, "{flags}");
    }
}

#[test]
fn an_end_before_the_route_counts_only_in_ours() {
    let accounts = Accounts::new(1);
    let ledger = accounts.book(0).open(opening(Direction::Outbound));
    ledger.close(Reason::UnknownWorkload, None);
    let samples = scrape(&accounts);
    assert_eq!(
        ended(&samples, "outbound"),
        BTreeMap::from([("unknown_workload".to_owned(), 1)])
    );
    assert!(
        !samples
            .keys()
            .any(|(name, _)| name.starts_with("istio_tcp_connections"))
    );
}

#[test]
fn a_dropped_ledger_ends_once_as_drained_with_an_error() {
    let accounts = Accounts::new(1);
    let book = accounts.book(0);
    let lines = logged(Format::Plain, "info", || {
        let ledger = book.open(opening(Direction::Outbound));
        ledger.learn(learned());
        drop(ledger);
        drop(book.open(opening(Direction::Outbound)));
    });
    let lines: Vec<_> = lines.lines().collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    for (line, message) in lines
        .iter()
        .zip(["connection complete", "connection failed"])
    {
        assert!(line.contains(message), "{line}");
        let end = r#" reason="drained" error="connection was cut by a drain""#;
        assert!(line.ends_with(end), "{line}");
    }
    let samples = scrape(&accounts);
    assert_eq!(
        ended(&samples, "outbound"),
        BTreeMap::from([("drained".to_owned(), 2)])
    );
    assert_eq!(
        values(&samples, "istio_tcp_connections_failed_total", &[]),
        [1]
    );
}

#[test]
fn bytes_are_on_the_page_while_the_transfer_lasts() {
    let accounts = Accounts::new(1);
    let ledger = accounts.book(0).open(opening(Direction::Outbound));
    ledger.learn(learned());
    for total in [1, 2, 3] {
        ledger.received(1);
        assert_eq!(
            values(&scrape(&accounts), "istio_tcp_received_bytes_total", &[]),
            [total]
        );
    }
}

#[test]
fn workers_are_summed_and_open_things_are_gauges() {
    let accounts = Accounts::new(2);
    let threads: Vec<_> = [0, 1]
        .map(|worker| {
            let book = accounts.book(worker);
            std::thread::spawn(move || {
                let socket = book.socket(Direction::Inbound);
                let finished = book.open(opening(Direction::Inbound));
                finished.learn(learned());
                finished.received(10);
                finished.close(Reason::Complete, None);
                let open = book.open(opening(Direction::Inbound));
                open.learn(learned());
                (socket, open)
            })
        })
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    let samples = scrape(&accounts);
    let inbound = [("direction", "inbound")];
    let destination = [("reporter", "destination")];
    for (metric, labels, value) in [
        ("istio_tcp_connections_opened_total", &destination, 4),
        ("istio_tcp_connections_closed_total", &destination, 2),
        ("istio_tcp_received_bytes_total", &destination, 20),
        ("istio_tcp_sockets_open", &destination, 2),
        ("ztunnel_connections_opened_total", &inbound, 4),
        ("ztunnel_connections_open", &inbound, 2),
    ] {
        assert_eq!(values(&samples, metric, labels), [value], "{metric}");
    }
    drop(threads);
    let samples = scrape(&accounts);
    for (metric, labels, value) in [
        ("istio_tcp_connections_closed_total", &destination, [2, 2]),
        ("istio_tcp_sockets_open", &destination, [0; 2]),
        ("ztunnel_connections_open", &inbound, [0; 2]),
    ] {
        let values = values(&samples, metric, labels);
        assert_eq!(values, value[..values.len()], "{metric}");
    }
}

#[test]
fn connections_with_equal_labels_share_their_counters() {
    let accounts = Accounts::new(1);
    let book = accounts.book(0);
    for _ in 0..3 {
        // Equal in content: each snapshot brings new values.
        let ledger = book.open(opening(Direction::Outbound));
        ledger.learn(learned());
        ledger.close(Reason::Complete, None);
    }
    let ledger = book.open(opening(Direction::Outbound));
    ledger.learn(plaintext());
    ledger.close(Reason::Complete, None);
    assert_eq!(book.all_traffic().len(), 2);
    assert_eq!(
        values(
            &scrape(&accounts),
            "istio_tcp_connections_opened_total",
            &[("source_workload", "web")]
        ),
        [3]
    );
}

#[test]
fn a_label_value_cannot_break_out_of_its_quotes() {
    const EVIL: &str = "a\"} 1\nevil_total{x=\"\\";
    let accounts = Accounts::new(1);
    let mut source = workload("web");
    source.workload_name = EVIL.into();
    accounts
        .book(0)
        .open(opening(Direction::Inbound))
        .learn(Learned {
            source: Some(Arc::new(source)),
            ..learned()
        });
    let samples = scrape(&accounts);
    assert_eq!(
        values(
            &samples,
            "istio_tcp_connections_opened_total",
            &[("source_workload", EVIL)]
        ),
        [1]
    );
    assert!(!samples.keys().any(|(name, _)| name.starts_with("evil")));
}

#[derive(Debug)]
struct Drops(u64);

impl Source for Drops {
    fn families(&self) -> Vec<Family> {
        vec![Family {
            name: "ztunnel_capture_drops",
            help: "Verdicts",
            kind: Kind::Counter,
            rows: vec![Row {
                labels: vec![("pod", Cow::Owned(self.0.to_string()))],
                value: self.0,
            }],
        }]
    }
}

#[tokio::test(start_paused = true)]
async fn label_sets_of_workloads_that_are_gone_are_forgotten_after_a_rest() {
    let accounts = Accounts::new(2);
    let gone = || Learned {
        source: Some(Arc::new(workload("gone"))),
        source_identity: Some(identity("gone")),
        ..learned()
    };
    for book in [accounts.book(0), accounts.book(1)] {
        for learned in [learned(), gone()] {
            let ledger = book.open(opening(Direction::Inbound));
            ledger.learn(learned);
            ledger.close(Reason::Complete, None);
        }
    }
    let opened = |workload: &str| {
        let labels = [("source_workload", workload)];
        values(
            &scrape(&accounts),
            "istio_tcp_connections_opened_total",
            &labels,
        )
    };
    let exists = |namespace: &str, name: &str| namespace == "shop" && name != "gone";
    // The first sweep sees that something happened; fifteen rests follow.
    for _ in 0..15 {
        accounts.forget(exists);
        assert_eq!(opened("gone"), [2], "a scraper may not have seen it");
    }
    // A connection that is open keeps its labels, however long it rests.
    let open = accounts.book(1).open(opening(Direction::Inbound));
    open.learn(gone());
    accounts.forget(exists);
    assert_eq!(opened("gone"), [2], "of the worker that has the connection");
    for _ in 0..40 {
        accounts.forget(exists);
    }
    assert_eq!(opened("gone"), [2]);
    open.close(Reason::Complete, None);
    for _ in 0..16 {
        accounts.forget(exists);
    }
    assert_eq!(opened("gone"), Vec::<u64>::new());
    assert_eq!(opened("web"), [2], "the mesh knows it");
    let samples = scrape(&accounts);
    let all = [("direction", "inbound")];
    assert_eq!(
        values(&samples, "ztunnel_connections_opened_total", &all),
        [5]
    );
}

#[test]
fn other_rooms_share_the_page_with_the_process() {
    let accounts = Accounts::new(1);
    accounts.register(Box::new(Drops(1)));
    accounts.register(Box::new(Drops(2)));
    let samples = scrape(&accounts);
    assert_eq!(values(&samples, "ztunnel_capture_drops_total", &[]), [1, 2]);
    assert_eq!(values(&samples, "process_open_fds", &[]).len(), 1);
    assert_eq!(values(&samples, "process_max_fds", &[]).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_access_line_has_the_known_fields_in_the_known_order() {
    let accounts = Accounts::new(1);
    let ledger = accounts.book(0).open(opening(Direction::Outbound));
    tokio::time::advance(Duration::from_millis(12)).await;
    let lines = logged(Format::Plain, "debug", || {
        ledger.learn(learned());
        ledger.received(11);
        ledger.sent(22);
        ledger.close(Reason::Complete, None);
    });
    let ends = "src.addr=10.0.0.1:40000 src.workload=\"web-pod\" src.namespace=\"shop\" \
                src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" src.cluster=\"east\" \
                dst.addr=10.0.1.2:15008 dst.hbone_addr=10.0.1.2:8080 \
                dst.service=\"cart.shop.svc.cluster.local\" dst.workload=\"cart-pod\" \
                dst.namespace=\"shop\" dst.identity=\"spiffe://cluster.local/ns/shop/sa/cart\" \
                dst.cluster=\"east\" direction=\"outbound\"";
    assert_eq!(
        lines,
        format!(
            "TIME\tdebug\taccess\tconnection opened\t{ends}\n\
             TIME\tinfo\taccess\tconnection complete\t{ends} bytes_sent=11 bytes_recv=22 \
             duration=\"12ms\" reason=\"complete\"\n"
        )
    );
}

#[tokio::test(start_paused = true)]
async fn a_failure_in_json_has_its_reason_and_its_error_last() {
    let accounts = Accounts::new(1);
    let ledger = accounts.book(0).open(opening(Direction::Inbound));
    ledger.learn(plaintext());
    ledger.received(11);
    ledger.sent(22);
    let lines = logged(Format::Json, "info", || {
        let refused = io::Error::other(Outer(io::Error::other("connection refused")));
        ledger.close(Reason::ConnectFailed, Some(&refused));
    });
    assert_eq!(
        lines,
        "{\"level\":\"info\",\"time\":\"TIME\",\"scope\":\"access\",\
         \"message\":\"connection complete\",\"src.addr\":\"10.0.0.1:40000\",\
         \"dst.addr\":\"10.0.1.2:15008\",\"dst.workload\":\"cart-pod\",\
         \"dst.namespace\":\"shop\",\"dst.cluster\":\"east\",\"direction\":\"inbound\",\
         \"bytes_sent\":22,\"bytes_recv\":11,\"duration\":\"0ms\",\"reason\":\"connect_failed\",\
         \"error\":\"connect to 10.0.1.2:8080: connection refused\"}\n"
    );
}

#[derive(Debug, thiserror::Error)]
#[error("connect to 10.0.1.2:8080")]
struct Outer(#[source] io::Error);

#[tokio::test(start_paused = true)]
async fn an_early_end_has_a_short_line_at_the_level_of_its_reason() {
    let accounts = Accounts::new(1);
    let book = accounts.book(0);
    let [one, other] = [(); 2].map(|()| book.open(opening(Direction::Inbound)));
    tokio::time::advance(Duration::from_millis(12)).await;
    let lines = logged(Format::Plain, "info", || {
        one.close(Reason::PolicyDenied, None);
        other.close(Reason::IdentityUnavailable, None);
    });
    let fields = "src.addr=10.0.0.1:40000 dst.addr=10.96.0.9:80 direction=\"inbound\" \
                  duration=\"12ms\"";
    assert_eq!(
        lines,
        format!(
            "TIME\tinfo\taccess\tconnection failed\t{fields} reason=\"policy_denied\" \
             error=\"policy_denied\"\n\
             TIME\twarn\taccess\tconnection failed\t{fields} reason=\"identity_unavailable\" \
             error=\"identity_unavailable\"\n"
        )
    );
}

#[test]
fn a_peer_cannot_forge_a_line_through_its_authority_or_an_error() {
    const EVIL: &str = "a:80\n2026-01-01\tinfo\taccess\tconnection complete\tsrc.addr=1.1.1.1:1";
    let accounts = Accounts::new(1);
    let ledger = accounts.book(0).open(opening(Direction::Inbound));
    ledger.learn(Learned {
        hbone_addr: Some(EVIL.to_owned()),
        ..learned()
    });
    let lines = logged(Format::Plain, "info", || {
        ledger.close(Reason::BadRequest, Some(&io::Error::other(EVIL)));
    });
    assert_eq!(lines.lines().count(), 1, "{lines}");
    assert_eq!(lines.matches('\t').count(), 4, "{lines}");
    assert!(
        lines.contains(&format!("dst.hbone_addr={EVIL:?}")),
        "{lines}"
    );
    assert!(lines.ends_with(&format!("error={EVIL:?}\n")), "{lines}");
}

#[test]
fn a_pod_without_a_name_is_shown_by_its_service_and_spans_carry_the_trace() {
    let accounts = Accounts::new(1);
    let ledger = accounts.book(0).open(opening(Direction::Inbound));
    let mut source = workload("web");
    source.name = "".into();
    let lines = logged(Format::Plain, "debug", || {
        let span = ledger.span();
        span.in_scope(|| tracing::debug!(target: "room", "inside"));
        ledger.learn(Learned {
            source: Some(Arc::new(source)),
            ..learned()
        });
    });
    let (inside, opened) = lines.split_once('\n').unwrap();
    assert_eq!(
        inside,
        "TIME\tdebug\troom:inbound{id=000000000000000000000000000000ab peer=10.0.0.1:40000}\tinside"
    );
    assert!(opened.contains("src.workload=\"web-app\""), "{opened}");
}

#[test]
fn what_a_connection_keeps_is_within_its_budget_in_bytes() {
    // With what the list of open connections shows, which outlives a look at the ledger.
    let kept = size_of::<Ledger>() + size_of::<ledger::Known>();
    assert!(kept <= 448, "{kept}");
}
