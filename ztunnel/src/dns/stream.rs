//! Answering a pod over TCP. Takes a connection to a resolver, answers what the mesh knows and passes
//! everything else on in a connection of our own to that resolver, whose answers come back as
//! they are, however many there are to one question; never takes a connection that the mesh carries,
//! and never waits for whoever is slow.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::counts::Refused;
use super::pod::{Judged, Pod};
use crate::capture::Captured;
use crate::context::{Context, Unserved};
use crate::model::{UpstreamAddr, Workload};
use crate::resolve::{self, Found, Hop, Query};
use crate::wire::dns::{self as message, Failed, Read, Transport};

/// Serves one connection to a resolver. Gives it back if its way leads through the mesh, or nowhere:
/// what two pods say to each other is encrypted and judged, on whatever port.
pub async fn serve(pod: &Rc<Pod>, conn: Box<Captured>) -> Option<Box<Captured>> {
    let mut forced = pod.cx.drain.clone();
    let way = tokio::select! {
        way = way(&pod.cx, &conn) => way,
        _ = forced.forced() => None,
    };
    let Some(resolver) = way else {
        return Some(conn);
    };
    let Some(_places) = pod.enter_connection() else {
        pod.refused(Refused::Connections);
        drop(Unserved::new(conn.stream));
        return None;
    };
    let mut drain = pod.cx.drain.clone();
    let mut session = Session::new(pod, conn.stream, resolver);
    let ended = tokio::select! {
        ended = session.run(drain.graceful()) => ended,
        _ = forced.forced() => return None,
    };
    if let Err(error) = ended {
        let resolver = resolver.addr();
        debug!(target: "dns", pod = %pod.cx.pod, %resolver, %error, "connection to a resolver ended");
    }
    None
}

/// Where the resolver is reached without the mesh.
// PROTOCOL.md#dns-meshed
async fn way(cx: &Context, conn: &Captured) -> Option<UpstreamAddr> {
    let ip = conn.original.ip();
    let source = cx.workload().await?;
    if ip.is_loopback() || ip.is_unspecified() || source.ips.contains(&ip) {
        // Rules of others bring us also what the pod asks a resolver of its own.
        let own = UpstreamAddr::new(conn.original.addr());
        return conn.redirected.then_some(own);
    }
    let query = Query {
        source: &source,
        from: conn.client.ip(),
        destination: conn.original,
        avoid: &[],
        dice: fastrand::u64(..),
    };
    match resolve::route(&cx.view.world().snapshot, &query) {
        Ok(Found::Route(route)) => (route.hop == Hop::Plain).then_some(route.upstream),
        Ok(Found::Name(_)) | Err(_) => None,
    }
}

struct Session<'a> {
    pod: &'a Pod,
    resolver: UpstreamAddr,
    app: Frames,
    to_app: OwnedWriteHalf,
    upstream: Option<Upstream>,
}

/// The connection to the resolver, and what waits for it.
struct Upstream {
    frames: Frames,
    write: OwnedWriteHalf,
    /// The oldest first.
    waiting: Vec<Waiting>,
    /// Questions of which the application was told that there is no answer.
    told: Vec<[u8; 2]>,
}

struct Waiting {
    id: [u8; 2],
    asked: Read,
    client: Arc<Workload>,
    since: Instant,
    /// What is said if no answer comes.
    failure: Option<Vec<u8>>,
}

impl<'a> Session<'a> {
    fn new(pod: &'a Pod, app: TcpStream, resolver: UpstreamAddr) -> Self {
        let (read, to_app) = app.into_split();
        Self {
            pod,
            resolver,
            app: Frames::new(read),
            to_app,
            upstream: None,
        }
    }

