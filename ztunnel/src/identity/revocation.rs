//! Revocation as it is now. Takes lists as they are replaced, gives an answer for a chain and a word
//! when a tunnel's chain is revoked later; never asks the network and never reads a file.

use std::sync::Arc;

use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;

use super::crl::RevocationLists;
use super::followed::Role;
use super::tls::Credentials;

/// The lists of now. Each clone remembers for itself what it has been told; without a source there
/// are none, ever.
#[derive(Clone, Debug, Default)]
pub struct Revocations(Option<watch::Receiver<Arc<RevocationLists>>>);

impl Revocations {
    /// Lists that somebody replaces.
    #[must_use]
    pub fn followed(first: RevocationLists) -> (watch::Sender<Arc<RevocationLists>>, Self) {
        let (replace, lists) = watch::channel(Arc::new(first));
        (replace, Self(Some(lists)))
    }

    /// Waits for lists that this clone has not been told of; for ever if nobody replaces them.
    /// Cancel safe.
    pub async fn changed(&mut self) {
        let changed = match &mut self.0 {
            Some(lists) => lists.changed().await.is_ok(),
            None => false,
        };
        if !changed {
            std::future::pending::<()>().await;
        }
    }

    pub(super) fn lists(&self) -> Option<Arc<RevocationLists>> {
        self.0.as_ref().map(|lists| Arc::clone(&lists.borrow()))
    }
}

/// The two certificates that a tunnel stands on, while it is open.
#[derive(Debug)]
pub struct Revocation(Option<Parties>);

#[derive(Debug)]
struct Parties {
    own: Arc<Credentials>,
    peer: Vec<CertificateDer<'static>>,
    role: Role,
    /// What has expired meanwhile is no other certificate for that.
    since: UnixTime,
}

impl Revocation {
    pub(super) fn new(
        own: &Arc<Credentials>,
        (role, peer): (Role, &[CertificateDer<'_>]),
        since: UnixTime,
    ) -> Self {
        let parties = || Parties {
            own: Arc::clone(own),
            peer: peer.iter().map(|der| der.clone().into_owned()).collect(),
            role,
            since,
        };
        Self(own.revocations().0.is_some().then(parties))
    }

    /// Waits until one of the two is revoked, at once if it is. Cancel safe.
    // PROTOCOL.md#live-revocation
    pub async fn revoked(&self) {
        let Some(parties) = &self.0 else {
            return std::future::pending().await;
        };
        let mut lists = parties.own.revocations().clone();
        loop {
            // Told of these before looking, so that none is missed between the two.
            if let Some(lists) = &mut lists.0 {
                lists.mark_unchanged();
            }
            if parties.are_revoked() {
                return;
            }
            lists.changed().await;
        }
    }
}

impl Parties {
    fn are_revoked(&self) -> bool {
        self.own.is_peer_revoked(self.role, &self.peer, self.since) || self.own.is_revoked()
    }
}

#[cfg(test)]
mod tests;
