//! What the stream counts of itself. Takes events, gives numbers for the metrics page; never resets one.

use std::sync::atomic::{AtomicU64, Ordering};

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The control plane closed it in order.
    Complete,
    /// It was never opened.
    ConnectionError,
    /// The control plane refused it.
    Error,
    /// The connection went away.
    Reconnect,
}

impl Ended {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Complete,
        Self::ConnectionError,
        Self::Error,
        Self::Reconnect,
    ];

    /// As the metrics page says it.
    // PROTOCOL.md#xds-metrics
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Complete => "Complete",
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
        }
    }
}

/// Counters of one type of resource.
#[derive(Debug, Default)]
pub(super) struct OfType {
    messages: AtomicU64,
    bytes: AtomicU64,
    rejected: AtomicU64,
}

/// Counters of the stream.
#[derive(Debug, Default)]
pub struct Counts {
    complete: AtomicU64,
    connection_error: AtomicU64,
    error: AtomicU64,
    reconnect: AtomicU64,
    connected: AtomicU64,
    addresses: OfType,
    authorizations: OfType,
}

impl Counts {
    pub(super) fn ended(&self, how: Ended) {
        self.of(how).fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn connected(&self, now: bool) {
        self.connected.store(now.into(), Ordering::Relaxed);
    }

    pub(super) const fn addresses(&self) -> &OfType {
        &self.addresses
    }

    pub(super) const fn authorizations(&self) -> &OfType {
        &self.authorizations
    }

    const fn of(&self, how: Ended) -> &AtomicU64 {
        match how {
            Ended::Complete => &self.complete,
            Ended::ConnectionError => &self.connection_error,
            Ended::Error => &self.error,
            Ended::Reconnect => &self.reconnect,
        }
    }

    /// How many streams ended so.
    #[must_use]
    pub fn terminations(&self, how: Ended) -> u64 {
        self.of(how).load(Ordering::Relaxed)
    }

    /// 1 while a stream is open.
    #[must_use]
    pub fn is_connected(&self) -> u64 {
        self.connected.load(Ordering::Relaxed)
    }

    /// Type, and its responses, payload bytes and refused resources.
    #[must_use]
    pub fn by_type(&self) -> [(&'static str, [u64; 3]); 2] {
        let read = |of: &OfType| {
            [&of.messages, &of.bytes, &of.rejected].map(|number| number.load(Ordering::Relaxed))
        };
        [
            (super::session::ADDRESS, read(&self.addresses)),
            (super::session::AUTHORIZATION, read(&self.authorizations)),
        ]
    }
}

impl OfType {
    pub(super) fn response(&self, bytes: usize, rejected: usize) {
        let wide = |number| u64::try_from(number).unwrap_or(u64::MAX);
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(wide(bytes), Ordering::Relaxed);
        self.rejected.fetch_add(wide(rejected), Ordering::Relaxed);
    }
}
