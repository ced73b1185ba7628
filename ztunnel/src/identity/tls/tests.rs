//! Handshakes with real peers: what is offered, whom we take and whom we refuse.

#![expect(
    clippy::large_futures,
    reason = "a test runs one of them and then ends"
)]

use rcgen::ExtendedKeyUsagePurpose;
use rustls::NamedGroup;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::super::testing::{Authority, Leaf, wall_clock};
use super::super::{peer_identities, peer_identity};
use super::*;

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const BANK: &str = "spiffe://cluster.local/ns/shop/sa/bank";
const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/other";

fn ids(uris: &[&str]) -> Vec<SpiffeId> {
    uris.iter().map(|uri| uri.parse().unwrap()).collect()
}

fn name() -> ServerName<'static> {
    ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]))
}

/// What each end says of a handshake; a client learns the server's refusal with its first read.
struct Shaken {
    client: std::io::Result<(Vec<SpiffeId>, Option<NamedGroup>)>,
    server: std::io::Result<Option<SpiffeId>>,
}

async fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Shaken {
    let (near, far) = duplex(1 << 16);
    let client = async move {
        let mut tls = TlsConnector::from(client).connect(name(), near).await?;
        let proven = peer_identities(tls.get_ref().1.peer_certificates().unwrap());
        let group = tls.get_ref().1.negotiated_key_exchange_group();
        tls.read_u8().await?;
        Ok((proven, group.map(|g| g.name())))
    };
    let server = async move {
        let mut tls = TlsAcceptor::from(server).accept(far).await?;
        let chain = tls.get_ref().1.peer_certificates();
        let peer = chain.and_then(|chain| peer_identity(chain, ids(&[BANK])[0].trust_domain()));
        tokio::io::AsyncWriteExt::write_all(&mut tls, b"!").await?;
        tokio::io::AsyncWriteExt::flush(&mut tls).await?;
        Ok(peer)
    };
    let (client, server) = tokio::join!(client, server);
    Shaken { client, server }
}

fn refused(shaken: &Shaken) {
    assert!(shaken.client.is_err() && shaken.server.is_err());
}

#[tokio::test]
async fn both_ends_prove_who_they_are_with_the_hybrid_group() {
    let authority = Authority::new();
    let (cart, bank) = (
        authority.credentials(&[CART]),
        authority.credentials(&[BANK]),
    );
    let shaken = shake(cart.client_config(&ids(&[BANK])), bank.server_config()).await;
    let (proven, group) = shaken.client.unwrap();
    assert_eq!(proven, ids(&[BANK]));
    assert_eq!(group, Some(NamedGroup::X25519MLKEM768));
    assert_eq!(shaken.server.unwrap(), Some(CART.parse().unwrap()));
}

/// Behaviours 15, 16 and 17.
#[tokio::test]
async fn the_server_must_prove_one_of_the_expected_identities() {
    let authority = Authority::new();
    let cart = authority.credentials(&[CART]);
    for (expected, shown, good) in [
        (vec![BANK], vec![OTHER], false),
        (vec![], vec![BANK], false),
        (vec![BANK, OTHER], vec![OTHER], true),
        (vec![BANK], vec![OTHER, BANK], true),
        (vec![BANK], vec!["https://bank/", BANK], true),
    ] {
        let bank = authority.leaf(Leaf {
            uris: &shown,
            ..Leaf::default()
        });
        let bank = Credentials::new(BANK.parse().unwrap(), bank, Versions::Only13).unwrap();
        let shaken = shake(cart.client_config(&ids(&expected)), bank.server_config()).await;
        assert_eq!(shaken.client.is_ok(), good, "{expected:?} {shown:?}");
    }
}

