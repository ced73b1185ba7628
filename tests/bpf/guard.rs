//! What a pod can do to a socket that is bound to `lo` and waits, is open or was disconnected: options,
//! routes, devices, other protocols over the same socket. Nothing of it may leave the pod.

use std::{
    io::{ErrorKind, Result, Write as _},
    mem::MaybeUninit,
    net::TcpStream,
    num::NonZero,
    os::fd::AsRawFd as _,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use ztunnel::capture::{Capture, release_all};

use crate::{
    lifecycle::generations,
    world::{
        Enrolled, PATIENCE, PEER4, PEER6, POD4, POD6, PORT, Sniffer, WATCH, World, accept, at,
        idle, ip, said, settings, spawn_in,
    },
};

#[test]
fn a_waiting_connection_stays_on_lo() {
    let world = World::new();
    let capture = unserved(&world);
    let mut sniffer = Sniffer::on_peer(&world);
    let eth0 = index_of_eth0(&world);
    for destination in [PEER4, PEER6] {
        let waiting = waiting(&world, destination);
        for (option, value) in bindings(eth0) {
            let refused = set(&waiting, libc::SOL_SOCKET, option, &value).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{option}");
        }
        assert_eq!(waiting.device_index_v4().unwrap().unwrap().get(), 1);
        watch();
    }
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
    let enrolled = Enrolled::new(capture, &world, &settings());
    assert_eq!(enrolled.connects("rebind_refused"), 8);
}

#[test]
fn the_guard_is_replaced_with_what_it_guards_and_goes_with_it() {
    let world = World::new();
    let eth0 = index_of_eth0(&world).to_ne_bytes();
    let rebind = |socket: &Socket| set(socket, libc::SOL_SOCKET, SO_BINDTOIFINDEX, &eth0);
    drop(unserved(&world));
    let waiting = waiting(&world, PEER4);
    rebind(&waiting).unwrap_err();
    drop(world.start());
    rebind(&waiting).unwrap_err();
    std::fs::remove_file(generations(&world).remove(0).join("setsockopt")).unwrap();
    let capture = world.start();
    rebind(&waiting).unwrap_err();
    let enrolled = Enrolled::new(capture, &world, &settings());
    assert_eq!(enrolled.connects("rebind_refused"), 3);
    drop(accept(&enrolled.listeners.outbound));
    drop(enrolled);
    release_all(&world.pin_dir).unwrap();
    rebind(&waiting).unwrap();
}

#[test]
fn an_open_captured_connection_stays_on_lo() {
    let world = World::new();
    let enrolled = world.enrolled(&settings());
    let mut sniffer = Sniffer::on_peer(&world);
    let eth0 = index_of_eth0(&world);
    let mut client = world.pod_connects(at(PEER4, PORT)).join().unwrap().unwrap();
    let ours = accept(&enrolled.listeners.outbound);
    for (option, value) in bindings(eth0) {
        let refused = set(&client, libc::SOL_SOCKET, option, &value).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{option}");
    }
    client.write_all(b"said to us").unwrap();
    drop(client);
    assert_eq!(said(ours), "said to us");
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
}

#[test]
fn binding_and_connecting_at_once_leaves_nothing_off_lo() {
    let world = World::new();
    let _capture = unserved(&world);
    let mut sniffer = Sniffer::on_peer(&world);
    let eth0 = index_of_eth0(&world).to_ne_bytes();
    for _ in 0..1000 {
        let socket = Arc::new(world.in_pod(|| nonblocking(Domain::IPV4)));
        let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(Barrier::new(4)));
        let binders = [(); 3].map(|()| {
            let (socket, stop) = (Arc::clone(&socket), Arc::clone(&stop));
            let begun = Arc::clone(&begun);
            thread::spawn(move || {
                begun.wait();
                while !stop.load(Ordering::SeqCst) {
                    drop(set(&*socket, libc::SOL_SOCKET, SO_BINDTOIFINDEX, &eth0));
                }
            })
        });
        begun.wait();
        socket.connect(&at(PEER4, PORT).into()).unwrap_err();
        stop.store(true, Ordering::SeqCst);
        for binder in binders {
            binder.join().unwrap();
        }
        let bound = socket.device_index_v4().unwrap();
        assert_eq!(bound.map(NonZero::get), Some(1));
    }
    watch();
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
}

