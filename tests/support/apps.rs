//! Small applications for pods: servers as threads with one behaviour each, and clients that report
//! what they saw. Takes a namespace and an address; gives bytes, addresses and how a connection
//! ended; never waits without a deadline.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

use crate::netns::Netns;

/// A server that runs until it is dropped. Each connection has a thread.
pub struct Server {
    port: u16,
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

/// One connection as the server saw it. IPv4-mapped addresses are shown as IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub peer: SocketAddr,
    pub local: SocketAddr,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    bell: Condvar,
}

#[derive(Default)]
struct State {
    seen: Vec<Seen>,
    open: HashMap<usize, TcpStream>,
}

impl Server {
    /// Serves on every address of the namespace, IPv4 and IPv6. Port 0 takes a free one.
    pub fn start<F>(netns: &Netns, port: u16, serve: F) -> Result<Self>
    where
        F: Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    {
        Self::start_at(
            netns,
            SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port),
            serve,
        )
    }

    /// Serves on one address of the namespace.
    pub fn start_at<F>(netns: &Netns, at: SocketAddr, serve: F) -> Result<Self>
    where
        F: Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    {
        let listener = Arc::new(netns.listen(at)?);
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared::default());
        let acceptor = thread::spawn({
            let (listener, shared) = (Arc::clone(&listener), Arc::clone(&shared));
            move || accept(&listener, &shared, &Arc::new(serve))
        });
        Ok(Self {
            port,
            listener,
            shared,
            acceptor: Some(acceptor),
        })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Every connection accepted so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    /// Connections being served at this moment.
    #[must_use]
    pub fn open(&self) -> usize {
        self.shared.lock().open.len()
    }

    /// Waits until `count` connections have been accepted since the start.
    pub fn wait_seen(&self, count: usize, patience: Duration) -> Result<Vec<Seen>> {
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .bell
            .wait_timeout_while(state, patience, |state| state.seen.len() < count)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(
            state.seen.len() >= count,
            "waited {patience:?} for {count} connections, {} came",
            state.seen.len()
        );
        Ok(state.seen.clone())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the acceptor with an error; both calls fail only on what is closed already.
        drop(SockRef::from(&*self.listener).shutdown(Shutdown::Both));
        for stream in self.shared.lock().open.values() {
            drop(stream.shutdown(Shutdown::Both));
        }
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept<F>(listener: &TcpListener, shared: &Arc<Shared>, serve: &Arc<F>)
where
    F: Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
{
    for number in 0.. {
        let Ok((stream, peer)) = listener.accept() else {
            return;
        };
        let (Ok(local), Ok(kept), Ok(())) = (
            stream.local_addr(),
            stream.try_clone(),
            set_patience(&stream, UNUSED),
        ) else {
            continue;
        };
        let mut state = shared.lock();
        if state.seen.len() < SEEN_CONNECTIONS {
            state.seen.push(Seen {
                peer: canonical(peer),
                local: canonical(local),
            });
        }
        state.open.insert(number, kept);
        drop(state);
        shared.bell.notify_all();
        let (shared, serve) = (Arc::clone(shared), Arc::clone(serve));
        thread::spawn(move || {
            // A client that breaks off is the client's affair; the test asks the client.
            drop(serve(stream));
            shared.lock().open.remove(&number);
        });
    }
}

/// Sends back what it receives.
pub fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut from = stream.try_clone()?;
    io::copy(&mut from, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}

/// Speaks first, then sends back what it receives.
pub fn banner(text: &str) -> impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static {
    let text = text.to_owned();
    move |mut stream| {
        stream.write_all(text.as_bytes())?;
        echo(stream)
    }
}

/// Answers one HTTP request with the addresses of the connection as the server sees them:
/// `peer=<address>` and `local=<address>`, one per line.
pub fn whoami(mut stream: TcpStream) -> io::Result<()> {
    read_head(&mut stream)?;
    let (peer, local) = (
        canonical(stream.peer_addr()?),
        canonical(stream.local_addr()?),
    );
    let body = format!("peer={peer}\nlocal={local}\n");
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// Reads until the client has ended its direction, and only then answers, with the number of bytes
/// received: it proves that a half-close arrives and that the other direction still works.
pub fn count_until_eof(mut stream: TcpStream) -> io::Result<()> {
    let received = io::copy(&mut stream, &mut io::sink())?;
    write!(stream, "received {received}")
}

/// Reads one byte, then resets the connection.
pub fn reset(mut stream: TcpStream) -> io::Result<()> {
    stream.read_exact(&mut [0])?;
    abort(stream)
}

/// Reads nothing, until the connection is ended or reset by the other side.
pub fn read_nothing(stream: TcpStream) -> io::Result<()> {
    // The crate has no name for this one.
    let end = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut end = [PollFd::new(stream.as_fd(), end)];
    let most = PollTimeout::try_from(UNREAD).map_err(io::Error::other)?;
    poll(&mut end, most)?;
    Ok(())
}

/// Reads `chunk` bytes at a time with `pause` between, until the end: it keeps the sender waiting.
pub fn slow_reader(
    chunk: usize,
    pause: Duration,
) -> impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static {
    move |mut stream| {
        let mut buffer = vec![0; chunk];
        let mut received = 0;
        loop {
            match stream.read(&mut buffer)? {
                0 => return write!(stream, "received {received}"),
                length => received += length,
            }
            thread::sleep(pause);
        }
    }
}

/// Closes so that the peer receives a reset.
pub fn abort(stream: TcpStream) -> io::Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    drop(stream);
    Ok(())
}

/// A connection as the client saw it, and what it received.
#[derive(Clone, Debug)]
pub struct Reply {
    pub bytes: Vec<u8>,
    pub local: SocketAddr,
    pub peer: SocketAddr,
    pub took: Duration,
}

impl Reply {
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// Connects, with deadlines on everything that follows.
pub fn dial(netns: &Netns, to: SocketAddr) -> Result<TcpStream> {
    let stream = netns.dial(to, PATIENCE)?;
    set_patience(&stream, PATIENCE)?;
    Ok(stream)
}

/// Connects, sends `request`, ends its direction and reads to the end.
pub fn ask(netns: &Netns, to: SocketAddr, request: &[u8]) -> Result<Reply> {
    let started = Instant::now();
    let mut stream = dial(netns, to)?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    stream
        .write_all(request)
        .with_context(|| format!("send to {to}"))?;
    match stream.shutdown(Shutdown::Write) {
        // The server has answered and gone before we could say that we are done.
        Err(e) if e.kind() == ErrorKind::NotConnected => {}
        ended => ended.with_context(|| format!("end the request to {to}"))?,
    }
    let mut bytes = Vec::new();
    stream
        .take(REPLY_BYTES)
        .read_to_end(&mut bytes)
        .with_context(|| format!("read the answer of {to}"))?;
    Ok(Reply {
        bytes,
        local,
        peer,
        took: started.elapsed(),
    })
}

/// Connects and, without having sent anything, reads `length` bytes.
pub fn listen_first(netns: &Netns, to: SocketAddr, length: usize) -> Result<(TcpStream, Vec<u8>)> {
    let mut stream = dial(netns, to)?;
    let mut bytes = vec![0; length];
    stream
        .read_exact(&mut bytes)
        .with_context(|| format!("hear {to} speak first"))?;
    Ok((stream, bytes))
}

/// What came of asking somebody who may not want to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Bytes, and then the end.
    Answer(Vec<u8>),
    NotConnected(ErrorKind),
    /// Connected, and ended without a byte.
    Nothing(End),
}

impl Heard {
    #[must_use]
    pub fn answered(&self) -> bool {
        matches!(self, Self::Answer(_))
    }
}

impl std::fmt::Display for Heard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Answer(bytes) => write!(f, "answered, {} bytes", bytes.len()),
            Self::NotConnected(kind) => write!(f, "{kind}"),
            Self::Nothing(End::Fin) => f.write_str("closed without a byte"),
            Self::Nothing(End::Reset) => f.write_str("reset without a byte"),
            Self::Nothing(End::Open) => f.write_str("no answer"),
        }
    }
}

