//! A network between two nodes that goes dark and heals: what was open ends within the bounds of its
//! keepalive or lives on, whoever comes meanwhile is told in time, and afterwards it is as before.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, End, Heard, Server},
    meshfile::MeshFile,
    netns::Netns,
    process::output,
    topology::{LINK, Topology},
    wait,
};

use crate::mesh::{Before, Mesh, PATIENCE, REQUEST, assert_alive, assert_echo, knock, wait_fate};

/// How a network goes dark.
struct Night {
    falls: fn(&Mesh) -> Result<()>,
    lifts: fn(&Mesh) -> Result<()>,
    /// What a connection ends with that comes in the dark, and has no tunnel yet.
    unreached: &'static [&'static str],
}

// 20.
#[test]
fn a_route_that_swallows_everything_ends_what_is_open_and_heals() -> Result<()> {
    outlives(&Night {
        falls: |mesh| swallow(mesh, "add"),
        lifts: |mesh| swallow(mesh, "del"),
        unreached: &["network_policy"],
    })
}

#[test]
fn a_cable_that_is_pulled_ends_what_is_open_and_heals() -> Result<()> {
    outlives(&Night {
        falls: |mesh| ip(&mesh.net("b")?.netns, &["link", "set", LINK, "down"]),
        lifts: plug_in,
        // Whether the kernel finds out in time that nobody answers for the next hop.
        unreached: &["network_policy", "connect_failed"],
    })
}

#[test]
fn a_night_that_is_shorter_than_the_keepalive_is_noticed_by_nobody() -> Result<()> {
    let mesh = mesh()?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut open = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    let marks = mesh.marks();
    swallow(&mesh, "add")?;
    open.write_all(REQUEST)?;
    // Both more than a retransmission and less than what the keepalive allows.
    let (end, heard) = apps::read_end(&open, Duration::from_secs(4))?;
    ensure!(end == End::Open && heard.is_empty(), "{end:?}: {heard:?}");
    swallow(&mesh, "del")?;
    let mut back = vec![0; REQUEST.len()];
    open.set_read_timeout(Some(LONG))?;
    open.read_exact(&mut back)
        .context("what the night held up")?;
    ensure!(back == REQUEST, "other bytes came back");
    assert_alive(&mut open)?;
    assert_echo(&client.netns, server.at(9000))?;
    for (node, mark) in [(&mesh.a, marks.0), (&mesh.b, marks.1)] {
        let lines = node.log().since(mark);
        let lost = lines.iter().find(|line| line.contains("tunnel_lost"));
        ensure!(lost.is_none(), "node {}: {lost:?}", node.name());
    }
    Ok(())
}

fn mesh() -> Result<Mesh> {
    let pods = Topology::builder()
        .pod("client", "a")
        .pod("other", "a")
        .pod("near", "a")
        .pod("server", "b");
    Mesh::start(pods, MeshFile::of)
}

