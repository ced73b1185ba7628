//! Certificates and TLS.