#[test]
fn a_socket_that_has_not_connected_is_bound_as_the_kernel_would() {
    let world = World::new();
    let free = world.in_pod(answers_to_binding);
    let enrolled = world.enrolled(&settings());
    assert_eq!(world.in_pod(answers_to_binding), free);
    assert_eq!(enrolled.connects("rebind_refused"), 0);
    assert_eq!(free.len(), 10);
    assert!(free.iter().any(|answer| answer == "bound to 2"), "{free:?}");
}

#[test]
fn other_sockets_and_options_are_left_alone() {
    let world = World::new();
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let eth0 = index_of_eth0(&world).to_ne_bytes();
    // Another protocol.
    world.in_pod(move || {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.connect(&at(PEER4, PORT).into()).unwrap();
        set(&socket, libc::SOL_SOCKET, SO_BINDTOIFINDEX, &eth0).unwrap();
        assert_eq!(socket.device_index_v4().unwrap().unwrap().get(), 2);
    });
    // Another pod.
    world.in_peer(move || {
        let client = TcpStream::connect(at(PEER4, PORT)).unwrap();
        client.peek(&mut [0]).unwrap();
        set(&client, libc::SOL_SOCKET, SO_BINDTOIFINDEX, &eth0).unwrap();
    });
    assert_eq!(server.served(), 1);
    // Our own sockets.
    let dialer = enrolled.pod.dialer(&settings());
    let ours = dialer.upstream_socket(PEER4.parse().unwrap()).unwrap();
    ours.set_nonblocking(false).unwrap();
    ours.connect(&at(PEER4, PORT).into()).unwrap();
    set(&ours, libc::SOL_SOCKET, SO_BINDTOIFINDEX, &eth0).unwrap();
    assert_eq!(enrolled.connects("rebind_refused"), 0);
}

#[test]
fn values_longer_than_a_page_still_work_everywhere() {
    // Two node processes, so that each sees what the other's program left.
    let (world, other) = (World::new(), World::new());
    let _enrolled = (world.enrolled(&settings()), other.enrolled(&settings()));
    let mut value = vec![0; 3 * 4096];
    value[..4].copy_from_slice(&1_i32.to_ne_bytes());
    let new = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    for socket in [new(), world.in_pod(new), other.in_pod(new)] {
        for length in [4095, 4096, 4097, value.len()] {
            socket.set_keepalive(false).unwrap();
            let value = &value[..length];
            set(&socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, value)
                .unwrap_or_else(|error| panic!("{length}: {error}"));
            assert!(socket.keepalive().unwrap(), "{length}");
        }
        let name = [&b"lo\0"[..], &value].concat();
        for (option, value) in [(libc::SO_BINDTODEVICE, &name), (SO_BINDTOIFINDEX, &value)] {
            set(&socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"").unwrap();
            set(&socket, libc::SOL_SOCKET, option, value).unwrap();
            let bound = socket.device_index_v4().unwrap();
            assert_eq!(bound.map(NonZero::get), Some(1), "{option}");
        }
    }
}

#[test]
fn a_socket_that_was_disconnected_is_captured_again() {
    let world = World::new();
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let eth0 = index_of_eth0(&world).to_ne_bytes();
    for rebind in [false, true] {
        let client = spawn_in(&world.pod(), move || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.connect(&at(PEER4, PORT).into()).unwrap();
            disconnect(&socket);
            if rebind {
                set(&socket, libc::SOL_SOCKET, SO_BINDTOIFINDEX, &eth0).unwrap();
            }
            socket.connect(&at(PEER4, PORT).into()).map(|()| socket)
        });
        let _first = accept(&enrolled.listeners.outbound);
        let _second = accept(&enrolled.listeners.outbound);
        drop(client.join().unwrap().unwrap());
    }
    assert_eq!(enrolled.connects("captured"), 4);
    assert_eq!(server.served(), 0);
}

#[test]
fn a_socket_from_before_enrolment_that_connects_after_it_is_captured() {
    let world = World::new();
    let server = world.peer_server();
    let socket = world.in_pod(|| nonblocking(Domain::IPV4));
    socket.bind_device(Some(b"eth0")).unwrap();
    let enrolled = world.enrolled(&settings());
    socket.connect(&at(PEER4, PORT).into()).unwrap_err();
    let _ours = accept(&enrolled.listeners.outbound);
    assert_eq!(server.served(), 0);
}

