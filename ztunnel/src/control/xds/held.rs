//! What the control plane has told, by name and version, so that the next stream goes on where this one ended. Takes
//! names as they come and go, gives the first requests of a stream; never holds a resource itself.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use prost::Message as _;

use super::session::{ADDRESS, AUTHORIZATION};
use crate::model::{PolicyKey, Workload};
use crate::proto::discovery::{DeltaDiscoveryRequest, Node};
use crate::rpc::{Code, Error};

/// A type of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Address,
    Authorization,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    pub(super) fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == type_url)
    }

    pub(super) const fn url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS,
            Self::Authorization => AUTHORIZATION,
        }
    }
}

/// Names and versions of one type.
#[derive(Debug, Default)]
struct Names {
    versions: HashMap<Arc<str>, Box<str>>,
    /// A response was accepted, ever.
    accepted: bool,
    /// The size of the last first request.
    asked_bytes: usize,
}

/// Everything that is held of the control plane.
#[derive(Debug)]
pub(super) struct Held {
    addresses: Names,
    authorizations: Names,
    policies: HashSet<PolicyKey>,
    /// The largest request that the control plane takes, as far as we know.
    limit_bytes: usize,
    told_complete: bool,
}

impl Default for Held {
    fn default() -> Self {
        Self {
            addresses: Names::default(),
            authorizations: Names::default(),
            policies: HashSet::new(),
            limit_bytes: REQUEST_BYTES,
            told_complete: false,
        }
    }
}

impl Held {
    /// The first request of a type, and whether its answer will be everything there is.
    // PROTOCOL.md#xds-resume
    pub(super) fn ask(
        &mut self,
        kind: Kind,
        node: Node,
        on_demand: bool,
    ) -> (DeltaDiscoveryRequest, bool) {
        let limit_bytes = self.limit_bytes;
        let names = self.names(kind);
        let mut request = DeltaDiscoveryRequest {
            node: Some(node),
            type_url: kind.url().to_owned(),
            initial_resource_versions: names
                .versions
                .iter()
                .map(|(name, version)| (name.to_string(), version.to_string()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        };
        if on_demand && kind == Kind::Address {
            // "Nothing yet": a subscription that is empty would mean everything.
            request.resource_names_subscribe = vec!["*".to_owned()];
            request.resource_names_unsubscribe = vec!["*".to_owned()];
        }
        names.asked_bytes = request.encoded_len();
        if names.asked_bytes <= limit_bytes {
            return (request, false);
        }
        request.initial_resource_versions.clear();
        (request, true)
    }

    /// Whether the control plane refused a request for its size. Then the next one is smaller.
    pub(super) fn answer_too_large(&mut self, error: &Error) -> bool {
        let Error::Status(status) = error else {
            return false;
        };
        if status.code != Code::RESOURCE_EXHAUSTED || !status.message.contains("larger than max") {
            return false;
        }
        let asked = self
            .addresses
            .asked_bytes
            .max(self.authorizations.asked_bytes);
        self.limit_bytes = self.limit_bytes.min(asked.saturating_sub(1));
        true
    }

    pub(super) fn accept(&mut self, kind: Kind) {
        self.names(kind).accepted = true;
    }

    /// True once: when each type has had an accepted response.
    // PROTOCOL.md#xds-complete
    pub(super) const fn became_complete(&mut self) -> bool {
        let complete = self.addresses.accepted && self.authorizations.accepted;
        let news = complete && !self.told_complete;
        self.told_complete = complete;
        news
    }

    pub(super) fn hold(&mut self, kind: Kind, name: Arc<str>, version: String) {
        self.names(kind).versions.insert(name, version.into());
    }

    pub(super) fn drop(&mut self, kind: Kind, name: &str) {
        self.names(kind).versions.remove(name);
    }

    /// The names of this type that are not among these.
    pub(super) fn others(&mut self, kind: Kind, present: &HashSet<&str>) -> Vec<Arc<str>> {
        let held = self.names(kind).versions.keys();
        held.filter(|name| !present.contains(&***name))
            .map(Arc::clone)
            .collect()
    }

    pub(super) fn policy(&mut self, key: PolicyKey) {
        self.policies.insert(key);
    }

    pub(super) fn no_policy(&mut self, name: &str) {
        if let Ok(key) = name.parse::<PolicyKey>() {
            self.policies.remove(&key);
        }
    }

    /// Whether the workload names a policy that has not come.
    pub(super) fn lacks_policy_of(&self, workload: &Workload) -> bool {
        let mut named = workload.authorization_policies.iter();
        named.any(|key| !self.policies.contains(key))
    }

    const fn names(&mut self, kind: Kind) -> &mut Names {
        match kind {
            Kind::Address => &mut self.addresses,
            Kind::Authorization => &mut self.authorizations,
        }
    }
}

/// What a control plane takes in one message, with some room.
// PROTOCOL.md#xds-request-limit
const REQUEST_BYTES: usize = (4 << 20) - (64 << 10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::Status;

    fn ask(held: &mut Held, on_demand: bool) -> (DeltaDiscoveryRequest, bool) {
        held.ask(Kind::Address, Node::default(), on_demand)
    }

    // B007, B008.
    #[test]
    fn everything_is_asked_for_by_asking_for_nothing_in_particular() {
        let mut held = Held::default();
        let (all, full) = ask(&mut held, false);
        assert!(all.resource_names_subscribe.is_empty() && !full);
        let (none, _) = ask(&mut held, true);
        assert_eq!(none.resource_names_subscribe, ["*"]);
        assert_eq!(none.resource_names_unsubscribe, ["*"]);
        let (policies, _) = held.ask(Kind::Authorization, Node::default(), true);
        assert!(
            policies.resource_names_subscribe.is_empty(),
            "always everything"
        );
    }

    // B015.
    #[test]
    fn the_next_stream_names_what_is_held() {
        let mut held = Held::default();
        held.hold(Kind::Address, "a".into(), "1".into());
        held.hold(Kind::Address, "b".into(), "2".into());
        held.drop(Kind::Address, "a");
        let (request, _) = ask(&mut held, false);
        let named: Vec<_> = request.initial_resource_versions.into_iter().collect();
        assert_eq!(named, [("b".to_owned(), "2".to_owned())]);
    }

    #[test]
    fn a_list_that_no_request_may_hold_is_left_out() {
        let mut held = Held::default();
        for number in 0..60_000 {
            let name = format!("Kubernetes//Pod/a-namespace/a-pod-with-a-long-name-{number:08}");
            held.hold(Kind::Address, name.into(), "d862d87689b3d28f".into());
        }
        let (request, full) = ask(&mut held, false);
        assert!(full && request.initial_resource_versions.is_empty());
    }

    #[test]
    fn a_refusal_for_size_is_learned_from() {
        let mut held = Held::default();
        held.hold(Kind::Address, "a".into(), "1".into());
        assert!(!ask(&mut held, false).1);
        let refusal = |message: &str| {
            Error::Status(Status {
                code: Code::RESOURCE_EXHAUSTED,
                message: message.to_owned(),
            })
        };
        assert!(!held.answer_too_large(&refusal("too many requests")));
        assert!(held.answer_too_large(&refusal(
            "grpc: received message larger than max (5000000 vs. 4194304)"
        )));
        assert!(ask(&mut held, false).1, "the next request names nothing");
    }
}
