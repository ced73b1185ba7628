//! SOCKS5 as the application sees it.

#![expect(
    clippy::large_futures,
    reason = "a test runs one of them and then ends"
)]

use std::net::Ipv6Addr;
use std::rc::Rc;

use tokio::net::TcpListener;
use tokio::time::Instant;

use super::*;
use crate::control::World;
use crate::model::{Protocol, Service};
use crate::testing::{Pod, own_ip, service, worker, workload, world};

/// The pod `bank` and the service `cart` with these addresses.
fn mesh(vips: &[&str]) -> World {
    with_cart(vips, own_ip(), 8080)
}

/// The same, where `cart` is served in plain TCP.
fn with_cart(vips: &[&str], ip: IpAddr, port: u16) -> World {
    let vip = |vip: &&str| format!("/{vip}").parse().unwrap();
    let cart = Service {
        vips: vips.iter().map(vip).collect(),
        ..service("cart", "10.96.0.1", &[(80, port)])
    };
    let mut endpoint = Workload {
        protocol: Protocol::Tcp,
        ..workload("cart", ip)
    };
    endpoint
        .services
        .insert("shop/cart.shop".parse().unwrap(), [].into());
    let bank = workload("bank", own_ip());
    world(vec![bank, endpoint], vec![cart], vec![])
}

async fn dial(pod: &Pod) -> TcpStream {
    let (app, captured) = pod
        .captured("127.0.0.1:15080".parse().unwrap(), 15080)
        .await;
    let cx = Rc::clone(&pod.cx);
    tokio::task::spawn_local(async move { serve(captured, &cx).await });
    app
}

/// What comes until the end, which may be a reset.
async fn rest(mut app: TcpStream) -> Vec<u8> {
    let mut heard = Vec::new();
    drop(app.read_to_end(&mut heard).await);
    heard
}

fn connect(to: SocketAddr) -> Vec<u8> {
    let (kind, octets) = match to.ip() {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (4, ip.octets().to_vec()),
    };
    [&[5, 1, 0, kind], &octets[..], &to.port().to_be_bytes()].concat()
}

fn connect_by_name(name: &str, port: u16) -> Vec<u8> {
    let length = u8::try_from(name.len()).unwrap();
    [&[5, 1, 0, 3, length], name.as_bytes(), &port.to_be_bytes()].concat()
}

