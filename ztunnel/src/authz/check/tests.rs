//! Who is admitted and refused, by which policy, and what the policies on trial say.

use std::sync::Arc;

use super::*;
use crate::authz::testing::{anonymous, flow, global, policy, principal, rule, workload};
use crate::model::{Match, Policy, Rule, Scope, StringMatch};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn everybody() -> Vec<Rule> {
    vec![Rule::default()]
}

fn web() -> Vec<Rule> {
    let wanted = StringMatch::Exact("cluster.local/ns/shop/sa/web".into());
    vec![rule(vec![principal(wanted)])]
}

fn allow(key: &str, rules: Vec<Rule>) -> Policy {
    global(key, Action::Allow, rules)
}

fn deny(key: &str, rules: Vec<Rule>) -> Policy {
    global(key, Action::Deny, rules)
}

fn on_trial(policy: Policy) -> Policy {
    Policy {
        dry_run: true,
        ..policy
    }
}

/// The judgement in a few words.
fn judge(policies: &[Policy], identity: &str) -> String {
    let policies = Policies::new(policies.iter().cloned().map(Arc::new));
    let (words, dry_run) = match check(&policies, &workload("shop", &[]), &flow(identity)) {
        Ok(verdict) => {
            let by = verdict.allowed_by.as_ref().map(ToString::to_string);
            (format!("allow {}", by.unwrap_or_default()), verdict.dry_run)
        }
        Err(denied) => {
            let words = match &denied {
                Denied::ByPolicy { policy, .. } => format!("deny {policy}"),
                Denied::NoAllow { .. } => "deny".to_owned(),
                Denied::PolicyMissing { policy, .. } => format!("missing {policy}"),
            };
            (words, denied.dry_run().to_vec())
        }
    };
    let trial: String = dry_run
        .iter()
        .map(|outcome| match outcome {
            DryRun::Denied(policy) => format!(", would deny {policy}"),
            DryRun::NoAllow => ", would deny".to_owned(),
        })
        .collect();
    format!("{}{trial}", words.trim_end())
}

#[test]
fn deny_wins_then_one_allow_must_match_if_any_exists() {
    let cases: &[(&str, &[Policy], &str, &str)] = &[
        ("no policy", &[], "allow", "allow"),
        (
            "an ALLOW for one",
            &[allow("r/a", web())],
            "allow r/a",
            "deny",
        ),
        (
            "ALLOW and DENY match the same",
            &[allow("r/a", everybody()), deny("r/d", web())],
            "deny r/d",
            "allow r/a",
        ),
        (
            "a DENY that does not match",
            &[deny("r/d", web())],
            "deny r/d",
            "allow",
        ),
        (
            "an ALLOW without rules",
            &[allow("r/a", vec![])],
            "deny",
            "deny",
        ),
        (
            "an ALLOW with an empty rule",
            &[allow("r/a", everybody())],
            "allow r/a",
            "allow r/a",
        ),
        (
            "a DENY without rules",
            &[deny("r/d", vec![])],
            "allow",
            "allow",
        ),
        (
            "the first of two that match is named",
            &[
                allow("r/b", web()),
                allow("r/a", everybody()),
                allow("r/0", vec![]),
            ],
            "allow r/a",
            "allow r/a",
        ),
    ];
    for (what, policies, want_web, want_cart) in cases {
        assert_eq!(judge(policies, WEB), *want_web, "{what}: web");
        assert_eq!(judge(policies, CART), *want_cart, "{what}: cart");
    }
}

