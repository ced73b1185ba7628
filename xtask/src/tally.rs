//! What passed, failed and was skipped: takes single results and the output lines of test programs, gives the totals and
//! the last line; a skip counts as a failure unless the project's list of skips has it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;

use anyhow::{Context as _, Result};

use crate::house::House;
use crate::process::End;

#[derive(Debug, Default)]
pub(crate) struct Tally {
    passed: usize,
    failures: Vec<String>,
    /// Failures that no line named, beyond those in `failures`.
    failed_unnamed: usize,
    skips: Vec<String>,
    may_skip: BTreeSet<String>,
}

impl Tally {
    /// With the names in `tests/skips.txt`: one per line, then why; `#` starts a comment.
    pub(crate) fn new(house: &House) -> Result<Self> {
        let text = fs::read_to_string(house.root.join(SKIPS)).context(SKIPS)?;
        Ok(Self {
            may_skip: listed(&text),
            ..Self::default()
        })
    }

    pub(crate) fn pass(&mut self) {
        self.passed += 1;
    }

    pub(crate) fn fail(&mut self, what: impl Into<String>) {
        self.failures.push(what.into());
    }

    /// The last line is the caller's to print, alone.
    pub(crate) fn print_failures(&self) {
        for failure in &self.failures {
            println!("FAILED {failure}");
        }
    }

    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        if self.may_skip.contains(name) {
            self.skips.push(name.to_owned());
        } else {
            self.fail(format!(
                "{name}: skipped without being listed in {SKIPS}: {why}"
            ));
        }
    }

    pub(crate) fn is_clean(&self) -> bool {
        self.failures.is_empty()
    }

    /// Starts counting what runs as one stage: one or several programs that print libtest's lines.
    pub(crate) fn stage<'a>(&'a mut self, name: &'a str) -> Stage<'a> {
        Stage {
            tally: self,
            name,
            passed: 0,
            failed: 0,
            named: 0,
            skipped: 0,
            pending: None,
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed",
            self.passed,
            self.failures.len() + self.failed_unnamed
        )?;
        if !self.skips.is_empty() {
            write!(f, ", {} skipped", self.skips.len())?;
        }
        Ok(())
    }
}

/// The results of one stage while it runs.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    tally: &'a mut Tally,
    name: &'a str,
    passed: usize,
    failed: usize,
    /// Of the failed, those that were named.
    named: usize,
    /// Of the passed, those that said that they did not run.
    skipped: usize,
    /// A test that has begun and not ended.
    pending: Option<String>,
}

impl Stage<'_> {
    /// Takes one line of output.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some((_, skip)) = line.split_once("SKIPPED ") {
            let (name, why) = skip.split_once(' ').unwrap_or((skip, "no reason given"));
            self.tally.skip(name, why);
            self.skipped += 1;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
        } else if let Some(rest) = line.strip_prefix("test ") {
            self.test_line(rest);
        }
    }

    /// Adds up, given how the command ended.
    pub(crate) fn end(self, end: End) {
        let Self {
            tally,
            name,
            passed,
            failed,
            named,
            skipped,
            pending,
        } = self;
        tally.passed += passed.saturating_sub(skipped);
        if failed > named {
            tally.fail(format!("{name}: {} more", failed - named));
            tally.failed_unnamed += failed - named - 1;
        }
        let in_test = pending
            .map(|test| format!(", in {test}"))
            .unwrap_or_default();
        match end {
            End::Success if passed + failed == 0 => tally.fail(format!("{name}: no test ran")),
            End::Success => {}
            End::Failure(_) if failed + named > 0 => {}
            End::Failure(_) | End::TimedOut => tally.fail(format!("{name}: {end}{in_test}")),
        }
    }

    fn test_line(&mut self, rest: &str) {
        let Some((test, outcome)) = rest.rsplit_once(" ...") else {
            return;
        };
        self.pending = None;
        match outcome.trim() {
            "FAILED" => {
                self.named += 1;
                self.tally.fail(format!("{} {test}", self.name));
            }
            "" => self.pending = Some(test.to_owned()),
            ignored if ignored.starts_with("ignored") => self.tally.skip(test, ignored),
            _ => {}
        }
    }
}

/// `3` of `ok. 3 passed; 1 failed; …`.
fn count(result: &str, what: &str) -> usize {
    let words: Vec<&str> = result.split([' ', ';']).collect();
    words
        .windows(2)
        .find_map(|pair| match pair {
            [number, word] if *word == what => number.parse().ok(),
            _ => None,
        })
        .unwrap_or(0)
}

fn listed(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

const SKIPS: &str = "tests/skips.txt";

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(lines: &[&str], end: End) -> Tally {
        let mut tally = Tally {
            may_skip: listed("# why\nmay_skip because\n"),
            ..Tally::default()
        };
        let mut stage = tally.stage("unit");
        lines.iter().for_each(|line| stage.line(line));
        stage.end(end);
        tally
    }

    #[test]
    fn programs_add_up() {
        let lines = [
            "test a ... ok",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            "test b ... FAILED",
            "test result: FAILED. 4 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
        ];
        let tally = counted(&lines, End::Failure(Some(101)));
        assert_eq!(tally.to_string(), "5 passed, 1 failed");
        assert_eq!(tally.failures, ["unit b"]);
    }

    #[test]
    fn a_listed_skip_is_counted_apart_and_an_unlisted_one_fails() {
        let result = "test result: ok. 2 passed; 0 failed; 0 ignored";
        let tally = counted(&["SKIPPED may_skip no kernel", result], End::Success);
        assert_eq!(tally.to_string(), "1 passed, 0 failed, 1 skipped");
        let tally = counted(&["SKIPPED other no kernel", result], End::Success);
        assert_eq!(tally.to_string(), "1 passed, 1 failed");
        let tally = counted(&["test slow ... ignored, slow", result], End::Success);
        assert_eq!(tally.to_string(), "2 passed, 1 failed");
    }

    #[test]
    fn a_program_that_breaks_off_is_a_failure() {
        let tally = counted(&["test a ... ok"], End::Failure(None));
        assert_eq!(tally.failures, ["unit: ended by a signal"]);
        let tally = counted(&["test a ... "], End::TimedOut);
        assert_eq!(tally.failures, ["unit: time limit reached, in a"]);
    }

    #[test]
    fn nothing_run_is_a_failure() {
        let tally = counted(
            &["test result: ok. 0 passed; 0 failed; 0 ignored"],
            End::Success,
        );
        assert_eq!(tally.failures, ["unit: no test ran"]);
    }

    #[test]
    fn failures_without_a_name_are_counted_too() {
        let tally = counted(
            &["test result: FAILED. 0 passed; 3 failed"],
            End::Failure(Some(1)),
        );
        assert_eq!(tally.to_string(), "0 passed, 3 failed");
    }
}
