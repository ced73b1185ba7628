//! The way of one connection, seen from every side: application, wire, log and metrics of both nodes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Heard, Server, canonical},
    inspect,
    meshfile::MeshFile,
    netns::Netns,
    peer::{self, Client, Identity},
    process::output,
    programs::{Nginx, curl},
    topology::{Builder, Topology},
    wait,
    wire::Sniffer,
    ztunnel::{HBONE, Node, Settings},
};

use crate::mesh::{
    Before, Mesh, PATIENCE, assert_echo, assert_refused, is_refused, knock, mapped, number,
};

/// What a client asks and whom, and what must come of it.
struct Row {
    name: &'static str,
    dial: SocketAddr,
    /// The application that answers.
    target: SocketAddr,
    /// The host name of the service that was dialled.
    service: Option<&'static str>,
}

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("near", "a")
        .pod("server", "b")
        .pod("outside", "b")
}

fn file(topology: &Topology) -> MeshFile {
    MeshFile::of(topology)
        .without("outside")
        .service(
            "web",
            &[VIP4.into(), VIP6.into()],
            &[(80, 9000)],
            &["server"],
        )
        .service("empty", &[EMPTY_VIP.into()], &[(80, 9000)], &[])
        .service("self", &[SELF_VIP.into()], &[(80, 9000)], &["client"])
        .service("host", &[HOST_VIP.into()], &[(80, 9001)], &[])
}

/// The file with a workload in the namespace of node b itself, behind the service `host`.
fn text(file: &MeshFile, topology: &Topology, node: &str) -> Result<String> {
    let host = format!(
        "workloads:\n  - uid: on-host\n    name: on-host\n    namespace: demo\n    \
         workloadIps: [\"{}\"]\n    networkMode: HostNetwork\n    node: b\n    services:\n      \
         \"demo/host.demo.svc.cluster.local\": {{80: 9001}}\n",
        topology.node("b")?.v4
    );
    Ok(file.for_node(node).replacen("workloads:\n", &host, 1))
}

// 1, 7, 8, 9, 31–32 (their opposite), 34, 35, 86, 124–125, 160, B124, B128, B130, B132.
#[test]
fn a_request_arrives_over_hbone_by_address_and_by_service_on_both_families() -> Result<()> {
    let topology = pods().build()?;
    let settings = Settings::of(&topology)?;
    // Node b writes JSON, so that both formats are seen.
    let of_node = |node: &str| match node {
        "b" => settings.clone().env("LOG_FORMAT", "json"),
        _ => settings.clone(),
    };
    let file = file(&topology);
    let mesh = Mesh::run(topology, |node| file.for_node(node), of_node)?;
    let server = mesh.pod("server")?.clone();
    let app = Server::start(&server.netns, 9000, apps::whoami)?;
    let row = |name, dial, target, service| Row {
        name,
        dial,
        target,
        service,
    };
    let (v4, v6) = (server.at(9000), server.at6(9000));
    let web = Some("web.demo.svc.cluster.local");
    let rows = [
        row("v4", v4, v4, None),
        row("v6", v6, v6, None),
        row("v4-mapped", mapped(v4), v4, None),
        row("v4 service", (VIP4, 80).into(), v4, web),
        row("v6 service", (VIP6, 80).into(), v6, web),
        row("v4-mapped service", mapped((VIP4, 80).into()), v4, web),
    ];
    for row in rows {
        one_journey(&mesh, &app, &row).with_context(|| format!("row {}", row.name))?;
    }
    Ok(())
}

