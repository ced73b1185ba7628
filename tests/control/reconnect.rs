//! What a node process does when the control plane goes away, and when it comes back.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use prost::Message as _;
use ztunnel_tests::{
    apps::{self, Server},
    control_plane::{ADDRESS, AUTHORIZATION, Authority, Seen, workload_of},
    load::{Load, Outcome},
    proto::workload::{Address, Workload, address::Type},
    topology::{Builder, Topology},
    wait,
};

use crate::play::{PATIENCE, Play, allow, assert_alive, assert_echo, wait_echo};

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "a")
}

fn first_of(stream: usize, kind: &'static str) -> impl Fn(&Seen) -> bool {
    move |seen| {
        seen.stream == stream && seen.request.type_url == kind && seen.request.node.is_some()
    }
}

// B015, B024, B027.
#[test]
fn the_next_stream_goes_on_where_the_last_one_ended() -> Result<()> {
    let play = Play::start(pods())?;
    play.plane.policy(&allow("p", &["client"]));
    play.plane.put(ADDRESS, "x/garbage", vec![0xff; 9]);
    let server = workload_of(play.pod("server")?);
    play.plane.remove(ADDRESS, &server.uid);
    let nack = |seen: &Seen| seen.request.error_detail.is_some();
    play.plane.wait_request("the refusal", 0, nack)?;
    let began = Instant::now();
    play.plane.end_streams(0, "");
    let addresses = play
        .plane
        .wait_request("stream 2", 0, first_of(2, ADDRESS))?;
    ensure!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    let versions = addresses.request.initial_resource_versions;
    let client = workload_of(play.pod("client")?).uid;
    let names: Vec<_> = versions.keys().collect();
    ensure!(
        names == [&client],
        "accepted ones, not refused or removed ones: {names:?}"
    );
    ensure!(
        versions.values().all(|version| !version.is_empty()),
        "{versions:?}"
    );
    let policies = play
        .plane
        .wait_request("stream 2", 0, first_of(2, AUTHORIZATION))?;
    let names: Vec<_> = policies
        .request
        .initial_resource_versions
        .into_keys()
        .collect();
    ensure!(names == ["demo/p"], "{names:?}");
    let ended = [("reason", "Complete")];
    play.wait_metric("istio_xds_connection_terminations_total", &ended, 1.0)
}

// B023, B025, B026, B027.
#[test]
fn an_outage_is_waited_out_and_traffic_does_not_notice() -> Result<()> {
    let mut play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?.clone(), play.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut open = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    let mark = play.a.log().mark();
    play.plane.stop();
    let failures = |play: &Play| {
        let lines = play.a.log().lines();
        let failures = lines
            .iter()
            .filter(|line| line.contains("no stream to the control plane"));
        failures.filter_map(|line| millis(line)).collect::<Vec<_>>()
    };
    wait::until("five attempts", PATIENCE, || {
        (failures(&play).len() >= 5).then_some(())
    })?;
    assert_echo(&client.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    ensure!(play.readiness()?.status == 200, "it stays ready");
    play.wait_metric("ztunnel_control_connected", &[], 0.0)?;
    // Changed meanwhile, and with another certificate: the root file is read again.
    let root = Authority::new("another root")?;
    play.plane.remove(ADDRESS, &workload_of(&server).uid);
    play.plane.serve(&root)?;
    play.wait_log(mark, &["no stream to the control plane", "TLS with"])?;
    std::fs::write(play.plane.root_file(), root.pem())?;
    play.wait_log(mark, &["connected to the control plane"])?;
    let pauses = failures(&play);
    let doubles = pauses.windows(2).take(4).all(|two| two[1] > two[0] * 1.2);
    ensure!(doubles && pauses[0] < 60.0, "{pauses:?}");
    let refused = |reason| [("reason", reason)];
    let metrics = play.a.metrics()?;
    let name = "istio_xds_connection_terminations_total";
    ensure!(metrics.sum(name, &refused("ConnectionError")) >= 4.0);
    // What the control plane says decides how it is counted.
    let before = metrics.sum(name, &refused("Reconnect"));
    play.plane.end_streams(14, "transport is closing");
    play.wait_metric(name, &refused("Reconnect"), before + 1.0)?;
    play.plane.wait_streams(3)?;
    play.plane
        .end_streams(7, "authorization failed: no identities matched");
    play.wait_metric(name, &refused("Error"), 1.0)?;
    play.wait_log(mark, &["PERMISSION_DENIED", "authorization failed"])?;
    Ok(())
}

/// `again_in=…` of a log line.
fn millis(line: &str) -> Option<f64> {
    let (_, rest) = line.split_once("again_in=")?;
    let text: String = rest
        .trim_start_matches('"')
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    let unit = rest.trim_start_matches('"').get(text.len()..)?;
    let factor = if unit.starts_with("ms") { 1.0 } else { 1000.0 };
    text.parse::<f64>().ok().map(|number| number * factor)
}

// A control plane that leaves says so first: the next stream is open before this one is cut.
#[test]
fn a_leaving_control_plane_is_replaced_before_it_is_gone() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = play.a.log().mark();
    play.plane.leave(Duration::from_secs(60));
    play.plane.wait_streams(2)?;
    play.wait_log(mark, &["announced its leave"])?;
    play.plane.remove(ADDRESS, &workload_of(server).uid);
    let gone = |seen: &Seen| seen.stream == 2 && !seen.request.response_nonce.is_empty();
    play.plane
        .wait_request("an answer on the new stream", 0, gone)?;
    let ended = [("reason", "Reconnect")];
    play.wait_metric("istio_xds_connection_terminations_total", &ended, 1.0)?;
    let lines = play.a.log().lines();
    ensure!(
        !lines.iter().any(|line| line.contains("was cut")),
        "{lines:?}"
    );
    wait_echo(&client.netns, server.at(9000), false).context("what the new stream told")?;
    Ok(())
}