fn outlives(night: &Night) -> Result<()> {
    let mesh = mesh()?;
    let (client, other) = (mesh.pod("client")?, mesh.pod("other")?);
    let (near, server) = (mesh.pod("near")?, mesh.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let _near = Server::start(&near.netns, 9000, apps::echo)?;
    let idle = open(&client.netns, server.at(9000))?;
    let mut talking = open(&client.netns, server.at6(9000))?;
    let mut beside = open(&client.netns, near.at(9000))?;
    let (of_a, of_b) = (Before::of(&mesh.a)?, Before::of(&mesh.b)?);
    let marks = mesh.marks();

    (night.falls)(&mesh)?;
    let fell = Instant::now();
    talking.write_all(REQUEST)?;
    let late = thread::scope(|scope| -> Result<Heard> {
        let late = scope.spawn(|| knock(&other.netns, server.at(9000), REQUEST, LONG));
        for stream in [&idle, &talking] {
            let (end, heard) = apps::read_end(stream, LONG)?;
            ensure!(
                end == End::Reset && heard.is_empty(),
                "after {:?}: {end:?}, {heard:?}",
                fell.elapsed()
            );
            assert_alive(&mut beside).context("on one node")?;
        }
        late.join().ok().context("the knock panicked")?
    })?;
    let took = fell.elapsed();
    ensure!(took > SOONEST, "given up after {took:?}");
    ensure!(late == Heard::Nothing(End::Reset), "in the dark: {late:?}");
    // Both ends find out by themselves.
    for (before, direction) in [(&of_a, "outbound"), (&of_b, "inbound")] {
        let lost = [("reason", "tunnel_lost"), ("direction", direction)];
        gained(before, &lost, 2.0)?;
    }
    let lost = [("reason", "tunnel_lost"), ("dst.workload", "server")];
    mesh.a.wait_access(marks.0, &lost)?;
    mesh.b.wait_access(marks.1, &lost)?;
    let line = mesh.a.wait_access(marks.0, &[("src.workload", "other")])?;
    let reason = line.get("reason").unwrap_or_default();
    ensure!(night.unreached.contains(&reason), "{line:?}");
    wait::until("the application to be left", PATIENCE, || {
        (app.open() == 0).then_some(())
    })?;

    (night.lifts)(&mesh)?;
    for from in [client, other] {
        for to in [server.at(9000), server.at6(9000)] {
            // The kernel may still give up a neighbour that it asked for in the dark.
            let what = format!("{} to be served after it", from.name);
            wait_fate(&from.netns, to, &what, Heard::answered)?;
            assert_echo(&from.netns, to).with_context(|| format!("{} after it", from.name))?;
        }
    }
    assert_alive(&mut open(&client.netns, server.at(9000))?)?;
    assert_alive(&mut beside)?;
    of_a.wait_gain(
        "ztunnel_connections_open",
        &[("direction", "outbound")],
        -2.0,
    )
}

fn open(netns: &Netns, to: std::net::SocketAddr) -> Result<TcpStream> {
    let mut stream = apps::dial(netns, to)?;
    assert_alive(&mut stream)?;
    Ok(stream)
}

/// As [`Before::wait_gain`], for what may take as long as a keepalive.
fn gained(before: &Before<'_>, labels: &[(&str, &str)], expected: f64) -> Result<()> {
    wait::until(&format!("{labels:?} to grow by {expected}"), LONG, || {
        let gained = before.gained("ztunnel_connections_total", labels).ok()?;
        (gained > expected - 0.5).then_some(())
    })?;
    before.wait_gain("ztunnel_connections_total", labels, expected)
}

/// `add` or `del`: routes on which each node loses what its pods send to the other's.
fn swallow(mesh: &Mesh, verb: &str) -> Result<()> {
    for (here, there) in [("a", "b"), ("b", "a")] {
        let netns = &mesh.net(here)?.netns;
        for pod in mesh.topology.pods().iter().filter(|pod| pod.node == there) {
            let (v4, v6) = (format!("{}/32", pod.v4), format!("{}/128", pod.v6));
            ip(netns, &["route", verb, "blackhole", &v4])?;
            ip(netns, &["-6", "route", verb, "blackhole", &v6])?;
        }
    }
    Ok(())
}

/// The cable again, with what went when it was pulled.
fn plug_in(mesh: &Mesh) -> Result<()> {
    let (a, b) = (mesh.net("a")?, mesh.net("b")?);
    let (own, next) = (format!("{}/64", b.v6), (a.v4.to_string(), a.v6.to_string()));
    let [x, y, z, _] = a.gateway_v4.octets();
    let (to4, to6) = (format!("{x}.{y}.{z}.0/24"), format!("{}/64", a.gateway_v6));
    for args in [
        &["link", "set", LINK, "up"][..],
        &["addr", "replace", &own, "dev", LINK, "nodad"],
        &["route", "replace", &to4, "via", &next.0, "dev", LINK],
        &["-6", "route", "replace", &to6, "via", &next.1, "dev", LINK],
    ] {
        ip(&b.netns, args)?;
    }
    Ok(())
}

fn ip(netns: &Netns, args: &[&str]) -> Result<()> {
    output(Some(netns), "ip", args, "").map(drop)
}

/// Pings every 10 s that are waited for 20 s, twice if the peer had spoken after the first; and
/// a machine that does much else.
const LONG: Duration = Duration::from_secs(120);
/// A ping that was not answered is waited for so long.
const SOONEST: Duration = Duration::from_secs(15);