fn one_journey(mesh: &Mesh, app: &Server, row: &Row) -> Result<()> {
    let client = mesh.pod("client")?;
    let sniffer = mesh.sniffer()?;
    let marks = mesh.marks();
    let (before_a, before_b) = (Before::of(&mesh.a)?, Before::of(&mesh.b)?);
    let canary = format!("kanarienvogel-{}", row.name);
    let request = format!("GET / HTTP/1.1\r\nHost: x\r\nX-Canary: {canary}\r\n\r\n");

    let reply = apps::ask(&client.netns, row.dial, request.as_bytes())?;
    let own = if row.target.is_ipv4() {
        client.at(0)
    } else {
        client.at6(0)
    };
    assert_eq!(reply.peer, row.dial, "the client's peer is what it dialled");
    let seen = app
        .seen()
        .last()
        .copied()
        .context("the server saw nobody")?;
    assert_eq!(
        seen.peer.ip(),
        own.ip(),
        "the server sees the client's own address"
    );
    assert_eq!(seen.local, row.target);
    assert!(
        reply.text().contains(&format!("peer={}", seen.peer)),
        "{}",
        reply.text()
    );

    let wire = sniffer.seen()?;
    assert_eq!(
        wire.count(canary.as_bytes())?,
        0,
        "plaintext on the link: {wire:?}"
    );
    assert!(
        wire.tls_records(HBONE).application_data > 0,
        "no TLS: {wire:?}"
    );
    for port in [row.dial.port(), row.target.port()] {
        assert_eq!(wire.segments_on(port).count(), 0, "port {port} on the link");
    }

    told(mesh, marks, row, &request, &reply)?;
    let lengths = (request.len(), reply.bytes.len());
    counted(&before_a, "source", row, lengths)?;
    counted(&before_b, "destination", row, lengths)
}

/// The access lines of both nodes: who, to whom, how much.
fn told(
    mesh: &Mesh,
    marks: (usize, usize),
    row: &Row,
    request: &str,
    reply: &apps::Reply,
) -> Result<()> {
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let (sent, received) = (request.len().to_string(), reply.bytes.len().to_string());
    let target = row.target.to_string();
    let source = canonical(reply.local).to_string();
    let (from, to) = (client.spiffe_id(), server.spiffe_id());
    let mut common = vec![
        ("src.workload", "client"),
        ("src.namespace", "demo"),
        ("src.identity", from.as_str()),
        ("dst.hbone_addr", target.as_str()),
        ("dst.workload", "server"),
        ("dst.namespace", "demo"),
        ("dst.identity", to.as_str()),
    ];
    common.extend(row.service.map(|host| ("dst.service", host)));
    let outbound = [
        ("direction", "outbound"),
        ("src.addr", source.as_str()),
        ("bytes_sent", sent.as_str()),
        ("bytes_recv", received.as_str()),
    ];
    let line = mesh
        .a
        .wait_access(marks.0, &[&common[..], &outbound].concat())?;
    assert_eq!(
        (line.level.as_str(), line.message.as_str()),
        ("info", "connection complete")
    );
    assert_eq!(line.get("error"), None, "{line:?}");
    assert!(
        line.get("duration").is_some_and(|d| d.ends_with("ms")),
        "{line:?}"
    );
    let dst = format!("{}:{HBONE}", bracketed(row.target.ip()));
    assert_eq!(line.get("dst.addr"), Some(dst.as_str()));
    let inbound = [
        ("direction", "inbound"),
        ("bytes_sent", received.as_str()),
        ("bytes_recv", sent.as_str()),
    ];
    let line = mesh
        .b
        .wait_access(marks.1, &[&common[..], &inbound].concat())?;
    let peer = line
        .get("src.addr")
        .context("src.addr")?
        .parse::<SocketAddr>()?;
    assert_eq!(peer.ip(), canonical(reply.local).ip());
    Ok(())
}

