//! A tunnel inside a stream of another one: double HBONE. Takes an answered stream, gives an
//! answered stream whose peer is beyond the first one's; shared by nobody, and gone with its stream.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::buffer::Queue;
use super::error::Error;
use super::params::Params;
use super::pool::{Dial, Opened, Pool, Target};
use super::relay::{Side as _, Written};
use super::stream::H2Stream;
use crate::authz::Permit;
use crate::drain;
use crate::identity;
use crate::model::UpstreamAddr;

/// What an inner tunnel is made with.
#[derive(Clone, Debug)]
pub struct Inside {
    /// Sizes and deadlines, as of every tunnel.
    pub params: Rc<Params>,
    /// Certificates.
    pub store: Arc<identity::Store>,
    /// The pod's end.
    pub drain: drain::Signal,
}

/// Opens a tunnel inside `outer`, and on it one stream. Must be used inside a `LocalSet`. Cancel
/// safe: the outer stream is reset.
///
/// # Errors
/// Why there is no tunnel, or what the far end answered.
// PROTOCOL.md#double-hbone
pub async fn open_inside(
    permit: &Permit,
    outer: H2Stream,
    target: &Target,
    request: Request<()>,
    with: Inside,
) -> Result<Opened, Error> {
    let dial = Once(Cell::new(Some(StreamIo::new(outer))));
    // A pool of one tunnel: dropped here, it takes no more streams and ends with this one.
    let pool = Pool::new(with.params, dial, with.store, with.drain);
    let opened = pool.open(permit, target, request).await;
    opened.map_err(|error| match error {
        // There is but one stream to be inside of; nobody else was dialled.
        Error::Connect { .. } | Error::ConnectTimedOut { .. } => Error::TunnelLost(None),
        error => error,
    })
}

/// Gives the outer stream once.
struct Once(Cell<Option<StreamIo>>);

impl Dial for Once {
    type Io = StreamIo;

    async fn dial(&self, _to: UpstreamAddr) -> io::Result<StreamIo> {
        self.0
            .take()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

/// A stream of a tunnel as a transport for another.
struct StreamIo {
    stream: H2Stream,
    /// Came, and was not read yet.
    came: Queue,
    /// Nothing more will come.
    ended: bool,
    /// Written, and not on its way yet: at most one write.
    leaves: Queue,
}

impl StreamIo {
    fn new(stream: H2Stream) -> Self {
        Self {
            stream,
            came: Queue::default(),
            ended: false,
            leaves: Queue::default(),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.leaves.is_empty() {
            let given = ready!(self.stream.poll_give(cx, &mut self.leaves));
            match given.map_err(failed)? {
                Written::Bytes(_) => {}
                Written::Unwanted => {
                    self.leaves.clear();
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for StreamIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if let Some(front) = this.came.front() {
                let bytes = front.len().min(buf.remaining());
                buf.put_slice(&front.split_to(bytes));
                this.came.advance(0);
                this.stream.taken(bytes);
                return Poll::Ready(Ok(()));
            }
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            let more = ready!(this.stream.poll_take(cx, &mut this.came));
            this.ended = !more.map_err(failed)?;
        }
    }
}

impl AsyncWrite for StreamIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        this.leaves.push(Bytes::copy_from_slice(buf));
        match this.poll_send(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            // What is left waits for the peer, and the next write for it.
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(buf.len())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Poll::Ready(this.stream.finish().map_err(failed))
    }
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::CertRevoked => OUTER_REVOKED.into(),
        Error::Reset => io::ErrorKind::ConnectionReset.into(),
        error => io::Error::other(error),
    }
}

/// Stands for [`Error::CertRevoked`] on its way through the inner HTTP/2, which keeps of an error
/// only its kind; no socket gives this one.
pub(super) const OUTER_REVOKED: io::ErrorKind = io::ErrorKind::StaleNetworkFileHandle;
