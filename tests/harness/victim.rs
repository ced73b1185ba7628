//! A run that builds a topology with a file and a process in it, says so, and waits to be killed.
//! Takes nothing, gives one line, and never cleans up: that is its reaper's work.
#![expect(
    clippy::print_stdout,
    reason = "the test that starts it reads its prefix"
)]

use std::{process::Command, thread, time::Duration};

use anyhow::Result;
use ztunnel_tests::{process::Running, reaper::Reaper, topology::Topology};

fn main() -> Result<()> {
    let _reaper = Reaper::start()?;
    let topology = Topology::builder().pod("pod", "a").build()?;
    topology.directory()?;
    let mut sleep = Command::new("sleep");
    sleep.arg("1000");
    let _sleep = Running::start("sleep", Some(&topology.pod("pod")?.netns), sleep)?;
    println!("built {}", topology.prefix());
    thread::sleep(LONG);
    Ok(())
}

/// Longer than any test waits.
const LONG: Duration = Duration::from_secs(600);
