//! The source of certificates that a process was told to use. Takes either, asks it; never both.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::ca::{Issued, Issuer, LocalCa};
use super::csr::RemoteCa;
use super::error::Error;
use crate::model::SpiffeId;

/// Where certificates come from.
#[derive(Debug)]
pub enum Ca {
    /// This process signs them, with the root of now.
    Local(watch::Receiver<Arc<LocalCa>>),
    /// The mesh's CA does.
    Remote(Box<RemoteCa>),
}

impl Issuer for Ca {
    async fn issue(&self, id: &SpiffeId, now: SystemTime, ttl: Duration) -> Result<Issued, Error> {
        match self {
            Self::Local(ca) => {
                let ca = Arc::clone(&ca.borrow());
                ca.issue(id, now, ttl).await
            }
            Self::Remote(ca) => ca.issue(id, now, ttl).await,
        }
    }
}
