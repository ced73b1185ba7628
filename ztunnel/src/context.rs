//! What the walks of one pod share on one worker: the mesh as the worker sees it, the permits, the
//! books, the tunnels and the pod's sockets. Takes the parts, gives short answers; never decides.

mod descriptors;
mod handshakes;
mod names;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use socket2::SockRef;
use thiserror::Error;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info};

use crate::account::Book;
use crate::authz::{Denied, DryRun, Live, Permit, Probe};
use crate::capture::{self, Dialer};
use crate::control::{Demander, World};
use crate::drain;
use crate::identity::{self, Credentials, Store};
use crate::model::{AppAddr, Flow, PodRef, Reason, SpiffeId, ToReason, UpstreamAddr, Workload};
use crate::tunnel::{self, Dial, Inside, Pool, Side as _};

pub use descriptors::Descriptors;
pub use handshakes::{Handshakes, Place};
pub use names::{NameError, Names};

/// The mesh as one worker sees it: replaced whole, read without a lock.
#[derive(Debug)]
pub struct View {
    world: RefCell<Rc<World>>,
    replaced: Notify,
}

impl View {
    /// Starts with a world.
    #[must_use]
    pub fn new(world: World) -> Rc<Self> {
        Rc::new(Self {
            world: RefCell::new(Rc::new(world)),
            replaced: Notify::new(),
        })
    }

    /// The world of now.
    #[must_use]
    pub fn world(&self) -> Rc<World> {
        Rc::clone(&self.world.borrow())
    }

    /// Replaces the world and wakes whoever waits for a newer one.
    pub fn replace(&self, world: World) {
        *self.world.borrow_mut() = Rc::new(world);
        self.replaced.notify_waiters();
    }

    /// Looks until `find` gives something or the deadline passes; then gives what `find` says
    /// last. Cancel safe.
    pub async fn wait_for<T>(
        &self,
        deadline: Instant,
        find: impl Fn(&World) -> Option<T>,
    ) -> Option<T> {
        loop {
            let replaced = self.replaced.notified();
            let world = self.world();
            if let Some(found) = find(&world) {
                return Some(found);
            }
            if timeout_at(deadline, replaced).await.is_err() {
                return find(&self.world());
            }
        }
    }
}

/// Settings of the walks.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The application sees its client's own address.
    pub original_source: bool,
    /// The answer to a CONNECT describes this side.
    pub response_baggage: bool,
    /// An application that reads PROXY headers is reached on the pod's loopback device.
    pub localhost_app_tunnel: bool,
    /// Policy decisions are logged at info, not debug.
    pub policy_info_logging: bool,
    /// Between pods of this node, bytes go from socket to socket, without a tunnel.
    pub local_fast_path: bool,
    /// TCP keepalive of relayed sockets.
    pub keepalive: Option<tunnel::TcpKeepalive>,
}

/// The pods of this node as one worker serves them: a pod is found here from the moment that its
/// listeners are served until it leaves. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Neighbours(Rc<RefCell<Pods>>);

/// By namespace and name.
type Pods = HashMap<(Arc<str>, Arc<str>), Weak<Context>>;

impl Neighbours {
    /// The pod is served from now on.
    pub fn enter(&self, pod: &Rc<Context>) {
        let key = key(&pod.pod.namespace, &pod.pod.name);
        self.0.borrow_mut().insert(key, Rc::downgrade(pod));
    }

    /// The pod is not served any more. One of the same name that came after it stays.
    pub fn leave(&self, pod: &Weak<Context>) {
        self.0.borrow_mut().retain(|_, held| !held.ptr_eq(pod));
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Rc<Context>> {
        self.0.borrow().values().filter_map(Weak::upgrade).collect()
    }

    /// The pod of this node that is this workload.
    #[must_use]
    pub fn pod_of(&self, workload: &Workload) -> Option<Rc<Context>> {
        let pods = self.0.borrow();
        let pod = pods.get(&key(&workload.namespace, &workload.name))?;
        let pod = pod.upgrade()?;
        // Names are those of one cluster; the state may tell of several.
        let world = pod.view.world();
        let own = world.snapshot.pod(&pod.pod)?;
        (own.uid == workload.uid).then_some(pod)
    }
}

fn key(namespace: &Arc<str>, name: &Arc<str>) -> (Arc<str>, Arc<str>) {
    (Arc::clone(namespace), Arc::clone(name))
}

/// What this node last knew to hold a certificate for, and until when it need not be looked for
/// again: the store is shared by all threads, and a connection must not wait for another worker.
#[derive(Debug, Default)]
pub struct Attested {
    held: RefCell<Option<(Instant, Arc<Credentials>)>>,
    lost: Notify,
}

impl Attested {
    /// Waits until a certificate is revoked on which connections of the pod stand that have no
    /// tunnel. Cancel safe.
    pub async fn lost(&self) {
        self.lost.notified().await;
    }

