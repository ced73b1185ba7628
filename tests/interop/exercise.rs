//! What a connection must be able to do, whoever carries it: takes where clients run and where the
//! servers are reached; gives how resets arrive, which the carriers differ in; everything else is
//! asserted.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{Mutex, PoisonError, mpsc},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, End, Server},
    bulk,
    mesh::{PATIENCE, assert_alive},
    netns::Netns,
};

/// Servers, one behaviour each, in one namespace.
#[derive(Debug)]
pub(crate) struct Servers {
    _servers: Vec<Server>,
    /// How many bytes the server that ended its direction first received.
    after_end: mpsc::Receiver<io::Result<u64>>,
    /// How a connection ended for a server that only reads.
    ends: mpsc::Receiver<std::result::Result<usize, ErrorKind>>,
    last_words_bytes: u64,
}

impl Servers {
    /// The one that ends first says so many bytes before.
    pub(crate) fn start(netns: &Netns, last_words_bytes: u64) -> Result<Self> {
        let (tell_after, after_end) = mpsc::channel();
        let (tell_end, ends) = mpsc::channel();
        let (tell_after, tell_end) = (Mutex::new(tell_after), Mutex::new(tell_end));
        let ends_first = move |mut stream: TcpStream| {
            stream.write_all(&last_words(last_words_bytes))?;
            stream.shutdown(Shutdown::Write)?;
            let received = io::copy(&mut stream, &mut io::sink());
            send(&tell_after, received)
        };
        let reads = move |mut stream: TcpStream| {
            stream.read_exact(&mut [0])?;
            stream.write_all(b"y")?;
            let end = stream.read(&mut [0]).map_err(|e| e.kind());
            send(&tell_end, end)
        };
        let servers = vec![
            Server::start(netns, ECHO, apps::echo)?,
            Server::start(netns, BULK, bulk::serve)?,
            Server::start(netns, COUNT, apps::count_until_eof)?,
            Server::start(netns, RESET, apps::reset)?,
            Server::start(netns, WHOAMI, apps::whoami)?,
            Server::start(netns, BANNER, apps::banner(GREETING))?,
            Server::start(netns, ENDS_FIRST, ends_first)?,
            Server::start(netns, READS, reads)?,
        ];
        Ok(Self {
            _servers: servers,
            after_end,
            ends,
            last_words_bytes,
        })
    }
}

/// How resets crossed: both are ends, and neither may hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resets {
    /// What the client saw when the server reset.
    pub(crate) at_client: End,
    /// Whether the server saw a reset when the client did.
    pub(crate) at_server: bool,
}

/// Where a port of the servers is reached.
pub(crate) type At<'a> = &'a dyn Fn(u16) -> SocketAddr;

/// Small things of every kind.
pub(crate) fn small(servers: &Servers, from: &Netns, at: At<'_>) -> Result<Resets> {
    for bytes in [0, 1, 16 << 10, 1 << 20] {
        bulk::exchange(from, at(BULK), bytes, 7).with_context(|| format!("{bytes} bytes"))?;
    }
    let (mut stream, greeting) = apps::listen_first(from, at(BANNER), GREETING.len())?;
    ensure!(greeting == GREETING.as_bytes(), "another greeting");
    assert_alive(&mut stream).context("after the greeting")?;
    // One byte at a time, each answered before the next.
    let mut stream = apps::dial(from, at(ECHO))?;
    for byte in 0..=u8::MAX {
        stream.write_all(&[byte])?;
        let mut back = [0];
        stream.read_exact(&mut back)?;
        ensure!(back == [byte], "byte {byte} came back as {back:?}");
    }
    let reply = apps::ask(from, at(COUNT), &[7; 100_000]).context("the client ends first")?;
    ensure!(reply.text() == "received 100000", "{}", reply.text());
    resets(servers, from, at)
}

