//! Ways with something between: waypoints, gateways, names, and the next endpoint when one is dead.

use std::cell::Cell;

use h2::{RecvStream, SendStream};

use super::*;
use crate::model::{GatewayAddress, LoadBalancerMode};

const ENTRY: &str = "spiffe://cluster.local/ns/shop/sa/entry";

fn gateway(destination: &str, port: u16) -> GatewayAddress {
    GatewayAddress {
        destination: crate::model::GatewayDestination::Address(destination.parse().unwrap()),
        hbone_mtls_port: port,
    }
}

fn serving(name: &str, ip: IpAddr) -> Workload {
    let mut endpoint = workload(name, ip);
    let key = "shop/cart.shop".parse().unwrap();
    endpoint.services.insert(key, [].into());
    endpoint
}

/// A mesh in which `cart` is on network `far`, which is entered at `entry`.
fn far_mesh(entry: IpAddr) -> World {
    let mut cart = serving("cart", "10.9.9.9".parse().unwrap());
    cart.network = "far".into();
    cart.network_gateway = Some(gateway(&format!("far/{entry}"), 15008));
    let mut gate = workload("entry", entry);
    gate.network = "far".into();
    let mut service = service("cart", "10.96.0.1", &[(80, 8080)]);
    service.subject_alt_names = vec![CART.into()];
    world(vec![own(own_ip()), cart, gate], vec![service], vec![])
}

/// Copies between a stream and a socket until both directions have ended.
async fn pump(mut body: RecvStream, mut send: SendStream<Bytes>, tcp: TcpStream) {
    let (mut read, mut write) = tcp.into_split();
    let there = async {
        while let Some(Ok(data)) = body.data().await {
            body.flow_control().release_capacity(data.len()).unwrap();
            if write.write_all(&data).await.is_err() {
                return;
            }
        }
        drop(write.shutdown().await);
    };
    let back = async {
        let mut buffer = [0; 4096];
        while let Ok(bytes) = read.read(&mut buffer).await {
            let data = Bytes::copy_from_slice(&buffer[..bytes]);
            if send.send_data(data, bytes == 0).is_err() || bytes == 0 {
                return;
            }
        }
    };
    tokio::join!(there, back);
}

/// A gateway that passes each CONNECT on to `to`; gives authority and headers of each, and how
/// many tunnels there were.
fn passes_on(server: HboneServer, to: IpAddr) -> (Rc<Cell<u32>>, Asked) {
    let (tunnels, asked) = (Rc::<Cell<u32>>::default(), Asked::default());
    let (count, list) = (Rc::clone(&tunnels), Rc::clone(&asked));
    tokio::task::spawn_local(async move {
        loop {
            let mut tunnel = server.accept().await;
            count.set(count.get() + 1);
            let list = Rc::clone(&list);
            tokio::task::spawn_local(async move {
                while let Some(Ok((request, mut respond))) = tunnel.accept().await {
                    let (parts, body) = request.into_parts();
                    list.borrow_mut().push(parts);
                    let send = respond.send_response(Response::new(()), false).unwrap();
                    let tcp = TcpStream::connect((to, 15008)).await.unwrap();
                    tokio::task::spawn_local(pump(body, send, tcp));
                }
            });
        }
    });
    (tunnels, asked)
}

type Asked = Rc<std::cell::RefCell<Vec<http::request::Parts>>>;

/// Answers every CONNECT of every tunnel and sends back what it hears.
fn echoes(server: HboneServer) -> (Rc<Cell<u32>>, Asked) {
    let (tunnels, asked) = (Rc::<Cell<u32>>::default(), Asked::default());
    let (count, list) = (Rc::clone(&tunnels), Rc::clone(&asked));
    tokio::task::spawn_local(async move {
        loop {
            let mut tunnel = server.accept().await;
            count.set(count.get() + 1);
            let list = Rc::clone(&list);
            tokio::task::spawn_local(async move {
                while let Some(Ok((request, mut respond))) = tunnel.accept().await {
                    let (parts, mut body) = request.into_parts();
                    list.borrow_mut().push(parts);
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    tokio::task::spawn_local(async move {
                        while let Some(Ok(data)) = body.data().await {
                            body.flow_control().release_capacity(data.len()).unwrap();
                            send.send_data(data, false).unwrap();
                        }
                        send.send_data(Bytes::new(), true).unwrap();
                    });
                }
            });
        }
    });
    (tunnels, asked)
}