/// One connection, opened and closed once, with its bytes, under the labels of its two ends.
fn counted(
    before: &Before<'_>,
    reporter: &str,
    row: &Row,
    (up, down): (usize, usize),
) -> Result<()> {
    let labels = [
        ("reporter", reporter),
        ("source_workload", "client"),
        ("source_workload_namespace", "demo"),
        (
            "source_principal",
            "spiffe://cluster.local/ns/demo/sa/client",
        ),
        ("destination_workload", "server"),
        (
            "destination_principal",
            "spiffe://cluster.local/ns/demo/sa/server",
        ),
        ("destination_service", row.service.unwrap_or("unknown")),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let bytes = |length: usize| u32::try_from(length).map(f64::from);
    before.wait_gain("istio_tcp_connections_closed_total", &labels, 1.0)?;
    before.wait_gain("istio_tcp_connections_opened_total", &labels, 1.0)?;
    before.wait_gain("istio_tcp_received_bytes_total", &labels, bytes(up)?)?;
    before.wait_gain("istio_tcp_sent_bytes_total", &labels, bytes(down)?)?;
    before.wait_gain("istio_tcp_connections_opened_total", &[], 1.0)?;
    before.wait_gain("istio_tcp_connections_failed_total", &[], 0.0)?;
    before.wait_gain("ztunnel_connections_total", &[("reason", "complete")], 1.0)
}

// 31, 32, 60, 86, B129.
#[test]
fn what_is_not_in_the_mesh_is_reached_in_plain_tcp() -> Result<()> {
    let topology = pods().build()?;
    let settings = Settings::of(&topology)?;
    let file = file(&topology);
    let texts = [text(&file, &topology, "a")?, text(&file, &topology, "b")?];
    let [for_a, for_b] = texts;
    let of_node = |node: &str| {
        if node == "a" {
            for_a.clone()
        } else {
            for_b.clone()
        }
    };
    let mesh = Mesh::run(topology, of_node, |_| settings.clone())?;
    let (client, outside) = (mesh.pod("client")?, mesh.pod("outside")?);
    let host = mesh.net("b")?;
    let in_pod = Server::start(&outside.netns, 9000, apps::whoami)?;
    let on_host = Server::start(&host.netns, 9001, apps::whoami)?;
    let at_host = SocketAddr::from((host.v4, 9001));
    let unknown = SocketAddr::from((host.v6, 9001));
    for (name, app, dial, target) in [
        (
            "a workload that is not HBONE",
            &in_pod,
            outside.at(9000),
            outside.at(9000),
        ),
        (
            "the same by IPv6",
            &in_pod,
            outside.at6(9000),
            outside.at6(9000),
        ),
        ("an address that nobody knows", &on_host, unknown, unknown),
        ("the address of a node", &on_host, at_host, at_host),
        (
            "a service on a node's address",
            &on_host,
            (HOST_VIP, 80).into(),
            at_host,
        ),
    ] {
        let sniffer = mesh.sniffer()?;
        let mark = mesh.a.log().mark();
        let before = Before::of(&mesh.a)?;
        let request = format!("GET / HTTP/1.0\r\nX-Canary: {name}\r\n\r\n");
        let reply = apps::ask(&client.netns, dial, request.as_bytes()).context(name)?;
        assert_eq!(reply.peer, dial, "{name}");
        let seen = app.seen().last().copied().context(name)?;
        let own = if target.is_ipv4() {
            client.at(0)
        } else {
            client.at6(0)
        };
        assert_eq!((seen.peer.ip(), seen.local), (own.ip(), target), "{name}");
        // In plain TCP the canary shows; that is what makes its absence elsewhere a proof.
        let wire = sniffer.seen()?;
        assert!(wire.contains(name.as_bytes())?, "{name}: {wire:?}");
        assert_eq!(wire.segments_on(HBONE).count(), 0, "{name}");
        let (sent, at) = (request.len().to_string(), target.to_string());
        let line = mesh.a.wait_access(
            mark,
            &[
                ("direction", "outbound"),
                ("src.workload", "client"),
                ("dst.addr", &at),
                ("bytes_sent", &sent),
            ],
        )?;
        for absent in ["src.identity", "dst.identity", "dst.hbone_addr", "error"] {
            assert_eq!(line.get(absent), None, "{name}: {line:?}");
        }
        let labels = [
            ("connection_security_policy", "unknown"),
            ("source_workload", "client"),
        ];
        before.wait_gain("istio_tcp_connections_closed_total", &labels, 1.0)?;
    }
    Ok(())
}

// 37, 38, 83, B125 (its plain form): each is refused with its reason, and nothing passes.
#[test]
fn what_the_mesh_cannot_reach_is_refused_with_its_reason() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    for (name, dial, reason) in [
        (
            "a service without endpoints",
            (EMPTY_VIP, 80).into(),
            "no_endpoint",
        ),
        (
            "a port that the service has not",
            (VIP4, 81).into(),
            "no_endpoint",
        ),
        (
            "a port that nobody listens on",
            server.at(9999),
            "peer_refused",
        ),
        ("the same by IPv6", server.at6(9999), "peer_refused"),
    ] {
        let (mark, mark_b) = mesh.marks();
        let sniffer = mesh.sniffer()?;
        let before = Before::of(&mesh.a)?;
        assert_refused(&client.netns, dial).context(name)?;
        let line = mesh
            .a
            .wait_access(mark, &[("direction", "outbound"), ("reason", reason)])?;
        assert!(line.get("error").is_some(), "{name}: {line:?}");
        before.wait_gain("ztunnel_connections_total", &[("reason", reason)], 1.0)?;
        let seen = sniffer.seen()?;
        let plain: Vec<_> = seen.segments_on(dial.port()).collect();
        assert!(plain.is_empty(), "{name}: on the link: {plain:?}");
        if reason == "peer_refused" {
            mesh.b
                .wait_access(mark_b, &[("reason", "connect_failed")])
                .context(name)?;
            let labels = [("response_flags", "CONNECT"), ("reporter", "source")];
            before.wait_gain("istio_tcp_connections_failed_total", &labels, 1.0)?;
        }
    }
    assert_eq!(app.seen().len(), 1);
    Ok(())
}

