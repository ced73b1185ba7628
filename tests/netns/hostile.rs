//! A pod whose programs are root, have NET_ADMIN and NET_RAW, and want out of the mesh in plaintext.

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};
use ztunnel_tests::{
    apps::{self, Server},
    meshfile::MeshFile,
    netns::Netns,
    process::output,
    topology::{Builder, Pod, Topology},
    wait,
    ztunnel::HBONE,
};

use crate::{
    mesh::{Mesh, PATIENCE, WATCH, assert_alive, assert_echo, mapped},
    plaintext::strict,
};

/// One way to try: takes where to and what to say; what comes of it is the wire's to tell.
type Attempt = fn(&Try<'_>) -> Result<()>;

/// What an attempt has to work with, inside the namespace of the hostile pod.
struct Try<'a> {
    to: SocketAddr,
    canary: &'a [u8],
    own: &'a Pod,
    victim: &'a Pod,
}

fn pods() -> Builder {
    Topology::builder()
        .pod("hostile", "a")
        .pod("client", "a")
        .pod("server", "b")
        .pod("outside", "b")
}

#[test]
fn no_trick_with_sockets_takes_a_connection_out_in_plaintext() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let server = mesh.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let targets = [
        ("v4", server.at(9000)),
        ("v6", server.at6(9000)),
        ("v4-mapped", mapped(server.at(9000))),
    ];
    let mut failures = Vec::new();
    for (name, attempt) in tricks().into_iter().chain(more_tricks()) {
        for (family, to) in targets {
            let name = format!("{name} {family}");
            if let Err(error) = attempted(&mesh, &name, to, server, attempt) {
                failures.push(format!("{name}: {error:#}"));
            }
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    still_in_the_mesh(&mesh)
}

#[test]
fn no_change_to_its_network_takes_a_pod_out_in_plaintext() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let server = mesh.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let attempts: [(&str, Attempt); 8] = [
        ("the server's address added", |t| {
            let address = prefixed(t.victim, t.to);
            shell(&format!("ip addr add {address} dev lo"))?;
            tell(say(t, |_| Ok(())))?;
            // Connected while the address was local, spoken when it is not.
            let socket = connected(t)?;
            shell(&format!("ip addr del {address} dev lo"))?;
            tell(speak(socket, t.canary))?;
            tell(say(t, |_| Ok(())))
        }),
        ("a route of its own to the server", |t| {
            let address = prefixed(t.victim, t.to);
            let (v, gateway) = if address.contains(':') {
                ("-6", "fe80::1".to_owned())
            } else {
                ("-4", "10.88.1.1".to_owned())
            };
            shell(&format!(
                "ip {v} route add {address} via {gateway} dev eth0 onlink || :"
            ))?;
            tell(say(t, |_| Ok(())))
        }),
        ("a rule of its own before all others", |t| {
            shell("ip rule add pref 1 lookup main; ip -6 rule add pref 1 lookup main")?;
            tell(say(t, |_| Ok(())))?;
            shell("ip rule del pref 1; ip -6 rule del pref 1").map(drop)
        }),
        ("lo taken down", |t| {
            shell("ip link set lo down")?;
            tell(say(t, |_| Ok(())))?;
            shell("ip link set lo up").map(drop)
        }),
        ("a device of its own", |t| {
            shell("ip link add dummy0 type dummy && ip link set dummy0 up || :")?;
            tell(say(t, |s| s.bind_device(Some(b"dummy0"))))?;
            shell("ip link del dummy0 || :").map(drop)
        }),
        ("its own filter rules", |t| {
            let script = "nft add table inet out && nft add chain inet out o '{type route hook output priority 0;}' && \
                          nft add rule inet out o meta mark set 0x539";
            shell(script)?;
            tell(say(t, |_| Ok(())))?;
            shell("nft delete table inet out").map(drop)
        }),
        ("the name of lo given to eth0", name_given_away),
        ("rules and routes flushed", |t| {
            shell(FLUSH)?;
            tell(say(t, |_| Ok(())))?;
            tell(say(t, |s| s.bind_device(Some(b"eth0"))))
        }),
    ];
    let mut failures = Vec::new();
    for (name, attempt) in attempts {
        for (family, to) in [("v4", server.at(9000)), ("v6", server.at6(9000))] {
            let name = format!("{name} {family}");
            if let Err(error) = attempted(&mesh, &name, to, server, attempt) {
                failures.push(format!("{name}: {error:#}"));
            }
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    // Another pod of the node has not noticed.
    assert_echo(&mesh.pod("client")?.netns, server.at(9000))
}

#[test]
fn a_pod_that_listens_on_the_proxys_ports_receives_nothing_of_others() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let hostile = mesh.pod("hostile")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let thief = |netns: &Netns, port: u16| {
        netns.within(|| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
            socket.set_reuse_port(true)?;
            socket.set_reuse_address(true)?;
            let at = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port));
            let bound = socket.bind(&at.into()).and_then(|()| socket.listen(16));
            socket.set_nonblocking(true)?;
            Ok(bound.ok().map(|()| socket))
        })
    };
    let mut thieves = Vec::new();
    for pod in [server, hostile] {
        for port in [15001, 15006, HBONE] {
            thieves.extend(thief(&pod.netns, port)?);
        }
    }
    let sniffer = mesh.sniffer()?;
    for _ in 0..10 {
        assert_echo(&client.netns, server.at(9000))?;
        assert_echo(&hostile.netns, server.at6(9000))?;
        assert_echo(&mesh.net("b")?.netns, server.at(9000))?;
    }
    for thief in &thieves {
        let stolen = thief.accept().err().map(|e| e.kind());
        assert_eq!(
            stolen,
            Some(io::ErrorKind::WouldBlock),
            "a thief got a connection"
        );
    }
    assert_eq!(
        sniffer
            .seen()?
            .segments()
            .filter(|s| s.src.port() == 9000)
            .count(),
        0
    );
    // The thieves are there first when a node process starts: it goes around them.
    drop(sniffer);
    let mut mesh = mesh;
    mesh.b.kill()?;
    mesh.b.restart()?;
    mesh.b.wait_ready()?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    assert_echo(&client.netns, server.at(9000))
}

