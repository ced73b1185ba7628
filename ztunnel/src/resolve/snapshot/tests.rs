//! What is built step by step is what is built at once.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::*;
use crate::model::testing;
use crate::model::{LoadBalancer, SpiffeId};

const UIDS: [&str; 5] = ["a//Pod/1", "b//Pod/2", "c", "d", "e"];
const IPS: [&str; 4] = ["10.0.0.1", "10.0.0.2", "::ffff:10.0.0.2", "fd00::1"];
const NETWORKS: [&str; 2] = ["", "far"];
const KEYS: [&str; 4] = ["shop/cart", "shop/bank", "bank/cart", "bank/bank"];
const RANGES: [&str; 5] = [
    "10.0.0.0/8",
    "10.0.0.0/30",
    "10.0.0.3/30",
    "0.0.0.0/0",
    "fd00::/64",
];

fn key() -> impl Strategy<Value = NamespacedHostname> {
    select(&KEYS[..]).prop_map(|key| key.parse().unwrap())
}

prop_compose! {
    fn workload()(
        uid in select(&UIDS[..]),
        ips in subsequence(&IPS[..], 0..=4),
        network in select(&NETWORKS[..]),
        (hbone, host_network) in any::<(bool, bool)>(),
        hostname in select(&["", "db.example"][..]),
        name in select(&["one", "two"][..]),
        account in proptest::option::of(select(&["cart", "bank"][..])),
        services in proptest::collection::vec(key(), 0..3),
    ) -> Workload {
        let id = |account| format!("spiffe://cluster.local/ns/shop/sa/{account}");
        Workload {
            uid: WorkloadUid(uid.into()),
            name: name.into(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            network: network.into(),
            protocol: if hbone { Protocol::Hbone } else { Protocol::Tcp },
            network_mode: if host_network {
                NetworkMode::HostNetwork
            } else {
                NetworkMode::Standard
            },
            hostname: hostname.into(),
            identity: account.map(|account| id(account).parse::<SpiffeId>().unwrap()),
            services: services.into_iter().map(|key| (key, BTreeMap::new())).collect(),
            ..testing::workload("shop")
        }
    }
}

prop_compose! {
    fn service()(
        key in key(),
        vips in proptest::collection::vec((select(&NETWORKS[..]), select(&IPS[..])), 0..3),
        ranges in proptest::collection::vec((select(&NETWORKS[..]), select(&RANGES[..])), 0..3),
        (canonical, public) in any::<(bool, bool)>(),
    ) -> Service {
        Service {
            name: "name".into(),
            key,
            vips: vips
                .iter()
                .map(|(network, ip)| format!("{network}/{ip}").parse().unwrap())
                .collect(),
            cidr_vips: ranges
                .iter()
                .map(|(network, net)| ((*network).into(), net.parse().unwrap()))
                .collect(),
            ports: BTreeMap::new(),
            subject_alt_names: Vec::new(),
            waypoint: None,
            weighted_waypoints: Vec::new(),
            load_balancer: LoadBalancer::default(),
            ip_families: None,
            canonical,
            visibility: if public { Visibility::Public } else { Visibility::Namespace },
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => workload().prop_map(|workload| Change::Workload(Arc::new(workload))),
        2 => service().prop_map(|service| Change::Service(Arc::new(service))),
        2 => select(&UIDS[..]).prop_map(|uid| Change::NoWorkload(WorkloadUid(uid.into()))),
        1 => key().prop_map(Change::NoService),
    ]
}

/// Everything that is in the indexes, in an order of its own.
fn described(snapshot: &Snapshot) -> String {
    let mut rows = Vec::new();
    let uids = |list: &mut dyn Iterator<Item = &Arc<Workload>>| {
        list.fold(String::new(), |mut text, workload| {
            write!(text, " {}={:p}", workload.uid, Arc::as_ptr(workload)).unwrap();
            text
        })
    };
    let keys = |list: &mut dyn Iterator<Item = &Arc<Service>>| {
        list.fold(String::new(), |mut text, service| {
            write!(text, " {}={:p}", service.key, Arc::as_ptr(service)).unwrap();
            text
        })
    };
    for workload in snapshot.workloads() {
        rows.push(format!("workload {}", uids(&mut [workload].into_iter())));
    }
    for service in snapshot.services() {
        rows.push(format!("service {}", keys(&mut [service].into_iter())));
    }
    for (name, network) in &snapshot.networks {
        for (ip, held) in &network.addresses {
            rows.push(format!("at {name}/{ip}{}", uids(&mut held.iter())));
        }
        for (ip, held) in &network.vips {
            rows.push(format!("vip {name}/{ip}{}", keys(&mut held.iter())));
        }
        for ip in IPS.map(|ip| ip.parse::<IpAddr>().unwrap().to_canonical()) {
            for (bits, service) in network.ranges_around(ip) {
                let service = keys(&mut [service].into_iter());
                rows.push(format!("range {name}/{ip} {bits}{service}"));
            }
        }
    }
    for (service, endpoints) in &snapshot.endpoints {
        rows.push(format!(
            "endpoints {service}{}",
            uids(&mut endpoints.iter())
        ));
    }
    for (pod, held) in &snapshot.pods {
        rows.push(format!("pod {pod:?}{}", uids(&mut held.iter())));
    }
    for (host, held) in &snapshot.hosts {
        rows.push(format!("host {host}{}", keys(&mut held.iter())));
    }
    for (name, held) in &snapshot.named {
        rows.push(format!("named {name}{}", uids(&mut held.iter())));
    }
    rows.sort_unstable();
    rows.join("\n")
}

proptest! {
    #[test]
    fn a_snapshot_made_by_changes_is_the_one_that_is_built_anew(
        steps in proptest::collection::vec(proptest::collection::vec(change(), 1..4), 0..12),
    ) {
        let (mut workloads, mut services) = (BTreeMap::new(), BTreeMap::new());
        let mut snapshot = Snapshot::new("".into(), [], []);
        for step in steps {
            let before = described(&snapshot);
            let next = snapshot.apply(step.iter().cloned());
            prop_assert_eq!(described(&snapshot), before, "the one before changes");
            for change in step {
                match change {
                    Change::NoService(key) => drop(services.remove(&key)),
                    Change::NoWorkload(uid) => drop(workloads.remove(&uid)),
                    Change::Service(service) => {
                        services.insert(service.key.clone(), service);
                    }
                    Change::Workload(workload) => {
                        workloads.insert(workload.uid.clone(), workload);
                    }
                }
            }
            let forth = Snapshot::new(
                "".into(),
                workloads.values().cloned(),
                services.values().cloned(),
            );
            let back = Snapshot::new(
                "".into(),
                workloads.values().rev().cloned(),
                services.values().rev().cloned(),
            );
            prop_assert_eq!(described(&next), described(&forth));
            prop_assert_eq!(described(&forth), described(&back), "whatever the order");
            snapshot = next;
        }
    }
}

#[test]
fn many_endpoints_come_and_go_in_any_order() {
    let one = |number: usize| {
        let mut workload = testing::workload("shop");
        workload.uid = WorkloadUid(format!("{number:04}").into());
        workload.services = [("shop/cart".parse().unwrap(), BTreeMap::new())].into();
        Arc::new(workload)
    };
    let numbers: Vec<usize> = (0..500).map(|n| n * 7919 % 500).collect();
    let all = numbers.iter().map(|n| Change::Workload(one(*n)));
    let mut snapshot = Snapshot::new("".into(), [], []).apply(all);
    let service = "shop/cart".parse().unwrap();
    let held = |snapshot: &Snapshot| {
        let uids = snapshot.endpoints(&service).map(|w| w.uid.0.to_string());
        uids.collect::<Vec<_>>()
    };
    let want = |from: usize| (from..500).map(|n| format!("{n:04}")).collect::<Vec<_>>();
    assert_eq!(held(&snapshot), want(0));
    for number in 0..500 {
        let gone = Change::NoWorkload(WorkloadUid(format!("{number:04}").into()));
        snapshot = snapshot.apply([gone]);
        assert_eq!(held(&snapshot), want(number + 1));
    }
    assert!(snapshot.endpoints.is_empty(), "and nothing is left of them");
}

/// Of several workloads with one address: pods, then HBONE.
#[test]
fn a_pod_wins_an_address_and_gives_it_back_when_it_goes() {
    let one = |uid: &str, protocol| {
        let mut workload = testing::workload("shop");
        workload.uid = WorkloadUid(uid.into());
        workload.protocol = protocol;
        Arc::new(workload)
    };
    let mut snapshot = Snapshot::new("".into(), [], []).apply([
        Change::Workload(one("c//Pod/x", Protocol::Tcp)),
        Change::Workload(one("entry-1", Protocol::Hbone)),
        Change::Workload(one("entry-2", Protocol::Tcp)),
    ]);
    let ip = "10.0.0.2".parse().unwrap();
    for holder in ["c//Pod/x", "entry-1", "entry-2"] {
        let found = snapshot.workload_at("", ip).unwrap();
        assert_eq!(&*found.uid.0, holder);
        snapshot = snapshot.apply([Change::NoWorkload(WorkloadUid(holder.into()))]);
    }
    assert_eq!(snapshot.workload_at("", ip), None);
    assert!(snapshot.networks.is_empty());
}
