//! The project's verbs: takes a verb and its options, runs it on the checkout that it was built from, and exits
//! non-zero when it failed; it never changes the machine beyond what `setup` says and the target directory.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a task runner talks to a person"
)]
#![expect(clippy::exit, reason = "the exit code is what CI reads")]
#![expect(
    clippy::disallowed_methods,
    reason = "tools are found through PATH and cargo's variables"
)]
#![expect(
    clippy::disallowed_types,
    reason = "elapsed real time; nothing here runs on a paused clock"
)]

mod bench;
mod check;
mod cluster;
mod compatibility;
mod demo;
mod envoy;
mod floors;
mod fuzz;
mod guard;
mod house;
mod kernels;
mod process;
mod setup;
mod source;
mod tally;
mod test;
mod traffic;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::house::House;

/// Everything that is done to this project, one verb each.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Watch real programs talk through the mesh, every claim measured.
    Demo(demo::Args),
    /// Measure the mesh against no mesh, Envoy and others; `micro` measures its pure rooms.
    Bench(bench::Args),
    /// Look where the time goes: a flame graph and system calls under a scenario's load.
    Profile(bench::Args),
    /// Install what is missing and build the eBPF object.
    Setup(setup::Args),
    /// Format, lints, floors, docs, licences, COMPATIBILITY.md.
    Check,
    /// Imports that go up or sideways.
    Floors,
    /// Everything, or one stage, counted.
    Test(test::Args),
    /// Varied traffic through two nodes, every byte checked.
    Traffic(traffic::Args),
    /// Run the fuzz targets.
    Fuzz(fuzz::Args),
}

fn main() {
    let verb = Cli::parse().verb;
    match House::find().and_then(|house| run(&house, verb)) {
        Ok(true) => {}
        Ok(false) => std::process::exit(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::exit(2);
        }
    }
}

/// `Ok(false)` is a verb that ran and found something wrong, and has said so.
fn run(house: &House, verb: Verb) -> Result<bool> {
    match verb {
        Verb::Demo(args) => demo::run(&args, || setup::node(house)),
        Verb::Bench(args) => bench::run(house, &args),
        Verb::Profile(args) => bench::profile(house, &args),
        Verb::Setup(args) => setup::run(house, &args),
        Verb::Check => check::run(house),
        Verb::Floors => floors::run(house),
        Verb::Test(args) => test::run(house, &args),
        Verb::Traffic(args) => traffic::run(&args, || setup::node(house)),
        Verb::Fuzz(args) => fuzz::run(house, &args),
    }
}
