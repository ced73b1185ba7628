//! A control plane that is broken rather than absent.

use anyhow::{Result, ensure};
use prost::Message as _;
use ztunnel_tests::{
    apps::{self, Server},
    control_plane::{ADDRESS, Seen, workload_of},
    proto::{
        discovery::{Any, DeltaDiscoveryResponse, Resource},
        workload::{Address, Workload, address::Type},
    },
    topology::{Builder, Topology},
};

use crate::play::{Play, assert_echo};

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "a")
}

fn resource(workload: Workload) -> Resource {
    let name = workload.uid.clone();
    let address = Address {
        r#type: Some(Type::Workload(workload)),
    };
    Resource {
        version: "v".to_owned(),
        name,
        resource: Some(Any {
            type_url: ADDRESS.to_owned(),
            value: address.encode_to_vec().into(),
        }),
        ..Resource::default()
    }
}

#[test]
fn half_a_message_ends_the_stream_and_not_the_node() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = play.a.log().mark();
    // A message of 100 bytes, of which 3 come.
    play.plane.raw(vec![0, 0, 0, 0, 100, 1, 2, 3]);
    play.wait_log(mark, &["the rest of a message", "nothing came for"])?;
    play.plane.wait_streams(2)?;
    assert_echo(&client.netns, server.at(9000))
}

// B036.
#[test]
fn a_large_response_is_taken_and_one_above_the_limit_ends_the_stream() -> Result<()> {
    let play = Play::start(pods())?;
    let large = DeltaDiscoveryResponse {
        type_url: ADDRESS.to_owned(),
        nonce: "large".to_owned(),
        resources: vec![resource(Workload {
            canonical_name: "x".repeat(20 << 20),
            ..workload_of(play.pod("server")?)
        })],
        ..DeltaDiscoveryResponse::default()
    };
    play.plane.respond(&large);
    let answered = |seen: &Seen| seen.request.response_nonce == "large";
    let answer = play.plane.wait_request("the answer", 0, answered)?;
    ensure!(
        answer.request.error_detail.is_none(),
        "{:?}",
        answer.request.error_detail
    );
    let mark = play.a.log().mark();
    let mut head = vec![0];
    head.extend((201_u32 << 20).to_be_bytes());
    play.plane.raw(head);
    play.wait_log(mark, &["a message of 210763776 bytes", "at most 209715200"])?;
    play.plane.wait_streams(2)?;
    Ok(())
}

#[test]
fn a_response_that_cannot_be_read_ends_the_stream_and_not_the_node() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = play.a.log().mark();
    play.plane.raw(vec![0, 0, 0, 0, 3, 0xff, 0xff, 0xff]);
    play.wait_log(mark, &["message cannot be read"])?;
    play.plane.wait_streams(2)?;
    assert_echo(&client.netns, server.at(9000))
}

#[test]
fn a_nonce_or_a_name_that_comes_twice_is_answered_twice_and_harms_nobody() -> Result<()> {
    let play = Play::start(pods())?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let broken = Workload {
        canonical_name: "first".to_owned(),
        ..workload_of(server)
    };
    let response = DeltaDiscoveryResponse {
        type_url: ADDRESS.to_owned(),
        nonce: "replayed".to_owned(),
        resources: vec![resource(broken), resource(workload_of(server))],
        ..DeltaDiscoveryResponse::default()
    };
    let skip = play.plane.requests().len();
    play.plane.respond(&response);
    play.plane.respond(&response);
    let answered = |seen: &Seen| seen.request.response_nonce == "replayed";
    play.plane
        .wait_request("the first answer", skip, answered)?;
    play.plane
        .wait_request("the second answer", skip + 1, answered)?;
    let mark = play.a.log().mark();
    assert_echo(&client.netns, server.at(9000))?;
    let line = play.access(mark, &[("direction", "outbound")])?;
    ensure!(line.get("dst.workload") == Some("server"), "{line:?}");
    Ok(())
}
