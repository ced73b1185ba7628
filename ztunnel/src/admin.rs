//! What operators and probes ask over HTTP: the metrics page, readiness, and the operator's own port.
//! Takes requests on the control runtime, gives answers from memory; never touches a connection of
//! the data plane.

mod dump;
mod operate;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{ACCEPT, ACCEPT_ENCODING, ALLOW, CONTENT_ENCODING, CONTENT_TYPE, VARY};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, request};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

pub use self::dump::{PodStatus, Sources};
pub use self::operate::Operate;
use crate::account::Accounts;
use crate::drain::Signal;

/// Why a server could not start.
#[derive(Debug, Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("listen on {addr} ({})", remedy(.source.kind(), .addr.port()))]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
}

/// An answer, complete in memory.
pub type Answer = Response<Full<Bytes>>;

/// Somebody who answers requests. Bodies of requests are not read.
pub trait Handler: Send + Sync + 'static {
    /// The answer to this request.
    fn answer(&self, request: &request::Parts) -> impl Future<Output = Answer> + Send;
}

/// A listening HTTP/1.1 server: few connections, small requests, every wait bounded.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
}

/// The metrics page on `/metrics` and `/stats/prometheus`.
#[derive(Debug)]
pub struct Stats(Accounts);

/// Named tasks that must be done before this node may be called ready, and `/healthz/ready`, which
/// tells. Cheap to clone; clones share the tasks.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    tasks: watch::Sender<BTreeMap<&'static str, usize>>,
    /// Pods that are not served as they should be.
    troubled: watch::Sender<u64>,
}

/// A task that is not done yet; dropping it says that it is.
#[derive(Debug)]
#[must_use]
pub struct Task {
    readiness: Readiness,
    name: &'static str,
}

impl Server {
    /// Listens. Call it on the runtime that will serve.
    ///
    /// # Errors
    /// When the address cannot be listened on; the text names what to look at.
    pub fn bind(addr: SocketAddr) -> Result<Self, Error> {
        let listen = || {
            let stream = Type::STREAM.nonblocking();
            let socket = Socket::new(Domain::for_address(addr), stream, Some(Protocol::TCP))?;
            if addr.is_ipv6() {
                // Both families, also where `net.ipv6.bindv6only` says otherwise.
                socket.set_only_v6(false)?;
            }
            // A process that ended a moment ago must not hold the port.
            socket.set_reuse_address(true)?;
            socket.bind(&addr.into())?;
            socket.listen(BACKLOG)?;
            let listener = std::net::TcpListener::from(socket);
            let addr = listener.local_addr()?;
            let listener = TcpListener::from_std(listener)?;
            Ok(Self { listener, addr })
        };
        listen().map_err(|source| Error::Listen { addr, source })
    }

    /// Where it listens; the port is the kernel's choice if port 0 was asked for.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until the drain begins: then the listener closes at once, and requests that are open
    /// may finish. Dropping the future ends all of its connections.
    pub async fn serve(self, handler: impl Handler, mut signal: Signal) {
        let Self { listener, addr } = self;
        let handler = Arc::new(handler);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = signal.graceful() => break,
                accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                    match accepted {
                        Ok((socket, _)) => {
                            let handler = Arc::clone(&handler);
                            connections.spawn(converse(socket, handler, signal.clone()));
                        }
                        Err(error) => {
                            tracing::warn!(%addr, %error, "accept failed");
                            // Out of descriptors, most likely: neither spin nor miss the drain.
                            if timeout(ACCEPT_PAUSE, signal.graceful()).await.is_ok() {
                                break;
                            }
                        }
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }
}

impl Stats {
    /// The page of these accounts.
    #[must_use]
    pub const fn new(accounts: Accounts) -> Self {
        Self(accounts)
    }
}

// PROTOCOL.md#stats
impl Handler for Stats {
    async fn answer(&self, request: &request::Parts) -> Answer {
        match (request.uri.path(), &request.method) {
            ("/metrics" | "/stats/prometheus", &Method::GET | &Method::HEAD) => {
                let mut answer = page(self.0.encode(), &request.headers);
                if takes(&request.headers, ACCEPT, "application/openmetrics-text") {
                    answer.headers_mut().insert(CONTENT_TYPE, OPENMETRICS);
                }
                answer
            }
            ("/metrics" | "/stats/prometheus", _) => method_not_allowed("GET, HEAD"),
            _ => text(StatusCode::NOT_FOUND, "see /metrics\n".to_owned()),
        }
    }
}

impl Readiness {
    /// Not ready until the returned task is dropped. Tasks of one name are all waited for.
    pub fn task(&self, name: &'static str) -> Task {
        self.tasks
            .send_modify(|tasks| *tasks.entry(name).or_default() += 1);
        Task {
            readiness: self.clone(),
            name,
        }
    }

    /// The tasks that are not done, sorted and joined by commas; empty when ready.
    #[must_use]
    pub fn pending(&self) -> String {
        self.tasks
            .borrow()
            .keys()
            .copied()
            .collect::<Vec<_>>()
            .join(", ")
    }
}

impl Readiness {
    /// So many pods are not served as they should be. The node is ready all the same: the others
    /// are; but whoever asks is told.
    pub fn troubled(&self, pods: u64) {
        self.troubled.send_replace(pods);
    }

