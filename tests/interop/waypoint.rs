//! Envoy in the middle of the mesh: as the waypoint that applies HTTP rules between two pods, and as
//! the east-west gateway that leads into another network.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    envoy::{At, Cluster, Config, Envoy, Listener, Serves, To},
    mesh::{Mesh, assert_echo},
    meshfile::{MeshFile, allow_accounts},
    topology::{Pod, Topology},
    ztunnel::{HBONE, Settings},
};

use crate::gateway::{
    APP, VIP, ask, behind, file, mirror, pods, refused_by_rule, served_for_envoy, tls,
};

/// The service and its pod are reached through Envoy.
fn file_with_waypoint(topology: &Topology) -> Result<MeshFile> {
    let waypoint = format!(
        "waypoint: {{destination: \"/{}\", hboneMtlsPort: {HBONE}}}",
        topology.pod("envoy")?.v4
    );
    Ok(file(topology)
        .service_setting("web", &waypoint)
        .workload_setting("server", &waypoint))
}

/// HBONE in, the rules, HBONE out.
fn waypoint(mesh: &Mesh, envoy: &Pod) -> Result<Config> {
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let mut config = behind(mesh, envoy, At::Internal)?;
    config.listeners.push(Listener {
        name: "in".to_owned(),
        at: At::Socket(envoy.at(HBONE)),
        tls: Some(tls(mesh, envoy, &[client])?),
        serves: Serves::Connect {
            routes: vec![
                (format!("{VIP}:80"), "to-rules"),
                (server.at(APP).to_string(), "to-rules"),
            ],
            remember: vec![
                ("zt.client", "%DOWNSTREAM_PEER_URI_SAN%"),
                ("zt.forwarded", "%REQ(FORWARDED)%"),
            ],
        },
    });
    config.clusters.push(Cluster {
        name: "to-rules",
        to: To::Internal("rules"),
        tls: None,
        http2: false,
    });
    Ok(config)
}

// 41, 42, 109.
#[test]
fn envoy_as_waypoint_applies_http_rules_between_two_pods() -> Result<()> {
    let topology = pods().build()?;
    let file = file_with_waypoint(&topology)?;
    let settings = Settings::of(&topology)?;
    let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let envoy_pod = mesh.pod("envoy")?;
    let app = Server::start(&server.netns, APP, mirror)?;
    let envoy = Envoy::start(
        &envoy_pod.netns,
        &waypoint(&mesh, envoy_pod)?,
        &mesh.topology.directory()?,
    )?;
    let service = (IpAddr::V4(VIP), 80).into();
    for (at, host) in [
        (service, Some("web.demo.svc.cluster.local")),
        (server.at(APP), None),
    ] {
        let marks = (envoy.log().mark(), mesh.marks());
        let (status, head) = ask(&client.netns, at, "GET", "/orders/1")?;
        ensure!(status == 200, "{at}: {status} {head}");
        ensure!(head.starts_with("GET /orders/1 HTTP/1.1"), "{head}");
        ensure!(head.contains("x-gateway: seen"), "{head}");
        let told = format!("x-client: {}", client.spiffe_id());
        ensure!(head.contains(&told), "{head}");
        served_for_envoy(&mesh, &app, marks.1.1)?;
        refused_by_rule(&envoy, &app, &client.netns, at)?;

        // Whom our node dialled for whom, and what Envoy was told.
        let (from, to) = (client.spiffe_id(), envoy_pod.spiffe_id());
        let authority = at.to_string();
        let mut fields = vec![
            ("direction", "outbound"),
            ("src.identity", from.as_str()),
            ("dst.identity", to.as_str()),
            ("dst.hbone_addr", authority.as_str()),
            ("reason", "complete"),
        ];
        fields.extend(host.map(|host| ("dst.service", host)));
        let line = mesh.a.wait_access(marks.1.0, &fields)?;
        let dialled = line.get("dst.addr").context("dst.addr")?;
        ensure!(dialled == envoy_pod.at(HBONE).to_string(), "{line:?}");
        let fields = [
            ("listener", "in"),
            ("method", "CONNECT"),
            ("authority", authority.as_str()),
            ("peer", from.as_str()),
        ];
        let line = envoy.wait_access(marks.0, &fields)?;
        let forwarded = line.get("forwarded").context("forwarded")?;
        ensure!(
            forwarded.starts_with(&format!("for=\"{}:", client.v4)),
            "{line:?}"
        );
        let of_service = forwarded.split_once(";host=").map(|(_, host)| host);
        ensure!(of_service == host, "{line:?}");
        let peer = line.get("from").context("from")?;
        ensure!(peer.starts_with(&format!("{}:", client.v4)), "{line:?}");
    }
    Ok(())
}

