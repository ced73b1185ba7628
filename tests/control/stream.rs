//! What a node process sends to its control plane, and what it waits for.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    access::Line,
    apps::{self, Server},
    control_plane::{ADDRESS, AUTHORIZATION, Seen, workload_of},
    proto::discovery::{Any, DeltaDiscoveryResponse, Resource},
    topology::{Builder, Topology},
    wait,
};

use crate::play::{PATIENCE, Play, assert_echo};

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "b")
}

// B001, B002, B003, B004, B005, B007, B011, B034.
#[test]
fn the_stream_asks_for_addresses_then_policies_and_answers_each_response_once() -> Result<()> {
    let environment = [("ISTIO_META_FOO", "bar"), ("XDS_HEADER_x-tenant", "blue")];
    let mut play = Play::launch(pods(), &environment, |_, _| Ok(()))?;
    play.a.wait_ready()?;
    let answer = |seen: &Seen| !seen.request.response_nonce.is_empty();
    play.plane.wait_request("the second answer", 3, answer)?;
    let requests = play.plane.requests();
    let types: Vec<_> = requests.iter().map(|r| &*r.request.type_url).collect();
    ensure!(types[..2] == [ADDRESS, AUTHORIZATION], "{types:?}");
    for first in &requests[..2] {
        let request = &first.request;
        let node = request.node.as_ref().context("no node")?;
        let parts: Vec<_> = node.id.split('~').collect();
        ensure!(parts.len() == 4 && parts[0] == "ztunnel", "{}", node.id);
        let fields = &node.metadata.as_ref().context("no metadata")?.fields;
        for key in ["NAME", "NAMESPACE", "INSTANCE_IPS", "NODE_NAME", "FOO"] {
            ensure!(fields.contains_key(key), "no {key} in {fields:?}");
        }
        ensure!(request.resource_names_subscribe.is_empty());
        ensure!(request.resource_names_unsubscribe.is_empty());
    }
    let mut nonces: Vec<_> = requests[2..]
        .iter()
        .map(|r| &*r.request.response_nonce)
        .collect();
    ensure!(
        requests[2..].iter().all(|r| r.request.node.is_none()),
        "a node again"
    );
    let count = nonces.len();
    nonces.dedup();
    ensure!(nonces.len() == count && !nonces.contains(&""), "{nonces:?}");
    let head = play.plane.heads().first().cloned().context("no stream")?;
    for (name, value) in [
        ("clusterid", "demo"),
        ("authorization", "Bearer first-token"),
        ("x-tenant", "blue"),
    ] {
        ensure!(
            head.get(name).is_some_and(|found| found == value),
            "{head:?}"
        );
    }
    play.wait_metric("istio_xds_message_total", &[("url", ADDRESS)], 1.0)?;
    play.wait_metric("ztunnel_control_connected", &[], 1.0)
}

// B040, B046, B057.
#[test]
fn pods_of_two_nodes_talk_with_state_and_certificates_of_the_control_plane() -> Result<()> {
    let play = Play::both(pods(), &[("SECRET_TTL", "1h")], |_| {})?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = play.a.log().mark();
    assert_echo(&client.netns, server.at(9000))?;
    assert_echo(&client.netns, server.at6(9000))?;
    let line = play.access(mark, &[("direction", "outbound"), ("reason", "complete")])?;
    ensure!(
        line.get("dst.identity") == Some(&*server.spiffe_id()),
        "{line:?}"
    );
    Ok(())
}

// B028, B029, B030.
#[test]
fn readiness_waits_for_an_accepted_response_of_each_type() -> Result<()> {
    let play = Play::launch(pods(), &[], |plane, _| {
        plane.manners(|manners| manners.withhold = Some(AUTHORIZATION));
        Ok(())
    })?;
    let acked = |seen: &Seen| !seen.request.response_nonce.is_empty();
    play.plane
        .wait_request("the answer to the addresses", 0, acked)?;
    let waiting = play.readiness()?;
    ensure!(
        waiting.status == 500 && waiting.body.contains("state manager"),
        "{waiting:?}"
    );
    let respond = |nonce: &str, resources| {
        play.plane.respond(&DeltaDiscoveryResponse {
            type_url: AUTHORIZATION.to_owned(),
            nonce: nonce.to_owned(),
            resources,
            ..DeltaDiscoveryResponse::default()
        });
        let this = nonce.to_owned();
        play.plane.wait_request("the answer", 0, move |seen| {
            seen.request.response_nonce == this
        })
    };
    let garbage = Resource {
        name: "demo/garbage".to_owned(),
        resource: Some(Any {
            type_url: AUTHORIZATION.to_owned(),
            value: vec![0xff; 3].into(),
        }),
        ..Resource::default()
    };
    let refused = respond("bad", vec![garbage])?;
    ensure!(refused.request.error_detail.is_some(), "{refused:?}");
    let waiting = play.readiness()?;
    ensure!(
        waiting.status == 500,
        "a refused response counts: {waiting:?}"
    );
    // An empty one counts.
    let accepted = respond("good", Vec::new())?;
    ensure!(accepted.request.error_detail.is_none(), "{accepted:?}");
    wait::until("readiness", PATIENCE, || {
        play.readiness()
            .ok()
            .filter(|ready| ready.status == 200)
            .map(drop)
    })
}

