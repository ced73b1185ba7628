//! Certificates from the mesh's CA. Takes an identity, makes a key and a request for it, gives what the CA signed,
//! checked to be what was asked for; never lets a key out, and never takes a certificate for somebody else.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::Mutex;
use tokio::time::Instant;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::ca::{Issued, Issuer};
use super::error::Error;
use super::verify::peer_identities;
use crate::model::SpiffeId;
use crate::proto::citadel::{IstioCertificateRequest, IstioCertificateResponse};
use crate::rpc::{self, Code, Connection};

/// The mesh's CA, asked over one connection that is made when it is needed.
#[derive(Debug)]
pub struct RemoteCa {
    params: rpc::Params,
    connection: Mutex<Option<Connection>>,
}

impl RemoteCa {
    /// Takes where the CA is; connects with the first request.
    #[must_use]
    pub fn new(params: rpc::Params) -> Self {
        Self {
            params,
            connection: Mutex::new(None),
        }
    }

    /// The connection of before, if it still serves and its roots are still those of the file.
    async fn connection(&self) -> Result<Connection, rpc::Error> {
        let mut held = self.connection.lock().await;
        if let Some(connection) = &*held {
            // A file that is being replaced is no reason to stop using what works.
            let same = connection.trusts_as_before().await.unwrap_or(true);
            if same && !connection.is_leaving() {
                return Ok(connection.clone());
            }
        }
        let connection = Connection::open(&self.params).await?;
        *held = Some(connection.clone());
        Ok(connection)
    }

    async fn ask(
        &self,
        request: &IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse, rpc::Error> {
        match self.connection().await?.call(METHOD, request).await {
            // The connection was closed while nothing happened on it: once more, on a new one.
            Err(rpc::Error::Broken(_)) => {
                *self.connection.lock().await = None;
                self.connection().await?.call(METHOD, request).await
            }
            answer => answer,
        }
    }
}

impl Issuer for RemoteCa {
    // PROTOCOL.md#certificate-request
    async fn issue(&self, id: &SpiffeId, now: SystemTime, ttl: Duration) -> Result<Issued, Error> {
        let asked = Instant::now();
        let (key, csr) = request(id)?;
        let impersonated = Value {
            kind: Some(Kind::StringValue(id.to_string())),
        };
        let request = IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct {
                fields: [(IMPERSONATED.to_owned(), impersonated)].into(),
            }),
        };
        let answer = self.ask(&request).await.map_err(|source| {
            let id = id.clone();
            let source = Arc::new(source);
            if is_unknown_to_ca(&source) {
                Error::NotYetKnown { id, source }
            } else {
                Error::CaRefused { id, source }
            }
        })?;
        let (chain, roots) = answer_of(id, &answer.cert_chain)?;
        // By the time when it came: a CA that dates nothing back may have begun the next second.
        check(id, &chain, now + asked.elapsed())?;
        Ok(Issued {
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            chain,
            roots,
        })
    }
}

/// One status for a bad token and for a pod that the CA has not seen yet; its text tells them apart.
// PROTOCOL.md#impersonation-refused
fn is_unknown_to_ca(error: &rpc::Error) -> bool {
    matches!(error, rpc::Error::Status(status)
        if status.code == Code::UNAUTHENTICATED && status.message.contains("impersonation"))
}

/// A fresh key, and a request for a certificate with it, as PEM.
// PROTOCOL.md#certificate-request
fn request(id: &SpiffeId) -> Result<(KeyPair, String), Error> {
    let failed = |source| Error::Sign {
        id: id.clone(),
        source: Arc::new(source),
    };
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let uri = Ia5String::try_from(id.to_string()).map_err(failed)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    let request = params.serialize_request(&key).map_err(failed)?;
    let pem = request.pem().map_err(failed)?;
    Ok((key, pem))
}

type Chain = Vec<CertificateDer<'static>>;

/// The chain and the roots: the last element holds the roots, all before it the chain.
// PROTOCOL.md#certificate-answer
fn answer_of(id: &SpiffeId, elements: &[String]) -> Result<(Chain, Chain), Error> {
    let [chain @ .., roots] = elements else {
        return Err(Error::CaEmpty(id.clone()));
    };
    if chain.is_empty() {
        return Err(Error::CaNoRoot(id.clone()));
    }
    let read = |pem: &String| -> Result<Chain, Error> {
        let certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
        match certificates.collect::<Result<Chain, _>>() {
            Ok(certificates) if !certificates.is_empty() => Ok(certificates),
            _ => Err(Error::Malformed { id: id.clone() }),
        }
    };
    let mut path = Chain::new();
    for element in chain {
        path.extend(read(element)?);
    }
    Ok((path, read(roots)?))
}