// What capture cannot see is a documented limit; the receiver is what stands against it.
#[test]
fn what_a_raw_socket_sends_past_the_mesh_a_strict_receiver_refuses() -> Result<()> {
    let mesh = Mesh::start(pods(), strict)?;
    let (hostile, server) = (mesh.pod("hostile")?, mesh.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = mesh.sniffer()?;
    let from = hostile.at(40_000);
    let syn = raw_syn(hostile.v4, server.v4, 40_000, 9000);
    hostile.netns.within(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))?;
        socket.send_to(&syn, &SocketAddr::from((server.v4, 0)).into())?;
        Ok(())
    })?;
    let answer = wait::until("an answer to the SYN", PATIENCE, || {
        let seen = sniffer.seen().ok()?;
        let answer = seen.segments().find(|s| s.dst == from)?;
        Some((answer.rst, answer.syn))
    })?;
    assert_eq!(answer, (true, false), "the SYN should be reset");
    assert!(app.seen().is_empty());
    assert_echo(&mesh.pod("client")?.netns, server.at(9000))
}

// With NET_RAW the kernel would allow it; the guard on setsockopt does not.
#[test]
fn a_captured_socket_cannot_be_bound_elsewhere_later() -> Result<()> {
    let mesh = Mesh::start(pods(), strict)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = mesh.sniffer()?;
    for to in [server.at(9000), server.at6(9000)] {
        for device in [Some(&b"eth0"[..]), None] {
            let mut stream = client.netns.within(|| {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                socket.connect_timeout(&to.into(), PATIENCE)?;
                let refused = socket.bind_device(device).map_err(|e| e.kind());
                ensure!(
                    refused == Err(io::ErrorKind::PermissionDenied),
                    "bind to {device:?}: {refused:?}"
                );
                Ok(TcpStream::from(socket))
            })?;
            assert_alive(&mut stream).context("the connection as it was")?;
        }
    }
    let seen = sniffer.seen()?;
    let plain: Vec<_> = seen.segments_on(9000).take(3).collect();
    ensure!(plain.is_empty(), "on the link: {plain:?}");
    Ok(())
}

