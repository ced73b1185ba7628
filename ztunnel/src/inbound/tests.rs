//! The walk into a pod as an HBONE client and the application see it.

#![expect(
    clippy::large_futures,
    reason = "a test runs one of them and then ends"
)]

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::*;
use crate::model::{
    Action, AppProtocol, ApplicationTunnel, Clause, GatewayAddress, GatewayDestination, Match,
    NetworkAddr, Policy, Rule, Scope, StringMatch,
};
use crate::testing::{BANK, CART, Client, Pod, connect, own_ip, service, worker, workload, world};

/// How long something is watched that must not happen.
const WATCH: Duration = Duration::from_millis(200);

/// A pod with an application behind port `app.port()`.
async fn bank(policies: Vec<Policy>) -> (Pod, TcpListener, SocketAddr) {
    let ip = own_ip();
    let app = TcpListener::bind((ip, 0)).await.unwrap();
    let at = app.local_addr().unwrap();
    let pod = Pod::new(world(vec![workload("bank", ip)], vec![], policies));
    (pod, app, at)
}

fn policy(action: Action, matches: Match) -> Policy {
    Policy {
        key: "shop/p".parse().unwrap(),
        scope: Scope::Global,
        action,
        dry_run: false,
        rules: vec![Rule {
            clauses: vec![Clause {
                matches: vec![matches],
            }],
        }],
    }
}

fn everybody() -> Match {
    Match {
        not_source_ips: vec!["192.0.2.0/24".parse().unwrap()],
        ..Match::default()
    }
}

/// Nobody has connected to the application.
async fn nobody_at(app: &TcpListener) {
    assert!(timeout(WATCH, app.accept()).await.is_err());
}

/// A stream that carries bytes both ways, with its application's end.
async fn echoes(client: &Client, app: &TcpListener, request: Request<()>) {
    let (response, mut send) = client.ask(request).await;
    assert_eq!(response.status(), 200);
    let (mut socket, _) = app.accept().await.unwrap();
    send.send_data(Bytes::from_static(b"question"), true)
        .unwrap();
    let mut heard = Vec::new();
    socket.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"question");
    socket.write_all(b"answer").await.unwrap();
    drop(socket);
    let mut body = response.into_body();
    let mut answer = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        answer.extend_from_slice(&data);
    }
    assert_eq!(answer, b"answer");
}

/// Behaviours 85 and 158.
#[tokio::test]
async fn the_answer_comes_when_the_application_is_connected_and_describes_the_pod() {
    worker(async {
        let ip = own_ip();
        let app = TcpListener::bind((ip, 0)).await.unwrap();
        let at = app.local_addr().unwrap().to_string();
        let described = Workload {
            cluster_id: "east".into(),
            canonical_name: "bank".into(),
            ..workload("bank", ip)
        };
        let mesh = world(vec![described], vec![], vec![]);
        let pod = Pod::new(mesh.clone());
        pod.made.kept.set(true);
        let client = pod.tunnel(CART, ip).await;
        let (response, send) = client.ask(connect(&at)).await;
        assert_eq!(response.status(), 200);
        let connected = timeout(Duration::ZERO, app.accept()).await;
        assert!(connected.is_ok(), "it was there before the answer");
        assert!(!response.body().is_end_stream());
        assert_eq!(
            response.headers()["baggage"],
            "k8s.cluster.name=east,k8s.namespace.name=shop,service.name=bank"
        );
        assert_eq!(response.headers().len(), 1);
        let minutes = Duration::from_secs(180);
        let usual = (true, true, minutes, minutes, 9);
        assert_eq!(pod.made.options(), [usual], "the application's");
        drop((response, send));

        let keepalive = tunnel::TcpKeepalive {
            time: Duration::from_secs(7),
            interval: Duration::from_secs(3),
            retries: 5,
            user_timeout: false,
        };
        let pod = Pod::with(mesh, |settings| {
            settings.response_baggage = false;
            settings.keepalive = Some(keepalive);
        });
        pod.made.kept.set(true);
        let client = pod.tunnel(CART, ip).await;
        let (response, _send) = client.ask(connect(&at)).await;
        assert_eq!(response.status(), 200);
        assert!(response.headers().is_empty());
        let own = (
            true,
            true,
            Duration::from_secs(7),
            Duration::from_secs(3),
            5,
        );
        assert_eq!(pod.made.options(), [own]);
    })
    .await;
}

