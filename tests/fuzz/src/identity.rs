//! The room of certificates, as far as it reads a file from outside. Takes the product's own source,
//! gives what the `crl` target needs.

#[path = "../../../ztunnel/src/identity/crl/mod.rs"]
mod crl;

pub use crl::{ListFault, RevocationLists};
