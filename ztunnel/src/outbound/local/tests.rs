//! The way between two pods of one node as both applications and a scrape see it.

#![expect(
    clippy::large_futures,
    reason = "a test runs one of them and then ends"
)]

use std::net::IpAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::control::World;
use crate::model::{
    Action, AppProtocol, ApplicationTunnel, Clause, Match, Policy, Protocol, Rule, Scope,
    StringMatch,
};
use crate::testing::{CART, HboneServer, Pod, own_ip, service, worker, workload, world};

/// Serves at an address and port of its own.
async fn application(ip: IpAddr) -> (TcpListener, u16) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn deny_bank() -> Policy {
    let bank = Match {
        principals: vec![StringMatch::Exact("cluster.local/ns/shop/sa/bank".into())],
        ..Match::default()
    };
    Policy {
        key: "shop/no-bank".parse().unwrap(),
        scope: Scope::Global,
        action: Action::Deny,
        dry_run: false,
        rules: vec![Rule {
            clauses: vec![Clause {
                matches: vec![bank],
            }],
        }],
    }
}

/// A mesh in which `cart` at `ip` serves 10.96.0.1:80 on `port`.
fn mesh(ip: IpAddr, port: u16, change: impl FnOnce(&mut Workload), policies: Vec<Policy>) -> World {
    let mut cart = Workload {
        protocol: Protocol::Hbone,
        ..workload("cart", ip)
    };
    let key = "shop/cart.shop".parse().unwrap();
    cart.services.insert(key, [].into());
    change(&mut cart);
    world(
        vec![workload("bank", own_ip()), cart],
        vec![service("cart", "10.96.0.1", &[(80, port)])],
        policies,
    )
}

/// Dials the service: the addresses of the applications are loopback here, which nobody captures.
async fn dial(pod: &Pod) -> TcpStream {
    let (app, captured) = pod.captured("10.96.0.1:80".parse().unwrap(), 15001).await;
    let cx = Rc::clone(&pod.cx);
    tokio::task::spawn_local(async move { super::super::serve(Box::new(captured), &cx).await });
    app
}