    /// Other lists of revoked certificates are in force.
    pub fn recheck(&self) {
        let mut held = self.held.borrow_mut();
        if held.take_if(|(_, held)| held.is_revoked()).is_some() {
            self.lost.notify_waiters();
        }
    }

    fn holds(&self, identity: &SpiffeId) -> bool {
        let held = self.held.borrow();
        held.as_ref()
            .is_some_and(|(until, known)| known.id() == identity && Instant::now() < *until)
    }

    fn remember(&self, credentials: Arc<Credentials>) {
        let valid = credentials.valid_with(credentials.chain());
        let until = Instant::now() + valid.min(ATTESTED_FOR);
        *self.held.borrow_mut() = Some((until, credentials));
    }
}

/// What the walks of one pod share on one worker.
#[derive(Debug)]
pub struct Context {
    /// The pod.
    pub pod: PodRef,
    /// The mesh.
    pub view: Rc<View>,
    /// Asks the control plane for what the mesh lacks; none if it tells everything.
    pub demander: Option<Demander>,
    /// Permits in use on this worker.
    pub live: Live,
    /// The worker's book.
    pub book: Book,
    /// The pod's tunnels on this worker.
    pub pool: Pool<PodDial>,
    /// Connects from the pod.
    pub dial: PodDial,
    /// The peers on the HBONE port that have not proved yet who they are.
    pub handshakes: Handshakes,
    /// Host names that the mesh names instead of addresses.
    pub names: Rc<Names>,
    /// Certificates.
    pub store: Arc<Store>,
    /// HBONE's parameters.
    pub tunnel: Rc<tunnel::Params>,
    /// Settings of the walks.
    pub settings: Settings,
    /// The pod's end.
    pub drain: drain::Signal,
    /// The pods of this node.
    pub neighbours: Neighbours,
    /// What this node last knew to hold a certificate for.
    pub attested: Attested,
}

impl Context {
    /// The pod's own workload; waits a while for the control plane to tell. Cancel safe.
    // PROTOCOL.md#own-workload
    pub async fn workload(&self) -> Option<Arc<Workload>> {
        let deadline = Instant::now() + OWN_WORKLOAD_WAIT;
        let find = |world: &World| world.snapshot.pod(&self.pod).map(Arc::clone);
        self.view.wait_for(deadline, find).await
    }

    /// Makes sure that this node may speak for the pod under this identity: that it holds a
    /// certificate of it which is valid now. Cancel safe.
    ///
    /// # Errors
    /// There is none.
    pub async fn attest(&self, identity: &SpiffeId) -> Result<(), identity::Error> {
        if self.attested.holds(identity) {
            return Ok(());
        }
        let credentials = self.store.get(identity).await?;
        if credentials.is_revoked() {
            return Err(identity::Error::Revoked(identity.clone()));
        }
        self.attested.remember(credentials);
        Ok(())
    }

    /// Has the control plane tell of what a pod dials, when it tells only what it is asked for. Cancel safe.
    // PROTOCOL.md#on-demand
    pub async fn learn(&self, source: &Workload, ip: IpAddr) {
        let Some(demander) = &self.demander else {
            return;
        };
        let known = |world: &World| {
            let snapshot = &world.snapshot;
            let service = snapshot.service_at(&source.network, ip, &source.namespace);
            let known = service.is_some() || snapshot.workload_at(&source.network, ip).is_some();
            known.then_some(())
        };
        if known(&self.view.world()).is_some() {
            return;
        }
        if demander.ask(format!("{}/{ip}", source.network)).await {
            // It is on its way from the stream to this worker.
            let deadline = Instant::now() + LEARN_WAIT;
            let _: Option<()> = self.view.wait_for(deadline, known).await;
        }
    }

