//! Waypoints, gateways and what stands between, as tables: behaviour by behaviour.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{
    AppProtocol, ApplicationTunnel, Health, HealthPolicy, IpFamilies, LoadBalancerMode, OrigDst,
    Protocol, RoutingScope, Service, WeightedWaypoint, Workload,
};
use crate::resolve::testing::{
    addr, dial, dial_from, dial_with, endpoint, endpoint_of, gateway, key, query, service,
    snapshot, upstream, workload,
};
use crate::resolve::{
    Asked, Error, Fate, Found, Hop, InboundQuery, LeftOut, Rule, Snapshot, Step, deliver, explain,
    route,
};

/// The waypoint `waypoint` at 10.0.0.9, by its service at 10.96.0.9 and its own address.
fn waypoint_pod() -> Workload {
    endpoint_of("waypoint", "waypoint", "10.0.0.9", &[])
}

fn waypoint_service() -> Service {
    service("waypoint", "/10.96.0.9", &[(15008, 15008)])
}

/// A way in words: rule, what is dialled, what is asked for, who must be there.
fn said(found: Result<crate::resolve::Route, Error>) -> String {
    let accounts = |ids: &[crate::model::SpiffeId]| {
        let names: Vec<_> = ids.iter().map(|id| id.service_account()).collect();
        names.join("+")
    };
    match found {
        Err(error) => format!("refused: {error}"),
        Ok(route) => match &route.hop {
            Hop::Plain => format!("{:?} {} plain", route.rule, route.upstream),
            Hop::Hbone {
                authority,
                expected,
            } => format!(
                "{:?} {} for {authority} of {}",
                route.rule,
                route.upstream,
                accounts(expected)
            ),
            Hop::DoubleHbone {
                authority: (host, port),
                gateway,
                expected,
            } => format!(
                "{:?} {} for {host}:{port} of {} inside {}",
                route.rule,
                route.upstream,
                accounts(expected),
                accounts(gateway)
            ),
        },
    }
}

/// Behaviours 40 to 43, 46 and 47.
#[test]
fn a_waypoint_stands_before_what_names_it_and_is_never_gone_past() {
    let by_service = gateway("shop/waypoint.shop", 15008);
    let by_vip = gateway("/10.96.0.9", 15008);
    let by_address = gateway("/10.0.0.9", 15008);
    let missing = gateway("shop/nobody.shop", 15008);
    let elsewhere = gateway("/10.0.0.200", 15008);
    let none = None;
    let to_service = "ServiceWaypoint 10.0.0.9:15008 for 10.96.0.1:80 of waypoint";
    let to_pod = "WorkloadWaypoint 10.0.0.9:15008 for 10.0.0.2:80 of waypoint";
    let direct = "Endpoint 10.0.0.2:15008 for 10.0.0.2:8080 of cart";
    let pod = "Workload 10.0.0.2:15008 for 10.0.0.2:80 of cart";
    for (behaviour, of_service, of_pod, dialled, want) in [
        (41, Some(&by_service), none, "10.96.0.1:80", to_service),
        (41, Some(&by_vip), none, "10.96.0.1:80", to_service),
        (41, Some(&by_address), none, "10.96.0.1:80", to_service),
        (42, none, Some(&by_service), "10.0.0.2:80", to_pod),
        (42, none, Some(&by_vip), "10.0.0.2:80", to_pod),
        (42, none, Some(&by_address), "10.0.0.2:80", to_pod),
        (43, none, Some(&by_service), "10.96.0.1:80", direct),
        (43, Some(&by_service), none, "10.0.0.2:80", pod),
        (
            47,
            Some(&missing),
            none,
            "10.96.0.1:80",
            "refused: waypoint shop/nobody.shop is not in the mesh or has no healthy endpoint",
        ),
        (
            47,
            none,
            Some(&elsewhere),
            "10.0.0.2:80",
            "refused: waypoint /10.0.0.200 is not in the mesh or has no healthy endpoint",
        ),
    ] {
        let mut cart = service("cart", "/10.96.0.1", &[(80, 8080)]);
        cart.waypoint = of_service.cloned();
        let mut end = endpoint("cart", "10.0.0.2", &[]);
        end.waypoint = of_pod.cloned();
        let mesh = snapshot(vec![end, waypoint_pod()], vec![cart, waypoint_service()]);
        assert_eq!(said(dial(&mesh, dialled)), want, "behaviour {behaviour}");
    }
    // 40: also where nothing would be balanced.
    let mut passed = service("cart", "/10.96.0.1", &[(80, 8080)]);
    passed.load_balancer.mode = LoadBalancerMode::Passthrough;
    passed.waypoint = Some(by_service.clone());
    let mesh = snapshot(vec![waypoint_pod()], vec![passed, waypoint_service()]);
    assert_eq!(said(dial(&mesh, "10.96.0.1:80")), to_service);
    // 46: the source's own waypoint is nobody else's.
    let mut source = workload("web", "10.0.0.1");
    source.waypoint = Some(by_service);
    let mesh = snapshot(
        vec![endpoint("cart", "10.0.0.2", &[]), waypoint_pod()],
        vec![waypoint_service()],
    );
    assert_eq!(said(dial_from(&mesh, &source, "10.0.0.2:80", 0)), pod);
}

