//! The node process dies without warning: pods wait, nothing leaks, and it goes on where it stopped.

use std::{
    io::ErrorKind,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Heard, Server},
    inspect::{self, Routing},
    load::{Attempt, Load, Outcome},
    meshfile::MeshFile,
    topology::{Builder, Topology},
    wait,
    wire::Capture,
    ztunnel::HBONE,
};

use crate::mesh::{Mesh, PATIENCE, WATCH, assert_echo, assert_refused, knock};

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "b")
}

/// Nothing of the application on the link: no byte, no SYN to its port, nothing but HBONE.
fn nothing_leaked(seen: &Capture) -> Result<()> {
    ensure!(seen.count(CANARY)? == 0, "plaintext on the link");
    let other = seen
        .segments()
        .find(|s| s.src.port() != HBONE && s.dst.port() != HBONE);
    ensure!(other.is_none(), "on the link: {other:?}");
    Ok(())
}

/// No attempt that began at `since` or later came to nothing.
fn all_answered_since(attempts: &[Attempt], since: Instant) -> Result<usize> {
    let later: Vec<_> = attempts.iter().filter(|a| a.began >= since).collect();
    let bad: Vec<_> = later
        .iter()
        .filter(|a| a.outcome != Outcome::Answered)
        .take(5)
        .collect();
    ensure!(bad.is_empty(), "of {} attempts: {bad:?}", later.len());
    Ok(later.len())
}

#[test]
fn killed_under_load_the_pod_waits_and_goes_on_and_nothing_leaks() -> Result<()> {
    let mut mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = mesh.sniffer()?;
    for to in [server.at(9000), server.at6(9000)] {
        let load = Load::start(&client.netns, to, CANARY, 4, PATIENCE);
        load.wait_answered(Instant::now(), 20, PATIENCE)?;
        mesh.a.kill()?;
        let dead = Instant::now();
        let waiting = || inspect::unanswered_syns(&client.netns, 9000).ok();
        // Not all of them: the last packet of a handshake that was cut in half by the kill is dropped, as
        // all is that has nobody to go to, and its client waits for an answer to its bytes.
        wait::until("a worker to wait with its SYN", PATIENCE, || {
            (waiting()? >= 1).then_some(())
        })?;
        // They stay so: none is refused, none finds another way.
        ensure!(
            matches!(
                knock(&client.netns, to, CANARY, WATCH)?,
                Heard::NotConnected(ErrorKind::TimedOut)
            ),
            "a connect without a process"
        );
        nothing_leaked(&sniffer.seen()?)?;
        mesh.a.restart()?;
        mesh.a.wait_ready()?;
        load.wait_answered(dead, 20, PATIENCE)
            .context("after the restart")?;
        let attempts = load.finish()?;
        let answered = all_answered_since(&attempts, dead)?;
        ensure!(answered >= 20, "{answered} answered");
        let waited = attempts
            .iter()
            .any(|a| a.began < dead + WATCH && a.ended > dead + WATCH);
        ensure!(waited, "nobody had to wait");
        nothing_leaked(&sniffer.seen()?)?;
    }
    Ok(())
}

#[test]
fn killed_again_and_again_under_load_nothing_leaks() -> Result<()> {
    let mut mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = mesh.sniffer()?;
    let loads = [server.at(9000), server.at6(9000)]
        .map(|to| Load::start(&client.netns, to, CANARY, 4, PATIENCE));
    for round in 0..5 {
        // Early rounds kill it while it starts.
        if round >= 3 {
            mesh.a.wait_ready()?;
        }
        mesh.a.kill()?;
        mesh.a.restart()?;
    }
    mesh.a.wait_ready()?;
    let last = Instant::now();
    for load in loads {
        load.wait_answered(last, 20, PATIENCE)?;
        let attempts = load.finish()?;
        all_answered_since(&attempts, last)?;
        // A connect may wait, and what was open when it died is cut; none is refused.
        let refused = Outcome::NotConnected(ErrorKind::ConnectionRefused);
        ensure!(
            attempts.iter().all(|a| a.outcome != refused),
            "a connect was refused"
        );
    }
    nothing_leaked(&sniffer.seen()?)
}

#[test]
fn killed_on_the_servers_node_the_application_is_closed_not_open() -> Result<()> {
    let mut mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    let outside = mesh.net("a")?.netns.clone();
    assert_echo(&outside, server.at(9000))?;
    let seen = app.seen().len();
    mesh.b.kill()?;
    assert_refused(&client.netns, server.at(9000))?;
    for to in [server.at(9000), server.at6(9000)] {
        let fate = knock(&outside, to, CANARY, PATIENCE)?;
        ensure!(!fate.answered(), "plaintext without a process: {fate:?}");
    }
    assert_eq!(app.seen().len(), seen, "the application was reached");
    mesh.b.restart()?;
    mesh.b.wait_ready()?;
    assert_echo(&client.netns, server.at(9000))?;
    assert_echo(&outside, server.at(9000))
}

#[test]
fn release_undoes_everything_and_traffic_is_plain_again() -> Result<()> {
    let topology = pods().build()?;
    let pods = topology.pods().to_vec();
    let state = || {
        pods.iter()
            .map(|pod| Routing::of(&pod.netns))
            .collect::<Result<Vec<_>>>()
    };
    let before = state()?;
    let file = MeshFile::of(&topology);
    let settings = ztunnel_tests::ztunnel::Settings::of(&topology)?;
    let mut mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    assert_ne!(
        state()?,
        before,
        "enrolment should show in the routing of a pod"
    );
    mesh.a.kill()?;
    mesh.b.kill()?;
    for node in [&mesh.a, &mesh.b] {
        ensure!(node.pins().exists(), "the pins of a dead process");
        node.release()?;
        ensure!(
            !node.pins().exists(),
            "pins are left: {}",
            node.pins().display()
        );
        node.release()
            .context("a second release finds nothing to do")?;
    }
    assert_eq!(state()?, before, "the routing of a pod is as it was");
    let sniffer = mesh.sniffer()?;
    for to in [server.at(9000), server.at6(9000)] {
        let reply = apps::ask(&client.netns, to, CANARY)?;
        assert_eq!(reply.bytes, CANARY);
    }
    ensure!(sniffer.seen()?.contains(CANARY)?, "traffic should be plain");
    // And back into the mesh.
    mesh.a.restart()?;
    mesh.b.restart()?;
    mesh.a.wait_ready()?;
    mesh.b.wait_ready()?;
    sniffer.clear()?;
    let reply = apps::ask(&client.netns, server.at(9000), CANARY)?;
    assert_eq!(reply.bytes, CANARY);
    nothing_leaked(&sniffer.seen()?)?;
    ensure!(reply.took < Duration::from_secs(30), "{:?}", reply.took);
    Ok(())
}

const CANARY: &[u8] = b"kanarienvogel-in-the-mine";
