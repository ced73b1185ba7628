//! Counters. Takes beginnings, bytes and endings from the worker that owns the book, gives their
//! sums; never resets one.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::BuildHasher as _;
#[expect(
    clippy::disallowed_types,
    reason = "a worker's own list of label sets, which only a scrape ever contends for"
)]
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use super::labels::{Labels, View};
use super::ledger::{Known, Learned, Ledger, Opening};
use super::open::OpenConnection;
use super::source::Source;
use super::{page, process};
use crate::model::{Direction, Reason, SecurityPolicy};

/// The books of all workers, and what other rooms count. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Accounts(Arc<Shelf>);

/// One worker's counters. Cheap to clone; clones stay on the worker.
#[derive(Clone, Debug)]
pub struct Book(Arc<Pages>);

/// An accepted socket; counted as open until it is dropped.
#[derive(Debug)]
pub struct Socket {
    book: Book,
    direction: Direction,
}

/// The counters of one label set on one worker.
#[derive(Debug)]
#[repr(align(64))] // no cache line is written by two workers
pub(super) struct Traffic {
    pub(super) labels: Labels,
    pub(super) opened: Count,
    pub(super) received_bytes: Count,
    pub(super) sent_bytes: Count,
    pub(super) closed: PerReason,
    rest: Rest,
}

/// How long a label set has had no connection, as the sweeps see it.
#[derive(Debug, Default)]
struct Rest {
    /// What the last sweep saw in `opened`.
    opened: AtomicU64,
    sweeps: AtomicU64,
}

/// The counters of one direction on one worker, known from the first moment of a connection.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) opened: Count,
    pub(super) closed: PerReason,
    pub(super) by_path: PerPath,
    pub(super) sockets: Count,
}

/// A number that one worker writes and the scrape reads.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

/// One number for each ending, in the order of [`Reason::ALL`].
#[derive(Debug, Default)]
pub(super) struct PerReason([Count; Reason::ALL.len()]);

/// One number for each way that bytes can go, in the order of [`SecurityPolicy::ALL`].
#[derive(Debug, Default)]
pub(super) struct PerPath([Count; SecurityPolicy::ALL.len()]);

#[derive(Debug)]
struct Shelf {
    books: Box<[Book]>,
    sources: Locked<Vec<Box<dyn Source>>>,
}

#[derive(Debug, Default)]
#[repr(align(64))] // no cache line is written by two workers
struct Pages {
    inbound: Tally,
    outbound: Tally,
    hasher: RandomState,
    /// By hash of the label set, so that a look-up copies no text. Label sets come from the
    /// snapshot and from proven identities, so their number is the mesh's.
    traffic: Locked<HashMap<u64, Vec<Arc<Traffic>>>>,
    open: Locked<Open>,
}

/// The connections of a worker that have their labels, numbered as they came.
#[derive(Debug, Default)]
struct Open {
    next: u64,
    known: BTreeMap<u64, Arc<Known>>,
}

impl Accounts {
    /// Books for so many workers; at least one.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self(Arc::new(Shelf {
            books: (0..workers.max(1)).map(|_| Book::new()).collect(),
            sources: Locked::default(),
        }))
    }

    /// The book of a worker. Workers beyond the number of books share: that is slower, not wrong.
    #[must_use]
    pub fn book(&self, worker: usize) -> Book {
        let books = &self.0.books;
        books
            .get(worker % books.len())
            .map_or_else(Book::new, Clone::clone)
    }

    /// Adds rows of another room to every later page.
    pub fn register(&self, source: Box<dyn Source>) {
        self.0.sources.with(|sources| sources.push(source));
    }

    /// The connections that are open now and have their labels. Connections may come and go while the
    /// list is made.
    #[must_use]
    pub fn open_connections(&self) -> Vec<OpenConnection> {
        let mut all = Vec::new();
        for book in &self.0.books {
            let mut after = None;
            loop {
                let some = book.listed_after(after);
                after = some.last().map(|(number, _)| *number);
                if after.is_none() {
                    break;
                }
                all.extend(some.into_iter().map(|(_, known)| OpenConnection(known)));
            }
        }
        all
    }

    /// Forgets the label sets of workloads that do not exist any more, so that the page does not grow
    /// with every workload that ever was. Called from time to time: a set goes when it had no
    /// connection for `RESTS` calls, so that every scraper has seen its last values; if it ever
    /// comes back it begins at 0, like the counters of a process that was started again. `exists`
    /// is asked for a namespace and the name of a workload.
    pub fn forget(&self, exists: impl Fn(&str, &str) -> bool) {
        for book in &self.0.books {
            book.forget(&exists);
        }
    }

    /// The metrics page: OpenMetrics text, ending in `# EOF`.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut families = process::families();
        let mut distributions = Vec::new();
        self.0.sources.with(|sources| {
            families.extend(sources.iter().flat_map(|source| source.families()));
            distributions.extend(sources.iter().flat_map(|source| source.distributions()));
        });
        page::encode(&self.0.books, families, distributions)
    }
}

impl Book {
    fn new() -> Self {
        Self(Arc::default())
    }

    /// Begins a connection's record: the first thing that happens to it.
    #[must_use]
    pub fn open(&self, opening: Opening) -> Ledger {
        self.tally(opening.direction).opened.add(1);
        Ledger::new(self.clone(), opening)
    }