/// Behaviours 76, 77, 78, 81, 82 and 83.
#[tokio::test]
async fn what_the_pod_does_not_serve_is_refused_with_its_status_before_any_dial() {
    worker(async {
        let ip = own_ip();
        let app = TcpListener::bind((ip, 0)).await.unwrap();
        let port = app.local_addr().unwrap().port();
        let mut local = workload("bank", ip);
        let key = "shop/bank.shop".parse().unwrap();
        local.services.insert(key, [(81, port)].into());
        let served = service("bank", "10.96.0.1", &[(80, port), (81, 0), (82, 0)]);
        let pod = Pod::new(world(vec![local], vec![served], vec![]));
        let client = pod.tunnel(CART, ip).await;
        let post = Request::post(format!("https://{ip}:{port}/")).body(());
        let (response, _send) = client.ask(post.unwrap()).await;
        assert_eq!(response.status(), 400, "POST");
        for (authority, status) in [
            (ip.to_string(), 400),
            (format!("127.0.0.1:{port}"), 400),
            (format!("10.96.0.1:{port}"), 400),
            (format!("{ip}:15001"), 503),
            (format!("{ip}:15006"), 503),
            (format!("{ip}:15008"), 503),
            ("nobody.shop:80".to_owned(), 503),
            ("bank.shop:79".to_owned(), 503),
            ("bank.shop:82".to_owned(), 503),
        ] {
            assert_eq!(client.status(&authority).await, status, "{authority}");
        }
        assert_eq!(pod.made.count(), 0, "nothing was dialled");
        nobody_at(&app).await;
        for authority in ["bank.shop:80", "bank.shop:81"] {
            echoes(&client, &app, connect(authority)).await;
        }
        drop(app);
        assert_eq!(client.status(&format!("{ip}:{port}")).await, 503);
        assert_eq!(pod.ended(Direction::Inbound, Reason::ConnectFailed), 1);
    })
    .await;
}

/// Behaviours 84, 98, 99 and 100.
#[tokio::test]
async fn a_refusal_by_policy_is_401_and_the_application_sees_nobody() {
    let cart_only = || Match {
        principals: vec![StringMatch::Exact("cluster.local/ns/shop/sa/cart".into())],
        ..Match::default()
    };
    for (action, cart, other) in [(Action::Allow, 200, 401), (Action::Deny, 401, 200)] {
        worker(async {
            let (pod, app, at) = bank(vec![policy(action, cart_only())]).await;
            for (identity, status) in [(CART, cart), (BANK, other)] {
                let client = pod.tunnel(identity, at.ip()).await;
                let (response, _send) = client.ask(connect(&at.to_string())).await;
                assert_eq!(response.status(), status, "{action:?} {identity}");
                if status == 401 {
                    assert!(response.body().is_end_stream() && response.headers().is_empty());
                    nobody_at(&app).await;
                } else {
                    app.accept().await.unwrap();
                }
            }
            assert_eq!(pod.ended(Direction::Inbound, Reason::PolicyDenied), 1);
        })
        .await;
    }
}

/// Behaviours 108 and 109.
#[tokio::test]
async fn policy_compares_the_target_port_and_the_address_that_the_tunnel_comes_from() {
    let from = |net: &str| Match {
        source_ips: vec![net.parse().unwrap()],
        ..Match::default()
    };
    for (matches, status) in [
        (from("127.0.0.0/8"), 200),
        (from("10.0.0.0/8"), 401),
        (
            Match {
                destination_ports: vec![80],
                ..Match::default()
            },
            401,
        ),
    ] {
        worker(async {
            let (pod, _app, at) = bank(vec![policy(Action::Allow, matches)]).await;
            let client = pod.tunnel(CART, at.ip()).await;
            // What a waypoint says of whom it speaks for.
            let request = Request::connect(at.to_string())
                .header("forwarded", "for=\"10.1.2.3:80\";host=bank.shop")
                .body(())
                .unwrap();
            assert_eq!(client.ask(request).await.0.status(), status);
            assert!(client.address.ip().is_loopback());
        })
        .await;
    }
    worker(async {
        let ip = own_ip();
        let app = TcpListener::bind((ip, 0)).await.unwrap();
        let target = app.local_addr().unwrap().port();
        let mut local = workload("bank", ip);
        let key = "shop/bank.shop".parse().unwrap();
        local.services.insert(key, [].into());
        let port = Match {
            destination_ports: vec![target],
            ..Match::default()
        };
        let pod = Pod::new(world(
            vec![local],
            vec![service("bank", "10.96.0.1", &[(80, target)])],
            vec![policy(Action::Allow, port)],
        ));
        let client = pod.tunnel(CART, ip).await;
        assert_eq!(client.status("bank.shop:80").await, 200);
    })
    .await;
}

