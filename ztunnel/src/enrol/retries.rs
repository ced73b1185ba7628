//! When what failed is tried again. Takes namespaces whose enrolment failed and the time; gives
//! whether one is due. However many fail, trying takes a bounded part of the time, and never the
//! time of who asks for another pod.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::capture::NetnsCookie;

/// The namespaces whose enrolment failed.
#[derive(Debug)]
pub(super) struct Retries {
    failed: BTreeMap<NetnsCookie, Failed>,
    /// No round of attempts begins before.
    next_round: Instant,
}

#[derive(Debug)]
struct Failed {
    due: Instant,
    pause: Duration,
}

/// The attempts of one call.
#[derive(Debug)]
pub(super) struct Round {
    ends: Instant,
}

impl Retries {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            failed: BTreeMap::new(),
            next_round: now,
        }
    }

    /// An attempt failed: the next one comes after a pause that doubles.
    pub(super) fn failed(&mut self, netns: NetnsCookie, now: Instant) {
        let before = self.failed.get(&netns).map(|failed| failed.pause);
        let pause = before.map_or(PAUSE_MIN, |pause| (pause * 2).min(PAUSE_MAX));
        let due = now + pause;
        self.failed.insert(netns, Failed { due, pause });
    }

    /// It is enrolled, or nobody wants it.
    pub(super) fn forget(&mut self, netns: NetnsCookie) {
        self.failed.remove(&netns);
    }

    /// Only these are wanted.
    pub(super) fn keep(&mut self, is_wanted: impl Fn(&NetnsCookie) -> bool) {
        self.failed.retain(|netns, _| is_wanted(netns));
    }

    /// When it may be tried again, for an order in which nobody waits for ever; none before its
    /// first attempt.
    pub(super) fn due(&self, netns: NetnsCookie) -> Option<Instant> {
        self.failed.get(&netns).map(|failed| failed.due)
    }

    /// Begins a round, if it is time for one.
    pub(super) fn begin(&mut self, now: Instant) -> Option<Round> {
        if now < self.next_round {
            return None;
        }
        self.next_round = now + ROUND_EVERY;
        Some(Round {
            ends: now + ROUND_LASTS,
        })
    }

    /// Whether an attempt may be made: a first one at any time, another one in a round that has not
    /// ended.
    pub(super) fn attempt(
        &self,
        netns: NetnsCookie,
        round: Option<&Round>,
        now: Instant,
    ) -> Attempt {
        match (self.failed.get(&netns), round) {
            (None, _) => Attempt::First,
            (Some(failed), Some(round)) if failed.due <= now && now < round.ends => Attempt::Again,
            (Some(_), _) => Attempt::Later,
        }
    }
}

/// Which attempt is to be made now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    First,
    Again,
    Later,
}

const PAUSE_MIN: Duration = Duration::from_secs(1);
// PROTOCOL.md#zds-retry
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// An attempt takes some milliseconds: a round has one at least, and then some.
const ROUND_LASTS: Duration = Duration::from_millis(50);
const ROUND_EVERY: Duration = Duration::from_millis(900);

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: NetnsCookie = NetnsCookie(1);
    const TWO: NetnsCookie = NetnsCookie(2);

    #[test]
    fn what_failed_is_tried_again_after_pauses_that_double_up_to_five_seconds() {
        let mut now = Instant::now();
        let mut retries = Retries::new(now);
        assert_eq!(retries.attempt(ONE, None, now), Attempt::First);
        for seconds in [1, 2, 4, 5, 5] {
            retries.failed(ONE, now);
            let early = now + Duration::from_secs(seconds) - Duration::from_millis(1);
            let round = retries.begin(early).unwrap();
            assert_eq!(retries.attempt(ONE, Some(&round), early), Attempt::Later);
            now += Duration::from_secs(seconds) + ROUND_EVERY;
            let round = retries.begin(now).unwrap();
            assert_eq!(retries.attempt(ONE, Some(&round), now), Attempt::Again);
        }
        retries.forget(ONE);
        assert_eq!(retries.attempt(ONE, None, now), Attempt::First);
        retries.failed(ONE, now);
        retries.keep(|netns| *netns == TWO);
        assert_eq!(retries.attempt(ONE, None, now), Attempt::First);
    }

    #[test]
    fn who_has_waited_longest_is_first_in_a_round_after_those_who_were_never_tried() {
        let start = Instant::now();
        let mut retries = Retries::new(start);
        retries.failed(TWO, start);
        retries.failed(ONE, start + Duration::from_millis(1));
        let mut order = [ONE, TWO, NetnsCookie(3)];
        order.sort_by_key(|netns| retries.due(*netns));
        assert_eq!(order, [NetnsCookie(3), TWO, ONE]);
        retries.failed(TWO, start + Duration::from_secs(1));
        order.sort_by_key(|netns| retries.due(*netns));
        assert_eq!(order, [NetnsCookie(3), ONE, TWO]);
    }

    #[test]
    fn rounds_are_short_and_have_pauses_however_often_somebody_asks() {
        let start = Instant::now();
        let mut retries = Retries::new(start);
        retries.failed(ONE, start);
        let now = start + Duration::from_secs(10);
        let round = retries.begin(now).unwrap();
        assert_eq!(retries.attempt(ONE, Some(&round), now), Attempt::Again);
        let over = now + ROUND_LASTS;
        assert_eq!(retries.attempt(ONE, Some(&round), over), Attempt::Later);
        assert!(retries.begin(over).is_none(), "not at once");
        assert_eq!(retries.attempt(ONE, None, over), Attempt::Later);
        assert_eq!(retries.attempt(TWO, None, over), Attempt::First);
        assert!(retries.begin(now + ROUND_EVERY).is_some());
    }
}
