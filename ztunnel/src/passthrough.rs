//! Inbound that is not HBONE.