    fn trouble(&self) -> String {
        let troubled = *self.troubled.borrow();
        match troubled {
            0 => String::new(),
            pods => format!("\npods in trouble: {pods}, see the log"),
        }
    }
}

// PROTOCOL.md#readiness
impl Handler for Readiness {
    async fn answer(&self, request: &request::Parts) -> Answer {
        match (request.uri.path(), &request.method) {
            ("/healthz/ready", &Method::GET) => {
                let pending = self.pending();
                let trouble = self.trouble();
                if pending.is_empty() {
                    text(StatusCode::OK, format!("ready{trouble}"))
                } else {
                    let body = format!("not ready, pending: {pending}{trouble}");
                    text(StatusCode::INTERNAL_SERVER_ERROR, body)
                }
            }
            ("/healthz/ready", _) => method_not_allowed("GET"),
            _ => text(StatusCode::NOT_FOUND, String::new()),
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.readiness.tasks.send_modify(|tasks| {
            if let Some(count) = tasks.get_mut(self.name) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    tasks.remove(self.name);
                }
            }
        });
        let pending = self.readiness.pending();
        tracing::info!(task = self.name, pending, "start-up task is done");
    }
}

/// Answers the requests of one connection.
async fn converse(socket: TcpStream, handler: Arc<impl Handler>, mut signal: Signal) {
    let service = service_fn(move |request: Request<Incoming>| {
        let handler = Arc::clone(&handler);
        async move {
            let (parts, _body) = request.into_parts();
            Ok::<_, Infallible>(handler.answer(&parts).await)
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_READ_TIMEOUT)
            .max_buf_size(BUFFER_BYTES)
            .half_close(true)
            .serve_connection(TokioIo::new(socket), service)
    );
    tokio::select! {
        end = connection.as_mut() => return log_end(end),
        () = signal.graceful() => {}
        () = sleep(MAX_AGE) => {}
    }
    connection.as_mut().graceful_shutdown();
    match timeout(LAST_ANSWER_TIMEOUT, connection).await {
        Ok(end) => log_end(end),
        Err(_) => tracing::debug!("peer did not take its answer in time"),
    }
}

fn log_end(end: hyper::Result<()>) {
    if let Err(error) = end {
        tracing::debug!(%error, "HTTP connection ended");
    }
}

fn text(status: StatusCode, body: String) -> Answer {
    let mut answer = Response::new(Full::from(body));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, PLAIN_TEXT);
    answer
}

fn method_not_allowed(allowed: &'static str) -> Answer {
    let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, String::new());
    let allowed = HeaderValue::from_static(allowed);
    answer.headers_mut().insert(ALLOW, allowed);
    answer
}

/// A page, compressed if that is wanted.
fn page(body: String, headers: &HeaderMap) -> Answer {
    let compressed = takes(headers, ACCEPT_ENCODING, "gzip")
        .then(|| compress(body.as_bytes()))
        .and_then(Result::ok);
    let mut answer = match compressed {
        Some(compressed) => {
            let mut answer = Response::new(Full::from(compressed));
            let headers = answer.headers_mut();
            headers.insert(CONTENT_TYPE, PLAIN_TEXT);
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            answer
        }
        None => text(StatusCode::OK, body),
    };
    let vary = HeaderValue::from_static("accept, accept-encoding");
    answer.headers_mut().insert(VARY, vary);
    answer
}

fn compress(body: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body)?;
    encoder.finish()
}

/// Whether a header lists something, and does not refuse it by a weight of zero.
fn takes(headers: &HeaderMap, list: http::HeaderName, what: &str) -> bool {
    headers
        .get_all(list)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|range| {
            let mut parts = range.split(';').map(str::trim);
            let refused = |parameter: &str| {
                let weight = parameter.strip_prefix("q=").map(str::parse::<f32>);
                matches!(weight, Some(Ok(weight)) if weight == 0.0)
            };
            parts.next() == Some(what) && !parts.any(refused)
        })
}

/// What an operator does about an address that cannot be listened on.
fn remedy(kind: io::ErrorKind, port: u16) -> String {
    match kind {
        io::ErrorKind::AddrInUse => format!("who holds it: ss -ltnp 'sport = :{port}'"),
        io::ErrorKind::AddrNotAvailable => "the addresses of this host: ip address".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "a port below 1024 needs the capability CAP_NET_BIND_SERVICE".to_owned()
        }
        _ => "what listens here: ss -ltnp".to_owned(),
    }
}

const PLAIN_TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// A request's head arrives within this time, also the next one on an idle connection.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(2);
/// A request's head fits in this.
const BUFFER_BYTES: usize = 8 * 1024;
/// Later connections wait in the kernel. A scraper, a few probes and an operator need less.
const MAX_CONNECTIONS: usize = 64;
/// After this, a connection finishes its request and closes, so that stalled readers cannot hold
/// every place.
const MAX_AGE: Duration = Duration::from_secs(60);
/// How long the last answer of a closing connection may take.
const LAST_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to accept when one failed.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
