//! Ending work in two steps: first nothing new begins, later nothing may go on. Takes the order
//! from whoever stops a pod or the process, gives signals to wait on; never ends anything itself.

use std::pin::Pin;

use thiserror::Error;
use tokio::sync::watch;

use crate::model::{Reason, ToReason};

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    Graceful,
    Forced(Reason),
}

/// The side that orders the end. Dropping it orders nothing.
#[derive(Debug)]
pub struct Trigger(watch::Sender<Phase>);

/// The side that obeys. Cheap to clone; every connection holds one.
#[derive(Clone, Debug)]
pub struct Signal(watch::Receiver<Phase>);

/// A trigger and its signal.
#[must_use]
pub fn channel() -> (Trigger, Signal) {
    let (tx, rx) = watch::channel(Phase::Running);
    (Trigger(tx), Signal(rx))
}

impl Trigger {
    /// Stop accepting; let what is open finish. Does nothing once forced.
    pub fn graceful(&self) {
        self.0.send_if_modified(|phase| {
            let running = *phase == Phase::Running;
            if running {
                *phase = Phase::Graceful;
            }
            running
        });
    }

    /// End everything now, for this reason. The first reason stays.
    pub fn force(&self, reason: Reason) {
        self.0.send_if_modified(|phase| {
            let alive = !matches!(phase, Phase::Forced(_));
            if alive {
                *phase = Phase::Forced(reason);
            }
            alive
        });
    }

    /// Another signal of this trigger.
    #[must_use]
    pub fn signal(&self) -> Signal {
        Signal(self.0.subscribe())
    }

    /// Waits until every signal is dropped: nobody works any more. Cancel safe.
    pub async fn finished(&self) {
        self.0.closed().await;
    }
}

impl Signal {
    /// Waits until nothing new may begin. Never returns if the trigger is gone before. Cancel safe.
    pub async fn graceful(&mut self) {
        if self.0.wait_for(|p| *p != Phase::Running).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until nothing may go on, and says why. Never returns if the trigger is gone before.
    /// Cancel safe.
    pub async fn forced(&mut self) -> Reason {
        loop {
            let phase = *self.0.borrow_and_update();
            if let Phase::Forced(reason) = phase {
                return reason;
            }
            if self.0.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Does `work` unless nothing may go on before it is done; then drops it. In a box, so that what
    /// it needs is given back as soon as it is done. Cancel safe if `work` is.
    pub fn unless_forced<F, T, E>(
        &self,
        work: impl FnOnce() -> F,
    ) -> Pin<Box<impl Future<Output = Result<T, E>>>>
    where
        F: Future<Output = Result<T, E>>,
        E: From<Forced>,
    {
        let mut forced = self.clone();
        Box::pin(async move {
            tokio::select! {
                biased;
                done = work() => done,
                reason = forced.forced() => Err(Forced(reason).into()),
            }
        })
    }

    /// Whether nothing new may begin.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() != Phase::Running
    }
}

/// Nothing may go on, for this reason.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the pod leaves the mesh, or the process ends")]
pub struct Forced(pub Reason);

impl ToReason for Forced {
    fn to_reason(&self) -> Reason {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn graceful_comes_before_forced_and_the_first_reason_stays() {
        let (trigger, mut signal) = channel();
        assert!(!signal.is_draining());
        trigger.graceful();
        signal.graceful().await;
        trigger.force(Reason::Drained);
        trigger.force(Reason::PodRemoved);
        trigger.graceful();
        assert_eq!(signal.forced().await, Reason::Drained);
        signal.graceful().await;
    }

    #[tokio::test]
    async fn work_goes_on_until_it_is_done_or_forced_to_end() {
        let (trigger, signal) = channel();
        let done = signal.unless_forced(|| async { Ok::<_, Forced>(7) });
        assert_eq!(done.await, Ok(7));
        trigger.graceful();
        let mut endless = signal.unless_forced(std::future::pending::<Result<(), Forced>>);
        assert!(futures_poll(&mut endless).is_none());
        trigger.force(Reason::PodRemoved);
        assert_eq!(endless.await, Err(Forced(Reason::PodRemoved)));
    }

    #[tokio::test]
    async fn finished_when_the_last_signal_is_gone() {
        let (trigger, signal) = channel();
        let other = trigger.signal();
        drop(signal);
        let mut finished = Box::pin(trigger.finished());
        assert!(futures_poll(&mut finished).is_none());
        drop(other);
        finished.await;
    }

    fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        match Pin::new(future).poll(&mut cx) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }
}
