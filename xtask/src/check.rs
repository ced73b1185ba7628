//! `cargo xtask check`: format, lints of both worlds, floors, docs, licences, COMPATIBILITY.md and habits of style; takes
//! the checkout as it lies and gives one result per step; it never changes a source file.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::compatibility;
use crate::floors;
use crate::house::{self, House};
use crate::process::{self, End};
use crate::setup::{self, Purpose, Toolchain};

/// The verb: every step, then what failed.
pub(crate) fn run(house: &House) -> Result<bool> {
    let mut failed = Vec::new();
    each(house, |name, outcome| {
        if let Outcome::Failed(_) = outcome {
            failed.push(name.to_owned());
        }
    })?;
    if failed.is_empty() {
        println!("check: all {} steps passed", STEPS.len());
    } else {
        println!("check: failed: {}", failed.join(", "));
    }
    Ok(failed.is_empty())
}

/// How a step ended; the text says why.
pub(crate) enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

/// Runs every step, saying so, and hands on each outcome.
pub(crate) fn each(house: &House, mut took: impl FnMut(&str, &Outcome)) -> Result<()> {
    setup::ensure(house, &[Purpose::Build, Purpose::Check])?;
    for (name, step) in STEPS {
        let start = Instant::now();
        println!("check: {name} …");
        let outcome = step(house).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        let seconds = start.elapsed().as_secs_f32();
        match &outcome {
            Outcome::Passed => println!("check: {name} ok, {seconds:.1} s"),
            Outcome::Failed(why) => println!("check: {name} FAILED: {why}"),
            Outcome::Skipped(why) => println!("SKIPPED check::{name} {why}"),
        }
        took(name, &outcome);
    }
    Ok(())
}

type Step = fn(&House) -> Result<Outcome>;

/// Cheap ones first.
const STEPS: [(&str, Step); 9] = [
    ("format", format),
    ("style", style),
    ("floors", floors_hold),
    ("compatibility", |house| {
        compatibility::check(house).map(|()| Outcome::Passed)
    }),
    ("licences", licences),
    ("advisories", advisories),
    ("lints-ebpf", lints_ebpf),
    ("lints", lints),
    ("docs", docs),
];

fn format(house: &House) -> Result<Outcome> {
    let mut fmt = house.cargo();
    fmt.args(["fmt", "--all", "--check"]);
    let mut fuzz = house.cargo();
    fuzz.args(["fmt", "--check", "--manifest-path", "tests/fuzz/Cargo.toml"]);
    all(vec![fmt, fuzz], SHORT)
}

/// Every file opens with its sentence, and nothing is left for later.
fn style(house: &House) -> Result<Outcome> {
    let mut faults = Vec::new();
    for path in house::rust_files(&house.root)? {
        let text = fs::read_to_string(&path)?;
        let name = house.short(&path).display().to_string();
        faults.extend(
            style_faults(&text)
                .into_iter()
                .map(|fault| format!("{name}:{fault}")),
        );
    }
    if !faults.is_empty() {
        bail!("\n  {}", faults.join("\n  "));
    }
    Ok(Outcome::Passed)
}

fn style_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.starts_with("//!") {
        faults.push("1: a file opens with `//!` and says what it does".to_owned());
    }
    for (at, line) in text.lines().enumerate() {
        let word = line
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .find(|word| LATER.contains(word));
        if let Some(word) = word {
            faults.push(format!("{}: `{word}`: finish it or leave it out", at + 1));
        }
    }
    faults
}

fn floors_hold(house: &House) -> Result<Outcome> {
    if floors::run(house)? {
        Ok(Outcome::Passed)
    } else {
        bail!("an import goes up or sideways")
    }
}

fn licences(house: &House) -> Result<Outcome> {
    let mut deny = house.program("cargo-deny");
    deny.args([
        "--all-features",
        "--locked",
        "check",
        "--hide-inclusion-graph",
    ]);
    deny.args(["bans", "licenses", "sources"]);
    all(vec![deny], SHORT)
}

/// Only where the database of advisories can be had.
fn advisories(house: &House) -> Result<Outcome> {
    let mut fetch = house.program("cargo-deny");
    fetch
        .args(["fetch", "db"])
        .env("GIT_TERMINAL_PROMPT", "0")
        .stderr(std::process::Stdio::null());
    if !process::run(fetch, Duration::from_secs(60))?.is_success() {
        return Ok(Outcome::Skipped(
            "its database cannot be fetched here".to_owned(),
        ));
    }
    let mut deny = house.program("cargo-deny");
    deny.args([
        "--all-features",
        "--locked",
        "check",
        "--disable-fetch",
        "advisories",
    ]);
    all(vec![deny], SHORT)
}

fn lints(house: &House) -> Result<Outcome> {
    let mut clippy = house.cargo();
    clippy.args([
        "clippy",
        "--locked",
        "--workspace",
        "--exclude=ebpf-prog",
        "--all-targets",
    ]);
    clippy.args(["--", "-D", "warnings"]);
    all(vec![clippy], LONG)
}

/// With the compiler that builds the object: no other has a `core` for its target.
fn lints_ebpf(house: &House) -> Result<Outcome> {
    let mut clippy = Toolchain::find()?.clippy(house);
    clippy
        .args(Toolchain::build_args(house))
        .args(["--", "-D", "warnings"]);
    all(vec![clippy], LONG)
}

fn docs(house: &House) -> Result<Outcome> {
    let mut doc = house.cargo();
    doc.args([
        "doc",
        "--locked",
        "--workspace",
        "--exclude=ebpf-prog",
        "--no-deps",
    ]);
    doc.arg("--document-private-items")
        .env("RUSTDOCFLAGS", "-D warnings");
    all(vec![doc], LONG)
}

fn all(commands: Vec<std::process::Command>, limit: Duration) -> Result<Outcome> {
    for command in commands {
        let shown = process::show(&command);
        match process::run(command, limit)? {
            End::Success => {}
            end @ (End::Failure(_) | End::TimedOut) => bail!("{shown}: {end}"),
        }
    }
    Ok(Outcome::Passed)
}

const SHORT: Duration = Duration::from_secs(5 * 60);
const LONG: Duration = Duration::from_secs(30 * 60);
/// In two pieces, so that this file passes. The macro of that name is clippy's to find.
const LATER: [&str; 3] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_its_sentence_is_found() {
        assert_eq!(style_faults("fn main() {}\n").len(), 1);
        assert!(style_faults("//! Starts.\nfn main() {}\n").is_empty());
    }

    #[test]
    fn what_is_left_for_later_is_found_with_its_line() {
        let text = format!(
            "//! X.\nfn f() {{}} // {}: later\n",
            LATER.concat().split_at(4).0
        );
        assert!(
            style_faults(&text)
                .first()
                .is_some_and(|fault| fault.starts_with("2: "))
        );
        assert!(style_faults("//! A method, an AXXXB and todos.\n").is_empty());
    }
}
