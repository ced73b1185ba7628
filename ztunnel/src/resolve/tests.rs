//! Routes out of and into a pod, one row a behaviour.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::model::{
    AppAddr, Health, HealthPolicy, LoadBalancerMode, NetworkMode, OrigDst, Protocol, RoutingScope,
    Visibility, WorkloadUid,
};
use crate::resolve::testing::{
    addr, dial, dial_with, endpoint, service, snapshot, upstream, workload,
};
use crate::resolve::{Asked, Error, Hop, InboundQuery, Snapshot, deliver};

#[test]
fn unknown_addresses_pass_through_in_plain_tcp() {
    let route = dial(&snapshot(vec![], vec![]), "192.0.2.1:443").unwrap();
    assert_eq!(route.upstream, upstream("192.0.2.1:443"));
    assert_eq!((route.hop, route.workload), (Hop::Plain, None));
}

#[test]
fn an_hbone_workload_is_dialled_on_15008_and_asked_for_by_its_own_address() {
    for (ip, dst, up) in [
        ("10.0.0.2", "10.0.0.2:8080", "10.0.0.2:15008"),
        ("fd00::2", "[fd00::2]:8080", "[fd00::2]:15008"),
    ] {
        let route = dial(&snapshot(vec![workload("cart", ip)], vec![]), dst).unwrap();
        assert_eq!(route.upstream, upstream(up));
        let Hop::Hbone {
            authority,
            expected,
        } = route.hop
        else {
            panic!("plain");
        };
        assert_eq!(authority, addr(dst));
        assert_eq!(expected.len(), 1);
        assert_eq!(expected[0].service_account(), "cart");
    }
}

#[test]
fn a_workload_without_hbone_is_dialled_in_plain_tcp() {
    let mut plain = workload("old", "10.0.0.3");
    plain.protocol = Protocol::Tcp;
    let route = dial(&snapshot(vec![plain], vec![]), "10.0.0.3:80").unwrap();
    assert_eq!(
        (route.upstream, route.hop),
        (upstream("10.0.0.3:80"), Hop::Plain)
    );
}

#[test]
fn a_service_leads_to_an_endpoint_on_its_target_port_unless_the_endpoint_has_its_own() {
    for (own, expect) in [(&[][..], 8080), (&[(80, 1234)][..], 1234)] {
        let mesh = snapshot(
            vec![endpoint("cart", "10.0.0.2", own)],
            vec![service("cart", "/10.96.0.1", &[(80, 8080)])],
        );
        let route = dial(&mesh, "10.96.0.1:80").unwrap();
        assert_eq!(route.upstream, upstream("10.0.0.2:15008"));
        assert!(
            matches!(route.hop, Hop::Hbone { authority, .. } if authority.port() == expect),
            "{:?}",
            route.hop
        );
        assert_eq!(&*route.service.unwrap().name, "cart");
    }
}

#[test]
fn a_named_port_selects_the_endpoints_that_define_it() {
    let mesh = snapshot(
        vec![
            endpoint("a", "10.0.0.2", &[]),
            endpoint("b", "10.0.0.3", &[(80, 9000)]),
        ],
        vec![service("cart", "/10.96.0.1", &[(80, 0)])],
    );
    for dice in 0..10 {
        let route = dial_with(&mesh, "10.96.0.1:80", dice).unwrap();
        assert_eq!(route.upstream, upstream("10.0.0.3:15008"));
    }
}

#[test]
fn a_service_without_endpoints_or_without_that_port_is_refused() {
    let empty = snapshot(vec![], vec![service("cart", "/10.96.0.1", &[(80, 8080)])]);
    assert!(matches!(
        dial(&empty, "10.96.0.1:80"),
        Err(Error::NoEndpoint { port: 80, .. })
    ));
    let mesh = snapshot(
        vec![endpoint("cart", "10.0.0.2", &[])],
        vec![service("cart", "/10.96.0.1", &[(80, 8080)])],
    );
    assert!(matches!(
        dial(&mesh, "10.96.0.1:81"),
        Err(Error::NoEndpoint { port: 81, .. })
    ));
}

#[test]
fn a_passthrough_service_is_dialled_as_it_was_asked() {
    let mut passthrough = service("ext", "/10.96.0.9", &[(80, 80)]);
    passthrough.load_balancer.mode = LoadBalancerMode::Passthrough;
    let route = dial(&snapshot(vec![], vec![passthrough]), "10.96.0.9:80").unwrap();
    assert_eq!(
        (route.upstream, route.hop),
        (upstream("10.96.0.9:80"), Hop::Plain)
    );
}

