//! Ways with something between, as the applications at both ends and both nodes see them: waypoints,
//! application tunnels, other networks, and the next endpoint when one is dead.

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    meshfile::MeshFile,
    topology::{Builder, Topology},
    wire::Sniffer,
    ztunnel::{HBONE, Settings},
};

use crate::mesh::{Before, Mesh, REQUEST, assert_echo, assert_refused};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("near", "a")
        .pod("server", "b")
        .pod("front", "b")
}

fn waypoint_at(destination: impl std::fmt::Display, port: u16) -> String {
    format!("waypoint: {{destination: \"{destination}\", hboneMtlsPort: {port}}}")
}

/// A mesh in which `front` stands before the service `web` and before the pod `server`.
fn behind_front(topology: &Topology) -> Result<MeshFile> {
    let front = topology.pod("front")?.v4;
    Ok(MeshFile::of(topology)
        .service("web", &[VIP.into()], &[(80, 9000)], &["server"])
        .service("gate", &[GATE.into()], &[(HBONE, HBONE)], &["front"])
        .service_setting(
            "web",
            &waypoint_at("demo/gate.demo.svc.cluster.local", HBONE),
        )
        .workload_setting("server", &waypoint_at(format!("/{front}"), HBONE)))
}

// 41, 42, 78, 79.
#[test]
fn a_waypoint_gets_what_was_meant_for_the_service_and_the_pod_behind_it() -> Result<()> {
    let topology = pods().build()?;
    let file = behind_front(&topology)?;
    let mesh = Mesh::start_with(topology, &file)?;
    let (client, server, front) = (mesh.pod("client")?, mesh.pod("server")?, mesh.pod("front")?);
    let behind = Server::start(&server.netns, 9000, apps::echo)?;
    let at_front = Server::start(&front.netns, 80, apps::echo)?;
    for (dialled, count) in [((VIP, 80).into(), 1), (server.at(80), 2)] {
        let mark = mesh.marks();
        let sniffer = mesh.sniffer()?;
        assert_echo(&client.netns, dialled)?;
        let seen = at_front.wait_seen(count, crate::mesh::PATIENCE)?;
        let seen = seen.last().context("nobody came")?;
        assert_eq!(seen.peer.ip(), IpAddr::V4(client.v4), "the client itself");
        assert_eq!(seen.local, front.at(80), "at the port that was dialled");
        let wire = sniffer.seen()?;
        assert_eq!(wire.count(REQUEST)?, 0, "plaintext on the link: {wire:?}");
        let asked = dialled.to_string();
        let identity = front.spiffe_id();
        let fields = [
            ("direction", "outbound"),
            ("dst.hbone_addr", asked.as_str()),
            ("dst.identity", identity.as_str()),
            ("dst.workload", "front"),
            ("reason", "complete"),
        ];
        let line = mesh.a.wait_access(mark.0, &fields)?;
        let upstream = front.at(HBONE).to_string();
        assert_eq!(line.get("dst.addr"), Some(upstream.as_str()));
        let to = front.at(80).to_string();
        let fields = [("direction", "inbound"), ("dst.hbone_addr", to.as_str())];
        mesh.b.wait_access(mark.1, &fields)?;
    }
    assert!(behind.seen().is_empty(), "nobody goes past the waypoint");
    Ok(())
}

// 41, 47: the waypoint is dead, or never was.
#[test]
fn without_its_waypoint_a_service_is_refused() -> Result<()> {
    let topology = pods().build()?;
    let base = MeshFile::of(&topology)
        .service("web", &[VIP.into()], &[(80, 9000)], &["server"])
        .service("gate", &[GATE.into()], &[(HBONE, HBONE)], &[]);
    let empty = base.clone().service_setting(
        "web",
        &waypoint_at("demo/gate.demo.svc.cluster.local", HBONE),
    );
    let missing = base.clone().service_setting(
        "web",
        &waypoint_at("demo/nobody.demo.svc.cluster.local", HBONE),
    );
    let mesh = Mesh::start_with(topology, &empty)?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (file, name) in [(&empty, "demo/gate"), (&missing, "demo/nobody")] {
        mesh.replace(file)?;
        let mark = mesh.marks();
        assert_refused(&client.netns, (VIP, 80).into())?;
        let fields = [("direction", "outbound"), ("reason", "no_endpoint")];
        let line = mesh.a.wait_access(mark.0, &fields)?;
        let error = line.get("error").unwrap_or_default();
        ensure!(error.contains(&format!("waypoint {name}")), "{error}");
    }
    assert!(app.seen().is_empty());
    mesh.replace(&base)?;
    assert_echo(&client.netns, (VIP, 80).into())
}

