//! The walk out of a pod as the application and an HBONE server see it.

#![expect(
    clippy::large_futures,
    reason = "a test runs one of them and then ends"
)]

mod ways;

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use super::*;
use crate::control::World;
use crate::model::{Locality, Protocol};
use crate::testing::{CART, HboneServer, Pod, own_ip, service, worker, workload, world};

const VIP: &str = "10.96.0.1:80";

/// The pod's own workload, with everything that it tells of itself.
fn own(ip: IpAddr) -> Workload {
    Workload {
        cluster_id: "east".into(),
        workload_name: "bank".into(),
        workload_type: "deployment".into(),
        canonical_name: "teller".into(),
        canonical_revision: "v1".into(),
        locality: Locality {
            region: "eu".into(),
            zone: "eu-1".into(),
            subzone: "".into(),
        },
        ..workload("bank", ip)
    }
}

/// A mesh in which `cart` serves 10.96.0.1:80 on its port 8080.
fn mesh(cart: IpAddr, protocol: Protocol, port: u16) -> World {
    let mut endpoint = Workload {
        protocol,
        ..workload("cart", cart)
    };
    let key = "shop/cart.shop".parse().unwrap();
    endpoint.services.insert(key, [].into());
    world(
        vec![own(own_ip()), endpoint],
        vec![service("cart", "10.96.0.1", &[(80, port)])],
        vec![],
    )
}

async fn dial(pod: &Pod, to: &str) -> TcpStream {
    let (app, captured) = pod.captured(to.parse().unwrap(), 15001).await;
    let cx = Rc::clone(&pod.cx);
    tokio::task::spawn_local(async move { serve(Box::new(captured), &cx).await });
    app
}

async fn is_closed_without_a_byte(mut app: TcpStream) {
    let mut heard = Vec::new();
    drop(app.read_to_end(&mut heard).await);
    assert_eq!(heard, b"");
}

/// Behaviours 7, 9, 10, 11, 12, 22 and 34.
#[tokio::test]
async fn each_connect_says_where_to_whom_and_for_whom_and_nothing_else() {
    worker(async {
        let cart = own_ip();
        let pod = Pod::new(mesh(cart, Protocol::Hbone, 8080));
        pod.made.kept.set(true);
        let server = HboneServer::new(&pod.authority, CART, cart).await;
        let apps = [dial(&pod, VIP).await, dial(&pod, VIP).await];
        let mut tunnel = server.accept().await;
        let mut traces = Vec::new();
        let mut sources = Vec::new();
        for _ in 0..2 {
            let (request, _respond) = tunnel.accept().await.unwrap().unwrap();
            let parts = request.into_parts().0;
            assert_eq!(parts.method, Method::CONNECT);
            assert_eq!(parts.uri.to_string(), format!("{cart}:8080"));
            assert_eq!((parts.uri.scheme(), parts.uri.path()), (None, ""));
            let names: Vec<_> = parts.headers.keys().map(http::HeaderName::as_str).collect();
            assert_eq!(names, ["baggage", "forwarded", "traceparent"]);
            assert_eq!(
                parts.headers["baggage"],
                "k8s.cluster.name=east,k8s.namespace.name=shop,k8s.deployment.name=bank,\
                 service.name=teller,service.version=v1,cloud.region=eu,\
                 cloud.availability_zone=eu-1"
            );
            let text = |name: &str| parts.headers[name].to_str().unwrap().to_owned();
            sources.push(text("forwarded"));
            let trace = text("traceparent");
            assert!(trace.starts_with("00-") && trace.ends_with("-00") && trace.len() == 55);
            traces.push(trace);
        }
        assert_ne!(traces[0], traces[1]);
        let mut expected = apps.each_ref().map(|app| {
            let source = app.local_addr().unwrap();
            format!("for=\"{source}\";host=cart.shop")
        });
        expected.sort_unstable();
        sources.sort_unstable();
        assert_eq!(sources, expected);
        assert_eq!(pod.made.count(), 1, "one tunnel for both");
        let minutes = Duration::from_secs(180);
        assert_eq!(pod.made.options(), [(true, true, minutes, minutes, 9)]);
    })
    .await;
}

/// Behaviour 13.
#[tokio::test]
async fn no_byte_is_sent_before_the_answer_and_all_of_them_after_it() {
    worker(async {
        let cart = own_ip();
        let pod = Pod::new(mesh(cart, Protocol::Hbone, 8080));
        let server = HboneServer::new(&pod.authority, CART, cart).await;
        let mut app = dial(&pod, VIP).await;
        app.write_all(b"early, ").await.unwrap();
        let mut tunnel = server.accept().await;
        let (request, mut respond) = tunnel.accept().await.unwrap().unwrap();
        tokio::task::spawn_local(async move { while tunnel.accept().await.is_some() {} });
        let mut body = request.into_body();
        let early = timeout(Duration::from_millis(300), body.data()).await;
        assert!(early.is_err(), "{early:?}");
        let _send = respond.send_response(Response::new(()), false).unwrap();
        app.write_all(b"late").await.unwrap();
        app.shutdown().await.unwrap();
        let mut heard = Vec::new();
        while let Some(data) = body.data().await {
            heard.extend_from_slice(&data.unwrap());
        }
        assert_eq!(heard, b"early, late");
    })
    .await;
}