#[test]
fn a_connection_that_is_made_up_with_tcp_repair_stays_on_lo() {
    let world = World::new();
    let enrolled = world.enrolled(&settings());
    let mut sniffer = Sniffer::on_peer(&world);
    let eth0 = index_of_eth0(&world);
    for (domain, pod, peer) in [(Domain::IPV4, POD4, PEER4), (Domain::IPV6, POD6, PEER6)] {
        let socket = world.in_pod(move || Socket::new(domain, Type::STREAM, None).unwrap());
        repair(&socket, 1);
        socket.bind(&at(pod, 0).into()).unwrap();
        socket.connect(&at(peer, PORT).into()).unwrap();
        for (option, value) in bindings(eth0) {
            let refused = set(&socket, libc::SOL_SOCKET, option, &value).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{option}");
        }
        repair(&socket, 0);
        // Over `lo` a reset may have come already.
        drop(socket.send(b"to nobody"));
        watch();
    }
    assert_eq!(enrolled.connects("captured"), 2);
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
}

#[test]
fn no_option_of_a_waiting_socket_takes_it_off_lo() {
    let world = World::new();
    let _capture = unserved(&world);
    let eth0 = index_of_eth0(&world);
    let pktinfo = [[0; 16].as_slice(), &eth0.to_ne_bytes()].concat();
    // Loose source routing by way of the peer.
    let route = [131, 7, 4, 10, 99, 0, 1, 1];
    let options = [
        (
            PEER4,
            libc::IPPROTO_IP,
            libc::IP_UNICAST_IF,
            eth0.to_be_bytes().to_vec(),
        ),
        (PEER4, libc::IPPROTO_IP, libc::IP_OPTIONS, route.to_vec()),
        (PEER4, libc::IPPROTO_IP, libc::IP_TOS, vec![16, 0, 0, 0]),
        (
            PEER4,
            libc::SOL_SOCKET,
            libc::SO_DONTROUTE,
            vec![1, 0, 0, 0],
        ),
        (PEER4, libc::SOL_SOCKET, libc::SO_MARK, vec![7, 0, 0, 0]),
        (
            PEER6,
            libc::IPPROTO_IPV6,
            libc::IPV6_UNICAST_IF,
            eth0.to_be_bytes().to_vec(),
        ),
        (
            PEER6,
            libc::IPPROTO_IPV6,
            libc::IPV6_MULTICAST_IF,
            eth0.to_ne_bytes().to_vec(),
        ),
        (PEER6, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, pktinfo),
        (
            PEER6,
            libc::SOL_SOCKET,
            libc::SO_DONTROUTE,
            vec![1, 0, 0, 0],
        ),
        (PEER6, libc::SOL_SOCKET, libc::SO_MARK, vec![7, 0, 0, 0]),
    ];
    let mut sniffer = Sniffer::on_peer(&world);
    let mut sockets = Vec::new();
    for (destination, level, option, value) in &options {
        let before = world.in_pod({
            let domain = domain_of(destination);
            move || nonblocking(domain)
        });
        let after = waiting(&world, destination);
        // Some say no, which is as good.
        drop(set(&before, *level, *option, value));
        drop(before.connect(&at(destination, PORT).into()));
        drop(set(&after, *level, *option, value));
        sockets.push((before, after));
    }
    watch();
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
}

