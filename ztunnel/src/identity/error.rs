//! What goes wrong with certificates. Takes the causes of this room, gives one enum and its
//! reason; never a text that a peer sees.
#![warn(clippy::wildcard_enum_match_arm)]

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::CertificateError;
use thiserror::Error;

use crate::model::{Reason, SpiffeId, ToReason};
use crate::rpc;

/// Why there is no certificate. Cheap to clone: everybody who waits for the same certificate gets
/// the same error.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// The CA certificate is not valid now.
    #[error(
        "{} is expired or not valid yet: check this host's clock, or put a valid certificate and its key there, \
         the same on every node",
        .0.display()
    )]
    CaExpired(PathBuf),
    /// Others can put files into the directory of the CA.
    #[error("{} can be written by group or others (mode {mode:04o}): chmod go-w it, and replace the pair if it may have been exchanged", path.display())]
    CaDirectoryExposed {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The mesh's CA answered without a certificate.
    #[error("the CA's answer for {0} is empty")]
    CaEmpty(SpiffeId),
    /// The mesh's CA answered without its root.
    #[error("the CA's answer for {0} has no root: a leaf and a root are the least")]
    CaNoRoot(SpiffeId),
    /// The mesh's CA refused, or was not reached.
    #[error("the CA gave no certificate for {id}")]
    CaRefused {
        /// Whose certificate.
        id: SpiffeId,
        /// What it said.
        source: Arc<rpc::Error>,
    },
    /// The mesh's CA signed something else than was asked for.
    #[error("the CA was asked for {id} and answered for {}", if named.is_empty() { "nobody" } else { named })]
    CaWrongIdentity {
        /// Whose certificate was asked for.
        id: SpiffeId,
        /// Whose came.
        named: String,
    },
    /// A file of the CA is not what its name says.
    #[error("{} is not a PEM {expected}: restore it, or remove the whole pair to create a new root", path.display())]
    CaGarbage {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
    },
    /// Only one file of the pair is there.
    #[error("{} is there but {} is missing: put both there, or remove both to create a new root", present.display(), missing.display())]
    CaIncomplete {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
    /// A file or the directory of the CA cannot be used.
    #[error("{doing} {}: {remedy}", path.display())]
    CaIo {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// What an operator can do about it.
        remedy: &'static str,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The key can be read by others.
    #[error("{} can be read by group or others (mode {mode:04o}): chmod 600 it, and replace the pair if it may have leaked", path.display())]
    CaKeyExposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Key and certificate are not a pair.
    #[error("{} is not the key of {}: put a matching pair there", key.display(), certificate.display())]
    CaKeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// Another process holds the lock of the directory.
    #[error("{} stays locked by another process that creates a root: end that process", .0.display())]
    CaLocked(PathBuf),
    /// The files of the CA are gone.
    #[error("{} and its key are gone: put them back, or the next start creates a new root", .0.display())]
    CaMissing(PathBuf),
    /// A file or the directory of the CA belongs to somebody else.
    #[error("{} belongs to user {owner}: chown it to root or to the user that runs this process", path.display())]
    CaOwnedByOther {
        /// The file or the directory.
        path: PathBuf,
        /// Its user id.
        owner: u32,
    },
    /// The certificate may not sign others.
    #[error("{} may not sign certificates: it needs CA:TRUE and, if it has a key usage, keyCertSign", .0.display())]
    CaNotAuthority(PathBuf),
    /// A new root could not be made.
    #[error("create the root {}", path.display())]
    CaSign {
        /// The certificate's file.
        path: PathBuf,
        /// What the library said.
        source: Arc<rcgen::Error>,
    },
    /// The pair reads well, but what it signs does not verify.
    #[error("certificates signed by {} do not verify: check its name constraints, path length and signature algorithm", path.display())]
    CaUnusable {
        /// The certificate's file.
        path: PathBuf,
        /// What verification said.
        source: rustls::Error,
    },
    /// A certificate and its key do not make a TLS configuration.
    #[error("use the certificate of {id}")]
    Credentials {
        /// Whose certificate.
        id: SpiffeId,
        /// What TLS said.
        source: rustls::Error,
    },
    /// What the source gave is no longer valid.
    #[error(
        "the new certificate of {0} is already expired: compare the clocks of this host and of the CA"
    )]
    Expired(SpiffeId),
    /// The identity was forgotten, or renewal has ended, while somebody waited.
    #[error("the certificate of {0} is no longer wanted")]
    Forgotten(SpiffeId),
    /// A certificate cannot be read.
    #[error("the certificate of {id} is malformed")]
    Malformed {
        /// Whose certificate.
        id: SpiffeId,
    },
    /// The mesh's CA does not see a pod of that identity on this node, perhaps not yet.
    #[error("the CA does not know a pod of {id} on this node (yet)")]
    NotYetKnown {
        /// Whose certificate.
        id: SpiffeId,
        /// What it said.
        source: Arc<rpc::Error>,
    },
    /// A certificate that begins later than now.
    #[error(
        "the new certificate of {id} is valid only in {early:?}: compare the clock of this host with that of the CA"
    )]
    NotYetValid {
        /// Whose certificate.
        id: SpiffeId,
        /// How far in the future it begins.
        early: Duration,
    },
    /// A revocation list names the certificate, or who signed it.
    #[error("the certificate of {0} is revoked")]
    Revoked(SpiffeId),
    /// The signature could not be made.
    #[error("sign the certificate of {id}")]
    Sign {
        /// Whose certificate.
        id: SpiffeId,
        /// What the library said.
        source: Arc<rcgen::Error>,
    },
    /// The certificate source did not answer in time.
    #[error("no certificate for {id} within {within:?}")]
    TimedOut {
        /// Whose certificate.
        id: SpiffeId,
        /// The time that it had.
        within: Duration,
    },
}

impl ToReason for Error {
    fn to_reason(&self) -> Reason {
        match self {
            Self::CaDirectoryExposed { .. }
            | Self::CaEmpty(_)
            | Self::CaExpired(_)
            | Self::CaGarbage { .. }
            | Self::CaIncomplete { .. }
            | Self::CaIo { .. }
            | Self::CaKeyExposed { .. }
            | Self::CaKeyMismatch { .. }
            | Self::CaLocked(_)
            | Self::CaMissing(_)
            | Self::CaNoRoot(_)
            | Self::CaNotAuthority(_)
            | Self::CaOwnedByOther { .. }
            | Self::CaRefused { .. }
            | Self::CaSign { .. }
            | Self::CaUnusable { .. }
            | Self::CaWrongIdentity { .. }
            | Self::Credentials { .. }
            | Self::Expired(_)
            | Self::Forgotten(_)
            | Self::Malformed { .. }
            | Self::NotYetKnown { .. }
            | Self::NotYetValid { .. }
            | Self::Sign { .. }
            | Self::TimedOut { .. } => Reason::IdentityUnavailable,
            Self::Revoked(_) => Reason::CertRevoked,
        }
    }
}

/// Whether a TLS handshake failed because the peer's certificate is revoked. The TLS adapter gives
/// the library's error inside an I/O error; there is no other way to it.
#[must_use]
pub fn is_revocation(handshake: &io::Error) -> bool {
    let inner = handshake.get_ref();
    let inner = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
    inner == Some(&CertificateError::Revoked.into())
}
