//! Certificates in use. Takes identities that somebody needs, gives credentials that are renewed
//! before they expire; never signs and never hands out what has expired.
#![expect(
    clippy::disallowed_types,
    reason = "a lock held for one map look-up per tunnel, never over an await: a snapshot would be rebuilt at each renewal"
)]

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::ca::Issuer;
use super::error::Error;
use super::tls::{Credentials, Rules};
use crate::model::{Chain, SpiffeId};

/// Tells the wall-clock time.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// How certificates are asked for.
#[derive(Clone, Debug)]
pub struct Params {
    /// The lifetime that is asked for.
    pub ttl: Duration,
    /// What the certificates are used with.
    pub rules: Rules,
    /// How long the source may take to answer.
    pub issue_timeout: Duration,
    /// How many certificates are asked for at a time.
    pub concurrency: usize,
    /// The pause after the first failure; it doubles with each further one.
    pub backoff_min: Duration,
    /// The longest pause between two attempts.
    pub backoff_max: Duration,
}

impl Default for Params {
    // PROTOCOL.md#certificate-renewal
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 3600),
            rules: Rules::default(),
            issue_timeout: Duration::from_secs(10),
            concurrency: 8,
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(150),
        }
    }
}

/// What is known of the certificate of one identity.
#[derive(Clone, Debug)]
pub enum CertificateState {
    /// It is there.
    Available(Arc<Credentials>),
    /// It was asked for, and there is no answer yet.
    Initializing,
    /// The source gives none, for this reason.
    Unavailable(String),
}

/// Credentials by identity, shared by all threads. `run` must be driven, or nobody gets any.
pub struct Store {
    params: Params,
    clock: Clock,
    entries: Mutex<Entries>,
    work: Notify,
}

impl Store {
    /// An empty store.
    #[must_use]
    pub fn new(params: Params, clock: Clock) -> Self {
        Self {
            params,
            clock,
            entries: Mutex::new(Entries::default()),
            work: Notify::new(),
        }
    }

    /// The credentials of `id`: at once when they are there, else as soon as the source answers.
    /// Callers that wait for one identity share one request. Cancel safe.
    ///
    /// # Errors
    /// What the source answered; also while a failure is so recent that asking again must wait.
    pub async fn get(&self, id: &SpiffeId) -> Result<Arc<Credentials>, Error> {
        let mut state = match self.look(id) {
            Look::Ready(credentials) => return Ok(credentials),
            Look::Failed(error) => return Err(error),
            Look::Wait(state) => state,
        };
        self.work.notify_one();
        loop {
            let answer = match &*state.borrow_and_update() {
                State::Waiting => None,
                State::Ready(credentials) => Some(Ok(Arc::clone(credentials))),
                State::Failed(error) => Some(Err(error.clone())),
            };
            if let Some(answer) = answer {
                return answer;
            }
            if state.changed().await.is_err() {
                return Err(Error::Forgotten(id.clone()));
            }
        }
    }

    /// Asks for the credentials of `id` before somebody waits for them.
    pub fn prefetch(&self, id: &SpiffeId) {
        {
            let mut entries = self.entries();
            if entries.ended || entries.by_id.contains_key(id) {
                return;
            }
            entries.by_id.insert(id.clone(), Entry::new(Urgency::Early));
        }
        self.work.notify_one();
    }

    /// Every identity that is held or asked for, in their order as texts.
    #[must_use]
    pub fn states(&self) -> Vec<(SpiffeId, CertificateState)> {
        let mut states: Vec<_> = self
            .entries()
            .by_id
            .iter()
            .map(|(id, entry)| {
                let state = match &*entry.state.borrow() {
                    State::Waiting => CertificateState::Initializing,
                    State::Ready(credentials) => {
                        CertificateState::Available(Arc::clone(credentials))
                    }
                    State::Failed(error) => CertificateState::Unavailable(error.to_string()),
                };
                (id.clone(), state)
            })
            .collect();
        states.sort_by_cached_key(|(id, _)| id.to_string());
        states
    }

    /// Stops renewing the credentials of `id`; who still holds them may use them up.
    pub fn forget(&self, id: &SpiffeId) {
        self.entries().by_id.remove(id);
    }

    /// Asks anew for everything that is held, as soon as may be: whoever signs is another. What is
    /// held serves until then.
    pub fn renew_all(&self) {
        let now = Instant::now();
        for entry in self.entries().by_id.values_mut() {
            entry.due = entry.due.min(now);
        }
        self.work.notify_one();
    }

    /// Asks `issuer` for what is wanted and renews what is held, at half of its remaining life.
    /// Never returns; once dropped, nobody gets new credentials from this store.
    pub async fn run(&self, issuer: &impl Issuer) {
        let _end = End(self);
        let mut running = Running(Vec::new());
        let mut revocations = self.params.rules.revocations.clone();
        loop {
            let next = self.start_due(issuer, &mut running);
            tokio::select! {
                (id, result) = std::future::poll_fn(|cx| running.poll(cx)) => self.finish(&id, result),
                () = self.work.notified() => {}
                () = revocations.changed() => self.renew_revoked(),
                () = at(next) => {}
            }
        }
    }

