//! A node agent that does what a test says, also what no agent should: a real SEQPACKET socket, real
//! descriptors. Takes a path to listen at; gives the node process's connections, and the bytes that
//! it sends on them; every message is written by hand here, and never by the product's code.

use std::{
    fs::{self, File},
    io::IoSlice,
    os::fd::{AsRawFd as _, RawFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessage, MsgFlags, recv, sendmsg},
};
use socket2::{Domain, SockAddr, Socket, Type};
use std::os::fd::AsFd as _;

use crate::topology::Pod;

/// A listening agent. Dropping it kills it: the socket and its file go.
#[derive(Debug)]
pub struct Agent {
    path: PathBuf,
    listener: Socket,
}

/// One connection of a node process.
#[derive(Debug)]
pub struct Peer(Socket);

impl Agent {
    /// Listens at `path`; a file that is there is removed, as an agent does when it starts.
    pub fn listen(path: &Path) -> Result<Self> {
        if path.exists() {
            fs::remove_file(path)?;
        }
        let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        listener.bind(&SockAddr::unix(path)?)?;
        listener.listen(8)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
        })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection, and its hello, which must be that of version 1.
    pub fn accept(&self) -> Result<Peer> {
        readable(&self.listener).context("no connection to the agent")?;
        let (socket, _) = self.listener.accept()?;
        let peer = Peer(socket);
        let hello = peer.receive()?;
        ensure!(hello == HELLO, "the hello is {hello:02x?}");
        Ok(peer)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

impl Peer {
    /// Adds a pod under a uid and gives the answer: the error's text, empty for success.
    pub fn add(&self, uid: &str, pod: &Pod) -> Result<String> {
        let netns = pod.netns.open()?;
        self.send(&add(uid, pod), &[&netns])?;
        self.answer()
    }

    pub fn keep(&self, uid: &str) -> Result<String> {
        self.send(&keep(uid), &[])?;
        self.answer()
    }

    pub fn delete(&self, uid: &str) -> Result<String> {
        self.send(&delete(uid), &[])?;
        self.answer()
    }

    pub fn snapshot_sent(&self) -> Result<String> {
        self.send(SNAPSHOT_SENT, &[])?;
        self.answer()
    }

    /// Sends any bytes with any descriptors as one packet.
    pub fn send(&self, bytes: &[u8], descriptors: &[&File]) -> Result<()> {
        let raw: Vec<RawFd> = descriptors.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
        let slices = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.0.as_raw_fd(), &slices, rights, flags, None).context("send")?;
        Ok(())
    }

    /// The next answer: the error's text, empty for success.
    pub fn answer(&self) -> Result<String> {
        let packet = self.receive()?;
        // WorkloadResponse { 1: Ack { 1: error } }
        let Some(ack) = packet.strip_prefix(&[0x0a]) else {
            bail!("no answer but {packet:02x?}");
        };
        let ack = counted(ack)?;
        match ack.strip_prefix(&[0x0a]) {
            Some(error) => Ok(String::from_utf8(counted(error)?.to_vec())?),
            None => {
                ensure!(ack.is_empty(), "no answer but {packet:02x?}");
                Ok(String::new())
            }
        }
    }

    /// Waits until the node process has closed this connection, and fails if it says something.
    pub fn wait_closed(&self) -> Result<()> {
        let packet = self.receive_or_end()?;
        ensure!(packet.is_none(), "instead of closing it said {packet:02x?}");
        Ok(())
    }

    fn receive(&self) -> Result<Vec<u8>> {
        self.receive_or_end()?
            .context("the node process closed the connection")
    }

    fn receive_or_end(&self) -> Result<Option<Vec<u8>>> {
        readable(&self.0).context("the node process says nothing")?;
        let mut bytes = vec![0; 4096];
        let length = match recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(length) => length,
            // It left something unread.
            Err(Errno::ECONNRESET) => 0,
            Err(error) => return Err(error.into()),
        };
        bytes.truncate(length);
        Ok((length > 0).then_some(bytes))
    }
}

/// `WorkloadRequest { 1: AddWorkload { 1: uid, 2: WorkloadInfo { name, namespace, account } } }`
#[must_use]
pub fn add(uid: &str, pod: &Pod) -> Vec<u8> {
    let info = [
        field(1, pod.name.as_bytes()),
        field(2, pod.namespace.as_bytes()),
        field(3, pod.service_account.as_bytes()),
    ]
    .concat();
    field(1, &[field(1, uid.as_bytes()), field(2, &info)].concat())
}

/// `WorkloadRequest { 5: KeepWorkload { 1: uid } }`
#[must_use]
pub fn keep(uid: &str) -> Vec<u8> {
    field(5, &field(1, uid.as_bytes()))
}

/// `WorkloadRequest { 2: DelWorkload { 2: uid } }`
#[must_use]
pub fn delete(uid: &str) -> Vec<u8> {
    field(2, &field(2, uid.as_bytes()))
}

/// `WorkloadRequest { 3: SnapshotSent {} }`
pub const SNAPSHOT_SENT: &[u8] = b"\x1a\x00";
/// `ZdsHello { 1: V1 }`
const HELLO: &[u8] = b"\x08\x01";

/// A field that holds bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        field.push(u8::try_from(length & 0x7f).unwrap_or(0) | 0x80);
        length >>= 7;
    }
    field.push(u8::try_from(length).unwrap_or(0));
    field.extend_from_slice(bytes);
    field
}

/// The bytes behind a length, which must be all that is left.
fn counted(bytes: &[u8]) -> Result<&[u8]> {
    let mut length = 0;
    let mut shift = 0;
    for (index, byte) in bytes.iter().enumerate() {
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            let rest = bytes.get(index + 1..).unwrap_or_default();
            ensure!(rest.len() == length, "{length} bytes in {bytes:02x?}");
            return Ok(rest);
        }
    }
    bail!("no length in {bytes:02x?}")
}

/// Waits until there is something to read, or the other side has closed.
fn readable(socket: &Socket) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut wanted = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wanted, left) {
            Ok(0) => bail!("nothing in {PATIENCE:?}"),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(60);
