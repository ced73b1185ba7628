//! The demo's voice: numbered steps, facts as they are measured, and a table of them at the end.
//! Takes what was measured and whether it holds; prints it; never judges by itself.

use std::{
    io::{IsTerminal as _, stdout},
    time::{Duration, Instant},
};

use anyhow::Result;

/// One claim and its measurement.
struct Fact {
    step: usize,
    name: String,
    expected: String,
    measured: String,
    holds: bool,
}

/// What a measurement gives: how it reads, and whether it is what was promised.
pub(super) type Measured = (String, bool);

pub(super) struct Teller {
    began: Instant,
    step: usize,
    facts: Vec<Fact>,
    colour: bool,
}

impl Teller {
    pub(super) fn new() -> Self {
        let colour = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self {
            began: Instant::now(),
            step: 0,
            facts: Vec::new(),
            colour,
        }
    }

    /// Begins a step: its title, and what happens in it.
    pub(super) fn step(&mut self, title: &str, what: &str) {
        self.step += 1;
        let at = self.paint(
            FAINT,
            &format!("{:>5.1} s", self.began.elapsed().as_secs_f64()),
        );
        let dots = self.paint(
            FAINT,
            &"·".repeat(64_usize.saturating_sub(title.chars().count())),
        );
        println!(
            "\n{:>2}  {} {dots} {at}",
            self.step,
            self.paint(BOLD, title)
        );
        for line in what.lines() {
            println!("    {line}");
        }
        println!();
    }

    /// A line that only informs.
    pub(super) fn say(&self, text: &str) {
        println!("    {}", self.paint(FAINT, text));
    }

    /// Records a fact and prints what was measured.
    pub(super) fn fact(&mut self, name: &str, expected: &str, (measured, holds): Measured) {
        let sign = if holds {
            self.paint(GREEN, "✓")
        } else {
            self.paint(RED, "✗")
        };
        let dots = self.paint(
            FAINT,
            &".".repeat(NAME.saturating_sub(name.chars().count())),
        );
        println!("    {sign} {name} {dots} {}", cut(&measured, LINE));
        if !holds {
            println!(
                "      {}",
                self.paint(RED, &format!("expected: {expected}"))
            );
            if measured.chars().count() > LINE {
                println!("      {}", self.paint(FAINT, &measured));
            }
        }
        self.facts.push(Fact {
            step: self.step,
            name: name.to_owned(),
            expected: expected.to_owned(),
            measured,
            holds,
        });
    }

    /// A fact whose measuring may fail, which is then what was measured.
    pub(super) fn measure(
        &mut self,
        name: &str,
        expected: &str,
        measuring: impl FnOnce() -> Result<Measured>,
    ) {
        let measured = measuring().unwrap_or_else(|error| (one_line(&error), false));
        self.fact(name, expected, measured);
    }

    pub(super) fn all_hold(&self) -> bool {
        self.facts.iter().all(|fact| fact.holds)
    }

    /// Prints every fact once more, and the verdict.
    pub(super) fn table(&self) {
        println!(
            "\n    {}\n",
            self.paint(BOLD, "Every fact, as measured in this run")
        );
        let header = row("", "fact", "expected", "measured");
        println!("{}  ok", self.paint(FAINT, &header));
        println!(
            "{}",
            self.paint(FAINT, &"─".repeat(header.chars().count() + 4))
        );
        let mut step = 0;
        for fact in &self.facts {
            let number = if fact.step == step {
                String::new()
            } else {
                fact.step.to_string()
            };
            step = fact.step;
            let line = row(&number, &fact.name, &fact.expected, &fact.measured);
            let ok = if fact.holds {
                self.paint(GREEN, "✓")
            } else {
                self.paint(RED, "✗ NO")
            };
            println!("{line}  {ok}");
        }
        let total = self.facts.len();
        let held = self.facts.iter().filter(|fact| fact.holds).count();
        let took = self.began.elapsed().as_secs_f64();
        if self.all_hold() {
            let verdict = format!("All {total} facts hold.");
            println!("\n    {} {took:.1} s.", self.paint(GREEN, &verdict));
        } else {
            let verdict = format!("{} of {total} facts do not hold.", total - held);
            println!("\n    {} {took:.1} s.", self.paint(RED, &verdict));
        }
    }

    pub(super) fn heading(&self, text: &str) {
        println!("\n    {}", self.paint(BOLD, text));
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// A duration with as many digits as matter.
pub(super) fn time(took: Duration) -> String {
    let ms = took.as_secs_f64() * 1000.0;
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else if ms < 1000.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{:.2} s", took.as_secs_f64())
    }
}

/// An error as part of a row.
pub(super) fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

fn row(step: &str, name: &str, expected: &str, measured: &str) -> String {
    format!(
        "{step:>2}  {:<NAME$}  {:<EXPECTED$}  {:<MEASURED$}",
        cut(name, NAME),
        cut(expected, EXPECTED),
        cut(measured, MEASURED),
    )
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars()
        .take(width.saturating_sub(1))
        .chain(['…'])
        .collect()
}

const NAME: usize = 44;
const EXPECTED: usize = 24;
const MEASURED: usize = 42;
/// What of a measurement is shown beside its name.
const LINE: usize = 80;
const BOLD: &str = "1";
const FAINT: &str = "2";
const GREEN: &str = "32";
const RED: &str = "31";
