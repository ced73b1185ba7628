//! The pure rooms by themselves: resolve in a mesh of 100,000 workloads and replace one of them, authorise by 1,000 policies, the CONNECT and its
//! headers, and one connection's record with its access line.
#![expect(
    clippy::expect_used,
    reason = "a bench whose mesh is wrong must not go on"
)]

mod mesh;

use std::{hint::black_box, io, net::SocketAddr, sync::Arc};

use criterion::{Criterion, criterion_group, criterion_main};
use ztunnel::{
    account::{Accounts, Learned, Opening},
    authz::{self, Policies},
    model::{
        ClientAddr, Direction, Flow, OrigDst, Reason, SecurityPolicy, SpiffeId, UpstreamAddr,
        Workload,
    },
    resolve::{self, Change, Query, Snapshot},
    wire::{Authority, Baggage, Connect, ConnectRequest, Traceparent},
};

fn resolve_in_a_large_mesh(criterion: &mut Criterion) {
    let workloads = mesh::workloads(WORKLOADS);
    let source = Arc::clone(workloads.first().expect("there are workloads"));
    let services = mesh::example(1).services;
    let snapshot = Snapshot::new("".into(), workloads, services);
    for (name, destination) in [
        ("workload", SocketAddr::new(mesh::ip(WORKLOADS / 2), 8080)),
        ("service", SocketAddr::from(([10, 96, 0, 1], 80))),
        ("stranger", SocketAddr::from(([192, 0, 2, 1], 443))),
    ] {
        let query = Query {
            source: &source,
            from: mesh::ip(0),
            destination: OrigDst::new(destination),
            avoid: &[],
            dice: 7,
        };
        criterion.bench_function(&format!("resolve/100k/{name}"), |bencher| {
            bencher.iter(|| resolve::route(black_box(&snapshot), black_box(&query)));
        });
    }
}

/// What one message of the control plane costs that changes one workload.
fn replace_one_of_a_large_mesh(criterion: &mut Criterion) {
    let workloads = mesh::workloads(WORKLOADS);
    let before = workloads.last().expect("there are workloads");
    let changed = Arc::new(Workload {
        node: "elsewhere".into(),
        ..Workload::clone(before)
    });
    let snapshot = Snapshot::new("".into(), workloads, mesh::example(1).services);
    criterion.bench_function("update/100k/one", |bencher| {
        bencher.iter(|| black_box(&snapshot).apply([Change::Workload(Arc::clone(&changed))]));
    });
}

fn authorise_by_many_policies(criterion: &mut Criterion) {
    let destination = mesh::workloads(1);
    let destination = destination.first().expect("there is a workload");
    let policies = Policies::new(mesh::policies(POLICIES));
    for (name, account) in [
        ("first", "client-0".to_owned()),
        ("last", format!("client-{}", POLICIES - 1)),
        ("refused", "stranger".to_owned()),
    ] {
        let flow = Flow {
            source: client(),
            source_identity: Some(identity(&account)),
            destination: OrigDst::new(SocketAddr::new(mesh::ip(0), 8080)),
        };
        criterion.bench_function(&format!("authorise/1k/{name}"), |bencher| {
            bencher.iter(|| authz::check(black_box(&policies), destination, black_box(&flow)));
        });
    }
}

fn speak_of_a_connection(criterion: &mut Criterion) {
    let workloads = mesh::workloads(1);
    let workload = workloads.first().expect("there is a workload");
    let authority = Authority::ip(SocketAddr::new(mesh::ip(0), 8080));
    criterion.bench_function("connect/baggage", |bencher| {
        bencher.iter(|| Baggage::of(black_box(workload)).encode());
    });
    let baggage = Baggage::of(workload).encode();
    let connect = Connect {
        authority: &authority,
        baggage: &baggage,
        source: client(),
        host: None,
        traceparent: Traceparent::new(1, 1),
        network: None,
    };
    criterion.bench_function("connect/encode", |bencher| {
        bencher.iter(|| black_box(&connect).encode());
    });
    let request = connect.encode().expect("the request can be sent");
    let (parts, ()) = request.into_parts();
    criterion.bench_function("connect/decode", |bencher| {
        bencher.iter(|| ConnectRequest::decode(black_box(&parts)));
    });
}

/// With a subscriber that makes a line of it and throws that away; the product hands it to a thread instead.
fn record_a_connection(criterion: &mut Criterion) {
    let workloads = mesh::workloads(2);
    let book = Accounts::new(1).book(0);
    let opening = Opening {
        direction: Direction::Outbound,
        source: client(),
        destination: OrigDst::new(SocketAddr::new(mesh::ip(1), 8080)),
        trace_id: 1,
    };
    let learned = Learned {
        source: workloads.first().cloned(),
        source_identity: Some(identity("web")),
        destination: workloads.last().cloned(),
        destination_identity: Some(identity("web")),
        service: None,
        dst_addr: UpstreamAddr::new(SocketAddr::new(mesh::ip(1), 15008)),
        hbone_addr: Some("10.0.0.2:8080".to_owned()),
        security: SecurityPolicy::MutualTls,
    };
    let record = || {
        let ledger = book.open(opening);
        ledger.learn(learned.clone());
        ledger.close(Reason::Complete, None);
    };
    criterion.bench_function("account/no-line", |bencher| bencher.iter(record));
    let subscriber = tracing_subscriber::fmt().with_writer(io::sink).finish();
    tracing::subscriber::with_default(subscriber, || {
        criterion.bench_function("account/access-line", |bencher| bencher.iter(record));
    });
}

fn client() -> ClientAddr {
    ClientAddr::new(SocketAddr::from(([10, 1, 2, 3], 40_000)))
}

fn identity(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
        .parse()
        .expect("it is a SPIFFE ID")
}

const WORKLOADS: u32 = 100_000;
const POLICIES: u32 = 1_000;

criterion_group!(
    rooms,
    resolve_in_a_large_mesh,
    replace_one_of_a_large_mesh,
    authorise_by_many_policies,
    speak_of_a_connection,
    record_a_connection
);
criterion_main!(rooms);
