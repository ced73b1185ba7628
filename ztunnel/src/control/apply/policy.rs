//! An authorization policy from the wire. Takes the control plane's message, gives a checked policy, or the field that
//! is wrong: a condition that cannot be read refuses the whole policy, because without it the policy would mean
//! something else.

use std::sync::Arc;

use ipnet::IpNet;

use super::leaf::{name, net, port};
use super::{Interner, Rejected, refuse};
use crate::model::{
    Action, Clause, Match, Policy, PolicyKey, Rule, Scope, ServiceAccountMatch, StringMatch,
};
use crate::proto::security as wire;
use wire::string_match::MatchType;

// PROTOCOL.md#policy-conversion
pub(super) fn convert(
    interner: &mut Interner,
    from: wire::Authorization,
) -> Result<Policy, Rejected> {
    let scope = match wire::Scope::try_from(from.scope) {
        Ok(wire::Scope::Global) => Scope::Global,
        Ok(wire::Scope::Namespace) => Scope::Namespace,
        Ok(wire::Scope::WorkloadSelector) => Scope::WorkloadSelector,
        Err(_) => return Err(refuse("scope", format!("{} is not known here", from.scope))),
    };
    let action = match wire::Action::try_from(from.action) {
        Ok(wire::Action::Allow) => Action::Allow,
        Ok(wire::Action::Deny) => Action::Deny,
        Err(_) => {
            return Err(refuse(
                "action",
                format!("{} is not known here", from.action),
            ));
        }
    };
    if from.name.contains('/') || from.namespace.contains('/') {
        return Err(refuse("name", "holds a slash"));
    }
    let rules = from
        .rules
        .iter()
        .map(|rule| convert_rule(interner, rule))
        .collect::<Result<_, _>>()?;
    Ok(Policy {
        key: PolicyKey {
            namespace: interner.text(&from.namespace),
            name: interner.text(name("name", &from.name)?),
        },
        scope,
        action,
        dry_run: from.dry_run,
        rules,
    })
}

fn convert_rule(interner: &mut Interner, from: &wire::Rule) -> Result<Rule, Rejected> {
    let mut clauses = Vec::with_capacity(from.clauses.len());
    for clause in &from.clauses {
        let matches = clause
            .matches
            .iter()
            .map(|from| convert_match(interner, from))
            .collect::<Result<_, _>>()?;
        clauses.push(Clause { matches });
    }
    Ok(Rule { clauses })
}

fn convert_match(interner: &mut Interner, from: &wire::Match) -> Result<Match, Rejected> {
    Ok(Match {
        namespaces: strings(interner, "namespaces", &from.namespaces)?,
        not_namespaces: strings(interner, "not_namespaces", &from.not_namespaces)?,
        principals: strings(interner, "principals", &from.principals)?,
        not_principals: strings(interner, "not_principals", &from.not_principals)?,
        service_accounts: accounts(interner, &from.service_accounts),
        not_service_accounts: accounts(interner, &from.not_service_accounts),
        source_ips: nets("source_ips", &from.source_ips)?,
        not_source_ips: nets("not_source_ips", &from.not_source_ips)?,
        destination_ips: nets("destination_ips", &from.destination_ips)?,
        not_destination_ips: nets("not_destination_ips", &from.not_destination_ips)?,
        destination_ports: ports("destination_ports", &from.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &from.not_destination_ports)?,
    })
}

fn strings(
    interner: &mut Interner,
    field: &'static str,
    from: &[wire::StringMatch],
) -> Result<Vec<StringMatch>, Rejected> {
    let mut text = |text: &str| -> Arc<str> { interner.text(text) };
    from.iter()
        .map(|from| match &from.match_type {
            Some(MatchType::Exact(value)) => Ok(StringMatch::Exact(text(value))),
            Some(MatchType::Prefix(value)) => Ok(StringMatch::Prefix(text(value))),
            Some(MatchType::Suffix(value)) => Ok(StringMatch::Suffix(text(value))),
            Some(MatchType::Presence(_)) => Ok(StringMatch::Presence),
            None => Err(refuse(field, "a condition of an unknown kind")),
        })
        .collect()
}

fn accounts(
    interner: &mut Interner,
    from: &[wire::ServiceAccountMatch],
) -> Vec<ServiceAccountMatch> {
    from.iter()
        .map(|from| ServiceAccountMatch {
            namespace: interner.text(&from.namespace),
            service_account: interner.text(&from.service_account),
        })
        .collect()
}

fn nets(field: &'static str, from: &[wire::Address]) -> Result<Vec<IpNet>, Rejected> {
    from.iter()
        .map(|from| net(field, &from.address, from.length))
        .collect()
}

fn ports(field: &'static str, from: &[u32]) -> Result<Vec<u16>, Rejected> {
    from.iter().map(|number| port(field, *number)).collect()
}