/// Connects, sends `request` and listens, at most for `patience` each; gives what came of it and how
/// long that took.
pub fn knock(
    netns: &Netns,
    to: SocketAddr,
    request: &[u8],
    patience: Duration,
) -> Result<(Heard, Duration)> {
    let started = Instant::now();
    let connected = netns.within(|| Ok(TcpStream::connect_timeout(&to, patience)))?;
    let heard = match connected {
        Err(error) => Heard::NotConnected(error.kind()),
        Ok(mut stream) => {
            stream.set_write_timeout(Some(patience))?;
            let reset = is_reset(stream.write_all(request));
            drop(stream.shutdown(Shutdown::Write));
            match end_after(reset, &stream, patience)? {
                (end, bytes) if bytes.is_empty() => Heard::Nothing(end),
                (_, bytes) => Heard::Answer(bytes),
            }
        }
    };
    Ok((heard, started.elapsed()))
}

/// Sends `words` to somebody who may have refused already, and reads until the connection ends, at
/// most for `patience`.
pub fn say(stream: &mut TcpStream, words: &[u8], patience: Duration) -> Result<(End, Vec<u8>)> {
    let reset = is_reset(stream.write_all(words));
    end_after(reset, stream, patience)
}

fn is_reset(written: io::Result<()>) -> bool {
    written.is_err_and(|error| {
        matches!(
            error.kind(),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
        )
    })
}

/// The kernel tells of a reset once. If writing was told, reading sees what looks like a clean end.
fn end_after(reset: bool, stream: &TcpStream, patience: Duration) -> Result<(End, Vec<u8>)> {
    Ok(match read_end(stream, patience)? {
        (End::Fin, bytes) if bytes.is_empty() && reset => (End::Reset, bytes),
        other => other,
    })
}

/// How a connection came to its end, as one side saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Fin,
    Reset,
    /// Still open when the deadline came.
    Open,
}

/// Reads until the connection ends, at most for `patience`; gives the end and what came before.
pub fn read_end(stream: &TcpStream, patience: Duration) -> Result<(End, Vec<u8>)> {
    let deadline = Instant::now() + patience;
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    let mut reader = stream;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok((End::Open, bytes));
        }
        stream.set_read_timeout(Some(left))?;
        match reader.read(&mut buffer) {
            Ok(0) => return Ok((End::Fin, bytes)),
            Ok(length) => bytes.extend(buffer.iter().take(length)),
            Err(e) => match e.kind() {
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                    return Ok((End::Reset, bytes));
                }
                ErrorKind::WouldBlock | ErrorKind::TimedOut => return Ok((End::Open, bytes)),
                ErrorKind::Interrupted => {}
                _ => return Err(e).context("read to the end"),
            },
        }
    }
}

/// The address with an IPv4-mapped one shown as IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// How long a client waits for its peer before it calls the connection dead.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How long a server keeps a connection that its client does not use: a slow test comes back to it late.
const UNUSED: Duration = Duration::from_secs(900);

fn set_patience(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

fn read_head(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == HEAD_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    Ok(head)
}

const SEEN_CONNECTIONS: usize = 100_000;
const REPLY_BYTES: u64 = 64 * 1024 * 1024;
const HEAD_BYTES: usize = 64 * 1024;

/// For how long nothing is read at most.
const UNREAD: Duration = Duration::from_secs(300);
