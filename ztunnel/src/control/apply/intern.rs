//! Texts that many resources share, held once. Takes text, gives the one copy of it; forgets what nobody holds any
//! more.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::model::{InvalidSpiffeId, SpiffeId, Workload};

/// Shared texts, names and identities. A mesh has a hundred thousand workloads, but few namespaces, accounts and
/// nodes.
#[derive(Debug, Default)]
pub struct Interner {
    texts: HashSet<Arc<str>>,
    identities: HashMap<Names, SpiffeId>,
    /// How many there may be before those that nobody holds are let go.
    sweep_at: usize,
}

/// A trust domain, a namespace and a service account.
type Names = (Arc<str>, Arc<str>, Arc<str>);

impl Interner {
    pub(super) fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(held) = self.texts.get(text) {
            return Arc::clone(held);
        }
        self.sweep();
        let new: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&new));
        new
    }

    pub(super) fn identity(
        &mut self,
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Option<SpiffeId>, InvalidSpiffeId> {
        let key = (
            self.text(trust_domain),
            self.text(namespace),
            self.text(service_account),
        );
        if let Some(held) = self.identities.get(&key) {
            return Ok(Some(held.clone()));
        }
        let new = Workload::identity_of(trust_domain, namespace, service_account)?;
        if let Some(new) = &new {
            self.identities.insert(key, new.clone());
        }
        Ok(new)
    }

    /// Lets go of what only this holds, when there is twice as much as there was of use the last time.
    fn sweep(&mut self) {
        if self.texts.len() < self.sweep_at.max(SWEEP_FROM) {
            return;
        }
        // An identity holds copies of its own; its key tells whether somebody else still says these names.
        self.identities.retain(|(_, namespace, account), _| {
            Arc::strong_count(namespace) > 2 || Arc::strong_count(account) > 2
        });
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.sweep_at = self.texts.len() * 2;
    }
}

/// Too few to be worth a sweep.
const SWEEP_FROM: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_and_identities_are_one() {
        let mut interner = Interner::default();
        let (a, b) = (interner.text("shop"), interner.text("shop"));
        assert!(Arc::ptr_eq(&a, &b));
        let mut id = || {
            interner
                .identity("cluster.local", "shop", "cart")
                .unwrap()
                .unwrap()
        };
        let (a, b) = (id(), id());
        assert!(std::ptr::eq(a.namespace(), b.namespace()));
    }

    #[test]
    fn what_nobody_holds_is_let_go() {
        let mut interner = Interner::default();
        let kept = interner.text("kept");
        for number in 0..SWEEP_FROM * 4 {
            drop(interner.text(&number.to_string()));
        }
        assert!(
            interner.texts.len() <= SWEEP_FROM + 1,
            "{}",
            interner.texts.len()
        );
        assert!(Arc::ptr_eq(&kept, &interner.text("kept")));
    }
}
