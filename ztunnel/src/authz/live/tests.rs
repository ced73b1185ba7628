//! Permits come, are withdrawn by change, and leave nothing behind.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::authz::Probes;
use crate::authz::testing::{anonymous, flow, global, principal, rule, workload};
use crate::model::{
    Action, ClientAddr, OrigDst, PodRef, Policy, ProbeSource, Rule, Scope, StringMatch,
    ToReason as _,
};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn only(principal_of: &str) -> Vec<Rule> {
    let wanted = StringMatch::Suffix(format!("/sa/{principal_of}").into());
    vec![rule(vec![principal(wanted)])]
}

fn policies(policies: Vec<Policy>) -> Policies {
    Policies::new(policies.into_iter().map(Arc::new))
}

fn now<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

#[test]
fn a_refused_flow_leaves_nothing_behind() {
    let live = Live::default();
    let denying = policies(vec![global("r/d", Action::Deny, only("web"))]);
    let to = Arc::new(workload("shop", &[]));
    let denied = live.admit(&denying, &to, flow(WEB)).unwrap_err();
    assert_eq!(denied.to_reason(), Reason::PolicyDenied);
    assert!(live.is_empty());
}

#[test]
fn dropping_a_permit_unregisters_it() {
    let live = Live::default();
    let to = Arc::new(workload("shop", &[]));
    let permit = live.admit(&Policies::default(), &to, flow(WEB)).unwrap();
    let outbound = live.outbound(&to.uid, WEB.parse().unwrap());
    assert_eq!(live.len(), 2);
    drop(permit);
    drop(outbound);
    assert!(live.is_empty());
}

#[test]
fn a_permit_tells_what_it_was_given_for() {
    let live = Live::default();
    let allowing = policies(vec![global("r/a", Action::Allow, only("web"))]);
    let to = Arc::new(workload("shop", &[]));
    let inbound = live.admit(&allowing, &to, flow(WEB)).unwrap();
    assert_eq!(inbound.flow(), Some(&flow(WEB)));
    assert_eq!(inbound.source().unwrap().to_string(), WEB);
    assert_eq!(inbound.allowed_by().unwrap().to_string(), "r/a");
    assert!(inbound.dry_run().is_empty());

    let outbound = live.outbound(&to.uid, CART.parse().unwrap());
    assert_eq!(outbound.flow(), None);
    assert_eq!(outbound.source().unwrap().to_string(), CART);
    assert_eq!(outbound.allowed_by(), None);
}

#[test]
fn a_new_deny_revokes_what_it_matches_and_nothing_else() {
    let live = Live::default();
    let to = Arc::new(Workload {
        identity: Some(WEB.parse().unwrap()),
        ..workload("shop", &[])
    });
    let before = Policies::default();
    let web = live.admit(&before, &to, flow(WEB)).unwrap();
    let plaintext = live.admit(&before, &to, flow("")).unwrap();
    let cart = live.admit(&before, &to, flow(CART)).unwrap();
    let outbound = live.outbound(&to.uid, WEB.parse().unwrap());
    assert_eq!(now(web.revoked()), None);

    let anonymous = rule(vec![anonymous()]);
    let mut rules = only("web");
    rules.push(anonymous);
    let after = policies(vec![global("r/d", Action::Deny, rules)]);
    let current = |_: &WorkloadUid| Some(Arc::clone(&to));
    assert_eq!(live.judge_again(&after, current), 2);
    assert_eq!(now(web.revoked()), Some(Reason::PolicyRevoked));
    assert_eq!(now(plaintext.revoked()), Some(Reason::PolicyRevoked));
    assert_eq!(now(cart.revoked()), None);
    assert_eq!(now(outbound.revoked()), None);
    assert_eq!(live.judge_again(&after, current), 0, "counted once");
}

#[test]
fn losing_the_allow_that_admitted_revokes_unless_another_admits() {
    let live = Live::default();
    let to = Arc::new(workload("shop", &[]));
    let allow = |key: &str, who| global(key, Action::Allow, only(who));
    let both = policies(vec![allow("r/web", "web"), allow("r/cart", "cart")]);
    let web = live.admit(&both, &to, flow(WEB)).unwrap();
    let cart = live.admit(&both, &to, flow(CART)).unwrap();

    let left = policies(vec![allow("r/cart", "cart")]);
    assert_eq!(live.judge_again(&left, |_| Some(Arc::clone(&to))), 1);
    assert_eq!(now(web.revoked()), Some(Reason::PolicyRevoked));
    assert_eq!(now(cart.revoked()), None);
}

#[test]
fn a_policy_attached_by_changing_only_the_workload_revokes() {
    let live = Live::default();
    let held = policies(vec![Policy {
        scope: Scope::WorkloadSelector,
        ..global("shop/only-cart", Action::Allow, only("cart"))
    }]);
    let to = Arc::new(workload("shop", &[]));
    let permit = live.admit(&held, &to, flow(WEB)).unwrap();
    assert_eq!(live.judge_again(&held, |_| Some(Arc::clone(&to))), 0);

    let attached = Arc::new(workload("shop", &["shop/only-cart"]));
    assert_eq!(live.judge_again(&held, |_| Some(Arc::clone(&attached))), 1);
    assert_eq!(now(permit.revoked()), Some(Reason::PolicyRevoked));
}