/// Three of four go through `envoy`, the fourth through `canary`, and none where nobody is.
fn file_with_two(topology: &Topology) -> Result<MeshFile> {
    let share = |to: IpAddr, weight: u32| {
        format!(
            "{{destination: {{destination: \"/{to}\", hboneMtlsPort: {HBONE}}}, weight: {weight}}}"
        )
    };
    let weighted = format!(
        "weightedWaypoints: [{}, {}, {}]",
        share(NOBODY, 0),
        share(topology.pod("envoy")?.v4.into(), 3),
        share(topology.pod("canary")?.v4.into(), 1)
    );
    Ok(MeshFile::of(topology)
        .without("outside")
        .with_own_hbone("envoy")
        .with_own_hbone("canary")
        .service("web", &[VIP.into()], &[(80, APP)], &["server"])
        .service_setting("web", &weighted)
        .policy(&allow_accounts("gateways-only", &["envoy", "canary"]))
        .attach("server", "demo/gateways-only"))
}

#[test]
fn connections_are_shared_among_weighted_waypoints_each_known_by_its_identity() -> Result<()> {
    let topology = pods().pod("canary", "a").build()?;
    let file = file_with_two(&topology)?;
    let settings = Settings::of(&topology)?;
    let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let app = Server::start(&server.netns, APP, mirror)?;
    let pods = [mesh.pod("envoy")?, mesh.pod("canary")?];
    let directory = mesh.topology.directory()?;
    let start = |pod: &Pod| {
        let directory = directory.join(&pod.name);
        std::fs::create_dir(&directory)?;
        Envoy::start(&pod.netns, &waypoint(&mesh, pod)?, &directory)
    };
    let _envoys = [start(pods[0])?, start(pods[1])?];
    let mut shares = [0; 2];
    // That one of them is never drawn in all of these has a chance of less than one in ten million.
    for _ in 0..60 {
        let mark = mesh.a.log().mark();
        let (status, head) = ask(
            &client.netns,
            (IpAddr::V4(VIP), 80).into(),
            "GET",
            "/orders",
        )?;
        ensure!(status == 200, "{status} {head}");
        let from = app.seen().last().copied().context("nobody came")?;
        let line = mesh.a.wait_access(
            mark,
            &[
                ("direction", "outbound"),
                ("src.identity", &client.spiffe_id()),
                ("dst.service", "web.demo.svc.cluster.local"),
                ("reason", "complete"),
            ],
        )?;
        let through = pods
            .iter()
            .position(|pod| line.get("dst.identity") == Some(&pod.spiffe_id()))
            .with_context(|| format!("{line:?}"))?;
        let pod = pods[through];
        ensure!(
            line.get("dst.addr") == Some(&pod.at(HBONE).to_string()),
            "{line:?}"
        );
        ensure!(from.peer.ip() == IpAddr::V4(pod.v4), "{from:?} {line:?}");
        shares[through] += 1;
    }
    ensure!(shares.iter().all(|share| *share > 0), "{shares:?}");
    Ok(())
}