// As of another device, or of a pod that has just moved.
#[test]
fn an_address_that_the_mesh_does_not_know_is_served_without_a_loop() -> Result<()> {
    let two = Topology::builder().pod("outside", "a").pod("server", "b");
    let mesh = Mesh::start(two, |topology| MeshFile::of(topology).without("outside"))?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let identity = Identity::signed(&mesh.topology, &outside.spiffe_id())?;
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let before = Before::of(&mesh.b)?;
    let mut dials = 0.0;
    let vias = [IpAddr::from(mesh.net("b")?.v4), mesh.net("b")?.v6.into()];
    for (own, via) in ["10.99.0.7", "fd99::7"].into_iter().zip(vias) {
        let family = if via.is_ipv4() { "-4" } else { "-6" };
        let ip = |netns: &Netns, args: &[&str]| {
            output(Some(netns), "ip", &[&[family], args].concat(), "").map(drop)
        };
        ip(&server.netns, &["address", "add", own, "dev", "eth0"])?;
        ip(
            &mesh.net("a")?.netns,
            &["route", "add", own, "via", &via.to_string()],
        )?;
        ip(
            &mesh.net("b")?.netns,
            &["route", "add", own, "dev", "p-server"],
        )?;
        let to = SocketAddr::new(own.parse()?, 9000);
        let hbone = SocketAddr::new(to.ip(), HBONE);
        let mut tunnel = wait::until("the address to be there", PATIENCE, || {
            Client::connect(&outside.netns, hbone, &identity).ok()
        })?;
        tunnel.ask(1, &to.to_string())?;
        tunnel.wait(peer::HEADERS)?;
        tunnel.data(1, b"by HBONE")?;
        ensure!(tunnel.wait(peer::DATA)?.payload == b"by HBONE");
        assert_echo(&outside.netns, to).context("plaintext from outside")?;
        dials += 2.0;
        let peers: Vec<_> = app.seen().iter().map(|seen| seen.peer.ip()).collect();
        ensure!(peers.ends_with(&[to.ip(); 2]), "{peers:?}");
    }
    for own in ["10.99.0.8", "fd99::8"] {
        output(
            Some(&server.netns),
            "ip",
            &["address", "add", own, "dev", "lo"],
            "",
        )?;
    }
    // From the pod itself.
    for own in ["10.99.0.7", "10.99.0.8"] {
        assert_echo(&server.netns, SocketAddr::new(own.parse()?, 9000))?;
    }
    for own in ["fd99::7", "fd99::8"] {
        assert_refused(&server.netns, SocketAddr::new(own.parse()?, 9000))?;
        dials += 1.0;
    }
    before.wait_gain("ztunnel_connections_total", &[("reason", "self_call")], 2.0)?;
    let opened = before.gained("ztunnel_connections_opened_total", &[])?;
    ensure!(opened <= 2.0 * dials, "{opened} of {dials} dials");
    Ok(())
}