#[test]
fn naming_a_policy_that_is_not_held_revokes() {
    let live = Live::default();
    let to = Arc::new(workload("shop", &[]));
    let permit = live.admit(&Policies::default(), &to, flow(WEB)).unwrap();
    let lost = Arc::new(workload("shop", &["shop/lost"]));
    live.judge_again(&Policies::default(), |_| Some(Arc::clone(&lost)));
    assert_eq!(now(permit.revoked()), Some(Reason::PolicyRevoked));
}

#[test]
fn a_workload_that_is_gone_takes_its_connections_along() {
    let live = Live::default();
    let to = Arc::new(workload("shop", &[]));
    let permit = live.admit(&Policies::default(), &to, flow(WEB)).unwrap();
    assert_eq!(live.judge_again(&Policies::default(), |_| None), 1);
    assert_eq!(now(permit.revoked()), Some(Reason::UnknownWorkload));
}

#[test]
fn a_source_that_is_gone_or_is_somebody_else_now_takes_its_connections_along() {
    let live = Live::default();
    let none = Policies::default();
    let web = Arc::new(Workload {
        identity: Some(WEB.parse().unwrap()),
        ..workload("shop", &[])
    });
    let cart = Arc::new(Workload {
        uid: WorkloadUid("cart".into()),
        identity: Some(CART.parse().unwrap()),
        ..workload("shop", &[])
    });
    let permit = |of: &Workload| live.outbound(&of.uid, of.identity.clone().unwrap());
    let (from_web, from_cart) = (permit(&web), permit(&cart));
    let both = |uid: &WorkloadUid| Some(Arc::clone(if *uid == web.uid { &web } else { &cart }));
    assert_eq!(live.judge_again(&none, both), 0);

    let renamed = Arc::new(Workload {
        identity: cart.identity.clone(),
        ..Workload::clone(&web)
    });
    let changed =
        |uid: &WorkloadUid| Some(Arc::clone(if *uid == web.uid { &renamed } else { &cart }));
    assert_eq!(live.judge_again(&none, changed), 1);
    assert_eq!(now(from_web.revoked()), Some(Reason::UnknownWorkload));
    assert_eq!(now(from_cart.revoked()), None);

    assert_eq!(live.judge_again(&none, |_| None), 1);
    assert_eq!(now(from_cart.revoked()), Some(Reason::UnknownWorkload));
}

#[tokio::test]
async fn a_waiter_wakes_when_the_permit_is_revoked_and_may_be_cancelled_before() {
    let live = Live::default();
    let to = Arc::new(workload("shop", &[]));
    let permit = live.admit(&Policies::default(), &to, flow(WEB)).unwrap();
    {
        let mut cancelled = pin!(permit.revoked());
        assert!(now(cancelled.as_mut()).is_none());
    }
    let revoke = async {
        tokio::task::yield_now().await;
        live.judge_again(&Policies::default(), |_| None);
    };
    let (reason, ()) = tokio::join!(permit.revoked(), revoke);
    assert_eq!(reason, Reason::UnknownWorkload);
}

#[test]
fn a_probes_permit_lasts_while_its_source_is_listed_or_policy_admits_it() {
    let mut to = workload("shop", &[]);
    to.name = "cart-1".into();
    let to = Arc::new(to);
    let pod = PodRef {
        name: "cart-1".into(),
        namespace: "shop".into(),
        service_account: "cart".into(),
    };
    let listed = ProbeSource {
        address: "10.0.0.1".parse().unwrap(),
        ports: vec![8080],
    };
    let probes = Arc::new(Probes::new([(&pod, &[listed][..])], Vec::new()));
    let strict = || {
        let nobody = vec![rule(vec![anonymous()])];
        policies(vec![global("r/strict", Action::Deny, nobody)])
    };
    let probe = |port: u16| Flow {
        source: ClientAddr::new("10.0.0.1:40000".parse().unwrap()),
        source_identity: None,
        destination: OrigDst::new(([10, 0, 0, 2], port).into()),
    };
    let live = Live::default();
    let listing = strict().with_probes(probes);
    assert!(live.admit_probe(&listing, &to, probe(80)).is_none());
    assert!(live.admit_probe(&strict(), &to, probe(8080)).is_none());
    assert!(live.is_empty());
    let permit = live.admit_probe(&listing, &to, probe(8080)).unwrap();
    assert!(permit.is_probe());
    assert_eq!((permit.flow(), permit.source()), (Some(&probe(8080)), None));
    let same = |_: &WorkloadUid| Some(Arc::clone(&to));
    assert_eq!(live.judge_again(&listing, same), 0);
    assert_eq!(live.judge_again(&Policies::default(), same), 0, "admitted");
    assert_eq!(live.judge_again(&strict(), same), 1);
    assert_eq!(now(permit.revoked()), Some(Reason::PolicyRevoked));
}
