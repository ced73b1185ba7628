//! Envoy at one end of HBONE and us at the other, both ways round.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, End, Heard},
    bulk,
    certs::Authority,
    envoy::{At, Cluster, Config, Envoy, Listener, Serves, Tls, To},
    mesh::{Before, Mesh, PATIENCE, REQUEST, assert_refused, is_refused, knock},
    meshfile::{MeshFile, allow_accounts},
    netns::Netns,
    topology::{Builder, Pod, Topology},
    ztunnel::{HBONE, Node},
};

use crate::exercise::{self, BULK, ECHO, Idle, NOBODY, PORTS, Servers, WHOAMI};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("envoy-a", "a")
        .pod("server", "b")
        .pod("envoy-b", "b")
}

fn file(topology: &Topology) -> MeshFile {
    MeshFile::of(topology)
        .with_own_hbone("envoy-a")
        .with_own_hbone("envoy-b")
}

/// An Envoy in `pod` with that pod's identity, whose peers must be `peers`.
fn tls(mesh: &Mesh, pod: &Pod, peers: &[&Pod]) -> Result<Tls> {
    let directory = mesh.topology.directory()?.join("certs");
    let id = format!("URI:{}", pod.spiffe_id());
    Ok(Tls {
        own: Authority::of_mesh(&mesh.topology)?.issue(&directory, &pod.name, &[id])?,
        peers: peers.iter().map(|pod| pod.spiffe_id()).collect(),
    })
}

/// Each port of the loopback is the same port of the server, through a tunnel; IPv6 likewise.
fn client_config(mesh: &Mesh) -> Result<Config> {
    let (own, server) = (mesh.pod("envoy-a")?, mesh.pod("server")?);
    let tls = tls(mesh, own, &[server])?;
    let mut config = Config::default();
    for (cluster, local, at) in [
        ("v4", LOOPBACK4, server.at(0)),
        ("v6", LOOPBACK6, server.at6(0)),
    ] {
        for port in PORTS.chain([NOBODY]) {
            config.listeners.push(Listener {
                name: format!("{cluster}-{port}"),
                at: At::Socket(SocketAddr::new(local, port)),
                tls: None,
                serves: Serves::Tunnel {
                    cluster,
                    authority: SocketAddr::new(at.ip(), port).to_string(),
                    headers: Vec::new(),
                },
            });
        }
        config.clusters.push(Cluster {
            name: cluster,
            to: To::Address(SocketAddr::new(at.ip(), HBONE)),
            tls: Some(tls.clone()),
            http2: true,
        });
    }
    Ok(config)
}

