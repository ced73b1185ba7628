//! Policy and connections that are open: what policy stops to admit ends, and nothing else does.

use std::net::TcpStream;

use anyhow::{Context as _, Result};
use ztunnel_tests::{
    apps::{self, End, Heard, Server},
    meshfile::{self, MeshFile},
    topology::{Builder, Topology},
};

use crate::{
    mesh::{Before, Mesh, PATIENCE, WATCH, assert_alive, wait_end},
    plaintext::STRICT,
};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("stranger", "a")
        .pod("server", "b")
        .pod("near", "b")
}

/// Three connections to the server: of two accounts, and without any.
struct Open {
    client: TcpStream,
    stranger: TcpStream,
    plaintext: TcpStream,
}

impl Open {
    fn new(mesh: &Mesh) -> Result<Self> {
        let to = mesh.pod("server")?.at(9000);
        let open = |netns| -> Result<TcpStream> {
            let mut stream = apps::dial(netns, to)?;
            assert_alive(&mut stream)?;
            Ok(stream)
        };
        Ok(Self {
            client: open(&mesh.pod("client")?.netns)?,
            stranger: open(&mesh.pod("stranger")?.netns)?,
            plaintext: open(&mesh.net("a")?.netns)?,
        })
    }
}

fn deny(name: &str, account: &str) -> String {
    meshfile::allow_accounts(name, &[account]).replace("Allow", "Deny")
}

/// Waits for the end of a connection that policy has withdrawn, and for what the node says of it.
fn revoked(mesh: &Mesh, mark: usize, stream: &TcpStream, identity: Option<&str>) -> Result<()> {
    let (_, took) = wait_end(stream).context("policy should have ended it")?;
    let mut fields = vec![("reason", "policy_revoked"), ("direction", "inbound")];
    fields.extend(identity.map(|id| ("src.identity", id)));
    let line = mesh.b.wait_access(mark, &fields)?;
    assert!(line.get("error").is_some(), "{line:?}");
    assert!(took < PROMPT, "it took {took:?}");
    Ok(())
}

// 114, 116: the policy comes with the workload's list, which alone has changed it.
#[test]
fn a_new_deny_ends_what_it_matches_and_nothing_else() -> Result<()> {
    let mesh = Mesh::start(pods(), |topology| {
        MeshFile::of(topology)
            .policy(&deny("no-client", "client"))
            .policy(STRICT)
    })?;
    let _app = Server::start(&mesh.pod("server")?.netns, 9000, apps::echo)?;
    let mut open = Open::new(&mesh)?;
    let before = Before::of(&mesh.b)?;

    let mark = mesh.b.log().mark();
    let file = MeshFile::of(&mesh.topology)
        .policy(&deny("no-client", "client"))
        .policy(STRICT)
        .attach("server", "demo/no-client");
    mesh.replace(&file)?;
    let identity = mesh.pod("client")?.spiffe_id();
    revoked(&mesh, mark, &open.client, Some(&identity))?;
    assert_alive(&mut open.stranger).context("stranger")?;
    assert_alive(&mut open.plaintext).context("plaintext")?;
    let flags = [("response_flags", "DENY"), ("source_workload", "client")];
    before.wait_gain("istio_tcp_connections_closed_total", &flags, 1.0)?;
    before.wait_gain("istio_tcp_connections_failed_total", &flags, 1.0)?;

    let mark = mesh.b.log().mark();
    mesh.replace(&file.attach("server", "demo/strict"))?;
    revoked(&mesh, mark, &open.plaintext, None)?;
    assert_alive(&mut open.stranger).context("stranger")?;
    assert_eq!(apps::read_end(&open.stranger, WATCH)?.0, End::Open);
    assert_alive(&mut open.stranger).context("stranger, a while later")?;
    before.wait_gain(
        "ztunnel_connections_total",
        &[("reason", "policy_revoked")],
        2.0,
    )
}

// 114: the same when the policy itself is what is pushed.
#[test]
fn a_deny_that_is_pushed_ends_hbone_and_plaintext_alike() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let _app = Server::start(&mesh.pod("server")?.netns, 9000, apps::echo)?;
    let open = Open::new(&mesh)?;
    let mark = mesh.b.log().mark();
    let everybody = "name: nobody\nnamespace: demo\nscope: Global\naction: Deny\ndryRun: false\n\
                     rules:\n- []\n";
    mesh.replace(&MeshFile::of(&mesh.topology).policy(everybody))?;
    for (stream, pod) in [(&open.client, "client"), (&open.stranger, "stranger")] {
        revoked(&mesh, mark, stream, Some(&mesh.pod(pod)?.spiffe_id()))?;
    }
    revoked(&mesh, mark, &open.plaintext, None)
}

