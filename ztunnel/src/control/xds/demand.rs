//! Names that a connection needs and the state lacks, when only what is used is asked for. Takes names from any thread,
//! gives whether there is such a thing; never asks twice for what was just answered.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tracing::debug;

use crate::proto::discovery::DeltaDiscoveryResponse;

/// Asks the control plane for single names. Clones share the stream.
#[derive(Clone, Debug)]
pub struct Demander(mpsc::Sender<Demand>);

/// A name, and who waits for it.
#[derive(Debug)]
pub(super) struct Demand {
    name: Arc<str>,
    answer: oneshot::Sender<bool>,
}

impl Demander {
    pub(super) fn new() -> (Self, mpsc::Receiver<Demand>) {
        let (send, receive) = mpsc::channel(DEMANDS);
        (Self(send), receive)
    }

    /// Whether the control plane knows this name; what it knows is on its way then. False also if it does not say.
    /// Cancel safe.
    pub async fn ask(&self, name: String) -> bool {
        let (answer, known) = oneshot::channel();
        let demand = Demand {
            name: name.into(),
            answer,
        };
        let ask = async {
            self.0.send(demand).await.ok()?;
            known.await.ok()
        };
        matches!(timeout(PATIENCE, ask).await, Ok(Some(true)))
    }
}

/// What became of the names, over all streams.
#[derive(Debug, Default)]
pub(super) struct Names(HashMap<Arc<str>, State>);

#[derive(Debug)]
enum State {
    /// On its way since then, on a stream that may not answer.
    Asked {
        since: Instant,
        waiting: Vec<oneshot::Sender<bool>>,
    },
    /// It came then. Who asks again does not see it any more, or not yet.
    Known(Instant),
    /// There was no such thing then.
    Unknown(Instant),
}

/// What a demand leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Ask for this name on the stream.
    Ask(Arc<str>),
    /// Nothing: it is answered, or on its way.
    Nothing,
    /// Only another stream would answer.
    Restart,
}

impl Names {
    /// Takes a demand in.
    // PROTOCOL.md#on-demand
    pub(super) fn want(&mut self, demand: Demand, now: Instant) -> Next {
        let Demand { name, answer } = demand;
        self.forget_old(now);
        match self.0.get_mut(&name) {
            Some(State::Known(then)) if now < *then + ON_ITS_WAY => {
                tell(answer, true);
                Next::Nothing
            }
            Some(State::Unknown(then)) if now < *then + UNKNOWN_FOR => {
                tell(answer, false);
                Next::Nothing
            }
            Some(State::Asked { waiting, .. }) => {
                waiting.push(answer);
                Next::Nothing
            }
            Some(state @ (State::Known(_) | State::Unknown(_))) => {
                *state = State::Asked {
                    since: now,
                    waiting: vec![answer],
                };
                Next::Restart
            }
            None => {
                let asked = State::Asked {
                    since: now,
                    waiting: vec![answer],
                };
                self.0.insert(Arc::clone(&name), asked);
                Next::Ask(name)
            }
        }
    }

    /// Keeps the names bounded, whatever pods dial.
    fn forget_old(&mut self, now: Instant) {
        if self.0.len() < NAMES {
            return;
        }
        self.0.retain(|_, state| match state {
            State::Asked { .. } => true,
            State::Known(then) => now < *then + ON_ITS_WAY,
            State::Unknown(then) => now < *then + UNKNOWN_FOR,
        });
    }

    /// Takes in what a response says of the names that were asked for; gives those who wait, and their answer, for when
    /// the response is applied.
    pub(super) fn answered(
        &mut self,
        response: &DeltaDiscoveryResponse,
        now: Instant,
    ) -> Vec<(oneshot::Sender<bool>, bool)> {
        let mut answers = Vec::new();
        for resource in &response.resources {
            for name in resource.aliases.iter().chain([&resource.name]) {
                self.settle(name, State::Known(now), &mut answers);
            }
        }
        for name in &response.removed_resources {
            self.settle(name, State::Unknown(now), &mut answers);
        }
        answers
    }

