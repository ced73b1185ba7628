//! The operator's port of a node that serves pods: what it shows, what it changes, and who may ask.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use ztunnel_tests::{
    apps::{self, Server},
    http,
    meshfile::MeshFile,
    topology::{Builder, Topology},
    wait,
    ztunnel::{Node, Settings},
};

use crate::mesh::{Mesh, PATIENCE, assert_alive, assert_echo};

const PORT: u16 = 15000;

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "b")
}

fn here() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], PORT))
}

fn dump(node: &Node, at: SocketAddr) -> Result<Value> {
    let answer = http::get(node.netns(), at, "/config_dump")?;
    ensure!(answer.status == 200, "{answer:?}");
    ensure!(!answer.body.contains("PRIVATE KEY"));
    Ok(serde_json::from_str(&answer.body)?)
}

// B084, B118, B120, B121.
#[test]
fn the_operators_port_answers_this_host_alone_and_ends_the_process() -> Result<()> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology);
    let settings = Settings::of(&topology)?.env("CONNECTION_TERMINATION_DEADLINE", "1h");
    let mut mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?.clone(), mesh.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    for (node, direction, pod) in [
        (&mesh.a, "outbound", &client),
        (&mesh.b, "inbound", &server),
    ] {
        for at in [here(), "[::1]:15000".parse()?] {
            let dump = dump(node, at)?;
            let state = &dump["workloadState"][format!("{}/{}", pod.namespace, pod.name)];
            ensure!(state["state"] == "Up", "{state}");
            let connection = &state["connections"][direction][0];
            ensure!(connection["protocol"] == "HBONE", "{state}");
            ensure!(connection["actualDst"].is_string(), "{state}");
            let certificates = dump["certificates"].as_array().context("certificates")?;
            let own = |c: &&Value| c["identity"] == pod.spiffe_id();
            let own = certificates.iter().find(own).context("no certificate")?;
            ensure!(own["state"] == "Available", "{own}");
        }
    }
    let other = SocketAddr::from((mesh.net("a")?.v4, PORT));
    let refused = mesh.net("b")?.netns.dial(other, PATIENCE);
    ensure!(refused.is_err(), "the port is open on {other}");
    let asked = http::request(mesh.a.netns(), here(), "GET", "/quitquitquit")?;
    ensure!(asked.status == 405, "{asked:?}");
    let answer = http::request(mesh.a.netns(), here(), "POST", "/quitquitquit")?;
    ensure!(
        (answer.status, answer.body.as_str()) == (200, "shutdown now\n"),
        "{answer:?}"
    );
    assert_alive(&mut stream).context("while it drains")?;
    drop(stream);
    let status = mesh.a.wait_exit(PATIENCE)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

// B116: what is changed is heard, and unheard after the reset.
#[test]
fn more_is_logged_while_an_operator_wants_more() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let change = |query: &str| -> Result<()> {
        let path = format!("/logging?{query}");
        let answer = http::request(mesh.a.netns(), here(), "POST", &path)?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(())
    };
    let opened = |line: &str| line.contains("connection opened").then_some(());
    assert_echo(&client.netns, server.at(9000))?;
    mesh.a.wait_access(0, &[("reason", "complete")])?;
    change("level=access=debug")?;
    assert_echo(&client.netns, server.at(9000))?;
    let log = mesh.a.log();
    log.wait_for("the opened connection", PATIENCE, opened)?;
    change("reset")?;
    let mark = log.mark();
    assert_echo(&client.netns, server.at(9000))?;
    mesh.a.wait_access(mark, &[("reason", "complete")])?;
    let lines = log.lines();
    let count = lines.iter().filter(|line| opened(line).is_some()).count();
    ensure!(count == 1, "{count} lines of opened connections");
    Ok(())
}

// B083: a pod that leaves is counted once as it came.
#[test]
fn pods_that_come_and_go_are_counted_and_leave_the_dump() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let until = |name: &'static str, value: f64| {
        wait::until(&format!("{name} to be {value}"), PATIENCE, || {
            let now = mesh.a.metrics().ok()?.sum(name, &[]);
            ((now - value).abs() < 0.5).then_some(())
        })
    };
    for (name, value) in [
        ("workload_manager_active_proxy_count", 1.0),
        ("workload_manager_pending_proxy_count", 0.0),
        ("workload_manager_proxies_started_total", 1.0),
        ("workload_manager_proxies_stopped_total", 0.0),
    ] {
        until(name, value)?;
    }
    let file = MeshFile::of(&mesh.topology).without("client");
    mesh.replace(&file)?;
    until("workload_manager_active_proxy_count", 0.0)?;
    until("workload_manager_proxies_stopped_total", 1.0)?;
    let states = &dump(&mesh.a, here())?["workloadState"];
    ensure!(*states == serde_json::json!({}), "{states}");
    Ok(())
}
