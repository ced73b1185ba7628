//! The other ends for tests: peers made of the TLS and HTTP/2 libraries alone, wires in memory and
//! real sockets. Takes scripts, gives what a tunnel talks to; never uses the rooms under test.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::Params;
use super::pool::{Dial, Pool, Target};
use crate::authz::{Live, Permit};
use crate::drain;
use crate::identity::testing::{Authority, id, store};
use crate::identity::{Credentials, Error, Issued, Issuer};
use crate::model::{Meter, SpiffeId, UpstreamAddr, WorkloadUid};

pub(super) const BANK: &str = "spiffe://cluster.local/ns/shop/sa/bank";
pub(super) const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

/// Runs a test as a worker would.
pub(super) async fn worker<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

pub(super) fn permit() -> Permit {
    Live::default().outbound(&WorkloadUid("cart".into()), id("cart"))
}

pub(super) fn connect_request() -> Request<()> {
    Request::connect("10.0.0.9:8080").body(()).unwrap()
}

/// What a dial meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Network {
    Drops,
    Refuses,
    Works,
}

/// A wire in memory; each dial gives its far end to the test.
pub(super) struct Wire {
    far: mpsc::UnboundedSender<DuplexStream>,
    pub(super) network: Rc<Cell<Network>>,
    pub(super) dials: Rc<Cell<usize>>,
}

impl Dial for Wire {
    type Io = DuplexStream;

    async fn dial(&self, _to: UpstreamAddr) -> io::Result<DuplexStream> {
        self.dials.set(self.dials.get() + 1);
        match self.network.get() {
            Network::Drops => std::future::pending().await,
            Network::Refuses => Err(io::ErrorKind::ConnectionRefused.into()),
            Network::Works => {
                let (near, far) = duplex(1 << 18);
                self.far.send(far).unwrap();
                Ok(near)
            }
        }
    }
}

struct SharedAuthority(Arc<Authority>);

impl Issuer for SharedAuthority {
    async fn issue(
        &self,
        id: &SpiffeId,
        now: std::time::SystemTime,
        ttl: std::time::Duration,
    ) -> Result<Issued, Error> {
        self.0.issue(id, now, ttl).await
    }
}

/// A pool with its surroundings.
pub(super) struct Bench {
    pub(super) pool: Rc<Pool<Wire>>,
    pub(super) authority: Arc<Authority>,
    pub(super) far: mpsc::UnboundedReceiver<DuplexStream>,
    pub(super) network: Rc<Cell<Network>>,
    pub(super) dials: Rc<Cell<usize>>,
    pub(super) drain: drain::Trigger,
}

pub(super) fn bench(params: Params) -> Bench {
    let authority = Arc::new(Authority::new());
    let store = store(SharedAuthority(Arc::clone(&authority)));
    let (tx, far) = mpsc::unbounded_channel();
    let (network, dials) = (Rc::new(Cell::new(Network::Works)), Rc::default());
    let wire = Wire {
        far: tx,
        network: Rc::clone(&network),
        dials: Rc::clone(&dials),
    };
    let (drain, signal) = drain::channel();
    Bench {
        pool: Rc::new(Pool::new(Rc::new(params), wire, store, signal)),
        authority,
        far,
        network,
        dials,
        drain,
    }
}

pub(super) fn target() -> Target {
    Target {
        upstream: UpstreamAddr::new(SocketAddr::from(([10, 0, 0, 9], 15008))),
        expected: vec![id("bank")],
        source: id("cart"),
        source_ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
    }
}

pub(super) async fn accept_tls(
    io: DuplexStream,
    credentials: &Credentials,
) -> TlsStream<DuplexStream> {
    TlsAcceptor::from(credentials.server_config())
        .accept(io)
        .await
        .unwrap()
}

/// What a peer saw.
#[derive(Clone, Default)]
pub(super) struct Seen {
    pub(super) requests: Rc<Cell<usize>>,
    pub(super) open: Rc<Cell<usize>>,
    pub(super) most: Rc<Cell<usize>>,
    pub(super) closed: Rc<Cell<usize>>,
    pub(super) shutdown: Rc<RefCell<Vec<mpsc::UnboundedSender<()>>>>,
}

impl Bench {
    /// A peer behind every wire: it answers each CONNECT with `status` and sends back what comes.
    pub(super) fn echo_peers(
        &mut self,
        configure: fn(&mut h2::server::Builder),
        status: u16,
    ) -> Seen {
        let seen = Seen::default();
        let credentials = self.authority.credentials(&[BANK]);
        let (_, empty) = mpsc::unbounded_channel();
        let mut far = std::mem::replace(&mut self.far, empty);
        let peers = seen.clone();
        tokio::task::spawn_local(async move {
            while let Some(io) = far.recv().await {
                let (credentials, seen) = (Arc::clone(&credentials), peers.clone());
                tokio::task::spawn_local(Box::pin(async move {
                    let tls = accept_tls(io, &credentials).await;
                    let mut builder = h2::server::Builder::new();
                    configure(&mut builder);
                    let connection = builder.handshake(tls).await.unwrap();
                    Box::pin(echo_tunnel(connection, status, seen)).await;
                }));
            }
        });
        seen
    }
}

