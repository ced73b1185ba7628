//! Names of a mesh, as its pods mean them.

use super::*;
use crate::model::{Visibility, WorkloadUid};
use crate::testing;

fn params() -> Params {
    Params {
        cluster_domain: "cluster.local".into(),
        ipv6: true,
        preferred_namespace: None,
    }
}

/// A service with these VIPs, each `network/address`.
fn service(namespace: &str, host: &str, vips: &[&str]) -> Service {
    Service {
        key: format!("{namespace}/{host}").parse().unwrap(),
        vips: vips.iter().map(|vip| vip.parse().unwrap()).collect(),
        ..testing::service("any", "10.0.0.1", &[])
    }
}

fn client(namespace: &str) -> Workload {
    Workload {
        namespace: namespace.into(),
        network: "".into(),
        ..crate::model::testing::workload(namespace)
    }
}

fn mesh(services: &[Service]) -> Snapshot {
    let services = services.iter().cloned().map(Arc::new);
    Snapshot::new("".into(), [], services)
}

fn v4(mesh: &Snapshot, namespace: &str, name: &str) -> Option<Known> {
    let client = client(namespace);
    look_up(mesh, &params(), &client, (name, Family::V4), 7)
}

fn ips(known: Option<Known>) -> Vec<String> {
    let mut ips: Vec<String> = known
        .unwrap()
        .addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    ips.sort();
    ips
}

const A: &str = "a.ns1.svc.cluster.local";

// 126.
#[test]
fn a_service_has_the_names_that_a_cluster_gives_it() {
    let mesh = mesh(&[service("ns1", A, &["/10.0.0.1"])]);
    for name in ["a", "a.ns1", "a.ns1.svc", A] {
        let known = v4(&mesh, "ns1", name).unwrap();
        assert_eq!(known.canonical, None, "{name}");
        assert_eq!(ips(Some(known)), ["10.0.0.1"], "{name}");
    }
    assert_eq!(v4(&mesh, "ns2", "a"), None, "short names are of one's own");
    assert!(v4(&mesh, "ns2", "a.ns1").is_some());
    for name in [
        "",
        "b",
        "a.ns1.svc.cluster",
        "x.a.ns1.svc.cluster.local",
        ".",
    ] {
        assert_eq!(v4(&mesh, "ns1", name), None, "{name:?}");
    }
}

// 127.
#[test]
fn a_search_domain_is_taken_off_and_the_answer_says_so() {
    let mesh = mesh(&[
        service("ns1", "www.x.com", &["/10.0.0.1"]),
        service("ns1", A, &["/10.0.0.2"]),
    ]);
    for domain in [
        "ns1.svc.cluster.local",
        "svc.cluster.local",
        "cluster.local",
    ] {
        let known = v4(&mesh, "ns1", &format!("www.x.com.{domain}")).unwrap();
        assert_eq!(known.canonical.as_deref(), Some("www.x.com"), "{domain}");
        assert_eq!(ips(Some(known)), ["10.0.0.1"]);
    }
    assert_eq!(v4(&mesh, "ns1", "www.x.com.ns2.svc.cluster.local"), None);
    let known = v4(&mesh, "ns2", "a.ns1.ns2.svc.cluster.local").unwrap();
    assert_eq!(known.canonical.as_deref(), Some("a.ns1"));
}

// 128.
#[test]
fn a_wildcard_answers_where_nothing_more_exact_does() {
    let mesh = mesh(&[
        service("ns1", "*.x.com", &["/10.0.0.1"]),
        service("ns1", "*.b.x.com", &["/10.0.0.2"]),
        service("ns1", "q.x.com", &["/10.0.0.3"]),
    ]);
    for (name, ip) in [
        ("r.x.com", "10.0.0.1"),
        ("r.s.x.com", "10.0.0.1"),
        ("a.b.x.com", "10.0.0.2"),
        ("q.x.com", "10.0.0.3"),
        ("r.x.com.ns1.svc.cluster.local", "10.0.0.1"),
    ] {
        let known = v4(&mesh, "ns1", name).unwrap();
        assert_eq!(known.canonical, None, "{name}");
        assert_eq!(ips(Some(known)), [ip], "{name}");
    }
    assert_eq!(v4(&mesh, "ns1", "x.com"), None);
}

// 131, 136.
#[test]
fn a_family_that_is_not_given_is_an_empty_answer_and_no_unknown_name() {
    let both = ["/10.0.0.1", "/fd00::1"];
    let only = |families| Service {
        ip_families: Some(families),
        ..service("ns1", A, &both)
    };
    let client = client("ns1");
    let ask = |service: Service, family, params: &Params| {
        let known = look_up(&mesh(&[service]), params, &client, (A, family), 7);
        ips(known).len()
    };
    let with_v6 = params();
    assert_eq!(ask(only(IpFamilies::Ipv4Only), Family::V6, &with_v6), 0);
    assert_eq!(ask(only(IpFamilies::Ipv4Only), Family::V4, &with_v6), 1);
    assert_eq!(ask(only(IpFamilies::Ipv6Only), Family::V4, &with_v6), 0);
    assert_eq!(ask(only(IpFamilies::Ipv6Only), Family::V6, &with_v6), 1);
    assert_eq!(ask(only(IpFamilies::Dual), Family::V6, &with_v6), 1);
    let without = Params {
        ipv6: false,
        ..params()
    };
    assert_eq!(ask(only(IpFamilies::Dual), Family::V6, &without), 0);
    assert_eq!(ask(only(IpFamilies::Dual), Family::V4, &without), 1);
}