    /// Counts an accepted socket, for as long as the value lives. An HBONE socket carries many
    /// connections or none, so sockets and ledgers are counted apart.
    #[must_use]
    pub fn socket(&self, direction: Direction) -> Socket {
        self.tally(direction).sockets.add(1);
        Socket {
            book: self.clone(),
            direction,
        }
    }

    pub(super) fn tally(&self, direction: Direction) -> &Tally {
        match direction {
            Direction::Inbound => &self.0.inbound,
            Direction::Outbound => &self.0.outbound,
        }
    }

    /// The counters of a label set; made when it is the first of its kind.
    pub(super) fn traffic(&self, direction: Direction, learned: &Learned) -> Arc<Traffic> {
        let view = View::new(direction, learned);
        let hash = self.0.hasher.hash_one(&view);
        self.0.traffic.with(|traffic| {
            let same_hash = traffic.entry(hash).or_default();
            if let Some(known) = same_hash.iter().find(|known| view == known.labels) {
                return Arc::clone(known);
            }
            let new = Arc::new(Traffic::new(view.to_labels()));
            same_hash.push(Arc::clone(&new));
            new
        })
    }

    /// Lists a connection as open; gives its number.
    pub(super) fn list(&self, known: &Arc<Known>) -> u64 {
        self.0.open.with(|open| {
            open.next += 1;
            open.known.insert(open.next, Arc::clone(known));
            open.next
        })
    }

    /// It is open no longer.
    pub(super) fn unlist(&self, number: u64) {
        // Dropped outside of the lock.
        let _known = self.0.open.with(|open| open.known.remove(&number));
    }

    /// Some of the open connections with greater numbers, so few that the worker can wait for it.
    fn listed_after(&self, number: Option<u64>) -> Vec<(u64, Arc<Known>)> {
        let first = number.map_or(0, |number| number.saturating_add(1));
        self.0.open.with(|open| {
            let some = open.known.range(first..).take(LISTED_AT_ONCE);
            some.map(|(number, known)| (*number, Arc::clone(known)))
                .collect()
        })
    }

    fn forget(&self, exists: &dyn Fn(&str, &str) -> bool) {
        // The worker may wait for the lock, so nothing is looked up while it is held.
        let all = self.all_traffic();
        let gone =
            |traffic: &&Arc<Traffic>| traffic.has_rested() && traffic.labels.names_nobody(exists);
        let gone: HashSet<*const Traffic> = all.iter().filter(gone).map(Arc::as_ptr).collect();
        drop(all);
        if gone.is_empty() {
            return;
        }
        self.0.traffic.with(|traffic| {
            traffic.retain(|_, same_hash| {
                // A connection that began meanwhile holds its counters: then they stay.
                same_hash.retain(|each| {
                    !gone.contains(&Arc::as_ptr(each)) || Arc::strong_count(each) > 1
                });
                !same_hash.is_empty()
            });
        });
    }

    /// All counters with labels, as a list that the worker does not wait for.
    pub(super) fn all_traffic(&self) -> Vec<Arc<Traffic>> {
        self.0
            .traffic
            .with(|traffic| traffic.values().flatten().cloned().collect())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.book.tally(self.direction).sockets.take_one();
    }
}

impl Traffic {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            opened: Count::default(),
            received_bytes: Count::default(),
            sent_bytes: Count::default(),
            closed: PerReason::default(),
            rest: Rest::default(),
        }
    }

    /// Whether no connection has used it for long enough; each call is one sweep.
    fn has_rested(&self) -> bool {
        let Rest { opened, sweeps } = &self.rest;
        let now = self.opened.get();
        let open = now > self.closed.get().map(|(_, count)| count).sum::<u64>();
        if open || opened.swap(now, Ordering::Relaxed) != now {
            sweeps.store(0, Ordering::Relaxed);
            return false;
        }
        sweeps.fetch_add(1, Ordering::Relaxed) + 1 >= RESTS
    }
}

impl Count {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn take_one(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl PerReason {
    pub(super) fn add_one(&self, reason: Reason) {
        if let Some((_, count)) = Reason::ALL
            .iter()
            .zip(&self.0)
            .find(|(each, _)| **each == reason)
        {
            count.add(1);
        }
    }

    pub(super) fn get(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.0.iter().map(Count::get))
    }
}

impl PerPath {
    pub(super) fn add_one(&self, path: SecurityPolicy) {
        if let Some((_, count)) = SecurityPolicy::ALL
            .iter()
            .zip(&self.0)
            .find(|(each, _)| **each == path)
        {
            count.add(1);
        }
    }

    pub(super) fn get(&self) -> impl Iterator<Item = (SecurityPolicy, u64)> {
        SecurityPolicy::ALL
            .into_iter()
            .zip(self.0.iter().map(Count::get))
    }
}

/// A few microseconds' worth of copying.
const LISTED_AT_ONCE: usize = 256;

/// A lock that is held for one closure and survives a panic in it.
#[derive(Debug, Default)]
#[expect(
    clippy::disallowed_types,
    reason = "a worker's own list of label sets, which only a scrape ever contends for"
)]
struct Locked<T>(Mutex<T>);

impl<T> Locked<T> {
    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sweeps that a label set must rest through before it is forgotten.
const RESTS: u64 = 15;
