//! The node asks its pods how they are: which of its connections pass a policy that wants an identity,
//! and that nobody else's do.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
};

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};
use ztunnel_tests::{
    access::Line,
    apps::{self, End, Heard, Server},
    meshfile::MeshFile,
    netns::Netns,
    process::output,
    topology::{Builder, Topology},
    ztunnel::Settings,
};

use crate::{
    mesh::{
        Before, Mesh, PATIENCE, REQUEST, assert_alive, assert_echo, is_refused, knock, wait_end,
        wait_fate,
    },
    plaintext::{VERDICTS, strict},
};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b")
        .pod("beside", "b")
}

/// A server that wants identities, and may be probed at port 9000 from its node, and, as far as its
/// entry goes, from two that are not its node.
fn probed(topology: &Topology) -> Result<MeshFile> {
    let (a, b) = (topology.node("a")?, topology.node("b")?);
    let outside = topology.pod("outside")?;
    let sources: [IpAddr; 6] = [
        b.gateway_v4.into(),
        b.gateway_v6.into(),
        outside.v4.into(),
        outside.v6.into(),
        a.v4.into(),
        a.v6.into(),
    ];
    let sources = sources.map(|address| format!("{{address: \"{address}\", ports: [9000]}}"));
    let setting = format!("probeSources: [{}]", sources.join(", "));
    Ok(strict(topology)
        .without("beside")
        .pod_setting("server", &setting))
}

fn unprobed(topology: &Topology) -> MeshFile {
    strict(topology).without("beside")
}

fn of_source<'a>(lines: &'a [Line], source: &str) -> Vec<&'a Line> {
    let is_its =
        |line: &&Line| line.message != "connection opened" && line.get("src.addr") == Some(source);
    lines.iter().filter(is_its).collect()
}

