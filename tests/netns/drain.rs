//! Signals: the node process leaves when it is told, finishes what it carries, and makes room.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use ztunnel_tests::{
    apps::{self, Heard, Server},
    http,
    load::{Load, Outcome},
    meshfile::{self, MeshFile},
    peer::{self, Client, Identity},
    topology::{Builder, Topology},
    wait,
    ztunnel::{HBONE, Node, Settings},
};

use crate::mesh::{
    Mesh, PATIENCE, REQUEST, WATCH, assert_alive, assert_echo, is_refused, knock, wait_end,
};

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "b")
}

fn with_deadline(deadline: &str) -> Result<Mesh> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology);
    let settings = Settings::of(&topology)?.env("CONNECTION_TERMINATION_DEADLINE", deadline);
    Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())
}

/// Waits until the process has closed its readiness port, which it does with all others.
fn wait_closed(node: &Node) -> Result<Duration> {
    let began = Instant::now();
    let at = SocketAddr::from(([127, 0, 0, 1], 15021));
    wait::until("readiness to close", PATIENCE, || {
        http::get(node.netns(), at, "/healthz/ready")
            .is_err()
            .then_some(())
    })?;
    Ok(began.elapsed())
}

// 148, B133.
#[test]
fn sigterm_closes_the_listeners_at_once_and_lets_connections_finish() -> Result<()> {
    for node in ["a", "b"] {
        let mut mesh = with_deadline("30s")?;
        let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
        let _app = Server::start(&server.netns, 9000, apps::echo)?;
        let mut hbone = apps::dial(&client.netns, server.at(9000))?;
        assert_alive(&mut hbone)?;
        let mut plaintext = apps::dial(&mesh.net("a")?.netns, server.at(9000))?;
        assert_alive(&mut plaintext)?;
        let leaving = if node == "a" {
            &mut mesh.a
        } else {
            &mut mesh.b
        };
        leaving.signal(Signal::SIGTERM)?;
        let took = wait_closed(leaving)?;
        ensure!(took < SOON, "it took {took:?} to close");
        // The workers close their listeners a moment later; what they had taken by then is still served. From then on
        // outbound waits, and inbound is refused.
        let mut last = None;
        wait::until("new connections to end", PATIENCE, || {
            let new = knock(&client.netns, server.at(9000), REQUEST, WATCH).ok()?;
            let ended = if node == "a" {
                new == Heard::NotConnected(ErrorKind::TimedOut)
            } else {
                is_refused(&new)
            };
            last = Some(new);
            ended.then_some(())
        })
        .with_context(|| format!("the last attempt: {last:?}"))?;
        assert_alive(&mut hbone).context("HBONE while draining")?;
        assert_alive(&mut plaintext).context("plaintext while draining")?;
        ensure!(
            leaving.wait_exit(WATCH).is_err(),
            "it left before its connections"
        );
        drop(hbone);
        drop(plaintext);
        let status = leaving.wait_exit(PATIENCE)?;
        ensure!(status.success(), "{status}");
        let lines = leaving.access_lines();
        let complete = lines
            .iter()
            .filter(|l| l.has(&[("reason", "complete"), ("bytes_sent", "34")]));
        ensure!(complete.count() >= 1, "{lines:?}");
    }
    Ok(())
}