/// Node a lives in the network `near`, the server and the gateway in `far`.
fn two_networks(topology: &Topology) -> Result<MeshFile> {
    let (gateway, server) = (topology.pod("envoy")?, topology.pod("server")?);
    let behind = format!(
        "network: far\nnetworkGateway: {{destination: far/{}, hboneMtlsPort: {EAST_WEST}}}",
        gateway.v4
    );
    let identity = format!("subjectAltNames: [\"{}\"]", server.spiffe_id());
    Ok(MeshFile::of(topology)
        .without("outside")
        .with_own_hbone("envoy")
        .service("web", &[VIP.into()], &[(80, APP)], &["server"])
        .service_setting("web", &identity)
        .workload_setting("client", "network: near")
        .workload_setting("outside", "network: near")
        .workload_setting("server", &behind)
        .workload_setting("envoy", "network: far"))
}

/// The outer tunnel ends here; the inner one goes on, unread, to the pod's own HBONE port.
fn east_west(mesh: &Mesh) -> Result<Config> {
    let (envoy, server) = (mesh.pod("envoy")?, mesh.pod("server")?);
    let client = mesh.pod("client")?;
    let outer = tls(mesh, envoy, &[client])?;
    Ok(Config {
        listeners: vec![Listener {
            name: "east-west".to_owned(),
            at: At::Socket(envoy.at(EAST_WEST)),
            tls: Some(outer),
            serves: Serves::Connect {
                routes: vec![(SERVICE.to_owned(), "inner")],
                remember: Vec::new(),
            },
        }],
        clusters: vec![Cluster {
            name: "inner",
            to: To::Address(server.at(HBONE)),
            tls: None,
            http2: false,
        }],
    })
}

// 66, 67, 68 (its inner sessions), 81.
#[test]
fn envoy_as_east_west_gateway_leads_to_a_pod_of_another_network() -> Result<()> {
    let topology = pods().build()?;
    let file = two_networks(&topology)?;
    let settings = Settings::of(&topology)?;
    let of_node = |node: &str| {
        let network = if node == "a" { "near" } else { "far" };
        settings.clone().env("NETWORK", network)
    };
    // Each node knows the service by an address of its own network.
    let text = |node: &str| {
        let network = if node == "a" { "near" } else { "far" };
        let (before, after) = (format!("\"/{VIP}\""), format!("\"{network}/{VIP}\""));
        file.for_node(node).replace(&before, &after)
    };
    let mesh = Mesh::run(topology, text, of_node)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let gateway = mesh.pod("envoy")?;
    let app = Server::start(&server.netns, APP, apps::echo)?;
    let envoy = Envoy::start(
        &gateway.netns,
        &east_west(&mesh)?,
        &mesh.topology.directory()?,
    )?;
    for _ in 0..3 {
        let marks = (envoy.log().mark(), mesh.marks());
        assert_echo(&client.netns, (IpAddr::V4(VIP), 80).into())?;
        let (from, to) = (client.spiffe_id(), server.spiffe_id());
        let line = envoy.wait_access(
            marks.0,
            &[("authority", SERVICE), ("status", "200"), ("peer", &from)],
        )?;
        let upstream = server.at(HBONE).to_string();
        ensure!(line.get("upstream") == Some(&upstream), "{line:?}");
        let outbound = [
            ("direction", "outbound"),
            ("src.identity", from.as_str()),
            ("dst.identity", to.as_str()),
            ("reason", "complete"),
        ];
        mesh.a.wait_access(marks.1.0, &outbound)?;
        let inbound = [
            ("direction", "inbound"),
            ("src.identity", from.as_str()),
            ("dst.workload", "server"),
            ("reason", "complete"),
        ];
        mesh.b.wait_access(marks.1.1, &inbound)?;
    }
    ensure!(app.seen().len() == 3, "{:?}", app.seen());
    Ok(())
}

/// An address that nobody has.
const NOBODY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 9));
/// Where gateways of other networks are reached, as the established proxy has it.
const EAST_WEST: u16 = 15009;
const SERVICE: &str = "web.demo.svc.cluster.local:80";