/// Behaviours 44 and 45.
#[test]
fn only_the_waypoint_itself_goes_past_the_waypoint() {
    let direct = "Workload 10.0.0.2:15008 for 10.0.0.2:80 of cart";
    let again = "WorkloadWaypoint 10.0.0.9:15008 for 10.0.0.2:80 of waypoint";
    for (behaviour, reference) in [(44, "shop/waypoint.shop"), (44, "/10.0.0.9")] {
        let mut end = endpoint("cart", "10.0.0.2", &[]);
        end.waypoint = Some(gateway(reference, 15008));
        let mesh = snapshot(vec![end, waypoint_pod()], vec![waypoint_service()]);
        for (name, ip, want) in [
            ("waypoint", "10.0.0.9", direct),
            ("waypoint", "10.0.0.8", again),
            ("web", "10.0.0.9", again),
        ] {
            let source = workload(name, ip);
            let got = said(dial_from(&mesh, &source, "10.0.0.2:80", 0));
            assert_eq!(got, want, "behaviours {behaviour} and 45: {name} at {ip}");
        }
        // Without an identity nobody is anybody.
        let mut nobody = workload("waypoint", "10.0.0.9");
        nobody.identity = None;
        assert_eq!(said(dial_from(&mesh, &nobody, "10.0.0.2:80", 0)), again);
    }
}

/// Behaviour 48.
#[test]
fn weights_share_out_the_waypoints() {
    let share = |weights: [u32; 2]| {
        let mut cart = service("cart", "/10.96.0.1", &[(80, 8080)]);
        cart.waypoint = Some(gateway("/10.0.0.9", 15008));
        cart.weighted_waypoints = ["/10.0.0.7", "/10.0.0.8"]
            .into_iter()
            .zip(weights)
            .map(|(at, weight)| WeightedWaypoint {
                destination: gateway(at, 15008),
                weight,
            })
            .collect();
        let pods = ["10.0.0.7", "10.0.0.8", "10.0.0.9"].map(|ip| workload(ip, ip));
        let mesh = snapshot(pods.to_vec(), vec![cart]);
        let mut count = BTreeMap::new();
        for dice in 0..1000 {
            let route = dial_with(&mesh, "10.96.0.1:80", dice).unwrap();
            *count.entry(route.upstream.ip().to_string()).or_insert(0) += 1;
        }
        ["10.0.0.7", "10.0.0.8", "10.0.0.9"].map(|ip| count.get(ip).copied().unwrap_or(0))
    };
    let [most, few, single] = share([90, 10]);
    assert!((850..=950).contains(&most) && most + few == 1000 && single == 0);
    assert_eq!(share([100, 0]), [1000, 0, 0]);
    assert_eq!(share([0, 0]), [0, 0, 1000]);
}

