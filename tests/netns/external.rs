//! Capture by somebody else's rules: what applications, peers and policies see is the same, nothing
//! loops, and rules and programs in one pod do not capture the same connection twice.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
};

use anyhow::{Context as _, Result, ensure};
use domain::base::Rtype;
use nix::sys::signal::Signal;
use ztunnel_tests::{
    apps::{self, Heard, Server},
    dns::{self, Answer, Resolver, Socket, ask, ask_tcp, question, reply},
    meshfile::MeshFile,
    netns::Netns,
    process::output,
    rules,
    topology::{Builder, LINK, NodeNet, Topology},
    wait,
    wire::Sniffer,
    ztunnel::{Node, Settings},
};

use crate::{
    agent::{Agented, readiness, succeeds, wait_metric},
    mesh::{
        Before, PATIENCE, REQUEST, assert_alive, assert_echo, assert_refused, is_refused, knock,
    },
    plaintext,
};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b")
}

fn vip() -> IpAddr {
    IpAddr::from([10, 96, 0, 7])
}

fn mesh(topology: &Topology) -> MeshFile {
    MeshFile::of(topology)
        .without("outside")
        .service("echo", &[vip()], &[(80, 9000)], &["server"])
}

/// Rules in every pod of the mesh.
fn with_rules() -> Result<Topology> {
    let topology = pods().build()?;
    for pod in ["client", "server"] {
        rules::install(&topology.pod(pod)?.netns)?;
    }
    Ok(topology)
}

/// Both nodes with their agents; `outside` is nobody's.
fn agented(
    topology: &Topology,
    file: &MeshFile,
    settings: &Settings,
) -> Result<(Agented, Agented)> {
    let start = |node: &str, pod: &str| -> Result<Agented> {
        let mut started =
            Agented::launch(topology, node, &file.clone().unlisted(), settings.clone())?;
        succeeds(started.peer.add(pod, topology.pod(pod)?))?;
        succeeds(started.peer.snapshot_sent())?;
        started.node.wait_ready()?;
        Ok(started)
    };
    Ok((start("a", "client")?, start("b", "server")?))
}

