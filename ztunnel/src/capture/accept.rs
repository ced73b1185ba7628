//! Taking a connection from a listener in a pod. Takes the listener, gives the connection with both
//! addresses in canonical form; never reads a byte.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use tokio::net::{TcpListener, TcpStream};

use crate::model::{ClientAddr, ListenAddr, OrigDst};

/// An accepted connection.
#[derive(Debug)]
pub struct Captured {
    /// The connection.
    pub stream: TcpStream,
    /// Where it comes from.
    pub client: ClientAddr,
    /// What was dialled: the kernel programs rewrite nothing, so it is the socket's local address.
    pub original: OrigDst,
    /// The listener's own address. A connection whose destination has its port may have been made
    /// to the listener itself.
    pub listener: ListenAddr,
}

/// A listener in a pod, on the worker that serves it.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    own: ListenAddr,
}

impl Listener {
    /// Takes a nonblocking listener.
    ///
    /// # Errors
    /// When it has no address, or this runtime cannot wait for it.
    pub fn new(socket: std::net::TcpListener) -> io::Result<Self> {
        let socket = TcpListener::from_std(socket)?;
        Ok(Self {
            own: ListenAddr::new(socket.local_addr()?),
            socket,
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
            let Ok(local) = stream.local_addr() else {
                continue;
            };
            return Ok(Captured {
                stream,
                client: ClientAddr::new(peer),
                original: OrigDst::new(local),
                listener: self.own,
            });
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
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
