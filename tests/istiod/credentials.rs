//! Tokens that istiod does not accept, and that it accepts again.

use anyhow::Result;
use ztunnel_tests::{
    apps::{self, Server},
    mesh::{PATIENCE, assert_echo, is_refused, knock},
};

use crate::{
    asker::{Asker, QUESTION},
    world::{Plan, peer_authentication, poll, timed},
};

// B026, B032.
#[test]
fn a_token_that_is_refused_stops_no_traffic_and_a_good_one_needs_no_restart() -> Result<()> {
    let mut world = Plan::new()
        .pod("client", "a")
        .pod("server", "b")
        .later("late", "b")
        .start()?;
    let (client, server) = (world.pod("client")?.clone(), world.pod("server")?.clone());
    let late = world.pod("late")?.clone();
    let _apps = [
        Server::start(&server.netns, 9000, apps::echo)?,
        Server::start(&late.netns, 9000, apps::echo)?,
    ];
    let asker = Asker::start("the client", &client.netns, &[server.at(9000)]);
    let good = world.cluster.token("b", "istio-ca")?;
    let other_audience = world.cluster.token("b", "somebody-else")?;
    let expired = world.cluster.expired(&good)?;
    let refused = |line: &str| {
        (line.contains("no stream to the control plane") && line.contains("UNAUTHENTICATED"))
            .then_some(())
    };
    // A token is looked at when a stream begins.
    world.cluster.replace_token("b", &other_audience)?;
    world.cluster.kill_istiod()?;
    world.cluster.start_istiod(&[])?;
    let log = world.b.node.log();
    log.wait_for("a refusal of the audience", PATIENCE, refused)?;
    world.cluster.replace_token("b", &expired)?;
    // The first refusal may still be of the other token.
    let mut mark = log.mark();
    for _ in 0..2 {
        log.wait_since(mark, "a refusal of what expired", PATIENCE, refused)?;
        mark = log.mark();
    }
    asker.wait_all_answered(10)?;
    // A pod that comes now gets no certificate, and is not served in plaintext instead.
    world.enrol("late")?;
    let strict = peer_authentication("it", "demo", "{mtls: {mode: STRICT}}");
    world.cluster.apply(&strict)?;
    asker.wait_all_answered(10)?;
    let plain = world.node_netns("b")?.clone();
    let cluster = &world.cluster;
    timed(
        "STRICT, counted from a good token",
        || cluster.replace_token("b", &good),
        || {
            poll("STRICT", || {
                let heard = knock(&plain, server.at(9000), QUESTION, PATIENCE).ok()?;
                is_refused(&heard).then_some(())
            })
        },
    )?;
    poll("the late pod", || {
        assert_echo(&client.netns, late.at(9000)).ok()
    })?;
    asker.wait_all_answered(1)?;
    println!("measured: {} rounds without an error", asker.rounds());
    Ok(())
}