// B093.
#[test]
fn a_probe_of_the_node_passes_policy_and_has_one_line() -> Result<()> {
    let topology = pods().build()?;
    let file = probed(&topology)?;
    let mesh = Mesh::start_with(topology, &file)?;
    let (client, server, node) = (mesh.pod("client")?, mesh.pod("server")?, mesh.net("b")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let _other = Server::start(&server.netns, 9001, apps::echo)?;
    for (to, other, own) in [
        (
            server.at(9000),
            server.at(9001),
            IpAddr::V4(node.gateway_v4),
        ),
        (server.at6(9000), server.at6(9001), node.gateway_v6.into()),
    ] {
        let mark = mesh.b.log().mark();
        let before = Before::of(&mesh.b)?;
        let reply = apps::ask(&node.netns, to, REQUEST)?;
        assert_eq!(reply.bytes, REQUEST, "{to}");
        let seen = app.seen().last().copied().context("nobody came")?;
        assert_eq!((seen.peer.ip(), seen.local), (own, to));
        let source = reply.local.to_string();
        let fields = [
            ("src.addr", source.as_str()),
            ("direction", "inbound"),
            ("reason", "complete"),
            ("path", "probe"),
        ];
        let line = mesh.b.wait_access(mark, &fields)?;
        for absent in ["src.identity", "dst.identity", "dst.hbone_addr", "error"] {
            assert_eq!(line.get(absent), None, "{line:?}");
        }
        assert_eq!(line.get("dst.workload"), Some("server"), "{line:?}");
        let labels = [
            ("connection_security_policy", "unknown"),
            ("reporter", "destination"),
        ];
        before.wait_gain("istio_tcp_connections_opened_total", &labels, 1.0)?;
        before.wait_gain("istio_tcp_connections_closed_total", &labels, 1.0)?;
        before.wait_gain(ROUTED, &[("path", "probe")], 1.0)?;
        before.wait_gain(ROUTED, &[("path", "plaintext")], 0.0)?;
        assert_eq!(of_source(&mesh.b.access_lines(), &source).len(), 1);

        // The same source at a port that is not listed.
        let mark = mesh.b.log().mark();
        let fate = knock(&node.netns, other, REQUEST, PATIENCE)?;
        assert!(is_refused(&fate), "{other}: {fate:?}");
        let refused = [("reason", "policy_denied"), ("direction", "inbound")];
        let line = mesh.b.wait_access(mark, &refused)?;
        assert_eq!(line.get("path"), None, "{line:?}");
        assert_echo(&client.netns, to)?;
    }
    Ok(())
}

// B093, its other half.
#[test]
fn a_listed_address_that_is_not_the_nodes_own_connection_is_refused() -> Result<()> {
    let topology = pods().build()?;
    let file = probed(&topology)?;
    let mesh = Mesh::start_with(topology, &file)?;
    let server = mesh.pod("server")?;
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (name, from) in [
        ("a pod elsewhere", &mesh.pod("outside")?.netns),
        ("another node", &mesh.net("a")?.netns),
    ] {
        for to in [server.at(9000), server.at6(9000)] {
            let mark = mesh.b.log().mark();
            let before = Before::of(&mesh.b)?;
            let fate = knock(from, to, REQUEST, PATIENCE)?;
            assert!(is_refused(&fate), "{name}: {to}: {fate:?}");
            let refused = [("reason", "policy_denied"), ("direction", "inbound")];
            mesh.b.wait_access(mark, &refused).context(name)?;
            before.wait_gain(ROUTED, &[("path", "probe")], 0.0)?;
        }
    }
    // Who is not even listed is refused where everybody is.
    for to in [server.at(9000), server.at6(9000)] {
        let before = Before::of(&mesh.b)?;
        let fate = knock(&mesh.pod("beside")?.netns, to, REQUEST, PATIENCE)?;
        let refused = Heard::NotConnected(std::io::ErrorKind::ConnectionRefused);
        assert_eq!(fate, refused, "{to}");
        let dropped = before.gained(VERDICTS, &[("verdict", "plaintext_dropped")])?;
        assert!(dropped >= 1.0, "{to}: not counted");
    }
    assert!(
        app.seen().is_empty(),
        "the application saw {:?}",
        app.seen()
    );
    Ok(())
}

/// As a node port does, and whatever else hides clients behind the node.
#[test]
fn what_the_node_translates_to_its_own_address_is_no_probe() -> Result<()> {
    let topology = pods().build()?;
    let file = probed(&topology)?;
    let mesh = Mesh::start_with(topology, &file)?;
    let (server, beside, node) = (mesh.pod("server")?, mesh.pod("beside")?, mesh.net("b")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (program, from, own, to) in [
        (
            "iptables",
            beside.at(0).ip(),
            IpAddr::V4(node.gateway_v4),
            server.at(9000),
        ),
        (
            "ip6tables",
            beside.at6(0).ip(),
            node.gateway_v6.into(),
            server.at6(9000),
        ),
    ] {
        let (from, own) = (from.to_string(), own.to_string());
        let rule = format!("-w -t nat -A POSTROUTING -s {from} -j SNAT --to-source {own}");
        let args: Vec<_> = rule.split(' ').collect();
        output(Some(&node.netns), program, &args, "")?;
        let mark = mesh.b.log().mark();
        let fate = knock(&beside.netns, to, REQUEST, PATIENCE)?;
        assert!(is_refused(&fate), "{to}: {fate:?}");
        let refused = [("reason", "policy_denied"), ("direction", "inbound")];
        let line = mesh.b.wait_access(mark, &refused)?;
        let source: SocketAddr = line.get("src.addr").context("no source")?.parse()?;
        assert_eq!(source.ip().to_string(), own, "it came as the node");
        // The node itself passes as ever.
        assert_echo(&node.netns, to)?;
    }
    assert_eq!(app.seen().len(), 2, "{:?}", app.seen());
    Ok(())
}

/// As a probe that asks for a connection and for nothing else.
#[test]
fn a_probe_that_only_connects_passes_although_it_has_left() -> Result<()> {
    let topology = pods().build()?;
    let file = probed(&topology)?;
    let mesh = Mesh::start_with(topology, &file)?;
    let (server, node) = (mesh.pod("server")?, mesh.net("b")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    for to in [server.at(9000), server.at6(9000)] {
        let mark = mesh.b.log().mark();
        let probe = apps::dial(&node.netns, to)?;
        let source = probe.local_addr()?.to_string();
        drop(probe);
        let fields = [("src.addr", source.as_str()), ("path", "probe")];
        mesh.b.wait_access(mark, &fields)?;
    }
    Ok(())
}

#[test]
fn who_may_probe_changes_while_the_pod_is_in_the_mesh() -> Result<()> {
    let topology = pods().build()?;
    let (open, closed) = (probed(&topology)?, unprobed(&topology));
    let mesh = Mesh::start_with(topology, &closed)?;
    let (client, server, node) = (mesh.pod("client")?, mesh.pod("server")?, mesh.net("b")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut meshed = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut meshed)?;
    for to in [server.at(9000), server.at6(9000)] {
        let fate = knock(&node.netns, to, REQUEST, PATIENCE)?;
        assert!(is_refused(&fate), "{to}: {fate:?}");
        mesh.replace(&open)?;
        wait_fate(&node.netns, to, "the probe to be admitted", Heard::answered)?;
        let mut probe = apps::dial(&node.netns, to)?;
        assert_alive(&mut probe)?;
        let source = probe.local_addr()?.to_string();
        let mark = mesh.b.log().mark();
        mesh.replace(&closed)?;
        let (end, _) = wait_end(&probe)?;
        assert_eq!(end, End::Reset, "an open probe ends with its permission");
        let revoked = [
            ("src.addr", source.as_str()),
            ("reason", "policy_revoked"),
            ("path", "probe"),
        ];
        mesh.b.wait_access(mark, &revoked)?;
        wait_fate(&node.netns, to, "the probe to be refused", |fate| {
            *fate == Heard::NotConnected(std::io::ErrorKind::ConnectionRefused)
        })?;
        assert_alive(&mut meshed).context("what the policy admits is not disturbed")?;
    }
    Ok(())
}

// B093, as a node whose CNI agent translates probes sends them.
#[test]
fn a_translated_probe_passes_where_the_node_is_told_its_address() -> Result<()> {
    let topology = pods().build()?;
    let file = unprobed(&topology);
    let settings = Settings::of(&topology)?;
    let told = settings
        .clone()
        .env("HOST_PROBE_SNAT_IP", TRANSLATED[0])
        .env("HOST_PROBE_SNAT_IPV6", TRANSLATED[1]);
    let mesh = Mesh::run(
        topology,
        |node| file.for_node(node),
        |node| {
            if node == "b" {
                told.clone()
            } else {
                settings.clone()
            }
        },
    )?;
    let node = &mesh.net("b")?.netns;
    add_translated(node)?;
    let (server, outside) = (mesh.pod("server")?, mesh.pod("outside")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (to, from) in [server.at(9000), server.at6(9000)]
        .into_iter()
        .zip(TRANSLATED)
    {
        let from: IpAddr = from.parse()?;
        let mark = mesh.b.log().mark();
        let mut probe = dial_from(node, from, to)?;
        probe.write_all(REQUEST)?;
        probe.shutdown(Shutdown::Write)?;
        let mut heard = Vec::new();
        probe.read_to_end(&mut heard)?;
        ensure!(heard == REQUEST, "{to} from {from}");
        assert_eq!(app.seen().last().map(|seen| seen.peer.ip()), Some(from));
        let source = probe.local_addr()?.to_string();
        let fields = [("src.addr", source.as_str()), ("path", "probe")];
        mesh.b.wait_access(mark, &fields)?;
        // The node's own address is not told, so it is as any.
        for other in [node, &outside.netns] {
            let fate = knock(other, to, REQUEST, PATIENCE)?;
            assert!(is_refused(&fate), "{to}: {fate:?}");
        }
    }
    Ok(())
}

#[test]
fn a_node_that_is_not_told_knows_of_no_translated_probes() -> Result<()> {
    let topology = pods().build()?;
    let file = unprobed(&topology);
    let mesh = Mesh::start_with(topology, &file)?;
    let (node, server) = (&mesh.net("b")?.netns, mesh.pod("server")?);
    add_translated(node)?;
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (to, from) in [server.at(9000), server.at6(9000)]
        .into_iter()
        .zip(TRANSLATED)
    {
        let refused = dial_from(node, from.parse()?, to);
        assert!(refused.is_err(), "{to} from {from}");
    }
    assert!(app.seen().is_empty());
    Ok(())
}

fn add_translated(node: &Netns) -> Result<()> {
    for (address, length) in TRANSLATED.iter().zip(["32", "128"]) {
        let address = format!("{address}/{length}");
        let args = ["-n", node.name(), "addr", "add", &address, "dev", "lo"];
        output(None, "ip", &args, "")?;
    }
    Ok(())
}

/// Connects from an address of the namespace.
fn dial_from(netns: &Netns, from: IpAddr, to: SocketAddr) -> Result<TcpStream> {
    netns.within(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
        socket.connect_timeout(&to.into(), PATIENCE)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket.into())
    })
}

const ROUTED: &str = "ztunnel_connections_routed_total";
/// What the established mesh's agent puts in place of the node's address.
const TRANSLATED: [&str; 2] = ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"];