/// What stands in front of the bytes at an application that reads PROXY headers.
#[derive(Debug, PartialEq, Eq)]
struct Announced {
    source: SocketAddr,
    destination: SocketAddr,
    identity: String,
}

/// Reads a PROXY v2 header of IPv4 with one TLV.
fn announced(stream: &mut TcpStream) -> io::Result<Announced> {
    let mut head = [0; 14];
    stream.read_exact(&mut head)?;
    assert_eq!(head, *b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
    let length = short(stream)?;
    let (from, to) = (ip(stream)?, ip(stream)?);
    let (from_port, to_port) = (short(stream)?, short(stream)?);
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let mut identity = vec![0; usize::from(short(stream)?)];
    stream.read_exact(&mut identity)?;
    assert_eq!((kind, usize::from(length)), ([0xd0], 15 + identity.len()));
    Ok(Announced {
        source: (from, from_port).into(),
        destination: (to, to_port).into(),
        identity: String::from_utf8_lossy(&identity).into_owned(),
    })
}

fn short(stream: &mut TcpStream) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn ip(stream: &mut TcpStream) -> io::Result<Ipv4Addr> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(bytes.into())
}

// 80, 88, 89.
#[test]
fn an_application_that_proxies_reads_who_connects_and_where_to() -> Result<()> {
    for loopback in [true, false] {
        let topology = pods().build()?;
        let file = behind_front(&topology)?
            .workload_setting("front", "applicationTunnel: {protocol: PROXY, port: 15088}");
        let settings = Settings::of(&topology)?.env("LOCALHOST_APP_TUNNEL", &loopback.to_string());
        let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
        let (client, front) = (mesh.pod("client")?, mesh.pod("front")?);
        let (told, tells) = std::sync::mpsc::channel();
        let at = if loopback {
            (Ipv4Addr::LOCALHOST, 15088).into()
        } else {
            front.at(15088)
        };
        let app = Server::start_at(&front.netns, at, move |mut stream| {
            told.send(announced(&mut stream)?)
                .map_err(io::Error::other)?;
            apps::echo(stream)
        })?;
        assert_echo(&client.netns, (VIP, 80).into())?;
        let told = tells.recv_timeout(crate::mesh::PATIENCE)?;
        assert_eq!(told.source.ip(), IpAddr::V4(client.v4));
        assert_eq!(told.destination, (VIP, 80).into());
        assert_eq!(told.identity, client.spiffe_id());
        let seen = app.seen();
        let peer = seen.first().context("nobody")?.peer.ip();
        let want = if loopback {
            Ipv4Addr::LOCALHOST
        } else {
            client.v4
        };
        assert_eq!(peer, IpAddr::V4(want));
    }
    Ok(())
}

/// Passes bytes on to another address, as a gateway does that looks into nothing.
fn passes_on(
    netns: ztunnel_tests::netns::Netns,
    to: SocketAddr,
) -> impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static {
    move |stream| {
        let far = netns
            .dial(to, crate::mesh::PATIENCE)
            .map_err(io::Error::other)?;
        let (mut a, mut b) = (stream.try_clone()?, far.try_clone()?);
        let there = thread::spawn(move || {
            drop(io::copy(&mut a, &mut b));
            b.shutdown(Shutdown::Write)
        });
        let (mut from, mut to) = (far, stream);
        drop(io::copy(&mut from, &mut to));
        drop(to.shutdown(Shutdown::Write));
        drop(there.join());
        Ok(())
    }
}

