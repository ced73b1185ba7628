//! One connection to the control plane. Takes its parameters, gives calls on it, and says when the other side has
//! announced that it will leave; never reconnects by itself.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Ping, PingPong};
use http::{HeaderName, Method, Request, Version, header};
use prost::Message;
use rustls_pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::call::{Stream, frame};
use super::error::Error;
use super::params::Params;
use super::tls;

/// An open connection. Clones share it; it closes with the last of them and of its streams.
#[derive(Clone)]
pub struct Connection {
    params: Arc<Params>,
    requests: SendRequest<Bytes>,
    /// What the roots were when it was opened.
    roots: Arc<[u8]>,
    _driver: Arc<Driver>,
}

impl Connection {
    /// Connects: looks the name up, TCP, TLS, HTTP/2, each within its time. Cancel safe.
    ///
    /// # Errors
    /// What went wrong first; of several addresses, the last one's.
    // PROTOCOL.md#control-plane-tls
    pub async fn open(params: &Params) -> Result<Self, Error> {
        // Handshakes are large, and most of its life a caller does not hold one.
        Box::pin(Self::connect(params)).await
    }

    async fn connect(params: &Params) -> Result<Self, Error> {
        let (roots, fingerprint) = params.roots.read().await?;
        let endpoint = params.endpoint.to_string();
        let config = tls::config(roots, params, &endpoint)?;
        let host = params.endpoint.host();
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_invalid| Error::Name(host.to_owned()))?;
        let tcp = dial(params).await?;
        let failed = |source| Error::Tls {
            endpoint: endpoint.clone(),
            source,
        };
        let connect = TlsConnector::from(Arc::new(config)).connect(name, tcp);
        let tls = within("TLS handshake", HANDSHAKE, connect)
            .await?
            .map_err(failed)?;
        if tls.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(Error::Protocol("the server does not speak HTTP/2"));
        }
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .max_header_list_size(HEADER_BYTES)
            .enable_push(false);
        let handshake = builder.handshake::<_, Bytes>(tls);
        let (requests, connection) = within("HTTP/2 handshake", HANDSHAKE, Box::pin(handshake))
            .await?
            .map_err(Error::Broken)?;
        Ok(Self {
            params: Arc::new(params.clone()),
            requests,
            roots: fingerprint.into(),
            _driver: Arc::new(Driver(tokio::spawn(drive(connection)))),
        })
    }

    /// Whether the other side is gone, or has said that it takes no more calls.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        let mut requests = self.requests.clone();
        let mut context = Context::from_waker(Waker::noop());
        matches!(requests.poll_ready(&mut context), Poll::Ready(Err(_)))
    }

    /// Waits until [`Self::is_leaving`]. Open calls go on. Cancel safe.
    pub async fn leaving(&self) {
        while !self.is_leaving() {
            sleep(LEAVING_LOOK).await;
        }
    }

    /// Whether the roots of this connection are those that would be used now.
    ///
    /// # Errors
    /// When the roots cannot be read.
    pub async fn trusts_as_before(&self) -> Result<bool, Error> {
        let (_, now) = self.params.roots.read().await?;
        Ok(*now == *self.roots)
    }

    /// Opens a call in which both sides send many messages; none of theirs is taken above `limit_bytes`.
    ///
    /// # Errors
    /// When there is no token, or the connection broke.
    pub async fn stream<R: Message + Default>(
        &self,
        path: &str,
        limit_bytes: usize,
    ) -> Result<Stream<R>, Error> {
        let request = self.request(path).await?;
        let mut requests = self.requests.clone().ready().await.map_err(Error::Broken)?;
        let (response, send) = requests
            .send_request(request, false)
            .map_err(Error::Broken)?;
        Ok(Stream::new(send, response, limit_bytes, self.clone()))
    }

    /// Asks once. Cancel safe: the call is cancelled.
    ///
    /// # Errors
    /// The refusal, or what broke.
    pub async fn call<R: Message + Default>(
        &self,
        path: &str,
        message: &impl Message,
    ) -> Result<R, Error> {
        let mut stream = self.stream::<R>(path, ANSWER_BYTES).await?;
        stream.send_last(frame(message)?).await?;
        let answer = stream.next().await?;
        let answer = answer.ok_or(Error::Protocol("success without a message"))?;
        // The status comes last; a message alone is not an answer yet.
        match stream.next().await? {
            None => Ok(answer),
            Some(_) => Err(Error::Protocol("two messages where one was asked for")),
        }
    }

    // PROTOCOL.md#control-plane-token
    async fn request(&self, path: &str) -> Result<Request<()>, Error> {
        let Params {
            endpoint,
            token,
            cluster_id,
            headers,
            ..
        } = &*self.params;
        let mut request = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri(format!("https://{endpoint}{path}"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .header(
                header::USER_AGENT,
                concat!("ztunnel/", env!("CARGO_PKG_VERSION")),
            );
        if let Some(token) = token {
            request = request
                .header(header::AUTHORIZATION, token.header().await?)
                .header(CLUSTER_ID, cluster_id);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        request
            .body(())
            .map_err(|_invalid| Error::Name(endpoint.host().to_owned()))
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}

/// Ends the connection's task with it.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn drive(mut connection: h2::client::Connection<TlsStream<TcpStream>, Bytes>) {
    let pings = connection.ping_pong();
    tokio::select! {
        end = connection => match end {
            Ok(()) => tracing::debug!("connection to the control plane closed"),
            Err(error) => tracing::debug!(%error, "connection to the control plane broke"),
        },
        () = keep_alive(pings) => {
            tracing::warn!(after = ?PING_PATIENCE, "the control plane does not answer pings; closing the connection");
        }
    }
}

/// Returns when the other side does not answer any more.
// PROTOCOL.md#control-plane-ping
async fn keep_alive(pings: Option<PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        sleep(PING_EVERY).await;
        match timeout(PING_PATIENCE, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection tells itself how it broke.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// Looks the name up at each attempt: it may lead elsewhere by now.
async fn dial(params: &Params) -> Result<TcpStream, Error> {
    let (host, port) = (params.endpoint.host(), params.endpoint.port());
    let failed = |source| Error::Lookup {
        host: host.to_owned(),
        source,
    };
    let found = within("name look-up", DIAL, tokio::net::lookup_host((host, port))).await?;
    let found: Vec<SocketAddr> = found.map_err(failed)?.collect();
    let mut last = failed(std::io::ErrorKind::NotFound.into());
    for addr in found {
        match within("connect", DIAL, TcpStream::connect(addr)).await {
            Ok(Ok(tcp)) => {
                keep_tcp_alive(&tcp);
                return Ok(tcp);
            }
            Ok(Err(source)) => last = Error::Connect { addr, source },
            Err(late) => last = late,
        }
    }
    Err(last)
}

fn keep_tcp_alive(tcp: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    let set = SockRef::from(tcp)
        .set_tcp_keepalive(&keepalive)
        .and_then(|()| tcp.set_nodelay(true));
    if let Err(error) = set {
        tracing::debug!(%error, "socket options not set");
    }
}

pub(super) async fn within<T>(
    what: &'static str,
    after: Duration,
    work: impl Future<Output = T>,
) -> Result<T, Error> {
    timeout(after, work)
        .await
        .map_err(|_elapsed| Error::TimedOut { what, after })
}

const CLUSTER_ID: HeaderName = HeaderName::from_static("clusterid");
/// Time for a look-up, and for each TCP connect.
const DIAL: Duration = Duration::from_secs(5);
/// Time for each handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(300);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(75);
const KEEPALIVE_PROBES: u32 = 9;
/// A control plane takes pings more often than every 15 s for an attack.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_PATIENCE: Duration = Duration::from_secs(10);
/// How often a GOAWAY is looked for; after one, control planes stay for ten seconds.
const LEAVING_LOOK: Duration = Duration::from_millis(200);
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES: u32 = 1 << 20;
const HEADER_BYTES: u32 = 64 << 10;
/// A chain of certificates, generously.
const ANSWER_BYTES: usize = 4 << 20;
