//! Plaintext from outside into a pod: what reaches the application, as whom, and when nothing does.

use anyhow::{Context as _, Result};
use ztunnel_tests::{
    apps::{self, Heard, Server},
    meshfile::MeshFile,
    topology::{Builder, Topology},
    ztunnel::HBONE,
};

use crate::mesh::{
    Before, Mesh, PATIENCE, REQUEST, WATCH, assert_echo, is_refused, knock, number, wait_fate,
};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b")
}

fn open(topology: &Topology) -> MeshFile {
    MeshFile::of(topology).without("outside")
}

pub(crate) fn strict(topology: &Topology) -> MeshFile {
    open(topology)
        .policy(STRICT)
        .attach("server", "demo/strict")
}

// 86, 93, B129.
#[test]
fn plaintext_is_relayed_from_the_client_itself_where_policy_admits_it() -> Result<()> {
    let mesh = Mesh::start(pods(), open)?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let (a, b) = (mesh.net("a")?, mesh.net("b")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for (name, from, to, own) in [
        (
            "a pod that is not in the mesh",
            &outside.netns,
            server.at(9000),
            outside.at(0).ip(),
        ),
        (
            "the same by IPv6",
            &outside.netns,
            server.at6(9000),
            outside.at6(0).ip(),
        ),
        (
            "its own node",
            &b.netns,
            server.at(9000),
            b.gateway_v4.into(),
        ),
        (
            "its own node by IPv6",
            &b.netns,
            server.at6(9000),
            b.gateway_v6.into(),
        ),
        ("the other node", &a.netns, server.at(9000), a.v4.into()),
    ] {
        let mark = mesh.b.log().mark();
        let before = Before::of(&mesh.b)?;
        let reply = apps::ask(from, to, REQUEST).context(name)?;
        assert_eq!(
            (reply.bytes.as_slice(), reply.peer),
            (REQUEST, to),
            "{name}"
        );
        let seen = app.seen().last().copied().context(name)?;
        assert_eq!((seen.peer.ip(), seen.local), (own, to), "{name}");
        let source = reply.local.to_string();
        let fields = [
            ("direction", "inbound"),
            ("src.addr", source.as_str()),
            ("reason", "complete"),
        ];
        let line = mesh.b.wait_access(mark, &fields).context(name)?;
        for absent in ["src.identity", "dst.identity", "dst.hbone_addr", "error"] {
            assert_eq!(line.get(absent), None, "{name}: {line:?}");
        }
        let length = u64::try_from(REQUEST.len())?;
        assert_eq!(
            (number(&line, "bytes_recv")?, number(&line, "bytes_sent")?),
            (length, length)
        );
        let labels = [
            ("connection_security_policy", "unknown"),
            ("reporter", "destination"),
        ];
        before.wait_gain("istio_tcp_connections_opened_total", &labels, 1.0)?;
        before.wait_gain("istio_tcp_connections_closed_total", &labels, 1.0)?;
        let proxied = before.gained(VERDICTS, &[("verdict", "plaintext_proxied")])?;
        assert!(proxied >= 1.0, "{name}: not counted");
    }
    Ok(())
}

// 94.
#[test]
fn under_a_strict_policy_plaintext_is_refused_at_its_syn_and_hbone_works() -> Result<()> {
    let mesh = Mesh::start(pods(), strict)?;
    let (client, outside, server) = (
        mesh.pod("client")?,
        mesh.pod("outside")?,
        mesh.pod("server")?,
    );
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for from in [&mesh.net("b")?.netns, &mesh.net("a")?.netns, &outside.netns] {
        for to in [server.at(9000), server.at6(9000)] {
            let before = Before::of(&mesh.b)?;
            let fate = knock(from, to, REQUEST, PATIENCE)?;
            let refused = Heard::NotConnected(std::io::ErrorKind::ConnectionRefused);
            assert_eq!(fate, refused, "{to} from {from}");
            let dropped = before.gained(VERDICTS, &[("verdict", "plaintext_dropped")])?;
            assert!(dropped >= 1.0, "{to} from {from}: not counted");
        }
    }
    assert!(app.seen().is_empty(), "the application saw plaintext");
    for to in [server.at(9000), server.at6(9000)] {
        assert_echo(&client.netns, to)?;
    }
    Ok(())
}

// 95.
#[test]
fn a_port_that_strictness_exempts_takes_plaintext_and_others_do_not() -> Result<()> {
    let mesh = Mesh::start(pods(), |topology| {
        open(topology)
            .policy(EXEMPTING)
            .attach("server", "demo/strict")
    })?;
    let (client, outside, server) = (
        mesh.pod("client")?,
        mesh.pod("outside")?,
        mesh.pod("server")?,
    );
    let _exempt = Server::start(&server.netns, 9090, apps::echo)?;
    let other = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = mesh.b.log().mark();
    assert_echo(&outside.netns, server.at(9090))?;
    let fate = knock(&outside.netns, server.at(9000), REQUEST, PATIENCE)?;
    assert!(is_refused(&fate), "{fate:?}");
    assert!(
        other.seen().is_empty(),
        "the application saw a refused connection"
    );
    let line = mesh.b.wait_access(
        mark,
        &[("reason", "policy_denied"), ("direction", "inbound")],
    )?;
    assert_eq!(line.get("src.identity"), None, "{line:?}");
    for port in [9000, 9090] {
        assert_echo(&client.netns, server.at(port))?;
    }
    Ok(())
}

#[test]
fn the_verdict_for_plaintext_follows_the_file_at_once() -> Result<()> {
    let mesh = Mesh::start(pods(), open)?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    for _ in 0..2 {
        mesh.replace(&strict(&mesh.topology))?;
        let took = wait_fate(
            &outside.netns,
            server.at(9000),
            "plaintext to be refused",
            |fate| matches!(fate, Heard::NotConnected(_)),
        )?;
        assert!(took < TAKES_EFFECT, "strictness took {took:?}");
        mesh.replace(&open(&mesh.topology))?;
        let took = wait_fate(
            &outside.netns,
            server.at(9000),
            "plaintext to be admitted",
            |fate| fate.answered(),
        )?;
        assert!(took < TAKES_EFFECT, "openness took {took:?}");
    }
    Ok(())
}

// 94 for the proxy's own port: what is no TLS gets nothing, whatever policy says.
#[test]
fn plaintext_on_the_hbone_port_reaches_nobody() -> Result<()> {
    let mesh = Mesh::start(pods(), open)?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let app = Server::start(&server.netns, HBONE, apps::echo);
    let fate = knock(&outside.netns, server.at(HBONE), REQUEST, PATIENCE)?;
    assert!(
        !fate.answered() || fate != Heard::Answer(REQUEST.to_vec()),
        "{fate:?}"
    );
    if let Ok(app) = app {
        assert!(
            app.seen().is_empty(),
            "an application took the port of HBONE"
        );
    }
    // And the port is still HBONE's.
    let _echo = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&mesh.pod("client")?.netns, server.at(9000))?;
    let fate = knock(&outside.netns, server.at(9999), REQUEST, WATCH)?;
    assert!(!fate.answered(), "{fate:?}");
    Ok(())
}

/// Refuses whoever proves no identity.
pub(crate) const STRICT: &str = "name: strict\nnamespace: demo\nscope: WorkloadSelector\n\
    action: Deny\ndryRun: false\nrules:\n- - - notPrincipals:\n      - Presence: []\n";
/// The same with a second clause: not on port 9090.
const EXEMPTING: &str = "name: strict\nnamespace: demo\nscope: WorkloadSelector\naction: Deny\n\
    dryRun: false\nrules:\n- - - notPrincipals:\n      - Presence: []\n  - - notDestinationPorts: [9090]\n";
/// What the kernel programs decided, by verdict.
pub(crate) const VERDICTS: &str = "ztunnel_capture_verdicts_total";
/// From the file's replacement to the kernel's verdict.
const TAKES_EFFECT: std::time::Duration = std::time::Duration::from_secs(20);
