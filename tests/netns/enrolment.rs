//! Pods come and go while the node process runs: by the file, and by their namespaces.

use std::{net::TcpStream, os::unix::fs::symlink, time::Instant};

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};
use ztunnel_tests::{
    apps::{self, Server},
    inspect::{self, Routing},
    load::Load,
    meshfile::MeshFile,
    process::output,
    topology::{Builder, Topology},
    wait,
    wire::Sniffer,
    ztunnel::Settings,
};

use crate::mesh::{Before, Mesh, PATIENCE, assert_alive, assert_echo, wait_end};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("late", "a")
        .pod("server", "b")
        .pod("doomed", "b")
}

#[test]
fn a_pod_that_leaves_the_file_is_plain_again_and_one_that_enters_is_captured() -> Result<()> {
    let topology = pods().build()?;
    let untouched = Routing::of(&topology.pod("client")?.netns)?;
    let file = MeshFile::of(&topology);
    let settings = Settings::of(&topology)?;
    let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, late, server) = (mesh.pod("client")?, mesh.pod("late")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut leaving = apps::dial(&client.netns, server.at(9000))?;
    let mut staying = apps::dial(&late.netns, server.at(9000))?;
    assert_alive(&mut leaving)?;
    assert_alive(&mut staying)?;
    let mark = mesh.a.log().mark();
    let before = Before::of(&mesh.a)?;
    mesh.replace(&MeshFile::of(&mesh.topology).without("client"))?;
    wait_end(&leaving).context("its connections end with it")?;
    let line = mesh.a.wait_access(
        mark,
        &[("src.workload", "client"), ("direction", "outbound")],
    )?;
    assert_eq!(line.get("reason"), Some("pod_removed"), "{line:?}");
    before.wait_gain(
        "ztunnel_connections_total",
        &[("reason", "pod_removed")],
        1.0,
    )?;
    assert_alive(&mut staying).context("the other pod")?;
    wait::until("the routing of the pod to be as before", PATIENCE, || {
        (Routing::of(&client.netns).ok()? == untouched).then_some(())
    })?;
    let sniffer = mesh.sniffer()?;
    let canary = b"kanarienvogel";
    assert_eq!(
        apps::ask(&client.netns, server.at(9000), canary)?.bytes,
        canary
    );
    ensure!(
        sniffer.seen()?.contains(canary)?,
        "it should be in plaintext"
    );
    mesh.replace(&MeshFile::of(&mesh.topology))?;
    wait::until("the pod to be captured again", PATIENCE, || {
        sniffer.clear().ok()?;
        apps::ask(&client.netns, server.at(9000), canary).ok()?;
        (sniffer.seen().ok()?.count(canary).ok()? == 0).then_some(())
    })
}

#[test]
fn a_namespace_that_is_missing_is_reported_and_enrolled_when_it_comes() -> Result<()> {
    let topology = pods().build()?;
    let settings = Settings::of(&topology)?;
    let place = topology.directory()?.join("late-netns");
    let real = topology.pod("late")?.netns.path();
    let file = MeshFile::of(&topology);
    let missing = |node: &str| {
        let (real, place) = (real.display().to_string(), place.display().to_string());
        file.for_node(node).replace(&real, &place)
    };
    let mesh = Mesh::run(topology, missing, |_| settings.clone())?;
    let (client, late, server) = (mesh.pod("client")?, mesh.pod("late")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000)).context("the other pods are unaffected")?;
    let named = |line: &str| line.contains("late-netns").then(|| line.to_owned());
    mesh.a
        .log()
        .wait_for("the missing namespace", PATIENCE, named)?;
    // Made, bound and told about before the pod is in the mesh; connected after.
    let early = late.netns.within(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&late.at(0).into())?;
        Ok(socket)
    })?;
    symlink(&real, &place)?;
    let sniffer = mesh.sniffer()?;
    let canary = b"kanarienvogel-late";
    wait::until("the pod to be captured", PATIENCE, || {
        sniffer.clear().ok()?;
        apps::ask(&late.netns, server.at(9000), canary).ok()?;
        (sniffer.seen().ok()?.count(canary).ok()? == 0).then_some(())
    })?;
    sniffer.clear()?;
    early.connect(&server.at(9000).into())?;
    assert_alive(&mut TcpStream::from(early))?;
    let plain = sniffer.seen()?.segments_on(9000).count();
    assert_eq!(
        plain, 0,
        "a socket from before the enrolment left in plaintext"
    );
    assert_echo(&late.netns, server.at(9000))
}

#[test]
fn a_namespace_that_vanishes_under_a_connection_disturbs_nobody_else() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, late) = (mesh.pod("client")?, mesh.pod("late")?);
    let (server, doomed) = (mesh.pod("server")?, mesh.pod("doomed")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let gone = Server::start(&doomed.netns, 9000, apps::echo)?;
    let mut to_doomed = apps::dial(&client.netns, doomed.at(9000))?;
    let mut to_server = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut to_doomed)?;
    assert_alive(&mut to_server)?;
    let mark = mesh.b.log().mark();
    output(None, "ip", &["netns", "del", doomed.netns.name()], "")?;
    drop(gone);
    wait_end(&to_doomed).context("the connection into the pod")?;
    let named = |line: &str| line.contains("doomed").then(|| line.to_owned());
    mesh.b
        .log()
        .wait_since(mark, "the vanished namespace", PATIENCE, named)?;
    assert_alive(&mut to_server).context("the connection to the other pod")?;
    assert_echo(&client.netns, server.at(9000))?;
    assert_echo(&late.netns, server.at6(9000))?;
    // Its device is gone from the node: nothing holds the namespace any longer.
    wait::until("the namespace to be let go", PATIENCE, || {
        let links = output(Some(mesh.b.netns()), "ip", &["-o", "link"], "").ok()?;
        (!links.contains("p-doomed")).then_some(())
    })?;
    Ok(())
}

