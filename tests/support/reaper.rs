//! A process that outlives a killed run and cleans up after it. Takes nothing but its parent's
//! prefix; waits for the parent to close a pipe, which the kernel does for a parent that is killed;
//! then sweeps and ends. It never acts while the parent lives.

use std::{
    fs::OpenOptions,
    io::{PipeWriter, Read as _, pipe},
    process::exit,
};

use anyhow::{Context as _, Result};
use nix::{
    sys::{prctl, signal::SigSet, wait::waitpid},
    unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid},
};

use crate::{leftovers, sys};

/// A running reaper. Ending it, on purpose or by being killed, makes it sweep.
#[derive(Debug)]
pub struct Reaper {
    pid: Pid,
    lifeline: Option<PipeWriter>,
}

impl Reaper {
    /// Starts a reaper for everything that carries this process's prefix. Call it first in `main`:
    /// the process must still have one thread only.
    pub fn start() -> Result<Self> {
        let prefix = leftovers::own_prefix();
        let (mut end, lifeline) = pipe()?;
        let Some(pid) = sys::fork_alone().context("fork the reaper")? else {
            drop(lifeline);
            // Nobody is left to hear of a failure; what remains, the next run collects.
            drop(detach().and_then(|()| {
                end.read_to_end(&mut Vec::new())?;
                leftovers::sweep(&prefix)
            }));
            leave();
        };
        Ok(Self {
            pid,
            lifeline: Some(lifeline),
        })
    }

    /// Sweeps now and waits until it is done.
    pub fn finish(&mut self) -> Result<()> {
        if let Some(lifeline) = self.lifeline.take() {
            drop(lifeline);
            waitpid(self.pid, None).context("wait for the reaper")?;
        }
        Ok(())
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        // The sweep happens whether or not we manage to wait for it.
        drop(self.finish());
    }
}

/// Leaves the parent's terminal, its signals and its output: a pipe that reads our parent's output
/// must see its end when the parent ends.
fn detach() -> Result<()> {
    setsid()?;
    SigSet::all().thread_block()?;
    prctl::set_name(c"zt-reaper")?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

#[expect(
    clippy::exit,
    reason = "the forked child must not return into its parent's program"
)]
fn leave() -> ! {
    exit(0)
}
