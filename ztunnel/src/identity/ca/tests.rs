//! Authorities that are made, taken over and refused.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use rcgen::{
    GeneralSubtree, NameConstraints, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256,
    RsaKeySize,
};
use x509_parser::der_parser::der::parse_der;
use x509_parser::extensions::GeneralName;

use super::super::testing::{Scratch, id, wall_clock};
use super::super::{Credentials, Versions, peer_identity};
use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn open(scratch: &Scratch) -> Result<LocalCa, Error> {
    LocalCa::open(scratch.path(), wall_clock())
}

/// Puts a pair into a new directory, the key as the issue wants it: readable by its owner only.
fn installed(certificate: &str, key: &str) -> Scratch {
    let scratch = Scratch::new();
    let key_path = scratch.path().join("root-key.pem");
    fs::write(scratch.path().join("root-cert.pem"), certificate).unwrap();
    fs::write(&key_path, key).unwrap();
    fs::set_permissions(&key_path, fs::Permissions::from_mode(0o600)).unwrap();
    scratch
}

fn root_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn pem(label: &str, der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in der.chunks(3) {
        let bits = three
            .iter()
            .fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - three.len()));
        for digit in 0..4 {
            if digit > three.len() {
                text.push('=');
            } else {
                let index = usize::try_from(bits >> (18 - 6 * digit) & 63).unwrap();
                text.push(char::from(DIGITS[index]));
            }
        }
    }
    let lines: Vec<_> = text
        .as_bytes()
        .chunks(64)
        .map(|l| str::from_utf8(l).unwrap())
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}

/// The key inside a PKCS#8 wrapping: SEC1 for EC, PKCS#1 for RSA.
fn unwrapped(key: &KeyPair) -> Vec<u8> {
    let der = key.serialize_der();
    let (_, pkcs8) = parse_der(&der).unwrap();
    pkcs8.as_sequence().unwrap()[2].as_slice().unwrap().to_vec()
}

#[test]
fn a_new_root_is_an_authority_for_ten_years_and_stays() {
    let scratch = Scratch::new();
    let ca = open(&scratch).unwrap();
    let (_, root) = X509Certificate::from_der(&ca.roots[0]).unwrap();
    assert_eq!(root.subject().to_string(), "O=cluster.local");
    assert!(root.is_ca());
    assert!(root.key_usage().unwrap().unwrap().value.key_cert_sign());
    let life = ca.not_after.duration_since(wall_clock()).unwrap();
    assert!(life > 3649 * DAY && life < 3651 * DAY, "{life:?}");
    let key = fs::read_to_string(scratch.path().join("root-key.pem")).unwrap();
    assert_eq!(
        KeyPair::from_pem(&key).unwrap().algorithm(),
        &PKCS_ECDSA_P256_SHA256
    );
    assert_eq!(open(&scratch).unwrap().roots, ca.roots);
}

#[test]
fn a_leaf_names_one_identity_and_nothing_else() {
    let ca = open(&Scratch::new()).unwrap();
    let now = wall_clock();
    let issued = ca.sign(&id("cart"), now, DAY).unwrap();
    assert_eq!(issued.chain.len(), 1, "the root is not sent");
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    let uri = "spiffe://cluster.local/ns/shop/sa/cart";
    assert_eq!(names.value.general_names, [GeneralName::URI(uri)]);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert_eq!(usage.flags, 1, "digitalSignature only");
    assert!(!leaf.is_ca());
    let not_before = SystemTime::from(leaf.validity().not_before.to_datetime());
    let not_after = SystemTime::from(leaf.validity().not_after.to_datetime());
    assert!(not_before < now - Duration::from_secs(60) && not_before > now - DAY);
    assert!(not_after > now + DAY - Duration::from_secs(2) && not_after <= now + DAY);
    let peer = peer_identity(&issued.chain, id("bank").trust_domain());
    assert_eq!(peer, Some(id("cart")));
    let again = ca.sign(&id("cart"), now, DAY).unwrap();
    assert_ne!(again.key.secret_der(), issued.key.secret_der());
}

#[test]
fn a_leaf_never_outlives_its_root() {
    let ca = open(&Scratch::new()).unwrap();
    let late = ca.not_after - Duration::from_secs(60);
    let issued = ca.sign(&id("cart"), late, DAY).unwrap();
    let credentials = Credentials::new(id("cart"), issued, Versions::Only13).unwrap();
    assert!(credentials.not_after() <= ca.not_after);
    for ttl in [Duration::MAX, DAY * 1_000_000] {
        let issued = ca.sign(&id("cart"), wall_clock(), ttl).unwrap();
        let credentials = Credentials::new(id("cart"), issued, Versions::Only13).unwrap();
        assert_eq!(credentials.not_after(), ca.not_after);
    }
    let error = ca.sign(&id("cart"), ca.not_after, DAY).unwrap_err();
    assert!(matches!(error, Error::CaExpired(_)), "{error}");
}

