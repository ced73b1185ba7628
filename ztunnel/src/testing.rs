//! A pod of this node on one thread, for tests of the walks. Takes a mesh, gives the walks' context,
//! sockets of loopback addresses and peers made of the TLS and HTTP/2 libraries alone; never
//! enters a namespace and never needs a privilege.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime};
use std::{fmt, io};

use bytes::Bytes;
use rustls_pki_types::ServerName;
use socket2::{Domain, Protocol as Transport, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::account::Accounts;
use crate::authz::Live;
use crate::capture::Captured;
use crate::context::{
    Attested, Context, Descriptors, Handshakes, Names, Neighbours, PodDial, Settings, Sockets, View,
};
use crate::control::World;
use crate::identity::testing::{Authority, id, store};
use crate::identity::{Error, Issued, Issuer};
use crate::model::{
    ClientAddr, Direction, ListenAddr, LoadBalancer, OrigDst, PodRef, Policy, Reason, Service,
    SpiffeId, Visibility, Workload, WorkloadUid,
};
use crate::{drain, tunnel};

pub(crate) const BANK: &str = "spiffe://cluster.local/ns/shop/sa/bank";
pub(crate) const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

/// Runs a test as a worker would.
pub(crate) async fn worker<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

/// An address that no other test of this machine uses, with all its ports.
pub(crate) fn own_ip() -> IpAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Ipv4Addr::new(127, 1 + (high & 0x3f), low, number).into()
}

/// The workload of a pod whose service account has the pod's name.
pub(crate) fn workload(name: &str, ip: IpAddr) -> Workload {
    Workload {
        uid: WorkloadUid(name.into()),
        name: name.into(),
        identity: Some(id(name)),
        ips: vec![ip],
        ..crate::model::testing::workload("shop")
    }
}