/// The draw of a waypoint says nothing about the draw of its endpoint.
#[test]
fn choices_in_a_row_do_not_fall_together() {
    let mut cart = service("cart", "/10.96.0.1", &[(80, 8080)]);
    let fronts = ["one", "two"];
    cart.weighted_waypoints = fronts
        .map(|name| WeightedWaypoint {
            destination: gateway(&format!("shop/{name}.shop"), 15008),
            weight: 1,
        })
        .to_vec();
    let services = fronts.map(|name| service(name, "/10.96.0.9", &[(15008, 15008)]));
    let pods = [("one", 11), ("one", 12), ("two", 21), ("two", 22)];
    let pods = pods.map(|(name, ip)| {
        let ip = format!("10.0.0.{ip}");
        endpoint_of(name, &ip, &ip, &[])
    });
    let mesh = snapshot(pods.to_vec(), [vec![cart], services.to_vec()].concat());
    let mut count: BTreeMap<IpAddr, u32> = BTreeMap::new();
    for dice in 0..1000 {
        let route = dial_with(&mesh, "10.96.0.1:80", dice).unwrap();
        *count.entry(route.upstream.ip()).or_default() += 1;
    }
    assert_eq!(count.len(), 4);
    assert!(count.values().all(|n| (200..300).contains(n)), "{count:?}");
}

/// Behaviour 49, and the port that a waypoint's service maps.
#[test]
fn a_waypoint_takes_hbone_where_its_service_or_its_app_tunnel_says() {
    let tunnel = |port| ApplicationTunnel {
        protocol: AppProtocol::Proxy,
        port,
    };
    for (ports, tunnel, want) in [
        (&[(15008, 15008)][..], None, Some(15008)),
        (&[(15008, 15010)][..], None, Some(15010)),
        (&[(80, 80)][..], Some(tunnel(Some(15088))), Some(15008)),
        (&[(80, 80)][..], Some(tunnel(None)), None),
        (&[(80, 80)][..], None, None),
    ] {
        let mut cart = service("cart", "/10.96.0.1", &[(80, 8080)]);
        cart.waypoint = Some(gateway("shop/waypoint.shop", 15008));
        let mut pod = waypoint_pod();
        pod.application_tunnel = tunnel;
        let front = service("waypoint", "/10.96.0.9", ports);
        let mesh = snapshot(vec![pod], vec![cart, front]);
        let got = dial(&mesh, "10.96.0.1:80");
        assert_eq!(
            got.ok().map(|route| route.upstream.port()),
            want,
            "{ports:?}"
        );
    }
}

/// A mesh of two networks: `cart` has an endpoint on this one, if `near`, and one on the other.
fn two_networks(change: impl FnOnce(&mut Workload, &mut Workload, &mut Service)) -> Snapshot {
    let mut near = endpoint("near", "10.0.0.2", &[]);
    let mut far = endpoint("far", "10.0.0.2", &[]);
    far.network = "far".into();
    far.network_gateway = Some(gateway("far/10.7.0.1", 15009));
    let mut entry = workload("entry", "10.7.0.1");
    entry.network = "far".into();
    let mut cart = service("cart", "/10.96.0.1", &[(80, 8080)]);
    cart.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/cart".into()];
    change(&mut near, &mut far, &mut cart);
    snapshot(vec![near, far, entry], vec![cart])
}