// Capture goes by namespace: what a pod is called must not decide whether it is closed.
#[test]
fn a_pod_that_changes_its_account_under_load_never_speaks_in_plaintext() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    let file = MeshFile::of(&mesh.topology).for_node("a");
    let other = file.replace("serviceAccount: client", "serviceAccount: somebody");
    ensure!(file != other, "the account is not written as expected");
    let sniffer = mesh.sniffer()?;
    let load = Load::start(&client.netns, server.at(9000), CANARY, 4, PATIENCE);
    for round in 0..8 {
        let mark = mesh.a.log().mark();
        mesh.a
            .replace_file(if round % 2 == 0 { &other } else { &file })?;
        let applied = |line: &str| line.contains("state applied").then_some(());
        mesh.a
            .log()
            .wait_since(mark, "the new account", PATIENCE, applied)?;
    }
    load.wait_answered(Instant::now(), 20, PATIENCE)?;
    load.finish()?;
    assert_silent(&sniffer)
}

// Its processes may live on: `ip netns del` removes a name, not a namespace.
#[test]
fn a_pod_whose_namespace_lost_its_path_stays_closed_and_comes_back() -> Result<()> {
    let topology = pods().build()?;
    let settings = Settings::of(&topology)?;
    let place = topology.directory()?.join("client-netns");
    let real = topology.pod("client")?.netns.path();
    symlink(&real, &place)?;
    let file = MeshFile::of(&topology);
    let linked = |node: &str| {
        let (real, place) = (real.display().to_string(), place.display().to_string());
        file.for_node(node).replace(&real, &place)
    };
    let mesh = Mesh::run(topology, linked, |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    let sniffer = mesh.sniffer()?;
    let mark = mesh.a.log().mark();
    let load = Load::start(&client.netns, server.at(9000), CANARY, 2, PATIENCE);
    std::fs::remove_file(&place)?;
    let said = |line: &str| line.contains("does not lead").then_some(());
    mesh.a
        .log()
        .wait_since(mark, "the lost path", PATIENCE, said)?;
    wait::until("connections to wait", PATIENCE, || {
        (inspect::unanswered_syns(&client.netns, 9000).ok()? > 0).then_some(())
    })?;
    assert_silent(&sniffer)?;
    symlink(&real, &place)?;
    load.wait_answered(Instant::now(), 10, PATIENCE)
        .context("after the path is back")?;
    load.finish()?;
    assert_silent(&sniffer)
}

// With NET_ADMIN a pod may take away what brings its answers back; that closes it, and is mended.
#[test]
fn rules_routes_and_lo_that_a_pod_takes_away_are_put_back_and_counted() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    assert_echo(&client.netns, server.at6(9000))?;
    let whole = Routing::of(&server.netns)?;
    let sniffer = mesh.sniffer()?;
    for (name, script) in [
        ("IPv4 rule", "ip rule del pref 32763"),
        (
            "IPv6 rules",
            "ip -6 rule del pref 32763; ip -6 rule del pref 32764",
        ),
        ("IPv4 routes", "ip route flush table 15006"),
        (
            "IPv6 routes",
            "ip -6 route flush table 15006; ip -6 route flush table 15001",
        ),
        ("sysctl", "echo 0 > /proc/sys/net/ipv4/tcp_fwmark_accept"),
        ("lo", "ip link set lo down"),
    ] {
        let before = Before::of(&mesh.b)?;
        let mark = mesh.b.log().mark();
        output(Some(&server.netns), "sh", &["-c", script], "").context(name)?;
        wait::until(&format!("{name} to be put back"), PATIENCE, || {
            (Routing::of(&server.netns).ok()? == whole).then_some(())
        })?;
        // The node looks each second: what was taken away in steps may be put back in as many.
        wait::until("the repair to be counted", PATIENCE, || {
            let repairs = before.gained("ztunnel_enrol_repairs_total", &[]).ok()?;
            (0.5..2.5).contains(&repairs).then_some(())
        })
        .context(name)?;
        let said = |line: &str| line.contains("put back").then_some(());
        mesh.b
            .log()
            .wait_since(mark, "the repair", PATIENCE, said)?;
        for to in [server.at(9000), server.at6(9000)] {
            assert_echo(&client.netns, to).context(name)?;
        }
    }
    assert_silent(&sniffer)
}

fn assert_silent(sniffer: &Sniffer) -> Result<()> {
    let seen = sniffer.seen()?;
    ensure!(seen.count(CANARY)? == 0, "plaintext on the link");
    let plain: Vec<_> = seen.segments_on(9000).take(3).collect();
    ensure!(plain.is_empty(), "on the link: {plain:?}");
    Ok(())
}

const CANARY: &[u8] = b"kanarienvogel";