/// A service `shop/<name>.shop`.
pub(crate) fn service(name: &str, vip: &str, ports: &[(u16, u16)]) -> Service {
    Service {
        name: name.into(),
        key: format!("shop/{name}.shop").parse().unwrap(),
        vips: vec![format!("/{vip}").parse().unwrap()],
        cidr_vips: Vec::new(),
        ports: ports.iter().copied().collect(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: LoadBalancer::default(),
        ip_families: None,
        canonical: false,
        visibility: Visibility::Public,
    }
}

/// A mesh of these.
pub(crate) fn world(
    workloads: Vec<Workload>,
    services: Vec<Service>,
    policies: Vec<Policy>,
) -> World {
    World::default().next(
        "".into(),
        workloads.into_iter().map(Arc::new).collect(),
        services.into_iter().map(Arc::new).collect(),
        policies.into_iter().map(Arc::new).collect(),
    )
}

/// The pod `shop/bank` with all that its walks share.
pub(crate) struct Pod {
    pub(crate) cx: Rc<Context>,
    pub(crate) drain: drain::Trigger,
    pub(crate) made: Rc<Made>,
    pub(crate) authority: Arc<Authority>,
    accounts: Accounts,
}

impl Pod {
    pub(crate) fn new(world: World) -> Self {
        Self::with(world, |_| {})
    }

    pub(crate) fn with(world: World, change: impl FnOnce(&mut Settings)) -> Self {
        let authority = Arc::new(Authority::new());
        let store = store(Shared(Arc::clone(&authority)));
        let accounts = Accounts::new(1);
        let made = Rc::new(Made::default());
        let (drain, signal) = drain::channel();
        let mut settings = Settings {
            original_source: true,
            response_baggage: true,
            localhost_app_tunnel: true,
            policy_info_logging: false,
            local_fast_path: true,
            keepalive: Some(tunnel::TcpKeepalive::default()),
        };
        change(&mut settings);
        let dial = PodDial::new(
            Rc::new(Here(Rc::clone(&made))),
            Descriptors::default(),
            settings.keepalive,
        );
        let params = Rc::new(tunnel::Params::default());
        let pool = tunnel::Pool::new(
            Rc::clone(&params),
            dial.clone(),
            Arc::clone(&store),
            signal.clone(),
        );
        let cx = Rc::new(Context {
            pod: PodRef {
                name: "bank".into(),
                namespace: "shop".into(),
                service_account: "bank".into(),
            },
            view: View::new(world),
            demander: None,
            live: Live::default(),
            book: accounts.book(0),
            pool,
            dial,
            handshakes: Handshakes::default(),
            names: Rc::new(Names::default()),
            store,
            tunnel: params,
            settings,
            drain: signal,
            neighbours: Neighbours::default(),
            attested: Attested::default(),
        });
        cx.neighbours.enter(&cx);
        Self {
            cx,
            drain,
            made,
            authority,
            accounts,
        }
    }

    /// Another pod of this node, on the same worker.
    pub(crate) fn neighbour(&self, name: &str) -> Self {
        let made = Rc::new(Made::default());
        let (drain, signal) = drain::channel();
        let own = &self.cx;
        let dial = PodDial::new(
            Rc::new(Here(Rc::clone(&made))),
            Descriptors::default(),
            own.settings.keepalive,
        );
        let pool = tunnel::Pool::new(
            Rc::clone(&own.tunnel),
            dial.clone(),
            Arc::clone(&own.store),
            signal.clone(),
        );
        let cx = Rc::new(Context {
            pod: PodRef {
                name: name.into(),
                namespace: "shop".into(),
                service_account: name.into(),
            },
            view: Rc::clone(&own.view),
            demander: None,
            live: own.live.clone(),
            book: own.book.clone(),
            pool,
            dial,
            handshakes: Handshakes::default(),
            store: Arc::clone(&own.store),
            tunnel: Rc::clone(&own.tunnel),
            settings: own.settings,
            drain: signal,
            names: Rc::clone(&own.names),
            neighbours: own.neighbours.clone(),
            attested: Attested::default(),
        });
        cx.neighbours.enter(&cx);
        Self {
            cx,
            drain,
            made,
            authority: Arc::clone(&self.authority),
            accounts: self.accounts.clone(),
        }
    }

    /// How many connections were routed so.
    pub(crate) fn routed(&self, direction: Direction, path: &str) -> u64 {
        let row = format!(
            "ztunnel_connections_routed_total{{direction=\"{direction}\",path=\"{path}\"}} "
        );
        self.sample(&row)
    }

    /// How many connections have ended so.
    pub(crate) fn ended(&self, direction: Direction, reason: Reason) -> u64 {
        let row = format!(
            "ztunnel_connections_total{{direction=\"{direction}\",reason=\"{}\"}} ",
            reason.as_str()
        );
        self.sample(&row)
    }

    /// How many connections are open.
    pub(crate) fn open(&self, direction: Direction) -> u64 {
        self.sample(&format!(
            "ztunnel_connections_open{{direction=\"{direction}\"}} "
        ))
    }

    fn sample(&self, row: &str) -> u64 {
        let page = self.accounts.encode();
        let value = page.lines().find_map(|line| line.strip_prefix(row));
        value.map_or(0, |value| value.parse().unwrap())
    }

    /// A connection that capture hands over: the application's end, and ours.
    pub(crate) async fn captured(
        &self,
        original: SocketAddr,
        listener: u16,
    ) -> (TcpStream, Captured) {
        let (near, far) = pair().await;
        let captured = Captured {
            client: ClientAddr::new(near.local_addr().unwrap()),
            stream: far,
            original: OrigDst::new(original),
            direct: false,
            redirected: false,
            listener: ListenAddr::new(SocketAddr::new(original.ip(), listener)),
        };
        (near, captured)
    }

    /// A client of this identity with a tunnel into the pod at `ip`.
    pub(crate) async fn tunnel(&self, identity: &str, ip: IpAddr) -> Client {
        let at = SocketAddr::new(ip, 15008);
        let (near, captured) = self.captured(at, 15008).await;
        let address = captured.client;
        let place = self.cx.handshakes.enter().await;
        let cx = Rc::clone(&self.cx);
        tokio::task::spawn_local(crate::inbound::serve(captured, place, cx));
        let credentials = self.authority.credentials(&[identity]);
        let tls = TlsConnector::from(credentials.client_config(&[id("bank")]));
        let name = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let tls = tls.connect(name, near).await.unwrap();
        let (sender, connection) = h2::client::handshake(tls).await.unwrap();
        tokio::task::spawn_local(async move { drop(connection.await) });
        Client { sender, address }
    }
}

/// An HBONE client that is the libraries themselves.
pub(crate) struct Client {
    pub(crate) sender: h2::client::SendRequest<Bytes>,
    /// Where its tunnel comes from.
    pub(crate) address: ClientAddr,
}

impl Client {
    /// Sends a request; gives the answer and the open direction.
    pub(crate) async fn ask(
        &self,
        request: http::Request<()>,
    ) -> (http::Response<h2::RecvStream>, h2::SendStream<Bytes>) {
        let mut sender = self.sender.clone().ready().await.unwrap();
        let (response, send) = sender.send_request(request, false).unwrap();
        (response.await.unwrap(), send)
    }

    /// The status that a CONNECT to `authority` is answered with.
    pub(crate) async fn status(&self, authority: &str) -> u16 {
        let (response, _send) = self.ask(connect(authority)).await;
        response.status().as_u16()
    }
}

/// A CONNECT without any header.
pub(crate) fn connect(authority: &str) -> http::Request<()> {
    http::Request::connect(authority).body(()).unwrap()
}

/// An HBONE server that is the libraries themselves, at port 15008 of an address of its own.
pub(crate) struct HboneServer {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl HboneServer {
    pub(crate) async fn new(authority: &Authority, identity: &str, ip: IpAddr) -> Self {
        let config = authority.credentials(&[identity]).server_config();
        Self {
            listener: TcpListener::bind((ip, 15008)).await.unwrap(),
            acceptor: TlsAcceptor::from(config),
        }
    }

    /// The next tunnel.
    pub(crate) async fn accept(
        &self,
    ) -> h2::server::Connection<tokio_rustls::server::TlsStream<TcpStream>, Bytes> {
        let (tcp, _) = self.listener.accept().await.unwrap();
        let tls = self.acceptor.accept(tcp).await.unwrap();
        h2::server::handshake(tls).await.unwrap()
    }

    /// The next tunnel does not come to be.
    pub(crate) async fn fails(&self) {
        let (tcp, _) = self.listener.accept().await.unwrap();
        assert!(self.acceptor.accept(tcp).await.is_err());
    }
}

/// What a socket has been given.
pub(crate) struct Options(Socket);

impl Options {
    /// No delay; keepalive: whether, after, between, probes.
    pub(crate) fn read(&self) -> (bool, bool, Duration, Duration, u32) {
        let Self(socket) = self;
        (
            socket.tcp_nodelay().unwrap(),
            socket.keepalive().unwrap(),
            socket.tcp_keepalive_time().unwrap(),
            socket.tcp_keepalive_interval().unwrap(),
            socket.tcp_keepalive_retries().unwrap(),
        )
    }
}

/// Two connected sockets.
pub(crate) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap());
    let (near, far) = tokio::join!(near, listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// The sockets that a pod's walks asked for.
#[derive(Default)]
pub(crate) struct Made {
    count: Cell<usize>,
    /// Whether they are kept to be looked at, which also keeps them open.
    pub(crate) kept: Cell<bool>,
    sockets: RefCell<Vec<Options>>,
    /// Whether the other ends of connections into the pod are the node's.
    pub(crate) node_holds: Cell<bool>,
    /// Called once, when the application is about to be dialled.
    pub(crate) before_app: RefCell<Option<Box<dyn FnOnce()>>>,
}

impl Made {
    pub(crate) fn count(&self) -> usize {
        self.count.get()
    }

    pub(crate) fn options(&self) -> Vec<(bool, bool, Duration, Duration, u32)> {
        self.sockets.borrow().iter().map(Options::read).collect()
    }

    fn make(&self) -> io::Result<std::net::TcpStream> {
        let kind = Type::STREAM.nonblocking();
        let socket = Socket::new(Domain::IPV4, kind, Some(Transport::TCP))?;
        self.count.set(self.count.get() + 1);
        if self.kept.get() {
            self.sockets.borrow_mut().push(Options(socket.try_clone()?));
        }
        Ok(socket.into())
    }
}

/// Sockets of the test's own namespace.
struct Here(Rc<Made>);

impl fmt::Debug for Here {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Here").finish_non_exhaustive()
    }
}

impl Sockets for Here {
    fn is_of_pod(&self, _address: IpAddr) -> bool {
        true
    }

    fn question(&self, _resolver: IpAddr) -> io::Result<std::net::UdpSocket> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    fn upstream(&self, _destination: IpAddr) -> io::Result<std::net::TcpStream> {
        self.0.make()
    }

    fn app(&self, _client: Option<IpAddr>, _app: IpAddr) -> io::Result<std::net::TcpStream> {
        let before = self.0.before_app.take();
        if let Some(before) = before {
            before();
        }
        self.0.make()
    }

    fn node_holds(&self, _from: SocketAddr, _to: SocketAddr) -> io::Result<bool> {
        Ok(self.0.node_holds.get())
    }
}

struct Shared(Arc<Authority>);

impl Issuer for Shared {
    async fn issue(&self, id: &SpiffeId, now: SystemTime, ttl: Duration) -> Result<Issued, Error> {
        self.0.issue(id, now, ttl).await
    }
}
