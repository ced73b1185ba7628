//! Measures the mesh against no mesh, against Envoy, against a bound and against any other node proxy, on one machine.
//! Takes a command line, gives a table, JSON and charts; never gives a number for a path that it has not proven, and
//! leaves nothing behind.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for a person: progress and a table"
)]
#![expect(
    clippy::disallowed_types,
    reason = "a benchmark measures real time and has threads that share state; the bans are for the product"
)]

mod contenders;
mod load;
mod machine;
mod memory;
mod options;
mod plot;
mod profile;
mod progress;
mod report;
mod roles;
mod run;
mod scenario;
mod stats;
mod wirecount;
mod world;

use anyhow::Result;
use clap::Parser as _;

use crate::options::{Cli, Verb};

fn main() {
    match play(Cli::parse()) {
        Ok(true) => {}
        Ok(false) => std::process::exit(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::exit(2);
        }
    }
}

/// `Ok(false)` is a run in which something failed its proof, and that was said.
fn play(cli: Cli) -> Result<bool> {
    match cli.verb {
        None => run::run(&cli.run),
        Some(Verb::Profile(args)) => profile::run(&args).map(|()| true),
        Some(Verb::Role { role }) => role.play().map(|()| true),
    }
}
