//! Where the time goes: stacks sampled by perf as a flame graph, and system calls counted by strace, of a contender's
//! processes under a scenario's load. Takes both names; gives files; the load of the two is the same, the runs are not.

mod flame;

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use ztunnel_tests::process::{Running, finish};

use crate::{
    contenders::Contender,
    load::{self, Effort},
    options::Profile,
    progress::Cleaner,
    scenario::{SCENARIOS, Scenario},
    world::World,
};

pub(crate) fn run(args: &Profile) -> Result<()> {
    let cleaner = Cleaner::begin()?;
    let id = &args.scenario;
    // Where there are several of one name, the one that `--quick` takes for it.
    let scenario = SCENARIOS
        .iter()
        .filter(|scenario| scenario.quick)
        .find(|scenario| scenario.is_wanted(std::slice::from_ref(id)))
        .with_context(|| format!("no scenario {id} has a load"))?;
    anyhow::ensure!(
        args.contender != Contender::None && scenario.admits(args.contender),
        "{} has no processes in {id}",
        args.contender
    );
    fs::create_dir_all(&args.to).with_context(|| format!("create {}", args.to.display()))?;
    let mut world = World::build(args.contender, &args.with.setting())?;
    println!("{}: {}", scenario.title, world.prove(scenario.place)?);
    let name = format!("{}-{}", id.to_lowercase(), args.contender);
    let stacks = args.to.join(format!("{name}.perf"));
    println!("sampling for {} s …", args.seconds);
    let mut perf = Command::new("perf");
    perf.args(["record", "--quiet", "--freq", "297"]);
    // No frame pointers in a release build: stacks are unwound afterwards.
    perf.args(["--call-graph", "dwarf,16384"]);
    perf.arg("--pid").arg(pids(&world));
    perf.arg("--output").arg(&stacks);
    perf.args(["--", "sleep", &args.seconds.to_string()]);
    under_load(&mut world, scenario, perf, args.seconds)?;
    let graph = flame_graph(&stacks, &format!("{}, {}", scenario.title, args.contender))?;
    let file = args.to.join(format!("{name}.svg"));
    fs::write(&file, graph).with_context(|| format!("write {}", file.display()))?;
    fs::remove_file(&stacks)?;
    println!("wrote {}", file.display());

    println!("counting system calls for {} s …", args.seconds);
    let counts = args.to.join(format!("{name}.syscalls"));
    let mut strace = Command::new("timeout");
    strace.args(["--signal=INT", &args.seconds.to_string()]);
    strace.args(["strace", "-f", "-c", "-o"]).arg(&counts);
    for pid in world.pids() {
        strace.args(["-p", &pid.to_string()]);
    }
    under_load(&mut world, scenario, strace, args.seconds)?;
    println!("{}", fs::read_to_string(&counts)?);
    println!("wrote {}", counts.display());
    drop(world);
    cleaner.finish()
}

/// Runs `observer` while the load lasts.
fn under_load(
    world: &mut World,
    scenario: &'static Scenario,
    observer: Command,
    seconds: u32,
) -> Result<()> {
    let mut observer = Running::start("the observer", None, observer)?;
    let effort = Effort {
        seconds: seconds + 1,
        steady_rate: STEADY_RATE,
    };
    load::turn(world, scenario, effort)?;
    observer.wait_exit(Duration::from_secs(u64::from(seconds) + 60))?;
    Ok(())
}

fn pids(world: &World) -> String {
    let pids: Vec<String> = world.pids().iter().map(ToString::to_string).collect();
    pids.join(",")
}

fn flame_graph(stacks: &Path, title: &str) -> Result<String> {
    let mut perf = Command::new("perf");
    perf.args(["script", "--no-inline", "--fields", "comm,ip,sym"]);
    perf.arg("--input").arg(stacks);
    let script = finish(None, &mut perf).context("read the samples")?;
    Ok(flame::svg(&flame::fold(&script), title))
}

const STEADY_RATE: f64 = 5000.0;
