//! Who is refused by which list, and when a tunnel is told.

use std::time::Duration;

use rustls::CertificateError;

use super::super::testing::{Authority, Leaf, wall_clock};
use super::super::verify::Roots;
use super::super::{Issued, Rules};
use super::*;

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn leaf(authority: &Authority) -> Issued {
    authority.leaf(Leaf {
        uris: &[CART],
        ..Leaf::default()
    })
}

fn now() -> UnixTime {
    let since = wall_clock().duration_since(std::time::UNIX_EPOCH);
    UnixTime::since_unix_epoch(since.unwrap())
}

fn lists(der: &[u8]) -> Arc<RevocationLists> {
    Arc::new(RevocationLists::parse(der).unwrap())
}

fn is_revoked(verified: Result<(), rustls::Error>) -> bool {
    verified == Err(CertificateError::Revoked.into())
}

#[test]
fn the_lists_of_now_judge_a_chain_that_was_followed_before() {
    let authority = Authority::new();
    let (one, other) = (leaf(&authority), leaf(&authority));
    let (replace, revocations) = Revocations::followed(RevocationLists::default());
    let roots = Roots::new(&[authority.root()], revocations).unwrap();
    let verify = |issued: &Issued| roots.verify_server(&issued.chain[0], &[], now());
    verify(&one).unwrap();
    verify(&one).unwrap();
    // It is out of date, and counts.
    replace.send_replace(lists(&authority.list(&[&one.chain[0]])));
    assert!(is_revoked(verify(&one)));
    verify(&other).unwrap();
    replace.send_replace(lists(&[]));
    verify(&one).unwrap();
}

#[test]
fn a_list_that_another_authority_of_the_same_name_has_signed_says_nothing() {
    let (authority, namesake) = (Authority::new(), Authority::new());
    let issued = leaf(&authority);
    let forged = namesake.list(&[&issued.chain[0]]);
    let (_, revocations) = Revocations::followed(RevocationLists::parse(&forged).unwrap());
    let both = [authority.root(), namesake.root()];
    let roots = Roots::new(&both, revocations).unwrap();
    roots.verify_server(&issued.chain[0], &[], now()).unwrap();
}

#[test]
fn a_revoked_intermediate_takes_all_below_it_along() {
    let authority = Authority::new();
    let (between, beside) = (authority.below(), authority.below());
    let list = authority.list(&[&between.root()]);
    let (_, revocations) = Revocations::followed(RevocationLists::parse(&list).unwrap());
    let roots = Roots::new(&[authority.root()], revocations).unwrap();
    let verify = |by: &Authority| {
        let issued = leaf(by);
        roots.verify_server(&issued.chain[0], &[by.root()], now())
    };
    assert!(is_revoked(verify(&between)));
    verify(&beside).unwrap();
}

#[tokio::test]
async fn a_tunnel_is_told_when_one_of_its_two_certificates_is_revoked() {
    let authority = Authority::new();
    let (peer, stranger) = (leaf(&authority), leaf(&authority));
    for (revoked, told) in [("peer", true), ("own", true), ("stranger", false)] {
        let own = leaf(&authority);
        let own_leaf = own.chain[0].clone();
        let (replace, revocations) = Revocations::followed(RevocationLists::default());
        let rules = Rules {
            revocations,
            ..Rules::default()
        };
        let own = Credentials::new(CART.parse().unwrap(), own, rules).unwrap();
        let tunnel = Arc::new(own).revocation(Role::Client, &peer.chain);
        let waiting = tokio::time::timeout(Duration::from_millis(20), tunnel.revoked());
        assert!(waiting.await.is_err(), "nothing is revoked yet");
        let der = match revoked {
            "peer" => &peer.chain[0],
            "own" => &own_leaf,
            _ => &stranger.chain[0],
        };
        let mut waiting = Box::pin(tunnel.revoked());
        tokio::select! {
            biased;
            () = &mut waiting => panic!("nothing is revoked yet"),
            () = std::future::ready(()) => {}
        }
        replace.send_replace(lists(&authority.list(&[der])));
        let heard = tokio::time::timeout(Duration::from_millis(20), waiting).await;
        assert_eq!(heard.is_ok(), told, "{revoked}");
        // Also one that begins to listen afterwards.
        let heard = tokio::time::timeout(Duration::from_millis(20), tunnel.revoked()).await;
        assert_eq!(heard.is_ok(), told, "{revoked}, late");
    }
}

#[tokio::test]
async fn without_a_source_there_is_nothing_to_wait_for() {
    let own = Authority::new().credentials(&[CART]);
    let tunnel = own.revocation(Role::Server, own.chain());
    assert!(!own.is_revoked());
    let waiting = tokio::time::timeout(Duration::from_millis(20), tunnel.revoked());
    assert!(waiting.await.is_err());
}
