//! Certificates and TLS: takes an identity and a certificate source, gives credentials that TLS
//! can use; never opens a connection and never judges policy.

mod ca;
mod crl;
mod csr;
mod directory;
mod error;
mod followed;
mod revocation;
mod source;
mod store;
#[cfg(test)]
pub(crate) mod testing;
mod tls;
mod verify;

pub use ca::{Issued, Issuer, LocalCa};
pub use crl::{ListFault, RevocationLists};
pub use csr::RemoteCa;
pub use error::{Error, is_revocation};
pub use followed::Role;
pub use revocation::{Revocation, Revocations};
pub use source::Ca;
pub use store::{CertificateState, Clock, Params, Store};
pub use tls::{Credentials, Rules, Versions};
pub use verify::{peer_identities, peer_identity};
