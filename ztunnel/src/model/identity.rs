//! SPIFFE identities. Takes a URI or its parts, gives an identity whose every part is non-empty,
//! or no value; never decides whom to trust.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// The domain whose roots vouch for an identity, such as `cluster.local`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// The identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
///
/// Cloning copies pointers, not text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

/// Why a text or its parts are not an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidSpiffeId {
    /// A part holds `/` or a byte outside visible ASCII.
    #[error("{0} has a character that a SPIFFE ID cannot carry")]
    Character(&'static str),
    /// A part is empty.
    #[error("{0} is empty")]
    Empty(&'static str),
    /// It is not `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form,
}

impl TrustDomain {
    /// Takes a non-empty name without `/`.
    ///
    /// # Errors
    /// When the name is empty or holds a character that a SPIFFE ID cannot carry.
    pub fn new(name: &str) -> Result<Self, InvalidSpiffeId> {
        part("trust domain", name).map(Self)
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SpiffeId {
    /// Joins the three parts.
    ///
    /// # Errors
    /// When a part is empty or holds a character that a SPIFFE ID cannot carry.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidSpiffeId> {
        Ok(Self {
            trust_domain,
            namespace: part("namespace", namespace)?,
            service_account: part("service account", service_account)?,
        })
    }

    /// The trust domain.
    #[must_use]
    pub const fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.service_account
    }

    /// The identity without its scheme, as policies and metric labels write it.
    #[must_use]
    pub fn principal(&self) -> String {
        format!(
            "{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let path = uri.strip_prefix("spiffe://").ok_or(InvalidSpiffeId::Form)?;
        let mut parts = path.split('/');
        let (Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return Err(InvalidSpiffeId::Form);
        };
        Self::new(TrustDomain::new(trust_domain)?, namespace, account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

fn part(name: &'static str, text: &str) -> Result<Arc<str>, InvalidSpiffeId> {
    if text.is_empty() {
        return Err(InvalidSpiffeId::Empty(name));
    }
    if !text.bytes().all(|b| b.is_ascii_graphic() && b != b'/') {
        return Err(InvalidSpiffeId::Character(name));
    }
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spiffe_id_survives_display_and_parse() {
        let uri = "spiffe://cluster.local/ns/shop/sa/cart";
        let id: SpiffeId = uri.parse().unwrap();
        assert_eq!(id.to_string(), uri);
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/cart");
        assert_eq!((id.namespace(), id.service_account()), ("shop", "cart"));
    }

    #[test]
    fn incomplete_or_odd_uris_are_no_identity() {
        for (uri, why) in [
            ("", InvalidSpiffeId::Form),
            ("https://td/ns/a/sa/b", InvalidSpiffeId::Form),
            ("spiffe://td/ns/a/sa", InvalidSpiffeId::Form),
            ("spiffe://td/ns/a/sa/b/c", InvalidSpiffeId::Form),
            ("spiffe://td/sa/a/ns/b", InvalidSpiffeId::Form),
            (
                "spiffe:///ns/a/sa/b",
                InvalidSpiffeId::Empty("trust domain"),
            ),
            ("spiffe://td/ns//sa/b", InvalidSpiffeId::Empty("namespace")),
            (
                "spiffe://td/ns/a/sa/",
                InvalidSpiffeId::Empty("service account"),
            ),
            (
                "spiffe://td/ns/a b/sa/c",
                InvalidSpiffeId::Character("namespace"),
            ),
            (
                "spiffe://td/ns/ä/sa/c",
                InvalidSpiffeId::Character("namespace"),
            ),
        ] {
            assert_eq!(uri.parse::<SpiffeId>().unwrap_err(), why, "{uri}");
        }
    }
}