// 62, 82, 96.
#[test]
fn dialling_the_proxys_own_ports_ends_without_a_loop() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let before = Before::of(&mesh.a)?;
    let mut dials = 0.0;
    for port in [15001, 15006, 15008, 15080] {
        for to in [
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
            client.at(port),
            client.at6(port),
            server.at(port),
            SocketAddr::from((VIP4, port)),
        ] {
            let fate = knock(&client.netns, to, b"hello", PATIENCE)?;
            // HBONE's own listener says what it says to everybody who speaks no TLS: an alert.
            let alert =
                matches!(&fate, Heard::Answer(b) if b.len() == 7 && b.starts_with(&[21, 3]));
            ensure!(
                is_refused(&fate) || (alert && port == HBONE),
                "{to}: {fate:?}"
            );
            dials += 1.0;
        }
    }
    // From outside, in plaintext: the ports belong to the proxy and are nobody's application, even if one
    // listens there.
    let _app = Server::start(&server.netns, 15080, apps::echo)?;
    for port in [15001, 15006, 15080] {
        let fate = knock(&mesh.net("b")?.netns, server.at(port), b"hello", PATIENCE)?;
        ensure!(is_refused(&fate), "from outside to {port}: {fate:?}");
    }
    // A loop would open connections without end; what was opened has been closed.
    let opened = before.gained("ztunnel_connections_opened_total", &[])?;
    ensure!(
        opened <= 2.0 * dials,
        "{opened} connections came of {dials} dials"
    );
    before.wait_gain("ztunnel_connections_open", &[], 0.0)?;
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    drop(app);
    Ok(())
}

// 97.
#[test]
fn a_server_that_speaks_first_is_heard_without_a_byte_from_the_client() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let banner = "220 the server speaks first\r\n";
    let speaks = apps::banner(banner);
    let server = mesh.pod("server")?;
    let near = mesh.pod("near")?;
    let _far = Server::start(&server.netns, 9000, speaks)?;
    let _near = Server::start(&near.netns, 9000, apps::banner(banner))?;
    let client = &mesh.pod("client")?.netns;
    for (name, from, to) in [
        ("over HBONE", client, server.at(9000)),
        ("over HBONE by IPv6", client, server.at6(9000)),
        ("to a service", client, (VIP4, 80).into()),
        ("on the same node", client, near.at(9000)),
        (
            "in plaintext from outside",
            &mesh.net("b")?.netns,
            server.at(9000),
        ),
    ] {
        let heard = apps::listen_first(from, to, banner.len()).context(name)?;
        assert_eq!(heard.1, banner.as_bytes(), "{name}");
    }
    Ok(())
}

// 33 (either form: over HBONE or in the process), 87.
#[test]
fn pods_of_one_node_reach_each_other_as_themselves() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let (client, near) = (mesh.pod("client")?, mesh.pod("near")?);
    let app = Server::start(&near.netns, 9000, apps::whoami)?;
    let node = &mesh.net("a")?.netns;
    for to in [near.at(9000), near.at6(9000)] {
        let mark = mesh.a.log().mark();
        let cables = [Sniffer::on(node, "p-client")?, Sniffer::on(node, "p-near")?];
        let request = b"GET / HTTP/1.0\r\nX-Canary: kanarienvogel\r\n\r\n";
        let reply = apps::ask(&client.netns, to, request)?;
        assert_eq!(reply.peer, to);
        let seen = app.seen().last().copied().context("nobody came")?;
        let own = if to.is_ipv4() {
            client.at(0)
        } else {
            client.at6(0)
        };
        assert_eq!((seen.peer.ip(), seen.local), (own.ip(), to));
        for cable in cables {
            assert_eq!(cable.seen()?.count(b"kanarienvogel")?, 0);
        }
        let (from, with) = (client.spiffe_id(), near.spiffe_id());
        let ends = [
            ("src.identity", from.as_str()),
            ("dst.identity", with.as_str()),
        ];
        let outbound = mesh
            .a
            .wait_access(mark, &[&ends[..], &[("direction", "outbound")]].concat())?;
        let inbound = mesh
            .a
            .wait_access(mark, &[&ends[..], &[("direction", "inbound")]].concat())?;
        assert_eq!(
            number(&outbound, "bytes_sent")?,
            number(&inbound, "bytes_recv")?
        );
    }
    Ok(())
}

