//! Who may talk to whom: each kind of policy, as the clients, the application and the node see it.

use anyhow::{Context as _, Result};
use ztunnel_tests::{
    apps::{self, Server},
    meshfile::{self, MeshFile},
    topology::{Builder, Topology},
};

use crate::mesh::{Before, Mesh, assert_echo, assert_refused, is_refused, wait_fate};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("stranger", "a")
        .pod("server", "b")
        .pod("friend", "b")
}

/// What each policy admits: by address of the client pod.
struct Row {
    name: &'static str,
    policies: Vec<String>,
    attach: Vec<&'static str>,
    client: bool,
    stranger: bool,
}

// 84, 98, 99, 100, 101, 102, 105, 107, 110, 113.
#[test]
fn policies_admit_and_refuse_as_they_say() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let server = mesh.pod("server")?.clone();
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    for row in rows() {
        check_row(&mesh, &app, &row).with_context(|| format!("row {}", row.name))?;
    }
    Ok(())
}

fn rows() -> Vec<Row> {
    let row = |name, policies: &[&str], attach: &[&'static str], client, stranger| Row {
        name,
        policies: policies.iter().map(|p| (*p).to_owned()).collect(),
        attach: attach.to_vec(),
        client,
        stranger,
    };
    let allow = meshfile::allow_accounts("one", &["client"]);
    let deny = meshfile::allow_accounts("no", &["client"]).replace("Allow", "Deny");
    let deny_stranger = meshfile::allow_accounts("no", &["stranger"]).replace("Allow", "Deny");
    let of_namespace = allow.replace("WorkloadSelector", "Namespace");
    let elsewhere = of_namespace.replace("namespace: demo\nscope", "namespace: other\nscope");
    let global = elsewhere.replace("scope: Namespace", "scope: Global");
    let no_rules =
        "name: one\nnamespace: demo\nscope: Namespace\naction: Allow\ndryRun: false\nrules: []\n";
    let deny_nothing = no_rules.replace("Allow", "Deny");
    let anybody = no_rules.replace("rules: []", "rules:\n- []");
    let dry_allow = of_namespace.replace("dryRun: false", "dryRun: true");
    vec![
        // Each differs from the one before in what it admits, so that its effect can be awaited.
        row("none", &[], &[], true, true),
        row("allow one account", &[&allow], &["demo/one"], true, false),
        row("a selector that nobody names", &[&allow], &[], true, true),
        row(
            "deny beats allow",
            &[&allow, &deny],
            &["demo/one", "demo/no"],
            false,
            false,
        ),
        row(
            "deny one account",
            &[&deny_stranger],
            &["demo/no"],
            true,
            false,
        ),
        row("of another namespace", &[&elsewhere], &[], true, true),
        row("of the namespace", &[&of_namespace], &[], true, false),
        row("deny without rules", &[&deny_nothing], &[], true, true),
        row("allow without rules", &[no_rules], &[], false, false),
        row("a rule without clauses", &[&anybody], &[], true, true),
        row("of the whole mesh", &[&global], &[], true, false),
        row("only dry runs", &[&dry_allow], &[], true, true),
    ]
}

