//! The keys of one session after its handshake. Takes what the handshake agreed on, gives sealed
//! and opened records; the ciphers and the schedule are the TLS library's, never ours.

use std::ops::Range;

use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::{
    ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, ProtocolVersion,
    SupportedCipherSuite,
};

use super::frame::{APPLICATION_DATA, HEADER_BYTES, KEY_UPDATED, Violation};

/// Keys for both directions.
pub(super) struct Keys {
    schedule: Box<dyn Schedule>,
    suite: SupportedCipherSuite,
    sealer: Sealer,
    opener: Opener,
    /// The peer wants us to change our key.
    owed: bool,
}

impl Keys {
    pub(super) fn new(
        secrets: ExtractedSecrets,
        schedule: Box<dyn Schedule>,
    ) -> Result<Self, Error> {
        let suite = schedule.suite();
        Ok(Self {
            sealer: Sealer::new(suite, secrets.tx)?,
            opener: Opener::new(suite, secrets.rx)?,
            schedule,
            suite,
            owed: false,
        })
    }

    /// Seals one record. Changes the key first when it has sealed as much as it may, or when the
    /// peer wants that.
    pub(super) fn seal(
        &mut self,
        kind: ContentType,
        payload: OutboundChunks<'_>,
        out: &mut impl Extend<Vec<u8>>,
    ) -> Result<(), Error> {
        if self.owed || self.sealer.records >= self.suite.limit() {
            self.renew(out)?;
        }
        out.extend([self.sealer.seal(kind, payload)?]);
        Ok(())
    }

    /// Changes our key before the next record: once, however often a peer asks that reads nothing.
    pub(super) const fn owe(&mut self) {
        self.owed = true;
    }

    /// Tells the peer that a new key follows, and uses it.
    fn renew(&mut self, out: &mut impl Extend<Vec<u8>>) -> Result<(), Error> {
        let update = OutboundChunks::Single(&KEY_UPDATED);
        // Before the update: a version that has no updates ends here, with nothing sent.
        let secrets = self.schedule.update_tx()?;
        out.extend([self.sealer.seal(ContentType::Handshake, update)?]);
        self.sealer = Sealer::new(self.suite, secrets)?;
        self.owed = false;
        Ok(())
    }

    /// The peer uses a new key from the next record on.
    pub(super) fn renewed(&mut self) -> Result<(), Error> {
        let secrets = self.schedule.update_rx()?;
        self.opener = Opener::new(self.suite, secrets)?;
        Ok(())
    }

    /// Opens one whole record where it lies: what it is, and where its plaintext is.
    pub(super) fn open(
        &mut self,
        record: &mut [u8],
    ) -> Result<(ContentType, Range<usize>), Violation> {
        self.opener.open(record)
    }
}

/// Where new keys come from.
pub(super) trait Schedule {
    fn suite(&self) -> SupportedCipherSuite;
    fn update_tx(&mut self) -> Result<Secrets, Error>;
    fn update_rx(&mut self) -> Result<Secrets, Error>;
}

impl<Role> Schedule for KernelConnection<Role> {
    fn suite(&self) -> SupportedCipherSuite {
        self.negotiated_cipher_suite()
    }

    fn update_tx(&mut self) -> Result<Secrets, Error> {
        self.update_tx_secret()
    }

    fn update_rx(&mut self) -> Result<Secrets, Error> {
        self.update_rx_secret()
    }
}

/// A key, and the number of records that it has sealed or opened.
type Secrets = (u64, ConnectionTrafficSecrets);

struct Sealer {
    encrypter: Box<dyn MessageEncrypter>,
    records: u64,
}

