//! What a file of revoked certificates may hold, and what names a certificate.

use super::super::testing::{Authority, Leaf};
use super::*;

const CART: &[&str] = &["spiffe://cluster.local/ns/shop/sa/cart"];

fn pem(label: &str, der: &[u8]) -> String {
    use std::fmt::Write as _;
    // Base64 by hand: the library that reads it writes none.
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut body = String::new();
    for chunk in der.chunks(3) {
        let padded = [0, 1, 2].map(|i| u32::from(chunk.get(i).copied().unwrap_or(0)));
        let bits = padded[0] << 16 | padded[1] << 8 | padded[2];
        for i in 0..4 {
            let sextet = usize::try_from(bits >> (18 - 6 * i) & 63).unwrap();
            body.push(if i <= chunk.len() {
                char::from(alphabet[sextet])
            } else {
                '='
            });
        }
    }
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        writeln!(text, "{}", std::str::from_utf8(line).unwrap()).unwrap();
    }
    text + &format!("-----END {label}-----\n")
}

fn leaf(authority: &Authority) -> CertificateDer<'static> {
    let issued = authority.leaf(Leaf {
        uris: CART,
        ..Leaf::default()
    });
    issued.chain[0].clone()
}

#[test]
fn lists_come_as_pem_among_other_things_as_der_or_not_at_all() {
    let authority = Authority::new();
    let (one, other) = (leaf(&authority), leaf(&authority));
    let (first, second) = (authority.list(&[&one]), authority.list(&[&other]));
    let text = [
        "a list follows\n".to_owned(),
        pem("X509 CRL", &first),
        pem("CERTIFICATE", &one),
        pem("X509 CRL", &second),
    ];
    for (bytes, lists, named) in [
        (Vec::new(), 0, false),
        (b" \n".to_vec(), 0, false),
        (pem("CERTIFICATE", &one).into_bytes(), 0, false),
        (first.to_vec(), 1, true),
        (second.to_vec(), 1, false),
        (text.concat().into_bytes(), 2, true),
    ] {
        let read = RevocationLists::parse(&bytes).unwrap();
        assert_eq!((read.len(), read.is_empty()), (lists, lists == 0));
        assert_eq!(read.naming(&one).count(), usize::from(named));
    }
}

#[test]
fn one_malformed_list_refuses_the_file_and_is_named() {
    let authority = Authority::new();
    let good = authority.list(&[&leaf(&authority)]);
    let (head, _) = good.split_at(good.len() / 2);
    let good_text = pem("X509 CRL", &good);
    for (bytes, said) in [
        (b"no list".to_vec(), "revocation list 1 "),
        (head.to_vec(), "revocation list 1 "),
        ([&*good, b"more"].concat(), "revocation list 1 "),
        (
            (good_text.clone() + &pem("X509 CRL", head)).into_bytes(),
            "revocation list 2 ",
        ),
        (
            (good_text.clone() + "-----BEGIN X509 CRL-----\nMII\n").into_bytes(),
            "after 1 revocation lists",
        ),
        (
            good_text
                .replace("-----END X509 CRL-----\n", "*\n-----END X509 CRL-----\n")
                .into_bytes(),
            "after 0 revocation lists",
        ),
    ] {
        let fault = RevocationLists::parse(&bytes).unwrap_err().to_string();
        assert!(fault.contains(said), "{fault}, not {said}");
    }
}

#[test]
fn a_certificate_is_named_by_number_and_issuer_together() {
    let authority = Authority::new();
    let below = authority.below();
    let (one, other) = (leaf(&authority), leaf(&authority));
    let lists = RevocationLists::parse(&authority.list(&[&one])).unwrap();
    assert_eq!(lists.naming(&one).count(), 1);
    assert_eq!(lists.naming(&other).count(), 0, "another number");
    let lists = RevocationLists::parse(&below.list(&[&one])).unwrap();
    assert_eq!(lists.naming(&one).count(), 0, "another issuer");
    assert_eq!(lists.naming(&CertificateDer::from(vec![0x30])).count(), 0);
}