    /// A permit for a connection into this pod. Waits a moment for a policy that the workload
    /// names and that is not here yet, then refuses. Cancel safe.
    ///
    /// # Errors
    /// The refusal, or that the workload is gone.
    pub async fn admit(&self, workload: &Arc<Workload>, flow: Flow) -> Result<Permit, NotAdmitted> {
        let deadline = Instant::now() + POLICY_WAIT;
        let held = |world: &World| {
            let workload = world.snapshot.workload(&workload.uid).unwrap_or(workload);
            world.policies.missing(workload).is_none().then_some(())
        };
        // Whether it came or not, the judgement below is made on the newest world.
        let _: Option<()> = self.view.wait_for(deadline, held).await;
        let world = self.view.world();
        // Gone meanwhile: nothing would ever judge this connection again.
        let workload = world.snapshot.workload(&workload.uid);
        let workload = workload.ok_or(NotAdmitted::UnknownWorkload)?;
        let source = flow.source;
        let judged = self.live.admit(&world.policies, workload, flow);
        match &judged {
            Ok(permit) => {
                let by = permit.allowed_by().map(ToString::to_string);
                let by = by.as_deref().unwrap_or("no policy in force");
                self.log_judgement(format_args!("{source} allowed by {by}"), permit.dry_run());
            }
            Err(denied) => {
                self.log_judgement(format_args!("{source} refused: {denied}"), denied.dry_run());
            }
        }
        Ok(judged?)
    }

    /// A permit for a connection of this node that asks the pod how it is; none if it is no such one, or
    /// cannot prove it.
    // PROTOCOL.md#probes
    #[must_use]
    pub fn admit_probe(&self, workload: &Workload, flow: &Flow) -> Option<Permit> {
        let world = self.view.world();
        let workload = world.snapshot.workload(&workload.uid)?;
        let proven = match world.policies.probes().of(workload, flow)? {
            Probe::Translated => true,
            Probe::IfHeldByThisNode => self.dial.node_holds(flow),
        };
        let (source, pod) = (flow.source, &self.pod);
        if !proven {
            debug!(%pod, %source, "from a probe's source, but no process of this node holds its end");
            return None;
        }
        let permit = self
            .live
            .admit_probe(&world.policies, workload, flow.clone());
        self.log_judgement(
            format_args!("{source} allowed as a probe of this node"),
            &[],
        );
        permit
    }

    /// Says what policy decided, and what the policies on trial would have.
    fn log_judgement(&self, judgement: fmt::Arguments<'_>, dry_run: &[DryRun]) {
        let pod = &self.pod;
        if self.settings.policy_info_logging {
            info!(%pod, %judgement, "policy");
        } else {
            debug!(%pod, %judgement, "policy");
        }
        for trial in dry_run {
            let would = match trial {
                DryRun::Denied(policy) => format!("be refused by {policy}"),
                DryRun::NoAllow => "be refused: no ALLOW on trial matches".to_owned(),
            };
            info!(%pod, %judgement, would, "dry run");
        }
    }

    /// Connects out of the pod. Cancel safe: the socket is closed.
    ///
    /// # Errors
    /// No socket, no answer in time, or a refusal.
    pub async fn dial_upstream(&self, upstream: UpstreamAddr) -> Result<TcpStream, DialError> {
        let to = upstream.addr();
        self.in_time(to, self.dial.upstream(upstream)).await
    }

    /// Connects to the pod's application, from the client's own address where that is wanted.
    /// Cancel safe: the socket is closed.
    ///
    /// # Errors
    /// No socket, no answer in time, or a refusal.
    pub async fn dial_app(
        &self,
        client: IpAddr,
        app: AppAddr,
        local: &Workload,
    ) -> Result<TcpStream, DialError> {
        // A pod that calls itself would meet its own connection.
        let foreign = !local.ips.contains(&client);
        let client = (self.settings.original_source && foreign).then_some(client);
        self.in_time(app.addr(), self.dial.app(client, app)).await
    }

    /// Connects to the pod's application by the pod's loopback device, whose port is that of `app`.
    /// Cancel safe: the socket is closed.
    ///
    /// # Errors
    /// No socket, no answer in time, or a refusal.
    pub async fn dial_loopback(&self, app: AppAddr) -> Result<TcpStream, DialError> {
        let ip: IpAddr = match app.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let app = AppAddr::new(SocketAddr::new(ip, app.port()));
        self.in_time(app.addr(), self.dial.app(None, app)).await
    }

    /// What a tunnel inside another one is made with.
    #[must_use]
    pub fn inside(&self) -> Inside {
        Inside {
            params: Rc::clone(&self.tunnel),
            store: Arc::clone(&self.store),
            drain: self.drain.clone(),
        }
    }

    async fn in_time(
        &self,
        to: SocketAddr,
        connect: impl Future<Output = Result<TcpStream, DialError>>,
    ) -> Result<TcpStream, DialError> {
        let after = self.tunnel.connect_timeout;
        match timeout(after, connect).await {
            Ok(connected) => connected,
            Err(_) => Err(DialError::TimedOut { to, after }),
        }
    }

