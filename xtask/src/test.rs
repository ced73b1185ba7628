//! `cargo xtask test`: runs every stage, or one, streams what they print, and ends with a line of totals; each check
//! step, fuzz target and test on another kernel counts as a test. It kills what hangs, and only what it started.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;

use crate::check::{self, Outcome};
use crate::envoy;
use crate::fuzz;
use crate::house::House;
use crate::kernels;
use crate::process;
use crate::setup::{self, Purpose};
use crate::tally::{self, Tally};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this stage; without, all of them in this order, but `controlplane`.
    #[arg(value_enum)]
    stage: Option<Stage>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Format, lints, floors, docs, licences.
    Check,
    /// Tests beside the code; no root.
    Unit,
    /// Load, attach, verdicts; root.
    Bpf,
    /// Nodes and pods as namespaces, real programs; root.
    E2e,
    /// Real Envoy and the applications that people run; root.
    Interop,
    /// Node processes under a real istiod and kube-apiserver, built once in some ten minutes; root.
    #[value(name = "controlplane")]
    ControlPlane,
    /// The BPF suite and a smoke test on Debian's 6.1 and 6.12.
    Kernels,
    /// Every fuzz target, a few seconds.
    Fuzz,
}

/// The verb; true if nothing failed.
pub(crate) fn run(house: &House, args: &Args) -> Result<bool> {
    let start = Instant::now();
    let mut tally = Tally::new(house)?;
    let stages = args.stage.map_or_else(Stage::usual, |stage| vec![stage]);
    for stage in &stages {
        let began = Instant::now();
        println!("── {} ── at {}", stage.name(), clock(start.elapsed()));
        // A stage that cannot start must not hide what the others find.
        if let Err(error) = stage.run(house, &mut tally) {
            tally.fail(format!("{}: {error:#}", stage.name()));
        }
        println!(
            "── {} took {} ── so far {tally}",
            stage.name(),
            clock(began.elapsed())
        );
    }
    tally.print_failures();
    println!("{tally}");
    Ok(tally.is_clean())
}

impl Stage {
    /// What takes many minutes to build before its first test is for those who ask for it.
    fn usual() -> Vec<Self> {
        let all = Self::value_variants().iter().copied();
        all.filter(|stage| *stage != Self::ControlPlane).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Unit => "unit",
            Self::Bpf => "bpf",
            Self::E2e => "e2e",
            Self::Interop => "interop",
            Self::ControlPlane => "controlplane",
            Self::Kernels => "kernels",
            Self::Fuzz => "fuzz",
        }
    }

    fn run(self, house: &House, tally: &mut Tally) -> Result<()> {
        match self {
            Self::Check => check::each(house, |name, outcome| match outcome {
                Outcome::Passed => tally.pass(),
                Outcome::Failed(_) => tally.fail(format!("check::{name}")),
                Outcome::Skipped(why) => tally.skip(&format!("check::{name}"), why),
            }),
            Self::Unit => {
                setup::ensure(house, &[Purpose::Build])?;
                libtest(house, tally, self.name(), &[], UNIT_THREADS)
            }
            Self::Bpf => {
                needs_root()?;
                setup::ensure(house, &[Purpose::Build, Purpose::Pods])?;
                libtest(
                    house,
                    tally,
                    self.name(),
                    &["--package=ztunnel-tests", "--test=bpf"],
                    "1",
                )
            }
            Self::E2e => {
                needs_root()?;
                setup::ensure(house, &[Purpose::Build, Purpose::Pods])?;
                node(house)?;
                libtest(house, tally, self.name(), &E2E, "2")
            }
            Self::Interop => {
                needs_root()?;
                use Purpose::{Apps, Build, Envoy, Pods};
                setup::ensure(house, &[Build, Pods, Envoy, Apps])?;
                node(house)?;
                libtest(house, tally, self.name(), &INTEROP, "2")
            }
            Self::ControlPlane => {
                needs_root()?;
                setup::ensure(
                    house,
                    &[Purpose::Build, Purpose::Pods, Purpose::ControlPlane],
                )?;
                node(house)?;
                libtest(house, tally, self.name(), &ISTIOD, "1")
            }
            Self::Kernels => {
                setup::ensure(house, &[Purpose::Build, Purpose::Pods, Purpose::Kernels])?;
                kernels::run(house, tally)
            }
            Self::Fuzz => fuzz::smoke(house, tally),
        }
    }
}

/// The node process that tests run.
fn node(house: &House) -> Result<()> {
    let mut build = house.cargo();
    build.args(["build", "--locked", "--package=ztunnel"]);
    process::must(build, BUILD_LIMIT)
}

/// Builds, then runs with a limit of its own, so that a slow compiler is not taken for a hung test.
fn libtest(
    house: &House,
    tally: &mut Tally,
    stage: &str,
    which: &[&str],
    threads: &str,
) -> Result<()> {
    let mut build = house.cargo();
    build.args(["test", "--locked", "--no-run"]).args(which);
    process::must(build, BUILD_LIMIT)?;
    let mut test = house.cargo();
    test.args(["test", "--locked", "--no-fail-fast"])
        .args(which)
        .env("ENVOY_BIN", envoy::binary(house));
    // What a passing test prints is where it says that it was skipped.
    test.args(["--", "--show-output", "--test-threads", threads]);
    let mut seen = tally::Stage::new(stage);
    let end = process::lines(test, RUN_LIMIT, |line| {
        if seen.line(line) {
            println!("{line}");
        }
    })?;
    tally.add(seen, end);
    Ok(())
}

fn needs_root() -> Result<()> {
    if setup::is_root() {
        return Ok(());
    }
    anyhow::bail!("needs root: it makes network namespaces and loads eBPF programs")
}

/// `2:05`.
fn clock(elapsed: Duration) -> String {
    format!("{}:{:02}", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
}

/// First the harness proves itself. The benchmark's own tests are here because plain `cargo test` does not build it.
const E2E: [&str; 6] = [
    "--package=ztunnel-tests",
    "--package=ztunnel-bench",
    "--bin=ztunnel-bench",
    "--test=harness",
    "--test=netns",
    "--test=control",
];
const INTEROP: [&str; 2] = ["--package=ztunnel-tests", "--test=interop"];
const ISTIOD: [&str; 2] = ["--package=ztunnel-tests", "--test=istiod"];
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
const RUN_LIMIT: Duration = Duration::from_secs(40 * 60);
/// Unit tests share nothing.
const UNIT_THREADS: &str = "4";