    /// Until the application ends it, nothing whole was said for a while, or, when nothing is asked,
    /// the pod drains.
    async fn run(&mut self, draining: impl Future<Output = ()>) -> io::Result<()> {
        let mut draining = std::pin::pin!(draining);
        let (mut open, mut finishing) = (true, false);
        let mut spoke = Instant::now();
        loop {
            let waiting = self
                .upstream
                .as_ref()
                .map_or(&[][..], |it| it.waiting.as_slice());
            let due = waiting.first().map(|oldest| oldest.since + ANSWER);
            let room = waiting.len() < MAX_WAITING;
            if !open && due.is_none() {
                match &mut self.upstream {
                    None => return self.to_app.shutdown().await,
                    // The resolver may not have said all; it says when it has.
                    Some(_) if finishing => {}
                    Some(upstream) => {
                        finishing = true;
                        if upstream.write.shutdown().await.is_err() {
                            self.upstream = None;
                            continue;
                        }
                    }
                }
            }
            let event = tokio::select! {
                frame = self.app.next(), if open && room => Event::App(frame?),
                frame = next_of(&mut self.upstream) => Event::Upstream(frame),
                () = sleep_until(due.unwrap_or(spoke + PATIENCE)) => Event::Silence,
                () = &mut draining, if open => Event::Draining,
            };
            match event {
                Event::App(Some(question)) => self.asked(question).await?,
                Event::App(None) | Event::Draining => open = false,
                Event::Upstream(Ok(Some(answer))) => self.answered(&answer).await?,
                Event::Upstream(Ok(None) | Err(_)) => self.lost().await?,
                Event::Silence if due.is_some() => self.overdue().await?,
                Event::Silence => return self.to_app.shutdown().await,
            }
            spoke = Instant::now();
        }
    }