async fn echo_tunnel(
    mut connection: h2::server::Connection<TlsStream<DuplexStream>, Bytes>,
    status: u16,
    seen: Seen,
) {
    let (tx, mut goodbye) = mpsc::unbounded_channel();
    seen.shutdown.borrow_mut().push(tx);
    let open = Rc::new(Cell::new(0));
    loop {
        tokio::select! {
            Some(()) = goodbye.recv() => connection.graceful_shutdown(),
            next = connection.accept() => {
                let Some(Ok((request, mut respond))) = next else { break };
                seen.requests.set(seen.requests.get() + 1);
                let (seen, open) = (seen.clone(), Rc::clone(&open));
                open.set(open.get() + 1);
                seen.most.set(seen.most.get().max(open.get()));
                seen.open.set(seen.open.get() + 1);
                tokio::task::spawn_local(async move {
                    let response = Response::builder().status(status).body(()).unwrap();
                    if status == 200 {
                        let mut send = respond.send_response(response, false).unwrap();
                        let mut recv = request.into_body();
                        while let Some(Ok(data)) = recv.data().await {
                            recv.flow_control().release_capacity(data.len()).unwrap();
                            if give(&mut send, data).await.is_err() {
                                break;
                            }
                        }
                        drop(send.send_data(Bytes::new(), true));
                    } else {
                        respond.send_response(response, true).unwrap();
                    }
                    open.set(open.get() - 1);
                    seen.open.set(seen.open.get() - 1);
                });
            }
        }
    }
    seen.closed.set(seen.closed.get() + 1);
}

/// Sends all of it, as the window allows.
pub(super) async fn give(
    send: &mut h2::SendStream<Bytes>,
    mut data: Bytes,
) -> Result<(), h2::Error> {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        if send.capacity() == 0 {
            match std::future::poll_fn(|cx| send.poll_capacity(cx)).await {
                Some(Ok(_)) => {}
                Some(Err(e)) => return Err(e),
                None => return Err(h2::Reason::CANCEL.into()),
            }
        }
        let bytes = send.capacity().min(data.len());
        send.send_data(data.split_to(bytes), false)?;
    }
    Ok(())
}

/// Two connected TCP sockets.
pub(super) async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let connect = TcpStream::connect(listener.local_addr().unwrap());
    let (near, far) = tokio::join!(connect, listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// One frame as it is on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
    pub(super) const ACK: u8 = 1;

    pub(super) async fn read(io: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<Self> {
        let mut head = [0; 9];
        io.read_exact(&mut head).await?;
        let len = usize::try_from(u32::from_be_bytes([0, head[0], head[1], head[2]])).unwrap();
        let mut payload = vec![0; len];
        io.read_exact(&mut payload).await?;
        Ok(Self {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
            payload,
        })
    }

    pub(super) async fn write(&self, io: &mut (impl tokio::io::AsyncWrite + Unpin)) {
        let len = u32::try_from(self.payload.len()).unwrap().to_be_bytes();
        let mut bytes = BytesMut::from(&len[1..]);
        bytes.extend_from_slice(&[self.kind, self.flags]);
        bytes.extend_from_slice(&self.stream.to_be_bytes());
        bytes.extend_from_slice(&self.payload);
        io.write_all(&bytes).await.unwrap();
        io.flush().await.unwrap();
    }

    pub(super) const fn empty(kind: u8, flags: u8) -> Self {
        Self {
            kind,
            flags,
            stream: 0,
            payload: Vec::new(),
        }
    }

    /// The values of a SETTINGS frame by number.
    pub(super) fn settings(&self) -> std::collections::BTreeMap<u16, u32> {
        self.payload
            .chunks(6)
            .map(|s| {
                (
                    u16::from_be_bytes([s[0], s[1]]),
                    u32::from_be_bytes([s[2], s[3], s[4], s[5]]),
                )
            })
            .collect()
    }
}

/// Counts bytes.
#[derive(Clone, Default)]
pub(super) struct Counts {
    pub(super) received: Rc<Cell<u64>>,
    pub(super) sent: Rc<Cell<u64>>,
}

impl Meter for Counts {
    fn received(&self, bytes: u64) {
        self.received.set(self.received.get() + bytes);
    }

    fn sent(&self, bytes: u64) {
        self.sent.set(self.sent.get() + bytes);
    }
}