/// Waits for the end of both records.
async fn ended(pod: &Pod, outbound: Reason, inbound: Reason) {
    for (direction, reason) in [
        (Direction::Outbound, outbound),
        (Direction::Inbound, inbound),
    ] {
        while pod.ended(direction, reason) == 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn bytes_and_ends_pass_without_a_tunnel_and_both_sides_are_counted() {
    worker(async {
        let ip = own_ip();
        let (listener, port) = application(ip).await;
        let pod = Pod::new(mesh(ip, port, |_| {}, vec![]));
        let near = pod.neighbour("cart");
        for _ in 0..2 {
            let mut app = dial(&pod).await;
            app.write_all(b"to you").await.unwrap();
            let (mut served, _) = listener.accept().await.unwrap();
            let mut heard = [0; 6];
            served.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"to you");
            app.shutdown().await.unwrap();
            assert_eq!(served.read(&mut heard).await.unwrap(), 0, "a half-close");
            served.write_all(b"and back").await.unwrap();
            drop(served);
            let mut back = Vec::new();
            app.read_to_end(&mut back).await.unwrap();
            assert_eq!(back, b"and back");
        }
        while pod.ended(Direction::Outbound, Reason::Complete) < 2 {
            tokio::task::yield_now().await;
        }
        for direction in [Direction::Outbound, Direction::Inbound] {
            assert_eq!(pod.ended(direction, Reason::Complete), 2);
            assert_eq!(pod.routed(direction, "node_local"), 2);
            assert_eq!(pod.routed(direction, "hbone"), 0);
        }
        assert_eq!((pod.made.count(), near.made.count()), (0, 2), "dials");
        assert!(pod.cx.live.is_empty(), "both permits are given back");
    })
    .await;
}

#[tokio::test]
async fn a_policy_refuses_before_the_application_sees_anybody_and_later_ends_what_is_open() {
    worker(async {
        let ip = own_ip();
        let (listener, port) = application(ip).await;
        let pod = Pod::new(mesh(ip, port, |_| {}, vec![deny_bank()]));
        let near = pod.neighbour("cart");
        let mut app = dial(&pod).await;
        let end = app.read(&mut [0]).await.unwrap_err();
        assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
        ended(&pod, Reason::PeerRefused, Reason::PolicyDenied).await;
        assert_eq!(near.made.count(), 0, "the application was not dialled");

        pod.cx.view.replace(mesh(ip, port, |_| {}, vec![]));
        let mut app = dial(&pod).await;
        app.write_all(b"x").await.unwrap();
        let (mut served, _) = listener.accept().await.unwrap();
        served.read_exact(&mut [0]).await.unwrap();
        pod.cx
            .view
            .replace(mesh(ip, port, |_| {}, vec![deny_bank()]));
        let now = pod.cx.view.world();
        let live = &pod.cx.live;
        live.judge_again(&now.policies, |uid| now.snapshot.workload(uid).cloned());
        for end in [app.read(&mut [0]).await, served.read(&mut [0]).await] {
            let end = end.unwrap_err().kind();
            assert_eq!(end, std::io::ErrorKind::ConnectionReset);
        }
        ended(&pod, Reason::Reset, Reason::PolicyRevoked).await;
    })
    .await;
}

#[tokio::test]
async fn either_pod_that_leaves_ends_the_connection_as_a_reset() {
    worker(async {
        for (leaving, outbound, inbound) in [
            ("bank", Reason::PodRemoved, Reason::Reset),
            ("cart", Reason::Reset, Reason::PodRemoved),
        ] {
            let ip = own_ip();
            let (listener, port) = application(ip).await;
            let pod = Pod::new(mesh(ip, port, |_| {}, vec![]));
            let near = pod.neighbour("cart");
            let mut app = dial(&pod).await;
            let (mut served, _) = listener.accept().await.unwrap();
            app.write_all(b"x").await.unwrap();
            served.read_exact(&mut [0]).await.unwrap();
            let drain = if leaving == "bank" {
                &pod.drain
            } else {
                &near.drain
            };
            drain.force(Reason::PodRemoved);
            for end in [app.read(&mut [0]).await, served.read(&mut [0]).await] {
                let end = end.unwrap_err().kind();
                assert_eq!(end, std::io::ErrorKind::ConnectionReset, "{leaving}");
            }
            ended(&pod, outbound, inbound).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_application_that_is_not_there_resets_the_client() {
    worker(async {
        let ip = own_ip();
        let (listener, port) = application(ip).await;
        drop(listener);
        let pod = Pod::new(mesh(ip, port, |_| {}, vec![]));
        let _near = pod.neighbour("cart");
        let mut app = dial(&pod).await;
        assert!(app.read(&mut [0]).await.is_err());
        ended(&pod, Reason::PeerRefused, Reason::ConnectFailed).await;
    })
    .await;
}

/// What HBONE would refuse, or do otherwise, is HBONE's.
#[tokio::test]
async fn hbone_carries_what_is_not_a_plain_workload_of_this_node() {
    worker(async {
        type Change = fn(&mut Workload);
        let cases: [(&str, bool, Change); 5] = [
            ("the setting is off", false, |_| {}),
            ("a pod of another cluster with the same name", true, |w| {
                w.uid = crate::model::WorkloadUid("another/cart".into());
            }),
            ("another service account", true, |w| {
                w.identity = Some(identity::testing::id("other"));
            }),
            ("an application tunnel", true, |w| {
                w.application_tunnel = Some(ApplicationTunnel {
                    protocol: AppProtocol::None,
                    port: None,
                });
            }),
            ("it speaks HBONE itself", true, |w| w.native_tunnel = true),
        ];
        for (name, on, change) in cases {
            let ip = own_ip();
            let mut world = mesh(ip, 8080, change, vec![]);
            if name.contains("another cluster") {
                // The pod of this node, elsewhere.
                let mut own = workload("cart", own_ip());
                own.protocol = Protocol::Hbone;
                let mut all = vec![workload("bank", own_ip()), own];
                let mut other = workload("cart", ip);
                other.protocol = Protocol::Hbone;
                other
                    .services
                    .insert("shop/cart.shop".parse().unwrap(), [].into());
                change(&mut other);
                all.push(other);
                let service = service("cart", "10.96.0.1", &[(80, 8080)]);
                world = crate::testing::world(all, vec![service], vec![]);
            }
            let pod = Pod::with(world, |settings| settings.local_fast_path = on);
            let near = pod.neighbour("cart");
            let as_other = CART.replace("cart", "other");
            let identity = if name.contains("account") {
                &as_other
            } else {
                CART
            };
            let server = HboneServer::new(&pod.authority, identity, ip).await;
            let _app = dial(&pod).await;
            drop(server.accept().await);
            assert_eq!(near.made.count(), 0, "{name}");
        }
    })
    .await;
}

/// What a connection holds while it is open, besides its sockets and its two records.
#[tokio::test]
async fn a_connection_is_small() {
    worker(async {
        let ip = own_ip();
        let pod = Pod::new(mesh(ip, 8080, |_| {}, vec![]));
        let _near = pod.neighbour("cart");
        let ledger = pod.cx.book.open(Opening {
            direction: Direction::Outbound,
            source: ClientAddr::new(SocketAddr::new(own_ip(), 40_000)),
            destination: OrigDst::new(SocketAddr::new(ip, 8080)),
            trace_id: 1,
        });
        let source = pod.cx.workload().await.unwrap();
        let world = pod.cx.view.world();
        let query = resolve::Query {
            source: &source,
            from: own_ip(),
            destination: OrigDst::new(SocketAddr::new(ip, 8080)),
            avoid: &[],
            dice: 0,
        };
        let resolve::Found::Route(route) = resolve::route(&world.snapshot, &query).unwrap() else {
            panic!("it has an address");
        };
        let way = Way {
            cx: &pod.cx,
            ledger: &ledger,
            source: Arc::clone(&source),
            route,
        };
        let near = way.neighbour().unwrap();
        let (stream, _) = crate::testing::pair().await;
        let client = ClientAddr::new(SocketAddr::new(own_ip(), 40_000));
        let trace = Traceparent::new(1, 1);
        let serving = serve(way, near, Unserved::new(stream), client, trace);
        let bytes = size_of_val(&serving);
        assert!(bytes <= 3072, "{bytes} bytes");
    })
    .await;
}
