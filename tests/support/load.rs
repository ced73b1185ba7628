//! A steady stream of short connections, for what must hold while something breaks. Takes a
//! namespace, an echo server's address and a payload; gives every attempt with its times and its
//! ending; never has more than one attempt per worker under way.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::netns::Netns;

/// One connection that was tried.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    pub began: Instant,
    pub ended: Instant,
    pub outcome: Outcome,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Connected, sent the payload, got it back.
    Answered,
    /// Never connected.
    NotConnected(ErrorKind),
    /// Connected, but the payload did not come back.
    CutOff(ErrorKind),
}

/// Workers that connect until they are told to stop.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    attempts: Mutex<Vec<Attempt>>,
    bell: Condvar,
}

impl Load {
    /// Each worker connects, sends `payload`, reads it back, closes and rests for [`REST`]. A connect
    /// or an answer may take `patience`.
    pub fn start(
        netns: &Netns,
        to: SocketAddr,
        payload: &[u8],
        workers: usize,
        patience: Duration,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let work = |_| {
            let (netns, payload) = (netns.clone(), payload.to_owned());
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                netns.within(|| {
                    while !shared.stop.load(Ordering::Relaxed) {
                        shared.record(attempt(to, &payload, patience));
                        thread::sleep(REST);
                    }
                    Ok(())
                })
            })
        };
        let workers = (0..workers).map(work).collect();
        Self { shared, workers }
    }

    /// Every attempt that has ended so far.
    #[must_use]
    pub fn attempts(&self) -> Vec<Attempt> {
        self.shared.lock().clone()
    }

    /// Waits until this many attempts that began after `since` have been answered.
    pub fn wait_answered(&self, since: Instant, count: usize, patience: Duration) -> Result<()> {
        let answered = |attempts: &[Attempt]| {
            let good = |a: &&Attempt| a.began >= since && a.outcome == Outcome::Answered;
            attempts.iter().filter(good).count()
        };
        let (attempts, _) = self
            .shared
            .bell
            .wait_timeout_while(self.shared.lock(), patience, |attempts| {
                answered(attempts) < count
            })
            .unwrap_or_else(PoisonError::into_inner);
        let so_far = answered(&attempts);
        ensure!(
            so_far >= count,
            "{so_far} of {count} attempts answered within {patience:?}"
        );
        Ok(())
    }

    /// Stops, waits for the attempts under way, and gives all.
    pub fn finish(mut self) -> Result<Vec<Attempt>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(self.attempts())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // The workers end by themselves: after the attempt under way, which has a deadline.
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Attempt>> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, attempt: Attempt) {
        let mut attempts = self.lock();
        if attempts.len() < ATTEMPTS {
            attempts.push(attempt);
        }
        drop(attempts);
        self.bell.notify_all();
    }
}

/// How long a worker rests between two attempts, so that ports do not run out.
pub const REST: Duration = Duration::from_millis(10);

fn attempt(to: SocketAddr, payload: &[u8], patience: Duration) -> Attempt {
    let began = Instant::now();
    let outcome = match TcpStream::connect_timeout(&to, patience) {
        Err(error) => Outcome::NotConnected(error.kind()),
        Ok(stream) => match talk(stream, payload, patience) {
            Ok(()) => Outcome::Answered,
            Err(error) => Outcome::CutOff(error.kind()),
        },
    };
    Attempt {
        began,
        ended: Instant::now(),
        outcome,
    }
}

fn talk(mut stream: TcpStream, payload: &[u8], patience: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(payload)?;
    let mut back = vec![0; payload.len()];
    stream.read_exact(&mut back)?;
    if back == payload {
        Ok(())
    } else {
        Err(ErrorKind::InvalidData.into())
    }
}

/// Attempts kept: at one per worker and rest, many minutes.
const ATTEMPTS: usize = 1_000_000;
