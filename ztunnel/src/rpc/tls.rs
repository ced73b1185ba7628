//! TLS towards the control plane. Takes roots and names, gives a configuration; proves nothing about us, that is the
//! token's part.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::error::Error;
use super::params::Params;
use crate::model::KeyExchange;

/// A configuration that trusts these roots; the certificate may carry another name instead of the one dialled.
// PROTOCOL.md#control-plane-tls
pub(super) fn config(
    roots: RootCertStore,
    params: &Params,
    endpoint: &str,
) -> Result<ClientConfig, Error> {
    let failed = |source: TlsError| Error::Tls {
        endpoint: endpoint.to_owned(),
        source: std::io::Error::other(source),
    };
    let mut provider = default_provider();
    if params.key_exchange == KeyExchange::PostQuantum {
        provider.kx_groups = vec![kx_group::X25519MLKEM768];
    }
    let provider = Arc::new(provider);
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(failed)?;
    let mut config = match params.other_name.as_deref() {
        None => builder.with_root_certificates(roots).with_no_client_auth(),
        Some(other) => {
            let other = ServerName::try_from(other.to_owned())
                .map_err(|_invalid| Error::Name(other.to_owned()))?;
            let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|e| failed(TlsError::General(e.to_string())))?;
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(EitherName { chain, other }))
                .with_no_client_auth()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Verifies the chain, then the name that was dialled, then another one.
#[derive(Debug)]
struct EitherName {
    chain: Arc<WebPkiServerVerifier>,
    other: ServerName<'static>,
}

impl ServerCertVerifier for EitherName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let verify = |name: &ServerName<'_>| {
            self.chain
                .verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
        };
        match verify(server_name) {
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => verify(&self.other),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rustls::NamedGroup;

    use super::*;
    use crate::rpc::Roots;

    #[test]
    fn the_control_plane_is_offered_the_groups_that_the_policy_allows() {
        for (key_exchange, hybrid_alone) in
            [(KeyExchange::Any, false), (KeyExchange::PostQuantum, true)]
        {
            let params = Params {
                endpoint: "istiod:15012".parse().unwrap(),
                roots: Roots::System,
                other_name: None,
                token: None,
                cluster_id: String::new(),
                headers: Vec::new(),
                key_exchange,
            };
            let config = config(RootCertStore::empty(), &params, "istiod:15012").unwrap();
            let groups = config.crypto_provider().kx_groups.iter();
            let groups: Vec<NamedGroup> = groups.map(|group| group.name()).collect();
            assert_eq!(groups == [NamedGroup::X25519MLKEM768], hybrid_alone);
        }
    }
}
