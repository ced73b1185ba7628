//! The proof that a connection was admitted. Takes nothing from outside this room: only a
//! judgement mints one; gives the revocation to whoever carries the bytes, and never outlives its
//! place in the registry.

use super::check::{DryRun, Verdict};
use super::live::Registration;
use crate::model::{Flow, PolicyKey, Reason, SpiffeId};

/// The proof that a connection was admitted; dropping it gives it back.
///
/// Nobody else can make one:
///
/// ```compile_fail,E0451
/// let forged = ztunnel::authz::Permit { ..todo!() };
/// ```
#[derive(Debug)]
pub struct Permit {
    registration: Registration,
    verdict: Verdict,
}

/// What a permit was given for.
#[derive(Debug)]
pub(super) enum Subject {
    /// To a workload of this node, judged by policy.
    Inbound(Flow),
    /// From a workload of this node that is enrolled and whose identity we hold.
    Outbound(SpiffeId),
    /// To a workload of this node, to ask it how it is.
    Probe(Flow),
}

impl Permit {
    pub(super) const fn new(registration: Registration, verdict: Verdict) -> Self {
        Self {
            registration,
            verdict,
        }
    }

    /// Waits until the permit is withdrawn, and says why; at once if it already is. Cancel safe.
    pub async fn revoked(&self) -> Reason {
        self.registration.revoked().await
    }

    /// What was judged, for an inbound connection.
    #[must_use]
    pub fn flow(&self) -> Option<&Flow> {
        match self.registration.subject() {
            Subject::Inbound(flow) | Subject::Probe(flow) => Some(flow),
            Subject::Outbound(_) => None,
        }
    }

    /// Whether it was given past the policies, to ask a pod how it is.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        matches!(self.registration.subject(), Subject::Probe(_))
    }

    /// Who is at the source, where that is proven.
    #[must_use]
    pub fn source(&self) -> Option<&SpiffeId> {
        match self.registration.subject() {
            Subject::Inbound(flow) | Subject::Probe(flow) => flow.source_identity.as_ref(),
            Subject::Outbound(source) => Some(source),
        }
    }

    /// The ALLOW that admitted it first; `None` when none was needed.
    #[must_use]
    pub const fn allowed_by(&self) -> Option<&PolicyKey> {
        self.verdict.allowed_by.as_ref()
    }

    /// What the policies on trial would have done when it was admitted.
    #[must_use]
    pub fn dry_run(&self) -> &[DryRun] {
        &self.verdict.dry_run
    }
}