/// Behaviour 14.
#[tokio::test]
async fn a_refused_connect_ends_the_application_without_a_byte_and_without_another_try() {
    worker(async {
        let cart = own_ip();
        let pod = Pod::new(mesh(cart, Protocol::Hbone, 8080));
        let server = HboneServer::new(&pod.authority, CART, cart).await;
        let refused: Rc<std::cell::Cell<u64>> = Rc::default();
        let count = Rc::clone(&refused);
        tokio::task::spawn_local(async move {
            let mut tunnel = server.accept().await;
            for status in [401, 403, 404, 429, 500, 503] {
                let (_, mut respond) = tunnel.accept().await.unwrap().unwrap();
                let response = Response::builder().status(status).body(()).unwrap();
                respond.send_response(response, true).unwrap();
                count.set(count.get() + 1);
            }
            while tunnel.accept().await.is_some() {
                count.set(count.get() + 1);
            }
        });
        for number in 1..=6 {
            is_closed_without_a_byte(dial(&pod, VIP).await).await;
            assert_eq!(refused.get(), number);
            assert_eq!(
                pod.ended(Direction::Outbound, Reason::PeerRefused),
                number,
                "with its reason"
            );
        }
    })
    .await;
}

/// Behaviours 15 and 18.
#[tokio::test]
async fn a_server_that_is_somebody_else_refuses_the_application() {
    worker(async {
        for (trusted, identity) in [
            (true, "spiffe://cluster.local/ns/shop/sa/other"),
            (false, CART),
        ] {
            let cart = own_ip();
            let pod = Pod::new(mesh(cart, Protocol::Hbone, 8080));
            let stranger = identity::testing::Authority::new();
            let authority = if trusted { &*pod.authority } else { &stranger };
            let config = authority.credentials(&[identity]).server_config();
            let listener = TcpListener::bind((cart, 15008)).await.unwrap();
            let app = dial(&pod, VIP).await;
            let (tcp, _) = listener.accept().await.unwrap();
            let accepted = tokio_rustls::TlsAcceptor::from(config).accept(tcp).await;
            assert!(accepted.is_err(), "{identity}");
            is_closed_without_a_byte(app).await;
            assert_eq!(pod.ended(Direction::Outbound, Reason::TlsFailed), 1);
        }
    })
    .await;
}

/// Behaviours 37, 38 and 62.
#[tokio::test]
async fn what_leads_nowhere_or_back_to_us_is_closed_without_a_dial() {
    worker(async {
        let mut local = own(own_ip());
        local.ips.push("10.0.0.1".parse().unwrap());
        let empty = service("empty", "10.96.0.2", &[(80, 8080)]);
        let pod = Pod::new(world(vec![local], vec![empty], vec![]));
        for (to, reason, count) in [
            ("127.0.0.1:15001", Reason::SelfCall, 1),
            ("127.0.0.1:15006", Reason::SelfCall, 2),
            ("127.0.0.1:15008", Reason::SelfCall, 3),
            ("[::1]:15001", Reason::SelfCall, 4),
            ("0.0.0.0:15001", Reason::SelfCall, 5),
            ("10.0.0.1:15001", Reason::SelfCall, 6),
            ("10.96.0.2:80", Reason::NoEndpoint, 1),
            ("10.96.0.2:81", Reason::NoEndpoint, 2),
        ] {
            is_closed_without_a_byte(dial(&pod, to).await).await;
            assert_eq!(pod.ended(Direction::Outbound, reason), count, "{to}");
        }
        assert_eq!(pod.made.count(), 0);
    })
    .await;
}

/// Behaviour 63: the control plane is late, or too late.
#[tokio::test(start_paused = true)]
async fn a_pod_that_the_mesh_does_not_know_yet_waits_five_seconds() {
    worker(async {
        let cart = own_ip();
        let upstream = TcpListener::bind((cart, 0)).await.unwrap();
        let port = upstream.local_addr().unwrap().port();
        let pod = Pod::new(World::default());
        let start = Instant::now();
        is_closed_without_a_byte(dial(&pod, VIP).await).await;
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        assert_eq!(pod.ended(Direction::Outbound, Reason::UnknownWorkload), 1);

        let mut app = dial(&pod, VIP).await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        tokio::time::resume();
        pod.cx.view.replace(mesh(cart, Protocol::Tcp, port));
        let (mut socket, _) = upstream.accept().await.unwrap();
        socket.write_all(b"hello").await.unwrap();
        let mut heard = [0; 5];
        app.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
    })
    .await;
}

