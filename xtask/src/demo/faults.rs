//! The rest of the story: a node process that is killed under load, transfers of every size and
//! ending, and leaving the mesh. Each step measures the world now and tells what it found.

use std::{
    io::Write as _,
    net::Shutdown,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::sys::signal::Signal;
use ztunnel_tests::{
    apps::{self, End},
    bulk, inspect, leftovers,
    load::{Attempt, Load, Outcome},
    wait,
};

use super::{
    steps,
    teller::{Measured, Teller, time},
    world::{self, World},
};

pub(super) fn kill(teller: &mut Teller, world: &mut World) -> Result<()> {
    teller.step(
        "The node process of a is killed",
        "Sixteen workers in the client's pod connect, send the canary and read it back,\n\
         without a break. SIGKILL; two seconds of nobody; then it is started again.",
    );
    let (client, greeter) = (
        world.pod("client")?.netns.clone(),
        world.pod("greeter")?.clone(),
    );
    let (canary, wire) = (world.canary.clone(), world.sniff()?);
    let to = greeter.at(world::ECHO);
    let load = Load::start(&client, to, canary.as_bytes(), WORKERS, LONG);
    load.wait_answered(Instant::now(), ENOUGH, LONG)?;
    let answered = load
        .attempts()
        .iter()
        .filter(|a| a.outcome == Outcome::Answered)
        .count();
    teller.say(&format!(
        "{answered} connections answered so far; killing pid {}",
        world.a()?.pid()
    ));

    world.a()?.kill()?;
    let dead = Instant::now();
    teller.measure(
        "new connections from the pod",
        &format!("{WORKERS} wait"),
        || {
            let unanswered = || inspect::unanswered_syns(&client, world::ECHO).ok();
            let all = || unanswered().filter(|count| *count == WORKERS);
            let took = wait::until("every worker's SYN", SOON, all).map(|_| dead.elapsed());
            let count = inspect::unanswered_syns(&client, world::ECHO)?;
            Ok((format!("{count} SYNs unanswered"), took.is_ok()))
        },
    );
    // The outage is part of the story: long enough that a SYN is retransmitted into it.
    std::thread::sleep(OUTAGE.saturating_sub(dead.elapsed()));
    teller.measure("new connections that got through or failed", "0", || {
        let ended = load.attempts().iter().filter(|a| a.began > dead).count();
        Ok((format!("{ended} in {}", time(dead.elapsed())), ended == 0))
    });
    silent(teller, world, &wire)?;

    let back = Instant::now();
    world.a()?.restart()?;
    world.a()?.wait_ready()?;
    teller.say(&format!(
        "ready again {} after its start",
        time(back.elapsed())
    ));
    teller.measure("traffic after the restart", "flows", || {
        load.wait_answered(back, ENOUGH, LONG)?;
        Ok((format!("{ENOUGH} more connections, pods untouched"), true))
    });
    let attempts = load.finish()?;
    teller.fact(
        "those that waited",
        &format!("{WORKERS} succeed"),
        waited(&attempts, back),
    );
    let since: Vec<_> = attempts.iter().filter(|a| a.began > dead).collect();
    let failed = since
        .iter()
        .filter(|a| a.outcome != Outcome::Answered)
        .count();
    let said = format!("{failed} of {}", since.len());
    teller.fact(
        "connections begun after the kill that failed",
        "0",
        (said, failed == 0),
    );
    let cut = attempts
        .iter()
        .filter(|a| a.began <= dead && a.outcome != Outcome::Answered)
        .count();
    teller.say(&format!(
        "{cut} were open or being opened at the kill, and died with it"
    ));
    silent(teller, world, &wire)?;
    steps::eth0(teller, world);
    Ok(())
}

/// Attempts that were under way when the new process was started. Some may have begun while the
/// old one was dying.
fn waited(attempts: &[Attempt], back: Instant) -> Measured {
    let waited: Vec<_> = attempts
        .iter()
        .filter(|a| a.began < back && a.ended > back)
        .collect();
    let good = waited
        .iter()
        .filter(|a| a.outcome == Outcome::Answered)
        .count();
    let longest = waited
        .iter()
        .map(|a| a.ended - a.began)
        .max()
        .unwrap_or_default();
    let said = format!(
        "{good} of {} succeeded, after {} at most",
        waited.len(),
        time(longest)
    );
    (said, good == WORKERS && waited.len() == WORKERS)
}

fn silent(teller: &mut Teller, world: &World, wire: &ztunnel_tests::wire::Sniffer) -> Result<()> {
    let seen = wire.seen()?;
    teller.measure("canary on the link", "0 packets", || {
        let packets = seen.count(world.canary.as_bytes())?;
        Ok((
            format!("{packets} of {} packets", seen.frames().len()),
            packets == 0,
        ))
    });
    teller.measure("segments on the server's port, on the link", "0", || {
        let leaked = seen.complete()?.segments_on(world::ECHO).count();
        Ok((format!("{leaked}"), leaked == 0))
    });
    Ok(())
}

pub(super) fn transfers(teller: &mut Teller, world: &mut World) -> Result<()> {
    teller.step(
        "Large and small",
        "Client and greeter send each other pseudo-random bytes at the same time; each\n\
         end computes a checksum of what it received, and the other's is compared.",
    );
    let (client, greeter) = (&world.pod("client")?.netns, world.pod("greeter")?);
    teller.measure("1 GiB each way at once", "both checksums right", || {
        let done = bulk::exchange(client, greeter.at(world::BULK), GIB, 0x5eed)?;
        let rate = done.bytes_per_second() / (1 << 20);
        let took = time(done.took);
        Ok((
            format!(
                "{:016x} {:016x}, {took}, {rate} MiB/s",
                done.sum_up, done.sum_down
            ),
            true,
        ))
    });
    teller.measure("200 connections of 1 byte each way", "200 right", || {
        let started = Instant::now();
        for seed in 0..200 {
            bulk::exchange(client, greeter.at6(world::BULK), 1, seed)?;
        }
        Ok((
            format!("200 right, IPv6, {} each", time(started.elapsed() / 200)),
            true,
        ))
    });
    teller.measure("a half-close", "the answer comes after it", || {
        let mut stream = apps::dial(client, greeter.at(world::COUNT))?;
        stream.write_all(b"12345")?;
        let (early, _) = apps::read_end(&stream, Duration::from_millis(200))?;
        stream.shutdown(Shutdown::Write)?;
        let (end, bytes) = apps::read_end(&stream, LONG)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let right = early == End::Open && end == End::Fin && text == "received 5";
        Ok((format!("{text:?} after our FIN, then FIN"), right))
    });
    teller.measure("a reset by the server", "a reset at the client", || {
        let mut stream = apps::dial(client, greeter.at(world::RESET))?;
        stream.write_all(b"x")?;
        let (end, _) = apps::read_end(&stream, LONG)?;
        Ok((format!("{end:?}").to_lowercase(), end == End::Reset))
    });
    Ok(())
}

pub(super) fn leave(teller: &mut Teller, world: &mut World) -> Result<()> {
    teller.step(
        "Leaving",
        "SIGTERM to both node processes, then `ztunnel release`, which undoes the capture.",
    );
    for node in world.nodes() {
        let started = Instant::now();
        let name = format!("node {} after SIGTERM", node.name());
        teller.measure(&name, "exits with 0", || {
            node.signal(Signal::SIGTERM)?;
            let status = node.wait_exit(LONG)?;
            let code = status
                .code()
                .map_or_else(|| status.to_string(), |code| code.to_string());
            Ok((
                format!("exit code {code} after {}", time(started.elapsed())),
                status.success(),
            ))
        });
        let name = format!("node {}: `ztunnel release`", node.name());
        teller.measure(&name, "no pins left", || {
            node.release()?;
            let left = node.pins().exists();
            Ok((
                if left { "pins left" } else { "no pins left" }.into(),
                !left,
            ))
        });
    }
    let wire = world.sniff()?;
    let nginx = world.pod("nginx")?.at(world::HTTP);
    steps::request(teller, world, "client to nginx, without a mesh", nginx);
    teller.measure("canary on the link", "found again", || {
        let packets = wire.seen()?.count(world.canary.as_bytes())?;
        Ok((format!("found in {packets} packets"), packets > 0))
    });
    teller.measure(
        "rules, routes and settings of the pods",
        "as before",
        || {
            Ok(steps::none_of(
                &world.changed_routing()?,
                "as before in 5 pods",
                "changed in",
            ))
        },
    );
    Ok(())
}

/// After everything was dropped: what of this run is still on the machine.
pub(super) fn nothing_left(teller: &mut Teller) {
    teller.measure("left on this machine", "nothing", || {
        let left = leftovers::list(&leftovers::own_prefix())?;
        Ok((left.to_string(), left.is_empty()))
    });
}

const WORKERS: usize = 16;
/// Connections that make a load, before the kill and after the restart.
const ENOUGH: usize = 200;
/// Longer than one retransmission of a SYN (1 s), so that one falls into the outage.
const OUTAGE: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(30);
/// Every worker connects again within a few of its rests.
const SOON: Duration = Duration::from_secs(5);
const GIB: u64 = 1 << 30;
