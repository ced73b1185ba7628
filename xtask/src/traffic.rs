//! `cargo xtask traffic`: varied traffic through two nodes for as long as you want, every byte and status checked, in
//! peace or under disturbances. Takes minutes and disturbances; gives errors by kind, a memory curve and a verdict.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use ztunnel_tests::{
    reaper::Reaper,
    traffic::{self, Chaos, Options},
    ztunnel::Settings,
};

use crate::guard::Guard;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long; a fraction will do.
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// What to do to the nodes meanwhile, in turn; several with commas. An error is expected only of whom, and while,
    /// the disturbance says.
    #[arg(long, value_enum, value_delimiter = ',')]
    chaos: Vec<Disturbance>,
    /// Seconds between two disturbances.
    #[arg(long, default_value_t = 20)]
    every: u64,
    /// Repeats the random choices of an earlier run.
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Disturbance {
    /// Kill node b's process, start it again.
    Kill,
    /// Refuse one client by policy, admit it again.
    Policy,
    /// Replace the files of both nodes by ones that say the same.
    Reload,
    /// Ask node b's process to end, start it again.
    Restart,
    /// All of these.
    All,
}

impl Disturbance {
    fn chaos(self) -> Vec<Chaos> {
        match self {
            Self::Kill => vec![Chaos::Kill],
            Self::Policy => vec![Chaos::Policy],
            Self::Reload => vec![Chaos::Reload],
            Self::Restart => vec![Chaos::Restart],
            Self::All => Chaos::ALL.into(),
        }
    }
}

/// The verb; true if everything held. `prepare` installs what is missing, builds the node process and gives its path.
/// The process must not have started a thread yet.
pub(crate) fn run(args: &Args, prepare: impl FnOnce() -> Result<PathBuf>) -> Result<bool> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "namespaces and eBPF need root"
    );
    ensure!(
        args.minutes.is_finite() && args.minutes > 0.0 && args.minutes < 1e5,
        "{} minutes are no time to run",
        args.minutes
    );
    // First of all: it must be the child of a process that has one thread.
    let reaper = Reaper::start()?;
    let binary = prepare()?;
    let guard = Guard::over(reaper)?;
    let seed = args.seed.unwrap_or_else(any_seed);
    let options = Options {
        duration: Duration::from_secs_f64(args.minutes * 60.0),
        chaos: args.chaos.iter().flat_map(|one| one.chaos()).collect(),
        every: Duration::from_secs(args.every.max(1)),
        seed,
    };
    for chaos in &options.chaos {
        println!("{chaos:?} may disturb {}", chaos.disturbs());
    }
    let settings = |topology: &_| Settings::with_binary(topology, binary);
    let report = traffic::run(&options, settings, &mut |line| println!("{line}"))?;
    println!("\n{}seed {seed}", report.text());
    guard.finish()?;
    Ok(report.is_clean())
}

/// From the operating system, by way of the standard library's hasher.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish()
}
