//! Each field of a resource: what becomes of it, and what refuses the resource.

use prost::Message as _;

use super::*;
use crate::model::{Health, NetworkMode, Protocol, Scope, StringMatch};
use crate::proto::workload::gateway_address::Destination;

fn workload() -> wire::Workload {
    wire::Workload {
        uid: "Kubernetes//Pod/default/a1".into(),
        name: "a1".into(),
        namespace: "default".into(),
        addresses: vec![Bytes::from_static(&[10, 1, 0, 1])],
        tunnel_protocol: 1,
        ..wire::Workload::default()
    }
}

fn service() -> wire::Service {
    wire::Service {
        name: "a".into(),
        namespace: "default".into(),
        hostname: "a.default.svc.cluster.local".into(),
        ..wire::Service::default()
    }
}

fn take(value: Type) -> Result<Change, Rejected> {
    let message = wire::Address {
        r#type: Some(value),
    };
    address(
        &mut Interner::default(),
        Some(message.encode_to_vec().into()),
    )
}

fn taken(from: wire::Workload) -> Arc<Workload> {
    match take(Type::Workload(from)).unwrap() {
        Change::Workload(workload) => workload,
        other => panic!("{other:?}"),
    }
}

fn policy(from: &security::Authorization) -> Result<Change, Rejected> {
    authorization(&mut Interner::default(), Some(from.encode_to_vec().into()))
}

// B040.
#[test]
fn what_the_control_plane_leaves_out_has_its_default() {
    let workload = taken(workload());
    let id = workload.identity.as_ref().unwrap().to_string();
    assert_eq!(id, "spiffe://cluster.local/ns/default/sa/default");
    assert_eq!(
        (workload.capacity, &*workload.cluster_id),
        (1, "Kubernetes")
    );
    assert_eq!(&*workload.workload_type, "deployment");
    assert_eq!(workload.protocol, Protocol::Hbone);
}

#[test]
fn every_field_of_a_workload_arrives() {
    let from = wire::Workload {
        network: "n".into(),
        trust_domain: "td".into(),
        service_account: "sa".into(),
        node: "node".into(),
        canonical_name: "canon".into(),
        canonical_revision: "v1".into(),
        workload_type: 2,
        workload_name: "owner".into(),
        native_tunnel: true,
        authorization_policies: vec!["ns/policy".into()],
        status: 1,
        cluster_id: "c".into(),
        hostname: "host".into(),
        network_mode: 1,
        capacity: Some(0),
        services: [(
            "default/a.default.svc.cluster.local".to_owned(),
            wire::PortList {
                ports: vec![
                    wire::Port {
                        service_port: 80,
                        target_port: 8080,
                    },
                    wire::Port {
                        service_port: 81,
                        target_port: 0,
                    },
                ],
            },
        )]
        .into(),
        locality: Some(wire::Locality {
            region: "r".into(),
            zone: "z".into(),
            subzone: "s".into(),
        }),
        waypoint: Some(wire::GatewayAddress {
            destination: Some(Destination::Address(wire::NetworkAddress {
                network: "n".into(),
                address: Bytes::from_static(&[10, 0, 0, 9]),
                length: None,
            })),
            hbone_mtls_port: 15008,
        }),
        application_tunnel: Some(wire::ApplicationTunnel {
            protocol: 1,
            port: 15088,
        }),
        ..workload()
    };
    let workload = taken(from);
    assert_eq!(
        workload.identity.as_ref().unwrap().to_string(),
        "spiffe://td/ns/default/sa/sa"
    );
    assert_eq!((workload.health, workload.capacity), (Health::Unhealthy, 0));
    assert_eq!(workload.network_mode, NetworkMode::HostNetwork);
    assert_eq!(&*workload.workload_type, "pod");
    assert_eq!(workload.authorization_policies[0].to_string(), "ns/policy");
    let ports: Vec<_> = workload.services.values().next().unwrap().iter().collect();
    assert_eq!(
        ports,
        [(&80, &8080)],
        "a named port that is not there serves nothing"
    );
    assert_eq!(&*workload.locality.subzone, "s");
    assert_eq!(workload.waypoint.as_ref().unwrap().hbone_mtls_port, 15008);
    assert_eq!(workload.application_tunnel.unwrap().port, Some(15088));
}

