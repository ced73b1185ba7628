//! What a pod's questions to resolvers meet: given a stand-in, left alone or refused, and counted.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use ebpf_abi::Address;
use socket2::{Domain, SockRef, Socket, Type};
use ztunnel::capture::{Capture, Netns, Params, PodSettings, QuestionSocket, Questions};

use crate::lifecycle::make_foreign;
use crate::world::{
    Enrolled, PATIENCE, PEER4, PEER6, POD4, POD6, World, address, at, ip, settings,
};

const DNS: u16 = 53;

fn captured() -> PodSettings {
    PodSettings {
        dns: true,
        ..settings()
    }
}

/// What our side was asked, so often and in these words: the resolver that was meant.
fn taken<const N: usize>(socket: QuestionSocket, words: &[u8]) -> [Option<IpAddr>; N] {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let meant = runtime.block_on(async {
        let questions = Questions::new(socket).unwrap();
        let mut buffer = [0; 2048];
        let mut meant = Vec::new();
        let mut more = true;
        while more {
            // When all are there, it looks once more.
            more = meant.len() < N;
            if more {
                let some = tokio::time::timeout(PATIENCE, questions.readable()).await;
                some.unwrap().unwrap();
            }
            while let Some((length, asker)) = questions.take(&mut buffer).unwrap() {
                if buffer.get(..length) == Some(words) {
                    meant.push(questions.resolvers(&asker).first().copied());
                }
            }
        }
        meant
    });
    meant.try_into().unwrap()
}

/// Answers the next question, where it came from.
fn answer_one(socket: QuestionSocket, words: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let questions = Questions::new(socket).unwrap();
        let asker = loop {
            tokio::time::timeout(PATIENCE, questions.readable())
                .await
                .unwrap()
                .unwrap();
            if let Some((_, asker)) = questions.take(&mut [0; 64]).unwrap() {
                break asker;
            }
        };
        questions.answer(&asker, words).await.unwrap();
    });
}

/// Where the pod reaches this resolver instead, if it asks no other.
fn stand_in(resolver: &str) -> IpAddr {
    let v4: Ipv4Addr = resolver.parse().unwrap();
    let resolver = Address::from_v4(v4.to_bits().to_be());
    let Address([.., word]) = resolver.stand_in(resolver.stand_in_at(0));
    IpAddr::from(word.to_ne_bytes())
}