/// Behaviours 66, 67, 69 and 70.
#[test]
fn another_network_is_entered_by_its_gateway_or_not_at_all() {
    let double = "EndpointGateway 10.7.0.1:15009 for cart.shop:80 of cart inside entry";
    let local = "Endpoint 10.0.0.2:15008 for 10.0.0.2:8080 of cart+near";
    let nobody = "refused: service shop/cart.shop has no healthy endpoint for port 80";
    let network_first = |cart: &mut Service| {
        cart.load_balancer.mode = LoadBalancerMode::Failover;
        cart.load_balancer.routing_preferences = vec![RoutingScope::Network];
    };
    type Row<'a> = (
        u8,
        &'a dyn Fn(&mut Workload, &mut Workload, &mut Service),
        &'a str,
    );
    let rows: [Row<'_>; 7] = [
        (66, &|near, _, _| near.health = Health::Unhealthy, double),
        (
            66,
            &|near, far, _| (near.capacity, far.ips) = (0, vec![]),
            double,
        ),
        (70, &|_, _, cart| network_first(cart), local),
        (
            70,
            &|near, _, cart| {
                network_first(cart);
                near.health = Health::Unhealthy;
            },
            double,
        ),
        (
            69,
            &|near, far, _| (near.capacity, far.network_gateway) = (0, None),
            nobody,
        ),
        (
            69,
            &|near, far, _| {
                near.capacity = 0;
                far.network_gateway = Some(gateway("far/10.7.0.99", 15008));
            },
            "refused: network gateway far/10.7.0.99 is not in the mesh or has no healthy endpoint",
        ),
        (
            67,
            &|near, _, cart| {
                near.capacity = 0;
                cart.subject_alt_names = vec!["dns:cart".into()];
            },
            "refused: shop/cart.shop names no identity that its far end could prove",
        ),
    ];
    for (behaviour, change, want) in rows {
        let mesh = two_networks(change);
        for dice in 0..4 {
            let got = said(dial_with(&mesh, "10.96.0.1:80", dice));
            assert_eq!(got, want, "behaviour {behaviour}");
        }
    }
    // The far pod's address is not its own here: on this network it is the near one's.
    let got = said(dial(&two_networks(|_, _, _| ()), "10.0.0.2:80"));
    assert_eq!(got, "Workload 10.0.0.2:15008 for 10.0.0.2:80 of near");
}

/// Behaviour 71.
#[test]
fn a_gateway_by_host_name_is_a_service_with_a_port_of_its_own() {
    let mut far = endpoint("far", "10.0.0.4", &[]);
    far.network = "far".into();
    far.network_gateway = Some(gateway("shop/entry.shop", 15009));
    let mut cart = service("cart", "/10.96.0.1", &[(80, 8080)]);
    cart.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/cart".into()];
    let mut entry = service("entry", "/10.96.0.8", &[(15009, 15008)]);
    entry.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/gates".into()];
    let gates = ["10.7.0.1", "10.7.0.2"].map(|ip| {
        let mut gate = endpoint_of("entry", ip, ip, &[]);
        gate.network = "far".into();
        gate
    });
    let mesh = snapshot([vec![far], gates.to_vec()].concat(), vec![cart, entry]);
    let mut used = BTreeMap::new();
    for dice in 0..100 {
        let route = dial_with(&mesh, "10.96.0.1:80", dice).unwrap();
        let Hop::DoubleHbone { gateway, .. } = &route.hop else {
            panic!("{route}");
        };
        assert_eq!(gateway.len(), 2, "the service's identity and the pod's");
        assert_eq!(&*route.workload.unwrap().name, "far");
        *used.entry(route.upstream.to_string()).or_insert(0) += 1;
    }
    let used: Vec<_> = used.into_iter().collect();
    assert!(
        matches!(&used[..], [(a, m), (b, n)]
            if a == "10.7.0.1:15008" && b == "10.7.0.2:15008" && *m > 20 && *n > 20),
        "{used:?}"
    );
}

/// Behaviour 72.
#[test]
fn a_waypoint_on_another_network_is_reached_by_its_gateway() {
    let mut cart = service("cart", "/10.96.0.1", &[(80, 8080)]);
    cart.waypoint = Some(gateway("shop/waypoint.shop", 15008));
    let mut front = waypoint_service();
    front.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/front".into()];
    let mut pod = waypoint_pod();
    pod.network = "far".into();
    pod.network_gateway = Some(gateway("far/10.7.0.1", 15009));
    let mut entry = workload("entry", "10.7.0.1");
    entry.network = "far".into();
    let near = endpoint("cart", "10.0.0.2", &[]);
    let mesh = snapshot(
        vec![near.clone(), pod.clone(), entry.clone()],
        vec![cart, front.clone()],
    );
    assert_eq!(
        said(dial(&mesh, "10.96.0.1:80")),
        "ServiceWaypointGateway 10.7.0.1:15009 for cart.shop:80 of front inside entry"
    );
    // What is no service has no name to ask a gateway for.
    let mut behind = near;
    behind.waypoint = Some(gateway("shop/waypoint.shop", 15008));
    let mesh = snapshot(vec![behind, pod, entry], vec![front]);
    assert!(matches!(
        dial(&mesh, "10.0.0.2:80"),
        Err(Error::OtherNetwork(_))
    ));
}

