//! The accepting end of a tunnel. Takes a TCP connection and credentials, gives the peer's proven
//! identity and then its CONNECTs; never looks into them and never answers on its own.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::{fmt, io};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{Connection, SendResponse};
use http::{Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::error::Error;
use super::keepalive::Keepalive;
use super::params::Params;
use super::stream::H2Stream;
use super::tls::{self, Flush, Session, Tls};
use crate::drain;
use crate::identity::{Credentials, Revocation, Role, peer_identity};
use crate::model::{Reason, SpiffeId};

/// A tunnel whose TLS handshake is done.
pub struct Accepted<T> {
    /// Who is at the other end; mutual TLS proved it.
    pub peer: SpiffeId,
    session: Session<T>,
    /// Until one of the two certificates expires.
    valid: Duration,
    revocation: Revocation,
}

impl<T> fmt::Debug for Accepted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepted")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// Does the TLS handshake as the server; the client must prove an identity of our trust domain.
///
/// # Errors
/// When the handshake fails or takes too long.
pub async fn handshake<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    credentials: &Arc<Credentials>,
    params: &Params,
) -> Result<Accepted<T>, Error> {
    let greeting = tls::accept(credentials.server_config(), io);
    let Ok(greeted) = timeout(params.tls_timeout, greeting).await else {
        return Err(Error::TlsTimedOut(params.tls_timeout));
    };
    let tls::Greeted { session, chain } = greeted.map_err(Error::tls)?;
    let Some(peer) = peer_identity(&chain, credentials.id().trust_domain()) else {
        // Verification has seen one; whoever changes that finds the door closed.
        return Err(Error::Tls(Arc::new(io::ErrorKind::PermissionDenied.into())));
    };
    let valid = credentials.valid_with(&chain);
    let revocation = credentials.revocation(Role::Client, &chain);
    Ok(Accepted {
        peer,
        session,
        valid,
        revocation,
    })
}

/// Serves one tunnel until the peer closes it or the drain ends it: calls `on_request`, which must
/// not block, for each CONNECT (or whatever else the peer asks). A graceful drain, or a
/// certificate that expires, tells the peer to open no more streams; those that are open or were
/// on their way are served. A certificate that is revoked ends all of them.
///
/// # Errors
/// When the peer breaks the protocol, dies, stays silent, or may not go on.
pub async fn serve<T, F>(
    accepted: Accepted<T>,
    params: &Params,
    mut drain: drain::Signal,
    mut on_request: F,
) -> Result<(), Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Request),
{
    let (tls, flush) = accepted.session.split();
    let mut connection = preface(tls, &flush, params).await?;
    let mut keepalive = Keepalive::new(connection.ping_pong(), flush.reads(), params);
    let mut orders = drain.clone();
    // PROTOCOL.md#certificate-expiry
    let mut graceful = std::pin::pin!(async {
        tokio::select! {
            () = orders.graceful() => {}
            () = tokio::time::sleep(accepted.valid) => {}
        }
    });
    let mut draining = false;
    let mut revoked = std::pin::pin!(accepted.revocation.revoked());
    let (cut, uncut) = drain::channel();
    loop {
        tokio::select! {
            biased;
            reason = drain.forced() => {
                // Those who carry the streams have the same order and reset them now.
                end(&mut connection, &flush).await;
                return Err(Error::Drained(reason));
            }
            // PROTOCOL.md#live-revocation
            () = &mut revoked => {
                cut.force(Reason::CertRevoked);
                end(&mut connection, &flush).await;
                return Err(Error::CertRevoked);
            }
            () = &mut graceful, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            request = flush.run(connection.accept()) => match request {
                Some(Ok((request, respond))) => {
                    on_request(Request::new(request, respond, uncut.clone()));
                }
                // The transport ended without a farewell: its streams say what that meant.
                Some(Err(e)) if e.is_io() => return Err(Error::TunnelLost(Some(Arc::new(e)))),
                Some(Err(e)) => return Err(Error::H2(Arc::new(e))),
                None => return Ok(()),
            },
            () = poll_fn(|cx| keepalive.poll(cx)) => {
                return Err(Error::Unanswered(params.ping_timeout));
            }
        }
    }
}

/// A request of the peer. Dropping it resets its stream.
pub struct Request {
    /// Method, target and headers.
    pub parts: http::request::Parts,
    recv: RecvStream,
    respond: SendResponse<Bytes>,
    tunnel: drain::Signal,
}

impl Request {
    fn new(
        request: http::Request<RecvStream>,
        respond: SendResponse<Bytes>,
        tunnel: drain::Signal,
    ) -> Self {
        let (parts, recv) = request.into_parts();
        Self {
            parts,
            recv,
            respond,
            tunnel,
        }
    }

    /// Tells when the tunnel may carry nothing any more, whoever holds its streams.
    #[must_use]
    pub fn tunnel(&self) -> drain::Signal {
        self.tunnel.clone()
    }

    /// Answers with a stream that stays open both ways.
    ///
    /// # Errors
    /// When the peer has given up meanwhile.
    pub fn accept(mut self, response: Response<()>) -> Result<H2Stream, Error> {
        match self.respond.send_response(response, false) {
            Ok(send) => Ok(H2Stream::new(send, self.recv, None)),
            Err(e) => {
                tracing::debug!(error = %e, "the peer has given up before it was accepted");
                Err(Error::PeerWithdrew)
            }
        }
    }

    /// Answers with a status and nothing else.
    // PROTOCOL.md#connect-status
    pub fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        if let Err(e) = self.respond.send_response(response, true) {
            tracing::debug!(error = %e, "the peer has given up before it was refused");
        }
    }

    /// Waits until the peer gives the request up; then nobody needs an answer. Cancel safe.
    pub async fn withdrawn(&mut self) -> Error {
        match poll_fn(|cx| self.respond.poll_reset(cx)).await {
            Ok(_) => Error::PeerWithdrew,
            Err(e) => Error::stream(e),
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

type Http2<T> = Connection<Tls<T>, Bytes>;

async fn preface<T: AsyncRead + AsyncWrite + Unpin>(
    tls: Tls<T>,
    flush: &Flush<T>,
    params: &Params,
) -> Result<Http2<T>, Error> {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(params.stream_window_bytes)
        .initial_connection_window_size(params.connection_window_bytes)
        .max_frame_size(params.frame_bytes)
        .max_header_list_size(params.server_header_bytes)
        .max_concurrent_streams(params.server_streams)
        .max_send_buffer_size(params.send_buffer_bytes);
    match timeout(params.h2_timeout, flush.run(builder.handshake(tls))).await {
        Ok(connection) => connection.map_err(|e| Error::H2(Arc::new(e))),
        Err(_) => Err(Error::H2TimedOut(params.h2_timeout)),
    }
}

/// Lets the last frames of the streams out, then says goodbye.
async fn end<T: AsyncRead + AsyncWrite + Unpin>(connection: &mut Http2<T>, flush: &Flush<T>) {
    let last = poll_fn(|cx: &mut Context<'_>| match connection.poll_closed(cx) {
        Poll::Pending if connection.has_streams() => Poll::Pending,
        _ => Poll::Ready(()),
    });
    if timeout(LAST_FRAMES, flush.run(last)).await.is_ok() {
        connection.abrupt_shutdown(h2::Reason::NO_ERROR);
        let closed = flush.run(poll_fn(|cx| connection.poll_closed(cx)));
        let closed = timeout(LAST_FRAMES, closed).await;
        tracing::trace!(?closed, "tunnel ended");
    }
}

/// For the last frames of a tunnel that is ended by force.
const LAST_FRAMES: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests;