/// Behaviour 64.
#[tokio::test]
async fn a_slow_authority_delays_what_needs_a_certificate_and_nothing_else() {
    worker(async {
        let cart = own_ip();
        let outside = TcpListener::bind((own_ip(), 0)).await.unwrap();
        let at = outside.local_addr().unwrap();
        let endpoint = |name: &str, ip, protocol| {
            let key = format!("shop/{name}.shop").parse().unwrap();
            let mut endpoint = Workload {
                protocol,
                ..workload(name, ip)
            };
            endpoint.services.insert(key, [].into());
            endpoint
        };
        let pod = Pod::new(world(
            vec![
                own(own_ip()),
                endpoint("cart", cart, Protocol::Hbone),
                endpoint("old", at.ip(), Protocol::Tcp),
            ],
            vec![
                service("cart", "10.96.0.1", &[(80, 8080)]),
                service("old", "10.96.0.2", &[(80, at.port())]),
            ],
            vec![],
        ));
        let server = HboneServer::new(&pod.authority, CART, cart).await;
        pod.authority.busy.send_replace(true);
        let mut hbone = dial(&pod, VIP).await;
        let mut plain = dial(&pod, "10.96.0.2:80").await;
        let (mut far, _) = outside.accept().await.unwrap();
        plain.write_all(b"hello").await.unwrap();
        let mut heard = [0; 5];
        far.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");

        let waits = timeout(Duration::from_millis(50), hbone.read_u8()).await;
        assert!(waits.is_err(), "neither answered nor refused");
        pod.authority.busy.send_replace(false);
        let mut tunnel = server.accept().await;
        assert!(tunnel.accept().await.is_some());
    })
    .await;
}

/// Behaviours 148 and 149: a connection that is open works through a graceful drain.
#[tokio::test]
async fn an_open_connection_works_through_a_graceful_drain_and_ends_with_a_forced_one() {
    worker(async {
        let cart = own_ip();
        let pod = Pod::new(mesh(cart, Protocol::Hbone, 8080));
        let server = HboneServer::new(&pod.authority, CART, cart).await;
        let mut app = dial(&pod, VIP).await;
        let mut tunnel = server.accept().await;
        let (_request, mut respond) = tunnel.accept().await.unwrap().unwrap();
        tokio::task::spawn_local(async move { while tunnel.accept().await.is_some() {} });
        let mut send = respond.send_response(Response::new(()), false).unwrap();
        pod.drain.graceful();
        send.send_data(Bytes::from_static(b"late"), false).unwrap();
        let mut heard = [0; 4];
        app.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"late");
        pod.drain.force(Reason::Drained);
        assert!(app.read(&mut heard).await.is_err(), "a reset");
        assert_eq!(pod.ended(Direction::Outbound, Reason::Drained), 1);
    })
    .await;
}

/// DESIGN: resets stay resets, also before there is anything to reset at the other end.
#[tokio::test]
async fn an_application_that_gives_up_early_takes_its_connect_back() {
    worker(async {
        let cart = own_ip();
        let pod = Pod::new(mesh(cart, Protocol::Hbone, 8080));
        let server = HboneServer::new(&pod.authority, CART, cart).await;
        let app = dial(&pod, VIP).await;
        let mut tunnel = server.accept().await;
        let (_request, mut respond) = tunnel.accept().await.unwrap().unwrap();
        app.set_zero_linger().unwrap();
        drop(app);
        let reset = tokio::select! {
            reset = std::future::poll_fn(|cx| respond.poll_reset(cx)) => reset.unwrap(),
            _ = tunnel.accept() => panic!("the tunnel stays, without another request"),
        };
        assert_eq!(reset, h2::Reason::CANCEL);
        assert_eq!(pod.ended(Direction::Outbound, Reason::Reset), 1);
    })
    .await;
}

/// The same where there is no tunnel: the dial is dropped.
#[tokio::test]
async fn an_application_that_gives_up_early_ends_a_plain_connect() {
    worker(async {
        let cart = own_ip();
        let pod = Pod::new(mesh(cart, Protocol::Tcp, 8080));
        // A listener whose queue is full answers no SYN.
        let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let listener = listener.unwrap();
        let at = std::net::SocketAddr::new(cart, 8080);
        listener.bind(&at.into()).unwrap();
        listener.listen(0).unwrap();
        let _first = TcpStream::connect(at).await.unwrap();
        let app = dial(&pod, VIP).await;
        while pod.made.count() == 0 {
            tokio::task::yield_now().await;
        }
        app.set_zero_linger().unwrap();
        drop(app);
        while pod.ended(Direction::Outbound, Reason::Reset) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// What a connection holds while it is open, besides its sockets and its record.
#[tokio::test]
async fn a_connection_is_small() {
    worker(async {
        let pod = Pod::new(world(vec![own(own_ip())], vec![], vec![]));
        let (_app, captured) = pod.captured(VIP.parse().unwrap(), 15001).await;
        let bytes = size_of_val(&serve(Box::new(captured), &pod.cx));
        assert!(bytes <= 448, "{bytes} bytes");
    })
    .await;
}
