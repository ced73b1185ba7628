//! The closed list of endings. Takes nothing but itself, gives label, level, HTTP status and the
//! text for peers; never carries a detail that a peer should not read.

use std::fmt;

/// How loud an ending is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Lifecycle, successes and refusals.
    Info,
    /// Degraded: the node could not do what it should.
    Warn,
}

/// Why a connection ended. Every connection ends in exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The authority's address is not the pod that was dialled.
    BadDestination,
    /// The CONNECT or its authority is malformed.
    BadRequest,
    /// The certificate of one of the two ends is revoked.
    CertRevoked,
    /// Both sides finished.
    Complete,
    /// A dial was refused or failed.
    ConnectFailed,
    /// A dial got no answer in time.
    ConnectTimedOut,
    /// Its handshake was not done when others waited for its place.
    CrowdedOut,
    /// The process ended before the connection did.
    Drained,
    /// The destination port is one of the proxy's own.
    ForbiddenPort,
    /// The HTTP/2 handshake failed.
    H2Failed,
    /// The HTTP/2 handshake did not finish in time.
    H2TimedOut,
    /// No certificate for the workload's own identity.
    IdentityUnavailable,
    /// Port 15008 of the peer got no answer: often a NetworkPolicy.
    NetworkPolicy,
    /// The service has no endpoint for that port.
    NoEndpoint,
    /// The peer's proxy answered the CONNECT with an error status.
    PeerRefused,
    /// The peer's proxy did not answer the CONNECT in time.
    PeerTimedOut,
    /// The pod left the mesh while the connection was open.
    PodRemoved,
    /// Policy refused it.
    PolicyDenied,
    /// The workload names a policy that this node does not hold.
    PolicyMissing,
    /// Policy allowed it first and refuses it now.
    PolicyRevoked,
    /// Reading or writing failed while bytes were moving.
    RelayFailed,
    /// One of the two ends reset the connection.
    Reset,
    /// The node is out of descriptors or memory for it.
    ResourceExhausted,
    /// It would have come back to the proxy.
    SelfCall,
    /// The TLS handshake failed.
    TlsFailed,
    /// The TLS handshake did not finish in time.
    TlsTimedOut,
    /// The tunnel under the connection died: a reset, a lost peer, unanswered pings.
    TunnelLost,
    /// The control plane has not told this node about its own workload.
    UnknownWorkload,
}

/// Every error of a room that can end a connection knows its reason; the match is total.
pub trait ToReason {
    /// The ending that this error is.
    fn to_reason(&self) -> Reason;
}

impl Reason {
    /// All of them, for counters that exist from the start.
    pub const ALL: [Self; 28] = [
        Self::BadDestination,
        Self::BadRequest,
        Self::CertRevoked,
        Self::Complete,
        Self::ConnectFailed,
        Self::ConnectTimedOut,
        Self::CrowdedOut,
        Self::Drained,
        Self::ForbiddenPort,
        Self::H2Failed,
        Self::H2TimedOut,
        Self::IdentityUnavailable,
        Self::NetworkPolicy,
        Self::NoEndpoint,
        Self::PeerRefused,
        Self::PeerTimedOut,
        Self::PodRemoved,
        Self::PolicyDenied,
        Self::PolicyMissing,
        Self::PolicyRevoked,
        Self::RelayFailed,
        Self::Reset,
        Self::ResourceExhausted,
        Self::SelfCall,
        Self::TlsFailed,
        Self::TlsTimedOut,
        Self::TunnelLost,
        Self::UnknownWorkload,
    ];

