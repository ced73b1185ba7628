//! Ports and networks that a pod's entry takes out of the mesh, and how that is counted.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    topology::Topology,
    ztunnel::HBONE,
};

use crate::{
    mesh::{Before, Mesh, PATIENCE, REQUEST, assert_alive, assert_echo, is_refused, knock},
    plaintext::{VERDICTS, strict},
};

#[test]
fn excluded_ports_and_networks_go_past_the_mesh_and_are_counted() -> Result<()> {
    let pods = Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b");
    let mesh = Mesh::start(pods, |topology| {
        strict(topology)
            .pod_setting(
                "client",
                "excludeOutboundPorts: [9100]\nexcludeOutboundCidrs: [\"10.88.0.2/32\", \"fd88::2/128\"]",
            )
            .pod_setting(
                "server",
                "excludeInboundPorts: [9100, 9200]\n\
                 excludeInboundCidrs: [\"10.88.2.1/32\", \"fd88:0:0:2::1/128\"]",
            )
    })?;
    let (client, outside, server) = (
        mesh.pod("client")?,
        mesh.pod("outside")?,
        mesh.pod("server")?,
    );
    let host = mesh.net("b")?;
    let _open = Server::start(&server.netns, 9100, apps::echo)?;
    let meshed = Server::start(&server.netns, 9000, apps::echo)?;
    let _host = Server::start(&host.netns, 9000, apps::echo)?;
    let before = Before::of(&mesh.a)?;
    for (name, to, verdict) in [
        ("an excluded port", server.at(9100), "excluded_port"),
        ("the same by IPv6", server.at6(9100), "excluded_port"),
        (
            "an excluded network",
            SocketAddr::from((host.v4, 9000)),
            "excluded_cidr",
        ),
        (
            "the same by IPv6",
            SocketAddr::from((host.v6, 9000)),
            "excluded_cidr",
        ),
    ] {
        let one = Before::of(&mesh.a)?;
        let sniffer = mesh.sniffer()?;
        assert_echo(&client.netns, to).context(name)?;
        let seen = sniffer.seen()?;
        assert!(seen.contains(REQUEST)?, "{name}: it should be in plaintext");
        assert_eq!(seen.segments_on(HBONE).count(), 0, "{name}");
        one.wait_gain(VERDICTS, &[("verdict", verdict), ("netns_cookie", "")], 1.0)
            .context(name)?;
    }
    before.wait_gain("ztunnel_connections_opened_total", &[], 0.0)?;

    // Inbound: past the strict policy, from outside; another port stays closed.
    let before = Before::of(&mesh.b)?;
    for to in [server.at(9100), server.at6(9100)] {
        assert_echo(&outside.netns, to)?;
    }
    let excluded = before.gained(VERDICTS, &[("verdict", "excluded_port")])?;
    assert!(excluded >= 2.0, "{excluded} counted");
    // From an excluded source every port is open, and the application sees it.
    let one = Before::of(&mesh.b)?;
    for to in [server.at(9000), server.at6(9000)] {
        assert_echo(&host.netns, to)?;
    }
    let seen = meshed.seen();
    let sources: Vec<_> = seen.iter().map(|seen| seen.peer.ip()).collect();
    assert_eq!(
        sources,
        [IpAddr::from(host.gateway_v4), host.gateway_v6.into()]
    );
    let excluded = one.gained(VERDICTS, &[("verdict", "excluded_cidr")])?;
    assert!(excluded >= 2.0, "{excluded} counted");
    before.wait_gain("ztunnel_connections_opened_total", &[], 0.0)?;
    let fate = knock(&outside.netns, server.at(9000), REQUEST, PATIENCE)?;
    assert!(is_refused(&fate), "{fate:?}");

    // What is not excluded is in the mesh as ever.
    let sniffer = mesh.sniffer()?;
    assert_echo(&client.netns, server.at(9000))?;
    assert_eq!(sniffer.seen()?.count(REQUEST)?, 0);
    Ok(())
}

#[test]
fn exclusions_change_while_the_pod_is_in_the_mesh() -> Result<()> {
    let pods = Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b");
    let mesh = Mesh::start(pods, strict)?;
    let (client, outside, server) = (
        mesh.pod("client")?,
        mesh.pod("outside")?,
        mesh.pod("server")?,
    );
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut open = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    for (name, outbound, inbound) in [
        ("nothing", "", ""),
        (
            "sources",
            "excludeOutboundPorts: [9000]",
            "excludeInboundCidrs: [\"10.88.1.0/24\", \"fd88:0:0:1::/64\"]",
        ),
        (
            "ports",
            "excludeOutboundPorts: [9000]",
            "excludeInboundPorts: [9000]",
        ),
        (
            "networks",
            "excludeOutboundCidrs: [\"10.88.2.0/24\", \"fd88:0:0:2::/64\"]",
            "excludeInboundPorts: [9000]",
        ),
        ("nothing any more", "", ""),
    ] {
        let file = strict(&mesh.topology)
            .pod_setting("client", outbound)
            .pod_setting("server", inbound);
        mesh.replace(&file).context(name)?;
        let excluded = !outbound.is_empty();
        for to in [server.at(9000), server.at6(9000)] {
            let sniffer = mesh.sniffer()?;
            assert_echo(&client.netns, to).context(name)?;
            ensure!(
                sniffer.seen()?.contains(REQUEST)? == excluded,
                "{name}: {to} in plaintext should be {excluded}"
            );
            let fate = knock(&outside.netns, to, REQUEST, PATIENCE)?;
            ensure!(fate.answered() == excluded, "{name}: {to}: {fate:?}");
            ensure!(excluded || is_refused(&fate), "{name}: {to}: {fate:?}");
        }
        assert_alive(&mut open).with_context(|| format!("open before {name}"))?;
    }
    Ok(())
}