/// Behaviour 18.
#[tokio::test]
async fn an_unknown_root_an_expired_certificate_and_a_wrong_usage_are_refused() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let cart = authority.credentials(&[CART]);
    let hour = Duration::from_secs(3600);
    let now = wall_clock();
    let bank = |issuer: &Authority, leaf: Leaf<'_>| {
        let leaf = Leaf {
            uris: &[BANK],
            ..leaf
        };
        let mut issued = issuer.leaf(leaf);
        // It trusts the client, so that only the client's verdict decides.
        issued.roots = vec![authority.root()];
        Credentials::new(BANK.parse().unwrap(), issued, Versions::Only13).unwrap()
    };
    for bank in [
        bank(&stranger, Leaf::default()),
        bank(
            &authority,
            Leaf {
                not_before: now - 2 * hour,
                not_after: now - hour,
                ..Leaf::default()
            },
        ),
        bank(
            &authority,
            Leaf {
                not_before: now + hour,
                ..Leaf::default()
            },
        ),
        bank(
            &authority,
            Leaf {
                usages: vec![ExtendedKeyUsagePurpose::ClientAuth],
                ..Leaf::default()
            },
        ),
    ] {
        refused(&shake(cart.client_config(&ids(&[BANK])), bank.server_config()).await);
    }
}

/// Behaviour 19.
#[tokio::test]
async fn each_of_several_roots_vouches() {
    let (old, new) = (Authority::new(), Authority::new());
    let roots = vec![old.root(), new.root()];
    let make = |authority: &Authority, uri: &str| {
        let mut issued = authority.leaf(Leaf {
            uris: &[uri],
            ..Leaf::default()
        });
        issued.roots.clone_from(&roots);
        Credentials::new(uri.parse().unwrap(), issued, Versions::Only13).unwrap()
    };
    let cart = make(&old, CART);
    for authority in [&old, &new] {
        let bank = make(authority, BANK);
        let shaken = shake(cart.client_config(&ids(&[BANK])), bank.server_config()).await;
        assert!(shaken.client.is_ok() && shaken.server.is_ok());
    }
}

/// Behaviour 73.
#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let authority = Authority::new();
    let bank = authority.credentials(&[BANK]);
    let roots = Roots::new(&[authority.root()], Revocations::default()).unwrap();
    let mut config =
        ClientConfig::builder_with_provider(Arc::new(provider(Versions::Only13, KeyExchange::Any)))
            .with_protocol_versions(Versions::Only13.protocols())
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ServerVerifier {
                roots,
                expected: ids(&[BANK]),
            }))
            .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    refused(&shake(Arc::new(config), bank.server_config()).await);
}

/// Behaviour 74, and a certificate that names nobody.
#[tokio::test]
async fn a_client_from_another_trust_domain_is_refused() {
    let authority = Authority::new();
    let bank = authority.credentials(&[BANK]);
    for (uris, good) in [
        (vec!["spiffe://elsewhere/ns/shop/sa/cart"], false),
        (vec!["https://cluster.local/ns/shop/sa/cart"], false),
        (vec![], false),
        (vec![CART], true),
    ] {
        let cart = authority.leaf(Leaf {
            uris: &uris,
            ..Leaf::default()
        });
        let cart = Credentials::new(CART.parse().unwrap(), cart, Versions::Only13).unwrap();
        let shaken = shake(cart.client_config(&ids(&[BANK])), bank.server_config()).await;
        assert_eq!(shaken.server.is_ok(), good, "{uris:?}");
        assert_eq!(shaken.client.is_ok(), good, "{uris:?}");
    }
}

/// Whoever signs for several domains must not let a client in as one name and act as another.
#[tokio::test]
async fn a_client_is_known_by_its_name_in_our_trust_domain() {
    const FOREIGN: &str = "spiffe://elsewhere/ns/shop/sa/cart";
    let authority = Authority::new();
    let bank = authority.credentials(&[BANK]);
    for (uris, known) in [
        (vec![FOREIGN, CART], Some(CART)),
        (vec![CART, FOREIGN], Some(CART)),
        (vec![FOREIGN, CART, OTHER], Some(CART)),
    ] {
        let cart = authority.credentials(&uris);
        let shaken = shake(cart.client_config(&ids(&[BANK])), bank.server_config()).await;
        let known = known.map(|uri| uri.parse().unwrap());
        assert_eq!(shaken.server.unwrap(), known, "{uris:?}");
    }
}

