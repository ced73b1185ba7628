//! What resources do when they come, change and go.

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use ztunnel_tests::{
    apps::{self, Server},
    control_plane::{ADDRESS, AUTHORIZATION, Seen, workload_of},
    proto::{
        discovery::DeltaDiscoveryResponse,
        workload::{LoadBalancing, Service, Workload},
    },
    topology::{Builder, Topology},
};

use crate::play::{
    Play, allow, assert_alive, assert_echo, assert_ends, endpoint, service, wait_echo, wait_refused,
};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("other", "a")
        .pod("server", "a")
}

const VIP: [u8; 4] = [10, 96, 0, 1];

fn at_vip() -> std::net::SocketAddr {
    (VIP, 80).into()
}

// B012, B013, B038, B039.
#[test]
fn bad_resources_are_refused_by_name_and_the_others_applied() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let skip = play.plane.requests().len();
    let mark = play.a.log().mark();
    let bytes = |workload: Workload| {
        use bytes::BytesMut;
        let address = ztunnel_tests::proto::workload::Address {
            r#type: Some(ztunnel_tests::proto::workload::address::Type::Workload(
                workload,
            )),
        };
        let mut bytes = BytesMut::new();
        prost::Message::encode(&address, &mut bytes).map(|()| bytes.to_vec())
    };
    let legacy = Workload {
        uid: "x/legacy".to_owned(),
        tunnel_protocol: 2,
        ..workload_of(client)
    };
    let five = Workload {
        uid: "x/five".to_owned(),
        addresses: vec![Bytes::from_static(&[1; 5])],
        ..workload_of(client)
    };
    play.plane.hold(ADDRESS, "x/legacy", bytes(legacy)?);
    play.plane.hold(ADDRESS, "x/five", bytes(five)?);
    play.plane.hold(ADDRESS, "x/garbage", vec![0xff; 9]);
    play.plane.workload(endpoint(server, "web"));
    play.plane.service(service("web", VIP));
    let nack = |seen: &Seen| seen.request.error_detail.is_some();
    let nack = play.plane.wait_request("a refusal", skip, nack)?;
    let detail = nack.request.error_detail.context("no detail")?;
    ensure!(detail.code == 0, "{detail:?}");
    for (name, why) in [
        ("x/legacy: ", "LEGACY_ISTIO_MTLS"),
        ("x/five: ", "5 bytes"),
        ("x/garbage: ", "cannot be read"),
    ] {
        ensure!(
            detail.message.contains(name) && detail.message.contains(why),
            "{detail:?}"
        );
    }
    ensure!(detail.message.matches("; ").count() == 2, "{detail:?}");
    wait_echo(&client.netns, at_vip(), true).context("the good ones are applied")?;
    play.wait_log(mark, &["resources refused", "x/legacy"])?;
    play.wait_metric(
        "ztunnel_control_rejected_resources_total",
        &[("url", ADDRESS)],
        3.0,
    )
}

// B017, B018, B019, B020, B021, B022.
#[test]
fn workloads_and_services_find_each_other_in_any_order() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    play.plane.workload(endpoint(server, "web"));
    play.plane.service(service("web", VIP));
    wait_echo(&client.netns, at_vip(), true).context("the service after its workload")?;
    // The service changes and keeps its endpoints.
    let changed = Service {
        subject_alt_names: vec!["spiffe://cluster.local/ns/demo/sa/nobody".to_owned()],
        ..service("web", VIP)
    };
    play.plane.service(changed);
    assert_echo(&client.netns, at_vip()).context("after a change of the service")?;
    // Unhealthy: no endpoint, unless the service takes all.
    play.plane.workload(Workload {
        status: 1,
        ..endpoint(server, "web")
    });
    wait_echo(&client.netns, at_vip(), false).context("unhealthy")?;
    play.plane.service(Service {
        load_balancing: Some(LoadBalancing {
            health_policy: 1,
            ..LoadBalancing::default()
        }),
        ..service("web", VIP)
    });
    wait_echo(&client.netns, at_vip(), true).context("unhealthy, but all are allowed")?;
    // In this order there is an endpoint at any time.
    play.plane.workload(endpoint(server, "web"));
    play.plane.service(service("web", VIP));
    wait_echo(&client.netns, at_vip(), true)?;
    // Removal names that mean nothing change nothing.
    play.plane.respond(&DeltaDiscoveryResponse {
        type_url: ADDRESS.to_owned(),
        nonce: "odd".to_owned(),
        removed_resources: ["nobody/here", "demo/web.demo.svc.cluster.local/x", "", "/"]
            .map(str::to_owned)
            .into(),
        ..DeltaDiscoveryResponse::default()
    });
    let odd = |seen: &Seen| seen.request.response_nonce == "odd";
    let answer = play.plane.wait_request("the answer", 0, odd)?;
    ensure!(answer.request.error_detail.is_none(), "{answer:?}");
    assert_echo(&client.netns, at_vip())?;
    // The last endpoint goes, then the service.
    play.plane.remove(ADDRESS, &workload_of(server).uid);
    wait_refused(&play, &client.netns, at_vip(), "no_endpoint")?;
    play.plane
        .remove(ADDRESS, "demo/web.demo.svc.cluster.local");
    let held = |seen: &Seen| !seen.request.response_nonce.is_empty();
    play.plane.wait_request("the last answer", 0, held)?;
    Ok(())
}