fn bound(world: &World, local: &str) -> UdpSocket {
    let local: SocketAddr = local.parse().unwrap();
    let socket = world.in_pod(move || UdpSocket::bind(local).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn heard(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (buffer.get(..length).unwrap().to_vec(), from)
}

#[test]
fn a_question_is_given_a_stand_in_by_every_kind_of_socket() {
    let world = World::new();
    let mut enrolled = world.enrolled(&captured());
    let mapped = format!("::ffff:{PEER4}");
    let asked = [
        ("0.0.0.0:0", PEER4),
        ("[::]:0", PEER6),
        ("[::]:0", mapped.as_str()),
    ];
    for (local, resolver) in asked {
        let resolver = at(resolver, DNS);
        let unconnected = bound(&world, local);
        unconnected.send_to(b"asks", resolver).unwrap();
        let connected = bound(&world, local);
        connected.connect(resolver).unwrap();
        assert_eq!(connected.peer_addr().unwrap(), resolver);
        connected.send(b"asks").unwrap();
    }
    let meant = taken(enrolled.listeners.dns.pop().unwrap(), b"asks");
    let of = |text: &str| Some(address(text));
    let (four, six) = (of(PEER4), of(PEER6));
    assert_eq!(meant, [four, four, six, six, four, four]);
    assert_eq!(enrolled.connects("dns_captured"), 6);
    assert_eq!(enrolled.lookups("dns"), 6);
}

/// Else an answer to it would come back to us as the next question, for ever.
#[test]
fn whoever_asks_from_a_stand_in_is_answered_there() {
    let world = World::new();
    let mut enrolled = world.enrolled(&captured());
    let stand_in = stand_in(PEER4);
    let client = bound(&world, &format!("{stand_in}:0"));
    client.send_to(b"asks", at(PEER4, DNS)).unwrap();
    answer_one(enrolled.listeners.dns.pop().unwrap(), b"said");
    assert_eq!(heard(&client), (b"said".to_vec(), at(PEER4, DNS)));
    assert_eq!(enrolled.connects("dns_captured"), 1);
    assert_eq!(enrolled.lookups("dns"), 1);
}

#[test]
fn whoever_has_a_stand_in_for_its_address_is_no_resolver() {
    let world = World::new();
    let _enrolled = world.enrolled(&captured());
    let asker = bound(&world, "0.0.0.0:0");
    asker.send_to(b"asks", at(PEER4, DNS)).unwrap();
    let asker_at = at("127.0.0.1", asker.local_addr().unwrap().port());
    let mimic = bound(&world, &format!("{}:0", stand_in(PEER4)));
    mimic.send_to(b"lies", asker_at).unwrap();
    assert_eq!(
        heard(&asker),
        (b"lies".to_vec(), mimic.local_addr().unwrap())
    );
    // Nor is there a resolver where a connection was made.
    let listener = SocketAddr::new(stand_in(PEER4), 15053);
    let peer = world.in_pod(move || {
        let listener = TcpListener::bind(listener).unwrap();
        let to = listener.local_addr().unwrap();
        let stream = TcpStream::connect(to).unwrap();
        (to, stream.peer_addr().unwrap())
    });
    assert_eq!(peer.0, peer.1);
}

/// Go sorts the addresses of a name by what a socket that it connects to each, port 53, is named.
#[test]
fn a_socket_that_connects_to_learn_its_address_learns_the_pods() {
    let world = World::new();
    let mut enrolled = world.enrolled(&captured());
    let mapped = format!("::ffff:{PEER4}");
    let connected = |resolver: &str| {
        let to = at(resolver, DNS);
        world.in_pod(move || {
            let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None).unwrap();
            socket.connect(&to.into()).map(|()| UdpSocket::from(socket))
        })
    };
    for (resolver, own) in [(PEER4, POD4), (PEER6, POD6), (mapped.as_str(), POD4)] {
        let socket = connected(resolver).unwrap();
        let local = socket.local_addr().unwrap();
        assert_eq!(local.ip().to_canonical(), address(own), "{resolver}");
        assert_eq!(socket.peer_addr().unwrap(), at(resolver, DNS));
    }
    // It asks and is answered as any other.
    let socket = connected(PEER4).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send(b"asks").unwrap();
    answer_one(enrolled.listeners.dns.pop().unwrap(), b"said");
    assert_eq!(heard(&socket), (b"said".to_vec(), at(PEER4, DNS)));
    // What the pod could not reach without us it does not reach.
    let four = PodSettings {
        addresses: vec![address(POD4)],
        ..captured()
    };
    enrolled.pod.update(&four).unwrap();
    let refused = connected(PEER6).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NetworkUnreachable);
}