// 73–75, 77, 83–86 (an Envoy as the client), 90, 97, 98, 118–124.
#[test]
fn envoy_as_hbone_client_is_served_like_one_of_ours() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let (own, server) = (mesh.pod("envoy-a")?, mesh.pod("server")?);
    let servers = Servers::start(&server.netns, BEYOND_BUFFERS_BYTES)?;
    let directory = mesh.topology.directory()?;
    let envoy = Envoy::start(&own.netns, &client_config(&mesh)?, &directory)?;
    let v4 = |port| SocketAddr::new(LOOPBACK4, port);
    let v6 = |port| SocketAddr::new(LOOPBACK6, port);
    let idle = Idle::begin(&own.netns, &v4)?;
    let began = Instant::now();
    let ways: [(exercise::At<'_>, _); 2] = [(&v4, own.at(0)), (&v6, own.at6(0))];
    for (at, peer) in ways {
        told_as_client(&mesh, &envoy, at, peer.ip()).with_context(|| format!("{peer}"))?;
        let resets = exercise::small(&servers, &own.netns, at)?;
        ensure!(resets.at_server, "Envoy's client reset: {resets:?}");
        exercise::server_ends_first(&servers, &own.netns, at)?;
    }
    large(&own.netns, v4(BULK), &mesh.b)?;
    idle.end(SILENCE.saturating_sub(began.elapsed()))?;

    // 83, then 84: nobody listens; the policy does not know Envoy.
    for (port, reason) in [(NOBODY, "connect_failed"), (ECHO, "policy_denied")] {
        if port == ECHO {
            let file = file(&mesh.topology)
                .policy(&allow_accounts("only", &["client"]))
                .attach("server", "demo/only");
            mesh.replace(&file)?;
        }
        let marks = (envoy.log().mark(), mesh.b.log().mark());
        let heard = knock(&own.netns, v4(port), REQUEST, PATIENCE)?;
        // With a request that it has not read yet, Envoy's close is a reset; with one that it has, an end.
        let ended = is_refused(&heard) || heard == Heard::Nothing(End::Fin);
        ensure!(ended, "port {port}: {heard}");
        let name = format!("v4-{port}");
        let line = envoy.wait_access(marks.0, &[("listener", &name), ("sent", "0")])?;
        let (from, asked) = (own.spiffe_id(), server.at(port).to_string());
        let fields = [
            ("direction", "inbound"),
            ("src.identity", from.as_str()),
            ("dst.hbone_addr", asked.as_str()),
            ("reason", reason),
        ];
        let told = mesh.b.wait_access(marks.1, &fields);
        told.with_context(|| format!("{line:?}"))?;
    }
    Ok(())
}

/// One request, as the application, our access line, our metrics and Envoy's line tell it.
fn told_as_client(mesh: &Mesh, envoy: &Envoy, at: exercise::At<'_>, peer: IpAddr) -> Result<()> {
    let (own, server) = (mesh.pod("envoy-a")?, mesh.pod("server")?);
    let before = Before::of(&mesh.b)?;
    let marks = (envoy.log().mark(), mesh.b.log().mark());
    let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    let reply = apps::ask(&own.netns, at(WHOAMI), request)?;
    ensure!(
        reply.text().contains(&format!("peer={}", bare(peer))),
        "the application saw another peer: {}",
        reply.text()
    );
    let (received, sent) = (request.len().to_string(), reply.bytes.len().to_string());
    let (from, to) = (own.spiffe_id(), server.spiffe_id());
    let line = mesh.b.wait_access(
        marks.1,
        &[
            ("direction", "inbound"),
            ("src.identity", from.as_str()),
            ("src.workload", "envoy-a"),
            ("dst.workload", "server"),
            ("dst.identity", to.as_str()),
            ("bytes_recv", received.as_str()),
            ("bytes_sent", sent.as_str()),
            ("reason", "complete"),
        ],
    )?;
    ensure!(
        line.get("src.addr")
            .is_some_and(|addr| addr.starts_with(&bare(peer))),
        "{line:?}"
    );
    let labels = [
        ("reporter", "destination"),
        ("source_principal", from.as_str()),
        ("connection_security_policy", "mutual_tls"),
    ];
    before.wait_gain("istio_tcp_connections_closed_total", &labels, 1.0)?;
    let cluster = if peer.is_ipv4() { "v4" } else { "v6" };
    let name = format!("{cluster}-{WHOAMI}");
    envoy.wait_access(
        marks.0,
        &[
            ("listener", name.as_str()),
            ("received", received.as_str()),
            ("sent", sent.as_str()),
            ("upstream_peer", to.as_str()),
        ],
    )?;
    Ok(())
}

/// HBONE for both addresses of the pod, ended here, to the same ports of the loopback.
fn server_config(mesh: &Mesh, identity: &Pod) -> Result<Config> {
    let (own, client) = (mesh.pod("envoy-b")?, mesh.pod("client")?);
    let tls = tls(mesh, identity, &[client])?;
    let mut config = Config::default();
    for (name, at) in [("v4", own.at(0)), ("v6", own.at6(0))] {
        let routes = PORTS
            .zip(APPS)
            .map(|(port, app)| (SocketAddr::new(at.ip(), port).to_string(), app))
            .collect();
        config.listeners.push(Listener {
            name: name.to_owned(),
            at: At::Socket(SocketAddr::new(at.ip(), HBONE)),
            tls: Some(tls.clone()),
            serves: Serves::Connect {
                routes,
                remember: Vec::new(),
            },
        });
    }
    for (port, app) in PORTS.zip(APPS) {
        config.clusters.push(Cluster {
            name: app,
            to: To::Address(SocketAddr::new(LOOPBACK4, port)),
            tls: None,
            http2: false,
        });
    }
    Ok(config)
}

// 1, 7–11, 13–15 (an Envoy as the server), 22, 118–124.
#[test]
fn envoy_as_hbone_server_is_used_like_one_of_ours() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let (own, client) = (mesh.pod("envoy-b")?, mesh.pod("client")?);
    let servers = Servers::start(&own.netns, WITHIN_WINDOW_BYTES)?;
    let directory = mesh.topology.directory()?;
    let config = server_config(&mesh, own)?;
    let envoy = Envoy::start(&own.netns, &config, &directory)?;
    let v4 = |port| own.at(port);
    let v6 = |port| own.at6(port);
    let idle = Idle::begin(&client.netns, &v4)?;
    let began = Instant::now();
    let ways: [exercise::At<'_>; 2] = [&v4, &v6];
    for at in ways {
        told_as_server(&mesh, &envoy, at).with_context(|| format!("{}", at(0)))?;
        let resets = exercise::small(&servers, &client.netns, at)?;
        ensure!(
            resets.at_client == End::Reset,
            "Envoy's server reset: {resets:?}"
        );
        // This Envoy resets a stream whose server has ended: with NO_ERROR, and takes no more of the
        // client's. What does not fit into the client's window by then is lost, with INTERNAL_ERROR.
        let mark = mesh.a.log().mark();
        drop(exercise::last_words_of(&servers, &client.netns, at)?);
        let bytes = WITHIN_WINDOW_BYTES.to_string();
        let fields = [("bytes_recv", bytes.as_str()), ("reason", "complete")];
        mesh.a.wait_access(mark, &fields)?;
    }
    large(&client.netns, v4(BULK), &mesh.a)?;
    idle.end(SILENCE.saturating_sub(began.elapsed()))?;

    // 14: Envoy knows no such authority.
    let marks = (mesh.a.log().mark(), envoy.log().mark());
    assert_refused(&client.netns, v4(NOBODY))?;
    envoy.wait_access(marks.1, &[("status", "404"), ("method", "CONNECT")])?;
    let line = mesh.a.wait_access(marks.0, &[("reason", "peer_refused")])?;
    ensure!(
        line.get("error").is_some_and(|error| error.contains("404")),
        "{line:?}"
    );
    Ok(())
}

// 15.
#[test]
fn an_envoy_that_is_somebody_else_gets_nothing() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let (own, client) = (mesh.pod("envoy-b")?, mesh.pod("client")?);
    let _servers = Servers::start(&own.netns, 0)?;
    let config = server_config(&mesh, mesh.pod("envoy-a")?)?;
    let _envoy = Envoy::start(&own.netns, &config, &mesh.topology.directory()?)?;
    let mark = mesh.a.log().mark();
    assert_refused(&client.netns, own.at(ECHO))?;
    let fields = [("direction", "outbound"), ("reason", "tls_failed")];
    let line = mesh.a.wait_access(mark, &fields)?;
    let error = line.get("error").unwrap_or_default();
    ensure!(error.contains("peer certificate"), "{line:?}");
    Ok(())
}

