//! A node that asks istiod only for what its pods use.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    http,
    mesh::{PATIENCE, knock},
    wait,
    ztunnel::Node,
};

use crate::{
    asker::QUESTION,
    world::{Plan, service},
};

/// Names of the workloads that a node knows.
fn known(node: &Node) -> Result<Vec<String>> {
    let at = SocketAddr::from(([127, 0, 0, 1], 15000));
    let dump = http::get(node.netns(), at, "/config_dump")?.body;
    let dump: serde_json::Value = serde_json::from_str(&dump)?;
    let workloads = dump.get("workloads").and_then(|list| list.as_array());
    let names = workloads.context("no workloads")?.iter();
    let names = names.filter_map(|workload| workload.get("name")?.as_str().map(str::to_owned));
    Ok(names.collect())
}

// 65, B008, B009.
#[test]
fn a_node_that_asks_knows_only_what_it_uses() -> Result<()> {
    let world = Plan::new()
        .pod("client", "a")
        .pod("server", "b")
        .pod("behind", "b")
        .pod("nobodys", "b")
        .later("late", "b")
        .env("a", "XDS_ON_DEMAND", "true")
        .env("a", "ISTIO_META_DNS_CAPTURE", "false")
        .start()?;
    let client = world.pod("client")?;
    let mut apps = Vec::new();
    for pod in ["server", "behind", "late"] {
        apps.push(Server::start(&world.pod(pod)?.netns, 9000, apps::echo)?);
    }
    let vip = SocketAddr::from(([10, 96, 7, 10], 80));
    world.cluster.apply(&service("web", vip, "behind"))?;
    let knows = |name: &str| known(&world.a.node).map(|names| names.iter().any(|n| n == name));
    ensure!(knows("client")?, "a node's own pods come unasked");
    ensure!(!knows("server")? && !knows("behind")?, "nobody has asked");

    let reached = |to: SocketAddr, name: &str| -> Result<()> {
        let what = format!("{name} at {to} to be reached as the mesh says");
        let pod = world.pod(name)?;
        wait::until(&what, PATIENCE, || {
            let mark = world.a.node.log().mark();
            let reply = apps::ask(&client.netns, to, QUESTION).ok()?;
            let source = reply.local.to_string();
            let fields = [("direction", "outbound"), ("src.addr", &*source)];
            let line = world.a.node.wait_access(mark, &fields).ok()?;
            (line.get("dst.identity") == Some(&*pod.spiffe_id())).then_some(())
        })
    };
    let server = world.pod("server")?.at(9000);
    reached(server, "server")?;
    reached(vip, "behind")?;
    for (name, is_known) in [("server", true), ("behind", true), ("nobodys", false)] {
        ensure!(knows(name)? == is_known, "{name}");
    }
    // Asked for before it is there, its address is nobody's; istiod does not say when that changes.
    let late = world.pod("late")?.at(9000);
    let mark = world.a.node.log().mark();
    knock(&client.netns, late, QUESTION, PATIENCE)?;
    let fields = [("direction", "outbound"), ("dst.addr", &*late.to_string())];
    let line = world.a.node.wait_access(mark, &fields)?;
    ensure!(line.get("dst.workload").is_none(), "{line:?}");
    world.enrol("late")?;
    reached(late, "late")?;
    ensure!(!knows("nobodys")?, "still");
    drop(apps);
    Ok(())
}
