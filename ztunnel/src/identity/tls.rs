//! TLS for one certificate. Takes what an issuer gave, gives configurations that are built once
//! per certificate; never opens a connection.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::server::NoServerSessionStorage;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::ca::Issued;
use super::error::Error;
use super::followed::Role;
use super::revocation::{Revocation, Revocations};
use super::verify::{ClientVerifier, Roots, ServerVerifier};
use crate::model::{KeyExchange, SpiffeId};

/// Which versions of TLS both ends speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Versions {
    /// 1.3, and 1.2 with a peer that has nothing newer.
    From12,
    /// 1.3 alone.
    #[default]
    Only13,
}

/// By which rules both ends speak.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Which versions.
    pub versions: Versions,
    /// How keys are exchanged.
    pub exchange: KeyExchange,
    /// Which certificates are not taken any more.
    pub revocations: Revocations,
}

impl From<Versions> for Rules {
    fn from(versions: Versions) -> Self {
        Self {
            versions,
            ..Self::default()
        }
    }
}

impl Versions {
    fn protocols(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::From12 => FROM_12,
            Self::Only13 => ONLY_13,
        }
    }
}

/// A certificate ready for both ends of TLS.
pub struct Credentials {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    roots: Roots,
    root_certificates: Vec<CertificateDer<'static>>,
    not_before: SystemTime,
    not_after: SystemTime,
    server: Arc<ServerConfig>,
    /// Complete but for the identities that it expects.
    client: ClientConfig,
}

impl Credentials {
    /// Builds both configurations; the key is parsed here and never again.
    ///
    /// # Errors
    /// When the chain is malformed, or does not fit the key.
    pub fn new(id: SpiffeId, issued: Issued, rules: impl Into<Rules>) -> Result<Self, Error> {
        let Rules {
            versions,
            exchange,
            revocations,
        } = rules.into();
        let tls = |source| Error::Credentials {
            id: id.clone(),
            source,
        };
        let (not_before, not_after) = validity(&id, &issued.chain)?;
        let roots = Roots::new(&issued.roots, revocations).map_err(tls)?;
        let provider = Arc::new(provider(versions, exchange));
        let server = server_config(&id, &issued, &roots, &provider, versions)?;
        let client = client_config(&issued, &roots, &provider, versions).map_err(tls)?;
        Ok(Self {
            id,
            chain: issued.chain,
            roots,
            root_certificates: issued.roots,
            not_before,
            not_after,
            server: Arc::new(server),
            client,
        })
    }

