//! A policy in the dump: rules of clauses of matches, each match without its empty fields. Takes one
//! of the model, gives what serde writes; never judges.

use ipnet::IpNet;
use serde::Serialize;

use crate::model::{Action, Match, Policy, Scope, ServiceAccountMatch, StringMatch};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PolicyView<'a> {
    name: &'a str,
    namespace: &'a str,
    scope: &'static str,
    action: &'static str,
    rules: Vec<Vec<Vec<MatchView<'a>>>>,
    dry_run: bool,
}

impl<'a> PolicyView<'a> {
    pub(super) fn of(policy: &'a Policy) -> Self {
        let rules = policy.rules.iter().map(|rule| {
            let clauses = rule.clauses.iter();
            let clauses = clauses.map(|clause| clause.matches.iter().map(MatchView::of).collect());
            clauses.collect()
        });
        Self {
            name: &policy.key.name,
            namespace: &policy.key.namespace,
            scope: match policy.scope {
                Scope::Global => "Global",
                Scope::Namespace => "Namespace",
                Scope::WorkloadSelector => "WorkloadSelector",
            },
            action: match policy.action {
                Action::Allow => "Allow",
                Action::Deny => "Deny",
            },
            rules: rules.collect(),
            dry_run: policy.dry_run,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MatchView<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<TextView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_namespaces: Vec<TextView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    principals: Vec<TextView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_principals: Vec<TextView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    service_accounts: Vec<AccountView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_service_accounts: Vec<AccountView<'a>>,
    #[serde(skip_serializing_if = "<[IpNet]>::is_empty")]
    source_ips: &'a [IpNet],
    #[serde(skip_serializing_if = "<[IpNet]>::is_empty")]
    not_source_ips: &'a [IpNet],
    #[serde(skip_serializing_if = "<[IpNet]>::is_empty")]
    destination_ips: &'a [IpNet],
    #[serde(skip_serializing_if = "<[IpNet]>::is_empty")]
    not_destination_ips: &'a [IpNet],
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    destination_ports: &'a [u16],
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    not_destination_ports: &'a [u16],
}

impl<'a> MatchView<'a> {
    fn of(conditions: &'a Match) -> Self {
        let texts = |texts: &'a [StringMatch]| texts.iter().map(TextView::of).collect();
        let accounts =
            |accounts: &'a [ServiceAccountMatch]| accounts.iter().map(AccountView::of).collect();
        Self {
            namespaces: texts(&conditions.namespaces),
            not_namespaces: texts(&conditions.not_namespaces),
            principals: texts(&conditions.principals),
            not_principals: texts(&conditions.not_principals),
            service_accounts: accounts(&conditions.service_accounts),
            not_service_accounts: accounts(&conditions.not_service_accounts),
            source_ips: &conditions.source_ips,
            not_source_ips: &conditions.not_source_ips,
            destination_ips: &conditions.destination_ips,
            not_destination_ips: &conditions.not_destination_ips,
            destination_ports: &conditions.destination_ports,
            not_destination_ports: &conditions.not_destination_ports,
        }
    }
}

/// The tag is the kind of the condition.
#[derive(Serialize)]
enum TextView<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    Presence([(); 0]),
    Suffix(&'a str),
}

impl<'a> TextView<'a> {
    fn of(text: &'a StringMatch) -> Self {
        match text {
            StringMatch::Exact(text) => Self::Exact(text),
            StringMatch::Prefix(text) => Self::Prefix(text),
            StringMatch::Presence => Self::Presence([]),
            StringMatch::Suffix(text) => Self::Suffix(text),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AccountView<'a> {
    namespace: &'a str,
    service_account: &'a str,
}

impl<'a> AccountView<'a> {
    fn of(account: &'a ServiceAccountMatch) -> Self {
        Self {
            namespace: &account.namespace,
            service_account: &account.service_account,
        }
    }
}
