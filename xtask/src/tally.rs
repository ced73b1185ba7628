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

    /// Adds what a stage has seen, given how its command ended.
    pub(crate) fn add(&mut self, stage: Stage, end: End) {
        let Stage {
            name,
            passed,
            failed,
            failures,
            skips,
            pending,
            successes: _,
        } = stage;
        let said_skipped = skips.iter().filter(|skip| skip.by_passing).count();
        self.passed += passed.saturating_sub(said_skipped);
        let unnamed = failed.saturating_sub(failures.len());
        let clean = passed > 0 && failed == 0 && failures.is_empty();
        let silent = passed + failed + skips.len() + failures.len() == 0;
        for test in &failures {
            self.fail(format!("{name} {test}"));
        }
        for _ in 0..unnamed {
            self.fail(format!("{name}: a test that was not named"));
        }
        for skip in skips {
            self.skip(&skip.test, &skip.why);
        }
        let in_test = pending
            .map(|test| format!(", in {test}"))
            .unwrap_or_default();
        match end {
            End::Success if silent => self.fail(format!("{name}: no test ran")),
            End::Success => {}
            End::Failure(_) if !clean && !silent => {}
            End::Failure(_) | End::TimedOut => self.fail(format!("{name}: {end}{in_test}")),
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failures.len())?;
        if !self.skips.is_empty() {
            write!(f, ", {} skipped", self.skips.len())?;
        }
        Ok(())
    }
}

/// What one program, or several in a row, said in libtest's lines.
#[derive(Debug, Default)]
pub(crate) struct Stage {
    name: String,
    passed: usize,
    failed: usize,
    /// Those of the failed that were named.
    failures: Vec<String>,
    skips: Vec<Skip>,
    /// A test that has begun and not ended.
    pending: Option<String>,
    /// In the list of passed tests and what they printed.
    successes: bool,
}

#[derive(Debug)]
struct Skip {
    test: String,
    why: String,
    /// It said so and returned, which libtest takes for a pass.
    by_passing: bool,
}

impl Stage {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// Takes one line of output; true if a person wants to see it.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        match line {
            "successes:" => self.successes = true,
            "failures:" => self.successes = false,
            _ => {}
        }
        self.successes &= !line.starts_with("test result: ");
        self.count(line);
        !self.successes || line.contains(SKIPPED)
    }

    fn count(&mut self, line: &str) {
        if let Some((_, skip)) = line.split_once(SKIPPED) {
            let (test, why) = skip.split_once(' ').unwrap_or((skip, "no reason given"));
            let (test, why) = (test.to_owned(), why.to_owned());
            self.skips.push(Skip {
                test,
                why,
                by_passing: true,
            });
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
        } else if let Some(rest) = line.strip_prefix("test ")
            && let Some((test, outcome)) = rest.rsplit_once(" ...")
        {
            self.pending = None;
            let test = test.to_owned();
            match outcome.trim() {
                "" => self.pending = Some(test),
                "FAILED" => self.failures.push(test),
                why if why.starts_with("ignored") => {
                    self.skips.push(Skip {
                        test,
                        why: why.to_owned(),
                        by_passing: false,
                    });
                }
                _ => {}
            }
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

const SKIPPED: &str = "SKIPPED ";
const SKIPS: &str = "tests/skips.txt";

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(lines: &[&str], end: End) -> Tally {
        let mut tally = Tally {
            may_skip: listed("# why\nmay_skip because\n"),
            ..Tally::default()
        };
        let mut stage = Stage::new("unit");
        for line in lines {
            stage.line(line);
        }
        tally.add(stage, end);
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
    fn what_passing_tests_print_is_not_shown_but_for_skips() {
        let mut stage = Stage::new("unit");
        let lines = [
            "test a ... ok",
            "successes:",
            "noise",
            "SKIPPED a why",
            "failures:",
            "why",
        ];
        let shown: Vec<bool> = lines.iter().map(|line| stage.line(line)).collect();
        assert_eq!(shown, [true, false, false, true, true, true]);
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
