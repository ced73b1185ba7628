//! Certificate chains that this worker has followed to a root before. Takes a chain and, if need be,
//! somebody who follows it; gives the same answer without the arithmetic; never keeps a refusal,
//! never answers for a time outside the validity of any part, never for another set of roots, and
//! never about revocation.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::RangeInclusive;

use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

/// What a chain was followed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// To accept from.
    Client,
    /// To connect to.
    Server,
}

/// A chain as it was shown, and what it was measured by.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Shown {
    /// Which set of roots; another set has another number.
    roots: u64,
    role: Role,
    /// Each certificate after its length.
    chain: Box<[u8]>,
}

impl Shown {
    pub(super) fn new(
        roots: u64,
        role: Role,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Self {
        let mut chain = Vec::new();
        for certificate in std::iter::once(leaf).chain(intermediates) {
            chain.extend(certificate.len().to_be_bytes());
            chain.extend_from_slice(certificate);
        }
        Self {
            roots,
            role,
            chain: chain.into(),
        }
    }

    /// Asks `follow` unless it has said yes to the same before and nothing of it has expired.
    ///
    /// # Errors
    /// The refusal of `follow`.
    pub(super) fn follow<E>(
        self,
        parts: &[CertificateDer<'_>],
        leaf: &CertificateDer<'_>,
        now: UnixTime,
        follow: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let known = FOLLOWED.with_borrow(|followed| {
            let valid = followed.get(&self)?;
            Some(valid.contains(&now.as_secs()))
        });
        if known == Some(true) {
            return Ok(());
        }
        follow()?;
        if let Some(valid) = validity(std::iter::once(leaf).chain(parts)) {
            FOLLOWED.with_borrow_mut(|followed| {
                if followed.len() >= KEPT {
                    followed.clear();
                }
                followed.insert(self, valid);
            });
        }
        Ok(())
    }
}

/// When all of them are valid, in seconds of the epoch; `None` when one cannot be read.
fn validity<'a>(
    chain: impl Iterator<Item = &'a CertificateDer<'a>>,
) -> Option<RangeInclusive<u64>> {
    let (mut begin, mut end) = (0, u64::MAX);
    for certificate in chain {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let validity = certificate.validity();
        begin = begin.max(u64::try_from(validity.not_before.timestamp()).ok()?);
        end = end.min(u64::try_from(validity.not_after.timestamp()).ok()?);
    }
    Some(begin..=end)
}

thread_local! {
    static FOLLOWED: RefCell<HashMap<Shown, RangeInclusive<u64>>> = RefCell::default();
}

/// Chains kept per worker, about 1 KiB each. When they are more, it begins anew.
const KEPT: usize = 512;

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::{Duration, SystemTime};

    use super::super::testing::{Authority, Leaf};
    use super::*;

    fn at(time: SystemTime) -> UnixTime {
        UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap())
    }

    #[test]
    fn a_chain_is_followed_once_for_its_roots_its_role_and_its_time() {
        let usual = Leaf::default();
        let now = usual.not_before + Duration::from_secs(60);
        let issued = Authority::new().leaf(Leaf {
            uris: &["spiffe://cluster.local/ns/shop/sa/bank"],
            not_after: now + Duration::from_secs(60),
            ..usual
        });
        let leaf = &issued.chain[0];
        let asked = Cell::new(0);
        let ask = |roots, role, time: SystemTime, answer: Result<(), ()>| {
            asked.set(0);
            let shown = Shown::new(roots, role, leaf, &[]);
            let given = shown.follow(&[], leaf, at(time), || {
                asked.set(asked.get() + 1);
                answer
            });
            (given, asked.get())
        };
        assert_eq!(ask(1, Role::Server, now, Err(())), (Err(()), 1));
        assert_eq!(
            ask(1, Role::Server, now, Ok(())),
            (Ok(()), 1),
            "no refusal is kept"
        );
        assert_eq!(ask(1, Role::Server, now, Err(())), (Ok(()), 0), "known");
        assert_eq!(
            ask(2, Role::Server, now, Err(())),
            (Err(()), 1),
            "other roots"
        );
        assert_eq!(
            ask(1, Role::Client, now, Err(())),
            (Err(()), 1),
            "another role"
        );
        let late = now + Duration::from_secs(61);
        assert_eq!(ask(1, Role::Server, late, Err(())), (Err(()), 1), "expired");
        let early = now - Duration::from_secs(120);
        assert_eq!(
            ask(1, Role::Server, early, Err(())),
            (Err(()), 1),
            "not yet"
        );
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let usual = Leaf::default();
        let now = at(usual.not_before + Duration::from_secs(60));
        let issued = Authority::new().leaf(usual);
        let leaf = &issued.chain[0];
        for roots in 0..2000 {
            let shown = Shown::new(roots, Role::Client, leaf, &[]);
            shown.follow(&[], leaf, now, || Ok::<_, ()>(())).unwrap();
        }
        assert!(FOLLOWED.with_borrow(HashMap::len) <= KEPT);
    }
}
