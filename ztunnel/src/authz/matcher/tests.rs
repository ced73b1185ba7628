//! Which answer each field, each level and each emptiness gives.

use super::*;
use crate::authz::testing::{anonymous, flow, global, principal, rule};
use crate::model::{Action, ClientAddr, OrigDst};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const OTHER_DOMAIN: &str = "spiffe://other.example/ns/shop/sa/web";
const BANK: &str = "spiffe://cluster.local/ns/bank/sa/teller";
const NONE: &str = "";

fn matches(rules: Vec<Rule>, flow: &Flow) -> bool {
    let policy = global("root/p", Action::Allow, rules);
    match super::policy(&policy, &Facts::of(flow)) {
        Answer::No => false,
        Answer::Unknown => panic!("unknown, although everything is known of {flow:?}"),
        Answer::Yes => true,
    }
}

fn one(wanted: Match, flow: &Flow) -> bool {
    matches(vec![rule(vec![wanted])], flow)
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn prefix(text: &str) -> StringMatch {
    StringMatch::Prefix(text.into())
}

fn suffix(text: &str) -> StringMatch {
    StringMatch::Suffix(text.into())
}

#[test]
fn emptiness_means_something_at_every_level() {
    let web = flow(WEB);
    let clause = |matches| Clause { matches };
    let rule_of = |clauses| Rule { clauses };
    let hit = || principal(StringMatch::Presence);
    for (what, rules, want) in [
        ("no rules", vec![], false),
        ("a rule without clauses", vec![rule_of(vec![])], true),
        (
            "a clause without matches",
            vec![rule_of(vec![clause(vec![])])],
            true,
        ),
        (
            "a clause of an empty match",
            vec![rule_of(vec![clause(vec![Match::default()])])],
            false,
        ),
        (
            "a clause of empty matches",
            vec![rule_of(vec![clause(vec![
                Match::default(),
                Match::default(),
            ])])],
            false,
        ),
        (
            "an empty match beside one that holds",
            vec![rule_of(vec![clause(vec![Match::default(), hit()])])],
            true,
        ),
        (
            "an empty clause beside one that fails",
            vec![rule_of(vec![
                clause(vec![]),
                clause(vec![Match::default()]),
            ])],
            false,
        ),
        (
            "a rule that fails beside one that holds",
            vec![
                rule_of(vec![clause(vec![Match::default()])]),
                rule_of(vec![]),
            ],
            true,
        ),
    ] {
        assert_eq!(matches(rules, &web), want, "{what}");
    }
}

#[test]
fn principals_match_proven_identities_and_never_plaintext() {
    for (wanted, web, other_domain, bank) in [
        (exact("cluster.local/ns/shop/sa/web"), true, false, false),
        (prefix("cluster.local/ns/shop/"), true, false, false),
        (suffix("/sa/web"), true, true, false),
        (StringMatch::Presence, true, true, true),
        (
            exact("spiffe://cluster.local/ns/shop/sa/web"),
            false,
            false,
            false,
        ),
        (exact(""), false, false, false),
        (prefix(""), true, true, true),
        (suffix(""), true, true, true),
    ] {
        for (identity, want) in [
            (WEB, web),
            (OTHER_DOMAIN, other_domain),
            (BANK, bank),
            (NONE, false),
        ] {
            let got = one(principal(wanted.clone()), &flow(identity));
            assert_eq!(got, want, "{wanted:?} on {identity:?}");
        }
    }
}

#[test]
fn not_principals_presence_matches_only_plaintext() {
    assert!(one(anonymous(), &flow(NONE)));
    assert!(!one(anonymous(), &flow(WEB)));
}

#[test]
fn a_negated_list_forbids_each_of_its_values() {
    let wanted = Match {
        not_principals: vec![suffix("/sa/web"), suffix("/sa/teller")],
        ..Match::default()
    };
    for (identity, want) in [
        (WEB, false),
        (BANK, false),
        ("spiffe://cluster.local/ns/shop/sa/cart", true),
        (NONE, true),
    ] {
        assert_eq!(one(wanted.clone(), &flow(identity)), want, "{identity}");
    }
}

#[test]
fn namespaces_compare_with_the_identity_and_plaintext_has_the_empty_one() {
    for (wanted, web, bank, none) in [
        (exact("shop"), true, false, false),
        (prefix("sh"), true, false, false),
        (suffix("nk"), false, true, false),
        (StringMatch::Presence, true, true, false),
        (exact(""), false, false, true),
    ] {
        for (identity, want) in [(WEB, web), (BANK, bank), (NONE, none)] {
            let positive = Match {
                namespaces: vec![wanted.clone()],
                ..Match::default()
            };
            let negative = Match {
                not_namespaces: vec![wanted.clone()],
                ..Match::default()
            };
            let flow = flow(identity);
            assert_eq!(one(positive, &flow), want, "{wanted:?} on {identity:?}");
            assert_eq!(
                one(negative, &flow),
                !want,
                "not {wanted:?} on {identity:?}"
            );
        }
    }
}

#[test]
fn service_accounts_ignore_the_trust_domain() {
    let account = ServiceAccountMatch {
        namespace: "shop".into(),
        service_account: "web".into(),
    };
    for (identity, want) in [
        (WEB, true),
        (OTHER_DOMAIN, true),
        (BANK, false),
        ("spiffe://cluster.local/ns/bank/sa/web", false),
        ("spiffe://cluster.local/ns/shop/sa/cart", false),
        (NONE, false),
    ] {
        let positive = Match {
            service_accounts: vec![account.clone()],
            ..Match::default()
        };
        let negative = Match {
            not_service_accounts: vec![account.clone()],
            ..Match::default()
        };
        assert_eq!(one(positive, &flow(identity)), want, "{identity:?}");
        assert_eq!(one(negative, &flow(identity)), !want, "not {identity:?}");
    }
}

#[test]
fn addresses_match_by_network_and_family() {
    let net = |text: &str| vec![text.parse().unwrap()];
    for (source, wanted, want) in [
        ("10.1.2.3:1", "10.0.0.0/8", true),
        ("11.1.2.3:1", "10.0.0.0/8", false),
        ("10.1.2.3:1", "10.1.2.3/32", true),
        ("10.1.2.3:1", "0.0.0.0/0", true),
        ("10.1.2.3:1", "::/0", false),
        ("[fd00::1]:1", "fd00::/8", true),
        ("[fd00::1]:1", "0.0.0.0/0", false),
        ("[::ffff:10.1.2.3]:1", "10.0.0.0/8", true),
    ] {
        let from = Flow {
            source: ClientAddr::new(source.parse().unwrap()),
            ..flow(WEB)
        };
        let to = Flow {
            destination: OrigDst::new(source.parse().unwrap()),
            ..flow(WEB)
        };
        let base = Match::default;
        for (what, wanted_match, flow, want) in [
            (
                "source",
                Match {
                    source_ips: net(wanted),
                    ..base()
                },
                &from,
                want,
            ),
            (
                "not source",
                Match {
                    not_source_ips: net(wanted),
                    ..base()
                },
                &from,
                !want,
            ),
            (
                "destination",
                Match {
                    destination_ips: net(wanted),
                    ..base()
                },
                &to,
                want,
            ),
            (
                "not destination",
                Match {
                    not_destination_ips: net(wanted),
                    ..base()
                },
                &to,
                !want,
            ),
        ] {
            assert_eq!(one(wanted_match, flow), want, "{what} {source} in {wanted}");
        }
    }
}

#[test]
fn ports_compare_with_the_target_port() {
    for (ports, want) in [
        (vec![8080], true),
        (vec![80, 8080], true),
        (vec![80], false),
    ] {
        let positive = Match {
            destination_ports: ports.clone(),
            ..Match::default()
        };
        let negative = Match {
            not_destination_ports: ports.clone(),
            ..Match::default()
        };
        assert_eq!(one(positive, &flow(NONE)), want, "{ports:?}");
        assert_eq!(one(negative, &flow(NONE)), !want, "not {ports:?}");
    }
}

#[test]
fn a_field_and_its_negation_never_match_together() {
    let wanted = Match {
        namespaces: vec![exact("shop")],
        not_namespaces: vec![exact("shop")],
        ..Match::default()
    };
    for identity in [WEB, BANK, NONE] {
        assert!(!one(wanted.clone(), &flow(identity)), "{identity:?}");
    }
}

#[test]
fn fields_are_anded_values_ored_matches_ored_clauses_anded() {
    let shop_web = Match {
        namespaces: vec![exact("shop"), exact("mall")],
        principals: vec![suffix("/sa/web")],
        ..Match::default()
    };
    let bank = Match {
        namespaces: vec![exact("bank")],
        ..Match::default()
    };
    let port = Match {
        destination_ports: vec![8080],
        ..Match::default()
    };
    let either = vec![shop_web, bank];
    for (identity, want) in [
        (WEB, true),
        (BANK, true),
        ("spiffe://cluster.local/ns/shop/sa/cart", false),
        ("spiffe://cluster.local/ns/mall/sa/web", true),
        (NONE, false),
    ] {
        assert_eq!(
            matches(vec![rule(either.clone())], &flow(identity)),
            want,
            "{identity:?}"
        );
    }
    let both = Rule {
        clauses: vec![
            Clause { matches: either },
            Clause {
                matches: vec![port],
            },
        ],
    };
    let elsewhere = Flow {
        destination: OrigDst::new("10.0.0.2:9090".parse().unwrap()),
        ..flow(WEB)
    };
    assert!(matches(vec![both.clone()], &flow(WEB)));
    assert!(!matches(vec![both], &elsewhere), "the second clause fails");
}

#[test]
fn an_open_place_leaves_only_questions_of_place_open() {
    let place = Match {
        destination_ports: vec![80],
        ..Match::default()
    };
    let exempted = Match {
        not_principals: vec![StringMatch::Presence],
        not_destination_ports: vec![9090],
        ..Match::default()
    };
    let identity_at_place = Match {
        principals: vec![StringMatch::Presence],
        destination_ports: vec![80],
        ..Match::default()
    };
    for (wanted, want) in [
        (anonymous(), Answer::Yes),
        (principal(StringMatch::Presence), Answer::No),
        (place, Answer::Unknown),
        (exempted, Answer::Unknown),
        (identity_at_place, Answer::No),
        (Match::default(), Answer::No),
    ] {
        let policy = global("root/p", Action::Deny, vec![rule(vec![wanted.clone()])]);
        assert_eq!(
            super::policy(&policy, &Facts::anonymous()),
            want,
            "{wanted:?}"
        );
    }
}