fn told_as_server(mesh: &Mesh, envoy: &Envoy, at: exercise::At<'_>) -> Result<()> {
    let (own, client) = (mesh.pod("envoy-b")?, mesh.pod("client")?);
    let before = Before::of(&mesh.a)?;
    let marks = (envoy.log().mark(), mesh.a.log().mark());
    let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    let reply = apps::ask(&client.netns, at(WHOAMI), request)?;
    ensure!(reply.peer == at(WHOAMI), "{reply:?}");
    let (sent, received) = (request.len().to_string(), reply.bytes.len().to_string());
    let (from, to) = (client.spiffe_id(), own.spiffe_id());
    let authority = at(WHOAMI).to_string();
    mesh.a.wait_access(
        marks.1,
        &[
            ("direction", "outbound"),
            ("src.identity", from.as_str()),
            ("dst.identity", to.as_str()),
            ("dst.workload", "envoy-b"),
            ("dst.hbone_addr", authority.as_str()),
            ("bytes_sent", sent.as_str()),
            ("bytes_recv", received.as_str()),
            ("reason", "complete"),
        ],
    )?;
    let labels = [
        ("reporter", "source"),
        ("destination_principal", to.as_str()),
    ];
    before.wait_gain("istio_tcp_connections_closed_total", &labels, 1.0)?;
    let line = envoy.wait_access(
        marks.0,
        &[
            ("method", "CONNECT"),
            ("authority", authority.as_str()),
            ("status", "200"),
            ("peer", from.as_str()),
            ("received", sent.as_str()),
            ("sent", received.as_str()),
        ],
    )?;
    let forwarded = format!("for=\"{}\"", reply.local);
    ensure!(line.get("forwarded") == Some(&forwarded), "{line:?}");
    let baggage = line.get("baggage").context("baggage")?;
    ensure!(baggage.contains("k8s.namespace.name=demo"), "{line:?}");
    Ok(())
}

/// A gibibyte, half of it each way at once, counted by the node at our end.
fn large(from: &Netns, to: SocketAddr, node: &Node) -> Result<()> {
    let mark = node.log().mark();
    bulk::exchange(from, to, LARGE_BYTES, 11)?;
    let total = (LARGE_BYTES + 16).to_string();
    let fields = [
        ("bytes_sent", total.as_str()),
        ("bytes_recv", total.as_str()),
        ("reason", "complete"),
    ];
    node.wait_access(mark, &fields).map(drop)
}

/// The address without brackets or zone, as it stands in front of a port.
fn bare(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

const LOOPBACK4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
const LOOPBACK6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);
/// What Envoy calls the servers, in the order of their ports.
const APPS: [&str; 8] = [
    "echo",
    "bulk",
    "count",
    "reset",
    "whoami",
    "banner",
    "ends-first",
    "reads",
];
const LARGE_BYTES: u64 = 512 << 20;
/// Of last words: a quarter of a stream's window, so that all of them are on their way at once.
const WITHIN_WINDOW_BYTES: u64 = 1 << 20;
/// Of last words: more than fits into the buffers on the way.
const BEYOND_BUFFERS_BYTES: u64 = 8 << 20;
/// Longer than the interval of the tunnel's pings, which is 10 s.
const SILENCE: Duration = Duration::from_secs(12);