/// Behaviour 3.
#[tokio::test]
async fn a_server_that_speaks_only_tls_1_2_is_refused() {
    let authority = Authority::new();
    let cart = authority.credentials(&[CART]);
    let issued = authority.leaf(Leaf {
        uris: &[BANK],
        ..Leaf::default()
    });
    let old = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(issued.chain, issued.key)
        .unwrap();
    refused(&shake(cart.client_config(&ids(&[BANK])), Arc::new(old)).await);
}

fn versed(authority: &Authority, uri: &str, versions: Versions) -> Credentials {
    let issued = authority.leaf(Leaf {
        uris: &[uri],
        ..Leaf::default()
    });
    Credentials::new(uri.parse().unwrap(), issued, versions).unwrap()
}

/// Peers that know nothing but TLS 1.2 and one suite.
fn old_peers(
    authority: &Authority,
    suite: rustls::SupportedCipherSuite,
) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let provider = Arc::new(CryptoProvider {
        cipher_suites: vec![suite],
        ..default_provider()
    });
    let issued = |uri| {
        authority.leaf(Leaf {
            uris: &[uri],
            ..Leaf::default()
        })
    };
    let roots = Roots::new(&[authority.root()], Revocations::default()).unwrap();
    let (bank, cart) = (issued(BANK), issued(CART));
    let domain = BANK.parse::<SpiffeId>().unwrap();
    let verifier = ClientVerifier::new(&roots, domain.trust_domain(), &provider).unwrap();
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(bank.chain, bank.key)
        .unwrap();
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier {
            roots,
            expected: ids(&[BANK]),
        }))
        .with_client_auth_cert(cart.chain, cart.key)
        .unwrap();
    (Arc::new(client), Arc::new(server))
}

/// Behaviours 3 and 4, in both roles.
#[tokio::test]
async fn tls_1_2_is_spoken_only_where_it_is_wanted() {
    let authority = Authority::new();
    for suite in [
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ] {
        let (client, server) = old_peers(&authority, suite);
        for (versions, good) in [(Versions::Only13, false), (Versions::From12, true)] {
            let cart = versed(&authority, CART, versions).client_config(&ids(&[BANK]));
            let shaken = shake(cart, Arc::clone(&server)).await;
            assert_eq!(shaken.client.is_ok(), good, "{versions:?}");
            assert_eq!(
                shaken.server.ok().flatten(),
                good.then(|| CART.parse().unwrap())
            );
            let bank = versed(&authority, BANK, versions).server_config();
            let shaken = shake(Arc::clone(&client), bank).await;
            assert_eq!(shaken.client.is_ok(), good, "{versions:?}");
            assert_eq!(
                shaken.server.ok().flatten(),
                good.then(|| CART.parse().unwrap())
            );
        }
    }
}

#[tokio::test]
async fn where_tls_1_2_is_allowed_the_rest_is_as_strict_and_1_3_comes_first() {
    let authority = Authority::new();
    let cart = versed(&authority, CART, Versions::From12);
    let bank = versed(&authority, BANK, Versions::From12);
    let shaken = shake(cart.client_config(&ids(&[BANK])), bank.server_config()).await;
    // A group of TLS 1.3 alone.
    let (_, group) = shaken.client.unwrap();
    assert_eq!(group, Some(NamedGroup::X25519MLKEM768));

    let suite = cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384;
    let (client, server) = old_peers(&authority, suite);
    refused(&shake(cart.client_config(&ids(&[OTHER])), server).await);
    let elsewhere = "spiffe://elsewhere/ns/shop/sa/bank";
    let stranger = versed(&Authority::new(), elsewhere, Versions::From12);
    refused(&shake(client, stranger.server_config()).await);

    let hello = hello(cart.client_config(&ids(&[BANK])));
    assert!(!extensions(&hello).contains(&35), "no session ticket");
    let mut acceptor = rustls::server::Acceptor::default();
    acceptor.read_tls(&mut hello.as_slice()).unwrap();
    let Ok(Some(accepted)) = acceptor.accept() else {
        panic!("incomplete");
    };
    assert!(accepted.client_hello().cipher_suites().starts_with(&[
        rustls::CipherSuite::TLS13_AES_256_GCM_SHA384,
        rustls::CipherSuite::TLS13_AES_128_GCM_SHA256,
        rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ]));
}

