//! What is done to the nodes while traffic runs, and whom it may disturb. Takes the world; gives a line
//! that says what was done; an error of anybody else, or at another time, stays an error.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::paths::{ECHO, Path, VICTIM, World};
use crate::{
    mesh::{PATIENCE, is_refused, wait_fate},
    meshfile::allow_accounts,
};

/// A disturbance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chaos {
    /// Node b's process is killed and started again.
    Kill,
    /// A policy refuses one client, and is taken away again.
    Policy,
    /// Both nodes read a file that says the same in other words.
    Reload,
    /// Node b's process is asked to end, and started again.
    Restart,
}

impl Chaos {
    /// Every disturbance.
    pub const ALL: [Self; 4] = [Self::Kill, Self::Policy, Self::Reload, Self::Restart];

    /// Whom it may disturb, for a person to read.
    #[must_use]
    pub fn disturbs(self) -> &'static str {
        match self {
            Self::Kill | Self::Restart => {
                "connections over node b that are under way between its end and its readiness"
            }
            Self::Policy => "connections of the client that the policy names, while it does",
            Self::Reload => "nobody",
        }
    }

    pub(super) fn apply(self, world: &mut World, windows: &Windows) -> Result<String> {
        let began = Instant::now();
        match self {
            Self::Kill => {
                let window = windows.open(Whom::OverB);
                world.b().kill()?;
                again(world)?;
                windows.close(window);
            }
            Self::Restart => {
                let window = windows.open(Whom::OverB);
                world.b().signal(Signal::SIGTERM)?;
                world.b().wait_exit(DRAINED)?;
                again(world)?;
                windows.close(window);
            }
            Self::Policy => {
                let window = windows.open(Whom::Victim);
                policy(world)?;
                windows.close(window);
            }
            Self::Reload => {
                let comment = format!("# read again at {began:?}\n");
                let file = world.file.clone().verbatim(&comment);
                world.mesh.replace(&file)?;
            }
        }
        Ok(format!(
            "{self:?} took {:.1} s; may disturb {}",
            began.elapsed().as_secs_f64(),
            self.disturbs()
        ))
    }
}

fn again(world: &mut World) -> Result<()> {
    world.b().restart()?;
    world.b().wait_ready().map(drop)
}

fn policy(world: &World) -> Result<()> {
    let paths = world.paths()?;
    let victim = paths
        .iter()
        .find(|path| path.victim)
        .context("no victim among the paths")?;
    let deny = allow_accounts("not-you", &["victim"]).replace("action: Allow", "action: Deny");
    let denied = world
        .file
        .clone()
        .policy(&deny)
        .attach("server-b", "demo/not-you");
    world.mesh.replace(&denied)?;
    let to = victim.at(ECHO);
    wait_fate(&victim.from, to, "the victim to be refused", is_refused)?;
    // Long enough for traffic to meet it.
    std::thread::sleep(DENIED);
    world.mesh.replace(&world.file)?;
    let answered = |heard: &crate::apps::Heard| heard.answered();
    wait_fate(&victim.from, to, "the victim to be admitted", answered).map(drop)
}

/// Whom a window excuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whom {
    OverB,
    Victim,
}

impl Whom {
    fn includes(self, path: &Path) -> bool {
        match self {
            Self::OverB => path.over_b,
            Self::Victim => path.name == VICTIM,
        }
    }
}

/// Times at which errors of some are expected.
#[derive(Debug, Default)]
pub(super) struct Windows(Mutex<Vec<Window>>);

#[derive(Clone, Copy, Debug)]
struct Window {
    whom: Whom,
    from: Instant,
    to: Option<Instant>,
}

impl Windows {
    fn open(&self, whom: Whom) -> usize {
        let mut windows = self.lock();
        windows.push(Window {
            whom,
            from: Instant::now(),
            to: None,
        });
        windows.len() - 1
    }

    fn close(&self, number: usize) {
        if let Some(window) = self.lock().get_mut(number) {
            window.to = Some(Instant::now());
        }
    }

    /// Whether a connection on this path, under way from `began` to `ended`, may have been disturbed.
    pub(super) fn cover(&self, path: &Path, began: Instant, ended: Instant) -> bool {
        self.lock().iter().any(|window| {
            window.whom.includes(path)
                && window.from <= ended
                && window.to.is_none_or(|to| began <= to)
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Window>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const DENIED: Duration = Duration::from_secs(2);
/// Beyond the deadline of a drain.
const DRAINED: Duration = Duration::from_secs(PATIENCE.as_secs() + 20);
