//! What goes wrong in a tunnel. Takes the causes of this room, gives one enum and its reason; never
//! a text that a peer sees.
#![warn(clippy::wildcard_enum_match_arm)]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::identity;
use crate::model::{Reason, ToReason, UpstreamAddr};

/// Why a tunnel or a stream of it did not come to be, or ended. Cheap to clone: everybody who waits
/// for one tunnel gets the same error.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// A list revokes the certificate of one of the tunnel's two ends.
    #[error("the certificate of one end of the tunnel is revoked")]
    CertRevoked,
    /// The tunnel's TCP connection was refused or failed.
    #[error("connect to {to}")]
    Connect {
        /// The peer.
        to: UpstreamAddr,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The tunnel's TCP connection got no answer.
    #[error("no answer from {to} within {within:?}, a NetworkPolicy may block its HBONE port")]
    ConnectTimedOut {
        /// The peer.
        to: UpstreamAddr,
        /// The time that it had.
        within: Duration,
    },
    /// The connection was ended from this side before it was finished.
    #[error("ended by this node: {0}")]
    Drained(Reason),
    /// The HTTP/2 handshake failed, or the peer broke the protocol.
    #[error("speak HTTP/2 with the peer")]
    H2(#[source] Arc<h2::Error>),
    /// The peer's preface or SETTINGS did not come.
    #[error("no HTTP/2 preface from the peer within {0:?}")]
    H2TimedOut(Duration),
    /// No credentials for our own end.
    #[error("prove who we are")]
    Identity(#[source] Arc<identity::Error>),
    /// The peer takes no streams at all.
    #[error("{0} accepts no streams")]
    NoStreams(UpstreamAddr),
    /// The peer answered the CONNECT with another status than 200.
    #[error("the peer answered with status {0}")]
    PeerRefused(u16),
    /// The peer did not answer the CONNECT.
    #[error("no answer to the CONNECT within {0:?}")]
    PeerTimedOut(Duration),
    /// The peer gave up before it was answered.
    #[error("the peer gave up its CONNECT")]
    PeerWithdrew,
    /// Reading or writing failed.
    #[error("relay bytes")]
    Relay(#[source] Arc<io::Error>),
    /// One of the two ends reset the connection.
    #[error("reset by one of the ends")]
    Reset,
    /// The permit was withdrawn.
    #[error("the permit was withdrawn: {0}")]
    Revoked(Reason),
    /// The TLS handshake failed.
    #[error("TLS handshake")]
    Tls(#[source] Arc<io::Error>),
    /// The TLS handshake did not finish.
    #[error("TLS handshake not finished within {0:?}")]
    TlsTimedOut(Duration),
    /// The tunnel under the stream died.
    #[error("the tunnel was lost")]
    TunnelLost(#[source] Option<Arc<h2::Error>>),
    /// The peer answered no ping.
    #[error("no sign of life from the peer within {0:?}")]
    Unanswered(Duration),
}

impl Error {
    /// Why the TLS handshake failed.
    pub(super) fn tls(error: io::Error) -> Self {
        if identity::is_revocation(&error) {
            Self::CertRevoked
        } else {
            Self::Tls(Arc::new(error))
        }
    }

    /// The error of one stream, told apart by who ended what.
    pub(super) fn stream(error: h2::Error) -> Self {
        if error.is_reset() {
            Self::Reset
        } else {
            Self::TunnelLost(Some(Arc::new(error)))
        }
    }

    /// The error of one socket while bytes move.
    pub(super) fn socket(error: io::Error) -> Self {
        if matches!(
            error.kind(),
            io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset
        ) {
            Self::Reset
        } else {
            Self::Relay(Arc::new(error))
        }
    }
}

impl ToReason for Error {
    fn to_reason(&self) -> Reason {
        match self {
            Self::CertRevoked => Reason::CertRevoked,
            Self::Connect { source, .. } => {
                if source
                    .raw_os_error()
                    .is_some_and(|e| EXHAUSTED.contains(&e))
                {
                    Reason::ResourceExhausted
                } else {
                    Reason::ConnectFailed
                }
            }
            Self::ConnectTimedOut { .. } => Reason::NetworkPolicy,
            Self::Drained(reason) | Self::Revoked(reason) => *reason,
            Self::H2(_) | Self::NoStreams(_) => Reason::H2Failed,
            Self::H2TimedOut(_) => Reason::H2TimedOut,
            Self::Identity(source) => source.to_reason(),
            Self::PeerRefused(_) => Reason::PeerRefused,
            Self::PeerTimedOut(_) => Reason::PeerTimedOut,
            Self::PeerWithdrew | Self::Reset => Reason::Reset,
            Self::Relay(_) => Reason::RelayFailed,
            Self::Tls(_) => Reason::TlsFailed,
            Self::TlsTimedOut(_) => Reason::TlsTimedOut,
            Self::TunnelLost(_) | Self::Unanswered(_) => Reason::TunnelLost,
        }
    }
}

/// What a node that is out of descriptors, ports or memory answers.
const EXHAUSTED: [i32; 5] = [
    libc::EADDRNOTAVAIL,
    libc::EMFILE,
    libc::ENFILE,
    libc::ENOBUFS,
    libc::ENOMEM,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_the_reason_that_operators_know_it_by() {
        let to = UpstreamAddr::new(([10, 0, 0, 9], 15008).into());
        let within = Duration::from_secs(10);
        let io = |kind: io::ErrorKind| Arc::new(io::Error::from(kind));
        let connect = |errno| Error::Connect {
            to,
            source: Arc::new(io::Error::from_raw_os_error(errno)),
        };
        let h2 = || h2::Error::from(h2::Reason::PROTOCOL_ERROR);
        let forgotten = identity::Error::Forgotten(identity::testing::id("cart"));
        for (error, reason) in [
            (Error::CertRevoked, Reason::CertRevoked),
            (connect(libc::ECONNREFUSED), Reason::ConnectFailed),
            (connect(libc::EHOSTUNREACH), Reason::ConnectFailed),
            (connect(libc::EMFILE), Reason::ResourceExhausted),
            (connect(libc::ENFILE), Reason::ResourceExhausted),
            (Error::ConnectTimedOut { to, within }, Reason::NetworkPolicy),
            (Error::Drained(Reason::PodRemoved), Reason::PodRemoved),
            (Error::H2(Arc::new(h2())), Reason::H2Failed),
            (Error::H2TimedOut(within), Reason::H2TimedOut),
            (
                Error::Identity(Arc::new(forgotten)),
                Reason::IdentityUnavailable,
            ),
            (Error::NoStreams(to), Reason::H2Failed),
            (Error::PeerRefused(503), Reason::PeerRefused),
            (Error::PeerTimedOut(within), Reason::PeerTimedOut),
            (Error::PeerWithdrew, Reason::Reset),
            (
                Error::Relay(io(io::ErrorKind::HostUnreachable)),
                Reason::RelayFailed,
            ),
            (Error::Reset, Reason::Reset),
            (Error::Revoked(Reason::PolicyRevoked), Reason::PolicyRevoked),
            (
                Error::Tls(io(io::ErrorKind::InvalidData)),
                Reason::TlsFailed,
            ),
            (Error::TlsTimedOut(within), Reason::TlsTimedOut),
            (Error::TunnelLost(None), Reason::TunnelLost),
            (Error::Unanswered(within), Reason::TunnelLost),
        ] {
            assert_eq!(error.to_reason(), reason, "{error}");
        }
    }

    #[test]
    fn only_an_end_that_a_side_chose_is_a_reset() {
        for (kind, reset) in [
            (io::ErrorKind::ConnectionReset, true),
            (io::ErrorKind::BrokenPipe, true),
            (io::ErrorKind::TimedOut, false),
            (io::ErrorKind::HostUnreachable, false),
        ] {
            let error = Error::socket(kind.into());
            assert_eq!(matches!(error, Error::Reset), reset, "{kind:?}");
        }
        let error = Error::stream(h2::Error::from(h2::Reason::CANCEL));
        assert!(
            matches!(error, Error::TunnelLost(_)),
            "not of the stream: {error}"
        );
    }
}
