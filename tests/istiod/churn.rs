//! Pods and endpoints that come and go while others are in use.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use ztunnel_tests::{
    access::Line,
    apps::{self, Server},
    mesh::{PATIENCE, assert_alive, assert_echo, assert_refused, is_refused, knock},
};

use crate::{
    asker::{Asker, QUESTION},
    world::{Plan, poll, service, timed},
};

#[test]
fn a_pod_comes_and_goes_and_no_other_notices() -> Result<()> {
    let world = Plan::new()
        .pod("client", "a")
        .pod("server", "b")
        .later("late", "b")
        .start()?;
    let (client, server) = (world.pod("client")?, world.pod("server")?);
    let late = world.pod("late")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let _late_app = Server::start(&late.netns, 9000, apps::echo)?;
    let mut open = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    let others = Asker::start(
        "the client of another pod",
        &client.netns,
        &[server.at(9000)],
    );
    let answers = |vip: SocketAddr| move || assert_echo(&client.netns, vip).ok();

    let vip = SocketAddr::from(([10, 96, 7, 8], 80));
    let at_vip = vip.to_string();
    let refused_since = |mark: usize| {
        let heard = knock(&client.netns, vip, QUESTION, PATIENCE).ok()?;
        let fields = [("dst.addr", &*at_vip), ("reason", "no_endpoint")];
        let lines = world.a.node.log().since(mark);
        let mut lines = lines.iter().filter_map(|line| Line::access(line));
        (is_refused(&heard) && lines.any(|line| line.has(&fields))).then_some(())
    };
    let mark = world.a.node.log().mark();
    world.apply(
        "a service without an endpoint",
        &service("late", vip, "late"),
        || refused_since(mark),
    )?;
    timed(
        "a pod, the first endpoint",
        || world.enrol("late"),
        || poll("the first endpoint", answers(vip)),
    )?;

    let mark = world.b.node.log().mark();
    assert_echo(&client.netns, vip)?;
    let fields = [("direction", "inbound"), ("dst.workload", "late")];
    let line = world.b.node.wait_access(mark, &fields)?;
    ensure!(
        line.get("src.identity") == Some(&*client.spiffe_id()),
        "{line:?}"
    );

    let mut to_late = apps::dial(&client.netns, vip)?;
    assert_alive(&mut to_late)?;
    let mark = world.a.node.log().mark();
    let pod = ["-n", "demo", "pod", "late"];
    world.delete("a deleted pod, the last endpoint", &pod, || {
        poll("no endpoint", || refused_since(mark))
    })?;
    assert_refused(&client.netns, vip)?;
    others.wait_all_answered(3)?;
    assert_alive(&mut open)?;
    println!("measured: {} rounds of the other client", others.rounds());
    Ok(())
}