impl Sealer {
    fn new(suite: SupportedCipherSuite, (records, secrets): Secrets) -> Result<Self, Error> {
        let (key, iv) = parts(secrets)?;
        let mut encrypter = match suite {
            SupportedCipherSuite::Tls13(suite) => suite.aead_alg.encrypter(key, iv),
            SupportedCipherSuite::Tls12(suite) => {
                let (fixed, explicit) = split(&iv)?;
                suite.aead_alg.encrypter(key, fixed, explicit)
            }
        };
        if records > 0 {
            // The cipher checks its numbers against the first that it sees, which must be 0. What
            // it makes of that is thrown away: no number is used twice on the wire.
            drop(encrypter.encrypt(plain(ContentType::Alert, OutboundChunks::new_empty()), 0)?);
        }
        Ok(Self { encrypter, records })
    }

    fn seal(&mut self, kind: ContentType, payload: OutboundChunks<'_>) -> Result<Vec<u8>, Error> {
        let number = self.records;
        self.records = number.checked_add(1).ok_or(Error::EncryptError)?;
        let sealed = self.encrypter.encrypt(plain(kind, payload), number)?;
        Ok(sealed.encode())
    }
}

const fn plain(kind: ContentType, payload: OutboundChunks<'_>) -> OutboundPlainMessage<'_> {
    OutboundPlainMessage {
        typ: kind,
        version: ProtocolVersion::TLSv1_2,
        payload,
    }
}

struct Opener {
    decrypter: Box<dyn MessageDecrypter>,
    records: u64,
    /// Every record says that it is application data; what it is stands inside.
    disguised: bool,
}

impl Opener {
    fn new(suite: SupportedCipherSuite, (records, secrets): Secrets) -> Result<Self, Error> {
        let (key, iv) = parts(secrets)?;
        let (decrypter, disguised) = match suite {
            SupportedCipherSuite::Tls13(suite) => (suite.aead_alg.decrypter(key, iv), true),
            SupportedCipherSuite::Tls12(suite) => {
                let (fixed, _) = split(&iv)?;
                (suite.aead_alg.decrypter(key, fixed), false)
            }
        };
        Ok(Self {
            decrypter,
            records,
            disguised,
        })
    }

    fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, Range<usize>), Violation> {
        let base = record.as_ptr().addr();
        let Some((&mut [kind, major, minor, ..], payload)) =
            record.split_first_chunk_mut::<HEADER_BYTES>()
        else {
            return Err(Violation::Malformed);
        };
        if self.disguised && kind != APPLICATION_DATA {
            return Err(Violation::Unexpected);
        }
        let version = ProtocolVersion::from(u16::from_be_bytes([major, minor]));
        let sealed = InboundOpaqueMessage::new(ContentType::from(kind), version, payload);
        let number = self.records;
        self.records = number.checked_add(1).ok_or(Violation::BadRecord)?;
        let opened = self.decrypter.decrypt(sealed, number).map_err(violated)?;
        let start = opened.payload.as_ptr().addr() - base;
        Ok((opened.typ, start..start + opened.payload.len()))
    }
}

/// What a record was that the library refuses to open.
fn violated(error: Error) -> Violation {
    match error {
        Error::PeerSentOversizedRecord => Violation::Oversized(super::frame::MAX_PLAIN_BYTES + 1),
        Error::PeerMisbehaved(_) => Violation::Unexpected,
        _ => Violation::BadRecord,
    }
}

trait Limited {
    /// Records that one key may seal.
    fn limit(&self) -> u64;
}

impl Limited for SupportedCipherSuite {
    fn limit(&self) -> u64 {
        match self {
            Self::Tls13(suite) => suite.common.confidentiality_limit,
            Self::Tls12(suite) => suite.common.confidentiality_limit,
        }
    }
}

fn parts(
    secrets: ConnectionTrafficSecrets,
) -> Result<(rustls::crypto::cipher::AeadKey, rustls::crypto::cipher::Iv), Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv } => Ok((key, iv)),
        _ => Err(Error::General("a cipher that we never offer".to_owned())),
    }
}

/// TLS 1.2 sends eight bytes of the nonce with each record; four stay.
fn split(iv: &rustls::crypto::cipher::Iv) -> Result<(&[u8], &[u8]), Error> {
    let split = iv.as_ref().split_at_checked(4);
    split.ok_or_else(|| Error::General("a nonce that is too short".to_owned()))
}
