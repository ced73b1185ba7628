//! What the streams of one tunnel hold up. Takes what each of them waits for and has not delivered,
//! gives whether another stream would stand behind them; never ends or moves a stream.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

/// The sum over a tunnel. All streams share the connection's window in each direction: a few whose
/// ends do not read use it up, and then no other stream moves.
#[derive(Debug, Default)]
pub(super) struct Load {
    next: Cell<u64>,
    /// Streams with bytes to send and no window for them, and since when.
    waiting: RefCell<HashMap<u64, Instant>>,
    /// Bytes that have come and that no application has taken.
    held: Cell<usize>,
}

impl Load {
    /// Whether new streams should go elsewhere. Standing still for a moment is no sign: everybody
    /// who sends fast does, until the peer's credit comes.
    // PROTOCOL.md#pool
    pub(super) fn is_busy(&self, connection_window_bytes: u32) -> bool {
        let half = usize::try_from(connection_window_bytes / 2).unwrap_or(usize::MAX);
        self.held.get() > half || self.stalled() >= STALLED_STREAMS
    }

    /// Streams that have waited for too long to be merely fast.
    pub(super) fn stalled(&self) -> usize {
        let waiting = self.waiting.borrow();
        let since = waiting.values();
        since.filter(|at| at.elapsed() >= STALL).count()
    }
}

/// The part of one stream; dropping it gives its part back.
#[derive(Debug)]
pub(super) struct Share {
    load: Rc<Load>,
    number: u64,
    waits: Cell<bool>,
    held: Cell<usize>,
}

impl Share {
    pub(super) fn new(load: &Rc<Load>) -> Self {
        let number = load.next.get();
        load.next.set(number.wrapping_add(1));
        Self {
            load: Rc::clone(load),
            number,
            waits: Cell::new(false),
            held: Cell::new(0),
        }
    }

    /// Whether it has bytes for which there is no window.
    pub(super) fn waits(&self, waits: bool) {
        if self.waits.replace(waits) == waits {
            return;
        }
        let mut waiting = self.load.waiting.borrow_mut();
        if waits {
            waiting.insert(self.number, Instant::now());
        } else {
            waiting.remove(&self.number);
        }
    }

    /// Bytes have come.
    pub(super) fn received(&self, bytes: usize) {
        self.held.set(self.held.get().saturating_add(bytes));
        let all = &self.load.held;
        all.set(all.get().saturating_add(bytes));
    }

    /// Bytes have gone on; their credit is given back.
    pub(super) fn delivered(&self, bytes: usize) {
        let bytes = bytes.min(self.held.get());
        self.held.set(self.held.get() - bytes);
        let all = &self.load.held;
        all.set(all.get().saturating_sub(bytes));
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.waits(false);
        self.delivered(self.held.get());
    }
}

/// With the windows that established peers have, each may keep a quarter of the connection's.
const STALLED_STREAMS: usize = 3;
/// Longer than a round trip inside a cluster, and than the pauses of a healthy sender.
const STALL: Duration = Duration::from_millis(100);