/// The first bytes of a client.
fn hello(config: Arc<ClientConfig>) -> Vec<u8> {
    let mut client = rustls::ClientConnection::new(config, name()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// Behaviours 1 and 2.
#[test]
fn the_client_hello_is_what_peers_expect() {
    let authority = Authority::new();
    let config = authority.credentials(&[CART]).client_config(&ids(&[BANK]));
    let bytes = hello(config);

    let extensions = extensions(&bytes);
    let [server_name, session_ticket, pre_shared_key, early_data] = [0, 35, 41, 42];
    for absent in [server_name, session_ticket, pre_shared_key, early_data] {
        assert!(!extensions.contains(&absent), "{extensions:?}");
    }
    let mut acceptor = rustls::server::Acceptor::default();
    acceptor.read_tls(&mut bytes.as_slice()).unwrap();
    let Ok(Some(accepted)) = acceptor.accept() else {
        panic!("incomplete");
    };
    let hello = accepted.client_hello();
    assert_eq!(hello.server_name(), None);
    let alpn: Vec<_> = hello.alpn().unwrap().collect();
    assert_eq!(alpn, [b"h2"]);
    assert_eq!(
        hello.cipher_suites(),
        [
            rustls::CipherSuite::TLS13_AES_256_GCM_SHA384,
            rustls::CipherSuite::TLS13_AES_128_GCM_SHA256,
        ]
    );
    assert_eq!(
        hello.named_groups().unwrap(),
        [
            NamedGroup::X25519MLKEM768,
            NamedGroup::X25519,
            NamedGroup::secp256r1,
            NamedGroup::secp384r1,
        ]
    );
}

/// The numbers of the extensions in one ClientHello record.
fn extensions(record: &[u8]) -> Vec<u16> {
    let number = |at: usize| usize::from(u16::from_be_bytes([record[at], record[at + 1]]));
    let mut at = 5 + 4 + 2 + 32; // record, handshake, version, random
    at += 1 + usize::from(record[at]); // session
    at += 2 + number(at); // suites
    at += 1 + usize::from(record[at]); // compression
    at += 2;
    let mut found = Vec::new();
    while at < record.len() {
        found.push(number(at).try_into().unwrap());
        at += 4 + number(at + 2);
    }
    found
}

/// Behaviour 5.
#[tokio::test]
async fn under_the_post_quantum_policy_no_other_group_is_offered_or_taken() {
    let authority = Authority::new();
    let strict = |uri: &str| {
        let issued = authority.leaf(Leaf {
            uris: &[uri],
            ..Leaf::default()
        });
        let rules = Rules {
            exchange: KeyExchange::PostQuantum,
            ..Rules::default()
        };
        Credentials::new(uri.parse().unwrap(), issued, rules).unwrap()
    };
    let (cart, bank) = (strict(CART), strict(BANK));
    let config = cart.client_config(&ids(&[BANK]));
    let mut acceptor = rustls::server::Acceptor::default();
    let hello = hello(Arc::clone(&config));
    acceptor.read_tls(&mut hello.as_slice()).unwrap();
    let Ok(Some(accepted)) = acceptor.accept() else {
        panic!("incomplete");
    };
    let groups = accepted.client_hello().named_groups().unwrap().to_vec();
    assert_eq!(groups, [NamedGroup::X25519MLKEM768]);

    let shaken = shake(config, bank.server_config()).await;
    assert_eq!(shaken.client.unwrap().1, Some(NamedGroup::X25519MLKEM768));
    // Both ways with a peer that knows the older one only.
    let old = |uri: &str| authority.credentials(&[uri]);
    let mut older = provider(Versions::Only13, KeyExchange::Any);
    older.kx_groups = vec![kx_group::X25519];
    let older = Arc::new(older);
    let issued = authority.leaf(Leaf {
        uris: &[OTHER],
        ..Leaf::default()
    });
    let roots = Roots::new(&issued.roots, Revocations::default()).unwrap();
    let id: SpiffeId = OTHER.parse().unwrap();
    let server = server_config(&id, &issued, &roots, &older, Versions::Only13).unwrap();
    refused(&shake(cart.client_config(&[id]), Arc::new(server)).await);
    let mut client = client_config(&issued, &roots, &older, Versions::Only13).unwrap();
    client
        .dangerous()
        .set_certificate_verifier(Arc::new(ServerVerifier {
            roots,
            expected: ids(&[BANK]),
        }));
    let client = Arc::new(client);
    refused(&shake(Arc::clone(&client), bank.server_config()).await);
    assert!(
        shake(client, old(BANK).server_config())
            .await
            .client
            .is_ok()
    );
}

#[tokio::test]
async fn a_peer_that_knows_only_an_older_group_is_served() {
    let authority = Authority::new();
    let bank = authority.credentials(&[BANK]);
    for group in [kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1] {
        let provider = CryptoProvider {
            kx_groups: vec![group],
            ..provider(Versions::Only13, KeyExchange::Any)
        };
        let issued = authority.leaf(Leaf {
            uris: &[CART],
            ..Leaf::default()
        });
        let roots = Roots::new(&issued.roots, Revocations::default()).unwrap();
        let mut config =
            client_config(&issued, &roots, &Arc::new(provider), Versions::Only13).unwrap();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(ServerVerifier {
                roots,
                expected: ids(&[BANK]),
            }));
        let shaken = shake(Arc::new(config), bank.server_config()).await;
        assert_eq!(shaken.client.unwrap().1, Some(group.name()));
    }
}

#[test]
fn two_certificates_are_valid_together_until_the_first_expires() {
    let authority = Authority::new();
    let now = wall_clock();
    let lasting = |seconds| {
        let leaf = authority.leaf(Leaf {
            uris: &[CART],
            not_after: now + Duration::from_secs(seconds),
            ..Leaf::default()
        });
        Credentials::new(CART.parse().unwrap(), leaf, Versions::Only13).unwrap()
    };
    let (short, long) = (lasting(1000), lasting(2000));
    for (ours, theirs) in [(&short, &long), (&long, &short)] {
        let valid = ours.valid_with(theirs.chain()).as_secs();
        assert!((990..=1001).contains(&valid), "{valid}");
    }
    assert_eq!(long.valid_with(&[]), Duration::ZERO);
}

#[test]
fn configurations_are_shared_and_nothing_is_parsed_again() {
    let authority = Authority::new();
    let cart = authority.credentials(&[CART]);
    assert!(Arc::ptr_eq(&cart.server_config(), &cart.server_config()));
    let (a, b) = (cart.client_config(&[]), cart.client_config(&[]));
    assert!(Arc::ptr_eq(
        &a.client_auth_cert_resolver,
        &b.client_auth_cert_resolver
    ));
}

#[test]
fn a_chain_without_a_leaf_or_with_another_key_makes_no_credentials() {
    let authority = Authority::new();
    let leaf = || {
        authority.leaf(Leaf {
            uris: &[CART],
            ..Leaf::default()
        })
    };
    let id: SpiffeId = CART.parse().unwrap();
    let make = |issued| Credentials::new(id.clone(), issued, Versions::Only13).unwrap_err();
    let empty = make(Issued {
        chain: Vec::new(),
        ..leaf()
    });
    assert!(matches!(empty, Error::Malformed { .. }));
    let rootless = make(Issued {
        roots: Vec::new(),
        ..leaf()
    });
    assert!(matches!(rootless, Error::Malformed { .. }));
    let foreign = make(Issued {
        key: leaf().key,
        ..leaf()
    });
    assert!(matches!(foreign, Error::Credentials { .. }));
}
