//! Who is who: certificates that are renewed, peers that are somebody else, roots that differ.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    meshfile::MeshFile,
    topology::{Builder, Topology},
    ztunnel::{HBONE, Settings},
};

use crate::mesh::{Before, Mesh, assert_alive, assert_echo, assert_refused};

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "b")
}

// 28, 156.
#[test]
fn certificates_are_renewed_and_nothing_is_cut() -> Result<()> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology);
    let settings = Settings::of(&topology)?
        // Short, but renewed while it is still good for some seconds.
        .env("SECRET_TTL", "10s")
        .env("POOL_UNUSED_RELEASE_TIMEOUT", "100ms");
    let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut old = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut old)?;
    let sniffer = mesh.sniffer()?;
    let before = Before::of(&mesh.a)?;
    let began = Instant::now();
    let mut count = 0.0;
    // Two lifetimes; each pause lets the unused tunnel go, so that the next one shakes hands anew.
    while began.elapsed() < Duration::from_secs(21) {
        assert_echo(&client.netns, server.at6(9000))
            .with_context(|| format!("after {:?}", began.elapsed()))?;
        count += 1.0;
        let (end, _) = apps::read_end(&old, Duration::from_millis(400))?;
        ensure!(
            end == apps::End::Open,
            "the old connection was cut after {:?}",
            began.elapsed()
        );
    }
    assert_alive(&mut old).context("the connection that outlived its certificates")?;
    let complete = [("reason", "complete"), ("direction", "outbound")];
    before.wait_gain("ztunnel_connections_total", &complete, count)?;
    let seen = sniffer.seen()?;
    let tunnels = seen.segments_on(HBONE).filter(|s| s.syn && !s.ack).count();
    ensure!(
        tunnels >= 5,
        "{tunnels} tunnels: the unused ones were not let go"
    );
    Ok(())
}

// 15.
#[test]
fn a_peer_that_is_not_who_the_mesh_says_gets_nothing() -> Result<()> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology);
    let settings = Settings::of(&topology)?;
    let text = |node: &str| {
        let text = file.for_node(node);
        if node == "b" {
            return text;
        }
        // Node a expects another account behind the server's address.
        text.replacen("serviceAccount: server", "serviceAccount: somebody", 1)
    };
    let mesh = Mesh::run(topology, text, |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    refused_by_tls(&mesh, &app)?;
    assert_refused(&client.netns, server.at6(9000))
}

// 18.
#[test]
fn nodes_with_different_roots_do_not_talk() -> Result<()> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology);
    let settings = Settings::of(&topology)?;
    let of_node = |node: &str| {
        let mut settings = settings.clone();
        settings.ca_directory = settings.ca_directory.with_extension(node);
        settings
    };
    let mesh = Mesh::run(topology, |node| file.for_node(node), of_node)?;
    let app = Server::start(&mesh.pod("server")?.netns, 9000, apps::echo)?;
    refused_by_tls(&mesh, &app)
}

fn refused_by_tls(mesh: &Mesh, app: &Server) -> Result<()> {
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let sniffer = mesh.sniffer()?;
    let mark = mesh.a.log().mark();
    let before = Before::of(&mesh.a)?;
    assert_refused(&client.netns, server.at(9000))?;
    let line = mesh
        .a
        .wait_access(mark, &[("reason", "tls_failed"), ("direction", "outbound")])?;
    ensure!(
        line.get("dst.identity").is_none(),
        "nobody proved it: {line:?}"
    );
    let labels = [("response_flags", "TLS_FAILURE"), ("reporter", "source")];
    before.wait_gain("istio_tcp_connections_failed_total", &labels, 1.0)?;
    ensure!(app.seen().is_empty(), "the application was reached");
    ensure!(
        sniffer.seen()?.segments_on(9000).count() == 0,
        "it fell back to plaintext"
    );
    Ok(())
}

// 86, its second half.
#[test]
fn without_the_clients_source_traffic_still_flows() -> Result<()> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology);
    let settings = Settings::of(&topology)?.env("ENABLE_ORIG_SRC", "false");
    let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (from, to) in [
        (&client.netns, server.at(9000)),
        (&client.netns, server.at6(9000)),
        (&mesh.net("b")?.netns, server.at(9000)),
    ] {
        assert_echo(from, to)?;
        let seen = app.seen().last().copied().context("nobody came")?;
        let local = [server.at(0).ip(), server.at6(0).ip()].contains(&seen.peer.ip())
            || seen.peer.ip().is_loopback();
        ensure!(local, "the application saw {}", seen.peer);
    }
    Ok(())
}
