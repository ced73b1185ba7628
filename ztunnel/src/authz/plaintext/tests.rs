//! Whatever is dropped unseen would have been refused.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::authz::check;
use crate::authz::testing::{anonymous, global, principal, rule, workload};
use crate::model::{
    Clause, ClientAddr, Flow, Match, OrigDst, Policy, Rule, ServiceAccountMatch, StringMatch,
};

fn verdict(policies: Vec<Policy>) -> PlaintextVerdict {
    let policies = Policies::new(policies.into_iter().map(Arc::new));
    plaintext_verdict(&policies, &workload("shop", &[]))
}

fn strict_but(port: u16) -> Rule {
    let elsewhere = Match {
        not_destination_ports: vec![port],
        ..Match::default()
    };
    let matches = [anonymous(), elsewhere];
    Rule {
        clauses: matches.map(|m| Clause { matches: vec![m] }).into(),
    }
}

#[test]
fn drop_needs_a_proof_for_every_address_and_port() {
    let needs_identity = || rule(vec![principal(StringMatch::Presence)]);
    let port = |port| Match {
        destination_ports: vec![port],
        ..Match::default()
    };
    let deny = |rules| global("r/d", Action::Deny, rules);
    let allow = |key, rules| global(key, Action::Allow, rules);
    let on_trial = |policy: Policy| Policy {
        dry_run: true,
        ..policy
    };
    use PlaintextVerdict::{Drop, Proxy};
    for (what, policies, want) in [
        ("nothing", vec![], Proxy),
        ("STRICT", vec![deny(vec![rule(vec![anonymous()])])], Drop),
        (
            "STRICT on trial",
            vec![on_trial(deny(vec![rule(vec![anonymous()])]))],
            Proxy,
        ),
        (
            "STRICT but one port",
            vec![deny(vec![strict_but(9090)])],
            Proxy,
        ),
        (
            "DENY for one port",
            vec![deny(vec![rule(vec![port(80)])])],
            Proxy,
        ),
        (
            "DENY for everybody",
            vec![deny(vec![Rule::default()])],
            Drop,
        ),
        ("DENY without rules", vec![deny(vec![])], Proxy),
        (
            "ALLOW for an identity",
            vec![allow("r/a", vec![needs_identity()])],
            Drop,
        ),
        (
            "ALLOW for an identity on trial",
            vec![on_trial(allow("r/a", vec![needs_identity()]))],
            Proxy,
        ),
        (
            "ALLOW for an identity, another for a port",
            vec![
                allow("r/a", vec![needs_identity()]),
                allow("r/b", vec![rule(vec![port(80)])]),
            ],
            Proxy,
        ),
        (
            "ALLOW for an identity or a port",
            vec![allow(
                "r/a",
                vec![rule(vec![principal(StringMatch::Presence), port(80)])],
            )],
            Proxy,
        ),
        ("ALLOW without rules", vec![allow("r/a", vec![])], Drop),
        (
            "ALLOW for everybody",
            vec![allow("r/a", vec![Rule::default()])],
            Proxy,
        ),
    ] {
        assert_eq!(verdict(policies), want, "{what}");
    }
}

#[test]
fn a_missing_policy_drops_plaintext() {
    let lost = workload("shop", &["shop/lost"]);
    let got = plaintext_verdict(&Policies::default(), &lost);
    assert_eq!(got, PlaintextVerdict::Drop);
}

fn strings() -> impl Strategy<Value = Vec<StringMatch>> {
    let text = || prop::sample::select(vec!["", "shop", "td/ns/shop/sa/web", "b"]);
    vec(
        prop_oneof![
            text().prop_map(|t| StringMatch::Exact(t.into())),
            text().prop_map(|t| StringMatch::Prefix(t.into())),
            text().prop_map(|t| StringMatch::Suffix(t.into())),
            Just(StringMatch::Presence),
        ],
        0..2,
    )
}

fn accounts() -> impl Strategy<Value = Vec<ServiceAccountMatch>> {
    let account = ServiceAccountMatch {
        namespace: "shop".into(),
        service_account: "web".into(),
    };
    vec(Just(account), 0..2)
}

fn nets() -> impl Strategy<Value = Vec<ipnet::IpNet>> {
    let nets = ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.1/32", "::/0"];
    vec(
        prop::sample::select(nets.to_vec()).prop_map(|net| net.parse().unwrap()),
        0..2,
    )
}

fn ports() -> impl Strategy<Value = Vec<u16>> {
    vec(0_u16..3, 0..2)
}

prop_compose! {
    fn any_match()(
        names in (strings(), strings(), strings(), strings()),
        accounts in (accounts(), accounts()),
        nets in (nets(), nets(), nets(), nets()),
        ports in (ports(), ports()),
        kept in 0_u16..0x1000,
    ) -> Match {
        fn keep<T>(list: Vec<T>, kept: u16, bit: u16) -> Vec<T> {
            if kept & (1 << bit) == 0 { Vec::new() } else { list }
        }
        Match {
            namespaces: keep(names.0, kept, 0),
            not_namespaces: keep(names.1, kept, 1),
            principals: keep(names.2, kept, 2),
            not_principals: keep(names.3, kept, 3),
            service_accounts: keep(accounts.0, kept, 4),
            not_service_accounts: keep(accounts.1, kept, 5),
            source_ips: keep(nets.0, kept & kept >> 1, 6),
            not_source_ips: keep(nets.1, kept & kept >> 1, 7),
            destination_ips: keep(nets.2, kept & kept >> 1, 8),
            not_destination_ips: keep(nets.3, kept & kept >> 1, 9),
            destination_ports: keep(ports.0, kept & kept >> 1, 10),
            not_destination_ports: keep(ports.1, kept & kept >> 1, 11),
        }
    }
}

fn any_policies() -> impl Strategy<Value = Vec<Policy>> {
    let clause = vec(any_match(), 0..3).prop_map(|matches| Clause { matches });
    let rule = vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    let policy = (any::<bool>(), any::<bool>(), vec(rule, 0..3));
    vec(policy, 0..4).prop_map(|policies| {
        let policies = policies.into_iter().enumerate();
        policies
            .map(|(number, (allow, dry_run, rules))| Policy {
                dry_run,
                ..global(
                    &format!("r/{number}"),
                    if allow { Action::Allow } else { Action::Deny },
                    rules,
                )
            })
            .collect()
    })
}

fn any_addr() -> impl Strategy<Value = SocketAddr> {
    (prop_oneof![9_u8..12, any::<u8>()], 0_u8..3, 0_u16..4)
        .prop_map(|(first, last, port)| SocketAddr::from((Ipv4Addr::new(first, 0, 0, last), port)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_is_dropped_would_have_been_refused(
        policies in any_policies(),
        flows in vec((any_addr(), any_addr()), 16),
        names_lost in prop::bool::weighted(0.05),
    ) {
        let policies = Policies::new(policies.into_iter().map(Arc::new));
        let names: &[&str] = if names_lost { &["r/lost"] } else { &[] };
        let workload = workload("shop", names);
        if plaintext_verdict(&policies, &workload) == PlaintextVerdict::Drop {
            for (source, destination) in flows {
                let flow = Flow {
                    source: ClientAddr::new(source),
                    source_identity: None,
                    destination: OrigDst::new(destination),
                };
                prop_assert!(check(&policies, &workload, &flow).is_err(), "{flow:?}");
            }
        }
    }
}