// B041.
#[test]
fn a_workload_on_its_hosts_network_is_found_by_its_service_alone() -> Result<()> {
    let play = Play::start(pods().pod("host", "b"))?;
    let (client, host) = (play.pod("client")?, play.pod("host")?);
    let _app = Server::start(&host.netns, 9000, apps::echo)?;
    play.plane.service(service("web", VIP));
    play.plane.workload(Workload {
        network_mode: 1,
        tunnel_protocol: 0,
        ..endpoint(host, "web")
    });
    wait_echo(&client.netns, at_vip(), true)?;
    let at = host.at(9000).to_string();
    let by_service = play.access(0, &[("dst.addr", &at), ("reason", "complete")])?;
    ensure!(
        by_service.get("dst.workload") == Some("host"),
        "{by_service:?}"
    );
    // At its host's address it is nobody: others may be there too.
    let mark = play.a.log().mark();
    assert_echo(&client.netns, host.at(9000))?;
    let by_address = play.access(mark, &[("dst.addr", &at), ("reason", "complete")])?;
    ensure!(by_address.get("dst.workload").is_none(), "{by_address:?}");
    Ok(())
}

// A policy comes after the workload that names it: nothing is let in before, and nothing that it allows is cut.
#[test]
fn a_policy_that_comes_after_its_workload_leaves_no_gap() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, other, server) = (play.pod("client")?, play.pod("other")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut open = apps::dial(&client.netns, server.at(9000))?;
    let mut unwanted = apps::dial(&other.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    assert_alive(&mut unwanted)?;
    let named = Workload {
        authorization_policies: vec!["demo/late".to_owned()],
        ..workload_of(server)
    };
    // As istiod does it: the workload first, the policy in a message of its own.
    play.plane.hold_workload(named);
    play.plane.hold_policy(&allow("late", &["client"]));
    play.plane.announce();
    assert_ends(&unwanted)?;
    assert_alive(&mut open).context("what the policy allows")?;
    assert_echo(&client.netns, server.at(9000))?;
    wait_echo(&other.netns, server.at(9000), false)?;
    // The same for the way back.
    play.plane.workload(workload_of(server));
    play.plane.remove(AUTHORIZATION, "demo/late");
    wait_echo(&other.netns, server.at(9000), true)?;
    assert_alive(&mut open)
}

#[test]
fn a_policy_that_never_comes_closes_the_workload_that_names_it() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    play.plane.workload(Workload {
        authorization_policies: vec!["demo/never".to_owned()],
        ..workload_of(server)
    });
    wait_refused(&play, &client.netns, server.at(9000), "policy_missing")
}

#[test]
fn what_is_sent_again_unchanged_touches_nothing() -> Result<()> {
    let mut play = Play::launch(
        pods(),
        &[("RUST_LOG", "info,ztunnel::mesh=debug")],
        |_, _| Ok(()),
    )?;
    play.a.wait_ready()?;
    let mark = play.a.log().mark();
    let resources = play
        .topology
        .pods()
        .iter()
        .map(|pod| {
            let workload = workload_of(pod);
            let name = workload.uid.clone();
            let address = ztunnel_tests::proto::workload::Address {
                r#type: Some(ztunnel_tests::proto::workload::address::Type::Workload(
                    workload,
                )),
            };
            ztunnel_tests::proto::discovery::Resource {
                version: "other".to_owned(),
                name,
                resource: Some(ztunnel_tests::proto::discovery::Any {
                    type_url: ADDRESS.to_owned(),
                    value: prost::Message::encode_to_vec(&address).into(),
                }),
                ..Default::default()
            }
        })
        .collect();
    play.plane.respond(&DeltaDiscoveryResponse {
        type_url: ADDRESS.to_owned(),
        nonce: "again".to_owned(),
        resources,
        ..DeltaDiscoveryResponse::default()
    });
    play.wait_log(mark, &["nothing of the state changed"])?;
    Ok(())
}
