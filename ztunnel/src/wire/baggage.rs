//! What a proxy tells its peer about a workload. Takes a workload, gives the `baggage` header and
//! back; never fails: what cannot be carried or read is left out.

use std::sync::Arc;

use http::header::HeaderName;
use http::{HeaderMap, HeaderValue};

use crate::model::Workload;

/// A workload as its own proxy describes it; for telemetry only, it proves nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    /// The cluster that it runs in.
    pub cluster: Option<Arc<str>>,
    /// Its namespace.
    pub namespace: Option<Arc<str>>,
    /// What it belongs to.
    pub owner: Option<Owner>,
    /// The service that it calls itself.
    pub service: Option<Arc<str>>,
    /// The revision of that service.
    pub revision: Option<Arc<str>>,
    /// The region that it runs in.
    pub region: Option<Arc<str>>,
    /// The zone that it runs in.
    pub zone: Option<Arc<str>>,
}

/// What a workload belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its kind.
    pub kind: OwnerKind,
    /// Its name.
    pub name: Arc<str>,
}

/// The kinds of owner that have a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerKind {
    /// A cron job.
    CronJob,
    /// A deployment.
    Deployment,
    /// A job.
    Job,
    /// Nobody: the pod itself.
    Pod,
}

impl Baggage {
    /// What we tell about a workload.
    #[must_use]
    pub fn of(workload: &Workload) -> Self {
        Self {
            cluster: carried(&workload.cluster_id),
            namespace: carried(&workload.namespace),
            owner: OwnerKind::from_type(&workload.workload_type)
                .zip(carried(&workload.workload_name))
                .map(|(kind, name)| Owner { kind, name }),
            service: carried(&workload.canonical_name),
            revision: carried(&workload.canonical_revision),
            region: carried(&workload.locality.region),
            zone: carried(&workload.locality.zone),
        }
    }

    /// The header value. It is the same for every connection of a workload: encode it once.
    // PROTOCOL.md#baggage: seven keys in this order, none without a value, nothing escaped.
    #[must_use]
    pub fn encode(&self) -> HeaderValue {
        let owner_key = self.owner.as_ref().map_or("", |owner| owner.kind.key());
        let owner_name = self.owner.as_ref().map(|owner| &owner.name);
        let mut text = String::new();
        for (key, value) in [
            (CLUSTER, self.cluster.as_ref()),
            (NAMESPACE, self.namespace.as_ref()),
            (owner_key, owner_name),
            (SERVICE, self.service.as_ref()),
            (REVISION, self.revision.as_ref()),
            (REGION, self.region.as_ref()),
            (ZONE, self.zone.as_ref()),
        ] {
            let Some(value) = value.filter(|value| is_carried(value)) else {
                continue;
            };
            if !text.is_empty() {
                text.push(',');
            }
            text.push_str(key);
            text.push('=');
            text.push_str(value);
        }
        // Only visible ASCII went in, so this is never empty for want of a valid header value.
        HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// Reads all `baggage` lines of a request or response; of a repeated key the last one counts.
    #[must_use]
    pub fn decode(headers: &HeaderMap) -> Self {
        let mut baggage = Self::default();
        for item in headers
            .get_all(BAGGAGE)
            .iter()
            .flat_map(|line| line.as_bytes().split(|b| *b == b','))
            .filter_map(|item| std::str::from_utf8(item).ok())
        {
            let Some((key, value)) = item.split_once('=') else {
                continue;
            };
            let value = value.trim();
            if is_carried(value) {
                baggage.put(key.trim(), value);
            }
        }
        baggage
    }

    fn put(&mut self, key: &str, value: &str) {
        let value = Arc::from(value);
        match key {
            CLUSTER => self.cluster = Some(value),
            NAMESPACE => self.namespace = Some(value),
            SERVICE => self.service = Some(value),
            REVISION => self.revision = Some(value),
            REGION => self.region = Some(value),
            ZONE => self.zone = Some(value),
            key => {
                if let Some(kind) = OwnerKind::from_key(key) {
                    self.owner = Some(Owner { kind, name: value });
                }
            }
        }
    }
}

impl OwnerKind {
    const ALL: [Self; 4] = [Self::CronJob, Self::Deployment, Self::Job, Self::Pod];

    /// The kind as the workload API writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CronJob => "cronjob",
            Self::Deployment => "deployment",
            Self::Job => "job",
            Self::Pod => "pod",
        }
    }

    const fn key(self) -> &'static str {
        match self {
            Self::CronJob => "k8s.cronjob.name",
            Self::Deployment => "k8s.deployment.name",
            Self::Job => "k8s.job.name",
            Self::Pod => "k8s.pod.name",
        }
    }

    fn from_type(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }

    fn from_key(key: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.key() == key)
    }
}

fn carried(value: &Arc<str>) -> Option<Arc<str>> {
    is_carried(value).then(|| Arc::clone(value))
}

/// Whether a value reads back as it was written: visible, and free of the two separators.
fn is_carried(value: &str) -> bool {
    (1..=MAX_VALUE_BYTES).contains(&value.len())
        && value
            .bytes()
            .all(|b| b.is_ascii_graphic() && b != b',' && b != b'=')
}

/// The header's name.
pub(super) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

const CLUSTER: &str = "k8s.cluster.name";
const NAMESPACE: &str = "k8s.namespace.name";
const SERVICE: &str = "service.name";
const REVISION: &str = "service.version";
const REGION: &str = "cloud.region";
const ZONE: &str = "cloud.availability_zone";

