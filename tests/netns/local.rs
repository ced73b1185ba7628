//! Connections between two pods of one node: the same identities, policy, accounts and ends as over
//! HBONE, and not one packet outside the two pods' `lo`.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
};

use anyhow::{Context as _, Result};
use ztunnel_tests::{
    apps::{self, End, Server, canonical},
    bulk,
    meshfile::{self, MeshFile},
    topology::{Builder, LINK, Topology},
    wire::Sniffer,
    ztunnel::{HBONE, Settings},
};

use crate::mesh::{
    Before, Mesh, REQUEST, assert_alive, assert_echo, assert_refused, number, wait_end,
};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("near", "a")
        .pod("outside", "a")
}

fn file(topology: &Topology) -> MeshFile {
    let vips = [IpAddr::V4(VIP4), IpAddr::V6(VIP6)];
    MeshFile::of(topology)
        .without("outside")
        .service("web", &vips, &[(80, 9000)], &["near"])
}

fn deny_client() -> String {
    meshfile::allow_accounts("no-client", &["client"]).replace("Allow", "Deny")
}

/// Both nodes, with the setting as given.
fn mesh(fast_path: bool) -> Result<Mesh> {
    let topology = pods().build()?;
    let file = file(&topology);
    let fast_path = if fast_path { "true" } else { "false" };
    let settings = Settings::of(&topology)?.env("LOCAL_FAST_PATH", fast_path);
    Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())
}

/// Every device by which a packet could leave either pod, seen from both of its ends.
fn exits(mesh: &Mesh) -> Result<Vec<Sniffer>> {
    let node = &mesh.net("a")?.netns;
    Ok(vec![
        Sniffer::on(node, "p-client")?,
        Sniffer::on(node, "p-near")?,
        Sniffer::on(node, LINK)?,
        Sniffer::on(node, "lo")?,
        Sniffer::on(&mesh.pod("client")?.netns, "eth0")?,
        Sniffer::on(&mesh.pod("near")?.netns, "eth0")?,
    ])
}

// 33, 87; DESIGN's node-local path.
#[test]
fn nothing_but_lo_of_the_two_pods_carries_a_packet() -> Result<()> {
    let mesh = mesh(true)?;
    let (client, near) = (mesh.pod("client")?, mesh.pod("near")?);
    let app = Server::start(&near.netns, 9000, apps::whoami)?;
    let rows = [
        (near.at(9000), near.at(9000)),
        (near.at6(9000), near.at6(9000)),
        ((VIP4, 80).into(), near.at(9000)),
        ((VIP6, 80).into(), near.at6(9000)),
    ];
    for (dial, target) in rows {
        let exits = exits(&mesh)?;
        let los = [
            Sniffer::on(&client.netns, "lo")?,
            Sniffer::on(&near.netns, "lo")?,
        ];
        let mark = mesh.a.log().mark();
        let before = Before::of(&mesh.a)?;
        let request = b"GET / HTTP/1.0\r\nX-Canary: kanarienvogel\r\n\r\n";
        let reply = apps::ask(&client.netns, dial, request)?;
        assert_eq!(reply.peer, dial, "the client's peer is what it dialled");
        let seen = app.seen().last().copied().context("nobody came")?;
        let own = canonical(reply.local).ip();
        assert_eq!((seen.peer.ip(), seen.local), (own, target), "{dial}");

        let lines = ["outbound", "inbound"].map(|direction| {
            let (from, to) = (client.spiffe_id(), near.spiffe_id());
            let target = target.to_string();
            let fields = [
                ("direction", direction),
                ("path", "node_local"),
                ("reason", "complete"),
                ("src.workload", "client"),
                ("src.identity", &from),
                ("dst.workload", "near"),
                ("dst.identity", &to),
                ("dst.hbone_addr", &target),
            ];
            mesh.a.wait_access(mark, &fields)
        });
        let [outbound, inbound] = lines;
        let (outbound, inbound) = (outbound?, inbound?);
        assert_eq!(
            number(&outbound, "bytes_sent")?,
            u64::try_from(request.len())?
        );
        assert_eq!(
            number(&inbound, "bytes_recv")?,
            number(&outbound, "bytes_sent")?
        );
        assert_eq!(
            number(&inbound, "bytes_sent")?,
            number(&outbound, "bytes_recv")?
        );
        let service = (dial != target).then_some("web.demo.svc.cluster.local");
        for line in [&outbound, &inbound] {
            assert_eq!(line.get("dst.service"), service, "{line:?}");
        }
        counted(
            &before,
            u32::try_from(request.len())?,
            u32::try_from(reply.bytes.len())?,
        )?;

        // Both connections have ended, so nothing of them is on its way.
        for exit in &exits {
            let seen = exit.seen()?;
            let of_it = seen.complete()?.segments().find(|s| {
                let ends = [s.src.ip(), s.dst.ip()];
                ends.contains(&own) || ends.contains(&target.ip()) || ends.contains(&dial.ip())
            });
            assert!(of_it.is_none(), "{dial}: {of_it:?}");
        }
        for lo in &los {
            assert!(lo.seen()?.contains(b"kanarienvogel")?, "{dial}: not on lo");
        }
    }
    Ok(())
}

