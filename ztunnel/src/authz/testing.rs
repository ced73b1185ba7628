//! Values for the tests of this room. Takes short texts, gives policies, workloads and flows;
//! never judges.

use std::sync::Arc;

use crate::model::{
    Action, Clause, ClientAddr, Flow, Match, OrigDst, Policy, Rule, Scope, StringMatch, Workload,
    testing,
};

/// An enforced ALLOW without rules.
pub(super) fn policy(key: &str, scope: Scope) -> Arc<Policy> {
    Arc::new(Policy {
        key: key.parse().unwrap(),
        scope,
        action: Action::Allow,
        dry_run: false,
        rules: Vec::new(),
    })
}

/// An enforced policy of global scope with these rules.
pub(super) fn global(key: &str, action: Action, rules: Vec<Rule>) -> Policy {
    Policy {
        key: key.parse().unwrap(),
        scope: Scope::Global,
        action,
        dry_run: false,
        rules,
    }
}

/// A rule of one clause with these alternatives.
pub(super) fn rule(matches: Vec<Match>) -> Rule {
    Rule {
        clauses: vec![Clause { matches }],
    }
}

/// A match on one principal.
pub(super) fn principal(wanted: StringMatch) -> Match {
    Match {
        principals: vec![wanted],
        ..Match::default()
    }
}

/// The match of `STRICT` peer authentication: whoever proves no identity.
pub(super) fn anonymous() -> Match {
    Match {
        not_principals: vec![StringMatch::Presence],
        ..Match::default()
    }
}

/// A workload that names these policies.
pub(super) fn workload(namespace: &str, policies: &[&str]) -> Workload {
    Workload {
        authorization_policies: policies.iter().map(|p| p.parse().unwrap()).collect(),
        ..testing::workload(namespace)
    }
}

/// A flow from 10.1.2.3 to 10.0.0.2:8080; the empty identity is none.
pub(super) fn flow(identity: &str) -> Flow {
    Flow {
        source: ClientAddr::new("10.1.2.3:40000".parse().unwrap()),
        source_identity: (!identity.is_empty()).then(|| identity.parse().unwrap()),
        destination: OrigDst::new("10.0.0.2:8080".parse().unwrap()),
    }
}
