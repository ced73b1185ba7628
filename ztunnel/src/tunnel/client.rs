//! One tunnel from this side. Takes a place to go, gives a connected, verified HTTP/2 connection
//! and keeps it running; never chooses what goes over it.

use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use std::{io, net::Ipv4Addr};

use bytes::Bytes;
use h2::client::Connection;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::error::Error;
use super::keepalive::Keepalive;
use super::nested::OUTER_REVOKED;
use super::params::Params;
use super::pool::{Dial, Open, Registered, Target, Tunnel};
use super::tls::{self, Flush, Tls};
use crate::drain;
use crate::identity::{self, Revocation, Role, peer_identities};

type Http2<T> = Connection<Tls<T>, Bytes>;

/// A tunnel whose handshakes are done on our side.
pub(super) struct Connected<T> {
    open: Open,
    connection: Http2<T>,
    flush: Flush<T>,
    keepalive: Keepalive,
    /// Until one of the two certificates expires.
    valid: Duration,
    revocation: Revocation,
}

/// Connects, verifies and greets the peer; each step has a deadline.
pub(super) async fn connect<D: Dial>(
    dial: &D,
    store: &identity::Store,
    target: &Target,
    params: &Params,
) -> Result<Connected<D::Io>, Error> {
    let to = target.upstream;
    let credentials = store
        .get(&target.source)
        .await
        .map_err(|e| Error::Identity(Arc::new(e)))?;
    let config = credentials.client_config(&target.expected);
    let timed_out = Error::ConnectTimedOut {
        to,
        within: params.connect_timeout,
    };
    let io = match timeout(params.connect_timeout, dial.dial(to)).await {
        Ok(Ok(io)) => io,
        Ok(Err(e)) if e.kind() == io::ErrorKind::TimedOut => return Err(timed_out),
        Ok(Err(e)) => {
            return Err(Error::Connect {
                to,
                source: Arc::new(e),
            });
        }
        Err(_) => return Err(timed_out),
    };
    // A name is needed to start; it is neither sent nor checked.
    // PROTOCOL.md#tls
    let name = ServerName::from(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let greeting = tls::connect(config, name, io);
    let Ok(greeted) = timeout(params.tls_timeout, greeting).await else {
        return Err(Error::TlsTimedOut(params.tls_timeout));
    };
    let tls::Greeted { session, chain } = greeted.map_err(Error::tls)?;
    let valid = credentials.valid_with(&chain);
    let revocation = credentials.revocation(Role::Server, &chain);
    let proven = peer_identities(&chain);
    let peer = proven.into_iter().find(|id| target.expected.contains(id));
    let Some(peer) = peer else {
        // Verification has seen it; whoever changes that finds the door closed.
        return Err(Error::Tls(Arc::new(io::ErrorKind::PermissionDenied.into())));
    };
    let (tls, flush) = session.split();
    let greeting = flush.run(builder(params).handshake(tls));
    let Ok(greeted) = timeout(params.h2_timeout, greeting).await else {
        return Err(Error::H2TimedOut(params.h2_timeout));
    };
    let (sender, mut connection) = greeted.map_err(ended)?;
    let keepalive = Keepalive::new(connection.ping_pong(), flush.reads(), params);
    Ok(Connected {
        open: Open { sender, peer },
        connection,
        flush,
        keepalive,
        valid,
        revocation,
    })
}

/// Brings one tunnel from `connect` to its end.
pub(super) async fn run<T: AsyncRead + AsyncWrite + Unpin>(
    connect: impl Future<Output = Result<Connected<T>, Error>>,
    registered: &Registered,
    params: &Params,
    mut drain: drain::Signal,
    mut alive: watch::Receiver<()>,
) {
    let tunnel = &registered.tunnel;
    let connected = tokio::select! {
        connected = connect => connected,
        reason = drain.forced() => Err(Error::Drained(reason)),
        // The pool is gone, and with it everybody who could wait.
        _ = alive.changed() => return,
    };
    drop(alive);
    let Connected {
        open,
        mut connection,
        flush,
        mut keepalive,
        valid,
        revocation,
    } = match connected {
        Ok(connected) => connected,
        Err(error) => return tunnel.fail(error),
    };
    tunnel.opened(open);
    let mut orders = drain.clone();
    let end = tokio::select! {
        biased;
        reason = drain.forced() => Err(Error::Drained(reason)),
        () = revocation.revoked() => Err(Error::CertRevoked),
        end = exchange(&mut connection, &flush, registered, params) => end,
        () = poll_fn(|cx| keepalive.poll(cx)) => Err(Error::Unanswered(params.ping_timeout)),
        () = release(registered, params, &mut orders) => Ok(()),
        never = expire(tunnel, valid) => match never {},
    };
    match end {
        // Released, or closed by the peer: what it still carries may finish.
        Ok(()) => tunnel.retire(),
        Err(error) => {
            tunnel.retire();
            return tunnel.fail(error);
        }
    }
    tokio::select! {
        biased;
        _ = drain.forced() => {}
        () = revocation.revoked() => tunnel.fail(Error::CertRevoked),
        end = flush.run(&mut connection) => tracing::trace!(?end, "tunnel closed"),
        () = poll_fn(|cx| keepalive.poll(cx)) => {}
    }
}

/// Moves frames until the connection ends, and notices what the peer tells about itself.
async fn exchange<T: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut Http2<T>,
    flush: &Flush<T>,
    registered: &Registered,
    params: &Params,
) -> Result<(), Error> {
    let settled = poll_fn(|cx| {
        let end = flush.after(cx, |cx| std::pin::Pin::new(&mut *connection).poll(cx));
        match (connection.max_concurrent_send_streams(), end) {
            (_, Poll::Ready(Ok(()))) => Poll::Ready(Err(Error::TunnelLost(None))),
            (_, Poll::Ready(Err(e))) => Poll::Ready(Err(ended(e))),
            (UNTOLD, Poll::Pending) => Poll::Pending,
            (told, Poll::Pending) => Poll::Ready(Ok(told)),
        }
    });
    let Ok(told) = timeout(params.h2_timeout, settled).await else {
        return Err(Error::H2TimedOut(params.h2_timeout));
    };
    match told? {
        0 => return Err(Error::NoStreams(registered.target.upstream)),
        told => registered.settle(told),
    }
    flush.run(connection).await.map_err(ended)
}

