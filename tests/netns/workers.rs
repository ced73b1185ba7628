//! Workers and control share nothing that either waits for: while control is kept busy, connections
//! go on.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use anyhow::{Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    http,
    load::{Load, Outcome},
    meshfile::MeshFile,
    topology::Topology,
    wait,
};

use crate::mesh::{Mesh, PATIENCE, assert_alive};

// Scrapes without a pause, and a file of thousands of workloads again and again.
#[test]
fn scrapes_and_reloads_without_end_hold_no_connection_up() -> Result<()> {
    let builder = Topology::builder()
        .pod("client", "a")
        .pod("near", "a")
        .pod("server", "b");
    let mesh = Mesh::start(builder, MeshFile::of)?;
    let (client, near, server) = (mesh.pod("client")?, mesh.pod("near")?, mesh.pod("server")?);
    let _far = Server::start(&server.netns, 9000, apps::echo)?;
    let _near = Server::start(&near.netns, 9000, apps::echo)?;
    let mut open = vec![
        apps::dial(&client.netns, server.at(9000))?,
        apps::dial(&client.netns, near.at(9000))?,
    ];
    let usual = MeshFile::of(&mesh.topology).for_node("a");
    let (done, scrapes) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let scrape = || {
            while !done.load(Ordering::Relaxed) {
                let at = SocketAddr::from(([127, 0, 0, 1], 15020));
                if http::get(mesh.a.netns(), at, "/metrics").is_ok_and(|page| page.status == 200) {
                    scrapes.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let _ends = Ends(&done);
        for _ in 0..SCRAPERS {
            scope.spawn(scrape);
        }
        let load = |to| Load::start(&client.netns, to, b"kanarienvogel", 2, PATIENCE);
        let loads = [load(server.at(9000)), load(near.at(9000))];
        for round in 0..RELOADS {
            let mark = mesh.a.log().mark();
            let scraped = scrapes.load(Ordering::Relaxed);
            let began = Instant::now();
            mesh.a.replace_file(&large(&usual, round)?)?;
            for stream in &mut open {
                assert_alive(stream)?;
            }
            let applied = |line: &str| line.contains("state applied").then_some(());
            let what = "thousands of workloads to be applied";
            mesh.a.log().wait_since(mark, what, PATIENCE, applied)?;
            let ended = Instant::now();
            for load in &loads {
                let during = |a: &&_| is_within(a, began, ended);
                let served = load.attempts().iter().filter(during).count();
                ensure!(served > 0, "round {round}: nobody was served meanwhile");
            }
            wait::until("scrapes to go on", PATIENCE, || {
                (scrapes.load(Ordering::Relaxed) > scraped).then_some(())
            })?;
        }
        for load in loads {
            let attempts = load.finish()?;
            let bad = attempts.iter().find(|a| a.outcome != Outcome::Answered);
            ensure!(bad.is_none(), "of {}: {bad:?}", attempts.len());
        }
        Ok(())
    })?;
    for stream in &mut open {
        assert_alive(stream)?;
    }
    Ok(())
}

fn is_within(attempt: &ztunnel_tests::load::Attempt, began: Instant, ended: Instant) -> bool {
    attempt.ended >= began && attempt.ended <= ended && attempt.outcome == Outcome::Answered
}

/// The file with many more workloads, each time others.
fn large(usual: &str, round: usize) -> Result<String> {
    let mut text = String::from("workloads:\n");
    for number in 0..WORKLOADS {
        let (high, low) = (number / 250, number % 250);
        writeln!(
            text,
            "  - {{uid: many-{round}-{number}, name: many-{number}, namespace: demo, \
             workloadIps: [\"10.{}.{high}.{low}\"], services: {{}}}}",
            100 + round
        )?;
    }
    Ok(usual.replacen("workloads:\n", &text, 1))
}

/// Tells the scrapers to end, also when the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const SCRAPERS: usize = 4;
const RELOADS: usize = 4;
const WORKLOADS: usize = 5000;
