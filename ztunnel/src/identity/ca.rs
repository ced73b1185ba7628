//! Where certificates come from: takes an identity and a time, gives a key and a chain for it, here
//! signed by a root kept in a directory; never caches and never decides who may have which.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, string::Ia5String,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::directory::{Directory, Pair};
use super::error::Error;
use super::revocation::Revocations;
use super::verify::Roots;
use crate::model::SpiffeId;

/// A fresh key with the certificate that names it.
#[derive(Debug)]
pub struct Issued {
    /// The private key.
    pub key: PrivateKeyDer<'static>,
    /// The leaf, then intermediates; never the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots that vouch for peers, one or more.
    pub roots: Vec<CertificateDer<'static>>,
}

/// A source of certificates.
pub trait Issuer: Send + Sync + 'static {
    /// A certificate for `id`, valid from about `now` for `ttl` or less.
    fn issue(
        &self,
        id: &SpiffeId,
        now: SystemTime,
        ttl: Duration,
    ) -> impl Future<Output = Result<Issued, Error>> + Send;
}

/// A certificate authority in a directory: `root-cert.pem` and `root-key.pem`.
#[derive(Debug)]
pub struct LocalCa {
    path: PathBuf,
    issuer: rcgen::Issuer<'static, KeyPair>,
    /// The first is ours; more of them are trusted too, so that a root can be replaced.
    roots: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl LocalCa {
    /// Opens the authority in `dir`. Without any file there, a root is created that lasts ten
    /// years; an existing pair (PEM; EC P-256 or P-384, or RSA; PKCS#8, SEC1 or PKCS#1) is used as
    /// it is. Blocks on the file system.
    ///
    /// # Errors
    /// Names the file and the remedy: unreadable, readable by others, not a pair, not an
    /// authority, expired, garbage, no space.
    pub fn open(dir: &Path, now: SystemTime) -> Result<Self, Error> {
        let directory = Directory::new(dir);
        let path = directory.certificate();
        let pair = directory.load_or_create(|| new_root(&path, now))?;
        Self::of(&directory, &pair, now)
    }

    /// Opens the authority that is in `dir` by now, and never makes one. Blocks on the file system.
    ///
    /// # Errors
    /// As [`LocalCa::open`], and when nothing is there.
    pub fn reopen(dir: &Path, now: SystemTime) -> Result<Self, Error> {
        let directory = Directory::new(dir);
        let gone = || Error::CaMissing(directory.certificate());
        let pair = directory.load()?.ok_or_else(gone)?;
        Self::of(&directory, &pair, now)
    }

    /// The certificate and the key that `open` reads.
    #[must_use]
    pub fn files(dir: &Path) -> [PathBuf; 2] {
        let directory = Directory::new(dir);
        [directory.certificate(), directory.key()]
    }

    /// How many roots vouch for peers.
    #[must_use]
    pub const fn roots(&self) -> usize {
        self.roots.len()
    }

    /// Whether both sign with the same key and trust the same roots, in the same order.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        // The first certificate holds the key.
        self.roots == other.roots
    }

    fn of(directory: &Directory, pair: &Pair, now: SystemTime) -> Result<Self, Error> {
        let path = directory.certificate();
        let key = read_key(directory, pair)?;
        let roots = read_certificates(&path, pair)?;
        let garbage = || Error::CaGarbage {
            path: path.clone(),
            expected: "certificate",
        };
        let first = roots.first().ok_or_else(garbage)?;
        let Ok((_, certificate)) = X509Certificate::from_der(first) else {
            return Err(garbage());
        };
        let not_after = check(directory, &certificate, &key, now)?;
        let Ok(issuer) = rcgen::Issuer::from_ca_cert_der(first, key) else {
            return Err(garbage());
        };
        let ca = Self {
            path,
            issuer,
            roots,
            not_after,
        };
        ca.probe(now)?;
        Ok(ca)
    }

