//! `cargo xtask demo`: two nodes, real programs, a mesh between them, and every claim measured before
//! your eyes. Takes a way to build the node process; gives whether all facts held; leaves nothing on
//! the machine, however it ends.

mod faults;
mod steps;
mod teller;
mod world;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::reaper::Reaper;

use self::{
    teller::{Teller, one_line},
    world::World,
};
use crate::guard::Guard;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave everything running at the end, and say what to try by hand, until Ctrl-C.
    #[arg(long)]
    stay: bool,
}

/// Tells the story; true if every fact held. `prepare` installs what is missing, builds the node
/// process and gives its path. The process must not have started a thread yet.
pub(crate) fn run(args: &Args, prepare: impl FnOnce() -> Result<PathBuf>) -> Result<bool> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "namespaces and eBPF need root"
    );
    // First of all: it must be the child of a process that has one thread.
    let reaper = Reaper::start()?;
    let binary = prepare()?;
    let guard = Guard::over(reaper)?;
    println!("\n    {}", machine());
    let mut teller = Teller::new();
    let mut world = World::build().context("build the nodes and pods")?;
    tell(&mut teller, &mut world, &binary, args.stay);
    if !teller.all_hold() {
        show_logs(&teller, &mut world);
    }
    if args.stay {
        teller.table();
        by_hand(&teller, &world);
        guard.wait_for_signal(teller.all_hold());
    }
    drop(world);
    guard.finish()?;
    faults::nothing_left(&mut teller);
    teller.table();
    Ok(teller.all_hold())
}

fn tell(teller: &mut Teller, world: &mut World, binary: &Path, stay: bool) {
    let opening = steps::introduce(teller, world)
        .and_then(|()| steps::before(teller, world))
        .and_then(|()| steps::enrol(teller, world, binary));
    if !done(teller, opening) {
        // Without node processes the rest would only repeat that there are none.
        return;
    }
    type Step = fn(&mut Teller, &mut World) -> Result<()>;
    let mut story: Vec<Step> = vec![
        steps::after,
        steps::who,
        steps::policy,
        faults::kill,
        faults::transfers,
    ];
    if !stay {
        story.push(faults::leave);
    }
    for step in story {
        // A step that breaks off must not hide what the others find.
        let told = step(teller, world);
        done(teller, told);
    }
}

fn done(teller: &mut Teller, told: Result<()>) -> bool {
    told.map_err(|error| {
        teller.fact(
            "the step could be carried out",
            "yes",
            (one_line(&error), false),
        )
    })
    .is_ok()
}

fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    format!(
        "An eBPF ambient mesh on this machine: kernel {}, {cpus} CPUs.",
        kernel.trim()
    )
}

fn show_logs(teller: &Teller, world: &mut World) {
    for node in world.nodes() {
        let lines = node.log().lines();
        teller.heading(&format!(
            "The last of {} lines of node {}",
            lines.len(),
            node.name()
        ));
        for line in lines.iter().rev().take(LOG_TAIL).rev() {
            teller.say(line);
        }
    }
}

fn by_hand(teller: &Teller, world: &World) {
    teller.heading("Everything is still running. Try by hand, from another terminal:\n");
    let (prefix, nginx) = (world.topology.prefix(), world.pod("nginx"));
    let address = nginx.map(|pod| pod.v4.to_string()).unwrap_or_default();
    let files = world.topology.directory().unwrap_or_default();
    let files = files.display();
    for (what, command) in [
        (
            "a request",
            format!("nsenter --net=/run/netns/{prefix}client curl -s {address}/whoami"),
        ),
        (
            "a refusal",
            format!("nsenter --net=/run/netns/{prefix}stranger curl -s {address}/whoami"),
        ),
        (
            "the wire",
            format!("nsenter --net=/run/netns/{prefix}a tcpdump -Ani mesh0"),
        ),
        ("access lines", format!("tail -f {files}/b.log")),
        ("the policy", format!("$EDITOR {files}/b.yaml")),
        (
            "the counters",
            format!("nsenter --net=/run/netns/{prefix}b curl -s localhost:15020/metrics"),
        ),
    ] {
        println!("      {what:<13} {command}");
    }
    println!("\n    Ctrl-C ends it and leaves nothing.");
}

const LOG_TAIL: usize = 20;