// 115, B140.
#[test]
fn taking_an_allow_away_ends_what_only_it_allowed() -> Result<()> {
    let (one, other) = (
        meshfile::allow_accounts("one", &["client"]),
        meshfile::allow_accounts("other", &["stranger"]),
    );
    let both = |topology: &Topology| {
        MeshFile::of(topology)
            .policy(&one)
            .policy(&other)
            .attach("server", "demo/one")
            .attach("server", "demo/other")
    };
    let mesh = Mesh::start(pods(), both)?;
    let server = mesh.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut client = apps::dial(&mesh.pod("client")?.netns, server.at(9000))?;
    let mut stranger = apps::dial(&mesh.pod("stranger")?.netns, server.at(9000))?;
    assert_alive(&mut client)?;
    assert_alive(&mut stranger)?;
    let mark = mesh.b.log().mark();
    let left = MeshFile::of(&mesh.topology)
        .policy(&other)
        .attach("server", "demo/other");
    mesh.replace(&left)?;
    revoked(&mesh, mark, &client, Some(&mesh.pod("client")?.spiffe_id()))?;
    assert_alive(&mut stranger)
}

// 114 on one node: the relay between two pods of the same node is judged again too.
#[test]
fn a_connection_between_pods_of_one_node_is_revoked_as_well() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (near, server) = (mesh.pod("near")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&near.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    let mark = mesh.b.log().mark();
    let file = MeshFile::of(&mesh.topology)
        .policy(&deny("no", "near"))
        .attach("server", "demo/no");
    mesh.replace(&file)?;
    revoked(&mesh, mark, &stream, Some(&near.spiffe_id()))
}

// The other end was told who speaks; when that is not so any more, it must not go on.
#[test]
fn a_workload_that_vanishes_or_is_somebody_else_now_loses_its_open_connections() -> Result<()> {
    let plain = |topology: &Topology| MeshFile::of(topology).without("near");
    let mesh = Mesh::start(pods(), plain)?;
    let (client, stranger) = (mesh.pod("client")?, mesh.pod("stranger")?);
    let (server, near) = (mesh.pod("server")?, mesh.pod("near")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let _outside = Server::start(&near.netns, 9000, apps::echo)?;
    let mut other = apps::dial(&stranger.netns, server.at(9000))?;
    let file = plain(&mesh.topology).for_node("a");
    let uid = "uid: demo//Pod/demo/client";
    let account = "serviceAccount: client\n    workloadName";
    for (from, to) in [
        (uid, "uid: somebody-else"),
        (account, "serviceAccount: clerk\n    workloadName"),
    ] {
        let mut hbone = apps::dial(&client.netns, server.at(9000))?;
        let mut plain = apps::dial(&client.netns, near.at(9000))?;
        assert_alive(&mut hbone).context(to)?;
        assert_alive(&mut plain).context(to)?;
        assert_alive(&mut other).context(to)?;
        let before = Before::of(&mesh.a)?;
        let mark = mesh.a.log().mark();
        let changed = file.replacen(from, to, 1);
        assert_ne!(file, changed, "{from} is not in the file");
        mesh.a.replace_file(&changed)?;
        wait_end(&hbone).with_context(|| format!("HBONE, {to}"))?;
        wait_end(&plain).with_context(|| format!("plain, {to}"))?;
        let ended = [("reason", "unknown_workload"), ("direction", "outbound")];
        let line = mesh.a.wait_access(mark, &ended)?;
        assert_eq!(line.get("src.workload"), Some("client"), "{line:?}");
        before.wait_gain("ztunnel_connections_total", &ended, 2.0)?;
        assert_alive(&mut other).context("another pod of the node")?;
        let applied = |line: &str| line.contains("state applied").then_some(());
        let log = mesh.a.log();
        log.wait_since(mark, "the change", PATIENCE, applied)?;
        let mark = log.mark();
        mesh.a.replace_file(&file)?;
        log.wait_since(mark, "the change back", PATIENCE, applied)?;
        crate::mesh::wait_fate(
            &client.netns,
            server.at(9000),
            "the workload",
            Heard::answered,
        )?;
    }
    Ok(())
}

/// From the file's replacement to the end of the connection.
const PROMPT: std::time::Duration = std::time::Duration::from_secs(20);
