//! Memory of the processes: at rest, with many idle connections, and a while after those are closed. Takes fresh
//! worlds, one per contender; gives numbers in the order of `MEMORY`; the waiting is done once for all of them.

use std::{env, process::Command, thread, time::Duration};

use anyhow::{Context as _, Result};
use ztunnel_tests::process::Running;

use crate::{
    contenders::{Contender, HOLD, Place},
    machine,
    world::World,
};

/// How many connections, and how long they are gone before the last look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Crowd {
    pub(crate) connections: u32,
    pub(crate) rest: Duration,
}

/// Measures those that have processes; a contender that failed says why.
pub(crate) fn measure(
    worlds: &mut [World],
    crowd: Crowd,
    mut say: impl FnMut(&str),
) -> Vec<(Contender, Result<Vec<f64>>)> {
    let mut begun = Vec::new();
    for world in worlds {
        say(&format!(
            "{} idle connections, {}",
            crowd.connections, world.contender
        ));
        let first = with_crowd(world, crowd);
        begun.push((world, first));
    }
    say("waiting after the connections are closed");
    thread::sleep(crowd.rest);
    begun
        .into_iter()
        .map(|(world, first)| {
            let all = first.and_then(|(grown, at_rest)| {
                let after = largest(world)?;
                Ok(vec![grown, at_rest, after])
            });
            (world.contender, all)
        })
        .collect()
}

/// Growth per 10,000 connections of the process that grows most, and the largest process before.
fn with_crowd(world: &mut World, crowd: Crowd) -> Result<(f64, f64)> {
    world.restart()?;
    thread::sleep(SETTLE);
    let before = residents(world)?;
    let mut command = Command::new(env::current_exe()?);
    command.args(["role", "idle"]);
    let to = world.target(Place::Cross, HOLD)?.to_string();
    command.args(["--to", &to, "--connections", &crowd.connections.to_string()]);
    let idle = Running::start("idle connections", Some(world.client()?), command)?;
    idle.log().wait_for("opened", PATIENCE, |line| {
        line.contains("opened").then_some(())
    })?;
    thread::sleep(SETTLE);
    let grown = residents(world)?
        .iter()
        .zip(&before)
        .map(|(with, without)| with - without)
        .fold(f64::MIN, f64::max);
    drop(idle);
    world.forget_logs()?;
    let at_rest = before.iter().copied().fold(0.0, f64::max);
    Ok((grown * 10_000.0 / f64::from(crowd.connections), at_rest))
}

fn largest(world: &World) -> Result<f64> {
    Ok(residents(world)?.into_iter().fold(0.0, f64::max))
}

fn residents(world: &World) -> Result<Vec<f64>> {
    let pids = world.pids();
    let all = pids.into_iter().map(machine::resident_mb);
    all.collect::<Result<_>>()
        .with_context(|| format!("memory of {}", world.contender))
}

/// After a start and after a burst, what is deferred gets done.
const SETTLE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(120);