    /// Sets what every relayed socket has; what a listener accepts has it from the listener. A
    /// socket that is dead already says so when it is used.
    // PROTOCOL.md#tcp-options
    pub fn tune(&self, socket: &impl AsFd) {
        self.dial.tune(socket);
    }
}

/// Makes the sockets of our own connections from a pod.
pub trait Sockets: fmt::Debug {
    /// For a connection to `destination` that leaves the pod, as [`Dialer::upstream_socket`] says.
    ///
    /// # Errors
    /// No socket.
    fn upstream(&self, destination: IpAddr) -> io::Result<std::net::TcpStream>;

    /// For a connection to the pod's application, as [`Dialer::app_socket`] says.
    ///
    /// # Errors
    /// No socket.
    fn app(&self, client: Option<IpAddr>, app: IpAddr) -> io::Result<std::net::TcpStream>;

    /// Whether an address is one of the pod's, as [`Dialer::has_address`] says.
    fn is_of_pod(&self, address: IpAddr) -> bool;

    /// For questions to a resolver, as [`Dialer::question_socket`] says.
    ///
    /// # Errors
    /// No socket.
    fn question(&self, resolver: IpAddr) -> io::Result<std::net::UdpSocket>;
    /// Whether a process of the node holds the other end of a connection, as [`capture::node_holds`]
    /// says.
    ///
    /// # Errors
    /// Nobody knows.
    fn node_holds(&self, from: SocketAddr, to: SocketAddr) -> io::Result<bool>;
}

impl Sockets for Dialer {
    fn upstream(&self, destination: IpAddr) -> io::Result<std::net::TcpStream> {
        self.upstream_socket(destination).map(Into::into)
    }

    fn app(&self, client: Option<IpAddr>, app: IpAddr) -> io::Result<std::net::TcpStream> {
        self.app_socket(client, app).map(Into::into)
    }

    fn is_of_pod(&self, address: IpAddr) -> bool {
        self.has_address(address)
    }

    fn question(&self, resolver: IpAddr) -> io::Result<std::net::UdpSocket> {
        self.question_socket(resolver).map(Into::into)
    }

    fn node_holds(&self, from: SocketAddr, to: SocketAddr) -> io::Result<bool> {
        capture::node_holds(from, to)
    }
}

/// Connects from a pod, with sockets that capture lets through.
#[derive(Clone, Debug)]
pub struct PodDial {
    sockets: Rc<dyn Sockets>,
    descriptors: Descriptors,
    keepalive: Option<tunnel::TcpKeepalive>,
}

impl PodDial {
    /// Takes the pod's sockets, the worker's descriptors for them and what they are given.
    #[must_use]
    pub fn new(
        sockets: Rc<dyn Sockets>,
        descriptors: Descriptors,
        keepalive: Option<tunnel::TcpKeepalive>,
    ) -> Self {
        Self {
            sockets,
            descriptors,
            keepalive,
        }
    }

    /// Whether an address is one of the pod's, as [`Dialer::has_address`] says.
    #[must_use]
    pub fn is_of_pod(&self, address: IpAddr) -> bool {
        self.sockets.is_of_pod(address)
    }

    /// A socket for one question to a resolver, which only the resolver's datagrams reach. Without a
    /// descriptor it fails at once: the spare one is for a connection that was accepted, and whoever
    /// asks asks again. Cancel safe.
    ///
    /// # Errors
    /// No socket, or no way to the resolver.
    pub async fn question(&self, resolver: SocketAddr) -> io::Result<UdpSocket> {
        let socket = UdpSocket::from_std(self.sockets.question(resolver.ip())?)?;
        socket.connect(resolver).await?;
        Ok(socket)
    }

    fn node_holds(&self, flow: &Flow) -> bool {
        let held = self
            .sockets
            .node_holds(flow.source.addr(), flow.destination.addr());
        held.unwrap_or_else(|error| {
            // As many as somebody likes to open: no line of its own for each.
            debug!(%error, "the kernel does not say whose a connection is: it is taken for no probe");
            false
        })
    }

    async fn upstream(&self, upstream: UpstreamAddr) -> Result<TcpStream, DialError> {
        let socket = || self.sockets.upstream(upstream.ip());
        self.connect(socket, upstream.addr()).await
    }

    async fn app(&self, client: Option<IpAddr>, app: AppAddr) -> Result<TcpStream, DialError> {
        let socket = || self.sockets.app(client, app.ip());
        self.connect(socket, app.addr()).await
    }

    async fn connect(
        &self,
        socket: impl FnMut() -> io::Result<std::net::TcpStream>,
        to: SocketAddr,
    ) -> Result<TcpStream, DialError> {
        let socket = self.descriptors.make(socket).await;
        let socket = socket.map_err(|source| DialError::Socket { to, source })?;
        let stream = connect(socket, to)
            .await
            .map_err(|source| DialError::Refused { to, source })?;
        self.tune(&stream);
        Ok(stream)
    }