// 66, 67, 68.
#[test]
fn a_service_of_another_network_is_reached_through_its_gateway() -> Result<()> {
    let topology = pods().build()?;
    let (front, server) = (
        topology.pod("front")?.clone(),
        topology.pod("server")?.clone(),
    );
    let of_server = format!("subjectAltNames: [\"{}\"]", server.spiffe_id());
    let entry = format!(
        "networkGateway: {{destination: \"far/{}\", hboneMtlsPort: {HBONE}}}",
        front.v4
    );
    // The gateway hands every stream to a program, which passes it on to the server's node.
    let file = MeshFile::of(&topology)
        .service("web", &[VIP.into()], &[(80, 9000)], &["server"])
        .service_setting("web", &of_server)
        .workload_setting("server", "network: far")
        .workload_setting("server", &entry)
        .workload_setting("front", "network: far")
        .workload_setting("front", "applicationTunnel: {protocol: NONE, port: 15443}")
        .pod_setting("front", "excludeOutboundPorts: [15008]");
    let settings = Settings::of(&topology)?;
    let of_node = |node: &str| match node {
        "b" => settings.clone().env("NETWORK", "far"),
        _ => settings.clone(),
    };
    let mesh = Mesh::run(topology, |node| file.for_node(node), of_node)?;
    let client = mesh.pod("client")?;
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let to = server.at(HBONE);
    let gate = Server::start(&front.netns, 15443, passes_on(front.netns.clone(), to))?;
    let before = Before::of(&mesh.a)?;
    let mark = mesh.marks();
    let sniffer = Sniffer::on(&mesh.net("a")?.netns, ztunnel_tests::topology::LINK)?;
    for _ in 0..2 {
        assert_echo(&client.netns, (VIP, 80).into())?;
    }
    let wire = sniffer.seen()?;
    assert_eq!(wire.count(REQUEST)?, 0, "plaintext on the link: {wire:?}");
    assert_eq!(gate.seen().len(), 2, "an inner session for each connection");
    assert_eq!(app.seen().len(), 2);
    let identity = server.spiffe_id();
    let upstream = front.at(HBONE).to_string();
    let fields = [
        ("direction", "outbound"),
        ("dst.hbone_addr", "web.demo.svc.cluster.local:80"),
        ("dst.addr", upstream.as_str()),
        ("dst.identity", identity.as_str()),
        ("reason", "complete"),
    ];
    mesh.a.wait_access(mark.0, &fields)?;
    let own = client.spiffe_id();
    let to = server.at(9000).to_string();
    let fields = [
        ("direction", "inbound"),
        ("dst.hbone_addr", to.as_str()),
        ("src.identity", own.as_str()),
    ];
    mesh.b.wait_access(mark.1, &fields)?;
    let labels = [("reporter", "source"), ("response_flags", "-")];
    before.wait_gain("istio_tcp_connections_opened_total", &labels[..1], 2.0)?;
    before.wait_gain("istio_tcp_connections_closed_total", &labels, 2.0)
}

#[test]
fn a_dead_endpoint_is_passed_over_and_the_line_says_so() -> Result<()> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology).without("front").service(
        "web",
        &[VIP.into()],
        &[(80, 9000)],
        &["server", "front"],
    );
    let mesh = Mesh::start_with(topology, &file)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    // Nothing listens at the other endpoint.
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = mesh.marks();
    for _ in 0..20 {
        assert_echo(&client.netns, (VIP, 80).into())?;
    }
    assert_eq!(app.seen().len(), 20);
    let fields = [
        ("direction", "outbound"),
        ("reason", "complete"),
        ("retries", "1"),
        ("dst.workload", "server"),
    ];
    mesh.a.wait_access(mark.0, &fields)?;
    drop(app);
    // The endpoint's node answers for it: no other is asked.
    let mark = mesh.marks();
    for _ in 0..4 {
        assert_refused(&client.netns, (VIP, 80).into())?;
    }
    let fields = [("direction", "outbound"), ("reason", "peer_refused")];
    mesh.a.wait_access(mark.0, &fields)?;
    Ok(())
}

/// Of the service in these tests.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 7, 1);
/// Of the waypoint's own service.
const GATE: Ipv4Addr = Ipv4Addr::new(10, 96, 7, 2);
