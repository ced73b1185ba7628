//! `cargo xtask fuzz`: builds the targets of `tests/fuzz` with coverage feedback and runs each for some seconds; gives one
//! result per target and leaves what it found below the target directory. It needs no nightly compiler.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::house::House;
use crate::process::{self, End};
use crate::setup::{self, Purpose};
use crate::tally::Tally;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long each target runs.
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Only this target.
    target: Option<String>,
}

/// The verb; true if no target found anything.
pub(crate) fn run(house: &House, args: &Args) -> Result<bool> {
    let mut targets = targets(house)?;
    if let Some(wanted) = &args.target {
        if !targets.contains(wanted) {
            bail!(
                "no fuzz target `{wanted}`; there are: {}",
                targets.join(", ")
            );
        }
        targets.retain(|name| name == wanted);
    }
    build(house)?;
    let mut clean = true;
    for name in &targets {
        clean &= fuzz(house, name, args.seconds)?.is_success();
    }
    Ok(clean)
}

/// Every target for a moment, each counted.
pub(crate) fn smoke(house: &House, tally: &mut Tally) -> Result<()> {
    let targets = targets(house)?;
    build(house)?;
    for name in &targets {
        match fuzz(house, name, SMOKE_SECONDS)? {
            End::Success => tally.pass(),
            end @ (End::Failure(_) | End::TimedOut) => tally.fail(format!("fuzz::{name}: {end}")),
        }
    }
    Ok(())
}

/// Named by their files.
fn targets(house: &House) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let dir = house.root.join(TARGETS);
    for entry in fs::read_dir(&dir).with_context(|| format!("read {TARGETS}"))? {
        let path = entry?.path();
        if let (Some("rs"), Some(name)) = (
            path.extension().and_then(|e| e.to_str()),
            path.file_stem().and_then(|s| s.to_str()),
        ) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    if names.is_empty() {
        bail!("no fuzz target in {TARGETS}");
    }
    Ok(names)
}

fn build(house: &House) -> Result<()> {
    setup::ensure(house, &[Purpose::Build, Purpose::Fuzz])?;
    let mut build = house.cargo();
    // With a target named, cargo keeps the flags away from build scripts and macros.
    build.args(["build", "--locked", "--bins", "--target=host-tuple"]);
    // Unoptimised, a target sees a tenth of the inputs.
    build.args(["--config", "profile.dev.opt-level=2"]);
    build
        .args(["--manifest-path", MANIFEST])
        .arg("--target-dir")
        .arg(house.target.join("fuzz"));
    build
        .env("RUSTFLAGS", COVERAGE)
        .env("ZTUNNEL_EBPF_OBJECT", house.ebpf_object());
    process::must(build, Duration::from_secs(30 * 60))
}

fn fuzz(house: &House, name: &str, seconds: u32) -> Result<End> {
    let work = house.target.join("fuzz");
    let corpus = work.join("corpus").join(name);
    let findings = work.join("findings").join(name);
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&findings)?;
    // libFuzzer speaks on standard error.
    let mut target = house.program("sh");
    target
        .args(["-c", "exec \"$0\" \"$@\" 2>&1"])
        .arg(binary(&work, name)?)
        .arg(&corpus);
    let seeds = house.root.join(SEEDS).join(name);
    if seeds.is_dir() {
        target.arg(seeds);
    }
    target.args([
        &format!("-max_total_time={seconds}"),
        "-timeout=25",
        "-rss_limit_mb=2048",
    ]);
    target.arg(format!("-artifact_prefix={}/", findings.display()));
    target.args(["-verbosity=0", "-print_final_stats=1"]);
    let mut said = String::new();
    let mut inputs = 0_u64;
    let limit = Duration::from_secs(u64::from(seconds) + GRACE_SECONDS);
    let end = process::lines(target, limit, |line| {
        if let Some(count) = line.strip_prefix("stat::number_of_executed_units:") {
            inputs = count.trim().parse().unwrap_or(0);
        }
        said.push_str(line);
        said.push('\n');
    })?;
    if end.is_success() && inputs > 0 {
        println!("fuzz: {name} ok, {inputs} inputs in {seconds} s");
        return Ok(end);
    }
    print!("{said}");
    println!(
        "fuzz: {name} FAILED: {end}; what it found is in {}",
        house.short(&findings).display()
    );
    Ok(if end.is_success() {
        End::Failure(None)
    } else {
        end
    })
}

/// Cargo names the directory after the host, which we need not know.
fn binary(work: &Path, name: &str) -> Result<std::path::PathBuf> {
    for entry in fs::read_dir(work)? {
        let path = entry?.path().join("debug").join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("no program for the fuzz target `{name}`: is it a [[bin]] in {MANIFEST}?")
}

const TARGETS: &str = "tests/fuzz/fuzz_targets";
const SEEDS: &str = "tests/fuzz/seeds";
const MANIFEST: &str = "tests/fuzz/Cargo.toml";
const SMOKE_SECONDS: u32 = 4;
/// For reading the corpus and writing a finding.
const GRACE_SECONDS: u64 = 120;
/// What libFuzzer needs to see of a program. All of it is stable; a sanitizer would not be, and safe Rust gains little.
const COVERAGE: &str = "--cfg fuzzing -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1 \
    -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
