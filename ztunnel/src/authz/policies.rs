//! The policies that a node holds, indexed by whom they speak for. Takes policies, gives those
//! that apply to a workload; never changes once built.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::probes::Probes;
use crate::model::{Policy, PolicyKey, Scope, Workload};

/// An immutable, indexed set of policies.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    by_key: BTreeMap<PolicyKey, Arc<Policy>>,
    by_namespace: HashMap<Arc<str>, Vec<Arc<Policy>>>,
    global: Vec<Arc<Policy>>,
    probes: Arc<Probes>,
}

impl Policies {
    /// Indexes the policies; of two with the same key the later one stays.
    pub fn new(policies: impl IntoIterator<Item = Arc<Policy>>) -> Self {
        let by_key: BTreeMap<_, _> = policies
            .into_iter()
            .map(|policy| (policy.key.clone(), policy))
            .collect();
        let mut by_namespace: HashMap<Arc<str>, Vec<Arc<Policy>>> = HashMap::new();
        let mut global = Vec::new();
        for policy in by_key.values() {
            match policy.scope {
                // PROTOCOL.md#policy-scope: whatever namespace the policy itself lives in.
                Scope::Global => global.push(Arc::clone(policy)),
                Scope::Namespace => by_namespace
                    .entry(Arc::clone(&policy.key.namespace))
                    .or_default()
                    .push(Arc::clone(policy)),
                Scope::WorkloadSelector => {}
            }
        }
        Self {
            by_key,
            by_namespace,
            global,
            probes: Arc::default(),
        }
    }

    /// The same policies with these exemptions from them.
    #[must_use]
    pub fn with_probes(self, probes: Arc<Probes>) -> Self {
        Self { probes, ..self }
    }

    /// The exemptions.
    #[must_use]
    pub fn probes(&self) -> &Arc<Probes> {
        &self.probes
    }

    /// The policy of this key.
    #[must_use]
    pub fn get(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.by_key.get(key)
    }

    /// All policies, ordered by key.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.by_key.values()
    }

    /// The first policy that the workload names and that is not held here.
    #[must_use]
    pub fn missing<'w>(&self, workload: &'w Workload) -> Option<&'w PolicyKey> {
        workload
            .authorization_policies
            .iter()
            .find(|key| !self.by_key.contains_key(*key))
    }

    /// Every policy that speaks for the workload, once.
    // PROTOCOL.md#policy-scope
    pub(super) fn speaking_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = &'a Policy> {
        let of_namespace = self.by_namespace.get(&workload.namespace);
        let named = workload
            .authorization_policies
            .iter()
            .filter_map(|key| self.by_key.get(key))
            .filter(|policy| match policy.scope {
                // It speaks already.
                Scope::Global => false,
                Scope::Namespace => policy.key.namespace != workload.namespace,
                Scope::WorkloadSelector => true,
            });
        of_namespace
            .into_iter()
            .flatten()
            .chain(&self.global)
            .chain(named)
            .map(AsRef::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authz::testing::{policy, workload};

    #[test]
    fn each_scope_speaks_for_its_workloads_and_once() {
        let policies = Policies::new([
            policy("root/everywhere", Scope::Global),
            policy("shop/all-of-shop", Scope::Namespace),
            policy("bank/all-of-bank", Scope::Namespace),
            policy("shop/named", Scope::WorkloadSelector),
            policy("shop/not-named", Scope::WorkloadSelector),
        ]);
        let named = [
            "shop/named",
            "root/everywhere",
            "shop/all-of-shop",
            "bank/all-of-bank",
        ];
        for (namespace, names, want) in [
            ("shop", &[][..], "shop/all-of-shop root/everywhere"),
            ("lone", &[][..], "root/everywhere"),
            (
                "shop",
                &named[..1],
                "shop/all-of-shop root/everywhere shop/named",
            ),
            (
                "shop",
                &named[..],
                "shop/all-of-shop root/everywhere shop/named bank/all-of-bank",
            ),
        ] {
            let workload = workload(namespace, names);
            let keys: Vec<_> = policies
                .speaking_for(&workload)
                .map(|p| p.key.to_string())
                .collect();
            assert_eq!(keys.join(" "), want, "{namespace} {names:?}");
        }
    }

    #[test]
    fn a_named_policy_that_is_not_held_is_missing() {
        let policies = Policies::new([policy("shop/known", Scope::WorkloadSelector)]);
        assert_eq!(policies.missing(&workload("shop", &["shop/known"])), None);
        let lost = workload("shop", &["shop/known", "shop/lost"]);
        assert_eq!(policies.missing(&lost).unwrap().to_string(), "shop/lost");
    }

    #[test]
    fn the_later_of_two_with_one_key_stays() {
        let policies = Policies::new([
            policy("shop/p", Scope::Namespace),
            policy("shop/p", Scope::Global),
        ]);
        assert_eq!(policies.iter().count(), 1);
        assert_eq!(
            policies.speaking_for(&workload("shop", &[])).count(),
            1,
            "the earlier one is not indexed either"
        );
        let key = "shop/p".parse().unwrap();
        assert_eq!(policies.get(&key).unwrap().scope, Scope::Global);
    }
}
