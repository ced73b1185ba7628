//! A certificate authority of the test's own. Takes names and requests, gives certificates that need not be right;
//! never writes a key to a file.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{ServerConfig, crypto::aws_lc_rs::default_provider};
use rustls_pki_types::PrivatePkcs8KeyDer;
use time::OffsetDateTime;

/// A root and its key, and further roots that are handed out beside it.
#[derive(Debug)]
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// The PEM of a root that is handed out beside its own.
    beside: String,
    next: Option<Box<Self>>,
}

impl Authority {
    pub fn new(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, name);
        params.distinguished_name = subject;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key)?.pem();
        Ok(Self {
            pem,
            issuer: Issuer::new(params, key),
            beside: String::new(),
            next: None,
        })
    }

    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Makes the next root, and hands it out beside its own; nothing is signed with it yet.
    pub fn announce_next(&mut self) -> Result<()> {
        let next = Self::new("cluster.local")?;
        self.beside.clone_from(&next.pem);
        self.next = Some(Box::new(next));
        Ok(())
    }

    /// Signs with the next root from now on, if there is one, and hands out the old one beside it.
    pub fn sign_with_next(&mut self) {
        if let Some(next) = self.next.take() {
            let old = std::mem::replace(self, *next);
            self.beside = old.pem;
        }
    }

    /// Hands out no other root than its own any more.
    pub fn forget_old(&mut self) {
        self.beside.clear();
    }

    /// TLS for a server at this address.
    pub fn server(&self, ip: &str) -> Result<Arc<ServerConfig>> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([ip.to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &self.issuer)?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf.der().clone()],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// A leaf for this identity with the request's key, and the roots, as PEM.
    pub fn sign(
        &self,
        csr: &str,
        identity: &str,
        ttl: Duration,
        later: Duration,
    ) -> Result<Vec<String>> {
        let mut request = CertificateSigningRequestParams::from_pem(csr).context("the CSR")?;
        #[expect(clippy::disallowed_methods, reason = "a CA goes by the real clock")]
        let now = SystemTime::now();
        let params = &mut request.params;
        params.not_before = OffsetDateTime::from(now + later);
        params.not_after = OffsetDateTime::from(now + later + ttl);
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let leaf = request.signed_by(&self.issuer)?;
        Ok(vec![leaf.pem(), format!("{}{}", self.pem, self.beside)])
    }
}
