//! What a person sees while it runs: one line that is written over, with the time that is left; and a clean end on
//! Ctrl-C. Takes steps; gives nothing back.

use std::{
    io::{self, IsTerminal as _, Write as _},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
    },
    unistd::geteuid,
};
use ztunnel_tests::reaper::Reaper;

/// The line.
#[derive(Debug)]
pub(crate) struct Progress {
    began: Instant,
    steps: u32,
    done: u32,
    terminal: bool,
    last: String,
}

impl Progress {
    pub(crate) fn of(steps: u32) -> Self {
        Self {
            began: Instant::now(),
            steps,
            done: 0,
            terminal: io::stdout().is_terminal(),
            last: String::new(),
        }
    }

    /// One of the steps begins.
    pub(crate) fn step(&mut self, what: &str) {
        let spent = self.began.elapsed();
        let left = if self.done == 0 {
            String::new()
        } else {
            let whole = spent.mul_f64(f64::from(self.steps) / f64::from(self.done));
            format!(", {} left", clock(whole.saturating_sub(spent).as_secs()))
        };
        let (done, steps) = (self.done, self.steps);
        self.line(&format!("[{done}/{steps}{left}] {what}"));
        self.done = (self.done + 1).min(self.steps);
    }

    /// Something to read while a step goes on; a file gets a line only when it changes.
    pub(crate) fn line(&mut self, text: &str) {
        if self.terminal {
            print!("\r\x1b[K{text}");
        } else if topic(text) != topic(&self.last) {
            println!("{text}");
        }
        self.last = text.to_owned();
        // A terminal that is gone cannot be told.
        drop(io::stdout().flush());
    }

    /// Something that stays.
    pub(crate) fn note(&self, text: &str) {
        if self.terminal {
            print!("\r\x1b[K");
        }
        println!("{text}");
    }
}

/// Without the counter, and without who does it: what a log needs once.
fn topic(text: &str) -> &str {
    let text = text.split_once("] ").map_or(text, |(_, rest)| rest);
    text.split_once(" · ").map_or(text, |(topic, _)| topic)
}

fn clock(seconds: u64) -> String {
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

/// What cleans up: after an orderly end when asked, on a signal by a thread, on a death by another process.
#[derive(Debug)]
pub(crate) struct Cleaner(Arc<Mutex<Reaper>>);

impl Cleaner {
    /// Call it first: the process must have one thread.
    pub(crate) fn begin() -> Result<Self> {
        anyhow::ensure!(
            geteuid().is_root(),
            "namespaces and eBPF need root: sudo -E cargo xtask bench"
        );
        let reaper = Arc::new(Mutex::new(Reaper::start()?));
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        // Every thread inherits this, so that the one below is the only one to take them.
        signals.thread_block().context("block the signals")?;
        let shared = Arc::clone(&reaper);
        thread::spawn(move || {
            if signals.wait().is_ok() {
                let mut reaper = shared.lock().unwrap_or_else(PoisonError::into_inner);
                match reaper.finish() {
                    Ok(()) => eprintln!("\nstopped; nothing is left"),
                    Err(error) => eprintln!("\nstopped; the clean-up failed: {error:#}"),
                }
                std::process::exit(INTERRUPTED);
            }
        });
        // Ten thousand connections are twice as many descriptors in each proxy.
        setrlimit(Resource::RLIMIT_NOFILE, descriptors()?, descriptors()?)
            .context("raise the limit of descriptors")?;
        Ok(Self(reaper))
    }

    pub(crate) fn finish(&self) -> Result<()> {
        let mut reaper = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reaper.finish()
    }
}

/// How many descriptors a process can have here.
pub(crate) fn descriptors() -> Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.1)
}

/// What a shell shows for a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;
