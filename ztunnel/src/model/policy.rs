//! Authorization policies. Takes the control plane's words, already checked, gives the match
//! language as values; never evaluates them.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;

use super::workload::InvalidName;

/// A policy's key: `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    /// The policy's namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl FromStr for PolicyKey {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !name.is_empty() && !name.contains('/') => Ok(Self {
                namespace: namespace.into(),
                name: name.into(),
            }),
            _ => Err(InvalidName(text.to_owned())),
        }
    }
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which workloads a policy speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of the mesh.
    Global,
    /// Those of the policy's namespace.
    Namespace,
    /// Those that name it in their `authorizationPolicies`.
    WorkloadSelector,
}

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Admit; where any ALLOW exists, one must match.
    Allow,
    /// Refuse; wins over every ALLOW.
    Deny,
}

/// A text condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal to.
    Exact(Arc<str>),
    /// Starts with.
    Prefix(Arc<str>),
    /// Not empty.
    Presence,
    /// Ends with.
    Suffix(Arc<str>),
}

/// A namespace and service account, whatever the trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountMatch {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The service account.
    pub service_account: Arc<str>,
}

/// Fields are ANDed, values of a field are ORed, of a `not_` field none may match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Namespace of the source's identity.
    pub namespaces: Vec<StringMatch>,
    /// None of these.
    pub not_namespaces: Vec<StringMatch>,
    /// Identity of the source without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// None of these.
    pub not_principals: Vec<StringMatch>,
    /// Namespace and service account of the source's identity.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// None of these.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Address of the source.
    pub source_ips: Vec<IpNet>,
    /// None of these.
    pub not_source_ips: Vec<IpNet>,
    /// Address of the destination.
    pub destination_ips: Vec<IpNet>,
    /// None of these.
    pub not_destination_ips: Vec<IpNet>,
    /// Target port of the destination.
    pub destination_ports: Vec<u16>,
    /// None of these.
    pub not_destination_ports: Vec<u16>,
}

/// Matches are ORed; a clause without matches is true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    /// The alternatives.
    pub matches: Vec<Match>,
}

/// Clauses are ANDed; a rule without clauses matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// What must all hold.
    pub clauses: Vec<Clause>,
}

/// An authorization policy; its rules are ORed, and one without rules never matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `namespace/name`.
    pub key: PolicyKey,
    /// Which workloads it speaks for.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// Evaluated and logged, never enforced.
    pub dry_run: bool,
    /// The alternatives.
    pub rules: Vec<Rule>,
}
