//! What TLS says in clear, or says after decryption about itself. Takes bytes, gives where a record
//! ends, alerts and what follows a handshake; never decrypts and never keeps a byte.

use thiserror::Error;

/// What a peer must not send.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum Violation {
    /// A record that does not decrypt: it was changed on its way.
    #[error("a record that was not sealed by the peer")]
    BadRecord,
    /// A message that cannot be read.
    #[error("a malformed message")]
    Malformed,
    /// More than a record may hold.
    #[error("a record of {0} bytes")]
    Oversized(usize),
    /// Message after message without a byte for the application.
    #[error("too many messages without application data")]
    Restless,
    /// Something that has no place here.
    #[error("an unexpected message")]
    Unexpected,
}

impl Violation {
    /// What the peer is told.
    #[must_use]
    pub(super) const fn alert(self) -> u8 {
        match self {
            Self::BadRecord => 20,
            Self::Malformed => 50,
            Self::Oversized(_) => 22,
            Self::Restless | Self::Unexpected => 10,
        }
    }
}

/// How long the first record is, header and all, once its header is here.
///
/// # Errors
/// When this is no record that may follow a handshake.
pub(super) fn record(bytes: &[u8]) -> Result<Option<usize>, Violation> {
    let Some(&[kind, major, _, high, low]) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    if !matches!(kind, ALERT | HANDSHAKE | APPLICATION_DATA) || major != 3 {
        return Err(Violation::Unexpected);
    }
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len > MAX_SEALED_BYTES {
        return Err(Violation::Oversized(len));
    }
    Ok(Some(HEADER_BYTES + len))
}

/// What an alert means for the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alert {
    /// The peer will send no more.
    Close,
    /// Nothing.
    Ignored,
    /// The peer has given up, and why.
    Fatal(u8),
}

/// Reads an alert.
///
/// # Errors
/// When it is not two bytes.
pub(super) const fn alert(payload: &[u8]) -> Result<Alert, Violation> {
    match payload {
        [_, CLOSE_NOTIFY] => Ok(Alert::Close),
        [_, USER_CANCELED] => Ok(Alert::Ignored),
        [_, description] => Ok(Alert::Fatal(*description)),
        _ => Err(Violation::Malformed),
    }
}

/// What a peer may say about the session after the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// It seals with a new key from now on, and perhaps wants us to do so too.
    KeyUpdate { requested: bool },
    /// A ticket for a resumption that we never do.
    Ticket,
}

/// Takes the first message off `bytes`, once all of it is here.
///
/// # Errors
/// When it is none that may come, or is too long.
pub(super) fn message(bytes: &mut Vec<u8>) -> Result<Option<Message>, Violation> {
    let Some(&[kind, high, middle, low]) = bytes.first_chunk::<4>() else {
        return Ok(None);
    };
    let len = (usize::from(high) << 16) | usize::from(u16::from_be_bytes([middle, low]));
    let limit = match kind {
        NEW_SESSION_TICKET => MAX_TICKET_BYTES,
        KEY_UPDATE => 1,
        _ => return Err(Violation::Unexpected),
    };
    if len > limit {
        return Err(Violation::Malformed);
    }
    let Some(body) = bytes.get(4..4 + len) else {
        return Ok(None);
    };
    let message = match (kind, body) {
        (NEW_SESSION_TICKET, _) => Message::Ticket,
        (_, [0]) => Message::KeyUpdate { requested: false },
        (_, [1]) => Message::KeyUpdate { requested: true },
        _ => return Err(Violation::Malformed),
    };
    bytes.drain(..4 + len);
    Ok(Some(message))
}

/// Type, version and length stand before every record.
pub(super) const HEADER_BYTES: usize = 5;
/// Plaintext of one record.
pub(super) const MAX_PLAIN_BYTES: usize = 1 << 14;
/// A sealed record may be longer by so much (TLS 1.2; 1.3 allows less, which shows once it is open).
pub(super) const MAX_SEALED_BYTES: usize = MAX_PLAIN_BYTES + 2048;
/// A nonce, a lifetime, extensions and a ticket; real ones have a few hundred bytes.
const MAX_TICKET_BYTES: usize = 16 << 10;
/// A KeyUpdate that wants none in return.
pub(super) const KEY_UPDATED: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];
/// An alert that ends our direction.
pub(super) const CLOSED: [u8; 2] = [1, CLOSE_NOTIFY];

pub(super) const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
pub(super) const APPLICATION_DATA: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_whole_partial_or_refused() {
        for (bytes, expected) in [
            (&[][..], Ok(None)),
            (&[23, 3, 3, 0], Ok(None)),
            (&[23, 3, 3, 0, 17], Ok(Some(22))),
            (&[23, 3, 3, 0, 1, 9, 9, 9], Ok(Some(6))),
            (&[23, 3, 3, 0x48, 0], Ok(Some(18_437))),
            (&[23, 3, 3, 0x48, 1], Err(Violation::Oversized(18_433))),
            (&[20, 3, 3, 0, 1], Err(Violation::Unexpected)),
            (&[24, 3, 3, 0, 1], Err(Violation::Unexpected)),
            (b"GET / HTTP/1.1", Err(Violation::Unexpected)),
        ] {
            assert_eq!(record(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn an_alert_ends_or_is_ignored() {
        assert_eq!(alert(&CLOSED), Ok(Alert::Close));
        assert_eq!(alert(&[1, 90]), Ok(Alert::Ignored));
        assert_eq!(alert(&[2, 48]), Ok(Alert::Fatal(48)));
        assert_eq!(alert(&[2]), Err(Violation::Malformed));
        assert_eq!(alert(&[2, 0, 0]), Err(Violation::Malformed));
    }

    #[test]
    fn messages_are_taken_whole_however_they_were_cut() {
        let mut bytes = vec![4, 0, 0, 3, 1, 2, 3];
        bytes.extend(KEY_UPDATED);
        bytes.extend([24, 0, 0, 1, 1]);
        let (mut held, mut found) = (Vec::new(), Vec::new());
        for byte in bytes {
            held.push(byte);
            found.extend(message(&mut held).unwrap());
        }
        let update = |requested| Message::KeyUpdate { requested };
        assert_eq!(found, [Message::Ticket, update(false), update(true)]);
        assert!(held.is_empty());
    }

    #[test]
    fn other_messages_are_refused() {
        for (bytes, expected) in [
            (&[0, 0, 0, 0][..], Violation::Unexpected),
            (&[13, 0, 0, 0], Violation::Unexpected),
            (&[4, 1, 0, 0], Violation::Malformed),
            (&[24, 0, 0, 2], Violation::Malformed),
            (&[24, 0, 0, 0], Violation::Malformed),
            (&[24, 0, 0, 1, 2], Violation::Malformed),
        ] {
            assert_eq!(message(&mut bytes.to_vec()), Err(expected), "{bytes:?}");
        }
    }

    #[test]
    fn every_violation_has_the_alert_that_names_it() {
        assert_eq!(Violation::BadRecord.alert(), 20);
        assert_eq!(Violation::Oversized(1).alert(), 22);
        assert_eq!(Violation::Malformed.alert(), 50);
        assert_eq!(Violation::Unexpected.alert(), 10);
        assert_eq!(Violation::Restless.alert(), 10);
    }
}