#[test]
fn no_route_or_rule_takes_a_waiting_socket_off_lo() {
    let cases: [&[&str]; 7] = [
        &[
            "rule add pref 1 fwmark 7 table 99",
            "route add default via 10.99.0.1 dev eth0 table 99",
            "-6 rule add pref 1 fwmark 7 table 99",
            "-6 route add default via fd99::1 dev eth0 table 99",
        ],
        &[
            "rule add pref 1 oif lo table 99",
            "route add default via 10.99.0.1 dev eth0 table 99",
            "-6 rule add pref 1 oif lo table 99",
            "-6 route add default via fd99::1 dev eth0 table 99",
        ],
        &[
            "route add 10.99.0.1/32 nexthop dev lo nexthop dev eth0",
            "-6 route add fd99::1/128 dev lo metric 5",
            "-6 route append fd99::1/128 dev eth0 metric 5",
        ],
        &[
            "-6 route flush table local",
            "route flush table local",
            "-6 route del local default dev lo table 15001",
        ],
        &["link set lo down"],
        &["link set lo down", "link set lo up"],
        &[
            "link set lo down",
            "link set lo name real",
            "link set eth0 down",
            "link set eth0 name lo",
            "link set real up",
            "link set lo up",
        ],
    ];
    for commands in cases {
        let world = World::new();
        let _capture = unserved(&world);
        let mut sniffer = Sniffer::on_peer(&world);
        let waiting = [waiting(&world, PEER4), waiting(&world, PEER6)];
        for command in commands {
            ip(&format!("-n {} {command}", world.pod()));
        }
        for socket in &waiting {
            // Also makes the kernel look for a route again.
            socket.set_mark(7).unwrap();
        }
        let new = [PEER4, PEER6].map(|destination| {
            let socket = world.in_pod(move || nonblocking(domain_of(destination)));
            socket.set_mark(7).unwrap();
            drop(socket.connect(&at(destination, PORT).into()));
            socket
        });
        watch();
        assert_eq!(sniffer.tcp(PORT), [""; 0], "{commands:?}");
        drop((waiting, new));
    }
}

#[test]
fn link_local_destinations_of_a_device_are_refused() {
    let world = World::new();
    for (namespace, address) in [(world.pod(), "fe80::2"), (world.peer(), "fe80::1")] {
        ip(&format!(
            "-n {namespace} addr add {address}/64 dev eth0 nodad"
        ));
    }
    let server = world.peer_server();
    let enrolled = world.enrolled(&settings());
    let refused = world.in_pod(|| TcpStream::connect("[fe80::1%2]:8080"));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(enrolled.connects("captured"), 1);
    assert_eq!(server.served(), 0);
}

#[test]
fn further_paths_of_mptcp_are_captured() {
    let world = World::new();
    let server = world.peer_server();
    let pod = world.pod();
    ip(&format!("-n {pod} addr add 10.99.0.3/24 dev eth0"));
    ip(&format!(
        "-n {pod} mptcp limits set subflows 4 add_addr_accepted 4"
    ));
    ip(&format!(
        "-n {pod} mptcp endpoint add 10.99.0.3 dev eth0 subflow"
    ));
    // A server in the pod tells its clients of an address elsewhere.
    ip(&format!("-n {pod} mptcp endpoint add {PEER4} signal"));
    let enrolled = world.enrolled(&settings());
    let mut sniffer = Sniffer::on_peer(&world);
    let inside = world.in_pod(|| {
        let socket = mptcp();
        socket.bind(&at(POD4, PORT).into()).unwrap();
        socket.listen(8).unwrap();
        socket
    });
    let to_pod = world.in_pod(|| connected(mptcp(), POD4));
    let (from_pod, _) = inside.accept().unwrap();
    // The kernel tells and tries in its own time. The path comes to us, who speak no MPTCP.
    let tried = (0..1200).any(|_| {
        for (from, to) in [(&to_pod, &from_pod), (&from_pod, &to_pod)] {
            from.send(b"tell").unwrap();
            assert_eq!(to.recv(&mut [MaybeUninit::uninit(); 4]).unwrap(), 4);
        }
        thread::park_timeout(Duration::from_millis(50));
        enrolled.connects("captured") > 0 && enrolled.lookups("outbound") > 0
    });
    assert!(tried);
    let to_peer = spawn_in(&pod, || connected(mptcp(), PEER4));
    let _ours = accept(&enrolled.listeners.outbound);
    to_peer.join().unwrap().send(b"tell").unwrap();
    watch();
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
    assert_eq!(server.served(), 0);
    let eth0 = index_of_eth0(&world);
    let refused = set(
        &mptcp_in(&world),
        libc::SOL_SOCKET,
        SO_BINDTOIFINDEX,
        &eth0.to_ne_bytes(),
    );
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert!(idle(&enrolled.listeners.hbone));
}

/// Enrolled, and nobody answers.
fn unserved(world: &World) -> Capture {
    let Enrolled {
        capture,
        pod,
        listeners,
    } = world.enrolled(&settings());
    drop((pod, listeners));
    capture
}