    /// The word for our own counters and the access line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadDestination => "bad_destination",
            Self::BadRequest => "bad_request",
            Self::CertRevoked => "cert_revoked",
            Self::Complete => "complete",
            Self::ConnectFailed => "connect_failed",
            Self::ConnectTimedOut => "connect_timed_out",
            Self::CrowdedOut => "crowded_out",
            Self::Drained => "drained",
            Self::ForbiddenPort => "forbidden_port",
            Self::H2Failed => "h2_failed",
            Self::H2TimedOut => "h2_timed_out",
            Self::IdentityUnavailable => "identity_unavailable",
            Self::NetworkPolicy => "network_policy",
            Self::NoEndpoint => "no_endpoint",
            Self::PeerRefused => "peer_refused",
            Self::PeerTimedOut => "peer_timed_out",
            Self::PodRemoved => "pod_removed",
            Self::PolicyDenied => "policy_denied",
            Self::PolicyMissing => "policy_missing",
            Self::PolicyRevoked => "policy_revoked",
            Self::RelayFailed => "relay_failed",
            Self::Reset => "reset",
            Self::ResourceExhausted => "resource_exhausted",
            Self::SelfCall => "self_call",
            Self::TlsFailed => "tls_failed",
            Self::TlsTimedOut => "tls_timed_out",
            Self::TunnelLost => "tunnel_lost",
            Self::UnknownWorkload => "unknown_workload",
        }
    }

    /// The value of the metric label `response_flags`, equal to the established proxy's where the
    /// meaning is equal.
    // PROTOCOL.md#response-flags
    #[must_use]
    pub const fn response_flags(self) -> &'static str {
        match self {
            Self::CertRevoked => "CERT_REVOKED",
            Self::Complete | Self::Reset => "-",
            Self::PolicyDenied | Self::PolicyMissing | Self::PolicyRevoked => "DENY",
            Self::H2Failed | Self::H2TimedOut => "H2_HANDSHAKE_FAILURE",
            Self::IdentityUnavailable => "IDENTITY_ERROR",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::CrowdedOut | Self::TlsFailed | Self::TlsTimedOut => "TLS_FAILURE",
            Self::BadDestination
            | Self::BadRequest
            | Self::ConnectFailed
            | Self::ConnectTimedOut
            | Self::Drained
            | Self::ForbiddenPort
            | Self::NoEndpoint
            | Self::PeerRefused
            | Self::PeerTimedOut
            | Self::PodRemoved
            | Self::RelayFailed
            | Self::ResourceExhausted
            | Self::SelfCall
            | Self::TunnelLost
            | Self::UnknownWorkload => "CONNECT",
        }
    }

    /// The status of the answer to a CONNECT that ends so before its 200.
    // PROTOCOL.md#connect-status
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::Complete => 200,
            Self::BadDestination | Self::BadRequest => 400,
            Self::PolicyDenied | Self::PolicyMissing | Self::PolicyRevoked => 401,
            Self::CertRevoked
            | Self::ConnectFailed
            | Self::ConnectTimedOut
            | Self::CrowdedOut
            | Self::Drained
            | Self::ForbiddenPort
            | Self::H2Failed
            | Self::H2TimedOut
            | Self::IdentityUnavailable
            | Self::NetworkPolicy
            | Self::NoEndpoint
            | Self::PeerRefused
            | Self::PeerTimedOut
            | Self::PodRemoved
            | Self::RelayFailed
            | Self::Reset
            | Self::ResourceExhausted
            | Self::SelfCall
            | Self::TlsFailed
            | Self::TlsTimedOut
            | Self::TunnelLost
            | Self::UnknownWorkload => 503,
        }
    }

    /// How loud the access line is. A peer cannot cause more than a warning.
    #[must_use]
    pub const fn level(self) -> LogLevel {
        match self {
            Self::IdentityUnavailable | Self::PolicyMissing | Self::ResourceExhausted => {
                LogLevel::Warn
            }
            Self::BadDestination
            | Self::BadRequest
            | Self::CertRevoked
            | Self::Complete
            | Self::ConnectFailed
            | Self::ConnectTimedOut
            | Self::CrowdedOut
            | Self::Drained
            | Self::ForbiddenPort
            | Self::H2Failed
            | Self::H2TimedOut
            | Self::NetworkPolicy
            | Self::NoEndpoint
            | Self::PeerRefused
            | Self::PeerTimedOut
            | Self::PodRemoved
            | Self::PolicyDenied
            | Self::PolicyRevoked
            | Self::RelayFailed
            | Self::Reset
            | Self::SelfCall
            | Self::TlsFailed
            | Self::TlsTimedOut
            | Self::TunnelLost
            | Self::UnknownWorkload => LogLevel::Info,
        }
    }

    /// Whether the connection did what its two ends wanted.
    #[must_use]
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Complete | Self::Reset)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_reason_has_a_word_of_its_own_and_a_status() {
        let words: HashSet<_> = Reason::ALL.iter().map(|r| r.as_str()).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert!(
                [200, 400, 401, 503].contains(&reason.http_status()),
                "{reason}"
            );
            assert_eq!(
                reason.is_success(),
                reason.response_flags() == "-",
                "{reason}"
            );
        }
    }

    #[test]
    fn refusals_by_policy_are_401_and_denied() {
        for reason in [
            Reason::PolicyDenied,
            Reason::PolicyMissing,
            Reason::PolicyRevoked,
        ] {
            assert_eq!(
                (reason.http_status(), reason.response_flags()),
                (401, "DENY")
            );
        }
    }
}