#[test]
fn unhealthy_endpoints_serve_only_a_service_that_allows_all() {
    let mut sick = endpoint("sick", "10.0.0.2", &[]);
    sick.health = Health::Unhealthy;
    let well = endpoint("well", "10.0.0.3", &[]);
    let mut cart = service("cart", "/10.96.0.1", &[(80, 80)]);
    let mesh = snapshot(vec![sick.clone(), well.clone()], vec![cart.clone()]);
    for dice in 0..8 {
        let route = dial_with(&mesh, "10.96.0.1:80", dice).unwrap();
        assert_eq!(route.upstream, upstream("10.0.0.3:15008"));
    }
    cart.load_balancer.health_policy = HealthPolicy::AllowAll;
    let mesh = snapshot(vec![sick, well], vec![cart]);
    let used: std::collections::BTreeSet<IpAddr> = (0..8)
        .map(|dice| {
            dial_with(&mesh, "10.96.0.1:80", dice)
                .unwrap()
                .upstream
                .ip()
        })
        .collect();
    assert_eq!(used.len(), 2);
}

#[test]
fn capacity_weighs_and_zero_is_never_chosen() {
    let mut big = endpoint("big", "10.0.0.2", &[]);
    big.capacity = 3;
    let small = endpoint("small", "10.0.0.3", &[]);
    let mut none = endpoint("none", "10.0.0.4", &[]);
    none.capacity = 0;
    let mesh = snapshot(
        vec![big, small, none],
        vec![service("cart", "/10.96.0.1", &[(80, 80)])],
    );
    let mut count = BTreeMap::new();
    for dice in 0..400 {
        let route = dial_with(&mesh, "10.96.0.1:80", dice).unwrap();
        *count.entry(route.upstream.ip().to_string()).or_insert(0) += 1;
    }
    assert_eq!(count.get("10.0.0.2"), Some(&300));
    assert_eq!(count.get("10.0.0.3"), Some(&100));
    assert_eq!(count.get("10.0.0.4"), None);
}

#[test]
fn failover_takes_the_best_group_and_strict_takes_only_full_matches() {
    let mut near = endpoint("near", "10.0.0.2", &[]);
    near.locality.region = "".into();
    let mut far = endpoint("far", "10.0.0.3", &[]);
    far.locality.region = "eu".into();
    let mut cart = service("cart", "/10.96.0.1", &[(80, 80)]);
    cart.load_balancer.routing_preferences = vec![RoutingScope::Network, RoutingScope::Region];
    cart.load_balancer.mode = LoadBalancerMode::Failover;
    let mesh = snapshot(vec![near, far.clone()], vec![cart.clone()]);
    for dice in 0..8 {
        let route = dial_with(&mesh, "10.96.0.1:80", dice).unwrap();
        assert_eq!(route.upstream, upstream("10.0.0.2:15008"));
    }
    let mesh = snapshot(vec![far.clone()], vec![cart.clone()]);
    assert_eq!(
        dial(&mesh, "10.96.0.1:80").unwrap().upstream,
        upstream("10.0.0.3:15008")
    );
    cart.load_balancer.mode = LoadBalancerMode::Strict;
    let mesh = snapshot(vec![far], vec![cart]);
    assert!(matches!(
        dial(&mesh, "10.96.0.1:80"),
        Err(Error::NoEndpoint { .. })
    ));
}

#[test]
fn a_host_network_workload_is_found_by_service_and_not_by_ip() {
    let mut host = endpoint("host", "10.9.9.9", &[]);
    host.network_mode = NetworkMode::HostNetwork;
    host.protocol = Protocol::Tcp;
    let mesh = snapshot(
        vec![host],
        vec![service("cart", "/10.96.0.1", &[(80, 8080)])],
    );
    assert_eq!(dial(&mesh, "10.9.9.9:22").unwrap().workload, None);
    let route = dial(&mesh, "10.96.0.1:80").unwrap();
    assert_eq!(route.upstream, upstream("10.9.9.9:8080"));
}

#[test]
fn a_namespace_visible_service_is_an_unknown_address_elsewhere() {
    let mut hidden = service("cart", "/10.96.0.1", &[(80, 80)]);
    hidden.key = "other/cart.other".parse().unwrap();
    hidden.visibility = Visibility::Namespace;
    let route = dial(&snapshot(vec![], vec![hidden]), "10.96.0.1:80").unwrap();
    assert_eq!((route.hop, route.service), (Hop::Plain, None));
}

