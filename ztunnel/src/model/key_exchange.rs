//! How both ends of a TLS connection come to their keys.

/// Which groups are offered and taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyExchange {
    /// The hybrid group, and those that older peers know.
    #[default]
    Any,
    /// X25519MLKEM768 alone, which a quantum computer does not undo.
    PostQuantum,
}