    async fn asked(&mut self, question: Bytes) -> io::Result<()> {
        match self.pod.judge(&question, Transport::Tcp).await {
            Judged::Answer(answer) => self.say(answer).await,
            Judged::Forward { asked, client } => {
                let waiting = Waiting {
                    id: id(&question),
                    asked,
                    client,
                    since: Instant::now(),
                    failure: message::failure(&question, Failed::Server),
                };
                match self.pass_on(&question).await {
                    Ok(upstream) => {
                        upstream.told.retain(|told| *told != waiting.id);
                        upstream.waiting.push(waiting);
                    }
                    Err(error) => {
                        debug!(target: "dns", pod = %self.pod.cx.pod, %error, "not passed on");
                        self.unanswered(waiting).await?;
                        self.lost().await?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Sends a question to the resolver, in a connection that is made for the first one.
    // PROTOCOL.md#dns-forward
    async fn pass_on(&mut self, question: &[u8]) -> io::Result<&mut Upstream> {
        let upstream = match &mut self.upstream {
            Some(upstream) => upstream,
            none => {
                let dialled = self.pod.cx.dial_upstream(self.resolver);
                let stream = timeout(PATIENCE, dialled).await?;
                let (read, write) = stream.map_err(io::Error::other)?.into_split();
                none.insert(Upstream {
                    frames: Frames::new(read),
                    write,
                    waiting: Vec::new(),
                    told: Vec::new(),
                })
            }
        };
        write_frame(&mut upstream.write, question).await?;
        Ok(upstream)
    }

    /// A zone comes in several answers to one question: the first one ends the wait.
    async fn answered(&mut self, answer: &[u8]) -> io::Result<()> {
        let id = id(answer);
        if let Some(upstream) = &self.upstream
            && upstream.told.contains(&id)
        {
            return Ok(());
        }
        if let Some(upstream) = &mut self.upstream
            && let Some(at) = upstream.waiting.iter().position(|each| each.id == id)
        {
            let waiting = upstream.waiting.remove(at);
            self.report(&waiting, true);
        }
        write_frame(&mut self.to_app, answer).await
    }

    /// Tells whoever has waited long enough. What comes for one of them afterwards comes too late; for
    /// the others it does not.
    async fn overdue(&mut self) -> io::Result<()> {
        let Some(upstream) = &mut self.upstream else {
            return Ok(());
        };
        let due = |each: &&Waiting| each.since.elapsed() >= ANSWER;
        let due = upstream.waiting.iter().take_while(due).count();
        let due: Vec<_> = upstream.waiting.drain(..due).collect();
        upstream.told.extend(due.iter().map(|each| each.id));
        for waiting in due {
            self.unanswered(waiting).await?;
        }
        match &self.upstream {
            Some(it) if it.waiting.is_empty() || it.told.len() > MAX_WAITING => self.lost().await,
            _ => Ok(()),
        }
    }

    /// The resolver has ended its connection, or is silent: whoever waits is told.
    async fn lost(&mut self) -> io::Result<()> {
        if let Some(upstream) = self.upstream.take() {
            for waiting in upstream.waiting {
                self.unanswered(waiting).await?;
            }
        }
        Ok(())
    }

    async fn unanswered(&mut self, waiting: Waiting) -> io::Result<()> {
        self.report(&waiting, false);
        self.say(waiting.failure).await
    }

    fn report(&self, waiting: &Waiting, answered: bool) {
        let outcome = (answered, waiting.since.elapsed());
        let asked = (&waiting.asked, &*waiting.client);
        self.pod.forwarded(asked, Transport::Tcp, outcome);
    }

    async fn say(&mut self, answer: Option<Vec<u8>>) -> io::Result<()> {
        match answer {
            Some(answer) => write_frame(&mut self.to_app, &answer).await,
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

enum Event {
    App(Option<Bytes>),
    Draining,
    Silence,
    Upstream(io::Result<Option<Bytes>>),
}

/// Never ends without a connection. Cancel safe.
async fn next_of(upstream: &mut Option<Upstream>) -> io::Result<Option<Bytes>> {
    match upstream {
        Some(upstream) => upstream.frames.next().await,
        None => std::future::pending().await,
    }
}

/// The messages of one direction.
struct Frames {
    read: OwnedReadHalf,
    buffer: BytesMut,
}

impl Frames {
    fn new(read: OwnedReadHalf) -> Self {
        Self {
            read,
            buffer: BytesMut::new(),
        }
    }

    /// The next message; none at the end. Cancel safe.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(frame) = self.take() {
                return Ok(Some(frame));
            }
            if self.read.read_buf(&mut self.buffer).await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    fn take(&mut self) -> Option<Bytes> {
        let length = usize::from(u16::from_be_bytes(*self.buffer.first_chunk()?));
        if self.buffer.len() < PREFIX_BYTES + length {
            return None;
        }
        self.buffer.advance(PREFIX_BYTES);
        Some(self.buffer.split_to(length).freeze())
    }
}

/// To somebody who reads: who does not is left.
async fn write_frame(write: &mut OwnedWriteHalf, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(PREFIX_BYTES + message.len());
    frame.extend(length.to_be_bytes());
    frame.extend(message);
    timeout(PATIENCE, write.write_all(&frame)).await?
}

fn id(message: &[u8]) -> [u8; 2] {
    message.first_chunk().copied().unwrap_or_default()
}

/// The length before each message (RFC 1035 4.2.2).
const PREFIX_BYTES: usize = 2;
/// Questions of one connection that may wait for the resolver; who asks more is not read meanwhile.
const MAX_WAITING: usize = 32;
/// How long an answer may take: resolvers that ask others ask more than one.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a connection may be silent, and somebody may not read.
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_answers_is_left() {
        let listener = TcpListener::bind((crate::testing::own_ip(), 0)).await;
        let listener = listener.unwrap();
        let deaf = TcpStream::connect(listener.local_addr().unwrap()).await;
        let (ours, _) = listener.accept().await.unwrap();
        let (_read, mut write) = ours.into_split();
        let left = loop {
            if let Err(left) = write_frame(&mut write, &[0; 60_000]).await {
                break left;
            }
        };
        assert_eq!(left.kind(), io::ErrorKind::TimedOut);
        drop(deaf.unwrap());
    }
}
