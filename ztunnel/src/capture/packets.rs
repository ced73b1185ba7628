//! A packet socket of this machine that passes descriptors: takes its path, gives packets and the
//! descriptors beside them, and sends packets. It never leaves a descriptor open that nobody took.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixDatagram as StdDatagram},
    path::Path,
};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{io::Interest, net::UnixDatagram};

use super::sys;

/// A connected `SOCK_SEQPACKET` socket: like a datagram socket, but it has an end.
#[derive(Debug)]
pub struct PacketSocket(UnixDatagram);

/// One packet.
#[derive(Debug)]
pub struct Packet {
    /// What it holds, as far as it fits the buffer.
    pub bytes: Vec<u8>,
    /// What came beside it.
    pub descriptors: Vec<OwnedFd>,
    /// Whether it was longer than the buffer.
    pub truncated: bool,
    /// Whether more descriptors came than this process may open; those are closed.
    pub descriptors_lost: bool,
}

impl PacketSocket {
    /// Connects to whoever listens at `path`, without waiting.
    ///
    /// # Errors
    /// Nobody listens, or has room for another connection.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Self::of(socket.into())
    }

    /// One that is connected, and never blocks.
    pub(crate) fn of(socket: OwnedFd) -> io::Result<Self> {
        let socket = StdDatagram::from(socket);
        Ok(Self(UnixDatagram::from_std(socket)?))
    }

    /// Sends one packet. Cancel safe: it is sent or not at all.
    ///
    /// # Errors
    /// The other side is gone.
    pub async fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.0.send(packet).await.map(drop)
    }

    /// The next packet, of which `limit` bytes are kept; `None` when the other side has closed.
    /// Cancel safe.
    ///
    /// # Errors
    /// The connection is broken.
    pub async fn receive(&self, limit: usize) -> io::Result<Option<Packet>> {
        let mut bytes = vec![0; limit];
        let receive = || sys::receive(&self.0, &mut bytes, sys::MAX_DESCRIPTORS);
        let received = self.0.async_io(Interest::READABLE, receive).await?;
        bytes.truncate(received.bytes);
        let packet = Packet {
            bytes,
            descriptors: received.descriptors,
            truncated: received.truncated,
            descriptors_lost: received.descriptors_lost,
        };
        let closed =
            packet.bytes.is_empty() && packet.descriptors.is_empty() && !packet.descriptors_lost;
        Ok((!closed).then_some(packet))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{IoSlice, Read as _},
        os::fd::{AsRawFd as _, RawFd},
    };

    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
    };

    use super::*;

    /// Sends one packet with so many descriptors of a pipe; gives the receiving end of the socket,
    /// and the pipe's end that reads nothing as long as one of them is open anywhere.
    fn sent(descriptors: usize) -> (OwnedFd, File) {
        let (near, far) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let raw: Vec<RawFd> = vec![write.as_raw_fd(); descriptors];
        let rights = [ControlMessage::ScmRights(&raw)];
        let bytes = [IoSlice::new(b"packet")];
        sendmsg::<()>(near.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None).unwrap();
        (far, File::from(read))
    }

    #[test]
    fn every_descriptor_of_a_packet_is_taken_over() {
        let (socket, mut pipe) = sent(usize::try_from(sys::MAX_DESCRIPTORS).unwrap());
        let mut buffer = [0; 16];
        let received = sys::receive(&socket, &mut buffer, sys::MAX_DESCRIPTORS).unwrap();
        assert_eq!(received.descriptors.len(), 253);
        assert_eq!(received.bytes, 6);
        assert!(!received.truncated && !received.descriptors_lost);
        drop(received);
        assert_eq!(pipe.read(&mut [0]).unwrap(), 0, "all are closed");
    }

    #[test]
    fn descriptors_that_find_no_room_are_told_of_and_none_is_left_open() {
        let (socket, mut pipe) = sent(5);
        let mut buffer = [0; 3];
        let received = sys::receive(&socket, &mut buffer, 2).unwrap();
        assert_eq!(received.descriptors.len(), 2);
        assert!(received.truncated && received.descriptors_lost);
        drop(received);
        assert_eq!(pipe.read(&mut [0]).unwrap(), 0, "all are closed");
    }
}