// 87.
#[test]
fn a_pod_reaches_itself_by_address_and_by_service() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let client = mesh.pod("client")?;
    let _app = Server::start(&client.netns, 9000, apps::echo)?;
    for to in [
        client.at(9000),
        client.at6(9000),
        SocketAddr::from((Ipv4Addr::LOCALHOST, 9000)),
        SocketAddr::from((SELF_VIP, 80)),
    ] {
        assert_echo(&client.netns, to)?;
    }
    Ok(())
}

#[test]
fn real_programs_talk_and_nothing_that_a_pod_sees_has_changed() -> Result<()> {
    let topology = pods().build()?;
    let file = file(&topology);
    let namespaces: Vec<Netns> = topology
        .pods()
        .iter()
        .map(|pod| pod.netns.clone())
        .collect();
    let state = || {
        namespaces
            .iter()
            .map(inspect::Eth0::of)
            .collect::<Result<Vec<_>>>()
    };
    let before = state()?;
    let settings = Settings::of(&topology)?;
    let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let nginx = Nginx::start(&server.netns, 9000, &mesh.topology.directory()?)?;
    let sniffer = mesh.sniffer()?;
    for (to, own, at) in [
        (server.at(9000), client.at(0), server.at(9000)),
        (server.at6(9000), client.at6(0), server.at6(9000)),
        (SocketAddr::from((VIP4, 80)), client.at(0), server.at(9000)),
        (
            SocketAddr::from((VIP6, 80)),
            client.at6(0),
            server.at6(9000),
        ),
    ] {
        let fetched = curl(&client.netns, to, "/whoami", &["X-Canary: kanarienvogel"])?;
        assert_eq!((fetched.status, fetched.peer), (200, to));
        assert_eq!(fetched.local.ip(), own.ip());
        assert_eq!(
            fetched.body,
            format!("peer={}\nserver={}\n", own.ip(), at.ip())
        );
    }
    // It writes its line once the answer is gone.
    wait::until("nginx's lines", PATIENCE, || {
        (nginx.requests().ok()?.len() >= 4).then_some(())
    })?;
    assert_eq!(nginx.requests()?.len(), 4);
    assert_eq!(sniffer.seen()?.count(b"kanarienvogel")?, 0);
    assert_eq!(state()?, before, "eth0 of a pod has changed");
    for netns in namespaces.iter().chain([mesh.a.netns(), mesh.b.netns()]) {
        inspect::no_packet_filter(netns)?;
    }
    Ok(())
}

// 158: keepalive shows as a timer, on the accepted socket and on the tunnel.
#[test]
fn relayed_sockets_have_keepalive_and_follow_the_setting() -> Result<()> {
    let topology = pods().build()?;
    let file = file(&topology);
    let settings = Settings::of(&topology)?;
    let of_node = |node: &str| match node {
        "b" => settings.clone().env("KEEPALIVE_ENABLED", "false"),
        _ => settings.clone(),
    };
    let mesh = Mesh::run(topology, |node| file.for_node(node), of_node)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    crate::mesh::assert_alive(&mut stream)?;
    let alive = |node: &Node, netns: &Netns| -> Result<usize> {
        let text = output(Some(netns), "ss", &["-tnpoH"], "")?;
        let ours = format!("pid={},", node.pid());
        let mut ours = text.lines().filter(|line| line.contains(&ours)).peekable();
        ensure!(
            ours.peek().is_some(),
            "no socket of the node process in {netns}:\n{text}"
        );
        Ok(ours
            .filter(|line| line.contains("timer:(keepalive,"))
            .count())
    };
    // While something is not acknowledged, the kernel shows the timer of that.
    wait::until("accepted socket and tunnel", PATIENCE, || {
        let alive = alive(&mesh.a, &client.netns);
        (!matches!(alive, Ok(0 | 1))).then_some(alive)
    })??;
    assert_eq!(alive(&mesh.b, &server.netns)?, 0, "switched off");
    Ok(())
}

fn bracketed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

const VIP4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1);
const EMPTY_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 2);
const SELF_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 3);
const HOST_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 4);
