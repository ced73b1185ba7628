//! HBONE in.