fn check_row(mesh: &Mesh, app: &Server, row: &Row) -> Result<()> {
    let (client, stranger, server) = (
        mesh.pod("client")?,
        mesh.pod("stranger")?,
        mesh.pod("server")?,
    );
    let mut file = MeshFile::of(&mesh.topology);
    for policy in &row.policies {
        file = file.policy(policy);
    }
    for key in &row.attach {
        file = file.attach("server", key);
    }
    mesh.replace(&file)?;
    let expected = [(client, row.client), (stranger, row.stranger)];
    // The file takes effect within a moment; from then on it must hold.
    for (pod, admitted) in expected {
        let what = format!("{} admitted: {admitted}", pod.name);
        wait_fate(&pod.netns, server.at(9000), &what, |fate| {
            if admitted {
                fate.answered()
            } else {
                is_refused(fate)
            }
        })?;
    }
    for (pod, admitted) in expected {
        for to in [server.at(9000), server.at6(9000)] {
            let (mark, mark_b) = mesh.marks();
            let accepted = app.seen().len();
            if admitted {
                assert_echo(&pod.netns, to)?;
                continue;
            }
            let (a, b) = (Before::of(&mesh.a)?, Before::of(&mesh.b)?);
            assert_refused(&pod.netns, to)?;
            assert_eq!(
                app.seen().len(),
                accepted,
                "the application saw a refused connection"
            );
            let identity = pod.spiffe_id();
            let denied = [
                ("reason", "policy_denied"),
                ("direction", "inbound"),
                ("src.identity", identity.as_str()),
                ("dst.workload", "server"),
            ];
            let line = mesh.b.wait_access(mark_b, &denied)?;
            assert_eq!(line.level, "info", "a peer cannot cause an error: {line:?}");
            assert!(line.get("error").is_some(), "{line:?}");
            let outbound = [
                ("reason", "peer_refused"),
                ("src.workload", pod.name.as_str()),
            ];
            let line = mesh.a.wait_access(mark, &outbound)?;
            assert!(
                line.get("error").is_some_and(|e| e.contains("401")),
                "{line:?}"
            );
            a.wait_gain(
                "ztunnel_connections_total",
                &[("reason", "peer_refused")],
                1.0,
            )?;
            b.wait_gain(
                "ztunnel_connections_total",
                &[("reason", "policy_denied")],
                1.0,
            )?;
        }
    }
    Ok(())
}

// B125.
#[test]
fn a_denial_is_counted_as_closed_and_failed_with_its_flag() -> Result<()> {
    let allow = meshfile::allow_accounts("one", &["client"]);
    let mesh = Mesh::start(pods(), |topology| {
        MeshFile::of(topology)
            .policy(&allow)
            .attach("server", "demo/one")
    })?;
    let (stranger, server) = (mesh.pod("stranger")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let before = Before::of(&mesh.b)?;
    assert_refused(&stranger.netns, server.at(9000))?;
    let labels = [
        ("response_flags", "DENY"),
        ("reporter", "destination"),
        (
            "source_principal",
            "spiffe://cluster.local/ns/demo/sa/stranger",
        ),
        ("destination_workload", "server"),
    ];
    before.wait_gain("istio_tcp_connections_closed_total", &labels, 1.0)?;
    before.wait_gain("istio_tcp_connections_failed_total", &labels, 1.0)?;
    before.wait_gain("istio_tcp_connections_opened_total", &[], 1.0)
}

// 111: the established proxy ignores a policy that it does not know; this one refuses.
#[test]
fn a_policy_that_is_missing_refuses() -> Result<()> {
    let mesh = Mesh::start(pods(), |topology| {
        MeshFile::of(topology).attach("server", "demo/not-there")
    })?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = mesh.b.log().mark();
    assert_refused(&client.netns, server.at(9000))?;
    let line = mesh.b.wait_access(mark, &[("reason", "policy_missing")])?;
    assert_eq!(line.level, "warn", "{line:?}");
    assert!(
        line.get("error").is_some_and(|e| e.contains("not-there")),
        "{line:?}"
    );
    assert_refused(&mesh.net("b")?.netns, server.at(9000)).context("plaintext")?;
    assert!(app.seen().is_empty());
    // It comes: the workload opens.
    let arrived = MeshFile::of(&mesh.topology)
        .attach("server", "demo/not-there")
        .policy(&meshfile::allow_accounts("not-there", &["client"]));
    mesh.replace(&arrived)?;
    wait_fate(
        &client.netns,
        server.at(9000),
        "the policy to arrive",
        |fate| fate.answered(),
    )?;
    Ok(())
}

// 112.
#[test]
fn a_dry_run_that_would_deny_admits_and_says_so() -> Result<()> {
    let deny = meshfile::allow_accounts("trial", &["client"])
        .replace("Allow", "Deny")
        .replace("dryRun: false", "dryRun: true");
    let mesh = Mesh::start(pods(), |topology| {
        MeshFile::of(topology)
            .policy(&deny)
            .attach("server", "demo/trial")
    })?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = mesh.b.log().mark();
    assert_echo(&client.netns, server.at(9000))?;
    mesh.b
        .log()
        .wait_since(mark, "the dry run", crate::mesh::PATIENCE, |line| {
            let told = line.to_lowercase().replace(['_', '-'], " ");
            (told.contains("dry run") && line.contains("trial")).then_some(())
        })
}
