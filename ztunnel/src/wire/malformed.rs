//! What can be wrong with a CONNECT and what it becomes. Takes nothing, gives the errors of this room; never keeps
//! more of a peer's bytes than the log line needs.

use thiserror::Error;

use crate::model::{Reason, ToReason};

/// Why bytes are not the value they should be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The host has a character that a host name cannot carry.
    #[error("authority {0:?} has no valid host")]
    AuthorityHost(String),
    /// The authority is missing or has no host.
    #[error("the authority has no host")]
    AuthorityNoHost,
    /// The authority has no port.
    #[error("authority {0:?} has no port")]
    AuthorityNoPort(String),
    /// The port is not a number from 1 to 65535.
    #[error("authority {0:?} has no valid port")]
    AuthorityPort(String),
    /// The authority is longer than any host name and port.
    #[error("the authority is {0} bytes long")]
    AuthorityTooLong(usize),
    /// The method is not CONNECT.
    #[error("the method is {0}, not CONNECT")]
    Method(http::Method),
    /// The identity does not fit into a PROXY header.
    #[error("an identity of {0} bytes does not fit into a PROXY header")]
    ProxyIdentity(usize),
}

impl ToReason for Malformed {
    fn to_reason(&self) -> Reason {
        match self {
            Self::AuthorityHost(_)
            | Self::AuthorityNoHost
            | Self::AuthorityNoPort(_)
            | Self::AuthorityPort(_)
            | Self::AuthorityTooLong(_)
            | Self::Method(_)
            | Self::ProxyIdentity(_) => Reason::BadRequest,
        }
    }
}
