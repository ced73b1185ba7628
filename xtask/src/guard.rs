//! What keeps a long verb tidy: takes a reaper, gives a clean-up at an orderly end, at Ctrl-C and at a death; it touches
//! only what carries this process's prefix.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};
use ztunnel_tests::reaper::Reaper;

/// Cleans up when a verb is interrupted or killed: a signal is taken by a thread, and a death by
/// the reaper, which is another process.
pub(crate) struct Guard {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    reaper: Reaper,
    /// What Ctrl-C means at this moment.
    exit_code: i32,
}

impl Guard {
    /// Takes the signals that end a program; call it before any other thread is made.
    pub(crate) fn over(reaper: Reaper) -> Result<Self> {
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        // Every thread inherits this, so that the one below is the only one to take them.
        signals.thread_block().context("block the signals")?;
        let shared = Arc::new(Mutex::new(Shared {
            reaper,
            exit_code: INTERRUPTED,
        }));
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                if signals.wait().is_ok() {
                    end(&shared);
                }
            }
        });
        Ok(Self { shared })
    }

    /// Waits until somebody presses Ctrl-C; the process then ends with the verdict.
    pub(crate) fn wait_for_signal(&self, all_hold: bool) -> ! {
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .exit_code = i32::from(!all_hold);
        loop {
            thread::park();
        }
    }

    /// Sweeps what is left after an orderly end.
    pub(crate) fn finish(&self) -> Result<()> {
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .reaper
            .finish()
    }
}

fn end(shared: &Mutex<Shared>) -> ! {
    // Keeps the main thread, whose world is about to vanish, from complaining about it.
    let mut out = std::io::stdout().lock();
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let text = match shared.reaper.finish() {
        Ok(()) => {
            "\n    Stopped. Namespaces, pins, processes and files of this run are gone.\n".into()
        }
        Err(error) => format!("\n    Stopped; the clean-up failed: {error:#}\n"),
    };
    // A terminal that is gone cannot be told.
    drop(std::io::Write::write_all(&mut out, text.as_bytes()));
    drop(std::io::Write::flush(&mut out));
    std::process::exit(shared.exit_code)
}

/// What a shell shows for a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;