// More names than a request may hold: everything is taken anew, and what it lacks is dropped.
#[test]
fn more_names_than_a_request_may_hold_end_in_a_full_state() -> Result<()> {
    let mut play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?.clone(), play.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    // With certificates for both ends.
    wait_echo(&client.netns, server.at(9000), true)?;
    for number in 0..40 {
        play.plane.hold_workload(bystander(number));
    }
    play.plane.announce();
    // The third response: one of each type came at the start.
    let held = |seen: &Seen| seen.request.response_nonce == "nonce-3";
    play.plane.wait_request("the answer", 0, held)?;
    let mark = play.a.log().mark();
    play.plane.manners(|manners| manners.request_limit = 1500);
    play.plane.stop();
    play.plane.remove(ADDRESS, &bystander(7).uid);
    let root = Authority::new("again")?;
    std::fs::write(play.plane.root_file(), root.pem())?;
    play.plane.serve(&root)?;
    play.wait_log(mark, &["takes no list of all that is held"])?;
    play.wait_log(mark, &["full state instead of changes", "gone=1"])?;
    assert_echo(&client.netns, server.at(9000)).with_context(|| play.story())
}

fn bystander(number: u32) -> Workload {
    let [_, b, c, d] = number.to_be_bytes();
    Workload {
        uid: format!("demo//Pod/elsewhere/bystander-{number}"),
        name: format!("bystander-{number}"),
        namespace: "elsewhere".to_owned(),
        addresses: vec![vec![11, b, c, d].into()],
        tunnel_protocol: 1,
        service_account: "bystander".to_owned(),
        node: format!("n{}", number % 100),
        cluster_id: "demo".to_owned(),
        services: [(
            format!("elsewhere/s{}.elsewhere.svc.cluster.local", number % 1000),
            ztunnel_tests::proto::workload::PortList {
                ports: vec![ztunnel_tests::proto::workload::Port {
                    service_port: 80,
                    target_port: 8080,
                }],
            },
        )]
        .into(),
        ..Workload::default()
    }
}

// A large mesh that is sent once more in full changes nothing and stalls nobody.
#[test]
fn a_hundred_thousand_workloads_again_change_nothing_and_stall_nobody() -> Result<()> {
    let mut play = Play::launch(
        pods(),
        &[("RUST_LOG", "info,ztunnel::mesh=debug")],
        |plane, _| {
            for number in 0..100_000 {
                let workload = bystander(number);
                let name = workload.uid.clone();
                let address = Address {
                    r#type: Some(Type::Workload(workload)),
                };
                plane.hold(ADDRESS, &name, address.encode_to_vec());
            }
            Ok(())
        },
    )?;
    let took = play.a.wait_ready()?;
    let (client, server) = (play.pod("client")?.clone(), play.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    // With certificates for both ends.
    wait_echo(&client.netns, server.at(9000), true)?;
    let began = Instant::now();
    let load = Load::start(&client.netns, server.at(9000), b"steady", 1, PATIENCE);
    load.wait_answered(began, 50, PATIENCE)?;
    let mark = play.a.log().mark();
    let again = Instant::now();
    // More names than a request holds: the state comes again in full.
    play.plane.cut();
    play.wait_log(mark, &["full state instead of changes", "gone=0"])?;
    play.wait_log(mark, &["nothing of the state changed"])?;
    let attempts = load.finish()?;
    let bad = attempts.iter().find(|a| a.outcome != Outcome::Answered);
    ensure!(bad.is_none(), "{bad:?}\n{}", play.story());
    println!(
        "100 000 workloads: ready after {took:?}; again in {:?} with {} connections served",
        again.elapsed(),
        attempts.len()
    );
    Ok(())
}

#[test]
fn a_control_plane_that_closes_after_each_response_is_not_stormed() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    play.plane
        .manners(|manners| manners.close_after_response = true);
    play.plane.end_streams(0, "");
    play.plane.wait_streams(4)?;
    let (first, began) = (play.plane.heads().len(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let (opened, took) = (play.plane.heads().len() - first, began.elapsed());
    // The pauses double.
    ensure!(opened <= 10, "{opened} streams in {took:?}");
    play.plane
        .manners(|manners| manners.close_after_response = false);
    // The stream of this moment stays, or the next one does.
    play.plane.remove(ADDRESS, &workload_of(server).uid);
    wait_echo(&client.netns, server.at(9000), false).context("what the last stream told")?;
    Ok(())
}
