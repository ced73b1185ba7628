//! Copying between two sides. Takes two connected sides and a permit, gives how the connection
//! ended, with half-closes as half-closes and resets as resets; never buffers without bound.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::net::TcpStream;

use super::buffer::{Queue, Size};
use super::error::Error;
use super::pipe::Pipe;
use crate::authz::Permit;
use crate::drain;
use crate::model::Meter;

/// One of the two ends of a connection: a TCP socket or a stream of a tunnel.
///
/// A side is polled by one task only. `poll_take` and `poll_give` are independent of each other.
pub trait Side {
    /// Whether bytes may be taken although those before wait to be given. Only for a side that
    /// has them in memory anyhow and bounds them itself.
    const AHEAD: bool;

    /// Takes what has arrived. `false` is the clean end: no more will come.
    fn poll_take(&self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<bool, Error>>;

    /// Bytes that were taken here have been given to the other side.
    fn taken(&self, bytes: usize);

    /// Gives some of a queue that is not empty.
    fn poll_give(&self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<Written, Error>>;

    /// The socket that this side is, if the kernel can move its bytes without us.
    fn socket(&self) -> Option<&TcpStream> {
        None
    }

    /// No more will be given: a FIN, an END_STREAM.
    fn finish(&self) -> Result<(), Error>;

    /// Waits for an end that is not clean, also while nothing is taken or given.
    fn failed(&self) -> impl Future<Output = Error>;

    /// Ends both directions as a reset.
    fn abort(&self);
}

/// What became of bytes that were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// So many were taken off the queue.
    Bytes(usize),
    /// The side wants no more, and that is no error.
    Unwanted,
}

/// Copies between `a`, which opened the connection, and `b` until both directions have ended.
/// The connection also ends, as a reset for both sides, when one side is reset or lost, when the
/// permit is withdrawn, when the drain is forced, and when this future is dropped.
///
/// # Errors
/// Every end but the one where both sides finished.
pub async fn relay<A: Side, B: Side>(
    a: A,
    b: B,
    permit: &Permit,
    meter: &impl Meter,
    drain: &mut drain::Signal,
) -> Result<(), Error> {
    between(&a, &b, permit, meter, drain).await
}

/// What is left to do of a connection that is open.
pub type Carrying<'a, E> = Pin<Box<dyn Future<Output = Result<(), E>> + 'a>>;

/// [`relay`] as a future that owns what it needs and nothing else: it is all that most connections
/// hold for most of their time.
pub fn carry<'a, A: Side + 'a, B: Side + 'a, E: From<Error>>(
    a: A,
    b: B,
    permit: Permit,
    meter: &'a impl Meter,
    mut drain: drain::Signal,
) -> Carrying<'a, E> {
    Box::pin(async move { Ok(between(&a, &b, &permit, meter, &mut drain).await?) })
}

async fn between<A: Side, B: Side>(
    a: &A,
    b: &B,
    permit: &Permit,
    meter: &impl Meter,
    drain: &mut drain::Signal,
) -> Result<(), Error> {
    let mut sides = Reset { a, b, armed: true };
    let end = tokio::select! {
        // Orders first: a busy connection must not outrun them. Failures last: what a side sent
        // before its reset is still delivered, unless the other side is slow.
        biased;
        reason = permit.revoked() => Err(Error::Revoked(reason)),
        reason = drain.forced() => Err(Error::Drained(reason)),
        end = copy(a, b, meter) => end,
        error = a.failed() => Err(error),
        error = b.failed() => Err(error),
    };
    sides.armed = end.is_err();
    end
}