// B038, B039.
#[test]
#[expect(clippy::too_many_lines, reason = "a table, one entry a case")]
fn a_workload_that_makes_no_sense_is_refused_by_its_field() {
    let gateway = |port, destination| {
        Some(wire::GatewayAddress {
            destination,
            hbone_mtls_port: port,
        })
    };
    let host = Some(Destination::Hostname(wire::NamespacedHostname {
        namespace: "n".into(),
        hostname: "h".into(),
    }));
    let list = |service_port, target_port| wire::PortList {
        ports: vec![wire::Port {
            service_port,
            target_port,
        }],
    };
    let served = |key: &str, ports| [(key.to_owned(), ports)].into();
    for (field, from) in [
        (
            "uid",
            wire::Workload {
                uid: String::new(),
                ..workload()
            },
        ),
        (
            "tunnel_protocol",
            wire::Workload {
                tunnel_protocol: 2,
                ..workload()
            },
        ),
        (
            "tunnel_protocol",
            wire::Workload {
                tunnel_protocol: 9,
                ..workload()
            },
        ),
        (
            "addresses",
            wire::Workload {
                addresses: vec![Bytes::from_static(&[1; 5])],
                ..workload()
            },
        ),
        (
            "status",
            wire::Workload {
                status: 7,
                ..workload()
            },
        ),
        (
            "network_mode",
            wire::Workload {
                network_mode: 7,
                ..workload()
            },
        ),
        (
            "trust_domain",
            wire::Workload {
                trust_domain: "a/b".into(),
                ..workload()
            },
        ),
        (
            "namespace",
            wire::Workload {
                namespace: String::new(),
                ..workload()
            },
        ),
        (
            "service_account",
            wire::Workload {
                service_account: "ä".into(),
                ..workload()
            },
        ),
        (
            "waypoint",
            wire::Workload {
                waypoint: gateway(15008, None),
                ..workload()
            },
        ),
        (
            "waypoint",
            wire::Workload {
                waypoint: gateway(70_000, host.clone()),
                ..workload()
            },
        ),
        (
            "network_gateway",
            wire::Workload {
                network_gateway: gateway(0, host),
                ..workload()
            },
        ),
        (
            "authorization_policies",
            wire::Workload {
                authorization_policies: vec!["x".into()],
                ..workload()
            },
        ),
        (
            "services",
            wire::Workload {
                services: served("no-slash", list(1, 1)),
                ..workload()
            },
        ),
        (
            "services",
            wire::Workload {
                services: served("a/b", list(65_616, 1)),
                ..workload()
            },
        ),
        (
            "services",
            wire::Workload {
                services: served("a/b", list(1, 65_616)),
                ..workload()
            },
        ),
    ] {
        let why = take(Type::Workload(from)).unwrap_err().to_string();
        assert!(why.starts_with(field), "{field}: {why}");
    }
}

#[test]
fn an_address_of_a_service_is_a_vip_or_a_range() {
    let at = |bytes: &'static [u8], length| wire::NetworkAddress {
        network: "n".into(),
        address: Bytes::from_static(bytes),
        length,
    };
    let from = wire::Service {
        addresses: vec![
            at(&[10, 0, 0, 1], None),
            at(&[10, 0, 0, 2], Some(32)),
            at(&[10, 1, 0, 0], Some(24)),
        ],
        ..service()
    };
    let Change::Service(service) = take(Type::Service(from)).unwrap() else {
        panic!("a service");
    };
    assert_eq!(service.vips.len(), 2);
    assert_eq!(service.cidr_vips[0].1.to_string(), "10.1.0.0/24");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table, one entry a case")]
fn a_service_that_makes_no_sense_is_refused_by_its_field() {
    let balancing = |scope, mode, health_policy| {
        Some(wire::LoadBalancing {
            routing_preference: vec![scope],
            mode,
            health_policy,
        })
    };
    let address = wire::NetworkAddress {
        address: Bytes::from_static(&[10, 0, 0, 0]),
        length: Some(33),
        ..wire::NetworkAddress::default()
    };
    for (field, from) in [
        (
            "hostname",
            wire::Service {
                hostname: String::new(),
                ..service()
            },
        ),
        (
            "hostname",
            wire::Service {
                hostname: "a/b".into(),
                ..service()
            },
        ),
        (
            "hostname",
            wire::Service {
                namespace: "a/b".into(),
                ..service()
            },
        ),
        (
            "addresses",
            wire::Service {
                addresses: vec![address],
                ..service()
            },
        ),
        (
            "ports",
            wire::Service {
                ports: vec![wire::Port {
                    service_port: 0,
                    target_port: 1,
                }],
                ..service()
            },
        ),
        (
            "load_balancing",
            wire::Service {
                load_balancing: balancing(0, 0, 0),
                ..service()
            },
        ),
        (
            "load_balancing",
            wire::Service {
                load_balancing: balancing(1, 9, 0),
                ..service()
            },
        ),
        (
            "load_balancing",
            wire::Service {
                load_balancing: balancing(1, 0, 9),
                ..service()
            },
        ),
        (
            "weighted_waypoints",
            wire::Service {
                weighted_waypoints: vec![wire::WeightedWaypoint::default()],
                ..service()
            },
        ),
    ] {
        let why = take(Type::Service(from)).unwrap_err().to_string();
        assert!(why.starts_with(field), "{field}: {why}");
    }
}