/// Behaviours 51 and 52.
#[test]
fn failover_goes_from_group_to_group_and_across_networks_by_place() {
    let place = |name: &str, network: &str, region: &str, zone: &str| {
        let mut end = endpoint(name, "10.0.0.2", &[]);
        end.ips = vec![format!("10.0.1.{}", name.len()).parse().unwrap()];
        end.network = network.into();
        end.locality.region = region.into();
        end.locality.zone = zone.into();
        end.network_gateway = Some(gateway("far/10.7.0.1", 15009));
        end
    };
    let mut entry = workload("entry", "10.7.0.1");
    entry.network = "far".into();
    let mut cart = service("cart", "/10.96.0.1", &[(80, 8080)]);
    cart.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/cart".into()];
    cart.load_balancer.mode = LoadBalancerMode::Failover;
    cart.load_balancer.routing_preferences = vec![
        RoutingScope::Network,
        RoutingScope::Region,
        RoutingScope::Zone,
    ];
    let mut source = workload("web", "10.0.0.1");
    source.locality.region = "eu".into();
    source.locality.zone = "eu-1".into();
    // From the best to the worst; each time the best is gone, the next is used.
    let mut ends = vec![
        place("a", "", "eu", "eu-1"),
        place("ab", "", "eu", "eu-2"),
        place("abc", "", "us", "eu-1"),
        place("abcd", "far", "eu", "eu-1"),
        place("abcde", "far", "eu", "eu-2"),
        place("abcdef", "far", "us", "us-1"),
    ];
    while let Some(best) = ends.first().map(|end| Arc::clone(&end.name)) {
        let mesh = snapshot(
            [ends.clone(), vec![entry.clone()]].concat(),
            vec![cart.clone()],
        );
        for dice in 0..6 {
            let route = dial_from(&mesh, &source, "10.96.0.1:80", dice).unwrap();
            assert_eq!(route.workload.unwrap().name, best);
        }
        ends.remove(0);
    }
}

/// Behaviour 56.
#[test]
fn the_family_that_was_dialled_is_preferred_among_those_that_the_service_allows() {
    let both = ["10.0.0.2", "fd00::2"];
    for (families, vip, ips, want) in [
        (
            Some(IpFamilies::Dual),
            "fd01::1",
            &both[..],
            Some("fd00::2"),
        ),
        (
            Some(IpFamilies::Dual),
            "10.96.0.1",
            &both[..],
            Some("10.0.0.2"),
        ),
        (None, "fd01::1", &both[..], Some("fd00::2")),
        (
            Some(IpFamilies::Ipv6Only),
            "10.96.0.1",
            &both[..],
            Some("fd00::2"),
        ),
        (
            Some(IpFamilies::Ipv4Only),
            "fd01::1",
            &both[..],
            Some("10.0.0.2"),
        ),
        (None, "fd01::1", &both[..1], Some("10.0.0.2")),
        (Some(IpFamilies::Ipv6Only), "10.96.0.1", &both[..1], None),
    ] {
        let mut end = endpoint("cart", "10.0.0.2", &[]);
        end.ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let mut cart = service("cart", &format!("/{vip}"), &[(80, 8080)]);
        cart.ip_families = families;
        let vip: IpAddr = vip.parse().unwrap();
        let dialled = SocketAddr::new(vip, 80).to_string();
        let got = dial(&snapshot(vec![end], vec![cart]), &dialled).ok();
        let got = got.map(|route| route.upstream.ip().to_string());
        assert_eq!(got.as_deref(), want, "{families:?} by {vip}");
    }
}

/// Behaviour 57.
#[test]
fn of_services_with_one_vip_the_own_namespace_wins_then_the_canonical_one() {
    let one = |namespace: &str, canonical| {
        let mut one = service("cart", "/10.96.0.1", &[(80, 8080)]);
        one.key = format!("{namespace}/cart.shop").parse().unwrap();
        one.canonical = canonical;
        one
    };
    let mesh = snapshot(
        vec![],
        vec![one("a", false), one("b", true), one("c", false)],
    );
    for (from, want) in [("a", "a"), ("b", "b"), ("c", "c"), ("d", "b")] {
        let found = mesh.service_at("", "10.96.0.1".parse().unwrap(), from);
        assert_eq!(&*found.unwrap().key.namespace, want, "from {from}");
    }
}

