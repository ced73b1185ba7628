//! Bounded waiting for things that announce themselves to nobody: a port that starts to answer, a
//! name that disappears. Takes a question and a deadline; gives the answer or says what it waited
//! for. It polls, which is why it lives in the harness alone: tests wait on log lines, replies and
//! exits, and use this only where the kernel offers no event.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Asks `question` until it gives a value, at most for `patience`.
pub fn until<T>(
    what: &str,
    patience: Duration,
    mut question: impl FnMut() -> Option<T>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(answer) = question() {
            return Ok(answer);
        }
        if started.elapsed() >= patience {
            bail!("waited {patience:?} in vain for {what}");
        }
        thread::sleep(STEP);
    }
}

/// Between two questions: short against what is waited for, long against the cost of asking.
const STEP: Duration = Duration::from_millis(5);