    fn settle(&mut self, name: &str, to: State, answers: &mut Vec<(oneshot::Sender<bool>, bool)>) {
        let Some(state) = self.0.get_mut(name) else {
            return;
        };
        let known = matches!(to, State::Known(_));
        if let State::Asked { waiting, .. } = std::mem::replace(state, to) {
            answers.extend(waiting.into_iter().map(|answer| (answer, known)));
        }
    }

    /// The names that wait for an answer, for the first request of a stream.
    pub(super) fn open(&mut self, now: Instant) -> Vec<Arc<str>> {
        let mut open = Vec::new();
        self.0.retain(|name, state| {
            let State::Asked { since, waiting } = state else {
                return true;
            };
            waiting.retain(|answer| !answer.is_closed());
            if waiting.is_empty() {
                return false;
            }
            *since = now;
            open.push(Arc::clone(name));
            true
        });
        open
    }

    /// When the oldest question has been open for too long.
    pub(super) fn overdue(&self) -> Option<Instant> {
        let asked = self.0.values().filter_map(|state| match state {
            State::Asked { since, .. } => Some(*since + ANSWER),
            State::Known(_) | State::Unknown(_) => None,
        });
        asked.min()
    }
}

pub(super) fn tell(answer: oneshot::Sender<bool>, known: bool) {
    if answer.send(known).is_err() {
        debug!("nobody waits for the name any more");
    }
}

/// Demands that may wait; whoever comes later waits to ask.
const DEMANDS: usize = 100;
/// How long a connection waits for a name.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a question may stay open before it is asked again on another stream: control planes leave some without any
/// answer, and answer the others in milliseconds.
const ANSWER: Duration = Duration::from_secs(2);
/// How long what came may take to reach the worker that asks.
const ON_ITS_WAY: Duration = Duration::from_secs(1);
/// From how many names on the old ones are forgotten.
const NAMES: usize = 4096;
/// How long "there is no such thing" holds.
const UNKNOWN_FOR: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::discovery::Resource;

    fn demand(name: &str) -> (Demand, oneshot::Receiver<bool>) {
        let (answer, known) = oneshot::channel();
        let name = name.into();
        (Demand { name, answer }, known)
    }

    fn answer(names: &mut Names, known: &[&str], removed: &[&str]) {
        let response = DeltaDiscoveryResponse {
            resources: vec![Resource {
                name: "uid".to_owned(),
                aliases: known.iter().map(|&name| name.to_owned()).collect(),
                ..Resource::default()
            }],
            removed_resources: removed.iter().map(|&name| name.to_owned()).collect(),
            ..DeltaDiscoveryResponse::default()
        };
        for (waiting, known) in names.answered(&response, Instant::now()) {
            tell(waiting, known);
        }
    }

    // B009.
    #[tokio::test(start_paused = true)]
    async fn a_name_is_asked_for_once_and_found_by_its_alias() {
        let mut names = Names::default();
        let ((one, first), (two, second)) = (demand("/10.0.0.1"), demand("/10.0.0.1"));
        assert_eq!(
            names.want(one, Instant::now()),
            Next::Ask("/10.0.0.1".into())
        );
        assert_eq!(names.want(two, Instant::now()), Next::Nothing);
        answer(&mut names, &["/10.0.0.1"], &[]);
        assert!(first.await.unwrap() && second.await.unwrap());
        let (again, known) = demand("/10.0.0.1");
        assert_eq!(names.want(again, Instant::now()), Next::Nothing);
        assert!(known.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_there_is_asked_for_again_later_on_another_stream() {
        let mut names = Names::default();
        let (first, known) = demand("/8.8.8.8");
        assert_eq!(
            names.want(first, Instant::now()),
            Next::Ask("/8.8.8.8".into())
        );
        answer(&mut names, &[], &["/8.8.8.8"]);
        assert!(!known.await.unwrap());
        let (soon, known) = demand("/8.8.8.8");
        assert_eq!(names.want(soon, Instant::now()), Next::Nothing);
        assert!(!known.await.unwrap(), "still the answer of before");
        tokio::time::advance(UNKNOWN_FOR).await;
        let (later, _known) = demand("/8.8.8.8");
        assert_eq!(names.want(later, Instant::now()), Next::Restart);
        assert_eq!(names.open(Instant::now()), ["/8.8.8.8".into()]);
        assert_eq!(names.overdue(), Some(Instant::now() + ANSWER));
    }
}