#[test]
fn what_is_no_question_to_a_resolver_elsewhere_is_left_alone() {
    let world = World::new();
    let excluded = "192.0.2.0/24";
    ip(&format!("-n {} addr add 192.0.2.1/32 dev lo", world.peer()));
    ip(&format!("-n {} route add {excluded} dev eth0", world.pod()));
    let enrolled = world.enrolled(&PodSettings {
        excluded_outbound_cidrs: vec![excluded.parse().unwrap()],
        ..captured()
    });
    // Resolvers of the pod's own, which the application runs there.
    for own in ["127.0.0.1", POD4, "::1", POD6] {
        let resolver = bound(&world, &at(own, DNS).to_string());
        let local = if own.contains(':') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        let client = bound(&world, local);
        client.send_to(b"inside", at(own, DNS)).unwrap();
        assert_eq!(heard(&resolver).0, b"inside", "{own}");
    }
    // Another port, another socket's business, and what is excluded.
    let cases = [
        ("0.0.0.0:0", PEER4, 5353),
        ("[::]:0", PEER6, 5353),
        ("0.0.0.0:53", PEER4, DNS),
        ("0.0.0.0:0", "192.0.2.1", DNS),
    ];
    for (local, to, port) in cases {
        let to = at(to, port);
        let resolver = world.in_peer(move || UdpSocket::bind(to).unwrap());
        resolver.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = bound(&world, local);
        client.send_to(b"outside", to).unwrap();
        let (words, from) = heard(&resolver);
        assert_eq!(words, b"outside", "{local} {to}");
        if local.ends_with(":53") {
            assert_eq!(from.port(), DNS, "a resolver speaks from its port");
        }
        resolver.send_to(b"heard", from).unwrap();
        let (words, from) = heard(&client);
        assert_eq!((words.as_slice(), from), (&b"heard"[..], to), "{local}");
    }
    // What is bound to a device finds no way to a stand-in.
    let resolver = world.in_peer(|| UdpSocket::bind(at(PEER4, DNS)).unwrap());
    resolver.set_read_timeout(Some(PATIENCE)).unwrap();
    let client = bound(&world, "0.0.0.0:0");
    SockRef::from(&client).bind_device(Some(b"eth0")).unwrap();
    client.send_to(b"device", at(PEER4, DNS)).unwrap();
    assert_eq!(heard(&resolver).0, b"device");
    assert_eq!(enrolled.connects("dns_captured"), 0);
    assert_eq!(enrolled.connects("dns_refused"), 0);
}

#[test]
fn an_excluded_port_and_a_pod_that_wants_none_are_left_alone() {
    let world = World::new();
    let resolver = world.in_peer(|| UdpSocket::bind(at(PEER4, DNS)).unwrap());
    resolver.set_read_timeout(Some(PATIENCE)).unwrap();
    // Sockets from before: one that was connected stays with its resolver, one that was not asks us.
    let (open, connected) = (bound(&world, "0.0.0.0:0"), bound(&world, "0.0.0.0:0"));
    connected.connect(at(PEER4, DNS)).unwrap();
    let mut enrolled = world.enrolled(&PodSettings {
        excluded_outbound_ports: vec![DNS],
        ..captured()
    });
    let reaches = |words: &[u8]| {
        open.send_to(words, at(PEER4, DNS)).unwrap();
        assert_eq!(heard(&resolver).0, words);
    };
    reaches(b"excluded");
    enrolled.pod.update(&settings()).unwrap();
    reaches(b"not wanted");
    enrolled.pod.update(&captured()).unwrap();
    open.send_to(b"captured", at(PEER4, DNS)).unwrap();
    connected.send(b"as ever").unwrap();
    assert_eq!(heard(&resolver).0, b"as ever");
    let meant = taken(enrolled.listeners.dns.pop().unwrap(), b"captured");
    assert_eq!(meant, [Some(address(PEER4))]);
    assert_eq!(enrolled.connects("dns_captured"), 1);
}

#[test]
fn a_process_that_captures_no_dns_leaves_nothing_of_one_that_did() {
    let world = World::new();
    let enrolled = world.enrolled(&captured());
    let clients = [bound(&world, "0.0.0.0:0"), bound(&world, "[::]:0")];
    let resolvers = [at(PEER4, DNS), at(PEER6, DNS)];
    for (client, resolver) in clients.iter().zip(resolvers) {
        client.send_to(b"captured", resolver).unwrap();
    }
    assert_eq!(enrolled.connects("dns_captured"), 2);
    drop(enrolled);
    let without = Params {
        dns: false,
        ..world.params(1)
    };
    // The pod itself is not taken over yet.
    let capture = Capture::start(&without).unwrap();
    for (client, resolver) in clients.iter().zip(resolvers) {
        let server = world.in_peer(move || UdpSocket::bind(resolver).unwrap());
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        client.send_to(b"asks", resolver).unwrap();
        let (words, from) = heard(&server);
        assert_eq!(words, b"asks");
        server.send_to(b"said", from).unwrap();
        assert_eq!(heard(client), (b"said".to_vec(), resolver));
        client.connect(resolver).unwrap();
        client.send(b"connected").unwrap();
        assert_eq!(heard(&server).0, b"connected");
    }
    let _enrolled = Enrolled::new(capture, &world, &settings());
    assert!(!world.configuration().contains("fd15:53"));
}

