//! The record of one connection. Takes its beginning, what is learned, its bytes and its end, gives
//! counts and the access line; one ending and one line, whatever happens.

use std::cell::{Cell, OnceCell};
use std::error::Error;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::Span;

use super::access_log;
use super::book::{Book, Traffic};
use crate::model::{
    ClientAddr, Direction, Meter, OrigDst, Reason, SecurityPolicy, Service, SpiffeId, ToReason,
    UpstreamAddr, Workload,
};

/// What is known when a connection begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Which way it goes.
    pub direction: Direction,
    /// Where it comes from.
    pub source: ClientAddr,
    /// Where it means to go.
    pub destination: OrigDst,
    /// The trace that it belongs to.
    pub trace_id: u128,
}

/// What is known when a connection has its route.
#[derive(Clone, Debug)]
pub struct Learned {
    /// The workload that it comes from.
    pub source: Option<Arc<Workload>>,
    /// Who that is.
    pub source_identity: Option<SpiffeId>,
    /// The workload that it goes to.
    pub destination: Option<Arc<Workload>>,
    /// Who that is.
    pub destination_identity: Option<SpiffeId>,
    /// The service that it was meant for.
    pub service: Option<Arc<Service>>,
    /// What is dialled across the network for it, such as port 15008 of the pod.
    pub dst_addr: UpstreamAddr,
    /// What the CONNECT asks for.
    pub hbone_addr: Option<String>,
    /// How the bytes cross the network. Identities are shown only where that proves them.
    pub security: SecurityPolicy,
}

/// One connection's record. It ends by [`Ledger::close`]; dropped before, it ends as
/// [`Reason::Drained`].
#[derive(Debug)]
pub struct Ledger {
    book: Book,
    opening: Opening,
    began: Instant,
    received_bytes: Cell<u64>,
    sent_bytes: Cell<u64>,
    retries: Cell<u32>,
    known: OnceCell<Listed>,
    closed: bool,
}

/// From here the connection has counters of its own.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) opening: Opening,
    pub(super) learned: Learned,
    traffic: Arc<Traffic>,
}

/// What is known, and its place in the book's list of open connections.
#[derive(Debug)]
struct Listed {
    known: Arc<Known>,
    number: u64,
}

impl Learned {
    /// Who the source is, if that is proven.
    pub(super) fn proven_source_identity(&self) -> Option<&SpiffeId> {
        self.source_identity.as_ref().filter(|_| self.is_proof())
    }

    /// Who the destination is, if that is proven.
    pub(super) fn proven_destination_identity(&self) -> Option<&SpiffeId> {
        self.destination_identity
            .as_ref()
            .filter(|_| self.is_proof())
    }

    fn is_proof(&self) -> bool {
        self.security.proves_identity()
    }
}

impl Ledger {
    pub(super) fn new(book: Book, opening: Opening) -> Self {
        Self {
            book,
            opening,
            began: Instant::now(),
            received_bytes: Cell::new(0),
            sent_bytes: Cell::new(0),
            retries: Cell::new(0),
            known: OnceCell::new(),
            closed: false,
        }
    }

    /// The span for what is logged on behalf of this connection. At DEBUG, so that it costs nothing
    /// until somebody debugs.
    #[must_use]
    pub fn span(&self) -> Span {
        let Opening {
            direction,
            source,
            trace_id,
            ..
        } = self.opening;
        let id = format_args!("{trace_id:032x}");
        match direction {
            Direction::Inbound => tracing::debug_span!("inbound", %id, peer = %source),
            Direction::Outbound => tracing::debug_span!("outbound", %id),
        }
    }

    /// Gives the connection its labels: from here it counts in `istio_tcp_*`. What is learned first
    /// stays.
    pub fn learn(&self, learned: Learned) {
        if self.known.get().is_some() {
            return;
        }
        let traffic = self.book.traffic(self.opening.direction, &learned);
        let known = Arc::new(Known {
            opening: self.opening,
            learned,
            traffic,
        });
        let Listed { known, .. } = self.known.get_or_init(|| Listed {
            number: self.book.list(&known),
            known,
        });
        known.traffic.opened.add(1);
        let tally = self.book.tally(self.opening.direction);
        tally.by_path.add_one(known.learned.security);
        access_log::opened(&self.opening, &known.learned);
    }

    /// The trace that the connection belongs to.
    #[must_use]
    pub const fn trace_id(&self) -> u128 {
        self.opening.trace_id
    }

    /// The connection turned out to be from and to somewhere else than it began. Before
    /// [`Ledger::learn`].
    #[must_use]
    pub fn redirected(mut self, source: ClientAddr, destination: OrigDst) -> Self {
        self.opening.source = source;
        self.opening.destination = destination;
        self
    }

    /// Somebody could not be reached, and another one is tried.
    pub fn retried(&self) {
        self.retries.set(self.retries.get().saturating_add(1));
    }

    /// Ends the record with the way the connection ended.
    pub fn ended<E: ToReason + Error>(self, end: Result<(), E>) {
        match end {
            Ok(()) => self.close(Reason::Complete, None),
            Err(error) => self.close(error.to_reason(), Some(&error)),
        }
    }

    /// Ends the record. The error is shown if the reason is a failure.
    pub fn close(mut self, reason: Reason, error: Option<&dyn Error>) {
        self.end(reason, error.map(chain));
    }

    fn end(&mut self, reason: Reason, error: Option<String>) {
        self.closed = true;
        self.book
            .tally(self.opening.direction)
            .closed
            .add_one(reason);
        let ending = access_log::Ending {
            received_bytes: self.received_bytes.get(),
            sent_bytes: self.sent_bytes.get(),
            duration: self.began.elapsed(),
            retries: self.retries.get(),
            reason,
            // Whoever greps for `error` finds every failure.
            error: (!reason.is_success())
                .then(|| error.unwrap_or_else(|| reason.as_str().to_owned())),
        };
        match self.known.get() {
            Some(Listed { known, number }) => {
                self.book.unlist(*number);
                known.traffic.closed.add_one(reason);
                access_log::complete(&self.opening, &known.learned, &ending);
            }
            None => access_log::failed(&self.opening, &ending),
        }
    }
}

impl Meter for Ledger {
    fn received(&self, bytes: u64) {
        self.received_bytes.set(self.received_bytes.get() + bytes);
        if let Some(Listed { known, .. }) = self.known.get() {
            known.traffic.received_bytes.add(bytes);
        }
    }

    fn sent(&self, bytes: u64) {
        self.sent_bytes.set(self.sent_bytes.get() + bytes);
        if let Some(Listed { known, .. }) = self.known.get() {
            known.traffic.sent_bytes.add(bytes);
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        if !self.closed {
            self.end(
                Reason::Drained,
                Some("connection was cut by a drain".to_owned()),
            );
        }
    }
}

/// An error and what caused it, outermost first.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