/// Makes one attempt with a canary of its own and asserts that the link has not seen it.
fn attempted(
    mesh: &Mesh,
    name: &str,
    to: SocketAddr,
    victim: &Pod,
    attempt: Attempt,
) -> Result<()> {
    let own = mesh.pod("hostile")?;
    let sniffer = mesh.sniffer()?;
    let canary = format!("kanarienvogel {name} ").replace(' ', "-");
    let what = Try {
        to,
        canary: canary.as_bytes(),
        own,
        victim,
    };
    own.netns.within(|| attempt(&what))?;
    let seen = sniffer.seen()?;
    ensure!(seen.count(canary.as_bytes())? == 0, "plaintext on the link");
    let syn = seen
        .segments_on(to.port())
        .find(|s| to.port() != HBONE && s.syn);
    ensure!(syn.is_none(), "a SYN on the link: {syn:?}");
    Ok(())
}

/// The established proxy's mark, its connection mark, and whatever the rules of this pod know.
fn every_mark(t: &Try<'_>) -> Result<()> {
    let rules = shell("ip rule show; ip -6 rule show")?;
    let known = rules.split_whitespace().filter_map(|word| {
        let word = word.split('/').next()?.strip_prefix("0x")?;
        u32::from_str_radix(word, 16).ok()
    });
    for mark in [0x539, 0x53a, 0x111, 1].into_iter().chain(known) {
        tell(say(t, |socket| socket.set_mark(mark)))?;
    }
    Ok(())
}

fn tricks() -> Vec<(&'static str, Attempt)> {
    vec![
        ("nothing special", |t| tell(say(t, |_| Ok(())))),
        ("a mark", every_mark),
        ("bound to eth0", |t| {
            tell(say(t, |s| s.bind_device(Some(b"eth0"))))
        }),
        ("bound to its own address", |t| {
            let own = own(t, 0);
            tell(say(t, |s| s.bind(&own.into())))
        }),
        ("bound to address and device", |t| {
            let own = own(t, 0);
            tell(say(t, |s| {
                s.bind(&own.into())
                    .and_then(|()| s.bind_device(Some(b"eth0")))
            }))
        }),
        ("transparent, from a foreign address", |t| {
            tell(say(t, |s| {
                if t.to.is_ipv4() {
                    s.set_ip_transparent_v4(true)?;
                    s.bind(&SocketAddr::from((Ipv4Addr::new(192, 0, 2, 7), 0)).into())
                } else {
                    s.set_freebind_v6(true)?;
                    s.bind(
                        &"[2001:db8::7]:0"
                            .parse::<SocketAddr>()
                            .map_err(io::Error::other)?
                            .into(),
                    )
                }
            }))
        }),
    ]
}

