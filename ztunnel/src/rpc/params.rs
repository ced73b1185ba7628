//! Where the control plane is and how we prove ourselves to each other. Takes an operator's words, gives what a
//! connection is made with; reads files anew each time, because tokens and roots are replaced under us.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use http::{HeaderName, HeaderValue};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use thiserror::Error as ThisError;

use super::error::Error;
use crate::model::KeyExchange;

/// A host and port that are spoken to in TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
}

/// Why a text is no control-plane address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ThisError)]
pub enum InvalidEndpoint {
    /// It is not `host:port`.
    #[error("must be of the form https://host:port")]
    Form,
    /// It asks for plaintext.
    #[error("plaintext is not spoken with a control plane: use https")]
    Plaintext,
}

impl Endpoint {
    /// The name or address.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    // PROTOCOL.md#control-plane-tls
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = match text.split_once("://") {
            None => text,
            Some(("https", rest)) => rest,
            Some(("http", _)) => return Err(InvalidEndpoint::Plaintext),
            Some(_) => return Err(InvalidEndpoint::Form),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port),
            _ => (rest, HTTPS),
        };
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let port = port.parse().ok().filter(|port| *port != 0);
        match port {
            Some(port) if !host.is_empty() && !host.contains(['/', '?', '#', '@', '[']) => {
                Ok(Self {
                    host: host.to_owned(),
                    port,
                })
            }
            _ => Err(InvalidEndpoint::Form),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Who vouches for the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// PEM in a file.
    File(PathBuf),
    /// PEM.
    Inline(String),
    /// Whom this host trusts.
    System,
}

impl Roots {
    /// The anchors as they are now, and a text that is another one when they are others.
    pub(super) async fn read(&self) -> Result<(RootCertStore, Vec<u8>), Error> {
        let (pem, place) = match self {
            Self::File(path) => (read(path).await?, path.display().to_string()),
            Self::Inline(pem) => (pem.clone().into_bytes(), "the inline PEM".to_owned()),
            Self::System => return Ok((system(), Vec::new())),
        };
        let unusable = || Error::Roots {
            place: place.clone(),
        };
        let mut store = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let Ok(certificate) = certificate else {
                return Err(unusable());
            };
            store.add(certificate).map_err(|_not_x509| unusable())?;
        }
        if store.is_empty() {
            return Err(unusable());
        }
        Ok((store, pem))
    }
}

fn system() -> RootCertStore {
    let mut store = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let (_added, _ignored) = store.add_parsable_certificates(found.certs);
    store
}

/// How we prove who we are.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// In a file that somebody keeps fresh.
    File(PathBuf),
    /// As it is.
    Literal(String),
}

impl Token {
    // PROTOCOL.md#control-plane-token
    pub(super) async fn header(&self) -> Result<HeaderValue, Error> {
        let (text, path) = match self {
            Self::File(path) => {
                let bytes = read(path).await?;
                (String::from_utf8(bytes).ok(), path.clone())
            }
            Self::Literal(token) => (Some(token.clone()), PathBuf::from("AUTH_TOKEN")),
        };
        let text = text.unwrap_or_default();
        let token = text.trim();
        let header = HeaderValue::try_from(format!("Bearer {token}"));
        match header {
            Ok(mut header) if !token.is_empty() => {
                header.set_sensitive(true);
                Ok(header)
            }
            _ => Err(Error::Token { path }),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => f.write_str("Literal(…)"),
        }
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, Error> {
    use tokio::io::AsyncReadExt as _;
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    // Asked before opening: to open a pipe is to wait for its writer.
    let about = tokio::fs::metadata(path).await.map_err(failed)?;
    if !about.is_file() {
        return Err(failed(std::io::Error::other("not a regular file")));
    }
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    let mut bytes = Vec::new();
    let mut file = file.take(FILE_BYTES);
    file.read_to_end(&mut bytes).await.map_err(failed)?;
    Ok(bytes)
}

/// How a connection to the control plane is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params {
    /// Where it is.
    pub endpoint: Endpoint,
    /// Who vouches for it.
    pub roots: Roots,
    /// Another name that its certificate may carry.
    pub other_name: Option<String>,
    /// How we prove who we are.
    pub token: Option<Token>,
    /// Which cluster we belong to.
    pub cluster_id: String,
    /// Sent with each call.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Which groups are offered for the keys of TLS.
    pub key_exchange: KeyExchange,
}

const HTTPS: &str = "443";
/// More than any bundle of roots, or token, needs.
const FILE_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_https_and_a_bare_one_counts_as_it() {
        for (text, host, port) in [
            (
                "https://istiod.istio-system.svc:15012",
                "istiod.istio-system.svc",
                15012,
            ),
            ("istiod:15012", "istiod", 15012),
            ("https://istiod", "istiod", 443),
            ("https://istiod:15012/", "istiod", 15012),
            ("[fd00::1]:15012", "fd00::1", 15012),
            ("10.0.0.1:1", "10.0.0.1", 1),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!((endpoint.host(), endpoint.port()), (host, port), "{text}");
        }
    }

    #[test]
    fn plaintext_and_nonsense_are_no_endpoint() {
        let plain = "http://istiod:15010".parse::<Endpoint>();
        assert_eq!(plain.unwrap_err(), InvalidEndpoint::Plaintext);
        for text in [
            "",
            "https://",
            "h:0",
            "h:x",
            "h:70000",
            "ftp://h:1",
            "https://h:1/path",
            ":1",
        ] {
            assert_eq!(
                text.parse::<Endpoint>().unwrap_err(),
                InvalidEndpoint::Form,
                "{text}"
            );
        }
    }

    #[test]
    fn a_token_is_not_printed() {
        let printed = format!("{:?}", Token::Literal("secret".into()));
        assert!(!printed.contains("secret"), "{printed}");
    }
}