/// Behaviour 91.
#[tokio::test]
async fn a_malformed_traceparent_disturbs_neither_its_own_stream_nor_the_others() {
    worker(async {
        let (pod, app, at) = bank(vec![]).await;
        let client = pod.tunnel(CART, at.ip()).await;
        let (first, mut send) = client.ask(connect(&at.to_string())).await;
        let (mut socket, _) = app.accept().await.unwrap();
        for line in [
            &b"0000000000000000000000000000000000000000000000000000000"[..],
            b"-------------------------------------------------------",
            b"",
            b"00",
            b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            b"00-0af7651916cd43dd8448eb211c80319\xc3\xa4-b7ad6b716920333-01",
            &[0xff; 55],
            &[b'a'; 4000],
        ] {
            let request = Request::connect(at.to_string())
                .header("traceparent", HeaderValue::from_bytes(line).unwrap())
                .body(())
                .unwrap();
            echoes(&client, &app, request).await;
        }
        send.send_data(Bytes::from_static(b"still"), false).unwrap();
        let mut heard = [0; 5];
        socket.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"still");
        drop(first);
    })
    .await;
}

/// Behaviour 117: the policy changes when the connection has been judged, but not answered.
#[tokio::test]
async fn a_connection_does_not_survive_a_change_between_its_judgement_and_its_answer() {
    worker(async {
        let (pod, app, at) = bank(vec![]).await;
        let (cx, ip) = (Rc::clone(&pod.cx), at.ip());
        let change = move || {
            let denying = vec![policy(Action::Deny, everybody())];
            cx.view
                .replace(world(vec![workload("bank", ip)], vec![], denying));
            let now = cx.view.world();
            let current = |uid: &_| now.snapshot.workload(uid).cloned();
            assert_eq!(cx.live.judge_again(&now.policies, current), 1);
        };
        *pod.made.before_app.borrow_mut() = Some(Box::new(change));
        let client = pod.tunnel(CART, ip).await;
        let mut sender = client.sender.clone().ready().await.unwrap();
        let request = connect(&at.to_string());
        let (response, mut send) = sender.send_request(request, false).unwrap();
        send.send_data(Bytes::from_static(b"secret"), false)
            .unwrap();
        // The peer may hear the 200 before the reset; what it sends reaches nobody.
        let ended = match response.await {
            Ok(response) => response.into_body().data().await.is_none_or(|d| d.is_err()),
            Err(_) => true,
        };
        assert!(ended);
        let (mut socket, _) = app.accept().await.unwrap();
        let mut heard = Vec::new();
        drop(socket.read_to_end(&mut heard).await);
        assert_eq!(heard, b"");
        assert_eq!(pod.ended(Direction::Inbound, Reason::PolicyRevoked), 1);
        assert_eq!(client.status(&at.to_string()).await, 401, "from now on");
    })
    .await;
}

/// Behaviours 148 and 149, of one pod.
#[tokio::test]
async fn a_stream_works_through_a_graceful_drain_and_ends_with_a_forced_one() {
    worker(async {
        let (pod, app, at) = bank(vec![]).await;
        let client = pod.tunnel(CART, at.ip()).await;
        let (response, mut send) = client.ask(connect(&at.to_string())).await;
        let (mut socket, _) = app.accept().await.unwrap();
        pod.drain.graceful();
        send.send_data(Bytes::from_static(b"late"), false).unwrap();
        let mut heard = [0; 4];
        socket.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"late");
        pod.drain.force(Reason::Drained);
        assert!(socket.read(&mut heard).await.is_err(), "a reset");
        assert!(response.into_body().data().await.unwrap().is_err());
        assert_eq!(pod.ended(Direction::Inbound, Reason::Drained), 1);
    })
    .await;
}

