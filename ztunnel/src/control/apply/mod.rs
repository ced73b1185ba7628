//! The control plane's resources as changes. Takes what came in a response, gives values of the model, or why one of
//! them is none; never applies a part of a resource, and never looks at what is held.

mod intern;
mod leaf;
mod policy;
mod service;
mod workload;

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use thiserror::Error;

pub use intern::Interner;

use crate::model::{Policy, Service, Workload};
use crate::proto::workload::address::Type;
use crate::proto::{security, workload as wire};

/// One thing that is different from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// There is no workload of this UID, or no service of this name, any more.
    AddressGone(Arc<str>),
    /// This policy is new, or replaces the one of its key.
    Policy(Arc<Policy>),
    /// There is no policy of this name any more.
    PolicyGone(Arc<str>),
    /// This service is new, or replaces the one of its key.
    Service(Arc<Service>),
    /// This workload is new, or replaces the one of its UID.
    Workload(Arc<Workload>),
}

/// Why a resource is refused. Nothing of it is applied; what was held under its name stays.
#[derive(Debug, Error)]
pub enum Rejected {
    /// It is no message of its type.
    #[error("cannot be read: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A field holds what it must not.
    #[error("{field}: {reason}")]
    Field {
        /// The field, as the protocol names it.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing is in it.
    #[error("holds no resource")]
    Nothing,
}

/// A workload or a service.
///
/// # Errors
/// What is wrong with it.
pub fn address(interner: &mut Interner, resource: Option<Bytes>) -> Result<Change, Rejected> {
    let address = wire::Address::decode(resource.ok_or(Rejected::Nothing)?)?;
    match address.r#type {
        Some(Type::Workload(from)) => {
            let workload = workload::convert(interner, from)?;
            Ok(Change::Workload(Arc::new(workload)))
        }
        Some(Type::Service(from)) => {
            let service = service::convert(interner, from)?;
            Ok(Change::Service(Arc::new(service)))
        }
        None => Err(Rejected::Nothing),
    }
}

/// An authorization policy.
///
/// # Errors
/// What is wrong with it.
pub fn authorization(interner: &mut Interner, resource: Option<Bytes>) -> Result<Change, Rejected> {
    let from = security::Authorization::decode(resource.ok_or(Rejected::Nothing)?)?;
    let policy = policy::convert(interner, from)?;
    Ok(Change::Policy(Arc::new(policy)))
}

fn refuse(field: &'static str, reason: impl Into<String>) -> Rejected {
    Rejected::Field {
        field,
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests;