fn more_tricks() -> Vec<(&'static str, Attempt)> {
    vec![
        ("from the proxy's port", |t| {
            let own = own(t, HBONE);
            tell(say(t, |s| {
                s.set_reuse_port(true)?;
                s.set_reuse_address(true)?;
                s.bind(&own.into())
            }))
        }),
        ("connected twice", connected_twice),
        ("data in the SYN", data_in_the_syn),
        ("multipath", multipath),
        ("to the proxy's port of the server", |t| {
            let mut t = Try { ..*t };
            t.to.set_port(HBONE);
            tell(say(&t, |_| Ok(())))
        }),
        ("from a process in another cgroup", |t| {
            let group = "/sys/fs/cgroup/unified";
            let group = if std::path::Path::new(group).exists() {
                group
            } else {
                "/sys/fs/cgroup"
            };
            let canary = String::from_utf8_lossy(t.canary);
            let script = format!(
                "g=$(mktemp -d {group}/{}XXXX) && echo $$ > $g/cgroup.procs || exit 0; \
                 curl -s -m 2 -H 'X-C: {canary}' http://{}/; \
                 echo $$ > {group}/cgroup.procs; rmdir $g; :",
                t.own.netns, t.to
            );
            shell(&script).map(drop)
        }),
    ]
}

fn still_in_the_mesh(mesh: &Mesh) -> Result<()> {
    let (hostile, server) = (mesh.pod("hostile")?, mesh.pod("server")?);
    let sniffer = mesh.sniffer()?;
    assert_echo(&hostile.netns, server.at(9000))?;
    assert_echo(&hostile.netns, server.at6(9000))?;
    ensure!(
        sniffer.seen()?.segments_on(9000).count() == 0,
        "it left in plaintext"
    );
    Ok(())
}

/// A failure of an attempt is a success of the mesh.
fn tell<T>(_: io::Result<T>) -> Result<()> {
    Ok(())
}

/// Prepares a socket, connects it, speaks and listens a moment.
fn say(t: &Try<'_>, prepare: impl FnOnce(&Socket) -> io::Result<()>) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(t.to), Type::STREAM, None)?;
    prepare(&socket)?;
    socket.connect_timeout(&t.to.into(), PAUSE)?;
    speak(socket, t.canary)
}

fn speak(socket: Socket, canary: &[u8]) -> io::Result<()> {
    let mut stream = TcpStream::from(socket);
    stream.set_write_timeout(Some(PAUSE))?;
    stream.write_all(canary)?;
    apps::read_end(&stream, PAUSE)
        .map(drop)
        .map_err(io::Error::other)
}

fn connected(t: &Try<'_>) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(t.to), Type::STREAM, None)?;
    drop(socket.connect_timeout(&t.to.into(), PAUSE));
    Ok(socket)
}

/// Disconnects a captured socket, frees it from its device and connects it again.
fn connected_twice(t: &Try<'_>) -> Result<()> {
    let socket = connected(t)?;
    for device in [Some(&b"eth0"[..]), None] {
        drop(socket.connect(&nobody()));
        drop(socket.bind_device(device));
        drop(socket.connect_timeout(&t.to.into(), PAUSE));
    }
    tell(speak(socket, t.canary))
}

/// An address of the family `AF_UNSPEC`: connecting to it disconnects.
#[expect(
    unsafe_code,
    reason = "no safe wrapper makes an address without a family"
)]
fn nobody() -> SockAddr {
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_in>()).unwrap_or(16);
    // SAFETY: the storage is initialised, longer than `length`, and of family 0, `AF_UNSPEC`.
    unsafe { SockAddr::new(SockAddrStorage::zeroed(), length) }
}

/// A program that binds to `lo` by its name would bind to the way out.
fn name_given_away(t: &Try<'_>) -> Result<()> {
    let (v4, v6) = (t.own.v4, t.own.v6);
    shell(&format!(
        "ip link set lo down; ip link set lo name lo0; ip link set lo0 up; \
                 ip link set eth0 down; ip link set eth0 name lo; ip link set lo up; \
                 ip addr add {v4}/32 dev lo; ip addr add {v6}/128 dev lo nodad; \
                 ip route add 10.88.1.1 dev lo scope link; \
                 ip route add default via 10.88.1.1 dev lo; \
                 ip -6 route add ::/0 via fe80::1 dev lo; :"
    ))?;
    tell(say(t, |_| Ok(())))?;
    shell(&format!(
        "ip link set lo down; ip link set lo name eth0; ip link set eth0 up; \
                 ip link set lo0 down; ip link set lo0 name lo; ip link set lo up; \
                 ip addr add {v4}/32 dev eth0; ip addr add {v6}/128 dev eth0 nodad; \
                 ip route add 10.88.1.1 dev eth0 scope link; \
                 ip route add default via 10.88.1.1 dev eth0; \
                 ip -6 route add ::/0 via fe80::1 dev eth0; :"
    ))
    .map(drop)
}