    fn look(&self, id: &SpiffeId) -> Look {
        let now = Instant::now();
        let mut entries = self.entries();
        if entries.ended {
            return Look::Failed(Error::Forgotten(id.clone()));
        }
        // Not the entry API: it would clone the identity for every tunnel.
        if !entries.by_id.contains_key(id) {
            entries
                .by_id
                .insert(id.clone(), Entry::new(Urgency::Wanted));
        }
        let Some(entry) = entries.by_id.get_mut(id) else {
            return Look::Failed(Error::Forgotten(id.clone()));
        };
        if let State::Ready(credentials) = &*entry.state.borrow()
            && credentials.not_after() > (self.clock)()
        {
            return Look::Ready(Arc::clone(credentials));
        }
        if let Some((at, error)) = &entry.failed
            && now < *at + self.params.backoff_min
        {
            return Look::Failed(error.clone());
        }
        entry.urgency = Urgency::Wanted;
        entry.due = entry.due.min(now);
        entry.state.send_replace(State::Waiting);
        Look::Wait(entry.state.subscribe())
    }

    /// Starts what is due, first what somebody waits for; says when the next is due.
    fn start_due<'a>(
        &'a self,
        issuer: &'a impl Issuer,
        running: &mut Running<'a>,
    ) -> Option<Instant> {
        let now = Instant::now();
        let mut entries = self.entries();
        while running.0.len() < self.params.concurrency {
            let due = entries
                .by_id
                .iter_mut()
                .filter(|(_, e)| !e.busy && e.due <= now);
            let Some((id, entry)) = due.min_by_key(|(_, e)| (e.urgency, e.due)) else {
                let idle = entries.by_id.values().filter(|e| !e.busy);
                return idle.map(|e| e.due).min();
            };
            entry.busy = true;
            let id = id.clone();
            running.0.push(Box::pin(async move {
                let result = self.issue(&id, issuer).await;
                (id, result)
            }));
        }
        None
    }

    async fn issue(&self, id: &SpiffeId, issuer: &impl Issuer) -> Result<Credentials, Error> {
        let within = self.params.issue_timeout;
        let issued = timeout(within, issuer.issue(id, (self.clock)(), self.params.ttl)).await;
        let Ok(issued) = issued else {
            return Err(Error::TimedOut {
                id: id.clone(),
                within,
            });
        };
        let credentials = Credentials::new(id.clone(), issued?, self.params.rules.clone())?;
        if credentials.not_after() <= (self.clock)() {
            return Err(Error::Expired(id.clone()));
        }
        if credentials.is_revoked() {
            return Err(Error::Revoked(id.clone()));
        }
        Ok(credentials)
    }

    /// Asks anew for what a list revokes now; until it comes, those who want it wait.
    fn renew_revoked(&self) {
        let now = Instant::now();
        for (id, entry) in &mut self.entries().by_id {
            entry.state.send_if_modified(|state| {
                let revoked = match &*state {
                    State::Ready(credentials) => credentials.is_revoked(),
                    State::Waiting | State::Failed(_) => false,
                };
                if revoked {
                    tracing::warn!(%id, "this node's own certificate is revoked, asking for another");
                    *state = State::Waiting;
                }
                revoked
            });
            if matches!(&*entry.state.borrow(), State::Waiting) {
                entry.due = entry.due.min(now);
            }
        }
    }

    fn finish(&self, id: &SpiffeId, result: Result<Credentials, Error>) {
        let (now, wall) = (Instant::now(), (self.clock)());
        let mut entries = self.entries();
        let Some(entry) = entries.by_id.get_mut(id) else {
            return; // forgotten meanwhile
        };
        entry.busy = false;
        entry.urgency = Urgency::Renewal;
        match result {
            Ok(credentials) => {
                let left = credentials
                    .not_after()
                    .duration_since(wall)
                    .unwrap_or_default();
                // Pods that started together should not renew together.
                let jitter = left.mul_f64(fastrand::f64() * RENEWAL_JITTER);
                entry.due = now + (left / 2 + jitter).max(RENEWAL_MIN);
                entry.issued = now;
                entry.failures = 0;
                entry.failed = None;
                let roots = credentials.roots().to_vec();
                if matches!(&*entry.state.borrow(), State::Ready(held) if held.roots() != roots) {
                    tracing::info!(%id, "certificate renewed, under other roots");
                }
                entry
                    .state
                    .send_replace(State::Ready(Arc::new(credentials)));
                entries.renew_those_with_other_roots(&roots, now);
            }
            Err(error) => {
                tracing::warn!(%id, error = %Chain(&error), "no certificate");
                let soon = matches!(error, Error::NotYetKnown { .. });
                entry.due = now + self.backoff(entry.failures, soon);
                entry.failures = entry.failures.saturating_add(1);
                // Whoever waits for a pod that the CA is about to see goes on waiting, for a while.
                if soon
                    && entry.failures <= SOON_TRIES
                    && matches!(*entry.state.borrow(), State::Waiting)
                {
                    entry.urgency = Urgency::Wanted;
                    return;
                }
                entry.failed = Some((now, error.clone()));
                entry.state.send_if_modified(|state| {
                    let useless = match state {
                        State::Ready(credentials) => credentials.not_after() <= wall,
                        State::Waiting | State::Failed(_) => true,
                    };
                    if useless {
                        *state = State::Failed(error);
                    }
                    useless
                });
            }
        }
    }

    /// The pause before the next attempt; a short one if it may succeed `soon`.
    fn backoff(&self, failures: u32, soon: bool) -> Duration {
        let (first, longest) = if soon {
            (SOON_MIN, SOON_MAX)
        } else {
            (self.params.backoff_min, self.params.backoff_max)
        };
        let doubled = first.saturating_mul(1 << failures.min(16));
        let spread = 1.0 - BACKOFF_JITTER + fastrand::f64() * 2.0 * BACKOFF_JITTER;
        doubled.min(longest).mul_f64(spread)
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Entries {
    by_id: HashMap<SpiffeId, Entry>,
    /// Nobody renews any more.
    ended: bool,
}

impl Entries {
    /// The CA has other roots now: what is held does not trust what it signs from here on.
    // PROTOCOL.md#root-rotation
    fn renew_those_with_other_roots(&mut self, roots: &[CertificateDer<'_>], now: Instant) {
        for entry in self.by_id.values_mut().filter(|entry| !entry.busy) {
            let other = match &*entry.state.borrow() {
                State::Ready(held) => held.roots() != roots,
                State::Waiting | State::Failed(_) => false,
            };
            if other {
                let spread = ROOTS_SPREAD.mul_f64(fastrand::f64());
                // CAs that disagree about their roots must not keep us busy.
                let soonest = now.max(entry.issued + ROOTS_AGE_MIN);
                entry.due = entry.due.min(soonest + spread);
            }
        }
    }
}

struct Entry {
    state: watch::Sender<State>,
    due: Instant,
    /// When the certificate that it has came.
    issued: Instant,
    urgency: Urgency,
    busy: bool,
    failures: u32,
    failed: Option<(Instant, Error)>,
}

impl Entry {
    fn new(urgency: Urgency) -> Self {
        Self {
            state: watch::Sender::new(State::Waiting),
            due: Instant::now(),
            issued: Instant::now(),
            urgency,
            busy: false,
            failures: 0,
            failed: None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// Somebody waits.
    Wanted,
    /// Nobody waits yet.
    Early,
    /// There is one that serves.
    Renewal,
}

enum State {
    Waiting,
    Ready(Arc<Credentials>),
    Failed(Error),
}

enum Look {
    Ready(Arc<Credentials>),
    Failed(Error),
    Wait(watch::Receiver<State>),
}

type Issuing<'a> =
    Pin<Box<dyn Future<Output = (SpiffeId, Result<Credentials, Error>)> + Send + 'a>>;

/// Requests under way; a handful, so each wake polls them all.
struct Running<'a>(Vec<Issuing<'a>>);

impl Running<'_> {
    /// The first that has ended. Pending when there is none.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(SpiffeId, Result<Credentials, Error>)> {
        for (index, issuing) in self.0.iter_mut().enumerate() {
            if let Poll::Ready(end) = issuing.as_mut().poll(cx) {
                drop(self.0.swap_remove(index));
                return Poll::Ready(end);
            }
        }
        Poll::Pending
    }
}

/// Tells those who wait that nobody works for them any more.
struct End<'a>(&'a Store);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut entries = self.0.entries();
        entries.ended = true;
        entries.by_id.clear();
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// Part of the remaining life by which renewal may come later than half of it.
const RENEWAL_JITTER: f64 = 0.05;
/// Not sooner, however short a life is left: a root that is about to expire must not keep us busy.
const RENEWAL_MIN: Duration = Duration::from_secs(5);
/// Over how much time certificates are renewed after the CA's roots changed.
const ROOTS_SPREAD: Duration = Duration::from_secs(10);
/// How old a certificate is before that at least.
const ROOTS_AGE_MIN: Duration = Duration::from_secs(5);
/// The pauses while the CA has not seen a pod yet: it does so moments after we have.
const SOON_MIN: Duration = Duration::from_millis(100);
const SOON_MAX: Duration = Duration::from_secs(10);
/// How often that is tried before those who wait are told.
const SOON_TRIES: u32 = 4;
/// Part of the pause by which an attempt may come earlier or later.
const BACKOFF_JITTER: f64 = 0.2;

#[cfg(test)]
mod tests;