#[test]
fn an_existing_pair_is_used_as_it_is() {
    let rsa = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
    let p256 = KeyPair::generate().unwrap();
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    for (key, label) in [
        (&rsa, "RSA PRIVATE KEY"),
        (&p256, "EC PRIVATE KEY"),
        (&p384, "EC PRIVATE KEY"),
    ] {
        let root = root_params().self_signed(key).unwrap();
        for text in [key.serialize_pem(), pem(label, &unwrapped(key))] {
            let scratch = installed(&root.pem(), &text);
            let ca = open(&scratch).unwrap();
            assert_eq!(ca.roots, [root.der().clone()]);
            let issued = ca.sign(&id("cart"), wall_clock(), DAY).unwrap();
            Credentials::new(id("cart"), issued, Versions::Only13).unwrap();
            let kept = fs::read_to_string(scratch.path().join("root-key.pem")).unwrap();
            assert_eq!(kept, text);
        }
    }
}

/// Behaviour 19: how one root is replaced by another.
#[test]
fn further_roots_in_the_file_are_trusted() {
    let (old, new) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let (old_root, new_root) = (
        root_params().self_signed(&old).unwrap(),
        root_params().self_signed(&new).unwrap(),
    );
    let both = new_root.pem() + &old_root.pem();
    let ca = open(&installed(&both, &new.serialize_pem())).unwrap();
    let issued = ca.sign(&id("cart"), wall_clock(), DAY).unwrap();
    assert_eq!(
        issued.roots,
        [new_root.der().clone(), old_root.der().clone()]
    );
}

#[test]
fn a_pair_that_cannot_work_is_refused_at_the_start() {
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let root = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = root_params();
        change(&mut params);
        params.self_signed(&key).unwrap().pem()
    };
    let good = root(&|_| {});
    let date = |offset: i64| OffsetDateTime::from(wall_clock()) + time::Duration::hours(offset);
    let ed25519 = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let error = |certificate: &str, key: &str| {
        let error = open(&installed(certificate, key)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("root-"), "names the file: {text}");
        error
    };
    let key_text = key.serialize_pem();
    assert!(matches!(
        error(&good, &other.serialize_pem()),
        Error::CaKeyMismatch { .. }
    ));
    assert!(matches!(
        error(&good, &ed25519.serialize_pem()),
        Error::CaKeyMismatch { .. }
    ));
    for garbage in [
        "",
        "garbage",
        &good,
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    ] {
        assert!(
            matches!(error(&good, garbage), Error::CaGarbage { .. }),
            "{garbage}"
        );
    }
    for garbage in [
        "",
        "garbage",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        &key_text,
    ] {
        assert!(
            matches!(error(garbage, &key_text), Error::CaGarbage { .. }),
            "{garbage}"
        );
    }
    type Change<'a> = &'a dyn Fn(&mut CertificateParams);
    let cases: [(Change<'_>, &str); 6] = [
        (&|p| p.is_ca = IsCa::NoCa, "not an authority"),
        (&|p| p.is_ca = IsCa::ExplicitNoCa, "not an authority"),
        (
            &|p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature],
            "not an authority",
        ),
        (&|p| p.not_after = date(-1), "expired"),
        (&|p| p.not_before = date(1), "expired"),
        (
            &|p| {
                p.name_constraints = Some(NameConstraints {
                    permitted_subtrees: vec![GeneralSubtree::DirectoryName(
                        DistinguishedName::new(),
                    )],
                    excluded_subtrees: Vec::new(),
                });
            },
            "unusable",
        ),
    ];
    for (change, what) in cases {
        let found = match open(&installed(&root(change), &key_text)) {
            Err(Error::CaNotAuthority(_)) => "not an authority",
            Err(Error::CaExpired(_)) => "expired",
            Err(Error::CaUnusable { .. }) => "unusable",
            other => panic!("{what}: {other:?}"),
        };
        assert_eq!(found, what);
    }
}

#[test]
fn what_is_opened_again_is_what_is_there_and_nothing_is_made() {
    let scratch = Scratch::new();
    assert!(matches!(
        LocalCa::reopen(scratch.path(), wall_clock()),
        Err(Error::CaMissing(_))
    ));
    let first = open(&scratch).unwrap();
    let again = LocalCa::reopen(scratch.path(), wall_clock()).unwrap();
    assert!(first.is(&again));

    let other = Scratch::new();
    let second = open(&other).unwrap();
    assert!(!first.is(&second));
    let [certificate, key] = LocalCa::files(scratch.path());
    let [new_certificate, new_key] = LocalCa::files(other.path());
    let old = fs::read_to_string(&certificate).unwrap();
    let both = fs::read_to_string(&new_certificate).unwrap() + &old;
    fs::copy(&new_key, &key).unwrap();
    assert!(matches!(
        LocalCa::reopen(scratch.path(), wall_clock()),
        Err(Error::CaKeyMismatch { .. })
    ));
    fs::write(&certificate, both).unwrap();
    let both = LocalCa::reopen(scratch.path(), wall_clock()).unwrap();
    assert_eq!(both.roots(), 2);
    assert!(!both.is(&second) && !both.is(&first));
}