/// Behaviour 61.
#[test]
fn a_workload_with_only_a_host_name_is_looked_up() {
    let mut external = endpoint("db", "10.0.0.2", &[]);
    external.ips.clear();
    external.hostname = "db.example".into();
    external.protocol = Protocol::Tcp;
    let cart = service("cart", "/10.96.0.1", &[(80, 3306)]);
    let mesh = snapshot(vec![external.clone()], vec![cart.clone()]);
    let source = workload("web", "10.0.0.1");
    let lookup = || match route(&mesh, &query(&source, "10.96.0.1:80", 1)).unwrap() {
        Found::Name(name) => name,
        Found::Route(route) => panic!("{route}"),
    };
    assert_eq!(&**lookup().name(), "db.example");
    for (answers, want) in [
        (&["192.0.2.1"][..], "192.0.2.1:3306"),
        (&["2001:db8::1", "192.0.2.1"][..], "192.0.2.1:3306"),
        (&["2001:db8::1"][..], "[2001:db8::1]:3306"),
    ] {
        let answers: Vec<IpAddr> = answers.iter().map(|ip| ip.parse().unwrap()).collect();
        let route = lookup().resolved(&answers).unwrap();
        assert_eq!((route.upstream, route.hop), (upstream(want), Hop::Plain));
    }
    let none = lookup().resolved(&[]);
    assert_eq!(none.unwrap_err(), Error::NoSuchName("db.example".into()));
    // In HBONE the address that was found is asked for.
    external.protocol = Protocol::Hbone;
    let mesh = snapshot(vec![external], vec![cart]);
    let Ok(Found::Name(name)) = route(&mesh, &query(&source, "10.96.0.1:80", 1)) else {
        panic!("no name");
    };
    let route = name.resolved(&["192.0.2.1".parse().unwrap()]);
    assert_eq!(
        said(route),
        "Endpoint 192.0.2.1:15008 for 192.0.2.1:3306 of db"
    );
}

#[test]
fn what_was_tried_is_left_out_and_then_there_is_nobody() {
    let ends = ["a", "b", "c"].map(|n| endpoint(n, &format!("10.0.0.{}", n.as_bytes()[0]), &[]));
    let mesh = snapshot(
        ends.to_vec(),
        vec![service("cart", "/10.96.0.1", &[(80, 80)])],
    );
    let source = workload("web", "10.0.0.1");
    let mut avoid = Vec::new();
    for left in (0..3).rev() {
        let query = crate::resolve::Query {
            avoid: &avoid,
            ..query(&source, "10.96.0.1:80", 5)
        };
        let Ok(Found::Route(route)) = route(&mesh, &query) else {
            panic!("{left} left");
        };
        avoid.push(Arc::clone(route.dialled().unwrap()));
    }
    let query = crate::resolve::Query {
        avoid: &avoid,
        ..query(&source, "10.96.0.1:80", 5)
    };
    assert!(matches!(
        route(&mesh, &query),
        Err(Error::NoEndpoint { .. })
    ));
    avoid.sort_by(|a, b| a.uid.cmp(&b.uid));
    avoid.dedup();
    assert_eq!(avoid.len(), 3, "each was tried once");
}

