//! PeerAuthentication of every reach, with clients of both kinds that never stop asking.

use std::net::TcpStream;

use anyhow::{Context as _, Result};
use ztunnel_tests::{
    apps::{self, Server},
    mesh::{assert_alive, wait_end},
};

use crate::{
    asker::Asker,
    world::{Plan, peer_authentication, timed},
};

/// Who is reached in plaintext: port 9000 and port 9001 of `server`, its neighbour, a pod of another namespace.
type Reached = [bool; 4];

#[test]
fn strict_cuts_exactly_the_plaintext_that_it_is_about() -> Result<()> {
    let world = Plan::new()
        .pod("client", "a")
        .outside("plain", "a")
        .pod("server", "b")
        .pod("second", "b")
        .pod("foreign", "b")
        .in_namespace("foreign", "elsewhere")
        .start()?;
    let mut apps = Vec::new();
    let mut servers = Vec::new();
    for (pod, port) in [
        ("server", 9000),
        ("server", 9001),
        ("second", 9000),
        ("foreign", 9000),
    ] {
        let pod = world.pod(pod)?;
        apps.push(Server::start(&pod.netns, port, apps::echo)?);
        servers.push(pod.at(port));
    }
    let (client, plain) = (&world.pod("client")?.netns, &world.pod("plain")?.netns);
    let meshed = Asker::start("the mesh's client", client, &servers);
    let plaintext = Asker::start("the plaintext client", plain, &servers);
    plaintext.wait("before any object", &ALL)?;
    for (what, namespace, spec, reached) in OBJECTS {
        let mut held: Vec<TcpStream> = Vec::new();
        for from in [client, plain] {
            for to in &servers {
                held.push(apps::dial(from, *to)?);
            }
        }
        held.iter_mut().try_for_each(assert_alive)?;
        let object = peer_authentication("it", namespace, spec);
        timed(
            &format!("STRICT for {what}"),
            || world.cluster.apply(&object),
            || plaintext.wait(what, &reached),
        )?;
        let stays = ALL.into_iter().chain(reached);
        for (index, (stream, stays)) in held.iter_mut().zip(stays).enumerate() {
            if stays {
                assert_alive(stream).map(drop)
            } else {
                wait_end(stream).map(drop)
            }
            .with_context(|| format!("{what}: connection {index} (stays: {stays})"))?;
        }
        let object = ["-n", namespace, "peerauthentication", "it"];
        world.delete(&format!("no STRICT for {what}"), &object, || {
            plaintext.wait(what, &ALL)
        })?;
        meshed.wait_all_answered(2).context(what)?;
    }
    println!("measured: {} rounds of the mesh's client", meshed.rounds());
    drop(apps);
    Ok(())
}

const ALL: Reached = [true; 4];

/// How far an object reaches, where it is, what it says, and who is reached in plaintext as long as it is there.
const OBJECTS: [(&str, &str, &str, Reached); 5] = [
    ("mesh", "istio-system", "{mtls: {mode: STRICT}}", [false; 4]),
    (
        "namespace",
        "demo",
        "{mtls: {mode: STRICT}}",
        [false, false, false, true],
    ),
    (
        "workload",
        "demo",
        "{selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}}",
        [false, false, true, true],
    ),
    (
        "one port",
        "demo",
        "{selector: {matchLabels: {app: server}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {9001: {mode: STRICT}}}",
        [true, false, true, true],
    ),
    (
        "all but one port",
        "demo",
        "{selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {9001: {mode: PERMISSIVE}}}",
        [false, true, true, true],
    ),
];