    /// Signs a certificate for `id`: P-256, one critical SPIFFE URI, for both ends of TLS.
    ///
    /// # Errors
    /// When the root has expired, or signing fails.
    pub fn sign(&self, id: &SpiffeId, now: SystemTime, ttl: Duration) -> Result<Issued, Error> {
        let sign = |source| Error::Sign {
            id: id.clone(),
            source: Arc::new(source),
        };
        // A life that no clock can represent ends with the root's, like every one that is too long.
        let end = now.checked_add(ttl);
        let not_after = end.map_or(self.not_after, |end| end.min(self.not_after));
        if not_after <= now {
            return Err(Error::CaExpired(self.path.clone()));
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(sign)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = OffsetDateTime::from(now - CLOCK_SKEW);
        params.not_after = OffsetDateTime::from(not_after);
        params.subject_alt_names = vec![SanType::URI(
            Ia5String::try_from(id.to_string()).map_err(sign)?,
        )];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&key, &self.issuer).map_err(sign)?;
        Ok(Issued {
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            chain: vec![leaf.der().clone()],
            roots: self.roots.clone(),
        })
    }

    /// Signs once and verifies it as a peer would, so that a root which cannot work is refused at
    /// the start and not at the first connection.
    fn probe(&self, now: SystemTime) -> Result<(), Error> {
        let unusable = |source| Error::CaUnusable {
            path: self.path.clone(),
            source,
        };
        let Ok(id) = PROBE.parse::<SpiffeId>() else {
            return Err(Error::CaNotAuthority(self.path.clone()));
        };
        let issued = self.sign(&id, now, CLOCK_SKEW)?;
        let roots = Roots::new(&issued.roots, Revocations::default()).map_err(unusable)?;
        let since_epoch = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let leaf = issued
            .chain
            .first()
            .ok_or_else(|| Error::CaNotAuthority(self.path.clone()))?;
        roots
            .verify_server(leaf, &[], UnixTime::since_unix_epoch(since_epoch))
            .map_err(unusable)
    }
}

impl Issuer for LocalCa {
    async fn issue(&self, id: &SpiffeId, now: SystemTime, ttl: Duration) -> Result<Issued, Error> {
        self.sign(id, now, ttl)
    }
}

fn new_root(path: &Path, now: SystemTime) -> Result<Pair, Error> {
    let failed = |source| Error::CaSign {
        path: path.to_owned(),
        source: Arc::new(source),
    };
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, ROOT_ORGANIZATION);
    params.distinguished_name = name;
    params.not_before = OffsetDateTime::from(now - CLOCK_SKEW);
    params.not_after = OffsetDateTime::from(now + ROOT_LIFETIME);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let root = params.self_signed(&key).map_err(failed)?;
    Ok(Pair {
        certificate: root.pem(),
        key: key.serialize_pem(),
    })
}

fn read_key(directory: &Directory, pair: &Pair) -> Result<KeyPair, Error> {
    PrivateKeyDer::from_pem_slice(pair.key.as_bytes())
        .ok()
        .and_then(|der| KeyPair::try_from(&der).ok())
        .ok_or_else(|| Error::CaGarbage {
            path: directory.key(),
            expected: "private key (EC P-256 or P-384, or RSA)",
        })
}

fn read_certificates(path: &Path, pair: &Pair) -> Result<Vec<CertificateDer<'static>>, Error> {
    CertificateDer::pem_slice_iter(pair.certificate.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .ok_or_else(|| Error::CaGarbage {
            path: path.to_owned(),
            expected: "certificate",
        })
}

/// What can be said precisely before anything is signed; gives the end of validity.
fn check(
    directory: &Directory,
    certificate: &X509Certificate<'_>,
    key: &KeyPair,
    now: SystemTime,
) -> Result<SystemTime, Error> {
    let path = directory.certificate();
    if certificate.public_key().subject_public_key.data != key.public_key_raw() {
        return Err(Error::CaKeyMismatch {
            key: directory.key(),
            certificate: path,
        });
    }
    let signs = match certificate.key_usage() {
        Ok(usage) => usage.is_none_or(|usage| usage.value.key_cert_sign()),
        Err(_) => false,
    };
    if !certificate.is_ca() || !signs {
        return Err(Error::CaNotAuthority(path));
    }
    let not_before = SystemTime::from(certificate.validity().not_before.to_datetime());
    let not_after = SystemTime::from(certificate.validity().not_after.to_datetime());
    if now < not_before || not_after <= now {
        return Err(Error::CaExpired(path));
    }
    Ok(not_after)
}

/// Nodes may disagree about the time by this much.
// PROTOCOL.md#clock-skew
const CLOCK_SKEW: Duration = Duration::from_secs(120);
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const ROOT_ORGANIZATION: &str = "cluster.local";
/// Nobody's identity: it names no namespace that a cluster can have.
const PROBE: &str = "spiffe://probe/ns/-/sa/-";

#[cfg(test)]
mod tests;
