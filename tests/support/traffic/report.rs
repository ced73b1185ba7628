//! What came of it: counts by kind, errors by their text, memory over time. Takes single outcomes and
//! looks at the processes; gives lines for a person and a verdict for an exit code.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::mesh::{Mesh, resident_bytes};

/// Outcomes so far.
#[derive(Debug, Default)]
pub(super) struct Book(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    kinds: BTreeMap<&'static str, Count>,
    paths: BTreeMap<&'static str, Count>,
    /// By kind, path and text; a few examples are enough, and there are few kinds of them.
    errors: BTreeMap<(String, bool), u64>,
}

/// What came of one connection.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) kind: &'static str,
    pub(super) path: &'static str,
    pub(super) took: Duration,
    pub(super) end: Result<()>,
    /// A disturbance explains it if it failed.
    pub(super) expected: bool,
}

/// Of one kind, or of one path.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    pub done: u64,
    pub failed: u64,
    /// Failed where a disturbance said so.
    pub disturbed: u64,
    pub slowest: Duration,
}

impl Count {
    fn add(&mut self, took: Duration, failed: bool, expected: bool) {
        match (failed, expected) {
            (false, _) => self.done += 1,
            (true, true) => self.disturbed += 1,
            (true, false) => self.failed += 1,
        }
        if !failed {
            self.slowest = self.slowest.max(took);
        }
    }
}

impl Book {
    pub(super) fn enter(&self, outcome: Outcome) {
        let Outcome {
            kind,
            path,
            took,
            end,
            expected,
        } = outcome;
        let mut entries = self.lock();
        let failed = end.is_err();
        let count = entries.kinds.entry(kind).or_default();
        count.add(took, failed, expected);
        let count = entries.paths.entry(path).or_default();
        count.add(took, failed, expected);
        if let Err(error) = end {
            let text = without_numbers(&format!("{error:#}"));
            // Whom a disturbance met is in the counts; of a failure, everything is wanted.
            let text = if expected {
                text
            } else {
                format!("{kind}, {path}: {text}")
            };
            let key = (text, expected);
            if entries.errors.len() < ERRORS || entries.errors.contains_key(&key) {
                *entries.errors.entry(key).or_default() += 1;
            }
        }
    }

    fn total(&self) -> Count {
        let entries = self.lock();
        entries
            .kinds
            .values()
            .fold(Count::default(), |sum, one| Count {
                done: sum.done + one.done,
                failed: sum.failed + one.failed,
                disturbed: sum.disturbed + one.disturbed,
                slowest: sum.slowest.max(one.slowest),
            })
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory and descriptors of both processes over time.
#[derive(Debug)]
pub(super) struct Curve {
    began: Instant,
    /// Between two lines.
    step: Duration,
    next: Instant,
    done: u64,
    looks: Vec<Look>,
    /// Where the looks at the present processes begin.
    since: usize,
    /// Open descriptors of the present processes: when they were first looked at, and at the end.
    descriptors: [[usize; 2]; 2],
}

#[derive(Clone, Copy, Debug)]
struct Look {
    resident_bytes: [u64; 2],
}

impl Curve {
    pub(super) fn begin(duration: Duration, mesh: &Mesh) -> Result<Self> {
        let now = Instant::now();
        let step = (duration / LINES).clamp(Duration::from_secs(5), Duration::from_secs(120));
        Ok(Self {
            began: now,
            step,
            next: now + step,
            done: 0,
            looks: Vec::new(),
            since: 0,
            descriptors: [descriptors(mesh)?; 2],
        })
    }

    /// Looks at the processes; a line when it is time for one.
    pub(super) fn look(&mut self, mesh: &Mesh, book: &Book) -> Result<Option<String>> {
        let resident_bytes = resident(mesh)?;
        self.looks.push(Look { resident_bytes });
        if Instant::now() < self.next {
            return Ok(None);
        }
        self.next += self.step;
        let total = book.total();
        let rate = (total.done - self.done) / self.step.as_secs().max(1);
        self.done = total.done;
        let [a, b] = resident_bytes.map(mebibytes);
        Ok(Some(format!(
            "{:>6} s  {:>8} done, {rate:>5}/s  {:>3} failed  {:>5} disturbed  memory a {a} b {b} MiB",
            self.began.elapsed().as_secs(),
            total.done,
            total.failed,
            total.disturbed,
        )))
    }

    /// There is another process on a node: what its predecessor used says nothing about it.
    pub(super) fn processes(&mut self, mesh: &Mesh) -> Result<()> {
        self.since = self.looks.len();
        self.descriptors = [descriptors(mesh)?; 2];
        Ok(())
    }

    pub(super) fn end(&mut self, mesh: &Mesh) -> Result<()> {
        let resident_bytes = resident(mesh)?;
        self.looks.push(Look { resident_bytes });
        self.descriptors[1] = descriptors(mesh)?;
        Ok(())
    }

    /// The highest use in the second and in the last third of the present processes' life, unless
    /// that was too short to say anything.
    fn thirds(&self) -> Option<[[u64; 2]; 2]> {
        let looks = self.looks.get(self.since..).unwrap_or_default();
        let third = looks.len() / 3;
        if third < LOOKS {
            return None;
        }
        let highest = |looks: &[Look]| {
            [0, 1].map(|node: usize| {
                let of_node = |look: &Look| look.resident_bytes.get(node).copied();
                looks.iter().filter_map(of_node).max().unwrap_or(0)
            })
        };
        let second = looks.get(third..2 * third).unwrap_or_default();
        let last = looks.get(2 * third..).unwrap_or_default();
        Some([highest(second), highest(last)])
    }

    /// Whether memory stays as it is, or, after a short life, small.
    fn memory(&self) -> Verdict {
        let what = "memory is flat";
        let shown = |of: [u64; 2]| {
            let [a, b] = of.map(mebibytes);
            format!("a {a} b {b} MiB")
        };
        if let Some([second, last]) = self.thirds() {
            let flat =
                |(second, last): (&u64, &u64)| *last <= second + second / 10 + ALLOWANCE_BYTES;
            return Verdict {
                what,
                measured: format!(
                    "highest in the second third {}, in the last {}",
                    shown(second),
                    shown(last)
                ),
                holds: second.iter().zip(&last).all(flat),
            };
        }
        let last = self.looks.last().map_or([0; 2], |look| look.resident_bytes);
        Verdict {
            what,
            measured: format!("too short to tell; at the end {}", shown(last)),
            holds: last.iter().all(|bytes| *bytes < SMALL_BYTES),
        }
    }
}

/// What a run gave.
#[derive(Debug)]
pub struct Report {
    pub kinds: BTreeMap<&'static str, Count>,
    pub paths: BTreeMap<&'static str, Count>,
    /// Text, whether a disturbance explains it, and how often.
    pub errors: Vec<(String, bool, u64)>,
    pub verdicts: Vec<Verdict>,
}

/// One thing that must hold.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub what: &'static str,
    pub measured: String,
    pub holds: bool,
}

impl Report {
    pub(super) fn of(book: &Book, curve: &Curve, open: u64) -> Self {
        let total = book.total();
        let entries = book.lock();
        let idle_kinds = entries
            .kinds
            .values()
            .filter(|count| count.done == 0)
            .count();
        let [first, at_end] = curve.descriptors;
        let released = first
            .iter()
            .zip(&at_end)
            .all(|(f, e)| *e <= f + DESCRIPTORS);
        let verdict = |what, measured, holds| Verdict {
            what,
            measured,
            holds,
        };
        let verdicts = vec![
            verdict(
                "no error that no disturbance explains",
                format!("{} of {}", total.failed, total.done + total.failed),
                total.failed == 0,
            ),
            verdict(
                "every kind of traffic succeeded",
                format!("{idle_kinds} of {} never did", entries.kinds.len()),
                idle_kinds == 0 && !entries.kinds.is_empty(),
            ),
            verdict(
                "no connection is left open on a node",
                format!("{open}"),
                open == 0,
            ),
            verdict(
                "descriptors are given back",
                format!(
                    "a {} b {} at first, a {} b {} at the end",
                    first[0], first[1], at_end[0], at_end[1]
                ),
                released,
            ),
            curve.memory(),
        ];
        let error =
            |((text, expected), count): (&(String, bool), &u64)| (text.clone(), *expected, *count);
        Self {
            kinds: entries.kinds.clone(),
            paths: entries.paths.clone(),
            errors: entries.errors.iter().map(error).collect(),
            verdicts,
        }
    }

    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.verdicts.iter().all(|verdict| verdict.holds)
    }

