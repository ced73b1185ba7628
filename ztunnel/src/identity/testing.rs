//! An authority for tests, made of the certificate library alone. Takes names and times, gives
//! certificates that production code would never sign; never touches a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType,
};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use time::OffsetDateTime;
use tokio::sync::watch;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::{Clock, Credentials, Error, Issued, Issuer, Params, Store, Versions};
use crate::model::SpiffeId;

/// Signs whatever it is asked for.
pub(crate) struct Authority {
    root: CertificateDer<'static>,
    issuer: rcgen::Issuer<'static, KeyPair>,
    pub(crate) asked: AtomicU32,
    /// While true, nobody is answered.
    pub(crate) busy: watch::Sender<bool>,
}

/// What a leaf says.
pub(crate) struct Leaf<'a> {
    pub(crate) uris: &'a [&'a str],
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).unwrap().der().clone();
        Self {
            issuer: rcgen::Issuer::new(params, key),
            root,
            asked: AtomicU32::new(0),
            busy: watch::Sender::new(false),
        }
    }

    /// An authority that this one vouches for; its root is the certificate in between.
    pub(crate) fn below(&self) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let name = rcgen::DnType::CommonName;
        params.distinguished_name.push(name, "in between");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self {
            issuer: rcgen::Issuer::new(params, key),
            root,
            asked: AtomicU32::new(0),
            busy: watch::Sender::new(false),
        }
    }

    /// The list of these revoked certificates; it is out of date since an hour.
    pub(crate) fn list(
        &self,
        revoked: &[&CertificateDer<'_>],
    ) -> CertificateRevocationListDer<'static> {
        let now = wall_clock();
        let hours = |n: u64| Duration::from_secs(n * 3600);
        let revoked = revoked.iter().map(|der| {
            let (_, certificate) = X509Certificate::from_der(der).unwrap();
            RevokedCertParams {
                serial_number: certificate.raw_serial().to_vec().into(),
                revocation_time: OffsetDateTime::from(now - hours(3)),
                reason_code: None,
                invalidity_date: None,
            }
        });
        let params = CertificateRevocationListParams {
            this_update: OffsetDateTime::from(now - hours(2)),
            next_update: OffsetDateTime::from(now - hours(1)),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().clone()
    }

    pub(crate) fn root(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    pub(crate) fn leaf(&self, leaf: Leaf<'_>) -> Issued {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = OffsetDateTime::from(leaf.not_before);
        params.not_after = OffsetDateTime::from(leaf.not_after);
        let uris = leaf.uris.iter();
        params.subject_alt_names = uris
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.extended_key_usages = leaf.usages;
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued {
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            chain: vec![certificate.der().clone()],
            roots: vec![self.root()],
        }
    }

    /// Credentials whose certificate carries these URIs, the first being their name.
    pub(crate) fn credentials(&self, uris: &[&str]) -> Arc<Credentials> {
        let issued = self.leaf(Leaf {
            uris,
            ..Leaf::default()
        });
        Arc::new(Credentials::new(uris[0].parse().unwrap(), issued, Versions::Only13).unwrap())
    }
}

impl Default for Leaf<'_> {
    fn default() -> Self {
        let now = wall_clock();
        Self {
            uris: &[],
            not_before: now - Duration::from_secs(60),
            not_after: now + Duration::from_secs(3600),
            usages: vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        }
    }
}

impl Issuer for Authority {
    async fn issue(&self, id: &SpiffeId, now: SystemTime, ttl: Duration) -> Result<Issued, Error> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut busy = self.busy.subscribe();
        drop(busy.wait_for(|busy| !busy).await.unwrap());
        Ok(self.leaf(Leaf {
            uris: &[&id.to_string()],
            not_before: now,
            not_after: now + ttl,
            ..Leaf::default()
        }))
    }
}

/// A store that is driven in the background for as long as the test's runtime lives.
pub(crate) fn store(issuer: impl Issuer) -> Arc<Store> {
    let store = Arc::new(Store::new(Params::default(), paused_clock()));
    let running = Arc::clone(&store);
    drop(tokio::spawn(async move { running.run(&issuer).await }));
    store
}

/// The wall clock at the first call, then moved by the runtime's clock, which tests pause.
pub(crate) fn paused_clock() -> Clock {
    let (wall, start) = (wall_clock(), tokio::time::Instant::now());
    Arc::new(move || wall + start.elapsed())
}

#[expect(
    clippy::disallowed_methods,
    reason = "TLS verifies against the real time"
)]
pub(crate) fn wall_clock() -> SystemTime {
    SystemTime::now()
}

pub(crate) fn id(service_account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{service_account}")
        .parse()
        .unwrap()
}

/// A directory of one test, removed when it ends.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ztunnel-identity-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            println!("{} stays: {e}", self.0.display());
        }
    }
}