/// The server ends its direction first; the other one must go on.
pub(crate) fn server_ends_first(servers: &Servers, from: &Netns, at: At<'_>) -> Result<()> {
    let mut stream = last_words_of(servers, from, at)?;
    stream
        .write_all(&[7; 200_000])
        .context("the other direction must still work")?;
    stream.shutdown(Shutdown::Write)?;
    let received = servers.after_end.recv_timeout(PATIENCE)??;
    ensure!(received == 200_000, "the server received {received} bytes");
    Ok(())
}

/// The server ends its direction first, and all that it said before arrives.
pub(crate) fn last_words_of(servers: &Servers, from: &Netns, at: At<'_>) -> Result<TcpStream> {
    let mut stream = apps::dial(from, at(ENDS_FIRST))?;
    let mut words = Vec::new();
    stream.read_to_end(&mut words)?;
    let whole = words == last_words(servers.last_words_bytes);
    ensure!(whole, "{} bytes", words.len());
    Ok(stream)
}

fn last_words(bytes: u64) -> Vec<u8> {
    (0..bytes / 8).flat_map(u64::to_be_bytes).collect()
}

fn resets(servers: &Servers, from: &Netns, at: At<'_>) -> Result<Resets> {
    let mut other = apps::dial(from, at(ECHO))?;
    assert_alive(&mut other)?;
    let mut stream = apps::dial(from, at(RESET))?;
    stream.write_all(b"x")?;
    let (at_client, bytes) = apps::read_end(&stream, PATIENCE)?;
    ensure!(bytes.is_empty() && at_client != End::Open, "{at_client:?}");
    let mut stream = apps::dial(from, at(READS))?;
    stream.write_all(b"x")?;
    // A reset takes along what is on its way, so it waits for the answer.
    stream.read_exact(&mut [0])?;
    apps::abort(stream)?;
    let at_server = match servers.ends.recv_timeout(PATIENCE)? {
        Ok(0) => false,
        Err(ErrorKind::ConnectionReset) => true,
        other => anyhow::bail!("the client's reset arrived as {other:?}"),
    };
    assert_alive(&mut other).context("another stream of the same tunnel")?;
    Ok(Resets {
        at_client,
        at_server,
    })
}

/// A connection that is silent for longer than the interval of pings and their time-out.
pub(crate) struct Idle(TcpStream);

impl Idle {
    pub(crate) fn begin(from: &Netns, at: At<'_>) -> Result<Self> {
        let mut stream = apps::dial(from, at(ECHO))?;
        assert_alive(&mut stream)?;
        Ok(Self(stream))
    }

    /// Waits for what is left of the silence, then speaks again.
    pub(crate) fn end(mut self, left: Duration) -> Result<()> {
        if !left.is_zero() {
            let (end, bytes) = apps::read_end(&self.0, left)?;
            ensure!(
                (end, bytes.len()) == (End::Open, 0),
                "the idle connection: {end:?}"
            );
        }
        assert_alive(&mut self.0).context("the connection that was idle")
    }
}

fn send<T>(tell: &Mutex<mpsc::Sender<T>>, what: T) -> io::Result<()> {
    let tell = tell.lock().unwrap_or_else(PoisonError::into_inner);
    let told = tell.send(what);
    told.map_err(|_test_is_over| ErrorKind::BrokenPipe.into())
}

pub(crate) const ECHO: u16 = 9000;
pub(crate) const BULK: u16 = 9001;
const COUNT: u16 = 9002;
const RESET: u16 = 9003;
pub(crate) const WHOAMI: u16 = 9004;
const BANNER: u16 = 9005;
const ENDS_FIRST: u16 = 9006;
const READS: u16 = 9007;
/// Every port above.
pub(crate) const PORTS: std::ops::RangeInclusive<u16> = ECHO..=READS;
/// One that no server has.
pub(crate) const NOBODY: u16 = 9099;
const GREETING: &str = "220 ready\r\n";