// 132.
#[test]
fn a_headless_service_is_its_endpoints_in_any_order() {
    let headless = Arc::new(service("ns1", A, &[]));
    let pods = (1..=8).map(|n| {
        let name = format!("p{n}");
        Arc::new(Workload {
            uid: WorkloadUid(name.as_str().into()),
            ips: vec![
                format!("10.1.0.{n}").parse().unwrap(),
                format!("10.2.0.{n}").parse().unwrap(),
                format!("fd01::{n}").parse().unwrap(),
            ],
            services: [(headless.key.clone(), [].into())].into(),
            ..client("ns1")
        })
    });
    let far = Arc::new(Workload {
        uid: WorkloadUid("far".into()),
        network: "far".into(),
        ips: vec!["10.1.0.1".parse().unwrap()],
        services: [(headless.key.clone(), [].into())].into(),
        ..client("ns1")
    });
    let pods = pods.chain([far]);
    let mesh = Snapshot::new("".into(), pods, [Arc::clone(&headless)]);
    let client = client("ns1");
    let ask = |family, dice| {
        let known = look_up(&mesh, &params(), &client, ("a", family), dice).unwrap();
        known.addresses
    };
    let mut first = ask(Family::V4, 1);
    assert_ne!(first, ask(Family::V4, 2), "another order");
    first.sort();
    let wanted: Vec<IpAddr> = (1..=8).map(|n| [10, 1, 0, n].into()).collect();
    assert_eq!(first, wanted, "the first address of each");
    assert_eq!(ask(Family::V6, 1).len(), 8);

    // Outside the cluster, another resolver may know more.
    let outside = Snapshot::new("".into(), [], [Arc::new(service("ns1", "x.com", &[]))]);
    assert_eq!(v4(&outside, "ns1", "x.com"), None);
    // Nobody behind it: known, and empty.
    let empty = Snapshot::new("".into(), [], [headless]);
    assert!(ips(v4(&empty, "ns1", "a")).is_empty());
}

// 133.
#[test]
fn only_addresses_of_the_clients_network_are_given() {
    let vips = ["/10.0.0.1", "far/10.0.0.2", "far/fd00::2"];
    let mesh = mesh(&[service("ns1", A, &vips)]);
    assert_eq!(ips(v4(&mesh, "ns1", A)), ["10.0.0.1"]);
    let far = |network: &str, family| {
        let client = Workload {
            network: network.into(),
            ..client("ns1")
        };
        ips(look_up(&mesh, &params(), &client, (A, family), 7))
    };
    assert_eq!(far("far", Family::V4), ["10.0.0.2"]);
    assert_eq!(far("far", Family::V6), ["fd00::2"]);
    assert!(far("other", Family::V4).is_empty());
}

// 134.
#[test]
fn what_a_pod_may_not_see_it_cannot_resolve() {
    let mesh = mesh(&[Service {
        visibility: Visibility::Namespace,
        ..service("ns1", A, &["/10.0.0.1"])
    }]);
    assert!(v4(&mesh, "ns1", A).is_some());
    assert_eq!(v4(&mesh, "ns2", A), None);
}

// 135.
#[test]
fn of_one_name_in_several_namespaces_the_nearest_is_meant() {
    let host = "x.com";
    let in_namespace = |namespace: &str, ip: &str| service(namespace, host, &[ip]);
    let canonical = Service {
        canonical: true,
        ..in_namespace("ns3", "/10.0.0.3")
    };
    let all = [
        in_namespace("ns1", "/10.0.0.1"),
        in_namespace("ns2", "/10.0.0.2"),
        canonical,
        in_namespace("ns4", "/10.0.0.4"),
    ];
    let preferred = Params {
        preferred_namespace: Some("ns4".into()),
        ..params()
    };
    let ask = |services: &[Service], namespace: &str, params: &Params| {
        let client = client(namespace);
        ips(look_up(
            &mesh(services),
            params,
            &client,
            (host, Family::V4),
            7,
        ))
        .remove(0)
    };
    assert_eq!(ask(&all, "ns2", &preferred), "10.0.0.2", "its own");
    assert_eq!(
        ask(&all, "ns9", &preferred),
        "10.0.0.3",
        "the canonical one"
    );
    let [first, second, _, fourth] = all;
    let others = [first, second, fourth];
    assert_eq!(ask(&others, "ns9", &preferred), "10.0.0.4", "the preferred");
    assert_eq!(ask(&others, "ns9", &params()), "10.0.0.1", "the first");
}