fn authorized(from: security::Match) -> security::Authorization {
    security::Authorization {
        name: "p".into(),
        namespace: "default".into(),
        scope: 2,
        rules: vec![security::Rule {
            clauses: vec![security::Clause {
                matches: vec![from],
            }],
        }],
        ..security::Authorization::default()
    }
}

#[test]
fn a_policy_keeps_its_rules_clauses_and_matches() {
    use security::string_match::MatchType;
    let text = |kind| security::StringMatch {
        match_type: Some(kind),
    };
    let from = authorized(security::Match {
        principals: vec![
            text(MatchType::Suffix("/sa/a2".into())),
            text(MatchType::Presence(())),
        ],
        not_source_ips: vec![security::Address {
            address: Bytes::from_static(&[10, 0, 0, 0]),
            length: 8,
        }],
        destination_ports: vec![8080],
        ..security::Match::default()
    });
    let Change::Policy(policy) = policy(&from).unwrap() else {
        panic!("a policy");
    };
    assert_eq!(
        (policy.key.to_string(), policy.scope),
        ("default/p".into(), Scope::WorkloadSelector)
    );
    let only = &policy.rules[0].clauses[0].matches[0];
    assert_eq!(
        only.principals,
        [StringMatch::Suffix("/sa/a2".into()), StringMatch::Presence]
    );
    assert_eq!(only.not_source_ips[0].to_string(), "10.0.0.0/8");
    assert_eq!(only.destination_ports, [8080]);
}

// B043, and better: the policy is refused, not applied without the condition.
#[test]
fn a_condition_that_cannot_be_read_refuses_the_whole_policy() {
    let address = |bytes: &'static [u8], length| security::Address {
        address: Bytes::from_static(bytes),
        length,
    };
    for (field, from) in [
        (
            "source_ips",
            security::Match {
                source_ips: vec![address(&[1, 2, 3], 8)],
                ..security::Match::default()
            },
        ),
        (
            "source_ips",
            security::Match {
                source_ips: vec![address(&[1, 2, 3, 4], 288)],
                ..security::Match::default()
            },
        ),
        (
            "destination_ports",
            security::Match {
                destination_ports: vec![65_616],
                ..security::Match::default()
            },
        ),
        (
            "principals",
            security::Match {
                principals: vec![security::StringMatch::default()],
                ..security::Match::default()
            },
        ),
    ] {
        let why = policy(&authorized(from)).unwrap_err().to_string();
        assert!(why.starts_with(field), "{why}");
    }
    for from in [
        security::Authorization {
            scope: 5,
            ..authorized(security::Match::default())
        },
        security::Authorization {
            action: 5,
            ..authorized(security::Match::default())
        },
        security::Authorization {
            name: String::new(),
            ..authorized(security::Match::default())
        },
    ] {
        assert!(policy(&from).is_err(), "{from:?}");
    }
}

#[test]
fn garbage_is_refused() {
    let mut interner = Interner::default();
    assert!(matches!(
        address(&mut interner, None),
        Err(Rejected::Nothing)
    ));
    assert!(matches!(
        address(&mut interner, Some(Bytes::new())),
        Err(Rejected::Nothing)
    ));
    let garbage = Bytes::from_static(&[0xff; 7]);
    assert!(matches!(
        address(&mut interner, Some(garbage.clone())),
        Err(Rejected::Decode(_))
    ));
    assert!(matches!(
        authorization(&mut interner, Some(garbage)),
        Err(Rejected::Decode(_))
    ));
}

// B037.
#[test]
fn fields_and_extensions_that_are_not_known_are_passed_over() {
    let mut message = wire::Address {
        r#type: Some(Type::Workload(workload())),
    }
    .encode_to_vec();
    // Field 26 of the workload, an extension, goes inside; field 99 beside it.
    let mut inner = workload().encode_to_vec();
    inner.extend([0xd2, 0x01, 0x03, 0x0a, 0x01, b'x']);
    let mut outer = vec![0x0a, u8::try_from(inner.len()).unwrap()];
    outer.extend(inner);
    let mut interner = Interner::default();
    address(&mut interner, Some(outer.into())).unwrap();
    message.extend([0x9a, 0x06, 0x01, 0x00]);
    address(&mut interner, Some(message.into())).unwrap();
}
