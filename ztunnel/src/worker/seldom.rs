//! A warning that must not fill the log. Takes its occasions, gives leave for the first of a while and
//! says how many had none since; never loses count.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// The occasions of one kind of warning.
#[derive(Debug, Default)]
pub(super) struct Seldom {
    last: Cell<Option<Instant>>,
    missed: Cell<u64>,
}

impl Seldom {
    /// How many occasions passed in silence before this one, if this one is to be told.
    pub(super) fn tell(&self) -> Option<u64> {
        let due = self.last.get().is_none_or(|last| last.elapsed() >= EVERY);
        if !due {
            self.missed.set(self.missed.get() + 1);
            return None;
        }
        self.last.set(Some(Instant::now()));
        Some(self.missed.take())
    }
}

const EVERY: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_is_told_at_once_and_the_next_with_those_between() {
        let seldom = Seldom::default();
        assert_eq!(seldom.tell(), Some(0));
        for _ in 0..7 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(seldom.tell(), None);
        }
        tokio::time::sleep(EVERY).await;
        assert_eq!(seldom.tell(), Some(7));
        assert_eq!(seldom.tell(), None);
    }
}
