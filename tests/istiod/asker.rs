//! A client that asks the same servers again and again while a test does something else. Takes a namespace and
//! addresses; gives what the last round heard, and whether all rounds were answered; never asks in parallel.

use std::{
    net::SocketAddr,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use ztunnel_tests::{
    apps::Heard,
    mesh::{self, PATIENCE},
    netns::Netns,
};

/// Asks until it is dropped.
pub(crate) struct Asker {
    name: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    bell: Condvar,
}

#[derive(Default)]
struct State {
    over: bool,
    rounds: usize,
    last: Vec<bool>,
    refused: usize,
    first_refusal: String,
}

impl Asker {
    /// Begins to ask each of the servers in turn, each time on a connection of its own.
    pub(crate) fn start(name: &str, netns: &Netns, servers: &[SocketAddr]) -> Self {
        let shared = Arc::new(Shared::default());
        let thread = thread::spawn({
            let (shared, netns, servers) = (Arc::clone(&shared), netns.clone(), servers.to_vec());
            move || shared.ask(&netns, &servers)
        });
        Self {
            name: name.to_owned(),
            shared,
            thread: Some(thread),
        }
    }

    /// Waits for a round that began after this call and in which exactly these servers answered.
    pub(crate) fn wait(&self, what: &str, answered: &[bool]) -> Result<()> {
        let began = Instant::now();
        let mut state = self.shared.lock();
        // The one that is under way has begun already.
        let first = state.rounds + 2;
        while state.rounds < first || state.last != answered {
            let left = PATIENCE.saturating_sub(began.elapsed());
            if left.is_zero() {
                bail!(
                    "{what}: {} should hear {answered:?} and hears {:?} in round {}",
                    self.name,
                    state.last,
                    state.rounds
                );
            }
            state = self.shared.wait(state, left);
        }
        Ok(())
    }

    /// Waits for some more rounds, and fails if any question of any round had no answer.
    pub(crate) fn wait_all_answered(&self, rounds: usize) -> Result<()> {
        let began = Instant::now();
        let mut state = self.shared.lock();
        let enough = state.rounds + 1 + rounds;
        while state.rounds < enough && state.refused == 0 {
            let left = PATIENCE.saturating_sub(began.elapsed());
            ensure!(!left.is_zero(), "{}: {rounds} rounds take long", self.name);
            state = self.shared.wait(state, left);
        }
        ensure!(
            state.refused == 0,
            "{}: in {} rounds {} questions had no answer, the first: {}",
            self.name,
            state.rounds,
            state.refused,
            state.first_refusal
        );
        Ok(())
    }

    /// How often all were asked so far.
    pub(crate) fn rounds(&self) -> usize {
        self.shared.lock().rounds
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.bell.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has said what it had to say.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn ask(&self, netns: &Netns, servers: &[SocketAddr]) {
        loop {
            let mut round = Vec::new();
            for server in servers {
                let heard = mesh::knock(netns, *server, QUESTION, PATIENCE);
                let answered = matches!(&heard, Ok(Heard::Answer(bytes)) if bytes == QUESTION);
                let mut state = self.lock();
                if state.over {
                    return;
                }
                if !answered {
                    if state.refused == 0 {
                        state.first_refusal = format!("{server}: {heard:?}");
                    }
                    state.refused += 1;
                }
                round.push(answered);
            }
            let mut state = self.lock();
            state.rounds += 1;
            state.last = round;
            self.bell.notify_all();
            // A pace that leaves room for others; nothing waits for it.
            drop(self.wait(state, PACE));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        at_most: Duration,
    ) -> MutexGuard<'a, State> {
        match self.bell.wait_timeout(state, at_most) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }
}

/// What a server must echo.
pub(crate) const QUESTION: &[u8] = b"a question in plain words";
const PACE: Duration = Duration::from_millis(10);
