//! Bytes between two sockets without a copy through our memory. Takes two sockets, gives what the
//! kernel moved from one into a pipe and from there into the other; pipes belong to the worker, and
//! an idle connection holds none.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::error::Error;
use super::tcp::is_transient;

/// A pipe of this worker. Dropped empty, it returns to the thread that drops it.
#[derive(Debug)]
pub(super) struct Pipe {
    /// `None` only while it is dropped.
    ends: Option<(OwnedFd, OwnedFd)>,
    held: usize,
}

impl Pipe {
    /// One that is free or new; `None` when there are no descriptors for it, which is no reason to
    /// end a connection.
    pub(super) fn take() -> Option<Self> {
        let free = FREE.try_with(|free| free.borrow_mut().pop()).ok().flatten();
        let ends = free.or_else(|| open().ok())?;
        Some(Self {
            ends: Some(ends),
            held: 0,
        })
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Takes what has arrived, into an empty pipe. 0 is the clean end.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
    ) -> Poll<Result<usize, Error>> {
        let Some((_, inlet)) = &self.ends else {
            return Poll::Ready(Ok(0));
        };
        loop {
            ready!(from.poll_read_ready(cx)).map_err(Error::socket)?;
            let moved = from.try_io(Interest::READABLE, || {
                Ok(splice(from, None, inlet, None, FILL_BYTES, FLAGS)?)
            });
            match moved {
                Ok(bytes) => {
                    self.held += bytes;
                    return Poll::Ready(Ok(bytes));
                }
                Err(e) if is_transient(&e) => {}
                Err(e) => return Poll::Ready(Err(Error::socket(e))),
            }
        }
    }

    /// Gives some of what the pipe holds.
    pub(super) fn poll_empty(
        &mut self,
        cx: &mut Context<'_>,
        to: &TcpStream,
    ) -> Poll<Result<usize, Error>> {
        let Some((outlet, _)) = &self.ends else {
            return Poll::Ready(Ok(0));
        };
        loop {
            ready!(to.poll_write_ready(cx)).map_err(Error::socket)?;
            let moved = to.try_io(Interest::WRITABLE, || {
                Ok(splice(outlet, None, to, None, self.held, FLAGS)?)
            });
            match moved {
                Ok(bytes) => {
                    self.held -= bytes.min(self.held);
                    return Poll::Ready(Ok(bytes));
                }
                Err(e) if is_transient(&e) => {}
                Err(e) => return Poll::Ready(Err(Error::socket(e))),
            }
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // What is left in it belongs to a connection that is dead: it goes with the pipe.
        let Some(ends) = self.ends.take().filter(|_| self.held == 0) else {
            return;
        };
        let kept = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(ends);
            }
        });
        if kept.is_err() {
            tracing::trace!("the thread ends: its pipes are closed");
        }
    }
}

fn open() -> io::Result<(OwnedFd, OwnedFd)> {
    let (outlet, inlet) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // More slots, not more memory: a slot holds whatever piece the socket gives. With fewer it works,
    // slower.
    if let Err(error) = fcntl_setpipe_size(&inlet, PIPE_BYTES) {
        tracing::debug!(%error, "a pipe has its usual size");
    }
    Ok((outlet, inlet))
}

thread_local! {
    /// Pipes of this worker that nobody uses; all of them are empty.
    static FREE: RefCell<Vec<(OwnedFd, OwnedFd)>> = RefCell::default();
}

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);
/// What one direction holds at most, as with buffers.
const FILL_BYTES: usize = 262_080;
/// What an unprivileged process may ask for.
const PIPE_BYTES: usize = 1 << 20;
/// Pipes kept per worker, two descriptors each.
const KEPT: usize = 16;
