//! What a name means to a pod. Takes a snapshot, the pod's workload and a name, gives addresses and
//! the name that owns them, or nothing when the mesh has no say in it; pure.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{IpFamilies, NetworkAddr, Service, Workload};
use crate::resolve::{Snapshot, is_visible};
use crate::wire::dns::{Family, Known};

/// How names are looked up on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params {
    /// The domain of the cluster's services, such as `cluster.local`.
    pub cluster_domain: Arc<str>,
    /// Whether IPv6 addresses are given at all.
    pub ipv6: bool,
    /// The namespace that wins among several with a service of one name, after the asker's own.
    pub preferred_namespace: Option<Arc<str>>,
}

/// What the mesh knows of `name`, which is in lower case and has no dot at its end, as this pod sees
/// it. None: another resolver must know. `dice` is for the order of the addresses.
// PROTOCOL.md#dns-search
#[must_use]
pub fn look_up(
    snapshot: &Snapshot,
    params: &Params,
    client: &Workload,
    (name, family): (&str, Family),
    dice: u64,
) -> Option<Known> {
    let (service, canonical) = find(snapshot, params, client, name)?;
    let mut addresses = addresses(snapshot, params, client, (service, family));
    fastrand::Rng::with_seed(dice).shuffle(&mut addresses);
    Some(Known {
        canonical,
        addresses,
    })
}

/// The service that is meant, and the name that its addresses belong to.
fn find<'s>(
    snapshot: &'s Snapshot,
    params: &Params,
    client: &Workload,
    name: &str,
) -> Option<(&'s Arc<Service>, Option<String>)> {
    let best = |host: &str| best(snapshot, params, client, host);
    let direct = std::iter::once(name.to_owned()).chain(expansions(params, client, name));
    let direct = direct.map(|alias| (alias, None));
    let searched = search_domains(params, client);
    let stripped = searched
        .iter()
        .filter_map(|domain| name.strip_suffix(&**domain)?.strip_suffix('.'));
    let stripped = stripped.filter(|name| !name.is_empty()).flat_map(|short| {
        std::iter::once(short.to_owned())
            .chain(expansions(params, client, short))
            .map(move |alias| (alias, Some(short.to_owned())))
    });
    direct.chain(stripped).find_map(|(alias, short)| {
        if let Some(service) = best(&alias) {
            return Some((service, short));
        }
        // A wildcard answers in the name that was asked for.
        wildcards(&alias).find_map(|wildcard| best(&wildcard).map(|service| (service, None)))
    })
}

/// `*.b.c` and `*.c` for `a.b.c`.
fn wildcards(name: &str) -> impl Iterator<Item = String> {
    name.match_indices('.')
        .filter_map(|(at, _)| Some(format!("*{}", name.get(at..)?)))
}

/// The full names that a short one may stand for.
fn expansions(params: &Params, client: &Workload, name: &str) -> Vec<String> {
    let domain = &params.cluster_domain;
    let namespace = &client.namespace;
    match name.split('.').collect::<Vec<_>>()[..] {
        [_] => vec![format!("{name}.{namespace}.svc.{domain}")],
        [_, _] => vec![
            format!("{name}.svc.{domain}"),
            format!("{name}.{namespace}.svc.{domain}"),
        ],
        [_, _, "svc"] => vec![format!("{name}.{domain}"), format!("{name}.svc.{domain}")],
        [_, _, _] => vec![format!("{name}.svc.{domain}")],
        [_, _, _, "svc"] => vec![format!("{name}.{domain}")],
        _ => Vec::new(),
    }
}

/// What a pod's resolver library adds to names.
fn search_domains(params: &Params, client: &Workload) -> [String; 3] {
    let domain = &params.cluster_domain;
    [
        format!("{}.svc.{domain}", client.namespace),
        format!("svc.{domain}"),
        domain.to_string(),
    ]
}

/// The service of exactly this host name that the client means.
// PROTOCOL.md#dns-choice
fn best<'s>(
    snapshot: &'s Snapshot,
    params: &Params,
    client: &Workload,
    host: &str,
) -> Option<&'s Arc<Service>> {
    let rank = |service: &Service| {
        let namespace = &service.key.namespace;
        (
            *namespace == client.namespace,
            service.canonical,
            params.preferred_namespace.as_ref() == Some(namespace),
        )
    };
    let mut best: Option<&Arc<Service>> = None;
    for service in snapshot.services_named(host) {
        let answerable = !service.vips.is_empty() || is_of_cluster(params, host);
        // Among equals the first one stays.
        if answerable
            && is_visible(service, &client.namespace)
            && best.is_none_or(|best| rank(service) > rank(best))
        {
            best = Some(service);
        }
    }
    best
}

/// Names without a VIP are answered from their endpoints, but only those of the cluster: of others
/// the mesh may know a part.
fn is_of_cluster(params: &Params, host: &str) -> bool {
    host.strip_suffix(&*params.cluster_domain)
        .is_some_and(|rest| rest.ends_with(".svc."))
}

// PROTOCOL.md#dns-addresses
fn addresses(
    snapshot: &Snapshot,
    params: &Params,
    client: &Workload,
    (service, family): (&Service, Family),
) -> Vec<IpAddr> {
    let given = match (service.ip_families, family) {
        (Some(IpFamilies::Ipv6Only), Family::V4) | (Some(IpFamilies::Ipv4Only), Family::V6) => {
            false
        }
        (_, Family::V4) => true,
        (_, Family::V6) => params.ipv6,
    };
    if !given {
        return Vec::new();
    }
    let asked_for = |ip: &IpAddr| ip.is_ipv4() == (family == Family::V4);
    if service.vips.is_empty() {
        return snapshot
            .endpoints(&service.key)
            // The same address may be somebody else's there.
            .filter(|endpoint| endpoint.network == client.network)
            .filter_map(|endpoint| {
                let mut ips = endpoint.ips.iter().map(IpAddr::to_canonical);
                ips.find(asked_for)
            })
            .collect();
    }
    let here = |vip: &&NetworkAddr| vip.network == client.network;
    let vips = service.vips.iter().filter(here);
    vips.map(|vip| vip.ip.to_canonical())
        .filter(asked_for)
        .collect()
}

#[cfg(test)]
mod tests;