    /// Tables for a person.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (title, counts) in [("kind", &self.kinds), ("path", &self.paths)] {
            text.push_str(&format!(
                "{title:<18} {:>9} {:>7} {:>9} {:>11}\n",
                "done", "failed", "disturbed", "slowest"
            ));
            for (name, count) in counts {
                let Count {
                    done,
                    failed,
                    disturbed,
                    slowest,
                } = count;
                let slowest = slowest.as_millis();
                text.push_str(&format!(
                    "{name:<18} {done:>9} {failed:>7} {disturbed:>9} {slowest:>8} ms\n"
                ));
            }
            text.push('\n');
        }
        for (error, expected, count) in &self.errors {
            let why = if *expected { "disturbed" } else { "FAILED" };
            text.push_str(&format!("{count:>6} × {why:<9} {error}\n"));
        }
        for Verdict {
            what,
            measured,
            holds,
        } in &self.verdicts
        {
            let sign = if *holds { "✓" } else { "✗" };
            text.push_str(&format!("{sign} {what}: {measured}\n"));
        }
        text
    }
}

fn resident(mesh: &Mesh) -> Result<[u64; 2]> {
    Ok([
        resident_bytes(mesh.a.pid()).context("node a's process")?,
        resident_bytes(mesh.b.pid()).context("node b's process")?,
    ])
}

fn descriptors(mesh: &Mesh) -> Result<[usize; 2]> {
    let count =
        |pid: u32| -> Result<usize> { Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count()) };
    Ok([count(mesh.a.pid())?, count(mesh.b.pid())?])
}

/// Tenths are enough.
fn mebibytes(bytes: u64) -> String {
    format!("{}.{}", bytes >> 20, ((bytes & 0xf_ffff) * 10) >> 20)
}

/// Ports, numbers and durations differ from one error to the next, what went wrong does not.
fn without_numbers(text: &str) -> String {
    let mut short = String::new();
    let mut digits = false;
    for c in text.chars() {
        if c.is_ascii_digit() {
            if !digits {
                short.push('#');
            }
            digits = true;
        } else {
            digits = false;
            short.push(c);
        }
    }
    short
}

const LINES: u32 = 60;
/// Different errors that are told apart.
const ERRORS: usize = 200;
/// Looks in a third of a life before their highest means something: half a minute.
const LOOKS: usize = 120;
const SMALL_BYTES: u64 = 128 << 20;
/// Tunnels stay open for a while after their last stream.
const DESCRIPTORS: usize = 64;
/// What an allocator may keep of a peak that came late.
const ALLOWANCE_BYTES: u64 = 16 << 20;