#[test]
fn an_exact_vip_wins_over_a_range_and_the_own_namespace_over_a_longer_prefix() {
    let exact = service("exact", "/10.96.0.1", &[(80, 80)]);
    let mut wide = service("wide", "/10.200.0.1", &[(80, 80)]);
    wide.cidr_vips = vec![("".into(), "10.96.0.0/16".parse().unwrap())];
    let mut long = service("long", "/10.200.0.2", &[(80, 80)]);
    long.key = "other/long.other".parse().unwrap();
    long.cidr_vips = vec![("".into(), "10.96.0.0/24".parse().unwrap())];
    let mesh = snapshot(vec![], vec![exact, wide, long]);
    for (ip, from, name) in [
        ("10.96.0.1", "shop", "exact"),
        ("10.96.0.2", "shop", "wide"),
        ("10.96.0.2", "third", "long"),
    ] {
        let found = mesh.service_at("", ip.parse().unwrap(), from).unwrap();
        assert_eq!(&*found.name, name, "{ip} from {from}");
    }
}

#[test]
fn the_identity_list_holds_the_service_names_and_the_workload_itself() {
    let mut cart = service("cart", "/10.96.0.1", &[(80, 80)]);
    cart.subject_alt_names = vec!["spiffe://cluster.local/ns/x/sa/y".into(), "dns:no".into()];
    let mesh = snapshot(vec![endpoint("cart", "10.0.0.2", &[])], vec![cart]);
    let Hop::Hbone { expected, .. } = dial(&mesh, "10.96.0.1:80").unwrap().hop else {
        panic!("plain");
    };
    let names: Vec<_> = expected.iter().map(ToString::to_string).collect();
    assert_eq!(
        names,
        [
            "spiffe://cluster.local/ns/x/sa/y",
            "spiffe://cluster.local/ns/shop/sa/cart"
        ]
    );
}

fn ask(mesh: &Snapshot, asked: Asked) -> Result<AppAddr, Error> {
    let local = mesh.workload(&WorkloadUid("cart".into())).unwrap();
    let query = InboundQuery {
        local,
        dialled: OrigDst::new(addr("10.0.0.2:15008")),
        asked,
        forwarded_host: Some("cart.shop"),
    };
    deliver(mesh, &query).map(|delivery| delivery.app)
}

#[test]
fn an_authority_must_be_the_pod_a_service_of_it_and_not_a_port_of_ours() {
    let mesh = snapshot(
        vec![endpoint("cart", "10.0.0.2", &[(81, 9000)])],
        vec![service("cart", "/10.96.0.1", &[(80, 8080), (81, 0)])],
    );
    let app = |text: &str| Ok(AppAddr::new(addr(text)));
    assert_eq!(
        ask(&mesh, Asked::Ip(addr("10.0.0.2:80"))),
        app("10.0.0.2:80")
    );
    assert!(matches!(
        ask(&mesh, Asked::Ip(addr("10.0.0.3:80"))),
        Err(Error::WrongPod { .. })
    ));
    for port in [15001, 15006, 15008, 15080] {
        let asked = Asked::Ip(SocketAddr::new("10.0.0.2".parse().unwrap(), port));
        assert_eq!(ask(&mesh, asked), Err(Error::OwnPort(port)));
    }
    let host = |port| Asked::Host("cart.shop".to_owned(), port);
    assert_eq!(ask(&mesh, host(80)), app("10.0.0.2:8080"));
    assert_eq!(ask(&mesh, host(81)), app("10.0.0.2:9000"));
    assert!(matches!(
        ask(&mesh, host(82)),
        Err(Error::UnknownHost { .. })
    ));
    assert!(matches!(
        ask(&mesh, Asked::Host("no.shop".to_owned(), 80)),
        Err(Error::UnknownHost { .. })
    ));
}

/// Behaviours 53, 55 and 58.
#[test]
fn what_is_unknown_on_both_sides_matches_and_strictness_refuses_the_rest() {
    let mut cart = service("cart", "/10.96.0.1", &[(80, 80)]);
    cart.visibility = Visibility::Namespace;
    cart.load_balancer.mode = LoadBalancerMode::Strict;
    let place = |node: &str, zone: &str| {
        let mut endpoint = endpoint("cart", "10.0.0.2", &[]);
        endpoint.node = node.into();
        endpoint.locality.zone = zone.into();
        endpoint
    };
    for (scope, endpoint, found) in [
        (RoutingScope::Node, place("n1", ""), false),
        (RoutingScope::Zone, place("n1", ""), true),
        (RoutingScope::Zone, place("", "z1"), false),
    ] {
        cart.load_balancer.routing_preferences = vec![scope];
        let mesh = snapshot(vec![endpoint], vec![cart.clone()]);
        match dial(&mesh, "10.96.0.1:80") {
            Ok(route) => assert!(found && route.upstream == upstream("10.0.0.2:15008")),
            Err(error) => assert!(!found && matches!(error, Error::NoEndpoint { .. })),
        }
    }
}