    /// Whose they are.
    #[must_use]
    pub const fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The leaf, then intermediates.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The roots that vouch for peers.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.root_certificates
    }

    /// When validity begins.
    #[must_use]
    pub const fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When validity ends.
    #[must_use]
    pub const fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// How long this certificate and the leaf of a verified peer are both valid, by the clock that
    /// verification goes by. A tunnel must not take streams for longer.
    // PROTOCOL.md#certificate-expiry
    #[must_use]
    pub fn valid_with(&self, peer: &[CertificateDer<'_>]) -> Duration {
        let Some(now) = self.now() else {
            return Duration::ZERO;
        };
        let theirs = validity(&self.id, peer).map(|(_, not_after)| not_after);
        let end = theirs.map_or(SystemTime::UNIX_EPOCH, |theirs| theirs.min(self.not_after));
        end.duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .saturating_sub(Duration::from_secs(now.as_secs()))
    }

    /// Whether a list of now revokes this certificate itself, or who signed it.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        let Some((leaf, intermediates)) = self.chain.split_first() else {
            return false;
        };
        // By its own beginning: what is asked here is not whether it has expired.
        let when = self.not_before.duration_since(SystemTime::UNIX_EPOCH);
        let when = UnixTime::since_unix_epoch(when.unwrap_or_default());
        self.roots
            .is_revoked(Role::Server, leaf, intermediates, when)
    }

    /// Follows the revocation of this certificate and that of the verified peer of a tunnel, which
    /// is in this role.
    #[must_use]
    pub fn revocation(self: &Arc<Self>, role: Role, peer: &[CertificateDer<'_>]) -> Revocation {
        let since = self
            .now()
            .unwrap_or_else(|| UnixTime::since_unix_epoch(Duration::ZERO));
        Revocation::new(self, (role, peer), since)
    }

    pub(super) fn is_peer_revoked(
        &self,
        role: Role,
        peer: &[CertificateDer<'_>],
        when: UnixTime,
    ) -> bool {
        peer.split_first().is_some_and(|(leaf, intermediates)| {
            self.roots.is_revoked(role, leaf, intermediates, when)
        })
    }

    pub(super) const fn revocations(&self) -> &Revocations {
        self.roots.revocations()
    }

    /// For accepting tunnels: the peer must prove an identity in our trust domain.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For opening a tunnel to a peer that must prove one of `expected`; none matches nobody.
    /// Copies pointers: neither key nor chain is parsed.
    #[must_use]
    pub fn client_config(&self, expected: &[SpiffeId]) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(ServerVerifier {
                roots: self.roots.clone(),
                expected: expected.to_vec(),
            }));
        Arc::new(config)
    }

    /// The time that verification goes by.
    fn now(&self) -> Option<UnixTime> {
        self.server.time_provider.current_time()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("id", &self.id)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn validity(
    id: &SpiffeId,
    chain: &[CertificateDer<'_>],
) -> Result<(SystemTime, SystemTime), Error> {
    let Some(Ok((_, leaf))) = chain.first().map(|der| X509Certificate::from_der(der)) else {
        return Err(Error::Malformed { id: id.clone() });
    };
    let validity = leaf.validity();
    Ok((
        SystemTime::from(validity.not_before.to_datetime()),
        SystemTime::from(validity.not_after.to_datetime()),
    ))
}

fn server_config(
    id: &SpiffeId,
    issued: &Issued,
    roots: &Roots,
    provider: &Arc<CryptoProvider>,
    versions: Versions,
) -> Result<ServerConfig, Error> {
    let tls = |source| Error::Credentials {
        id: id.clone(),
        source,
    };
    let Ok(verifier) = ClientVerifier::new(roots, id.trust_domain(), provider) else {
        return Err(Error::Malformed { id: id.clone() }); // without any root
    };
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(versions.protocols())
        .map_err(tls)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(issued.chain.clone(), issued.key.clone_key())
        .map_err(tls)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // No client of ours resumes, so tickets would be work for nothing.
    config.send_tls13_tickets = 0;
    // The tunnel seals and opens the records itself, with the library's ciphers.
    config.enable_secret_extraction = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

fn client_config(
    issued: &Issued,
    roots: &Roots,
    provider: &Arc<CryptoProvider>,
    versions: Versions,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(versions.protocols())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier {
            roots: roots.clone(),
            expected: Vec::new(),
        }))
        .with_client_auth_cert(issued.chain.clone(), issued.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = true;
    config.enable_sni = false;
    Ok(config)
}

/// Suites as the established proxy has them; the hybrid group stands first, so that recorded
/// traffic stays closed to a later quantum computer.
// PROTOCOL.md#tls
fn provider(versions: Versions, exchange: KeyExchange) -> CryptoProvider {
    let mut cipher_suites = vec![
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_AES_128_GCM_SHA256,
    ];
    if versions == Versions::From12 {
        cipher_suites.extend([
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        ]);
    }
    let mut kx_groups = vec![kx_group::X25519MLKEM768];
    if exchange == KeyExchange::Any {
        kx_groups.extend([kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1]);
    }
    CryptoProvider {
        cipher_suites,
        kx_groups,
        ..default_provider()
    }
}

static FROM_12: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];
static ONLY_13: &[&SupportedProtocolVersion] = &[&TLS13];
// PROTOCOL.md#alpn
const ALPN: &[u8] = b"h2";

#[cfg(test)]
mod tests;
