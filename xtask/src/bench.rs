//! `cargo xtask bench` and `cargo xtask profile`: brings what they need, builds what is measured as it is shipped, and
//! becomes the program that measures; it measures nothing itself.

use std::os::unix::process::CommandExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::envoy;
use crate::house::House;
use crate::process;
use crate::setup::{self, Purpose};

/// They belong to the program that measures, also `--help`.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// `micro`, or the options that `--help` lists.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// The verb `bench`.
pub(crate) fn run(house: &House, args: &Args) -> Result<bool> {
    if let Some((first, filter)) = args.words.split_first()
        && first == "micro"
    {
        return micro(house, filter);
    }
    become_bench(house, &[], args)
}

/// The verb `profile`.
pub(crate) fn profile(house: &House, args: &Args) -> Result<bool> {
    setup::ensure(house, &[Purpose::Profile])?;
    become_bench(house, &["profile"], args)
}

fn become_bench(house: &House, verb: &[&str], args: &Args) -> Result<bool> {
    setup::ensure(house, &[Purpose::Envoy, Purpose::Bench])?;
    let ztunnel = setup::node(house)?;
    println!("setup: building the benchmark");
    let mut build = house.cargo();
    build.args(["build", "--locked", "--release", "--package=ztunnel-bench"]);
    process::must(build, BUILD_LIMIT)?;
    let mut bench = house.program(house.target.join("release/ztunnel-bench"));
    bench.args(verb).args(&args.words);
    bench.arg("--ztunnel").arg(ztunnel);
    bench.arg("--envoy").arg(envoy::binary(house));
    // Its cleaner must be the child of a process with one thread, and Ctrl-C is for it.
    Err(bench.exec()).context("start the benchmark")
}

fn micro(house: &House, filter: &[String]) -> Result<bool> {
    setup::ensure(house, &[Purpose::Build])?;
    let benches = if filter.is_empty() {
        &["rooms", "memory"][..]
    } else {
        &["rooms"]
    };
    for name in benches {
        let mut bench = house.cargo();
        bench.args(["bench", "--locked", "--package=ztunnel-bench"]);
        bench.arg(format!("--bench={name}")).arg("--").args(filter);
        process::must(bench, BUILD_LIMIT)?;
    }
    Ok(true)
}

const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
