//! The TLS handshake, either role. Takes a transport and a configuration, gives the session and the
//! peer's certificates; never judges an identity.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::BufMut as _;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ClientConfig, Error, ExtractedSecrets, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::Session;
use super::frame::{APPLICATION_DATA, CHANGE_CIPHER_SPEC, HEADER_BYTES, MAX_SEALED_BYTES};
use super::keys::{Keys, Schedule};

/// A session whose handshake is done.
pub(in crate::tunnel) struct Greeted<T> {
    pub(in crate::tunnel) session: Session<T>,
    /// What the peer proved to hold.
    pub(in crate::tunnel) chain: Vec<CertificateDer<'static>>,
}

/// Does the handshake as the client.
pub(in crate::tunnel) async fn connect<T: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    io: T,
) -> io::Result<Greeted<T>> {
    let role = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    Box::pin(greet(role, io)).await
}

/// Does the handshake as the server.
pub(in crate::tunnel) async fn accept<T: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ServerConfig>,
    io: T,
) -> io::Result<Greeted<T>> {
    let role = UnbufferedServerConnection::new(config).map_err(invalid)?;
    Box::pin(greet(role, io)).await
}

/// One of the two ends.
trait Role: Sized {
    type Data;
    fn process<'c, 'i>(
        &'c mut self,
        received: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn chain(&self) -> Vec<CertificateDer<'static>>;
    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn Schedule>), Error>;
}

impl Role for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        received: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(received)
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.peer_certificates().unwrap_or_default().to_vec()
    }

    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn Schedule>), Error> {
        let (secrets, schedule) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Box::new(schedule)))
    }
}

impl Role for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        received: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(received)
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.peer_certificates().unwrap_or_default().to_vec()
    }

    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn Schedule>), Error> {
        let (secrets, schedule) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Box::new(schedule)))
    }
}

async fn greet<R: Role, T: AsyncRead + AsyncWrite + Unpin>(
    mut role: R,
    mut io: T,
) -> io::Result<Greeted<T>> {
    let mut received = Vec::new();
    let mut sending = Vec::new();
    // The library sees record after record, none behind the handshake: it would answer what the
    // session must answer.
    let mut shown = 0;
    loop {
        let seen = received.get_mut(..shown).unwrap_or_default();
        let UnbufferedStatus { discard, state } = role.process(seen);
        let step = match state {
            Ok(ConnectionState::EncodeTlsData(data)) => {
                encode(data, &mut sending)?;
                Step::Again
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Step::Send
            }
            Ok(ConnectionState::BlockedHandshake) => Step::Receive,
            Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
            // Neither a goodbye nor early data belongs here.
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => Step::Failed(error),
        };
        received.drain(..discard);
        shown -= discard;
        match step {
            Step::Again => {}
            Step::Done => break,
            Step::Send => {
                io.write_all(&sending).await?;
                io.flush().await?;
                sending.clear();
            }
            Step::Receive => match next_record(received.get(shown..).unwrap_or_default()) {
                Some(len) => shown += len,
                None => receive(&mut io, &mut received).await?,
            },
            Step::Failed(error) => {
                refuse(
                    &mut role,
                    &mut io,
                    received.get_mut(..shown).unwrap_or_default(),
                )
                .await;
                return Err(invalid(error));
            }
        }
    }
    let chain = role.chain();
    let (secrets, schedule) = role.finish().map_err(invalid)?;
    let keys = Keys::new(secrets, schedule).map_err(invalid)?;
    let session = Session::new(io, keys, received.get(shown..).unwrap_or_default())?;
    Ok(Greeted { session, chain })
}

enum Step {
    Again,
    Done,
    Failed(Error),
    Receive,
    Send,
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, sending: &mut Vec<u8>) -> io::Result<()> {
    let start = sending.len();
    let mut room = 0;
    loop {
        sending.resize(start + room, 0);
        match data.encode(sending.get_mut(start..).unwrap_or_default()) {
            Ok(bytes) => {
                sending.truncate(start + bytes);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(wanted)) if wanted.required_size > room => {
                room = wanted.required_size;
            }
            Err(e) => return Err(io::Error::other(e)),
        }
    }
}

/// How much the library must see next: one record once all of it is here, or what cannot be one.
fn next_record(bytes: &[u8]) -> Option<usize> {
    let &[kind, major, _, high, low] = bytes.first_chunk::<HEADER_BYTES>()?;
    let len = usize::from(u16::from_be_bytes([high, low]));
    if !(CHANGE_CIPHER_SPEC..=APPLICATION_DATA).contains(&kind)
        || major != 3
        || len > MAX_SEALED_BYTES
    {
        return Some(bytes.len());
    }
    (bytes.len() >= HEADER_BYTES + len).then_some(HEADER_BYTES + len)
}

async fn receive(io: &mut (impl AsyncRead + Unpin), received: &mut Vec<u8>) -> io::Result<()> {
    if received.len() >= MAX_FLIGHT_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    received.reserve(READ_BYTES);
    let mut space = received.limit(READ_BYTES);
    if io.read_buf(&mut space).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// Tells the peer why, as far as that is possible without waiting.
async fn refuse<R: Role>(role: &mut R, io: &mut (impl AsyncWrite + Unpin), received: &mut [u8]) {
    let mut alert = Vec::new();
    // The bytes are shown once more only because the library wants to see them; it looks for what
    // it has to say first.
    if let Ok(ConnectionState::EncodeTlsData(data)) = role.process(received).state
        && let Err(error) = encode(data, &mut alert)
    {
        tracing::trace!(%error, "no alert");
    }
    let mut rest = alert.as_slice();
    while !rest.is_empty() {
        let written = poll_fn(|cx| Poll::Ready(Pin::new(&mut *io).poll_write(cx, rest)));
        let Poll::Ready(Ok(bytes @ 1..)) = written.await else {
            break;
        };
        rest = rest.get(bytes..).unwrap_or_default();
    }
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A usual flight fits.
const READ_BYTES: usize = 4096;
/// A certificate chain of 64 KiB and what stands around it; the library bounds single messages.
const MAX_FLIGHT_BYTES: usize = 128 << 10;
