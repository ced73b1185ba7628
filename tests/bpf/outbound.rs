//! What a pod's own connections meet: captured, exempt, waiting or refused, and counted.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
};

use socket2::{Domain, Protocol, Socket, Type};
use ztunnel::capture::{Capture, PodSettings};

use crate::world::{
    Enrolled, PATIENCE, PEER4, PEER6, POD4, POD6, PORT, Sniffer, WATCH, World, accept, address, at,
    idle, ip, said, settings, spawn_in,
};

#[test]
fn a_captured_connection_keeps_all_its_addresses() {
    let world = World::new();
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let mapped = format!("::ffff:{PEER4}");
    for destination in [PEER4, PEER6, "198.51.100.7", "2001:db8::7", mapped.as_str()] {
        let destination = at(destination, PORT);
        let client = world.pod_connects(destination);
        let ours = accept(&enrolled.listeners.outbound);
        let client = client.join().unwrap().unwrap();
        assert_eq!(
            client.peer_addr().unwrap(),
            destination,
            "as the application sees it"
        );
        let original = canonical(ours.local_addr().unwrap());
        assert_eq!(original, canonical(destination), "the original destination");
        let source = canonical(ours.peer_addr().unwrap());
        assert_eq!(
            source,
            canonical(client.local_addr().unwrap()),
            "the source"
        );
    }
    assert_eq!(server.served(), 0);
    assert_eq!(enrolled.connects("captured"), 5);
    assert!(enrolled.lookups("outbound") >= 5);
}

#[test]
fn a_pod_that_is_not_enrolled_goes_out_directly() {
    let world = World::new();
    let server = world.peer_server();
    let capture = world.start();
    let direct = world.pod_connects(at(PEER4, PORT)).join().unwrap().unwrap();
    assert_eq!(said(direct), format!("peer {POD4}"));
    assert_eq!(server.served(), 1);
    assert!(
        capture
            .counters()
            .unwrap()
            .iter()
            .all(|count| count.total == 0)
    );
}

#[test]
fn loopback_and_own_addresses_stay_in_the_pod() {
    let world = World::new();
    let _app = world.pod_server();
    let enrolled = world.enrolled(&settings());
    for destination in ["127.0.0.1", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"] {
        let stream = world
            .pod_connects(at(destination, PORT))
            .join()
            .unwrap()
            .unwrap();
        assert!(said(stream).starts_with("app "), "{destination}");
    }
    assert_eq!(enrolled.connects("loopback"), 5);
    for own in [POD4, POD6] {
        let stream = world.pod_connects(at(own, PORT)).join().unwrap().unwrap();
        assert_eq!(said(stream), format!("app {own}"));
    }
    assert_eq!(enrolled.connects("own_address"), 2);
    assert_eq!(enrolled.connects("captured"), 0);
    assert!(enrolled.lookups("inside_pod") >= 7);
    assert!(idle(&enrolled.listeners.outbound));
}

#[test]
fn our_own_sockets_go_out_directly() {
    let world = World::new();
    let _server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let dialer = enrolled.pod.dialer(&settings());
    for (destination, source) in [(PEER4, POD4), (PEER6, POD6)] {
        let socket = dialer.upstream_socket(address(destination)).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket
            .connect_timeout(&at(destination, PORT).into(), PATIENCE)
            .unwrap();
        assert_eq!(said(socket.into()), format!("peer {source}"));
    }
    assert_eq!(enrolled.connects("own_socket"), 2);
    assert_eq!(enrolled.connects("captured"), 0);
}