/// Sends new streams elsewhere when a certificate has expired, as after a goodbye from the peer.
// PROTOCOL.md#certificate-expiry
async fn expire(tunnel: &Tunnel, valid: Duration) -> Infallible {
    sleep(valid).await;
    tunnel.retire();
    std::future::pending().await
}

/// Waits until the tunnel has carried nothing for long enough, or carries nothing in a drain.
/// Connections that were accepted before the drain still open their streams: a place that somebody
/// holds, even if only to wait, keeps the tunnel.
// PROTOCOL.md#pool
async fn release(registered: &Registered, params: &Params, drain: &mut drain::Signal) {
    let tunnel = &registered.tunnel;
    let idle = async {
        loop {
            let Some(since) = tunnel.idle_since() else {
                tunnel.unused().await;
                continue;
            };
            let unused = since.elapsed();
            if unused >= SPARE && registered.is_spare(params) {
                return;
            }
            match params.idle_timeout.checked_sub(unused) {
                None | Some(Duration::ZERO) => return,
                // Which one the next stream would take changes meanwhile.
                Some(left) => sleep(left.min(SPARE)).await,
            }
        }
    };
    let drained = async {
        drain.graceful().await;
        tunnel.unused().await;
    };
    tokio::select! {
        () = idle => {}
        () = drained => {}
    }
}

fn builder(params: &Params) -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(params.stream_window_bytes)
        .initial_connection_window_size(params.connection_window_bytes)
        .max_frame_size(params.frame_bytes)
        .max_header_list_size(params.client_header_bytes)
        .max_send_buffer_size(params.send_buffer_bytes)
        .initial_max_send_streams(UNTOLD)
        .enable_push(false);
    builder
}

/// Why a connection ended. In TLS 1.3 a server judges our certificate after our handshake is done:
/// its refusal is the first thing that we read. Whether reading or writing notices that the peer is
/// gone is chance: it is the same end.
fn ended(error: h2::Error) -> Error {
    match error.get_io() {
        Some(e) if e.kind() == io::ErrorKind::InvalidData => {
            Error::Tls(Arc::new(io::Error::new(e.kind(), e.to_string())))
        }
        Some(e) if e.kind() == OUTER_REVOKED => Error::CertRevoked,
        Some(_) => Error::TunnelLost(Some(Arc::new(error))),
        None => Error::H2(Arc::new(error)),
    }
}

/// How long a tunnel is kept unused while there is another that has room: a burst leaves one behind.
const SPARE: Duration = Duration::from_secs(10);

/// Stands for the peer's limit until its SETTINGS come; no SETTINGS can carry it.
const UNTOLD: usize = usize::MAX - 1;
