//! From nothing to traffic, and what an operator's tool says of it.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    http,
    mesh::{PATIENCE, assert_alive, assert_echo, is_refused, knock},
    topology::LINK,
    wait,
    wire::Sniffer,
};

use crate::{
    asker::QUESTION,
    world::{Plan, authorization, service},
};

// B063, B064, B080.
#[test]
fn from_nothing_to_traffic_between_pods_of_two_nodes() -> Result<()> {
    let world = Plan::new()
        .pod("client", "a")
        .pod("server", "b")
        .rules_on("a")
        .start()?;
    let (client, server) = (world.pod("client")?, world.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = Sniffer::on(world.node_netns("a")?, LINK)?;
    let (mark_a, mark_b) = (world.a.node.log().mark(), world.b.node.log().mark());
    for (to, own) in [
        (server.at(9000), client.at(0)),
        (server.at6(9000), client.at6(0)),
    ] {
        let reply = apps::ask(&client.netns, to, QUESTION)?;
        ensure!(reply.bytes == QUESTION && reply.peer == to, "{reply:?}");
        let seen = app.seen().last().copied();
        ensure!(
            seen.is_some_and(|seen| (seen.peer.ip(), seen.local) == (own.ip(), to)),
            "{seen:?}"
        );
    }
    for (node, mark, direction) in [
        (&world.a.node, mark_a, "outbound"),
        (&world.b.node, mark_b, "inbound"),
    ] {
        let line = node.wait_access(mark, &[("direction", direction), ("reason", "complete")])?;
        for (field, pod) in [("src.identity", client), ("dst.identity", server)] {
            ensure!(line.get(field) == Some(&*pod.spiffe_id()), "{line:?}");
        }
    }
    let wire = sniffer.seen()?;
    ensure!(wire.count(QUESTION)? == 0, "plaintext on the cable");
    ensure!(wire.segments_on(9000).next().is_none(), "{server:?}");
    // A service gets its endpoints from its selector.
    let vip = SocketAddr::from(([10, 96, 7, 7], 80));
    world.apply("a service", &service("web", vip, "server"), || {
        assert_echo(&client.netns, vip).ok()
    })
}

// B120: the established tools read the dump.
#[test]
fn istioctl_lists_what_a_node_knows() -> Result<()> {
    let world = Plan::new()
        .pod("client", "a")
        .pod("other", "a")
        .pod("server", "b")
        .start()?;
    let (client, server) = (world.pod("client")?, world.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let vip = SocketAddr::from(([10, 96, 7, 7], 80));
    world.apply("a service", &service("web", vip, "server"), || {
        assert_echo(&client.netns, vip).ok()
    })?;
    let allow = "{selector: {matchLabels: {app: server}}, action: ALLOW, \
                 rules: [{from: [{source: {principals: [cluster.local/ns/demo/sa/client]}}]}]}";
    let other = &world.pod("other")?.netns;
    world.apply(
        "an ALLOW for the client",
        &authorization("only-client", "demo", allow),
        || {
            let heard = knock(other, server.at(9000), QUESTION, PATIENCE).ok()?;
            is_refused(&heard).then_some(())
        },
    )?;
    let mut open = apps::dial(&client.netns, vip)?;
    assert_alive(&mut open)?;
    let netns = world.a.node.netns();
    let at = SocketAddr::from(([127, 0, 0, 1], 15000));
    let dump = wait::until("the policy on the client's node", PATIENCE, || {
        let dump = http::get(netns, at, "/config_dump").ok()?.body;
        dump.contains("only-client").then_some(dump)
    })?;
    let file = world.topology.directory()?.join("dump.json");
    std::fs::write(&file, dump)?;
    let file = file.to_string_lossy();
    let list = |what: &str| -> Result<String> {
        let table = world
            .cluster
            .istioctl(netns, &["ztunnel-config", what, "--file", &file])?;
        println!("{table}");
        Ok(table)
    };
    for (what, row) in [
        ("workloads", &["demo", "client", "a", "None", "HBONE"][..]),
        ("workloads", &["demo", "server", "b", "None", "HBONE"]),
        ("services", &["demo", "web", "10.96.7.7", "None", "1/1"]),
        (
            "policies",
            &["demo", "only-client", "Allow", "WorkloadSelector"],
        ),
        (
            "certificates",
            &[&client.spiffe_id(), "Leaf", "Available", "true"],
        ),
        (
            "certificates",
            &[&client.spiffe_id(), "Root", "Available", "true"],
        ),
        (
            "connections",
            &["client", "Outbound", "web.demo.svc.cluster.local", "HBONE"],
        ),
    ] {
        let table = list(what)?;
        let has = |line: &str| row.iter().all(|part| line.contains(part));
        ensure!(table.lines().any(has), "{what}: no row with {row:?}");
    }
    let all = list("all")?;
    for part in ["client", "only-client", "Leaf", "Outbound"] {
        ensure!(all.contains(part), "all: nothing of {part}");
    }
    drop(open);
    Ok(())
}