/// One connection of both reporters, under the labels that a tunnel would have given it.
fn counted(before: &Before<'_>, up: u32, down: u32) -> Result<()> {
    for (reporter, direction) in [("source", "outbound"), ("destination", "inbound")] {
        let labels = [
            ("reporter", reporter),
            ("source_workload", "client"),
            (
                "source_principal",
                "spiffe://cluster.local/ns/demo/sa/client",
            ),
            ("destination_workload", "near"),
            (
                "destination_principal",
                "spiffe://cluster.local/ns/demo/sa/near",
            ),
            ("connection_security_policy", "mutual_tls"),
            ("response_flags", "-"),
        ];
        before.wait_gain("istio_tcp_connections_closed_total", &labels, 1.0)?;
        before.wait_gain("istio_tcp_connections_opened_total", &labels, 1.0)?;
        before.wait_gain("istio_tcp_received_bytes_total", &labels, f64::from(up))?;
        before.wait_gain("istio_tcp_sent_bytes_total", &labels, f64::from(down))?;
        let path = [("direction", direction), ("path", "node_local")];
        before.wait_gain("ztunnel_connections_routed_total", &path, 1.0)?;
    }
    before.wait_gain("istio_tcp_connections_failed_total", &[], 0.0)?;
    before.wait_gain("ztunnel_connections_total", &[("reason", "complete")], 2.0)
}

// 98, 99, 114.
#[test]
fn a_policy_of_the_destination_refuses_and_later_revokes() -> Result<()> {
    let mesh = mesh(true)?;
    let (client, near) = (mesh.pod("client")?, mesh.pod("near")?);
    let app = Server::start(&near.netns, 9000, apps::echo)?;
    let mut open = Vec::new();
    for to in [near.at(9000), near.at6(9000)] {
        let mut stream = apps::dial(&client.netns, to)?;
        assert_alive(&mut stream)?;
        open.push(stream);
    }
    let seen = app.seen().len();
    let mark = mesh.a.log().mark();
    let before = Before::of(&mesh.a)?;
    let denied = file(&mesh.topology)
        .policy(&deny_client())
        .attach("near", "demo/no-client");
    mesh.replace(&denied)?;
    let (from, to) = (client.spiffe_id(), near.spiffe_id());
    let common = [
        ("path", "node_local"),
        ("src.identity", &*from),
        ("dst.identity", &*to),
    ];
    let with = |more: &[(&'static str, &'static str)]| {
        let mut fields = common.to_vec();
        fields.extend(more);
        fields
    };
    for stream in &open {
        assert_eq!(wait_end(stream)?.0, End::Reset);
    }
    for (direction, reason) in [("inbound", "policy_revoked"), ("outbound", "reset")] {
        let fields = with(&[("direction", direction), ("reason", reason)]);
        mesh.a.wait_access(mark, &fields)?;
    }
    let mark = mesh.a.log().mark();
    for to in [near.at(9000), near.at6(9000)] {
        assert_refused(&client.netns, to)?;
    }
    for (direction, reason) in [("inbound", "policy_denied"), ("outbound", "peer_refused")] {
        let fields = with(&[("direction", direction), ("reason", reason)]);
        mesh.a.wait_access(mark, &fields)?;
    }
    let flags = [("response_flags", "DENY"), ("reporter", "destination")];
    before.wait_gain("istio_tcp_connections_closed_total", &flags, 4.0)?;
    assert_eq!(app.seen().len(), seen, "the application saw a refused one");
    mesh.replace(&file(&mesh.topology))?;
    assert_echo(&client.netns, near.at(9000)).context("without the policy again")
}

#[test]
fn a_connection_ends_when_either_pod_leaves_the_mesh() -> Result<()> {
    for leaving in ["client", "near"] {
        let mesh = mesh(true)?;
        let (client, near) = (mesh.pod("client")?, mesh.pod("near")?);
        let _app = Server::start(&near.netns, 9000, apps::echo)?;
        let mut stream = apps::dial(&client.netns, near.at(9000))?;
        assert_alive(&mut stream)?;
        let mark = mesh.a.log().mark();
        mesh.replace(&file(&mesh.topology).without(leaving))?;
        assert_eq!(wait_end(&stream)?.0, End::Reset, "{leaving}");
        let [gone, other] = if leaving == "client" {
            ["outbound", "inbound"]
        } else {
            ["inbound", "outbound"]
        };
        let fields = [("direction", gone), ("reason", "pod_removed")];
        mesh.a.wait_access(mark, &fields).context(leaving)?;
        let fields = [("direction", other), ("path", "node_local")];
        mesh.a.wait_access(mark, &fields).context(leaving)?;
    }
    Ok(())
}

