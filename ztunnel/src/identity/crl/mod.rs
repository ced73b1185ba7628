//! The file of revoked certificates. Takes its bytes, gives the lists that they hold or says which
//! one is malformed; never verifies a signature, because whose word counts depends on the chain
//! that is asked about.

use std::fmt;

use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use thiserror::Error;
use webpki::{CertRevocationList, EndEntityCert, OwnedCertRevocationList};

/// All lists of one file.
#[derive(Default)]
pub struct RevocationLists(Vec<CertRevocationList<'static>>);

/// Why a file holds no lists that can be used.
#[derive(Debug, Error)]
pub enum ListFault {
    /// One of them is not a list, or one of a kind that nobody can judge by.
    #[error("revocation list {number} cannot be used")]
    Malformed {
        /// From 1.
        number: usize,
        /// What is wrong with it.
        source: webpki::Error,
    },
    /// The text around a list is broken.
    #[error("the PEM text after {lists} revocation lists is broken: {what}")]
    Pem {
        /// How many came before.
        lists: usize,
        /// What is wrong with it.
        what: String,
    },
}

impl RevocationLists {
    /// Reads PEM, in which other sections are passed over, or one list in DER. Nothing at all is no
    /// list at all.
    ///
    /// # Errors
    /// When a list is malformed: none of the others is used then.
    // PROTOCOL.md#crl-file
    pub fn parse(bytes: &[u8]) -> Result<Self, ListFault> {
        if bytes.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let mut lists = Vec::new();
        if !is_pem(bytes) {
            lists.push(list(1, bytes)?);
            return Ok(Self(lists));
        }
        for section in CertificateRevocationListDer::pem_slice_iter(bytes) {
            match section {
                Ok(der) => lists.push(list(lists.len() + 1, &der)?),
                Err(pem::Error::NoItemsFound) => {}
                Err(error) => {
                    return Err(ListFault::Pem {
                        lists: lists.len(),
                        what: error.to_string(),
                    });
                }
            }
        }
        Ok(Self(lists))
    }

    /// How many lists.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no list.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The lists that have the name of this certificate's issuer and its number. Whether they are
    /// the issuer's own is another question.
    pub fn naming<'a>(
        &'a self,
        certificate: &'a CertificateDer<'a>,
    ) -> impl Iterator<Item = &'a CertRevocationList<'static>> {
        // One that cannot be read was not accepted, and is accepted by nobody.
        let certificate = EndEntityCert::try_from(certificate).ok();
        certificate.into_iter().flat_map(|certificate| {
            self.0.iter().filter(move |list| {
                let named = list.find_serial(certificate.serial());
                list.issuer() == certificate.issuer() && !matches!(named, Ok(None))
            })
        })
    }
}

impl fmt::Debug for RevocationLists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RevocationLists({})", self.0.len())
    }
}

fn list(number: usize, der: &[u8]) -> Result<CertRevocationList<'static>, ListFault> {
    OwnedCertRevocationList::from_der(der)
        .map(CertRevocationList::Owned)
        .map_err(|source| ListFault::Malformed { number, source })
}

fn is_pem(bytes: &[u8]) -> bool {
    let mark = b"-----BEGIN";
    bytes.windows(mark.len()).any(|window| window == mark)
}

#[cfg(test)]
mod tests;
