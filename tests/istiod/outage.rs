//! A control plane that dies, leaves, hangs and cuts its streams, under traffic.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    mesh::{PATIENCE, assert_alive, assert_echo, is_refused, knock},
};

use crate::{
    asker::{Asker, QUESTION},
    world::{Plan, World, peer_authentication, poll, service, timed},
};

fn start(plan: Plan) -> Result<World> {
    plan.pod("client", "a").pod("server", "b").start()
}

// B023, B025, B027.
#[test]
fn traffic_does_not_notice_that_istiod_dies_leaves_or_hangs() -> Result<()> {
    let mut world = start(Plan::new())?;
    let (client, server) = (world.pod("client")?.clone(), world.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let vip = SocketAddr::from(([10, 96, 7, 9], 80));
    world.apply("a service", &service("web", vip, "server"), || {
        assert_echo(&client.netns, vip).ok()
    })?;
    let mut open = apps::dial(&client.netns, vip)?;
    assert_alive(&mut open)?;
    let asker = Asker::start("the client", &client.netns, &[server.at(9000), vip]);
    let plain = world.node_netns("b")?.clone();
    let is_strict = |wanted: bool| {
        let heard = knock(&plain, server.at(9000), QUESTION, PATIENCE).ok()?;
        (is_refused(&heard) == wanted).then_some(())
    };
    let strict = peer_authentication("it", "demo", "{mtls: {mode: STRICT}}");
    let object = ["-n", "demo", "delete", "peerauthentication", "it"];
    let gone = |node: &ztunnel_tests::ztunnel::Node, mark: usize| {
        let gone = |line: &str| {
            line.contains("no stream to the control plane")
                .then_some(())
        };
        node.log().wait_since(mark, "a lost stream", PATIENCE, gone)
    };

    // Killed; what changes meanwhile arrives when it is back.
    let mark = world.b.node.log().mark();
    world.cluster.kill_istiod()?;
    gone(&world.b.node, mark)?;
    world.cluster.apply(&strict)?;
    asker.wait_all_answered(ROUNDS)?;
    is_strict(false).ok_or_else(|| anyhow::anyhow!("who told it?"))?;
    let cluster = &mut world.cluster;
    timed(
        "STRICT, written while istiod was dead, counted from its return",
        || cluster.start_istiod(&[]),
        || poll("STRICT", || is_strict(true)),
    )?;

    // It leaves in order.
    let mark = world.b.node.log().mark();
    world.cluster.stop_istiod()?;
    gone(&world.b.node, mark)?;
    world.cluster.kubectl(&object, "")?;
    asker.wait_all_answered(ROUNDS)?;
    let cluster = &mut world.cluster;
    timed(
        "no STRICT, written while istiod was away, counted from its return",
        || cluster.start_istiod(&[]),
        || poll("no STRICT", || is_strict(false)),
    )?;

    // The API server hangs, and goes on.
    world.cluster.freeze_apiserver()?;
    let while_frozen = asker.wait_all_answered(ROUNDS);
    world.cluster.thaw_apiserver()?;
    while_frozen?;
    world.apply("STRICT", &strict, || is_strict(true))?;
    asker.wait_all_answered(1)?;
    assert_alive(&mut open)?;
    println!("measured: {} rounds without an error", asker.rounds());
    Ok(())
}

// An operator's limit is 30 minutes; one of seconds is met as often as a test can wait for.
#[test]
fn a_limit_on_the_age_of_connections_is_not_noticed() -> Result<()> {
    let world = start(Plan::new().istiod(&["--keepaliveMaxServerConnectionAge", "10s"]))?;
    let (client, server) = (world.pod("client")?, world.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut open = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    let asker = Asker::start("the client", &client.netns, &[server.at(9000)]);
    let mut mark = world.a.node.log().mark();
    for _ in 0..2 {
        let swapped = |line: &str| line.contains("announced its leave").then_some(());
        let log = world.a.node.log();
        log.wait_since(mark, "a swap of streams", PATIENCE, swapped)?;
        mark = log.mark();
    }
    let lost = |line: &String| line.contains("no stream to the control plane");
    let lines = world.a.node.log().lines();
    ensure!(
        !lines.iter().any(lost),
        "a stream was cut before the next was there"
    );
    // What changes arrives by the stream that came last.
    let vip = SocketAddr::from(([10, 96, 7, 9], 80));
    world.apply("a service", &service("web", vip, "server"), || {
        assert_echo(&client.netns, vip).ok()
    })?;
    asker.wait_all_answered(1)?;
    assert_alive(&mut open)?;
    println!("measured: {} rounds without an error", asker.rounds());
    Ok(())
}

/// Of questions, while nobody leads the mesh.
const ROUNDS: usize = 30;