#[test]
fn a_socket_that_stays_connected_to_a_resolver_asks_the_next_process_too() {
    let world = World::new();
    let first = world.enrolled(&captured());
    let client = bound(&world, "0.0.0.0:0");
    client.connect(at(PEER4, DNS)).unwrap();
    drop(first);
    for another_version in [false, true] {
        if another_version {
            make_foreign(&world);
        }
        let mut next = world.enrolled(&captured());
        client.send(b"asks").unwrap();
        let meant = taken(next.listeners.dns.pop().unwrap(), b"asks");
        assert_eq!(meant, [Some(address(PEER4))], "{another_version}");
        assert_eq!(client.peer_addr().unwrap(), at(PEER4, DNS));
    }
}

#[test]
fn a_pod_that_asks_very_many_resolvers_pushes_aside_only_its_own() {
    let world = World::new();
    let mut enrolled = world.enrolled(&captured());
    let other = Path::new("/run/netns").join(world.peer());
    let other = Netns::open(&other).unwrap();
    let with = PodSettings {
        addresses: vec![address(PEER4), address(PEER6)],
        ..captured()
    };
    let (_other, _listeners) = enrolled.capture.enrol(&other.into(), &with).unwrap();
    let patient = bound(&world, "0.0.0.0:0");
    patient.send_to(b"patient", at(PEER4, DNS)).unwrap();
    // More than the whole node remembers.
    let flood = world.in_peer(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut sent = 0_u32;
        for number in 0..20_000_u32 {
            let resolver = IpAddr::from((0x0b00_0000 + number).to_be_bytes());
            sent += u32::from(socket.send_to(b"flood", (resolver, DNS)).is_ok());
        }
        sent
    });
    assert_eq!(flood, 20_000);
    assert_eq!(enrolled.connects("dns_refused"), 0);
    let meant = taken(enrolled.listeners.dns.pop().unwrap(), b"patient");
    assert_eq!(meant, [Some(address(PEER4))]);
}

#[test]
fn without_ipv6_on_lo_a_question_to_an_ipv6_resolver_is_refused_and_none_leaves() {
    let world = World::new();
    ip(&format!("-n {} link set lo up", world.pod()));
    world.in_pod(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1").unwrap();
    });
    let resolver = world.in_peer(|| UdpSocket::bind(at(PEER6, DNS)).unwrap());
    let mut enrolled = world.enrolled(&captured());
    let client = bound(&world, "[::]:0");
    for to in [PEER6, "2001:db8::53"] {
        let refused = client.send_to(b"six", at(to, DNS)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{to}");
        let refused = client.connect(at(to, DNS)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{to}");
    }
    let four = bound(&world, "0.0.0.0:0");
    four.send_to(b"asks", at(PEER4, DNS)).unwrap();
    assert_eq!(enrolled.connects("dns_refused"), 4);
    // When it comes it is used.
    world.in_pod(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "0").unwrap();
    });
    assert!(enrolled.pod.repair().unwrap());
    client.send_to(b"asks", at(PEER6, DNS)).unwrap();
    let meant = taken(enrolled.listeners.dns.pop().unwrap(), b"asks");
    assert_eq!(meant, [Some(address(PEER4)), Some(address(PEER6))]);
    resolver
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    assert!(resolver.recv_from(&mut [0; 64]).is_err());
}