/// One connection from `client` to `to` is one outbound and one inbound connection, each with the
/// right ends, and no byte of it is on the cable.
fn assert_carried_once(topology: &Topology, a: &Node, b: &Node, to: SocketAddr) -> Result<()> {
    let (client, server) = (topology.pod("client")?, topology.pod("server")?);
    let sniffer = Sniffer::on(&topology.node("a")?.netns, LINK)?;
    let (mark_a, mark_b) = (a.log().mark(), b.log().mark());
    let (before_a, before_b) = (Before::of(a)?, Before::of(b)?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let reply = apps::ask(&client.netns, to, CANARY)?;
    ensure!(reply.bytes == CANARY && reply.peer == to, "{reply:?}");
    let seen = app.wait_seen(1, PATIENCE)?;
    let own = if to.is_ipv4() {
        client.at(0)
    } else {
        client.at6(0)
    };
    let came: Vec<_> = seen.iter().map(|seen| seen.peer.ip()).collect();
    ensure!(came == [own.ip()], "{seen:?}");
    let source = reply.local.to_string();
    a.wait_access(mark_a, &[("direction", "outbound"), ("src.addr", &source)])?;
    let account = format!("\"{}\"", client.spiffe_id());
    let line = b.wait_access(mark_b, &[("direction", "inbound"), ("reason", "complete")])?;
    let identity = line.get("src.identity").unwrap_or_default();
    ensure!(
        account.contains(identity) && !identity.is_empty(),
        "{line:?}"
    );
    let all = "ztunnel_connections_total";
    before_a.wait_gain(all, &[("direction", "outbound")], 1.0)?;
    before_b.wait_gain(all, &[("direction", "inbound")], 1.0)?;
    ensure!(before_a.gained(all, &[("direction", "inbound")])? < 0.5);
    ensure!(before_b.gained(all, &[("direction", "outbound")])? < 0.5);
    let wire = sniffer.seen()?;
    ensure!(wire.count(CANARY)? == 0, "plaintext on the cable");
    ensure!(
        wire.segments_on(9000).next().is_none(),
        "the application's port on the cable"
    );
    Ok(())
}

// B080.
#[test]
fn redirected_connections_are_carried_as_captured_ones_are() -> Result<()> {
    let topology = with_rules()?;
    let settings = Settings::of(&topology)?;
    let (a, b) = agented(&topology, &mesh(&topology), &settings)?;
    let server = topology.pod("server")?;
    for to in [
        server.at(9000),
        server.at6(9000),
        SocketAddr::new(vip(), 80),
    ] {
        assert_carried_once(&topology, &a.node, &b.node, to).with_context(|| to.to_string())?;
    }
    Ok(())
}

#[test]
fn redirected_plaintext_is_judged_and_relayed_from_its_own_source() -> Result<()> {
    let topology = with_rules()?;
    let settings = Settings::of(&topology)?;
    let (_a, b) = agented(&topology, &mesh(&topology), &settings)?;
    let (outside, server) = (topology.pod("outside")?, topology.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (to, from) in [
        (server.at(9000), outside.at(0)),
        (server.at6(9000), outside.at6(0)),
    ] {
        let mark = b.node.log().mark();
        let reply = apps::ask(&outside.netns, to, REQUEST)?;
        ensure!(reply.bytes == REQUEST && reply.peer == to, "{reply:?}");
        let seen = app.seen().last().copied().context("nobody came")?;
        ensure!((seen.peer.ip(), seen.local) == (from.ip(), to), "{seen:?}");
        let source = reply.local.to_string();
        b.node
            .wait_access(mark, &[("src.addr", &source), ("reason", "complete")])?;
    }
    drop((_a, b));
    let strict = plaintext::strict(&topology);
    let (_a, _b) = agented(&topology, &strict, &settings)?;
    assert_refused(&outside.netns, server.at(9000))?;
    assert_refused(&outside.netns, server.at6(9000))?;
    assert_echo(&topology.pod("client")?.netns, server.at(9000)).context("HBONE")
}

// 62, 96.
#[test]
fn dialling_the_ports_that_rules_redirect_to_ends_without_a_loop() -> Result<()> {
    let topology = with_rules()?;
    let settings = Settings::of(&topology)?;
    let (a, b) = agented(&topology, &mesh(&topology), &settings)?;
    let (client, outside) = (topology.pod("client")?, topology.pod("outside")?);
    let server = topology.pod("server")?;
    // An address of the pod that the mesh does not know.
    let unknown = SocketAddr::from(([10, 99, 0, 1], 15001));
    output(
        Some(&client.netns),
        "ip",
        &["address", "add", "10.99.0.1/32", "dev", "lo"],
        "",
    )?;
    let before = Before::of(&a.node)?;
    for port in [15001, 15006, 15008] {
        for to in [
            SocketAddr::from(([127, 0, 0, 1], port)),
            SocketAddr::from(([127, 0, 0, 2], port)),
            client.at(port),
            client.at6(port),
            SocketAddr::new(unknown.ip(), port),
        ] {
            let heard = knock(&client.netns, to, REQUEST, PATIENCE)?;
            ensure!(is_over(&heard), "inside, {to}: {heard:?}");
        }
        for to in [server.at(port), server.at6(port)] {
            let heard = knock(&outside.netns, to, REQUEST, PATIENCE)?;
            ensure!(is_over(&heard), "outside, {to}: {heard:?}");
        }
    }
    before.wait_gain("ztunnel_connections_total", &[("reason", "self_call")], 5.0)?;
    before.wait_gain("ztunnel_connections_opened_total", &[], 15.0)?;
    wait_metric(&a.node, "ztunnel_connections_open", 0.0)?;
    wait_metric(&b.node, "ztunnel_connections_open", 0.0)
}

// Rules of an agent are in the pods already, and our programs capture.
#[test]
fn rules_and_programs_in_one_pod_capture_nothing_twice_and_leak_nothing() -> Result<()> {
    let topology = with_rules()?;
    let file = mesh(&topology);
    let settings = Settings::of(&topology)?;
    let start = |node: &str| Node::start(&topology, node, &file.for_node(node), settings.clone());
    let (a, mut b) = (start("a")?, start("b")?);
    let (outside, server) = (topology.pod("outside")?, topology.pod("server")?);
    for to in [
        server.at(9000),
        server.at6(9000),
        SocketAddr::new(vip(), 80),
    ] {
        assert_carried_once(&topology, &a, &b, to).with_context(|| to.to_string())?;
    }
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (to, from) in [
        (server.at(9000), outside.at(0)),
        (server.at6(9000), outside.at6(0)),
    ] {
        let before = Before::of(&b)?;
        let reply = apps::ask(&outside.netns, to, REQUEST)?;
        ensure!(reply.bytes == REQUEST && reply.peer == to, "{reply:?}");
        let seen = app.seen().last().copied().context("nobody came")?;
        ensure!((seen.peer.ip(), seen.local) == (from.ip(), to), "{seen:?}");
        before.wait_gain(
            "ztunnel_connections_total",
            &[("direction", "inbound")],
            1.0,
        )?;
    }
    // With the process gone both keep the pod closed.
    b.kill()?;
    assert_refused(&outside.netns, server.at(9000))?;
    assert_refused(&outside.netns, server.at6(9000))
}

// B076, B077.
#[test]
fn a_pod_whose_port_is_taken_is_pending_until_the_port_is_free() -> Result<()> {
    let topology = pods().build()?;
    let (client, outside) = (topology.pod("client")?, topology.pod("outside")?);
    let thief = client.netns.listen(client.at(15008))?;
    let file = MeshFile::of(&topology).unlisted();
    let mut a = Agented::launch(&topology, "a", &file, Settings::of(&topology)?)?;
    let answer = a.peer.add("client", client)?;
    ensure!(answer.contains("HBONE"), "{answer}");
    succeeds(a.peer.add("outside", outside))?;
    succeeds(a.peer.snapshot_sent())?;
    wait_metric(&a.node, "workload_manager_pending_proxy_count", 1.0)?;
    let (status, body) = readiness(&a.node)?;
    ensure!(
        (status, body.contains("workload proxy manager")) == (500, true),
        "{body}"
    );
    drop(thief);
    a.node.wait_ready()?;
    wait_metric(&a.node, "workload_manager_pending_proxy_count", 0.0)?;
    wait_metric(&a.node, "workload_manager_active_proxy_count", 2.0)
}

// B081: two processes in the pods of one node at once; the one that leaves says goodbye.
#[test]
fn a_second_process_serves_the_same_pods_while_the_first_leaves() -> Result<()> {
    let topology = with_rules()?;
    let file = mesh(&topology);
    let settings = Settings::of(&topology)?.env("CONNECTION_TERMINATION_DEADLINE", "60s");
    let (mut a, _b) = agented(&topology, &file, &settings)?;
    let (client, server) = (topology.pod("client")?, topology.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut old = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut old)?;
    let _new = successor(&topology, &a, &file, settings)?;
    assert_echo(&client.netns, server.at(9000)).context("by the new process")?;
    assert_alive(&mut old).context("by the old one")?;
    drop(old);
    let status = a.node.wait_exit(PATIENCE)?;
    ensure!(status.success(), "{status}");
    for _ in 0..8 {
        assert_echo(&client.netns, server.at(9000)).context("after the old one has gone")?;
    }
    Ok(())
}

/// Tells the process of node `a` to leave, and starts another one, which serves `client`.
fn successor(
    topology: &Topology,
    a: &Agented,
    file: &MeshFile,
    settings: Settings,
) -> Result<Node> {
    a.node.signal(Signal::SIGTERM)?;
    for port in [15000, 15020, 15021] {
        let at = SocketAddr::from(([127, 0, 0, 1], port));
        wait::until("its own ports to close", PATIENCE, || {
            let open = a.node.netns().dial(at, PATIENCE);
            open.is_err().then_some(())
        })?;
    }
    let path = a.agent.path().to_string_lossy().into_owned();
    let file = file.clone().unlisted().for_node("a");
    let settings = settings.env("INPOD_UDS", &path);
    let mut new = Node::launch(topology, "a", &file, settings)?;
    let peer = a.agent.accept()?;
    succeeds(peer.add("client", topology.pod("client")?))?;
    succeeds(peer.snapshot_sent())?;
    new.wait_ready()?;
    Ok(new)
}

// All workers take from one queue of each kind, and the ports are free as soon as the process leaves.
#[test]
fn without_shared_ports_and_without_ipv6_pods_are_served_by_one_process_after_the_other()
-> Result<()> {
    let topology = with_rules()?;
    let file = mesh(&topology);
    let settings = Settings::of(&topology)?
        .env("CONNECTION_TERMINATION_DEADLINE", "60s")
        .env("INPOD_PORT_REUSE", "false")
        .env("IPV6_ENABLED", "false")
        .env("ZTUNNEL_WORKER_THREADS", "3");
    let (a, b) = agented(&topology, &file, &settings)?;
    let (client, server) = (topology.pod("client")?, topology.pod("server")?);
    for _ in 0..8 {
        assert_carried_once(&topology, &a.node, &b.node, server.at(9000))?;
    }
    assert_refused(&client.netns, server.at6(9000))?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut old = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut old)?;
    let _new = successor(&topology, &a, &file, settings)?;
    assert_echo(&client.netns, server.at(9000)).context("by the new process")?;
    assert_alive(&mut old).context("by the old one")
}

#[test]
fn pods_that_programs_capture_are_not_left_closed_by_a_change_of_means() -> Result<()> {
    let topology = pods().build()?;
    let settings = Settings::of(&topology)?;
    let file = MeshFile::of(&topology);
    let mut node = Node::start(&topology, "a", &file.for_node("a"), settings.clone())?;
    node.kill()?;
    let changed = settings.env("CAPTURE", "external");
    let mut refused = Node::launch(&topology, "a", &file.for_node("a"), changed)?;
    let status = refused.wait_exit(PATIENCE)?;
    ensure!(!status.success(), "{status}");
    let said = |line: &str| line.contains("ztunnel release").then_some(());
    refused.log().wait_for("the remedy", PATIENCE, said)?;
    Ok(())
}

// Rules bring whatever reaches the pod.
#[test]
fn what_a_pod_only_forwards_is_refused_and_what_is_for_another_device_of_it_is_not() -> Result<()> {
    let topology = with_rules()?;
    let settings = Settings::of(&topology)?;
    let (_a, b) = agented(&topology, &mesh(&topology), &settings)?;
    let (outside, server) = (topology.pod("outside")?, topology.pod("server")?);
    let own = IpAddr::from([10, 99, 0, 7]);
    let ip = |netns: &Netns, args: &[&str]| output(Some(netns), "ip", args, "").map(drop);
    ip(
        &server.netns,
        &["address", "add", "10.99.0.7/32", "dev", "eth0"],
    )?;
    let hop = server.v4.to_string();
    let (node_a, node_b) = (topology.node("a")?, topology.node("b")?);
    for to in [NOBODY, own] {
        let to = to.to_string();
        ip(
            &node_a.netns,
            &["route", "add", &to, "via", &node_b.v4.to_string()],
        )?;
        ip(
            &node_b.netns,
            &[
                "route",
                "add",
                &to,
                "via",
                &hop,
                "onlink",
                "dev",
                &host_device(node_b, &hop)?,
            ],
        )?;
    }
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = b.node.log().mark();
    assert_refused(&outside.netns, SocketAddr::new(NOBODY, 9000))?;
    let to = SocketAddr::new(NOBODY, 9000).to_string();
    b.node.wait_access(
        mark,
        &[
            ("dst.addr", &to),
            ("reason", "bad_destination"),
            ("direction", "inbound"),
        ],
    )?;
    ensure!(app.seen().is_empty(), "{:?}", app.seen());
    assert_echo(&outside.netns, SocketAddr::new(own, 9000))
}

/// The node's device that leads to a pod.
fn host_device(node: &NodeNet, pod: &str) -> Result<String> {
    let said = output(Some(&node.netns), "ip", &["route", "get", pod], "")?;
    let mut words = said.split_whitespace().skip_while(|word| *word != "dev");
    words.nth(1).map(str::to_owned).context(said.clone())
}

// B065, B112. Whom a datagram was meant for the rules do not tell; a connection they do.
#[test]
fn redirected_questions_are_answered_or_go_to_the_resolvers_of_the_process() -> Result<()> {
    let topology = pods().build()?;
    let (client, outside) = (topology.pod("client")?, topology.pod("outside")?);
    rules::install_with_dns(&client.netns)?;
    let host = topology.node("b")?;
    let resolver = Resolver::start(&host.netns, &[host.v4.into(), host.v6.into()])?;
    let mut settings = Settings::of(&topology)?.env("RUST_LOG", "info,dns=debug");
    // The first one is nobody's.
    settings.binary = with_resolvers(&topology, settings.binary, &[NOBODY, host.v4.into()])?;
    let file = mesh(&topology);
    let mut a = Agented::launch(&topology, "a", &file.unlisted(), settings)?;
    succeeds(a.peer.add("client", client))?;
    succeeds(a.peer.snapshot_sent())?;
    a.node.wait_ready()?;
    let ours = question(1, NAME, Rtype::A, true);
    let others = question(2, "outside.example", Rtype::A, true);
    let known = [format!("{NAME} 30 {}", vip())];
    let at = |ip: IpAddr| SocketAddr::new(ip, dns::PORT);
    for to in [at(NOBODY), at(host.v6.into())] {
        for kind in [Socket::Connected, Socket::Unconnected] {
            let answer = Answer::read(&ask(&client.netns, kind, to, &ours)?)?;
            ensure!(answer.records == known, "{kind:?} to {to}: {answer:?}");
            ensure!(resolver.seen().is_empty(), "{kind:?} to {to}");
            // A resolver on a slow machine may be too late once; who asks asks again.
            wait::until("the resolver's answer", PATIENCE, || {
                let answer = ask(&client.netns, kind, to, &others);
                (answer.ok() == reply(&others)).then_some(())
            })?;
            let seen = resolver.take();
            ensure!(!seen.is_empty(), "{kind:?} to {to}");
            ensure!(
                seen.iter()
                    .all(|seen| seen.bytes == others && seen.from == client.at(0).ip()),
                "{kind:?} to {to}: {seen:?}"
            );
        }
    }
    for to in [at(host.v4.into()), at(host.v6.into())] {
        let answers = ask_tcp(&client.netns, to, &[ours.clone(), others.clone()])?;
        ensure!(
            answers
                .iter()
                .any(|answer| Some(answer) == reply(&others).as_ref()),
            "{to}"
        );
        let records = answers
            .iter()
            .map(|answer| Answer::read(answer).map(|answer| answer.records));
        let records: Vec<_> = records.collect::<Result<_>>()?;
        ensure!(records.contains(&known.to_vec()), "{to}: {records:?}");
        let seen = resolver.take();
        ensure!(seen.len() == 1 && seen.iter().all(|seen| seen.tcp), "{to}");
    }
    // The rules bring us even what is for a resolver in the pod itself.
    let own = IpAddr::from([127, 0, 0, 53]);
    let inside = Resolver::start(&client.netns, &[own])?;
    let answers = ask_tcp(&client.netns, at(own), std::slice::from_ref(&others))?;
    ensure!(answers.first() == reply(&others).as_ref(), "{answers:?}");
    ensure!(inside.seen().len() == 1 && resolver.take().is_empty());
    // The ports are the pod's own affair.
    let other = dns::socket(&outside.netns, Socket::Connected, client.at(15053))?;
    other.connect(client.at(15053))?;
    other.send(&ours)?;
    other.set_read_timeout(Some(PATIENCE))?;
    let refused = other.recv(&mut [0; 64]).map_err(|error| error.kind());
    ensure!(
        refused == Err(std::io::ErrorKind::ConnectionRefused),
        "{refused:?}"
    );
    let mark = a.node.log().mark();
    assert_refused(&outside.netns, client.at(15053))?;
    let nobody = [("reason", "connect_failed"), ("direction", "inbound")];
    a.node.wait_access(mark, &nobody)?;
    Ok(())
}

// B112.
#[test]
fn without_dns_capture_nobody_hears_questions_on_the_port_of_the_rules() -> Result<()> {
    let topology = pods().build()?;
    let client = topology.pod("client")?;
    let settings = Settings::of(&topology)?.env("ISTIO_META_DNS_CAPTURE", "false");
    let mut a = Agented::launch(&topology, "a", &mesh(&topology).unlisted(), settings)?;
    succeeds(a.peer.add("client", client))?;
    succeeds(a.peer.snapshot_sent())?;
    a.node.wait_ready()?;
    let ours = question(1, NAME, Rtype::A, true);
    for to in [client.at(15053), SocketAddr::from(([127, 0, 0, 1], 15053))] {
        let socket = dns::socket(&client.netns, Socket::Connected, to)?;
        socket.connect(to)?;
        socket.send(&ours)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let refused = socket.recv(&mut [0; 64]).map_err(|error| error.kind());
        ensure!(
            refused == Err(std::io::ErrorKind::ConnectionRefused),
            "{to}: {refused:?}"
        );
        assert_refused(&client.netns, to)?;
    }
    Ok(())
}

/// The program in a world where `/etc/resolv.conf` names these.
fn with_resolvers(topology: &Topology, program: PathBuf, resolvers: &[IpAddr]) -> Result<PathBuf> {
    let directory = topology.directory()?;
    let (conf, wrapper) = (directory.join("resolv.conf"), directory.join("wrapper"));
    let text: String = resolvers
        .iter()
        .map(|resolver| format!("nameserver {resolver}\n"))
        .collect();
    fs::write(&conf, text)?;
    let script = format!(
        "#!/bin/sh\nexec unshare --mount sh -c 'mount --bind {} /etc/resolv.conf && exec {} \"$@\"' sh \"$@\"\n",
        conf.display(),
        program.display()
    );
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    Ok(wrapper)
}

/// Refused, at most with the alert of a TLS server that met no client.
fn is_over(heard: &Heard) -> bool {
    is_refused(heard) || matches!(heard, Heard::Answer(bytes) if bytes.first() == Some(&ALERT))
}

/// The type of a TLS record that says what went wrong.
const ALERT: u8 = 21;

/// An address that nobody has.
const NOBODY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 9));
const NAME: &str = "echo.demo.svc.cluster.local";
const CANARY: &[u8] = b"kanarienvogel-redirected";