async fn copy<A: Side, B: Side>(a: &A, b: &B, meter: &impl Meter) -> Result<(), Error> {
    let (mut there, mut back) = (Way::default(), Way::default());
    poll_fn(|cx| {
        let there = there.poll(cx, a, b, |bytes| meter.received(bytes))?;
        let back = back.poll(cx, b, a, |bytes| meter.sent(bytes))?;
        if there.is_ready() && back.is_ready() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// One direction.
#[derive(Default)]
struct Way {
    queue: Queue,
    /// While a large transfer is under way between two sockets.
    pipe: Option<Pipe>,
    /// Nothing more will be taken.
    drained: bool,
    /// Nothing more will be given.
    done: bool,
}

impl Way {
    fn poll<F: Side, T: Side>(
        &mut self,
        cx: &mut Context<'_>,
        from: &F,
        to: &T,
        count: impl Fn(u64),
    ) -> Poll<Result<(), Error>> {
        for _ in 0..ROUNDS {
            if self.done {
                return Poll::Ready(Ok(()));
            }
            if self.queue.is_empty() {
                if self.pipe.is_some() || self.is_bulk(from, to) {
                    ready!(self.poll_pipe(cx, from, to, &count))?;
                    continue;
                }
                if self.drained {
                    self.done = true;
                    to.finish()?;
                } else if !self.take(cx, from)? {
                    return Poll::Pending;
                }
                continue;
            }
            match to.poll_give(cx, &mut self.queue)? {
                Poll::Ready(Written::Bytes(bytes)) => {
                    from.taken(bytes);
                    count(u64::try_from(bytes).unwrap_or(u64::MAX));
                }
                Poll::Ready(Written::Unwanted) => {
                    self.queue.clear();
                    self.done = true;
                }
                Poll::Pending => {
                    while F::AHEAD && !self.drained && self.take(cx, from)? {}
                    return Poll::Pending;
                }
            }
        }
        // Others of this worker have waited long enough.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Whether the kernel should move what comes next; then there is a pipe.
    fn is_bulk<F: Side, T: Side>(&mut self, from: &F, to: &T) -> bool {
        let sockets = from.socket().is_some() && to.socket().is_some();
        if sockets && !self.drained && self.queue.size == Size::Large {
            self.pipe = Pipe::take();
        }
        self.pipe.is_some()
    }

    /// Moves bytes through the pipe, and gives it back when there is nothing to move or too little.
    fn poll_pipe<F: Side, T: Side>(
        &mut self,
        cx: &mut Context<'_>,
        from: &F,
        to: &T,
        count: impl Fn(u64),
    ) -> Poll<Result<(), Error>> {
        let (Some(pipe), Some(source), Some(sink)) = (&mut self.pipe, from.socket(), to.socket())
        else {
            return Poll::Ready(Ok(()));
        };
        if !pipe.is_empty() {
            let bytes = ready!(pipe.poll_empty(cx, sink))?;
            from.taken(bytes);
            count(u64::try_from(bytes).unwrap_or(u64::MAX));
        } else if self.queue.size == Size::Large {
            let Poll::Ready(bytes) = pipe.poll_fill(cx, source)? else {
                self.pipe = None;
                return Poll::Pending;
            };
            self.queue.learn(bytes);
            if bytes == 0 {
                self.drained = true;
                self.pipe = None;
            }
        } else {
            self.pipe = None;
        }
        Poll::Ready(Ok(()))
    }

    /// Whether something changed.
    fn take<F: Side>(&mut self, cx: &mut Context<'_>, from: &F) -> Result<bool, Error> {
        match from.poll_take(cx, &mut self.queue)? {
            Poll::Ready(more) => {
                self.drained = !more;
                Ok(true)
            }
            Poll::Pending => Ok(false),
        }
    }
}

/// Resets both sides unless the connection has ended cleanly.
struct Reset<'a, A: Side, B: Side> {
    a: &'a A,
    b: &'a B,
    armed: bool,
}

impl<A: Side, B: Side> Drop for Reset<'_, A, B> {
    fn drop(&mut self) {
        if self.armed {
            self.a.abort();
            self.b.abort();
        }
    }
}

/// Chunks per direction before other connections of the worker have their turn.
const ROUNDS: usize = 16;

#[cfg(test)]
mod tests;