// B137. A peer with an open stream is asked to open its next tunnel elsewhere, and keeps its stream;
// one whose pod goes is told at once that there will be no more.
#[test]
fn peers_are_told_goodbye_when_the_process_goes_and_when_a_pod_goes() -> Result<()> {
    let topology = pods().pod("outside", "a").build()?;
    let file = MeshFile::of(&topology).without("outside");
    let settings = Settings::of(&topology)?.env("CONNECTION_TERMINATION_DEADLINE", "60s");
    let mut mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (outside, server) = (mesh.pod("outside")?.clone(), mesh.pod("server")?.clone());
    let identity = Identity::signed(&mesh.topology, &outside.spiffe_id())?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let open = || -> Result<Client> {
        let mut tunnel = Client::connect(&outside.netns, server.at(HBONE), &identity)?;
        tunnel.ask(1, &server.at(9000).to_string())?;
        tunnel.wait(peer::HEADERS)?;
        Ok(tunnel)
    };
    let mut tunnel = open()?;
    mesh.b
        .replace_file(&file.clone().without("server").for_node("b"))?;
    ensure!(tunnel.wait_end()? == Some(NO_ERROR));
    mesh.b.replace_file(&file.for_node("b"))?;
    let mut tunnel = wait::until("the pod to be served again", PATIENCE, || open().ok())?;
    mesh.b.signal(Signal::SIGTERM)?;
    let goodbye = tunnel.wait(peer::GOAWAY)?;
    ensure!(goodbye.payload.get(4..8) == Some(&[0; 4]), "{goodbye:?}");
    tunnel.data(1, REQUEST)?;
    ensure!(
        tunnel.wait(peer::DATA)?.payload == REQUEST,
        "its stream goes on"
    );
    drop(tunnel);
    let status = mesh.b.wait_exit(PATIENCE)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

// 149, 116: a drain can take long, and policy does not wait for its end.
#[test]
fn what_policy_stops_to_admit_ends_also_during_a_drain() -> Result<()> {
    let mut mesh = with_deadline("60s")?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut hbone = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut hbone)?;
    let mut plaintext = apps::dial(&mesh.net("a")?.netns, server.at(9000))?;
    assert_alive(&mut plaintext)?;
    mesh.b.signal(Signal::SIGTERM)?;
    wait_closed(&mesh.b)?;
    assert_alive(&mut hbone).context("while draining")?;
    let nobody = meshfile::allow_accounts("no", &["client"]).replace("Allow", "Deny");
    let file = MeshFile::of(&mesh.topology)
        .policy(&nobody)
        .attach("server", "demo/no");
    let mark = mesh.b.log().mark();
    mesh.b.replace_file(&file.for_node("b"))?;
    wait_end(&hbone)?;
    mesh.b.wait_access(
        mark,
        &[("reason", "policy_revoked"), ("direction", "inbound")],
    )?;
    assert_alive(&mut plaintext).context("what the policy does not concern")?;
    drop(plaintext);
    let status = mesh.b.wait_exit(PATIENCE)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

// B135; a tunnel that nobody uses holds nothing up.
#[test]
fn an_idle_process_leaves_at_once_with_status_0() -> Result<()> {
    let mut mesh = with_deadline("30s")?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    for node in [&mut mesh.a, &mut mesh.b] {
        let began = Instant::now();
        node.signal(Signal::SIGTERM)?;
        let status = node.wait_exit(PATIENCE)?;
        ensure!(status.success(), "{status}");
        let took = began.elapsed();
        ensure!(took < SOON, "node {} took {took:?}", node.name());
    }
    Ok(())
}

// 149, B131, B134.
#[test]
fn the_deadline_ends_what_does_not_end_by_itself() -> Result<()> {
    let mut mesh = with_deadline("1s")?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    let began = Instant::now();
    mesh.a.signal(Signal::SIGTERM)?;
    wait_end(&stream)?;
    let cut = began.elapsed();
    ensure!(
        cut >= Duration::from_millis(900),
        "cut after {cut:?}, before the deadline"
    );
    mesh.a.wait_exit(PATIENCE)?;
    let took = began.elapsed();
    ensure!(took < SOON, "it took {took:?}");
    let line = mesh.a.wait_access(0, &[("reason", "drained")])?;
    ensure!(line.get("error").is_some(), "{line:?}");
    // The other node is none the worse.
    mesh.a.restart()?;
    mesh.a.wait_ready()?;
    assert_echo(&client.netns, server.at(9000))
}

// B136.
#[test]
fn two_sigints_end_it_at_once() -> Result<()> {
    let mut mesh = with_deadline("60s")?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    mesh.a.signal(Signal::SIGINT)?;
    wait_closed(&mesh.a)?;
    assert_alive(&mut stream).context("one SIGINT drains")?;
    // Whoever stops it may say so twice; only a second SIGINT is impatient.
    mesh.a.signal(Signal::SIGTERM)?;
    mesh.a.signal(Signal::SIGTERM)?;
    ensure!(mesh.a.wait_exit(WATCH).is_err(), "a SIGTERM cut the drain");
    assert_alive(&mut stream).context("and so does a SIGTERM")?;
    let began = Instant::now();
    mesh.a.signal(Signal::SIGINT)?;
    mesh.a.wait_exit(PATIENCE)?;
    let took = began.elapsed();
    ensure!(took < SOON, "it took {took:?}");
    wait_end(&stream)?;
    Ok(())
}

// 152, B138: outbound, nothing is refused; a connect waits for the new process at most.
#[test]
fn a_new_process_takes_over_while_the_old_one_drains() -> Result<()> {
    let mut mesh = with_deadline("30s")?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut old = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut old)?;
    let sniffer = mesh.sniffer()?;
    let load = Load::start(
        &client.netns,
        server.at(9000),
        b"kanarienvogel",
        4,
        PATIENCE,
    );
    load.wait_answered(Instant::now(), 20, PATIENCE)?;
    mesh.a.signal(Signal::SIGTERM)?;
    wait_closed(&mesh.a)?;
    let file = std::fs::read_to_string(mesh.a.file())?;
    let settings = Settings::of(&mesh.topology)?;
    let new = Node::start(&mesh.topology, "a", &file, settings)?;
    let taken = Instant::now();
    load.wait_answered(taken, 20, PATIENCE)?;
    let attempts = load.finish()?;
    let bad: Vec<_> = attempts
        .iter()
        .filter(|a| a.outcome != Outcome::Answered)
        .collect();
    ensure!(bad.is_empty(), "of {} attempts: {bad:?}", attempts.len());
    assert_alive(&mut old).context("the old process still carries its connection")?;
    drop(old);
    let status = mesh.a.wait_exit(PATIENCE)?;
    ensure!(status.success(), "{status}");
    assert_echo(&client.netns, server.at(9000)).context("after the old one has gone")?;
    ensure!(
        sniffer.seen()?.count(b"kanarienvogel")? == 0,
        "plaintext on the link"
    );
    drop(new);
    Ok(())
}

/// Far less than the deadline of a drain, and enough for a machine that does much else.
const SOON: Duration = Duration::from_secs(15);

/// The code of HTTP/2 for an end without an error.
const NO_ERROR: u32 = 0;