// 118–122.
#[test]
fn a_gibibyte_a_half_close_and_a_reset_arrive_as_they_are() -> Result<()> {
    let mesh = mesh(true)?;
    let (client, near) = (mesh.pod("client")?, mesh.pod("near")?);
    let _bulk = Server::start(&near.netns, 9000, bulk::serve)?;
    let _count = Server::start(&near.netns, 9001, apps::count_until_eof)?;
    let _reset = Server::start(&near.netns, 9002, apps::reset)?;
    for (to, bytes) in [(near.at(9000), 1 << 30), (near.at6(9000), 64 << 20)] {
        let mark = mesh.a.log().mark();
        let done = bulk::exchange(&client.netns, to, bytes, 11)?;
        assert_eq!(done.bytes_each_way, bytes);
        let moved = (bytes + 16).to_string();
        for direction in ["outbound", "inbound"] {
            let fields = [
                ("direction", direction),
                ("path", "node_local"),
                ("reason", "complete"),
                ("bytes_sent", &*moved),
                ("bytes_recv", &*moved),
            ];
            mesh.a.wait_access(mark, &fields)?;
        }
    }
    let reply = apps::ask(&client.netns, near.at(9001), &[7; 300_000])?;
    assert_eq!(reply.text(), "received 300000");
    let mark = mesh.a.log().mark();
    let mut stream = apps::dial(&client.netns, near.at(9002))?;
    stream.write_all(b"x")?;
    let reset = stream.read(&mut [0]).map_err(|e| e.kind());
    assert_eq!(reset, Err(ErrorKind::ConnectionReset));
    let fields = [("reason", "reset"), ("path", "node_local")];
    mesh.a.wait_access(mark, &fields)?;
    Ok(())
}

#[test]
fn many_connections_at_once_are_all_served_and_counted() -> Result<()> {
    let mesh = mesh(true)?;
    let (client, near) = (mesh.pod("client")?, mesh.pod("near")?);
    let _app = Server::start(&near.netns, 9000, apps::echo)?;
    let before = Before::of(&mesh.a)?;
    let mut streams = (0..MANY)
        .map(|_| apps::dial(&client.netns, near.at(9000)))
        .collect::<Result<Vec<TcpStream>>>()?;
    for stream in &mut streams {
        assert_alive(stream)?;
    }
    for direction in ["outbound", "inbound"] {
        let open = [("direction", direction)];
        before.wait_gain("ztunnel_connections_open", &open, f64::from(MANY))?;
    }
    drop(streams);
    before.wait_gain("ztunnel_connections_open", &[], 0.0)?;
    let local = [("path", "node_local")];
    before.wait_gain(
        "ztunnel_connections_routed_total",
        &local,
        f64::from(2 * MANY),
    )
}

#[test]
fn switched_off_it_is_hbone_again() -> Result<()> {
    let mesh = mesh(false)?;
    let (client, near) = (mesh.pod("client")?, mesh.pod("near")?);
    let _app = Server::start(&near.netns, 9000, apps::echo)?;
    for to in [near.at(9000), near.at6(9000), (VIP4, 80).into()] {
        let cable = Sniffer::on(&mesh.net("a")?.netns, "p-near")?;
        let mark = mesh.a.log().mark();
        assert_echo(&client.netns, to)?;
        for direction in ["outbound", "inbound"] {
            let fields = [("direction", direction), ("reason", "complete")];
            let line = mesh.a.wait_access(mark, &fields)?;
            assert_eq!(line.get("path"), None, "{line:?}");
        }
        let seen = cable.seen()?;
        assert!(
            seen.tls_records(HBONE).application_data > 0,
            "{to}: {seen:?}"
        );
        assert_eq!(seen.count(REQUEST)?, 0, "{to}");
    }
    Ok(())
}

#[test]
fn a_pod_of_this_node_that_is_not_in_the_mesh_is_reached_in_plain_tcp() -> Result<()> {
    let mesh = mesh(true)?;
    let (client, outside) = (mesh.pod("client")?, mesh.pod("outside")?);
    let _app = Server::start(&outside.netns, 9000, apps::echo)?;
    for to in [outside.at(9000), outside.at6(9000)] {
        let mark = mesh.a.log().mark();
        let before = Before::of(&mesh.a)?;
        assert_echo(&client.netns, to)?;
        let at: SocketAddr = to;
        let at = at.to_string();
        let fields = [("direction", "outbound"), ("dst.addr", &*at)];
        let line = mesh.a.wait_access(mark, &fields)?;
        for absent in ["path", "src.identity", "dst.identity"] {
            assert_eq!(line.get(absent), None, "{line:?}");
        }
        let plain = [("path", "plaintext")];
        before.wait_gain("ztunnel_connections_routed_total", &plain, 1.0)?;
        let local = [("path", "node_local")];
        before.wait_gain("ztunnel_connections_routed_total", &local, 0.0)?;
    }
    Ok(())
}

const VIP4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 33);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd88, 0, 0, 96, 0, 0, 0, 0x33);
const MANY: u32 = 300;