// B032, B033.
#[test]
fn the_token_is_read_again_for_each_stream() -> Result<()> {
    let play = Play::start(pods())?;
    let file = play.plane.token_file();
    let expect = |token: &str| {
        let token = token.to_owned();
        play.plane.manners(|manners| manners.token = Some(token));
    };
    fs::write(&file, "second-token")?;
    expect("second-token");
    play.plane.end_streams(0, "");
    play.plane.wait_streams(2)?;
    let mark = play.a.log().mark();
    // Empty, gone, then a link, as a mounted secret is replaced.
    fs::write(&file, "\n")?;
    play.plane.end_streams(0, "");
    play.wait_log(mark, &["no stream to the control plane", "holds no token"])?;
    fs::remove_file(&file)?;
    play.wait_log(mark, &["no stream to the control plane", "read", "token"])?;
    expect("third-token");
    let secret = file.with_extension("3");
    fs::write(&secret, "third-token")?;
    std::os::unix::fs::symlink(&secret, &file)?;
    play.plane.wait_streams(3)?;
    let last = play.plane.heads().last().cloned().context("no stream")?;
    ensure!(last["authorization"] == "Bearer third-token", "{last:?}");
    ensure!(play.readiness()?.status == 200, "it was ready and stays so");
    Ok(())
}

#[test]
fn a_refused_token_is_said_with_what_to_look_at() -> Result<()> {
    let play = Play::launch(pods(), &[], |plane, _| {
        plane.manners(|manners| manners.token = Some("another".to_owned()));
        Ok(())
    })?;
    let line = play.wait_log(0, &["no stream to the control plane", "UNAUTHENTICATED"])?;
    ensure!(
        line.contains("authentication failure") && line.contains("audience"),
        "{line}"
    );
    ensure!(
        !play
            .a
            .log()
            .lines()
            .iter()
            .any(|line| line.contains("first-token"))
    );
    ensure!(play.readiness()?.status == 500);
    Ok(())
}

// B014.
#[test]
fn a_response_that_nobody_asked_for_is_acknowledged() -> Result<()> {
    let play = Play::start(pods())?;
    play.plane.respond(&DeltaDiscoveryResponse {
        type_url: "type.googleapis.com/somebody.Else".to_owned(),
        nonce: "unasked".to_owned(),
        ..DeltaDiscoveryResponse::default()
    });
    let answered = |seen: &Seen| seen.request.response_nonce == "unasked";
    let answer = play.plane.wait_request("the answer", 0, answered)?;
    ensure!(answer.request.error_detail.is_none(), "{answer:?}");
    Ok(())
}

#[test]
fn with_a_file_and_a_control_plane_both_are_known() -> Result<()> {
    let mut play = Play::launch(pods(), &[], |plane, topology| {
        let server = topology.pod("server")?;
        plane.remove(ADDRESS, &workload_of(server).uid);
        Ok(())
    })?;
    play.a.wait_ready()?;
    let server = play.pod("server")?.clone();
    let file = ztunnel_tests::meshfile::MeshFile::of(&play.topology)
        .without("server")
        .for_node("a");
    play.a.replace_file(&file)?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let client = play.pod("client")?;
    // Before the file is read, the server is nobody's.
    wait::until("a connection to a workload of the file", PATIENCE, || {
        assert_echo(&client.netns, server.at(9000)).ok()?;
        let lines = play.a.access_lines();
        let known = |line: &Line| line.get("dst.workload") == Some("server");
        lines.iter().any(known).then_some(())
    })
    .with_context(|| play.story())
}