#[test]
fn excluded_ports_and_networks_go_out_directly_until_they_are_no_longer_excluded() {
    let world = World::new();
    let server = world.peer_server();
    let by_port = PodSettings {
        excluded_outbound_ports: vec![1, PORT],
        ..settings()
    };
    let enrolled = world.enrolled(&by_port);
    let dial = |to: &str| said(world.pod_connects(at(to, PORT)).join().unwrap().unwrap());
    assert_eq!(dial(PEER4), format!("peer {POD4}"));
    assert_eq!(dial(PEER6), format!("peer {POD6}"));
    assert_eq!(enrolled.connects("excluded_port"), 2);

    let by_cidr = PodSettings {
        excluded_outbound_cidrs: vec![
            "10.99.0.0/24".parse().unwrap(),
            "fd99::/64".parse().unwrap(),
        ],
        ..settings()
    };
    enrolled.pod.update(&by_cidr).unwrap();
    assert_eq!(dial(PEER4), format!("peer {POD4}"));
    assert_eq!(dial(PEER6), format!("peer {POD6}"));
    assert_eq!(dial(&format!("::ffff:{PEER4}")), format!("peer {POD4}"));
    assert_eq!(enrolled.connects("excluded_cidr"), 3);
    assert_eq!(enrolled.connects("captured"), 0);
    let outside = world.pod_connects(at("10.98.0.1", PORT));
    accept(&enrolled.listeners.outbound);
    drop(outside.join().unwrap().unwrap());

    enrolled.pod.update(&settings()).unwrap();
    let direct = server.served();
    for destination in [PEER4, PEER6] {
        let client = world.pod_connects(at(destination, PORT));
        accept(&enrolled.listeners.outbound);
        drop(client.join().unwrap().unwrap());
    }
    assert_eq!(server.served(), direct);
}

#[test]
fn marks_devices_and_bound_addresses_of_the_application_do_not_escape() {
    let world = World::new();
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let attempts: [fn(&Socket); 3] = [
        |socket| socket.set_mark(0x539).unwrap(),
        |socket| socket.bind_device(Some(b"eth0")).unwrap(),
        |socket| socket.bind(&at(POD4, 0).into()).unwrap(),
    ];
    for prepare in attempts {
        let client = spawn_in(&world.pod(), move || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            prepare(&socket);
            socket
                .connect_timeout(&at(PEER4, PORT).into(), PATIENCE)
                .map(|()| socket)
        });
        accept(&enrolled.listeners.outbound);
        drop(client.join().unwrap().unwrap());
    }
    assert_eq!(enrolled.connects("captured"), 3);
    assert_eq!(server.served(), 0);
}

#[test]
fn the_mark_of_our_own_dials_takes_nothing_out_of_the_pod() {
    let world = World::new();
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let mut sniffer = Sniffer::on_peer(&world);
    let outcome = world.in_pod(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_mark(0x53a).unwrap();
        socket.connect_timeout(&at(PEER4, PORT).into(), WATCH)
    });
    // Bound to `lo`, the mark's route leads nowhere for a socket without an address (6.18).
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    assert_eq!(enrolled.connects("captured"), 1);
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
    assert_eq!(server.served(), 0);
}

#[test]
fn a_device_that_takes_the_name_of_lo_takes_nothing_out_of_the_pod() {
    let world = World::new();
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let pod = world.pod();
    for command in [
        "link set lo down",
        "link set lo name real",
        "link set eth0 down",
        "link set eth0 name lo",
        "link set real up",
        "link set lo up",
    ] {
        ip(&format!("-n {pod} {command}"));
    }
    let client = world.pod_connects(at(PEER4, PORT));
    accept(&enrolled.listeners.outbound);
    drop(client.join().unwrap().unwrap());
    assert_eq!(server.served(), 0);
}

#[test]
fn every_way_to_open_a_tcp_connection_is_captured() {
    let world = World::new();
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let destination = at(PEER4, PORT);
    let ways: [fn(SocketAddr) -> std::io::Result<Socket>; 4] = [
        |to| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP))?;
            socket.connect(&to.into()).map(|()| socket)
        },
        |to| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.send_to_with_flags(b"fast open", &to.into(), libc::MSG_FASTOPEN)?;
            Ok(socket)
        },
        |to| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
            let pending = socket.connect(&to.into()).unwrap_err();
            assert_eq!(pending.raw_os_error(), Some(libc::EINPROGRESS));
            Ok(socket)
        },
        // A socket that failed to connect, and so is bound already.
        |to| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
            socket.connect(&at(POD6, 1).into()).unwrap_err();
            socket.connect(&at(&format!("::ffff:{PEER4}"), to.port()).into())?;
            Ok(socket)
        },
    ];
    for (way, connect) in ways.into_iter().enumerate() {
        let client = spawn_in(&world.pod(), move || connect(destination));
        let ours = accept(&enrolled.listeners.outbound);
        assert_eq!(
            canonical(ours.local_addr().unwrap()),
            destination,
            "way {way}"
        );
        drop(client.join().unwrap().unwrap());
    }
    assert_eq!(server.served(), 0);
}