/// Every reason to leave an endpoint out is said, and the explanation ends as the route does.
#[test]
fn an_explanation_says_why_each_endpoint_was_left_out() {
    let mut ends: Vec<Workload> = ["good", "sick", "empty", "portless", "lost", "far", "other"]
        .iter()
        .enumerate()
        .map(|(n, name)| endpoint(name, &format!("10.0.1.{n}"), &[(80, 8080)]))
        .collect();
    ends[1].health = Health::Unhealthy;
    ends[2].capacity = 0;
    ends[3].services.insert(key("cart"), BTreeMap::new());
    ends[4].ips.clear();
    ends[5].network = "far".into();
    ends[6].node = "n2".into();
    let tried = endpoint("tried", "10.0.1.9", &[(80, 8080)]);
    let mut cart = service("cart", "/10.96.0.1", &[(80, 0)]);
    cart.load_balancer.mode = LoadBalancerMode::Strict;
    cart.load_balancer.routing_preferences = vec![RoutingScope::Node];
    let mesh = snapshot([ends, vec![tried.clone()]].concat(), vec![cart.clone()]);
    let source = workload("web", "10.0.0.1");
    let avoid = [Arc::new(tried)];
    let query = crate::resolve::Query {
        avoid: &avoid,
        ..query(&source, "10.96.0.1:80", 0)
    };
    let explanation = explain(&mesh, &query);
    assert_eq!(explanation.outcome, route(&mesh, &query));
    let [Step::Service(found), Step::Balanced { endpoints, .. }] = &explanation.steps[..] else {
        panic!("{explanation}");
    };
    assert_eq!(*found, cart.key);
    let fates: BTreeMap<_, _> = endpoints
        .iter()
        .map(|(uid, fate)| (&*uid.0, *fate))
        .collect();
    for (name, fate) in [
        ("good", Fate::Chosen),
        ("sick", Fate::LeftOut(LeftOut::Unhealthy)),
        ("empty", Fate::LeftOut(LeftOut::NoCapacity)),
        ("portless", Fate::LeftOut(LeftOut::NoPort)),
        ("lost", Fate::LeftOut(LeftOut::NoAddress)),
        ("far", Fate::LeftOut(LeftOut::NoGateway)),
        (
            "other",
            Fate::LeftOut(LeftOut::Elsewhere(RoutingScope::Node)),
        ),
        ("tried", Fate::LeftOut(LeftOut::Tried)),
    ] {
        assert_eq!(fates.get(name), Some(&fate), "{name}");
    }
    let text = explanation.to_string();
    for line in [
        "the address is a VIP of shop/cart.shop",
        "  sick: left out, unhealthy",
        "  other: left out, in another node",
        "  good: chosen",
        "endpoint: to 10.0.1.0:15008 by HBONE, asking for 10.0.1.0:8080",
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} in\n{text}");
    }
    // With preferences that only rank, the far ones are outranked.
    cart.load_balancer.mode = LoadBalancerMode::Failover;
    cart.load_balancer.health_policy = HealthPolicy::AllowAll;
    let mesh = snapshot(
        vec![endpoint("near", "10.0.1.1", &[(80, 80)]), {
            let mut far = endpoint("far", "10.0.1.2", &[(80, 80)]);
            far.node = "n2".into();
            far
        }],
        vec![cart],
    );
    let text = explain(&mesh, &query).to_string();
    assert!(text.contains("far: left out, others are nearer"), "{text}");
}

/// Services of which all but `other` have the waypoint at 10.0.0.9.
fn fronted() -> Vec<Service> {
    let reference = gateway("shop/waypoint.shop", 15008);
    let mut single = service("cart", "/10.96.0.1", &[(80, 8080)]);
    single.waypoint = Some(reference.clone());
    let mut shared = service("shared", "/10.96.0.2", &[(80, 8080)]);
    shared.weighted_waypoints = vec![WeightedWaypoint {
        destination: reference,
        weight: 1,
    }];
    let mut ranged = service("ranged", "/10.96.0.3", &[(80, 8080)]);
    ranged.cidr_vips = vec![("".into(), "10.97.0.0/16".parse().unwrap())];
    ranged.waypoint = Some(gateway("/10.96.0.9", 15008));
    let other = service("other", "/10.96.0.4", &[(80, 8080)]);
    vec![single, shared, ranged, other, waypoint_service()]
}

/// Where a request to this pod at 10.0.0.9 is delivered, and what its application is told.
fn ask(
    local: &Workload,
    services: Vec<Service>,
    asked: Asked,
) -> Result<(String, Option<SocketAddr>), Error> {
    let mut behind = workload("behind", "10.0.0.3");
    behind.waypoint = Some(gateway("/10.0.0.9", 15008));
    let mesh = snapshot(vec![local.clone(), behind], services);
    let query = InboundQuery {
        local,
        dialled: OrigDst::new(addr("10.0.0.9:15008")),
        asked,
        forwarded_host: None,
    };
    deliver(&mesh, &query).map(|found| (found.app.to_string(), found.announced))
}

