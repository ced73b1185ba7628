//! Plain TCP as one side of a connection. Takes a connected socket, gives bytes, ends and resets;
//! never connects or accepts.

use std::io::{self, IoSlice, Read as _};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::buffer::{Buffer, Queue, SLICES};
use super::error::Error;
use super::relay::{Side, Written};

/// When TCP asks whether a silent peer is still there.
#[derive(Clone, Copy, Debug)]
pub struct TcpKeepalive {
    /// Silence before the first probe.
    pub time: Duration,
    /// Between two probes.
    pub interval: Duration,
    /// Probes without an answer before the connection is dead.
    pub retries: u32,
    /// What was sent and is not acknowledged for as long ends the connection too.
    pub user_timeout: bool,
}

impl Default for TcpKeepalive {
    // PROTOCOL.md#tcp-options
    fn default() -> Self {
        Self {
            time: Duration::from_secs(180),
            interval: Duration::from_secs(180),
            retries: 9,
            user_timeout: false,
        }
    }
}

/// Sets what every TCP socket of ours has: no delay, and keep-alive probes unless `None`.
///
/// # Errors
/// When the socket is dead already.
pub fn tune(socket: &impl AsFd, keepalive: Option<&TcpKeepalive>) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let Some(keepalive) = keepalive else {
        return Ok(());
    };
    if keepalive.user_timeout {
        let probing = keepalive.interval.saturating_mul(keepalive.retries);
        socket.set_tcp_user_timeout(Some(keepalive.time.saturating_add(probing)))?;
    }
    socket.set_tcp_keepalive(
        &socket2::TcpKeepalive::new()
            .with_time(keepalive.time)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.retries),
    )
}

impl Side for TcpStream {
    const AHEAD: bool = false;

    fn poll_take(&self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<bool, Error>> {
        loop {
            ready!(self.poll_read_ready(cx)).map_err(Error::socket)?;
            // Only now that something is there: a silent connection has no buffer.
            let mut buffer = Buffer::take(queue.size);
            let space = buffer.space();
            let room = space.len();
            let mut read = None;
            let result = self.try_io(Interest::READABLE, || {
                let bytes = (&*SockRef::from(self)).read(space)?;
                read = Some(bytes);
                more_than(bytes, room)
            });
            match (read, result) {
                (Some(0), _) => return Poll::Ready(Ok(false)),
                (Some(bytes), _) => {
                    queue.learn(bytes);
                    queue.push(buffer.filled(bytes));
                    return Poll::Ready(Ok(true));
                }
                (None, Err(e)) if !is_transient(&e) => return Poll::Ready(Err(Error::socket(e))),
                (None, _) => {}
            }
        }
    }

    fn taken(&self, _bytes: usize) {}

    fn poll_give(&self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<Written, Error>> {
        loop {
            ready!(self.poll_write_ready(cx)).map_err(Error::socket)?;
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = queue.slices(&mut slices);
            let slices = slices.get(..count).unwrap_or_default();
            let room = slices.iter().map(|slice| slice.len()).sum();
            let mut written = None;
            let result = self.try_io(Interest::WRITABLE, || {
                let socket = SockRef::from(self);
                let bytes = match slices {
                    // The usual case, which the kernel serves faster.
                    [one] => socket.send_with_flags(one, libc::MSG_NOSIGNAL)?,
                    many => socket.send_vectored_with_flags(many, libc::MSG_NOSIGNAL)?,
                };
                written = Some(bytes);
                more_than(bytes, room)
            });
            match (written, result) {
                (Some(bytes), _) => {
                    queue.advance(bytes);
                    return Poll::Ready(Ok(Written::Bytes(bytes)));
                }
                (None, Err(e)) if !is_transient(&e) => return Poll::Ready(Err(Error::socket(e))),
                (None, _) => {}
            }
        }
    }

    fn socket(&self) -> Option<&TcpStream> {
        Some(self)
    }

    fn finish(&self) -> Result<(), Error> {
        match SockRef::from(self).shutdown(Shutdown::Write) {
            // Both ends have closed already.
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
            result => result.map_err(Error::socket),
        }
    }

    async fn failed(&self) -> Error {
        if let Err(e) = self.ready(Interest::ERROR).await {
            return Error::socket(e);
        }
        match self.take_error() {
            Ok(Some(e)) | Err(e) => Error::socket(e),
            // Somebody has read the error already; the socket is dead all the same.
            Ok(None) => Error::Reset,
        }
    }

    fn abort(&self) {
        // Closing with a linger of zero sends a RST. A socket on which this fails is dead already.
        if let Err(e) = SockRef::from(self).set_linger(Some(Duration::ZERO)) {
            tracing::trace!(error = %e, "no reset");
        }
    }
}

/// A call that moved less than it could has emptied, or filled, the socket: saying so to the
/// runtime saves the call that would only find it out.
fn more_than(bytes: usize, room: usize) -> io::Result<()> {
    if bytes > 0 && bytes < room {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    Ok(())
}

pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

#[cfg(test)]
mod tests {
    use super::super::testing::tcp_pair;
    use super::*;

    /// Behaviour 158.
    #[tokio::test]
    async fn a_tuned_socket_sends_at_once_and_asks_whether_the_peer_lives() {
        let (tcp, other) = tcp_pair().await;
        tune(&tcp, Some(&TcpKeepalive::default())).unwrap();
        let socket = SockRef::from(&tcp);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap().as_secs(), 180);
        assert_eq!(socket.tcp_keepalive_interval().unwrap().as_secs(), 180);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 9);
        tune(&other, None).unwrap();
        assert!(!SockRef::from(&other).keepalive().unwrap());
    }

    /// A kernel fact that spares each connection five calls.
    #[tokio::test]
    async fn what_a_tuned_listener_accepts_is_tuned() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let keepalive = TcpKeepalive {
            time: Duration::from_secs(7),
            interval: Duration::from_secs(3),
            retries: 5,
            user_timeout: false,
        };
        tune(&listener, Some(&keepalive)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap());
        let (near, far) = tokio::join!(near, listener.accept());
        let (_near, (far, _)) = (near.unwrap(), far.unwrap());
        let socket = SockRef::from(&far);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap().as_secs(), 7);
        assert_eq!(socket.tcp_keepalive_interval().unwrap().as_secs(), 3);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 5);
    }
}