/// Longer than any Kubernetes name; a peer cannot make us keep more.
const MAX_VALUE_BYTES: usize = 253;

#[cfg(test)]
mod tests {
    use proptest::option::of;
    use proptest::prelude::*;

    use super::*;

    fn full() -> Baggage {
        Baggage {
            cluster: Some("Kubernetes".into()),
            namespace: Some("shop".into()),
            owner: Some(Owner {
                kind: OwnerKind::Deployment,
                name: "cart".into(),
            }),
            service: Some("cart".into()),
            revision: Some("v1".into()),
            region: Some("eu".into()),
            zone: Some("eu-1".into()),
        }
    }

    fn headers(lines: impl IntoIterator<Item = HeaderValue>) -> HeaderMap {
        lines.into_iter().map(|line| (BAGGAGE, line)).collect()
    }

    fn decode(lines: &[&str]) -> Baggage {
        let values = lines
            .iter()
            .map(|line| HeaderValue::from_str(line).unwrap());
        Baggage::decode(&headers(values))
    }

    #[test]
    fn seven_keys_in_order_and_none_without_a_value() {
        assert_eq!(
            full().encode(),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,\
             service.name=cart,service.version=v1,cloud.region=eu,cloud.availability_zone=eu-1"
        );
        let few = Baggage {
            cluster: None,
            service: None,
            region: None,
            ..full()
        };
        assert_eq!(
            few.encode(),
            "k8s.namespace.name=shop,k8s.deployment.name=cart,service.version=v1,\
             cloud.availability_zone=eu-1"
        );
        assert_eq!(Baggage::default().encode(), "");
    }

    #[test]
    fn values_that_a_header_cannot_carry_are_left_out() {
        for bad in [
            "",
            "a,b",
            "a=b",
            "a b",
            "ä",
            "a\nb",
            "a\0",
            &"x".repeat(254),
        ] {
            let baggage = Baggage {
                revision: Some(bad.into()),
                owner: Some(Owner {
                    kind: OwnerKind::Pod,
                    name: bad.into(),
                }),
                namespace: Some("shop".into()),
                ..Baggage::default()
            };
            assert_eq!(baggage.encode(), "k8s.namespace.name=shop", "{bad:?}");
        }
    }

    #[test]
    fn a_workload_gives_what_it_has() {
        let workload = Workload {
            name: "cart-1".into(),
            workload_name: "cart".into(),
            workload_type: "deployment".into(),
            cluster_id: "Kubernetes".into(),
            canonical_name: "cart".into(),
            canonical_revision: "v1".into(),
            locality: crate::model::Locality {
                region: "eu".into(),
                zone: "eu-1".into(),
                subzone: "rack".into(),
            },
            ..crate::model::testing::workload("shop")
        };
        assert_eq!(Baggage::of(&workload), full());
        let odd = Workload {
            workload_type: "statefulset".into(),
            ..workload
        };
        assert_eq!(
            Baggage::of(&odd),
            Baggage {
                owner: None,
                ..full()
            }
        );
    }

    #[test]
    fn reading_takes_what_it_knows_and_skips_the_rest() {
        let one = |service: &str| Baggage {
            service: Some(service.into()),
            ..Baggage::default()
        };
        for (lines, want) in [
            (&[][..], Baggage::default()),
            (&[""], Baggage::default()),
            (&["service.name"], Baggage::default()),
            (&["service.name="], Baggage::default()),
            (&["=x"], Baggage::default()),
            (&[",,,"], Baggage::default()),
            (&["unknown=x,service.name=cart"], one("cart")),
            (&["service.name=cart,service.name="], one("cart")),
            (&["service.name=a,service.name=b"], one("b")),
            (&["service.name=a", "service.name=b"], one("b")),
            (&[" service.name = cart "], one("cart")),
            (&["service.name=a=b,cloud.zone=x"], Baggage::default()),
            (&["k8s.replicaset.name=x"], Baggage::default()),
        ] {
            assert_eq!(decode(lines), want, "{lines:?}");
        }
        for kind in OwnerKind::ALL {
            let line = format!("k8s.{}.name=x", kind.as_str());
            let owner = Owner {
                kind,
                name: "x".into(),
            };
            assert_eq!(decode(&[&line]).owner, Some(owner), "{line}");
        }
        let bytes = HeaderValue::from_bytes(b"service.name=\xff,cloud.region=eu").unwrap();
        assert_eq!(
            Baggage::decode(&headers([bytes])).region.as_deref(),
            Some("eu")
        );
    }

    prop_compose! {
        fn any_baggage()(
            values in proptest::array::uniform6(of("[!-+.-<>-~-]{1,253}")),
            owner in of((prop::sample::select(OwnerKind::ALL.to_vec()), "[a-z0-9.-]{1,63}")),
        ) -> Baggage {
            let [cluster, namespace, service, revision, region, zone] =
                values.map(|value| value.map(Arc::from));
            let owner = owner.map(|(kind, name)| Owner { kind, name: name.into() });
            Baggage { cluster, namespace, owner, service, revision, region, zone }
        }
    }

    proptest! {
        #[test]
        fn baggage_survives_the_wire(sent in any_baggage()) {
            prop_assert_eq!(Baggage::decode(&headers([sent.encode()])), sent);
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes: Vec<u8>) {
            if let Ok(line) = HeaderValue::from_bytes(&bytes) {
                let read = Baggage::decode(&headers([line]));
                prop_assert_eq!(Baggage::decode(&headers([read.encode()])), read);
            }
        }
    }
}
