//! Whether the peer of a tunnel is alive. Takes the pings of an HTTP/2 connection and a count of
//! what was read, gives the moment when hope is lost; never ends a tunnel that still speaks.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::params::Params;

/// Counts reads that brought something.
#[derive(Clone, Debug, Default)]
pub(super) struct Life(Rc<Cell<u64>>);

/// A transport whose reads are signs of life.
#[derive(Debug)]
pub(super) struct Watched<T> {
    io: T,
    life: Life,
}

impl<T> Watched<T> {
    pub(super) const fn new(io: T, life: Life) -> Self {
        Self { io, life }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            this.life.0.set(this.life.0.get().wrapping_add(1));
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Sends pings and waits for what comes back.
// PROTOCOL.md#h2-ping
pub(super) struct Keepalive {
    pings: Option<PingPong>,
    life: Life,
    timer: Pin<Box<Sleep>>,
    state: State,
    interval: Duration,
    timeout: Duration,
}

enum State {
    /// Until the timer: nothing to do.
    Resting,
    /// A ping is on its way since then; the timer ends the patience.
    Waiting { since: Instant, life: u64 },
}

impl Keepalive {
    pub(super) fn new(pings: Option<PingPong>, life: Life, params: &Params) -> Self {
        Self {
            pings,
            life,
            timer: Box::pin(sleep(params.ping_interval)),
            state: State::Resting,
            interval: params.ping_interval,
            timeout: params.ping_timeout,
        }
    }

    /// Ready when neither an answer nor any other byte came in time.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(pings) = &mut self.pings else {
            return Poll::Pending;
        };
        loop {
            match self.state {
                State::Resting => {
                    ready!(self.timer.as_mut().poll(cx));
                    // Refused only while another is on its way: it answers for this one too.
                    if let Err(e) = pings.send_ping(Ping::opaque()) {
                        tracing::trace!(error = %e, "no ping");
                    }
                    let since = Instant::now();
                    self.timer.as_mut().reset(since + self.timeout);
                    let life = self.life.0.get();
                    self.state = State::Waiting { since, life };
                }
                State::Waiting { since, life } => {
                    if let Poll::Ready(pong) = pings.poll_pong(cx) {
                        if pong.is_err() {
                            // The connection is over, and says so itself.
                            self.pings = None;
                            return Poll::Pending;
                        }
                        self.timer.as_mut().reset(since + self.interval);
                        self.state = State::Resting;
                        continue;
                    }
                    ready!(self.timer.as_mut().poll(cx));
                    let now = self.life.0.get();
                    if now == life {
                        return Poll::Ready(());
                    }
                    // The answer may wait behind data that is being read.
                    self.timer.as_mut().reset(Instant::now() + self.timeout);
                    self.state = State::Waiting { since, life: now };
                }
            }
        }
    }
}