#[test]
fn policies_on_trial_explain_and_decide_nothing() {
    let cases: &[(&str, &[Policy], &str, &str)] = &[
        (
            "a DENY on trial",
            &[on_trial(deny("r/d", web()))],
            "allow, would deny r/d",
            "allow",
        ),
        (
            "only ALLOWs on trial",
            &[on_trial(allow("r/a", web()))],
            "allow",
            "allow, would deny",
        ),
        (
            "an ALLOW on trial beside an enforced one",
            &[on_trial(allow("r/a", vec![])), allow("r/b", web())],
            "allow r/b",
            "deny",
        ),
        (
            "a refusal tells of the trial too",
            &[on_trial(deny("r/t", web())), deny("r/d", everybody())],
            "deny r/d, would deny r/t",
            "deny r/d",
        ),
    ];
    for (what, policies, want_web, want_cart) in cases {
        assert_eq!(judge(policies, WEB), *want_web, "{what}: web");
        assert_eq!(judge(policies, CART), *want_cart, "{what}: cart");
    }
}

#[test]
fn strict_admits_identities_and_exempts_ports() {
    let strict = |ports: &[u16]| Rule {
        clauses: vec![
            crate::model::Clause {
                matches: vec![anonymous()],
            },
            crate::model::Clause {
                matches: vec![Match {
                    not_destination_ports: ports.to_vec(),
                    ..Match::default()
                }],
            },
        ],
    };
    for (ports, identity, want) in [
        (9090, "", "deny r/strict"),
        (8080, "", "allow"),
        (9090, WEB, "allow"),
    ] {
        let policies = [deny("r/strict", vec![strict(&[ports])])];
        assert_eq!(judge(&policies, identity), want, "{ports} {identity:?}");
    }
}

#[test]
fn a_policy_that_is_named_but_not_held_refuses_unless_a_deny_did_before() {
    let names_lost = workload("shop", &["shop/lost"]);
    let flow = flow(WEB);
    let missing = check(&Policies::default(), &names_lost, &flow).unwrap_err();
    assert_eq!(
        missing,
        Denied::PolicyMissing {
            policy: "shop/lost".parse().unwrap(),
            dry_run: vec![]
        }
    );
    assert_eq!(missing.to_reason(), Reason::PolicyMissing);
    assert!(missing.to_string().contains("shop/lost"));

    let allowing = Policies::new([Arc::new(allow("r/a", everybody()))]);
    assert_eq!(
        check(&allowing, &names_lost, &flow)
            .unwrap_err()
            .to_reason(),
        Reason::PolicyMissing,
        "no ALLOW makes up for it"
    );
    let denying = Policies::new([Arc::new(deny("r/d", everybody()))]);
    assert_eq!(
        check(&denying, &names_lost, &flow).unwrap_err().to_reason(),
        Reason::PolicyDenied,
        "waiting for the missing one would not help"
    );
    let complete = Policies::new([Arc::new(Policy {
        scope: Scope::WorkloadSelector,
        ..allow("shop/lost", everybody())
    })]);
    assert!(check(&complete, &names_lost, &flow).is_ok());
}

#[test]
fn scopes_reach_only_their_workloads() {
    let flow = flow(WEB);
    for (scope, namespace, named, refused) in [
        (Scope::Global, "other", false, true),
        (Scope::Namespace, "shop", false, true),
        (Scope::Namespace, "other", false, false),
        (Scope::WorkloadSelector, "shop", false, false),
        (Scope::WorkloadSelector, "shop", true, true),
        (Scope::WorkloadSelector, "other", true, true),
    ] {
        let policies = Policies::new([policy("shop/p", scope)]);
        let names: &[&str] = if named { &["shop/p"] } else { &[] };
        let outcome = check(&policies, &workload(namespace, names), &flow);
        assert_eq!(outcome.is_err(), refused, "{scope:?} {namespace} {named}");
    }
}

#[test]
fn every_refusal_has_its_reason() {
    let policy: PolicyKey = "shop/p".parse().unwrap();
    for (denied, reason) in [
        (
            Denied::ByPolicy {
                policy: policy.clone(),
                dry_run: vec![],
            },
            Reason::PolicyDenied,
        ),
        (Denied::NoAllow { dry_run: vec![] }, Reason::PolicyDenied),
        (
            Denied::PolicyMissing {
                policy,
                dry_run: vec![],
            },
            Reason::PolicyMissing,
        ),
    ] {
        assert_eq!(denied.to_reason(), reason, "{denied}");
    }
}
