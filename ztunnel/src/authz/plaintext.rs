//! The verdict for connections that prove no identity. Takes the policies and a workload, gives
//! whether any such connection could ever be admitted; never admits one itself.

use super::matcher::{self, Answer, Facts};
use super::policies::Policies;
use crate::model::{Action, Workload};

/// What happens to plaintext connections into a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaintextVerdict {
    /// No peer without identity can be admitted, whatever its address and port.
    Drop,
    /// Each connection is judged on its own.
    Proxy,
}

/// Says `Drop` only where [`check`](fn@super::check) refuses every flow without identity.
#[must_use]
pub fn plaintext_verdict(policies: &Policies, workload: &Workload) -> PlaintextVerdict {
    let anybody = Facts::anonymous();
    let mut allows_exist = false;
    let mut one_may_allow = false;
    for policy in policies.speaking_for(workload).filter(|p| !p.dry_run) {
        let answer = matcher::policy(policy, &anybody);
        match policy.action {
            Action::Allow => {
                allows_exist = true;
                one_may_allow |= answer != Answer::No;
            }
            Action::Deny if answer == Answer::Yes => return PlaintextVerdict::Drop,
            Action::Deny => {}
        }
    }
    if policies.missing(workload).is_some() || (allows_exist && !one_may_allow) {
        return PlaintextVerdict::Drop;
    }
    PlaintextVerdict::Proxy
}

#[cfg(test)]
mod tests;
