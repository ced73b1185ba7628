//! The places of connections on a pod's HBONE port whose peer has not proved yet who it is. Takes
//! arrivals, gives each a place; there are few, so that strangers cannot fill the process, and the
//! oldest gives way when another waits; never looks into a connection.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// The places of one pod on one worker. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Handshakes(Rc<Places>);

#[derive(Debug, Default)]
struct Places {
    /// In the order of their arrival.
    taken: RefCell<VecDeque<Rc<Guest>>>,
    freed: Notify,
}

#[derive(Debug)]
struct Guest {
    since: Instant,
    must_go: Cell<bool>,
    told: Notify,
}

/// A place; dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    places: Rc<Places>,
    guest: Rc<Guest>,
}

impl Handshakes {
    /// A place for one connection. If none is free, waits until one is, or until the oldest
    /// connection has had its time and gives way: a peer that speaks needs milliseconds, so it
    /// finds a place however many stay silent. Cancel safe.
    pub async fn enter(&self) -> Place {
        let Self(places) = self;
        while let Some(oldest) = places.oldest_if_full() {
            let patience = oldest.since + SHARE_OF_TIME;
            if timeout_at(patience, places.freed.notified()).await.is_err() {
                places.remove(&oldest);
                oldest.must_go.set(true);
                oldest.told.notify_one();
            }
        }
        let guest = Rc::new(Guest {
            since: Instant::now(),
            must_go: Cell::new(false),
            told: Notify::new(),
        });
        places.taken.borrow_mut().push_back(Rc::clone(&guest));
        Place {
            places: Rc::clone(places),
            guest,
        }
    }
}

impl Place {
    /// Waits until the place is needed for somebody else. Cancel safe.
    pub async fn given_away(&self) {
        while !self.guest.must_go.get() {
            self.guest.told.notified().await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.remove(&self.guest);
    }
}

impl Places {
    fn oldest_if_full(&self) -> Option<Rc<Guest>> {
        let taken = self.taken.borrow();
        let full = taken.len() >= PLACES;
        taken.front().filter(|_| full).map(Rc::clone)
    }

    fn remove(&self, guest: &Rc<Guest>) {
        let mut taken = self.taken.borrow_mut();
        if let Some(at) = taken.iter().position(|each| Rc::ptr_eq(each, guest)) {
            drop(taken.remove(at));
            self.freed.notify_one();
        }
    }
}

/// Handshakes of one pod on one worker at once. One takes a few round trips, so this many pass
/// hundreds a second even from far away; what they hold is some 20 KiB each.
const PLACES: usize = 256;

/// How long a handshake keeps its place when another needs it.
const SHARE_OF_TIME: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    async fn fill(handshakes: &Handshakes) -> VecDeque<Place> {
        let mut places = VecDeque::new();
        for _ in 0..PLACES {
            places.push_back(handshakes.enter().await);
        }
        places
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_gives_way_after_a_while_and_only_to_somebody_who_waits() {
        let handshakes = Handshakes::default();
        let begun = Instant::now();
        let mut places = fill(&handshakes).await;
        tokio::time::sleep(SHARE_OF_TIME / 2).await;
        let late = handshakes.enter().await;
        assert_eq!(begun.elapsed(), SHARE_OF_TIME);
        let oldest = places.pop_front().unwrap();
        oldest.given_away().await;
        for place in &places {
            assert!(!place.guest.must_go.get(), "one place was needed");
        }
        assert!(!late.guest.must_go.get());
        drop(oldest);
        assert_eq!(handshakes.0.taken.borrow().len(), PLACES);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_done_makes_room_at_once() {
        let handshakes = Handshakes::default();
        let mut places = fill(&handshakes).await;
        let begun = Instant::now();
        let done = async {
            tokio::task::yield_now().await;
            drop(places.pop_back());
        };
        let (_late, ()) = tokio::join!(handshakes.enter(), done);
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert!(places.iter().all(|place| !place.guest.must_go.get()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_given_back_while_nobody_waits_is_there_for_the_next() {
        let handshakes = Handshakes::default();
        let mut places = fill(&handshakes).await;
        drop(places.pop_back());
        let begun = Instant::now();
        let _next = handshakes.enter().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