/// A socket of the pod whose SYN nobody answers.
fn waiting(world: &World, destination: &'static str) -> Socket {
    world.in_pod(move || {
        let socket = nonblocking(domain_of(destination));
        let pending = socket.connect(&at(destination, PORT).into()).unwrap_err();
        assert_eq!(pending.raw_os_error(), Some(libc::EINPROGRESS));
        socket
    })
}

fn nonblocking(domain: Domain) -> Socket {
    Socket::new(domain, Type::STREAM.nonblocking(), None).unwrap()
}

fn domain_of(destination: &str) -> Domain {
    Domain::for_address(at(destination, 0))
}

fn mptcp() -> Socket {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).unwrap()
}

fn mptcp_in(world: &World) -> Socket {
    world.in_pod(mptcp)
}

fn connected(socket: Socket, destination: &str) -> Socket {
    socket
        .connect_timeout(&at(destination, PORT).into(), PATIENCE)
        .unwrap();
    socket
}

/// Past a first retransmission.
fn watch() {
    thread::park_timeout(WATCH);
}

/// Every way to take a socket off the device that it is bound to.
fn bindings(device: u32) -> [(i32, Vec<u8>); 4] {
    [
        (libc::SO_BINDTODEVICE, b"eth0".to_vec()),
        (libc::SO_BINDTODEVICE, Vec::new()),
        (SO_BINDTOIFINDEX, device.to_ne_bytes().to_vec()),
        (SO_BINDTOIFINDEX, vec![0; 4]),
    ]
}

/// What a new socket of this namespace answers to each binding, one after the other.
fn answers_to_binding() -> Vec<String> {
    let long = [&b"eth0\0"[..], &[b'x'; 60]].concat();
    let attempts: [(i32, &[u8]); 10] = [
        (libc::SO_BINDTODEVICE, b""),
        (libc::SO_BINDTODEVICE, b"nosuchdevice"),
        (libc::SO_BINDTODEVICE, b"eth0"),
        (libc::SO_BINDTODEVICE, b"lo\0eth0"),
        (libc::SO_BINDTODEVICE, &long),
        (libc::SO_BINDTODEVICE, b"a name that is much too long"),
        (SO_BINDTOIFINDEX, &[2, 0, 0]),
        (SO_BINDTOIFINDEX, &[0, 0, 0, 0, 9]),
        (SO_BINDTOIFINDEX, &[99, 0, 0, 0]),
        (SO_BINDTOIFINDEX, &[255, 255, 255, 255]),
    ];
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    attempts
        .iter()
        .map(
            |(option, value)| match set(&socket, libc::SOL_SOCKET, *option, value) {
                Ok(()) => {
                    let index = socket.device_index_v4().unwrap();
                    format!("bound to {}", index.map_or(0, NonZero::get))
                }
                Err(error) => error.to_string(),
            },
        )
        .collect()
}

fn index_of_eth0(world: &World) -> u32 {
    let shown = ip(&format!("-n {} -o link show eth0", world.pod()));
    shown.split(':').next().unwrap().parse().unwrap()
}

fn repair(socket: &Socket, on: i32) {
    set(
        socket,
        libc::IPPROTO_TCP,
        libc::TCP_REPAIR,
        &on.to_ne_bytes(),
    )
    .unwrap();
}

#[expect(unsafe_code, reason = "the libraries offer typed options only")]
fn set(socket: &impl std::os::fd::AsFd, level: i32, option: i32, value: &[u8]) -> Result<()> {
    let length = libc::socklen_t::try_from(value.len()).unwrap();
    // SAFETY: the value outlives the call and is as long as said.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            length,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[expect(unsafe_code, reason = "the libraries have no address of no family")]
fn disconnect(socket: &Socket) {
    let nowhere = libc::sockaddr {
        sa_family: 0, // AF_UNSPEC
        sa_data: [0; 14],
    };
    let length = libc::socklen_t::try_from(size_of_val(&nowhere)).unwrap();
    // SAFETY: the address outlives the call and is as long as said.
    let answer = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) };
    assert_eq!(answer, 0);
}

const SO_BINDTOIFINDEX: i32 = 62;