    fn tune(&self, socket: &impl AsFd) {
        if let Err(error) = tunnel::tune(socket, self.keepalive.as_ref()) {
            debug!(%error, "socket options not set");
        }
    }
}

async fn connect(socket: std::net::TcpStream, to: SocketAddr) -> io::Result<TcpStream> {
    match SockRef::from(&socket).connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // Within the pod both ends have shaken hands before the call returns: no event to wait for, no
    // time-out to begin.
    if socket.peer_addr().is_ok() {
        return TcpStream::from_std(socket);
    }
    let stream = TcpStream::from_std(socket)?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

impl Dial for PodDial {
    type Io = TcpStream;

    async fn dial(&self, to: UpstreamAddr) -> io::Result<TcpStream> {
        self.upstream(to).await.map_err(|error| match error {
            DialError::Refused { source, .. } | DialError::Socket { source, .. } => source,
            DialError::TimedOut { .. } => io::ErrorKind::TimedOut.into(),
        })
    }
}

/// A connection of an application that is reset if it is dropped before it is relayed: a clean end
/// would read as an answer.
#[derive(Debug)]
pub struct Unserved(Option<TcpStream>);

impl Unserved {
    /// Takes a connection that nobody serves yet.
    #[must_use]
    pub const fn new(stream: TcpStream) -> Self {
        Self(Some(stream))
    }

    /// Does `work` for the application, and drops it when the application gives up first. An
    /// application that only has nothing more to say still waits for its answer. Cancel safe if
    /// `work` is.
    ///
    /// # Errors
    /// Those of `work`, or that the application gave up.
    pub async fn for_it<T, E: From<tunnel::Error>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let gave_up = async {
            match &self.0 {
                Some(stream) => stream.failed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            done = work => done,
            gave_up = gave_up => Err(gave_up.into()),
        }
    }

    /// The connection, to be relayed.
    #[must_use]
    #[expect(
        clippy::expect_used,
        reason = "only this method takes it out, and it consumes the holder"
    )]
    pub fn serve(mut self) -> TcpStream {
        self.0.take().expect("the connection is still here")
    }
}

impl Drop for Unserved {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take()
            && let Err(error) = stream.set_zero_linger()
        {
            debug!(%error, "a refused connection is closed, not reset");
        }
    }
}

/// Why a connection into the pod has no permit.
#[derive(Debug, Error)]
pub enum NotAdmitted {
    /// Policy.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The workload is gone from the mesh.
    #[error("the mesh does not know this pod any more")]
    UnknownWorkload,
}

impl ToReason for NotAdmitted {
    fn to_reason(&self) -> Reason {
        match self {
            Self::Denied(e) => e.to_reason(),
            Self::UnknownWorkload => Reason::UnknownWorkload,
        }
    }
}

/// Why a dial failed.
#[derive(Debug, Error)]
pub enum DialError {
    /// The other side, or the network, refused.
    #[error("connect to {to}")]
    Refused {
        /// What was dialled.
        to: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// No socket for it.
    #[error("make a socket in the pod to connect to {to}")]
    Socket {
        /// What was to be dialled.
        to: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// No answer in time.
    #[error("connect to {to}: no answer in {after:?}")]
    TimedOut {
        /// What was dialled.
        to: SocketAddr,
        /// How long we waited.
        after: Duration,
    },
}

impl ToReason for DialError {
    fn to_reason(&self) -> Reason {
        match self {
            Self::Refused { source, .. } if source.kind() == io::ErrorKind::TimedOut => {
                Reason::ConnectTimedOut
            }
            Self::Refused { .. } => Reason::ConnectFailed,
            Self::Socket { .. } => Reason::ResourceExhausted,
            Self::TimedOut { .. } => Reason::ConnectTimedOut,
        }
    }
}

/// How long a connection waits for the control plane to tell of the pod's own workload.
// PROTOCOL.md#own-workload
const OWN_WORKLOAD_WAIT: Duration = Duration::from_secs(5);

/// How long a certificate that was found is not looked for again.
const ATTESTED_FOR: Duration = Duration::from_secs(5);

/// How long a connection waits for something that the control plane has just told.
const LEARN_WAIT: Duration = Duration::from_secs(1);

/// How long a connection waits for a policy that its workload names: the control plane sends the
/// workload and the policy on one stream, moments apart.
const POLICY_WAIT: Duration = Duration::from_secs(1);
