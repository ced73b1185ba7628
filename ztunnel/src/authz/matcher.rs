//! The match language. Takes a policy and what is known about a connection, gives whether the
//! policy matches it: yes, no, or unknown where a fact is open; never decides what a match means.

use std::cell::OnceCell;
use std::net::IpAddr;

use crate::model::{Clause, Flow, Match, Policy, Rule, ServiceAccountMatch, SpiffeId, StringMatch};

/// Three-valued truth. The order makes AND the minimum and OR the maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Answer {
    No,
    Unknown,
    Yes,
}

/// What is known about a connection. An open place answers every question about addresses and
/// ports with `Unknown`; with a place, no answer is `Unknown`.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    identity: Option<&'a SpiffeId>,
    place: Option<Place>,
    /// Built when the first principal match asks for it.
    principal: OnceCell<String>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    source: IpAddr,
    destination: IpAddr,
    destination_port: u16,
}

impl<'a> Facts<'a> {
    /// All that is known of this flow.
    pub(super) fn of(flow: &'a Flow) -> Self {
        Self {
            identity: flow.source_identity.as_ref(),
            place: Some(Place {
                source: flow.source.ip(),
                destination: flow.destination.ip(),
                destination_port: flow.destination.port(),
            }),
            principal: OnceCell::new(),
        }
    }

    /// Any peer that proves no identity, from wherever to whichever port.
    pub(super) const fn anonymous() -> Self {
        Self {
            identity: None,
            place: None,
            principal: OnceCell::new(),
        }
    }

    fn namespace(&self, wanted: &StringMatch) -> Answer {
        // PROTOCOL.md#match-namespace
        let namespace = self.identity.map_or("", SpiffeId::namespace);
        text(wanted, namespace)
    }

    fn principal(&self, wanted: &StringMatch) -> Answer {
        // PROTOCOL.md#match-principal
        self.identity.map_or(Answer::No, |id| {
            text(wanted, self.principal.get_or_init(|| id.principal()))
        })
    }

    fn service_account(&self, wanted: &ServiceAccountMatch) -> Answer {
        // PROTOCOL.md#match-service-account
        Answer::from(self.identity.is_some_and(|id| {
            id.namespace() == &*wanted.namespace && id.service_account() == &*wanted.service_account
        }))
    }

    fn place(&self, test: impl Fn(Place) -> bool) -> Answer {
        self.place
            .map_or(Answer::Unknown, |place| Answer::from(test(place)))
    }
}

/// Whether any rule matches; a policy without rules never does.
// PROTOCOL.md#match-empty
pub(super) fn policy(policy: &Policy, facts: &Facts<'_>) -> Answer {
    any(&policy.rules, |rule| rule_matches(rule, facts))
}

impl From<bool> for Answer {
    fn from(truth: bool) -> Self {
        if truth { Self::Yes } else { Self::No }
    }
}

impl std::ops::Not for Answer {
    type Output = Self;

    fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Unknown => Self::Unknown,
            Self::Yes => Self::No,
        }
    }
}

fn rule_matches(rule: &Rule, facts: &Facts<'_>) -> Answer {
    all(&rule.clauses, |clause| clause_matches(clause, facts))
}

fn clause_matches(clause: &Clause, facts: &Facts<'_>) -> Answer {
    if clause.matches.is_empty() {
        return Answer::Yes;
    }
    any(&clause.matches, |wanted| match_matches(wanted, facts))
}

fn match_matches(wanted: &Match, facts: &Facts<'_>) -> Answer {
    if *wanted == Match::default() {
        // PROTOCOL.md#match-empty: an empty match object holds for nobody.
        return Answer::No;
    }
    // A field that is added to the model must not be ignored here.
    let Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        service_accounts,
        not_service_accounts,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
    } = wanted;
    field(namespaces, not_namespaces, |m| facts.namespace(m))
        .min(field(principals, not_principals, |m| facts.principal(m)))
        .min(field(service_accounts, not_service_accounts, |m| {
            facts.service_account(m)
        }))
        .min(field(source_ips, not_source_ips, |net| {
            facts.place(|place| net.contains(&place.source))
        }))
        .min(field(destination_ips, not_destination_ips, |net| {
            facts.place(|place| net.contains(&place.destination))
        }))
        .min(field(destination_ports, not_destination_ports, |port| {
            facts.place(|place| place.destination_port == *port)
        }))
}

/// A field and its negated twin: empty lists restrict nothing.
fn field<T>(wanted: &[T], unwanted: &[T], test: impl Fn(&T) -> Answer) -> Answer {
    let positive = if wanted.is_empty() {
        Answer::Yes
    } else {
        any(wanted, &test)
    };
    positive.min(!any(unwanted, &test))
}

fn text(wanted: &StringMatch, value: &str) -> Answer {
    Answer::from(match wanted {
        StringMatch::Exact(exact) => value == &**exact,
        StringMatch::Prefix(prefix) => value.starts_with(&**prefix),
        StringMatch::Presence => !value.is_empty(),
        StringMatch::Suffix(suffix) => value.ends_with(&**suffix),
    })
}

fn any<T>(items: &[T], test: impl Fn(&T) -> Answer) -> Answer {
    let mut best = Answer::No;
    for item in items {
        best = best.max(test(item));
        if best == Answer::Yes {
            break;
        }
    }
    best
}

fn all<T>(items: &[T], test: impl Fn(&T) -> Answer) -> Answer {
    let mut worst = Answer::Yes;
    for item in items {
        worst = worst.min(test(item));
        if worst == Answer::No {
            break;
        }
    }
    worst
}

#[cfg(test)]
mod tests;
