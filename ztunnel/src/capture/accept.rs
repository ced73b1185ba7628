//! Taking a connection from a listener in a pod. Takes the listener, gives the connection with both
//! addresses in canonical form; never reads a byte.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};

use crate::model::{ClientAddr, ListenAddr, OrigDst, canonical};

/// How the destination of an accepted connection is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Peers dial the listener itself.
    Dialled,
    /// Rules of others redirected it to the listener's port; the kernel remembers where it went.
    Redirected,
    /// Our programs brought it as it was: its local address is the destination.
    Steered,
}

/// An accepted connection.
#[derive(Debug)]
pub struct Captured {
    /// The connection.
    pub stream: TcpStream,
    /// Where it comes from.
    pub client: ClientAddr,
    /// What was dialled.
    pub original: OrigDst,
    /// It was made to the listener's own port, though rules redirect to it: nobody meant it for
    /// somewhere else.
    pub direct: bool,
    /// Rules of others brought it.
    pub redirected: bool,
    /// The listener's own address. A connection whose destination has its port may have been made
    /// to the listener itself.
    pub listener: ListenAddr,
}

/// A listener in a pod, on the worker that serves it.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    own: ListenAddr,
    arrival: Arrival,
}

impl Listener {
    /// Takes a nonblocking listener.
    ///
    /// # Errors
    /// When it has no address, or this runtime cannot wait for it.
    pub fn new(socket: std::net::TcpListener, arrival: Arrival) -> io::Result<Self> {
        let socket = TcpListener::from_std(socket)?;
        Ok(Self {
            own: ListenAddr::new(socket.local_addr()?),
            socket,
            arrival,
        })
    }

    /// The next connection. Cancel safe.
    ///
    /// # Errors
    /// When the process is out of descriptors or memory. A connection that was reset while it
    /// waited is skipped.
    // PROTOCOL.md#original-destination
    pub async fn accept(&self) -> io::Result<Captured> {
        loop {
            let (stream, peer) = match self.socket.accept().await {
                Ok(accepted) => accepted,
                Err(error) if is_of_the_connection(&error) => continue,
                Err(error) => return Err(error),
            };
            if let Ok(captured) = self.captured(stream, peer) {
                return Ok(captured);
            }
        }
    }

    /// A connection that waits to be accepted, if there is one. It asks the kernel, and not what the
    /// runtime has heard of it: what the runtime has not heard yet would be reset with the listener.
    pub fn waiting(&self) -> Option<Captured> {
        loop {
            let (socket, peer) = match SockRef::from(&self.socket).accept() {
                Ok(accepted) => accepted,
                Err(error) if is_of_the_connection(&error) => continue,
                Err(_) => return None,
            };
            let Some(peer) = peer.as_socket() else {
                continue;
            };
            let stream = socket
                .set_nonblocking(true)
                .and_then(|()| TcpStream::from_std(socket.into()));
            if let Ok(captured) = stream.and_then(|stream| self.captured(stream, peer)) {
                return Some(captured);
            }
        }
    }

    fn captured(&self, stream: TcpStream, peer: SocketAddr) -> io::Result<Captured> {
        let local = canonical(stream.local_addr()?);
        let to_own_port = local.port() == self.own.port();
        // Rules of others may be there beside our programs. Only what has our port can come from
        // them, so nothing else pays for the question.
        let redirected = (self.arrival != Arrival::Dialled && to_own_port)
            .then(|| before_redirection(&stream, local))
            .flatten();
        Ok(Captured {
            client: ClientAddr::new(peer),
            original: OrigDst::new(redirected.unwrap_or(local)),
            direct: self.arrival == Arrival::Redirected && redirected.is_none() && to_own_port,
            redirected: redirected.is_some(),
            listener: self.own,
            stream,
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Where a redirected connection went before, by the kernel's connection tracking; `None` if nobody
/// redirected it.
fn before_redirection(stream: &TcpStream, local: SocketAddr) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let before = if local.is_ipv4() {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    let before = canonical(before.ok()?.as_socket()?);
    (before != local).then_some(before)
}

/// Whether only this connection is lost, and the listener is fine.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_waits_is_found_before_the_runtime_has_heard_of_it() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let at = socket.local_addr().unwrap();
        let listener = Listener::new(socket, Arrival::Steered).unwrap();
        assert!(listener.waiting().is_none());
        // Nothing is awaited between this and the question.
        let client = std::net::TcpStream::connect(at).unwrap();
        let found = loop {
            // The last packet of the handshake may be on its way.
            if let Some(found) = listener.waiting() {
                break found;
            }
            std::thread::yield_now();
        };
        assert_eq!(
            found.stream.peer_addr().unwrap(),
            client.local_addr().unwrap()
        );
        assert_eq!(found.original, OrigDst::new(at));
        assert!(listener.waiting().is_none());
    }
}
