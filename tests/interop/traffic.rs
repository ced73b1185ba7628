//! The traffic tool, for as long as a test may take: once in peace and once under disturbances.

use std::time::Duration;

use anyhow::{Result, ensure};
use ztunnel_tests::{
    traffic::{self, Chaos, Options},
    ztunnel::Settings,
};

#[test]
fn varied_traffic_runs_clean_and_whoever_is_disturbed_was_named_before() -> Result<()> {
    let options = Options {
        duration: Duration::from_secs(28),
        chaos: Chaos::ALL.into(),
        every: Duration::from_secs(5),
        seed: 7,
    };
    let mut story = Vec::new();
    let mut tell = |line: &str| story.push(line.to_owned());
    let report = traffic::run(&options, Settings::of, &mut tell)?;
    ensure!(report.is_clean(), "{}\n{}", story.join("\n"), report.text());
    Ok(())
}