fn by_ip(text: &str) -> Asked {
    Asked::Ip(addr(text))
}

fn by_name(name: &str) -> Asked {
    Asked::Host(name.to_owned(), 80)
}

/// Behaviour 79, and host names through a waypoint.
#[test]
fn a_pod_takes_connections_for_those_whose_waypoint_it_is() {
    let here = |port: u16| Ok((format!("10.0.0.9:{port}"), None));
    let plain = waypoint_pod();
    for (behaviour, asked, want) in [
        (79, by_ip("10.96.0.1:80"), here(80)),
        (79, by_ip("10.96.0.2:80"), here(80)),
        (79, by_ip("10.0.0.3:80"), here(80)),
        (79, by_ip("10.97.1.1:80"), here(80)),
        (79, by_name("cart.shop"), here(8080)),
        (82, by_ip("10.96.0.1:15006"), Err(Error::OwnPort(15006))),
    ] {
        let got = ask(&plain, fronted(), asked.clone());
        assert_eq!(got, want, "{behaviour}: {asked:?}");
    }
    let other = ask(&plain, fronted(), by_ip("10.96.0.4:80"));
    assert!(matches!(other, Err(Error::WrongPod { .. })));
    let other = ask(&plain, fronted(), by_name("other.shop"));
    assert!(matches!(other, Err(Error::UnknownHost { .. })));
}

/// Behaviours 80, 82 and 88.
#[test]
fn a_pod_with_an_application_tunnel_takes_connections_for_anybody() {
    let tunnelled = |protocol, port| {
        let mut pod = waypoint_pod();
        pod.application_tunnel = Some(ApplicationTunnel { protocol, port });
        pod
    };
    let proxy = tunnelled(AppProtocol::Proxy, Some(15088));
    let none = tunnelled(AppProtocol::None, None);
    let to_9000 = tunnelled(AppProtocol::None, Some(9000));
    let to_us = tunnelled(AppProtocol::None, Some(15008));
    let here = |port: u16| Ok((format!("10.0.0.9:{port}"), None));
    let told = |to: &str| Ok(("10.0.0.9:15088".to_owned(), Some(addr(to))));
    let vip = || by_ip("10.96.0.4:80");
    for (behaviour, local, asked, want) in [
        (80, &none, by_ip("203.0.113.7:443"), here(443)),
        (80, &to_9000, vip(), here(9000)),
        (88, &proxy, vip(), told("10.96.0.4:80")),
        (88, &proxy, by_name("other.shop"), told("10.96.0.4:80")),
        (
            82,
            &proxy,
            by_ip("10.96.0.4:15001"),
            Err(Error::OwnPort(15001)),
        ),
        (82, &to_us, vip(), Err(Error::OwnPort(15008))),
    ] {
        let got = ask(local, fronted(), asked.clone());
        assert_eq!(got, want, "{behaviour}: {asked:?}");
    }
    // A named port needs no target where one port takes all; an address to tell there must be.
    let mut services = fronted();
    services[3].ports = [(80, 0)].into();
    let named = ask(&proxy, services.clone(), by_name("other.shop"));
    assert_eq!(named, told("10.96.0.4:80"));
    services[3].vips.clear();
    let nowhere = ask(&proxy, services, by_name("other.shop"));
    assert!(matches!(nowhere, Err(Error::UnknownHost { .. })));
}

#[test]
fn only_what_dials_the_destination_itself_is_direct() {
    for rule in [
        Rule::Endpoint,
        Rule::EndpointGateway,
        Rule::PassthroughService,
        Rule::ServiceWaypoint,
        Rule::ServiceWaypointGateway,
        Rule::UnknownAddress,
        Rule::Workload,
        Rule::WorkloadWaypoint,
    ] {
        let direct = matches!(rule, Rule::Endpoint | Rule::Workload);
        assert_eq!(rule.is_direct(), direct, "{rule:?}");
    }
}
