//! Certificates from the mesh's CA, on its good and its bad days.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    control_plane::{Authority, CaManners, ControlPlane},
    http,
    topology::{Builder, Topology},
};

use crate::play::{Play, assert_alive, assert_echo, wait_refused};

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "b")
}

// B034, B046, B047, B057.
#[test]
fn only_the_pods_of_this_node_are_asked_for_and_before_anybody_connects() -> Result<()> {
    let mut play = Play::launch(pods(), &[("SECRET_TTL", "90m")], |_, _| Ok(()))?;
    play.a.wait_ready()?;
    let csrs = play.plane.wait_csrs(1)?;
    let client = play.pod("client")?.spiffe_id();
    ensure!(csrs.iter().all(|csr| csr.identity == client), "{csrs:?}");
    let csr = &csrs[0];
    ensure!(csr.seconds == 5400, "{csr:?}");
    ensure!(
        csr.authorization == "Bearer first-token" && csr.clusterid == "demo",
        "{csr:?}"
    );
    ensure!(
        csr.csr.starts_with("-----BEGIN CERTIFICATE REQUEST-----"),
        "{csr:?}"
    );
    Ok(())
}

// B048, B049, B055, and a clock that is off.
#[test]
fn an_answer_that_is_not_what_was_asked_for_serves_nobody() -> Result<()> {
    for (manners, said) in [
        (
            CaManners::ForAnother("spiffe://cluster.local/ns/demo/sa/evil".to_owned()),
            "sa/evil",
        ),
        (CaManners::Empty, "is empty"),
        (CaManners::NoRoot, "no root"),
        (CaManners::FromTheFuture(Duration::from_secs(3600)), "clock"),
        (
            CaManners::Refuse(3, "CSR signing error".to_owned()),
            "CSR signing error",
        ),
    ] {
        let mut play = Play::launch(pods(), &[], |plane, _| {
            plane.ca(manners.clone());
            Ok(())
        })?;
        play.a
            .wait_ready()
            .context("the CA is not asked for readiness")?;
        let line = play.wait_log(0, &["no certificate", said])?;
        ensure!(line.contains("sa/client"), "it names the identity: {line}");
        let (client, server) = (play.pod("client")?, play.pod("server")?);
        wait_refused(
            &play,
            &client.netns,
            server.at(9000),
            "identity_unavailable",
        )?;
    }
    Ok(())
}

// B052, B057.
#[test]
fn at_most_eight_certificates_are_asked_for_at_a_time() -> Result<()> {
    let mut builder = Topology::builder();
    for number in 0..20 {
        builder = builder.pod(&format!("p{number}"), "a");
    }
    let mut play = Play::launch(builder, &[], |plane, _| {
        plane.ca(CaManners::Slow(Duration::from_secs(1)));
        Ok(())
    })?;
    play.a.wait_ready()?;
    let csrs = play.plane.wait_csrs(20)?;
    let most = csrs
        .iter()
        .map(|csr| csr.in_flight)
        .max()
        .unwrap_or_default();
    ensure!((2..=8).contains(&most), "{most} at a time");
    Ok(())
}

// A CA sees a pod a moment after we do: who waits is served as soon as it does.
#[test]
fn a_pod_that_the_ca_has_not_seen_yet_is_asked_for_again_soon() -> Result<()> {
    let unseen = CaManners::Refuse(
        16,
        "request impersonation authentication failure".to_owned(),
    );
    let mut play = Play::launch(pods(), &[], |plane, _| {
        plane.ca(unseen);
        Ok(())
    })?;
    play.a.wait_ready()?;
    play.plane.wait_csrs(2)?;
    let seen = Instant::now();
    play.plane.ca(CaManners::Sign);
    let asked = play.plane.csrs().len();
    play.plane.wait_csrs(asked + 1)?;
    ensure!(
        seen.elapsed() < Duration::from_secs(20),
        "{:?}",
        seen.elapsed()
    );
    Ok(())
}

// B054, B055: what is held serves on while the CA is down.
#[test]
fn a_ca_that_is_down_does_not_stop_what_has_a_certificate() -> Result<()> {
    let prepare = |plane: &ControlPlane| plane.certificates_live(Duration::from_secs(60));
    let play = Play::both(pods(), &[("POOL_UNUSED_RELEASE_TIMEOUT", "100ms")], prepare)?;
    let (client, server) = (play.pod("client")?.clone(), play.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    play.plane
        .ca(CaManners::Refuse(14, "on holiday".to_owned()));
    let mark = play.a.log().mark();
    // At half of its life it is renewed, in vain.
    let line = play.wait_log(mark, &["on holiday"])?;
    ensure!(line.contains("sa/client"), "it names the identity: {line}");
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        assert_echo(&client.netns, server.at(9000))?;
    }
    let operators = SocketAddr::from(([127, 0, 0, 1], 15000));
    let dump = http::get(play.a.netns(), operators, "/config_dump")?;
    let dump: serde_json::Value = serde_json::from_str(&dump.body)?;
    let certificates = dump["certificates"].as_array().context("certificates")?;
    let own = |c: &&serde_json::Value| c["identity"] == client.spiffe_id();
    let own = certificates.iter().find(own).context("no certificate")?;
    ensure!(own["state"] == "Available", "{own}");
    ensure!(own["certChain"][0]["serialNumber"].is_string(), "{own}");
    Ok(())
}

// B059, and another root for workloads, with and without the old one beside it.
#[test]
fn roots_are_replaced_while_traffic_runs() -> Result<()> {
    let short = |plane: &ControlPlane| plane.certificates_live(Duration::from_secs(20));
    let mut play = Play::both(pods(), &[("POOL_UNUSED_RELEASE_TIMEOUT", "100ms")], short)?;
    let (client, server) = (play.pod("client")?.clone(), play.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut open = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    // The CA itself is vouched for by another root.
    play.plane.stop();
    let root = Authority::new("another root")?;
    std::fs::write(play.plane.root_file(), root.pem())?;
    play.plane.serve(&root)?;
    let mut steady = |what: &str| -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(16) {
            let later = || format!("{what}, after {:?}", began.elapsed());
            assert_echo(&client.netns, server.at(9000)).with_context(later)?;
            // An application that hears nothing for long may hang up.
            assert_alive(&mut open).with_context(later)?;
        }
        Ok(())
    };
    // Another root is handed out beside the old one, then signs, then is alone.
    let asked = play.plane.csrs().len();
    let mut announced = Ok(());
    play.plane
        .authority(|authority| announced = authority.announce_next());
    announced?;
    steady("with both roots")?;
    play.plane.authority(Authority::sign_with_next);
    steady("signed by the new root")?;
    play.plane.authority(Authority::forget_old);
    steady("with the new root alone")?;
    let renewed = play.plane.csrs().len() - asked;
    ensure!(renewed >= 4, "{renewed} renewals for two nodes");
    Ok(())
}