#[test]
fn a_pod_without_ipv6_is_captured() {
    let world = World::new();
    ip(&format!("-n {} -6 addr flush dev eth0", world.pod()));
    world.in_pod(|| {
        for device in ["all", "default", "lo"] {
            let sysctl = format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6");
            std::fs::write(sysctl, "1").unwrap();
        }
    });
    let before = world.configuration();
    let enrolled = world.enrolled(&settings());
    let client = world.pod_connects(at(PEER4, PORT));
    accept(&enrolled.listeners.outbound);
    drop(client.join().unwrap().unwrap());
    enrolled.capture.release(enrolled.pod.cookie()).unwrap();
    assert_eq!(
        ip(&format!("-n {} -6 rule", world.pod())).lines().count(),
        2,
        "{before}"
    );
}

#[test]
fn a_socket_that_cannot_be_bound_to_lo_is_refused_and_counted() {
    let world = World::new();
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    // Without CAP_NET_RAW the kernel does not bind a bound socket again, not even for us.
    let child = Command::new("nsenter")
        .arg(format!("--net={}", world.pod_path().display()))
        .args(["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "outbound::child_bound_to_eth0_is_refused",
        ])
        .output()
        .unwrap();
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stdout)
    );
    assert_eq!(enrolled.connects("bind_failed"), 1);
    assert_eq!(server.served(), 0);
}

#[test]
#[ignore = "runs as a child of the test above, inside the pod and without CAP_NET_RAW"]
fn child_bound_to_eth0_is_refused() {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind_device(Some(b"eth0")).unwrap();
    let refused = socket.connect(&at(PEER4, PORT).into()).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    // A socket that we have bound ourselves may connect again.
    let again = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    again.connect(&at("127.0.0.1", 1).into()).unwrap_err();
    again.connect(&at(POD4, 1).into()).unwrap_err();
}

#[test]
fn without_a_listener_connections_wait_and_nothing_leaves() {
    let world = World::new();
    let server = world.peer_server();
    let mut sniffer = Sniffer::on_peer(&world);
    world
        .pod_connects(at(PEER4, CANARY))
        .join()
        .unwrap()
        .unwrap_err();
    world
        .pod_connects(at(PEER6, CANARY))
        .join()
        .unwrap()
        .unwrap_err();
    assert!(sniffer.tcp(CANARY).len() >= 4, "the sniffer works");

    let Enrolled {
        capture,
        pod,
        listeners,
    } = world.enrolled(&settings());
    // An application that listens everywhere must not get it either.
    let app = world.pod_server();
    drop((pod, listeners));
    let (done, outcome) = mpsc::channel();
    for destination in [PEER4, PEER6] {
        let done = done.clone();
        let waiting = world.pod_connects(at(destination, PORT));
        thread::spawn(move || done.send(waiting.join().unwrap()));
    }
    assert_eq!(
        outcome.recv_timeout(WATCH).err(),
        Some(RecvTimeoutError::Timeout)
    );
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
    assert_eq!((app.served(), server.served()), (0, 0));

    let enrolled = Enrolled::new(capture, &world, &settings());
    assert!(enrolled.lookups("outbound_no_listener") >= 2);
    // Kept open: for a late packet of a closed connection the kernel sends a reset without a socket,
    // and so without its device: empty, but on the wire (seen on 6.1 with IPv6).
    let _open = [0, 1].map(|_| {
        let ours = accept(&enrolled.listeners.outbound);
        (ours, outcome.recv_timeout(PATIENCE).unwrap().unwrap())
    });
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
    assert_eq!((app.served(), server.served()), (0, 0));
}