/// Behaviour 140: also where everything comes in one piece, or each byte by itself.
#[tokio::test]
async fn what_follows_the_request_is_the_applications_own() {
    worker(async {
        let cart = TcpListener::bind((own_ip(), 0)).await.unwrap();
        let at = cart.local_addr().unwrap();
        let requests = [
            connect("10.96.0.1:80".parse().unwrap()),
            connect("[fd00::9]:80".parse().unwrap()),
            connect("[::ffff:10.96.0.1]:80".parse().unwrap()),
            connect_by_name("10.96.0.1", 80),
            connect_by_name("cart.shop", 80),
        ];
        for request in requests {
            let said = [&[5, 2, 9, 0], &request[..], b"early"].concat();
            for piece in [said.len(), 1] {
                let pod = Pod::new(with_cart(&["10.96.0.1", "fd00::9"], at.ip(), at.port()));
                let mut app = dial(&pod).await;
                app.set_nodelay(true).unwrap();
                for bytes in said.chunks(piece) {
                    app.write_all(bytes).await.unwrap();
                    tokio::task::yield_now().await;
                }
                let mut answer = [0; 12];
                app.read_exact(&mut answer).await.unwrap();
                assert_eq!(answer, [5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
                let (mut far, _) = cart.accept().await.unwrap();
                let mut heard = [0; 5];
                far.read_exact(&mut heard).await.unwrap();
                assert_eq!(&heard, b"early");
                far.write_all(b"answer").await.unwrap();
                drop(far);
                app.shutdown().await.unwrap();
                assert_eq!(rest(app).await, b"answer");
                assert_eq!(pod.ended(Direction::Outbound, Reason::Complete), 1);
            }
        }
    })
    .await;
}

/// Behaviour 142.
#[tokio::test(start_paused = true)]
async fn whoever_stops_in_the_middle_is_left_after_fifteen_seconds() {
    worker(async {
        let whole = [&[5, 1, 0], &connect_by_name("cart.shop", 80)[..]].concat();
        for length in 0..whole.len() {
            let pod = Pod::new(mesh(&[]));
            let start = Instant::now();
            let mut app = dial(&pod).await;
            app.write_all(&whole[..length]).await.unwrap();
            let heard = rest(app).await;
            assert!(heard.is_empty() || heard == [5, 0], "{length}: {heard:?}");
            assert_eq!(start.elapsed(), PATIENCE, "{length}");
            assert_eq!(pod.ended(Direction::Outbound, Reason::BadRequest), 1);
        }
    })
    .await;
}

#[tokio::test]
async fn whoever_ends_in_the_middle_is_recorded_at_once() {
    worker(async {
        let whole = [&[5, 1, 0], &connect_by_name("cart.shop", 80)[..]].concat();
        for length in 0..whole.len() {
            let pod = Pod::new(mesh(&[]));
            let mut app = dial(&pod).await;
            app.write_all(&whole[..length]).await.unwrap();
            app.shutdown().await.unwrap();
            rest(app).await;
            assert_eq!(pod.ended(Direction::Outbound, Reason::BadRequest), 1);
        }
    })
    .await;
}

/// From its first moment, so that its line tells how long it took, and nothing ends without one.
#[tokio::test]
async fn a_connection_is_recorded_from_its_beginning_and_once() {
    worker(async {
        let cart = TcpListener::bind((own_ip(), 0)).await.unwrap();
        let at = cart.local_addr().unwrap();
        let pod = Pod::new(with_cart(&["10.96.0.1"], at.ip(), at.port()));
        let mut app = dial(&pod).await;
        while pod.open(Direction::Outbound) == 0 {
            tokio::task::yield_now().await;
        }
        let to = connect("10.96.0.1:80".parse().unwrap());
        app.write_all(&[&[5, 1, 0], &to[..]].concat())
            .await
            .unwrap();
        let (far, _) = cart.accept().await.unwrap();
        assert_eq!(pod.open(Direction::Outbound), 1, "still the same one");
        drop((app, far));
        while pod.open(Direction::Outbound) > 0 {
            tokio::task::yield_now().await;
        }

        // Cut while it has not said what it wants: that is an ending too.
        let app = dial(&pod).await;
        while pod.open(Direction::Outbound) == 0 {
            tokio::task::yield_now().await;
        }
        pod.drain.force(Reason::Drained);
        rest(app).await;
        assert_eq!(pod.ended(Direction::Outbound, Reason::Drained), 1);
        assert_eq!(pod.open(Direction::Outbound), 0);
    })
    .await;
}

/// Behaviours 62 and 142.
#[tokio::test]
async fn what_is_not_done_is_answered_with_its_code() {
    worker(async {
        let refused = |code: u8| vec![5, code, 0, 1, 0, 0, 0, 0, 0, 0];
        let welcomed = |code: u8| [vec![5, 0], refused(code)].concat();
        let ask = |request: Vec<u8>| [vec![5, 1, 0], request].concat();
        let of = |command: u8| ask(vec![5, command, 0, 1, 10, 0, 0, 1, 0, 80]);
        let own = |port: u16| ask(connect(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port)));
        let bad = Reason::BadRequest;
        for (said, answer, reason) in [
            (of(2), welcomed(7), bad),
            (of(3), welcomed(7), bad),
            (vec![4, 1, 0, 80, 10, 0, 0, 1, 0], refused(7), bad),
            (vec![5, 1, 2], refused(7), bad),
            (ask(vec![5, 1, 0, 9]), welcomed(7), bad),
            // Longer than a label may be, so that no resolver is asked.
            (
                ask(connect_by_name(&"x".repeat(100), 80)),
                welcomed(4),
                Reason::NoEndpoint,
            ),
            // Told that it may go, as a captured connection is, and then reset.
            (own(15001), welcomed(0), Reason::SelfCall),
            (own(15080), welcomed(0), Reason::SelfCall),
        ] {
            let pod = Pod::new(mesh(&[]));
            let mut app = dial(&pod).await;
            app.write_all(&said).await.unwrap();
            let mut heard = vec![0; answer.len()];
            app.read_exact(&mut heard).await.unwrap();
            assert_eq!(heard, answer, "{said:?}");
            assert_eq!(rest(app).await, b"");
            assert_eq!(pod.ended(Direction::Outbound, reason), 1, "{said:?}");
            assert_eq!(pod.made.count(), 0, "nobody is dialled");
        }
        // A pod that the mesh does not know.
        let pod = Pod::new(World::default());
        let mut app = dial(&pod).await;
        let said = ask(connect_by_name("cart.shop", 80));
        app.write_all(&said).await.unwrap();
        let mut welcome = [0; 2];
        app.read_exact(&mut welcome).await.unwrap();
        // What was said has come: a clock that runs ahead overtakes no packet.
        tokio::time::pause();
        let heard = [&welcome[..], &rest(app).await].concat();
        assert_eq!(heard, welcomed(1));
        assert_eq!(pod.ended(Direction::Outbound, Reason::UnknownWorkload), 1);
    })
    .await;
}

/// Behaviour 141.
#[tokio::test]
async fn a_name_is_the_pods_view_of_the_mesh_and_else_the_nodes_resolvers() {
    worker(async {
        for (name, vips, found) in [
            ("cart.shop", &["fd00::9", "10.96.0.9"][..], "10.96.0.9"),
            ("cart.shop", &["fd00::9"], "fd00::9"),
            ("Cart.SHOP.", &["10.96.0.9"], "10.96.0.9"),
            ("localhost", &["10.96.0.9"], "127.0.0.1"),
        ] {
            let pod = Pod::new(mesh(vips));
            let local = pod.cx.workload().await.unwrap();
            let address = find(&name.into(), &local, &pod.cx).await.unwrap();
            assert_eq!(address, found.parse::<IpAddr>().unwrap(), "{name}");
        }
    })
    .await;
}

#[test]
fn an_address_of_the_pods_own_family_is_preferred() {
    let both = ["10.96.0.9", "fd00::9"].map(|ip| ip.parse().unwrap());
    let local = |ip: &str| workload("cart", ip.parse().unwrap());
    for (own, found) in [("10.50.0.1", "10.96.0.9"), ("fd00::1", "fd00::9")] {
        assert_eq!(preferred(&both, &local(own)), Some(found.parse().unwrap()));
    }
    assert_eq!(preferred(&both[..1], &local("fd00::1")), Some(both[0]));
    assert_eq!(preferred(&[], &local("fd00::1")), None);
}