async fn is_echoed(mut app: TcpStream, text: &[u8]) {
    let (mut read, mut write) = app.split();
    let said = async {
        write.write_all(text).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut heard = Vec::new();
    let (_, read) = tokio::join!(said, read.read_to_end(&mut heard));
    read.unwrap();
    assert_eq!(heard.len(), text.len());
    assert!(heard == text, "the same bytes");
}

/// Behaviours 66, 67 and 68.
#[tokio::test]
async fn another_network_is_reached_in_a_tunnel_inside_a_tunnel() {
    worker(async {
        let (entry, far) = (own_ip(), own_ip());
        let pod = Pod::new(far_mesh(entry));
        let gate = HboneServer::new(&pod.authority, ENTRY, entry).await;
        let cart = HboneServer::new(&pod.authority, CART, far).await;
        let (outer, outer_asked) = passes_on(gate, far);
        let (inner, inner_asked) = echoes(cart);
        let large: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        is_echoed(dial(&pod, VIP).await, b"small").await;
        is_echoed(dial(&pod, VIP).await, &large).await;
        assert_eq!((outer.get(), inner.get()), (1, 2), "tunnels");
        let (outer_asked, inner_asked) = (outer_asked.borrow(), inner_asked.borrow());
        for (outer, inner) in outer_asked.iter().zip(inner_asked.iter()) {
            assert_eq!(outer.uri.to_string(), "cart.shop:80");
            assert_eq!(inner.uri.to_string(), "cart.shop:80");
            assert_eq!(outer.headers.get("x-forwarded-network"), None);
            assert_eq!(inner.headers["x-forwarded-network"], "");
            for header in ["baggage", "forwarded", "traceparent"] {
                assert_eq!(outer.headers[header], inner.headers[header], "{header}");
            }
        }
        assert_eq!((outer_asked.len(), inner_asked.len()), (2, 2));
        assert_eq!(pod.ended(Direction::Outbound, Reason::Complete), 2);
    })
    .await;
}

/// Behaviour 67: either end of the two tunnels is somebody else.
#[tokio::test]
async fn both_ends_of_double_hbone_must_be_who_the_mesh_says() {
    worker(async {
        let other = "spiffe://cluster.local/ns/shop/sa/other";
        for (gate_is, cart_is, inner) in [(other, CART, 0), (ENTRY, other, 0), (ENTRY, CART, 1)] {
            let (entry, far) = (own_ip(), own_ip());
            let pod = Pod::new(far_mesh(entry));
            let gate = HboneServer::new(&pod.authority, gate_is, entry).await;
            let cart = pod.authority.credentials(&[cart_is]).server_config();
            let listener = TcpListener::bind((far, 15008)).await.unwrap();
            let acceptor = tokio_rustls::TlsAcceptor::from(cart);
            let accepted = Rc::<Cell<u32>>::default();
            let count = Rc::clone(&accepted);
            tokio::task::spawn_local(async move {
                let (tcp, _) = listener.accept().await.unwrap();
                if let Ok(tls) = acceptor.accept(tcp).await {
                    let mut tunnel = h2::server::handshake(tls).await.unwrap();
                    while let Some(Ok((_, mut respond))) = tunnel.accept().await {
                        count.set(count.get() + 1);
                        let refused = Response::builder().status(503).body(()).unwrap();
                        respond.send_response(refused, true).unwrap();
                    }
                }
            });
            if gate_is == ENTRY {
                passes_on(gate, far);
            } else {
                tokio::task::spawn_local(async move { gate.fails().await });
            }
            is_closed_without_a_byte(dial(&pod, VIP).await).await;
            let reason = match inner {
                0 => Reason::TlsFailed,
                _ => Reason::PeerRefused,
            };
            assert_eq!(
                pod.ended(Direction::Outbound, reason),
                1,
                "{gate_is} {cart_is}"
            );
            assert_eq!(accepted.get(), inner, "CONNECTs that got through");
        }
    })
    .await;
}

/// Behaviour 41, on the wire.
#[tokio::test]
async fn a_waypoint_is_asked_for_what_was_dialled() {
    worker(async {
        let front = own_ip();
        let mut cart = service("cart", "10.96.0.1", &[(80, 8080)]);
        cart.waypoint = Some(gateway(&format!("/{front}"), 15008));
        let workloads = vec![
            own(own_ip()),
            serving("cart", own_ip()),
            workload("front", front),
        ];
        let pod = Pod::new(world(workloads, vec![cart], vec![]));
        let identity = "spiffe://cluster.local/ns/shop/sa/front";
        let server = HboneServer::new(&pod.authority, identity, front).await;
        let (_, asked) = echoes(server);
        is_echoed(dial(&pod, VIP).await, b"hello").await;
        let asked = asked.borrow();
        assert_eq!(asked[0].uri.to_string(), VIP);
        let forwarded = asked[0].headers["forwarded"].to_str().unwrap();
        assert!(forwarded.ends_with(";host=cart.shop"), "{forwarded}");
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_left_for_another_and_the_last_one_is_heard() {
    worker(async {
        for protocol in [Protocol::Hbone, Protocol::Tcp] {
            let (alive, dead) = (own_ip(), [own_ip(), own_ip(), own_ip()]);
            let end = |name: &str, ip| Workload {
                protocol,
                ..serving(name, ip)
            };
            let ends = [end("cart", alive), end("d1", dead[0]), end("d2", dead[1])];
            let pod_of = |ends: &[Workload]| {
                let all = [vec![own(own_ip())], ends.to_vec()].concat();
                let cart = service("cart", "10.96.0.1", &[(80, 8080)]);
                Pod::new(world(all, vec![cart], vec![]))
            };
            let pod = pod_of(&ends);
            let _plain = match protocol {
                Protocol::Hbone => {
                    echoes(HboneServer::new(&pod.authority, CART, alive).await);
                    None
                }
                Protocol::Tcp => {
                    let listener = TcpListener::bind((alive, 8080)).await.unwrap();
                    Some(tokio::task::spawn_local(async move {
                        while let Ok((mut tcp, _)) = listener.accept().await {
                            let (mut read, mut write) = tcp.split();
                            tokio::io::copy(&mut read, &mut write).await.unwrap();
                        }
                    }))
                }
            };
            for _ in 0..12 {
                is_echoed(dial(&pod, VIP).await, b"found").await;
            }
            let dialled = pod.made.count();
            assert!((2..=36).contains(&dialled), "{protocol:?}: {dialled}");
            // Two more are tried after the first, and no more.
            let mut dead = [end("d1", dead[0]), end("d2", dead[1]), end("d3", dead[2])].to_vec();
            dead.push(end("d4", own_ip()));
            for (ends, tries) in [(&dead[..1], 1), (&dead[..2], 2), (&dead[..4], 3)] {
                let pod = pod_of(ends);
                is_closed_without_a_byte(dial(&pod, VIP).await).await;
                assert_eq!(pod.ended(Direction::Outbound, Reason::ConnectFailed), 1);
                assert_eq!(pod.made.count(), tries, "{protocol:?}");
            }
        }
    })
    .await;
}

/// Behaviour 14: what was heard is not asked of another.
#[tokio::test]
async fn an_endpoint_that_answers_with_a_refusal_is_the_only_one_that_is_asked() {
    worker(async {
        let ips = [own_ip(), own_ip()];
        let ends = ips.map(|ip| serving("cart", ip));
        let [mut one, mut two] = ends;
        (one.uid.0, two.uid.0) = ("one".into(), "two".into());
        let cart = service("cart", "10.96.0.1", &[(80, 8080)]);
        let pod = Pod::new(world(vec![own(own_ip()), one, two], vec![cart], vec![]));
        let asked = Rc::<Cell<u64>>::default();
        for ip in ips {
            let server = HboneServer::new(&pod.authority, CART, ip).await;
            let asked = Rc::clone(&asked);
            tokio::task::spawn_local(async move {
                let mut tunnel = server.accept().await;
                while let Some(Ok((_, mut respond))) = tunnel.accept().await {
                    asked.set(asked.get() + 1);
                    let refused = Response::builder().status(503).body(()).unwrap();
                    respond.send_response(refused, true).unwrap();
                }
            });
        }
        for number in 1..=6 {
            is_closed_without_a_byte(dial(&pod, VIP).await).await;
            assert_eq!(asked.get(), number);
        }
        assert_eq!(pod.ended(Direction::Outbound, Reason::PeerRefused), 6);
    })
    .await;
}

/// Behaviour 47: also when all of its endpoints are dead.
#[tokio::test]
async fn a_dead_waypoint_is_not_gone_past() {
    worker(async {
        let (front, cart) = (own_ip(), own_ip());
        let mut service = service("cart", "10.96.0.1", &[(80, 8080)]);
        service.waypoint = Some(gateway(&format!("/{front}"), 15008));
        service.load_balancer.mode = LoadBalancerMode::Passthrough;
        let workloads = vec![
            own(own_ip()),
            serving("cart", cart),
            workload("front", front),
        ];
        let pod = Pod::new(world(workloads, vec![service], vec![]));
        let listener = TcpListener::bind((cart, 15008)).await.unwrap();
        is_closed_without_a_byte(dial(&pod, VIP).await).await;
        assert_eq!(pod.ended(Direction::Outbound, Reason::ConnectFailed), 1);
        let nobody = timeout(Duration::from_millis(100), listener.accept()).await;
        assert!(nobody.is_err(), "the endpoint hears nothing");
    })
    .await;
}

/// Behaviour 61, with the resolver of this machine.
#[tokio::test]
async fn a_workload_with_only_a_host_name_is_looked_up_and_dialled() {
    worker(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let named = |hostname: &str| Workload {
            ips: vec![],
            hostname: hostname.into(),
            protocol: Protocol::Tcp,
            ..serving("db", own_ip())
        };
        let pod_of = |named| {
            let cart = service("cart", "10.96.0.1", &[(80, port)]);
            Pod::new(world(vec![own(own_ip()), named], vec![cart], vec![]))
        };
        let pod = pod_of(named("localhost"));
        let mut app = dial(&pod, VIP).await;
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.write_all(b"found").await.unwrap();
        drop(socket);
        app.shutdown().await.unwrap();
        let mut heard = Vec::new();
        app.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"found");

        // Longer than any name, so that no resolver is asked.
        let pod = pod_of(named(&"x".repeat(300)));
        is_closed_without_a_byte(dial(&pod, VIP).await).await;
        assert_eq!(pod.ended(Direction::Outbound, Reason::NoEndpoint), 1);
    })
    .await;
}