#[test]
fn a_process_that_joins_our_ports_gets_nothing() {
    let world = World::new();
    let enrolled = world.enrolled(&settings());
    let thief = world.in_pod(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_only_v6(false).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.bind_device(Some(b"lo")).unwrap();
        socket.bind(&at("::", 15001).into()).unwrap();
        socket.listen(16).unwrap();
        TcpListener::from(socket)
    });
    for _ in 0..32 {
        let client = world.pod_connects(at(PEER4, 15001));
        accept(&enrolled.listeners.outbound);
        drop(client.join().unwrap().unwrap());
    }
    assert!(idle(&thief));
}

#[test]
fn capture_does_not_depend_on_our_ports() {
    let world = World::new();
    let _taken =
        world.in_pod(|| [15001, 15006, 15008].map(|port| TcpListener::bind(("::", port)).unwrap()));
    let enrolled = world.enrolled(&settings());
    assert!(enrolled.pod.ports_displaced());
    let client = world.pod_connects(at(PEER4, PORT));
    accept(&enrolled.listeners.outbound);
    drop(client.join().unwrap().unwrap());
    let peer = world.in_peer(|| TcpStream::connect_timeout(&at(POD4, 15008), PATIENCE));
    assert_eq!(
        accept(&enrolled.listeners.hbone)
            .local_addr()
            .unwrap()
            .port(),
        15008
    );
    drop(peer.unwrap());
}

#[test]
fn a_connection_is_accepted_by_the_worker_of_its_processor() {
    let world = World::new();
    let capture = Capture::start(&world.params(2)).unwrap();
    let (_pod, listeners) = capture.enrol(&world.netns(), &settings()).unwrap();
    for processor in 0..2 {
        let client = spawn_in(&world.pod(), move || {
            let mut set = nix::sched::CpuSet::new();
            set.set(processor).unwrap();
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
            TcpStream::connect_timeout(&at(PEER4, PORT), PATIENCE)
        });
        accept(&listeners[processor].outbound);
        drop(client.join().unwrap().unwrap());
        assert!(idle(&listeners[1 - processor].outbound));
    }
}

#[test]
fn without_a_v6_route_our_dial_and_udp_fail_at_once() {
    let world = World::new();
    let enrolled = world.enrolled(&settings());
    let destination = at("2001:db8::7", PORT);
    let client = world.pod_connects(destination);
    let ours = accept(&enrolled.listeners.outbound);
    assert_eq!(canonical(ours.local_addr().unwrap()), destination);
    assert_eq!(ours.peer_addr().unwrap().ip(), address(POD6));
    let _client = client.join().unwrap().unwrap();
    let dial = enrolled
        .pod
        .dialer(&settings())
        .upstream_socket(destination.ip())
        .unwrap();
    let refused = dial.connect(&destination.into()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NetworkUnreachable);
    assert!(idle(&enrolled.listeners.outbound), "it came back to us");
    let udp = world.in_pod(move || UdpSocket::bind("[::]:0").unwrap().connect(destination));
    assert_eq!(udp.unwrap_err().kind(), ErrorKind::NetworkUnreachable);
}

#[test]
fn a_captured_connection_from_loopback_is_refused() {
    let world = World::new();
    let pod = world.pod();
    ip(&format!("-n {pod} addr del {POD6}/64 dev eth0"));
    let enrolled = world.enrolled(&settings());
    let refused = world.pod_connects(at("2001:db8::7", PORT)).join().unwrap();
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let refused = spawn_in(&pod, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&at("127.0.0.1", 0).into()).unwrap();
        socket.connect_timeout(&at("198.51.100.7", PORT).into(), WATCH)
    });
    // No reset can be routed to an IPv4 loopback address (6.18).
    assert_eq!(
        refused.join().unwrap().unwrap_err().kind(),
        ErrorKind::TimedOut
    );
    assert!(enrolled.lookups("loop_refused") >= 2);
    assert!(idle(&enrolled.listeners.outbound));
}

/// Where nobody listens.
const CANARY: u16 = 9;

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
