//! The judgement. Takes the policies, the workload that a connection goes to and the flow, gives a
//! verdict or a refusal with its explanation; never logs, waits or remembers.

use thiserror::Error;

use super::matcher::{self, Answer, Facts};
use super::policies::Policies;
use crate::model::{Action, Flow, PolicyKey, Reason, ToReason, Workload};

/// Why a connection is admitted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The ALLOW that matched; `None` when no ALLOW speaks for the workload.
    pub allowed_by: Option<PolicyKey>,
    /// What the policies on trial would have done.
    pub dry_run: Vec<DryRun>,
}

/// A refusal that a policy on trial would have caused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DryRun {
    /// This DENY matches.
    Denied(PolicyKey),
    /// All ALLOW policies are on trial, and none matches.
    NoAllow,
}

/// Why a connection is refused. Each variant carries what the policies on trial would have done.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Denied {
    /// A DENY matches.
    #[error("denied by policy {policy}")]
    ByPolicy {
        /// The DENY.
        policy: PolicyKey,
        /// What the policies on trial would have done.
        dry_run: Vec<DryRun>,
    },
    /// ALLOW policies speak for the workload, and none matches.
    #[error("allow policies exist, but none allows this connection")]
    NoAllow {
        /// What the policies on trial would have done.
        dry_run: Vec<DryRun>,
    },
    /// The workload names a policy that is not held here.
    #[error("the workload names policy {policy}, which this node does not hold")]
    PolicyMissing {
        /// The policy that is not held.
        policy: PolicyKey,
        /// What the policies on trial would have done.
        dry_run: Vec<DryRun>,
    },
}

impl Denied {
    /// What the policies on trial would have done.
    #[must_use]
    pub fn dry_run(&self) -> &[DryRun] {
        match self {
            Self::ByPolicy { dry_run, .. }
            | Self::NoAllow { dry_run }
            | Self::PolicyMissing { dry_run, .. } => dry_run,
        }
    }
}

impl ToReason for Denied {
    fn to_reason(&self) -> Reason {
        match self {
            Self::ByPolicy { .. } | Self::NoAllow { .. } => Reason::PolicyDenied,
            Self::PolicyMissing { .. } => Reason::PolicyMissing,
        }
    }
}

/// Judges a flow to a workload: any DENY that matches refuses; then a policy that the workload
/// names but that is not held refuses; then, if any ALLOW exists, one must match.
///
/// # Errors
/// The refusal.
// PROTOCOL.md#policy-evaluation
pub fn check(policies: &Policies, destination: &Workload, flow: &Flow) -> Result<Verdict, Denied> {
    let facts = Facts::of(flow);
    let mut denied_by = None;
    let mut allows = Allows::default();
    let mut allows_on_trial = Allows::default();
    let mut dry_run = Vec::new();
    for policy in policies.speaking_for(destination) {
        match (policy.action, policy.dry_run) {
            (Action::Allow, false) => allows.ask(&policy.key, matcher::policy(policy, &facts)),
            (Action::Allow, true) => {
                allows_on_trial.ask(&policy.key, matcher::policy(policy, &facts));
            }
            // Where a fact is open a DENY counts as matching, an ALLOW does not.
            (Action::Deny, trial) => {
                if matcher::policy(policy, &facts) != Answer::No {
                    if trial {
                        dry_run.push(DryRun::Denied(policy.key.clone()));
                    } else if denied_by.is_none() {
                        denied_by = Some(policy.key.clone());
                    }
                }
            }
        }
    }
    if allows_on_trial.exist && allows_on_trial.matched.is_none() && !allows.exist {
        dry_run.push(DryRun::NoAllow);
    }
    if let Some(policy) = denied_by {
        return Err(Denied::ByPolicy { policy, dry_run });
    }
    if let Some(policy) = policies.missing(destination) {
        return Err(Denied::PolicyMissing {
            policy: policy.clone(),
            dry_run,
        });
    }
    if allows.exist && allows.matched.is_none() {
        return Err(Denied::NoAllow { dry_run });
    }
    Ok(Verdict {
        allowed_by: allows.matched,
        dry_run,
    })
}

/// Whether ALLOW policies exist, and the first that matches.
#[derive(Default)]
struct Allows {
    exist: bool,
    matched: Option<PolicyKey>,
}

impl Allows {
    fn ask(&mut self, key: &PolicyKey, answer: Answer) {
        self.exist = true;
        if self.matched.is_none() && answer == Answer::Yes {
            self.matched = Some(key.clone());
        }
    }
}

#[cfg(test)]
mod tests;
