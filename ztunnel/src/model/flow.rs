//! A connection as the judging rooms see it: who, to whom, which way. Takes proven facts, gives
//! one value; never guesses a missing one.

use std::fmt;

use super::addr::{ClientAddr, OrigDst};
use super::identity::SpiffeId;

/// Which way a connection crosses the edge of a pod of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Entering the pod; this node reports as destination.
    Inbound,
    /// Leaving the pod; this node reports as source.
    Outbound,
}

impl Direction {
    /// The word of the access line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }

    /// The value of the metric label `reporter`.
    #[must_use]
    pub const fn reporter(self) -> &'static str {
        match self {
            Self::Inbound => "destination",
            Self::Outbound => "source",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How the bytes cross the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SecurityPolicy {
    /// In mutual TLS.
    MutualTls,
    /// Not at all: both ends are pods of this node, which answers for who they are.
    NodeLocal,
    /// In the clear: a process of this node asks a pod how it is.
    Probe,
    /// In the clear, or not known.
    Unknown,
}

impl SecurityPolicy {
    /// The value of the metric label `connection_security_policy`. Between pods of one node it is
    /// that of mutual TLS: the same identities, checked by the same policy; [`Self::path`] tells the
    /// two apart.
    // PROTOCOL.md#node-local
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls | Self::NodeLocal => "mutual_tls",
            Self::Probe | Self::Unknown => "unknown",
        }
    }

    /// The value of our own label `path`.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::MutualTls => "hbone",
            Self::NodeLocal => "node_local",
            Self::Probe => "probe",
            Self::Unknown => "plaintext",
        }
    }

    /// Whether the identities of both ends are beyond doubt.
    #[must_use]
    pub const fn proves_identity(self) -> bool {
        match self {
            Self::MutualTls | Self::NodeLocal => true,
            Self::Probe | Self::Unknown => false,
        }
    }

    /// All of them, for counters that exist from the start.
    pub const ALL: [Self; 4] = [Self::MutualTls, Self::NodeLocal, Self::Probe, Self::Unknown];
}

/// What policy is judged on: addresses, and the identity that TLS proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Where the connection comes from.
    pub source: ClientAddr,
    /// Who it is from; only what mutual TLS proved.
    pub source_identity: Option<SpiffeId>,
    /// The application's address and target port.
    pub destination: OrigDst,
}

/// Counts a connection's bytes while they move; the tunnel's only view of accounting.
pub trait Meter {
    /// Bytes taken from the side that opened the connection.
    fn received(&self, bytes: u64);
    /// Bytes given back to the side that opened the connection.
    fn sent(&self, bytes: u64);
}
