//! A certificate in the dump. Takes what the store says of an identity, gives what serde writes;
//! never sees a private key.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use crate::identity::CertificateState;
use crate::model::SpiffeId;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CertificateView {
    identity: String,
    state: String,
    cert_chain: Vec<CertView>,
    root_certs: Vec<CertView>,
}

impl CertificateView {
    pub(super) fn of((id, state): &(SpiffeId, CertificateState)) -> Self {
        let (state, chain, roots) = match state {
            CertificateState::Available(held) => {
                ("Available".to_owned(), held.chain(), held.roots())
            }
            CertificateState::Initializing => ("Initializing".to_owned(), &[][..], &[][..]),
            CertificateState::Unavailable(why) => (format!("Unavailable: {why}"), &[][..], &[][..]),
        };
        Self {
            identity: id.to_string(),
            state,
            cert_chain: chain.iter().filter_map(CertView::of).collect(),
            root_certs: roots.iter().filter_map(CertView::of).collect(),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertView {
    /// The PEM text, once more in base64.
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

impl CertView {
    fn of(der: &CertificateDer<'static>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let validity = parsed.validity();
        let time = |time: x509_parser::time::ASN1Time| {
            // The formatter knows no time before its epoch.
            let seconds = time.timestamp().max(0).unsigned_abs();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            humantime::format_rfc3339_seconds(time).to_string()
        };
        Some(Self {
            pem: STANDARD.encode(pem(der)),
            serial_number: parsed.tbs_certificate.serial.to_string(),
            valid_from: time(validity.not_before),
            expiration_time: time(validity.not_after),
        })
    }
}

fn pem(der: &CertificateDer<'_>) -> String {
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    let base64 = STANDARD.encode(der);
    let mut rest = base64.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at_checked(LINE).unwrap_or((rest, ""));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// Characters of a line of PEM (RFC 7468).
const LINE: usize = 64;