/// What a request holds while it is open, besides its stream, its socket and its record.
#[test]
fn a_request_is_small() {
    fn bytes<F>(
        _walk: impl FnOnce(Box<tunnel::Request>, &'static Peer, &'static Context) -> F,
    ) -> usize {
        size_of::<F>()
    }
    let bytes = bytes(request_to_end);
    assert!(bytes <= 576, "{bytes} bytes");
}

/// Behaviours 80, 82, 88 and 89.
#[tokio::test]
async fn an_application_that_proxies_is_told_first_where_a_connection_comes_from() {
    worker(async {
        for (loopback, family) in [(true, "127.0.0.1"), (false, "")] {
            let ip = own_ip();
            let at = if loopback {
                family.parse().unwrap()
            } else {
                ip
            };
            let app = TcpListener::bind((at, 0)).await.unwrap();
            let port = app.local_addr().unwrap().port();
            let mut bank = workload("bank", ip);
            bank.application_tunnel = Some(ApplicationTunnel {
                protocol: AppProtocol::Proxy,
                port: Some(port),
            });
            let pod = Pod::with(world(vec![bank], vec![], vec![]), |settings| {
                settings.localhost_app_tunnel = loopback;
            });
            let client = pod.tunnel(CART, ip).await;
            let (response, mut send) = client.ask(connect("10.96.0.4:80")).await;
            assert_eq!(response.status(), 200);
            send.send_data(Bytes::from_static(b"payload"), true)
                .unwrap();
            let (mut socket, _) = app.accept().await.unwrap();
            let mut heard = Vec::new();
            socket.read_to_end(&mut heard).await.unwrap();
            let identity = CART.parse().unwrap();
            let header = ProxyHeader {
                source: client.address,
                destination: "10.96.0.4:80".parse().unwrap(),
                identity: Some(&identity),
            };
            assert_eq!(
                heard,
                [header.encode().unwrap(), b"payload".to_vec()].concat()
            );
            assert_eq!(client.status("10.96.0.4:15006").await, 503);
        }
    })
    .await;
}

/// Policy is judged on the port that the application is reached on.
#[tokio::test]
async fn an_application_tunnel_is_judged_by_the_port_that_it_leads_to() {
    worker(async {
        let ip = own_ip();
        let app = TcpListener::bind((ip, 0)).await.unwrap();
        let port = app.local_addr().unwrap().port();
        let mut bank = workload("bank", ip);
        bank.application_tunnel = Some(ApplicationTunnel {
            protocol: AppProtocol::None,
            port: Some(port),
        });
        let on = |port| Match {
            destination_ports: vec![port],
            ..Match::default()
        };
        for (denied, status) in [(80, 200), (port, 401)] {
            let policies = vec![policy(Action::Deny, on(denied))];
            let pod = Pod::new(world(vec![bank.clone()], vec![], policies));
            let client = pod.tunnel(CART, ip).await;
            assert_eq!(client.status("10.96.0.4:80").await, status);
        }
    })
    .await;
}

/// Behaviour 79.
#[tokio::test]
async fn a_waypoint_takes_what_was_meant_for_the_service_behind_it() {
    worker(async {
        let (pod, app, at) = bank(vec![]).await;
        let port = at.port();
        let mut cart = service("cart", "10.96.0.1", &[(80, 8080)]);
        cart.waypoint = Some(GatewayAddress {
            destination: GatewayDestination::Address(NetworkAddr::new("".into(), at.ip())),
            hbone_mtls_port: 15008,
        });
        let other = service("other", "10.96.0.2", &[(80, 8080)]);
        let workloads = vec![workload("bank", at.ip())];
        pod.cx
            .view
            .replace(world(workloads, vec![cart, other], vec![]));
        let client = pod.tunnel(CART, at.ip()).await;
        echoes(&client, &app, connect(&format!("10.96.0.1:{port}"))).await;
        assert_eq!(client.status(&format!("10.96.0.2:{port}")).await, 400);
        assert_eq!(pod.ended(Direction::Inbound, Reason::BadDestination), 1);
    })
    .await;
}
