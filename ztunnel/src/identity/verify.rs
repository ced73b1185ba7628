//! Who a peer is. Takes certificate chains, gives SPIFFE identities or a refused handshake; never
//! looks at DNS names and never decides what an identity may do.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use super::followed::{Role, Shown};
use super::revocation::Revocations;
use crate::model::{SpiffeId, TrustDomain};

/// The identity of a verified client: the first SPIFFE URI of `trust_domain` among its leaf's names.
/// Verification asks here too, so that nobody is let in for one name and judged by another.
// PROTOCOL.md#peer-identity
#[must_use]
pub fn peer_identity(chain: &[CertificateDer<'_>], trust_domain: &TrustDomain) -> Option<SpiffeId> {
    peer_identities(chain)
        .into_iter()
        .find(|id| id.trust_domain() == trust_domain)
}

/// Every SPIFFE URI among the names of the leaf, in its order.
#[must_use]
pub fn peer_identities(chain: &[CertificateDer<'_>]) -> Vec<SpiffeId> {
    let Some(Ok((_, leaf))) = chain.first().map(|der| X509Certificate::from_der(der)) else {
        return Vec::new();
    };
    let Ok(Some(names)) = leaf.subject_alternative_name() else {
        return Vec::new();
    };
    let uris = names.value.general_names.iter().filter_map(|name| {
        if let GeneralName::URI(uri) = name {
            uri.parse().ok()
        } else {
            None
        }
    });
    uris.collect()
}

/// Trust anchors and what is needed to follow a chain to one of them.
#[derive(Clone)]
pub(super) struct Roots {
    /// No other set has it.
    number: u64,
    store: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    revocations: Revocations,
}

impl Roots {
    /// # Errors
    /// When one of them is not a certificate.
    pub(super) fn new(
        roots: &[CertificateDer<'_>],
        revocations: Revocations,
    ) -> Result<Self, rustls::Error> {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.clone().into_owned())?;
        }
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            store: Arc::new(store),
            algorithms: rustls::crypto::aws_lc_rs::default_provider()
                .signature_verification_algorithms,
            revocations,
        })
    }

    pub(super) const fn revocations(&self) -> &Revocations {
        &self.revocations
    }

    /// Follows a server's chain: anchor, validity, server-auth usage, revocation.
    pub(super) fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let shown = Shown::new(self.number, Role::Server, leaf, intermediates);
        shown.follow(intermediates, leaf, now, || {
            verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(leaf)?,
                &self.store,
                intermediates,
                now,
                self.algorithms.all,
            )
        })?;
        self.verify_unrevoked(Role::Server, leaf, intermediates, now)
    }

    /// What the lists of now say of a chain that leads to a root. A chain that was followed before
    /// is asked about each time.
    fn verify_unrevoked(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        if self.is_revoked(role, leaf, intermediates, now) {
            return Err(CertificateError::Revoked.into());
        }
        Ok(())
    }

    /// Whether a list names a certificate of this chain, which was followed at `when`. Issuers
    /// without a list and lists that are out of date refuse nobody.
    // PROTOCOL.md#crl-check
    pub(super) fn is_revoked(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        when: UnixTime,
    ) -> bool {
        let Some(lists) = self.revocations.lists() else {
            return false;
        };
        std::iter::once(leaf)
            .chain(intermediates)
            .flat_map(|certificate| lists.naming(certificate))
            .any(|list| self.is_revoked_by(list, role, (leaf, intermediates), when))
    }

    /// Follows the chain once more, by this list. It names one of the certificates, so whatever
    /// does not speak for the chain now is against it.
    fn is_revoked_by(
        &self,
        list: &CertRevocationList<'_>,
        role: Role,
        (leaf, intermediates): (&CertificateDer<'_>, &[CertificateDer<'_>]),
        when: UnixTime,
    ) -> bool {
        let lists = [list];
        let (Ok(leaf), Ok(options)) = (
            EndEntityCert::try_from(leaf),
            RevocationOptionsBuilder::new(&lists),
        ) else {
            return true;
        };
        let by = options
            .with_depth(RevocationCheckDepth::Chain)
            .with_status_policy(UnknownStatusPolicy::Allow)
            .with_expiration_policy(ExpirationPolicy::Ignore)
            .build();
        let usage = match role {
            Role::Client => KeyUsage::client_auth(),
            Role::Server => KeyUsage::server_auth(),
        };
        let anchors = &self.store.roots;
        let algorithms = self.algorithms.all;
        let followed = leaf.verify_for_usage(
            algorithms,
            anchors,
            intermediates,
            when,
            usage,
            Some(by),
            None,
        );
        match followed {
            // Another authority of the same name has signed the list.
            Ok(_) | Err(webpki::Error::InvalidCrlSignatureForPublicKey) => false,
            Err(_) => true,
        }
    }
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Roots({})", self.store.len())
    }
}

/// A client's view: the server chains to a root and proves one of the expected identities.
// PROTOCOL.md#server-verification
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) roots: Roots,
    pub(super) expected: Vec<SpiffeId>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.roots.verify_server(end_entity, intermediates, now)?;
        let proven = peer_identities(std::slice::from_ref(end_entity));
        if proven.iter().any(|id| self.expected.contains(id)) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::NotValidForName.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.roots.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.roots.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.roots.algorithms.supported_schemes()
    }
}

/// A server's view: the client chains to a root and has an identity in our trust domain.
// PROTOCOL.md#client-verification
#[derive(Debug)]
pub(super) struct ClientVerifier {
    roots: Roots,
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: TrustDomain,
}

impl ClientVerifier {
    pub(super) fn new(
        roots: &Roots,
        trust_domain: &TrustDomain,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, rustls::server::VerifierBuilderError> {
        let chain = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(&roots.store),
            Arc::clone(provider),
        )
        .build()?;
        Ok(Self {
            roots: roots.clone(),
            chain,
            trust_domain: trust_domain.clone(),
        })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let shown = Shown::new(self.roots.number, Role::Client, end_entity, intermediates);
        shown.follow(intermediates, end_entity, now, || {
            let verified = self
                .chain
                .verify_client_cert(end_entity, intermediates, now);
            verified.map(drop)
        })?;
        let roots = &self.roots;
        roots.verify_unrevoked(Role::Client, end_entity, intermediates, now)?;
        match peer_identity(std::slice::from_ref(end_entity), &self.trust_domain) {
            Some(_) => Ok(ClientCertVerified::assertion()),
            None => Err(CertificateError::NotValidForName.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
