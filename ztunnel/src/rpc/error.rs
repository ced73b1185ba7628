//! What goes wrong between us and the control plane. Takes causes, gives one enum whose texts name the object and,
//! where there is one, what to do; never carries a token.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error as ThisError;

/// Why a call has no answer.
#[derive(Debug, ThisError)]
pub enum Error {
    /// HTTP/2 failed below the call.
    #[error("the connection to the control plane broke")]
    Broken(#[source] h2::Error),
    /// Nobody took the connection.
    #[error("connect to {addr}")]
    Connect {
        /// Where.
        addr: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The answer is not a message of the agreed shape.
    #[error("the control plane's message cannot be read")]
    Decode(#[from] prost::DecodeError),
    /// Not gRPC.
    #[error("the control plane answered with HTTP status {0}, not with gRPC")]
    Http(u16),
    /// The name has no address.
    #[error("look up {host}")]
    Lookup {
        /// The name.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Neither a name nor an address that TLS can verify.
    #[error("{0:?} is no name that a certificate can carry")]
    Name(String),
    /// The server does not follow the protocol.
    #[error("the control plane's answer is no gRPC: {0}")]
    Protocol(&'static str),
    /// A file is not to be had.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What should hold roots holds none.
    #[error(
        "{place} holds no certificate, or one that cannot be read: put the control plane's root there, as PEM"
    )]
    Roots {
        /// The file.
        place: String,
    },
    /// The control plane refused.
    #[error(transparent)]
    Status(Status),
    /// No progress in time.
    #[error("{what}: nothing came for {after:?}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// TLS failed.
    #[error("TLS with {endpoint}")]
    Tls {
        /// With whom.
        endpoint: String,
        /// What TLS said.
        source: io::Error,
    },
    /// There is no token in the file.
    #[error("{} holds no token", path.display())]
    Token {
        /// The file.
        path: PathBuf,
    },
    /// A message is larger than what is taken.
    #[error("a message of {bytes} bytes; at most {limit} are taken")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[error("the control plane answered {code}: {message}{}", code.hint())]
pub struct Status {
    /// The class.
    pub code: Code,
    /// The control plane's own words.
    pub message: String,
}

/// A gRPC status code; those that change what we do have a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u16);

impl Code {
    /// The call was cancelled.
    pub const CANCELLED: Self = Self(1);
    /// Nobody knows.
    pub const UNKNOWN: Self = Self(2);
    /// It took too long.
    pub const DEADLINE_EXCEEDED: Self = Self(4);
    /// We are known, and may not.
    pub const PERMISSION_DENIED: Self = Self(7);
    /// Some limit.
    pub const RESOURCE_EXHAUSTED: Self = Self(8);
    /// Not now.
    pub const UNAVAILABLE: Self = Self(14);
    /// We are not known.
    pub const UNAUTHENTICATED: Self = Self(16);

    const fn hint(self) -> &'static str {
        match self {
            Self::UNAUTHENTICATED | Self::PERMISSION_DENIED => {
                " (the reason stands in the control plane's own log; check the token's audience and age, and the \
                 cluster id)"
            }
            _ => "",
        }
    }

    const fn name(self) -> &'static str {
        match self.0 {
            0 => "OK",
            1 => "CANCELLED",
            2 => "UNKNOWN",
            3 => "INVALID_ARGUMENT",
            4 => "DEADLINE_EXCEEDED",
            5 => "NOT_FOUND",
            6 => "ALREADY_EXISTS",
            7 => "PERMISSION_DENIED",
            8 => "RESOURCE_EXHAUSTED",
            9 => "FAILED_PRECONDITION",
            10 => "ABORTED",
            11 => "OUT_OF_RANGE",
            12 => "UNIMPLEMENTED",
            13 => "INTERNAL",
            14 => "UNAVAILABLE",
            15 => "DATA_LOSS",
            16 => "UNAUTHENTICATED",
            _ => "a status of its own",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
