//! One stream of a tunnel as a side of a connection. Takes the two halves that HTTP/2 gives, gives
//! bytes, ends and resets; credit goes back to the peer only for bytes that were delivered.

use std::cell::RefCell;
use std::fmt;
use std::future::{pending, poll_fn};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use super::buffer::Queue;
use super::error::Error;
use super::load::Share;
use super::pool::Slot;
use super::relay::{Side, Written};

/// An answered CONNECT. Dropping it before both directions have ended resets it.
pub struct H2Stream {
    send: RefCell<SendStream<Bytes>>,
    recv: RefCell<RecvStream>,
    /// Its place on a pooled tunnel.
    slot: Option<Slot>,
}

impl H2Stream {
    pub(super) fn new(send: SendStream<Bytes>, recv: RecvStream, slot: Option<Slot>) -> Self {
        Self {
            send: RefCell::new(send),
            recv: RefCell::new(recv),
            slot,
        }
    }

    pub(super) const fn slot(&self) -> Option<&Slot> {
        self.slot.as_ref()
    }

    /// What it tells its pooled tunnel.
    fn share(&self) -> Option<&Share> {
        self.slot().map(Slot::share)
    }

    fn send(&self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<Written, Error>> {
        let mut send = self.send.borrow_mut();
        let Some(chunk) = queue.front() else {
            return Poll::Ready(Ok(Written::Bytes(0)));
        };
        loop {
            send.reserve_capacity(chunk.len());
            let bytes = send.capacity().min(chunk.len());
            if bytes > 0 {
                return Poll::Ready(match send.send_data(chunk.split_to(bytes), false) {
                    Ok(()) => {
                        queue.advance(0);
                        Ok(Written::Bytes(bytes))
                    }
                    Err(_) => self.closed(&mut send, cx),
                });
            }
            match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(e)) => return Poll::Ready(Err(self.error(e))),
                None => return Poll::Ready(self.closed(&mut send, cx)),
            }
        }
    }

    /// Why nothing more can be sent.
    fn closed(&self, send: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Result<Written, Error> {
        match send.poll_reset(cx) {
            // The peer has answered in full and reads no further.
            Poll::Ready(Ok(Reason::NO_ERROR)) => Ok(Written::Unwanted),
            Poll::Ready(Ok(_)) | Poll::Pending => Err(Error::Reset),
            Poll::Ready(Err(e)) => Err(self.error(e)),
        }
    }

    /// Why it failed; its tunnel may know better.
    fn error(&self, error: h2::Error) -> Error {
        match Error::stream(error) {
            Error::TunnelLost(_) if self.slot().is_some_and(Slot::is_revoked) => Error::CertRevoked,
            error => error,
        }
    }
}

impl fmt::Debug for H2Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("H2Stream").finish_non_exhaustive()
    }
}

// PROTOCOL.md#close-and-reset
impl Side for H2Stream {
    /// Unread frames are in memory, bounded by the window; as frames they also count against the
    /// whole tunnel, which many small ones would end.
    const AHEAD: bool = true;

    fn poll_take(&self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<bool, Error>> {
        let mut recv = self.recv.borrow_mut();
        for frames in 0..FRAMES {
            match recv.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => {
                    if let Some(share) = self.share() {
                        share.received(data.len());
                    }
                    queue.push(data);
                }
                // Whatever this is will be there again.
                _ if frames > 0 => return Poll::Ready(Ok(true)),
                Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(self.error(e))),
                Poll::Ready(None) => return Poll::Ready(Ok(false)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(true))
    }

    fn taken(&self, bytes: usize) {
        if let Some(share) = self.share() {
            share.delivered(bytes);
        }
        // Fails only for more than was received, which would be a fault of ours without harm.
        if let Err(e) = self
            .recv
            .borrow_mut()
            .flow_control()
            .release_capacity(bytes)
        {
            tracing::debug!(error = %e, "no credit to give back");
        }
    }

    fn poll_give(&self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<Written, Error>> {
        let given = self.send(cx, queue);
        if let Some(share) = self.share() {
            share.waits(given.is_pending());
        }
        given
    }

    fn finish(&self) -> Result<(), Error> {
        // Fails on a stream that is closed; the reading half knows whether that is an error.
        if let Err(e) = self.send.borrow_mut().send_data(Bytes::new(), true) {
            tracing::trace!(error = %e, "already closed");
        }
        Ok(())
    }

    async fn failed(&self) -> Error {
        match poll_fn(|cx| self.send.borrow_mut().poll_reset(cx)).await {
            Ok(Reason::NO_ERROR) => pending().await,
            Ok(_) => Error::Reset,
            Err(e) => self.error(e),
        }
    }

    fn abort(&self) {
        self.send.borrow_mut().send_reset(Reason::CANCEL);
    }
}

/// Frames that one call takes.
const FRAMES: usize = 16;