fn data_in_the_syn(t: &Try<'_>) -> Result<()> {
    // The pod is free to switch it on, without the cookie that would need a first round.
    shell("echo 0x407 > /proc/sys/net/ipv4/tcp_fastopen")?;
    let socket = Socket::new(Domain::for_address(t.to), Type::STREAM, None)?;
    socket.set_write_timeout(Some(PAUSE))?;
    let to = SockaddrStorage::from(t.to);
    let sent = sendto(
        socket.as_raw_fd(),
        t.canary,
        &to,
        MsgFlags::from_bits_retain(libc::MSG_FASTOPEN),
    );
    if sent.is_ok() {
        tell(speak(socket, t.canary))?;
    }
    Ok(())
}

fn multipath(t: &Try<'_>) -> Result<()> {
    let socket = Socket::new(
        Domain::for_address(t.to),
        Type::STREAM,
        Some(Protocol::MPTCP),
    );
    let Ok(socket) = socket else {
        // This kernel has none, so nothing leaves by it.
        return Ok(());
    };
    drop(socket.connect_timeout(&t.to.into(), PAUSE));
    tell(speak(socket, t.canary))
}

fn shell(script: &str) -> Result<String> {
    // The calling thread is inside the pod; its children are too.
    output(None, "sh", &["-c", script], "")
}

/// The pod's own address, in the form of the destination.
fn own(t: &Try<'_>, port: u16) -> SocketAddr {
    match t.to.ip() {
        IpAddr::V4(_) => t.own.at(port),
        IpAddr::V6(to) if to.to_ipv4_mapped().is_some() => mapped(t.own.at(port)),
        IpAddr::V6(_) => t.own.at6(port),
    }
}

fn prefixed(pod: &Pod, like: SocketAddr) -> String {
    match like.ip() {
        IpAddr::V4(_) => format!("{}/32", pod.v4),
        IpAddr::V6(_) => format!("{}/128", pod.v6),
    }
}

/// A TCP header with SYN and its checksum.
fn raw_syn(from: Ipv4Addr, to: Ipv4Addr, source: u16, destination: u16) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(source.to_be_bytes());
    segment.extend(destination.to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let mut pseudo = [&from.octets()[..], &to.octets(), &[0, 6, 0, 20]].concat();
    pseudo.extend(&segment);
    let words = pseudo
        .as_chunks::<2>()
        .0
        .iter()
        .map(|w| u32::from(u16::from_be_bytes(*w)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [_, _, high, low] = (!sum).to_be_bytes();
    for (at, byte) in [(16, high), (17, low)] {
        if let Some(place) = segment.get_mut(at) {
            *place = byte;
        }
    }
    segment
}

/// Everything but the three tables that the kernel makes, and what they need to reach the node.
const FLUSH: &str = "for v in -4 -6; do \
      ip $v rule show | grep -vE '^(0|32766|32767):' | cut -d: -f1 | while read p; do ip $v rule del pref $p; done; \
      ip $v route show table all | grep -oE 'table [0-9]+' | sort -u | while read _ t; do ip $v route flush table $t; done; \
    done; ip -6 route del local ::/0 dev lo table main 2>/dev/null; \
    echo 0 > /proc/sys/net/ipv4/tcp_fwmark_accept";
/// For each step of an attempt: what is captured is answered at once, what is not may go nowhere.
const PAUSE: Duration = WATCH;
