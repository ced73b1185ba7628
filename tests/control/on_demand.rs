//! A node that asks only for what its pods use.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    access::Line,
    apps::{self, Server},
    control_plane::{ADDRESS, Seen, workload_of},
    topology::{Builder, Topology},
    wait,
};

use crate::play::{PATIENCE, Play, assert_echo, endpoint, service};

const ON_DEMAND: [(&str, &str); 2] = [
    ("XDS_ON_DEMAND", "true"),
    ("ISTIO_META_DNS_CAPTURE", "false"),
];

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "b")
}

fn asks_for(name: String) -> impl Fn(&Seen) -> bool {
    move |seen| seen.request.resource_names_subscribe.contains(&name)
}

// 65, B008, B009.
#[test]
fn what_a_pod_dials_is_asked_for_once_and_reached_as_the_mesh_says() -> Result<()> {
    let play = Play::both(pods(), &ON_DEMAND, |_| {})?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    play.plane.hold_service(service("web", [10, 96, 0, 1]));
    play.plane.hold_workload(endpoint(server, "web"));
    let first = |seen: &Seen| seen.request.type_url == ADDRESS && seen.request.node.is_some();
    let first = play.plane.wait_request("the first request", 0, first)?;
    ensure!(first.request.resource_names_subscribe == ["*"], "{first:?}");
    ensure!(
        first.request.resource_names_unsubscribe == ["*"],
        "{first:?}"
    );
    let mark = play.a.log().mark();
    for _ in 0..3 {
        assert_echo(&client.netns, server.at(9000))?;
    }
    let line = play.access(mark, &[("direction", "outbound")])?;
    ensure!(line.get("dst.workload") == Some("server"), "{line:?}");
    let name = format!("/{}", server.v4);
    play.plane
        .wait_request("the look-up", 0, asks_for(name.clone()))?;
    let asked = play.plane.requests();
    let asked = asked
        .iter()
        .filter(|seen| asks_for(name.clone())(seen))
        .count();
    ensure!(asked == 1, "{asked} look-ups");
    // Nobody of the mesh: it goes on as it was dialled.
    let host = play.topology.node("b")?;
    let _outside = Server::start(&host.netns, 9001, apps::echo)?;
    let mark = play.a.log().mark();
    let to = std::net::SocketAddr::from((host.v4, 9001));
    assert_echo(&client.netns, to)?;
    let name = format!("/{}", host.v4);
    play.plane
        .wait_request("the other look-up", 0, asks_for(name))?;
    let to = to.to_string();
    let line = play.access(mark, &[("direction", "outbound"), ("dst.addr", &to)])?;
    ensure!(line.get("dst.workload").is_none(), "{line:?}");
    // A service brings its pods.
    assert_echo(&client.netns, ([10, 96, 0, 1], 80).into())
}

// A pod that comes later under an address that was asked for in vain is not pushed; another stream answers.
#[test]
fn an_address_that_gets_its_pod_later_is_asked_for_on_another_stream() -> Result<()> {
    let play = Play::both(pods(), &ON_DEMAND, |_| {})?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    play.plane.remove(ADDRESS, &workload_of(server).uid);
    let mark = play.a.log().mark();
    apps::knock(&client.netns, server.at(9000), b"x", Duration::from_secs(2))?;
    let line = play.access(mark, &[("direction", "outbound")])?;
    ensure!(line.get("dst.workload").is_none(), "{line:?}");
    play.plane.workload(workload_of(server));
    let streams = play.plane.heads().len();
    // Until it is asked for again, it is an address of nobody's.
    let mark = play.a.log().mark();
    let known = [("dst.workload", "server"), ("direction", "outbound")];
    let known = |line: &str| Line::access(line).filter(|line| line.has(&known));
    wait::until("the pod to be known", PATIENCE, || {
        assert_echo(&client.netns, server.at(9000)).ok()?;
        let log = play.a.log();
        log.wait_since(mark, "", Duration::ZERO, known).ok()
    })?;
    ensure!(play.plane.heads().len() > streams, "on the same stream");
    Ok(())
}

// B016.
#[test]
fn a_look_up_without_an_answer_is_repeated_on_another_stream_and_nobody_hangs() -> Result<()> {
    let play = Play::both(pods(), &ON_DEMAND, |_| {})?;
    let (client, server) = (play.pod("client")?, play.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    play.plane.manners(|manners| manners.mute = true);
    let (netns, to) = (client.netns.clone(), server.at(9000));
    let asking = std::thread::spawn(move || apps::knock(&netns, to, b"x", PATIENCE));
    let name = format!("/{}", server.v4);
    play.plane
        .wait_request("the look-up", 0, asks_for(name.clone()))?;
    let again = move |seen: &Seen| {
        seen.request.node.is_some()
            && seen
                .request
                .initial_resource_versions
                .get(&name)
                .is_some_and(String::is_empty)
    };
    play.plane
        .wait_request("the look-up on another stream", 0, again)?;
    play.plane.manners(|manners| manners.mute = false);
    let (heard, _) = asking.join().ok().context("the client panicked")??;
    ensure!(heard.answered(), "{heard:?}");
    Ok(())
}