/// The leaf is for whom we asked, and valid by our clock.
fn check(id: &SpiffeId, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<(), Error> {
    let Some(Ok((_, leaf))) = chain.first().map(|der| X509Certificate::from_der(der)) else {
        return Err(Error::Malformed { id: id.clone() });
    };
    let named = peer_identities(chain);
    if named.as_slice() != std::slice::from_ref(id) {
        let named: Vec<_> = named.iter().map(ToString::to_string).collect();
        return Err(Error::CaWrongIdentity {
            id: id.clone(),
            named: named.join(" "),
        });
    }
    let not_before = SystemTime::from(leaf.validity().not_before.to_datetime());
    if let Ok(early) = not_before.duration_since(now)
        && !early.is_zero()
    {
        return Err(Error::NotYetValid {
            id: id.clone(),
            early,
        });
    }
    Ok(())
}

const METHOD: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const IMPERSONATED: &str = "ImpersonatedIdentity";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::{Authority, Leaf, id, wall_clock};

    fn pem(der: &CertificateDer<'_>) -> String {
        use std::fmt::Write as _;
        let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
        let mut bits = String::new();
        for byte in der.iter() {
            write!(bits, "{byte:08b}").unwrap();
        }
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut line = String::new();
        for chunk in bits.as_bytes().chunks(6) {
            let mut chunk = String::from_utf8(chunk.to_vec()).unwrap();
            while chunk.len() < 6 {
                chunk.push('0');
            }
            line.push(char::from(
                alphabet[usize::from_str_radix(&chunk, 2).unwrap()],
            ));
        }
        while !line.len().is_multiple_of(4) {
            line.push('=');
        }
        for chunk in line.as_bytes().chunks(64) {
            text.push_str(std::str::from_utf8(chunk).unwrap());
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
        text
    }

    // B044, B045.
    #[test]
    fn a_request_has_a_p256_key_of_its_own_and_one_critical_uri() {
        use x509_parser::certification_request::X509CertificationRequest;
        use x509_parser::prelude::{GeneralName, ParsedCriAttribute};
        let id = id("cart");
        let (_, first) = request(&id).unwrap();
        let (_, second) = request(&id).unwrap();
        let (_, parsed) = x509_parser::pem::parse_x509_pem(first.as_bytes()).unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&parsed.contents).unwrap();
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0);
        let key = info.subject_pki.parsed().unwrap();
        assert_eq!(key.key_size(), 256);
        let mut extensions = 0;
        for attribute in info.iter_attributes() {
            let ParsedCriAttribute::ExtensionRequest(request) = attribute.parsed_attribute() else {
                panic!("another attribute");
            };
            for extension in &request.extensions {
                extensions += 1;
                assert!(extension.critical);
                let x509_parser::extensions::ParsedExtension::SubjectAlternativeName(names) =
                    extension.parsed_extension()
                else {
                    panic!("another extension");
                };
                assert_eq!(names.general_names, [GeneralName::URI(&id.to_string())]);
            }
        }
        assert_eq!(extensions, 1);
        assert_ne!(first, second, "each has a key of its own");
    }

    // B048, B049.
    #[test]
    fn an_answer_that_is_not_ours_is_refused_by_name() {
        let ca = Authority::new();
        let cart = id("cart").to_string();
        let of = |uris: &[&str]| {
            let issued = ca.leaf(Leaf {
                uris,
                ..Leaf::default()
            });
            vec![pem(&issued.chain[0]), pem(&issued.roots[0])]
        };
        let judge = |elements: &[String]| {
            let (chain, _) = answer_of(&id("cart"), elements)?;
            check(&id("cart"), &chain, wall_clock())
        };
        judge(&of(&[&cart])).unwrap();
        let stranger = id("somebody").to_string();
        for (elements, said) in [
            (vec![], "empty"),
            (of(&[&cart])[..1].to_vec(), "no root"),
            (of(&[&stranger]), "somebody"),
            (of(&[&cart, &stranger]), "somebody"),
            (vec!["x".to_owned(), "y".to_owned()], "malformed"),
        ] {
            let error = judge(&elements).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains("cart"), "{error}");
        }
    }

    #[test]
    fn a_certificate_from_the_future_is_refused_and_says_so() {
        let ca = Authority::new();
        let cart = id("cart").to_string();
        let issued = ca.leaf(Leaf {
            uris: &[&cart],
            not_before: wall_clock() + Duration::from_secs(3600),
            not_after: wall_clock() + Duration::from_secs(7200),
            ..Leaf::default()
        });
        let error = check(&id("cart"), &issued.chain, wall_clock()).unwrap_err();
        assert!(error.to_string().contains("clock"), "{error}");
    }

    #[test]
    fn several_roots_may_stand_in_the_last_element() {
        let (one, two) = (Authority::new(), Authority::new());
        let issued = one.leaf(Leaf {
            uris: &[&id("cart").to_string()],
            ..Leaf::default()
        });
        let roots = format!("{}{}", pem(&one.root()), pem(&two.root()));
        let (chain, roots) = answer_of(&id("cart"), &[pem(&issued.chain[0]), roots]).unwrap();
        assert_eq!((chain.len(), roots.len()), (1, 2));
    }
}
