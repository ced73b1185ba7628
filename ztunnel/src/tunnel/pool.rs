//! The opening end of tunnels. Takes a permit, a place to go and a CONNECT, gives an answered
//! stream on a tunnel that is shared where identities, addresses and source are the same; never
//! tries another place.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Waker};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

use super::client;
use super::error::Error;
use super::load::{Load, Share};
use super::params::Params;
use super::stream::H2Stream;
use crate::authz::Permit;
use crate::drain;
use crate::identity;
use crate::model::{SpiffeId, UpstreamAddr};

/// Makes the TCP connection of a tunnel, in the network namespace where it belongs.
pub trait Dial: 'static {
    /// What it connects with.
    type Io: AsyncRead + AsyncWrite + Unpin + 'static;

    /// Connects; the pool gives it a deadline.
    fn dial(&self, to: UpstreamAddr) -> impl Future<Output = io::Result<Self::Io>>;
}

/// Where a stream goes, and what a tunnel must have in common with it to carry it.
// PROTOCOL.md#pool-key
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The peer's HBONE address.
    pub upstream: UpstreamAddr,
    /// The identities of which the peer must prove one.
    pub expected: Vec<SpiffeId>,
    /// Our own end's identity.
    pub source: SpiffeId,
    /// Our own end's address.
    pub source_ip: IpAddr,
}

/// A CONNECT that was answered with 200.
#[derive(Debug)]
pub struct Opened {
    /// The bytes.
    pub stream: H2Stream,
    /// The answer.
    pub response: Response<()>,
    /// The expected identity that the peer proved.
    pub peer: SpiffeId,
}

/// The tunnels of one pod on one worker. Must be used inside a `LocalSet`: each tunnel is a task
/// there, which ends when its streams have ended and the pool is gone, or by the drain.
pub struct Pool<D: Dial> {
    shared: Rc<Shared>,
    dial: Rc<D>,
    store: Arc<identity::Store>,
    params: Rc<Params>,
    drain: drain::Signal,
    /// Dropped with the pool: ends attempts that nobody can want any more.
    alive: watch::Sender<()>,
}

impl<D: Dial> Pool<D> {
    /// An empty pool. `drain` ends its tunnels: at its first order each once nobody uses it, all at
    /// its second.
    #[must_use]
    pub fn new(
        params: Rc<Params>,
        dial: D,
        store: Arc<identity::Store>,
        drain: drain::Signal,
    ) -> Self {
        Self {
            shared: Rc::default(),
            dial: Rc::new(dial),
            store,
            params,
            drain,
            alive: watch::Sender::new(()),
        }
    }

    /// Opens a stream: sends `request` on a tunnel that has room, or on a new one, and waits for
    /// the answer. Cancel safe: who else waits for the same tunnel still gets it.
    ///
    /// # Errors
    /// Why there is no tunnel, or what the peer answered. A tunnel that fails does so for all who
    /// wait for it, at once.
    pub async fn open(
        &self,
        _permit: &Permit,
        target: &Target,
        request: Request<()>,
    ) -> Result<Opened, Error> {
        let mut last = None;
        for _ in 0..TRIES {
            let (slot, reused) = self.join(target);
            if !slot.admitted().await? {
                continue;
            }
            match slot.request(request.clone(), &self.params).await {
                Ok(opened) => return Ok(opened),
                Err(Refused::Final(error)) => return Err(error),
                Err(Refused::NotHere(error)) => last = Some(error),
                Err(Refused::Lost(error)) if reused => last = Some(error),
                Err(Refused::Lost(error)) => return Err(error),
            }
        }
        Err(last.unwrap_or(Error::NoStreams(target.upstream)))
    }

    /// Takes a place on the first tunnel that has one and moves, or on a new one; says whether
    /// others may have used it before.
    fn join(&self, target: &Target) -> (Slot, bool) {
        let mut groups = self.shared.groups.borrow_mut();
        let group = match groups.get_mut(target) {
            Some(group) => group,
            None => groups.entry(target.clone()).or_default(),
        };
        group.tunnels.retain(|tunnel| tunnel.is_usable());
        let mut found = group.first_free(&self.params);
        if found.is_none() && group.tunnels.len() >= BUSY_TUNNELS {
            let roomy = group.tunnels.iter();
            let roomy = roomy.filter(|tunnel| group.has_room(tunnel, &self.params));
            found = roomy.min_by_key(|tunnel| tunnel.load.stalled());
        }
        let tunnel = found.map(Rc::clone).unwrap_or_else(|| {
            let tunnel = Rc::new(Tunnel::new());
            group.tunnels.push(Rc::clone(&tunnel));
            self.connect(target.clone(), Rc::clone(&tunnel));
            tunnel
        });
        tunnel.used.set(tunnel.used.get() + 1);
        let reused = matches!(*tunnel.phase.borrow(), Phase::Settled);
        let share = Share::new(&tunnel.load);
        (Slot { tunnel, share }, reused)
    }

    fn connect(&self, target: Target, tunnel: Rc<Tunnel>) {
        let (dial, store) = (Rc::clone(&self.dial), Arc::clone(&self.store));
        let params = Rc::clone(&self.params);
        let drain = self.drain.clone();
        let alive = self.alive.subscribe();
        let registered = Registered {
            shared: Rc::downgrade(&self.shared),
            target,
            tunnel,
        };
        // Owned by the worker's LocalSet; ends as the type's documentation says.
        tokio::task::spawn_local(async move {
            let connect = client::connect(&*dial, &store, &registered.target, &params);
            client::run(connect, &registered, &params, drain, alive).await;
        });
    }
}

impl<D: Dial> fmt::Debug for Pool<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("groups", &self.shared.groups.borrow().len())
            .finish_non_exhaustive()
    }
}

impl<D: Dial> Drop for Pool<D> {
    fn drop(&mut self) {
        for group in self.shared.groups.take().into_values() {
            group.tunnels.iter().for_each(|tunnel| tunnel.retire());
        }
    }
}

#[derive(Default)]
struct Shared {
    groups: RefCell<HashMap<Target, Group>>,
}

/// Tunnels that are alike.
#[derive(Default)]
struct Group {
    tunnels: Vec<Rc<Tunnel>>,
    /// How many streams this peer takes on one tunnel, once it has said so.
    told: Option<usize>,
}

impl Group {
    /// Where the next stream goes.
    fn first_free(&self, params: &Params) -> Option<&Rc<Tunnel>> {
        let window = params.connection_window_bytes;
        self.tunnels
            .iter()
            .find(|tunnel| self.has_room(tunnel, params) && !tunnel.load.is_busy(window))
    }

    fn has_room(&self, tunnel: &Tunnel, params: &Params) -> bool {
        let told = self.told.unwrap_or(usize::MAX);
        tunnel.used.get() < tunnel.cap(told).min(params.pool_streams)
    }
}

/// A tunnel in its pool; dropping this takes it out.
pub(super) struct Registered {
    shared: Weak<Shared>,
    pub(super) target: Target,
    pub(super) tunnel: Rc<Tunnel>,
}

impl Registered {
    /// The peer has told how many streams it takes.
    pub(super) fn settle(&self, streams: usize) {
        if let Some(shared) = self.shared.upgrade()
            && let Some(group) = shared.groups.borrow_mut().get_mut(&self.target)
        {
            group.told = Some(streams);
        }
        self.tunnel.phase.send_replace(Phase::Settled);
    }

    /// Whether the next stream goes to another tunnel, so that this one is not needed.
    pub(super) fn is_spare(&self, params: &Params) -> bool {
        let Some(shared) = self.shared.upgrade() else {
            return false;
        };
        let groups = shared.groups.borrow();
        let next = groups.get(&self.target);
        let next = next.and_then(|group| group.first_free(params));
        next.is_some_and(|next| next.is_usable() && !Rc::ptr_eq(next, &self.tunnel))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.tunnel.retire();
        self.tunnel.phase.send_if_modified(|phase| {
            let waited_for = matches!(phase, Phase::Connecting | Phase::Open);
            if waited_for {
                *phase = Phase::Failed(Error::TunnelLost(None));
            }
            waited_for
        });
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let mut groups = shared.groups.borrow_mut();
        if let Some(group) = groups.get_mut(&self.target) {
            group
                .tunnels
                .retain(|tunnel| !Rc::ptr_eq(tunnel, &self.tunnel));
            if group.tunnels.is_empty() {
                groups.remove(&self.target);
            }
        }
    }
}

/// One connection to a peer, from the moment it is wanted.
pub(super) struct Tunnel {
    phase: watch::Sender<Phase>,
    /// Places taken, by streams and by those who wait.
    used: Cell<usize>,
    /// When the last place was given back.
    idle_since: Cell<Instant>,
    /// The last place was given back.
    idle: Notify,
    /// Somebody went before the peer's SETTINGS came.
    early: Cell<bool>,
    open: RefCell<Option<Open>>,
    load: Rc<Load>,
}

/// What a tunnel has once its handshakes are done, until it is retired.
#[derive(Clone)]
pub(super) struct Open {
    pub(super) sender: SendRequest<Bytes>,
    pub(super) peer: SpiffeId,
}

#[derive(Clone)]
enum Phase {
    /// No connection yet.
    Connecting,
    /// One stream may go ahead: every peer takes one, and this saves it a round trip.
    Open,
    /// The peer has told how many it takes.
    Settled,
    /// There was no tunnel, or none that could be used.
    Failed(Error),
}

impl Tunnel {
    fn new() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Connecting),
            used: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            idle: Notify::new(),
            early: Cell::new(false),
            open: RefCell::new(None),
            load: Rc::default(),
        }
    }

    pub(super) fn opened(&self, open: Open) {
        *self.open.borrow_mut() = Some(open);
        self.phase.send_replace(Phase::Open);
    }

    pub(super) fn fail(&self, error: Error) {
        self.phase.send_replace(Phase::Failed(error));
    }

    /// Takes no more streams; the connection ends when those it has have ended.
    pub(super) fn retire(&self) {
        self.open.take();
    }

    /// When nobody used it last, or `None` while somebody does.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        (self.used.get() == 0).then(|| self.idle_since.get())
    }

    /// Waits until nobody uses it and nobody waits for it.
    pub(super) async fn unused(&self) {
        while self.used.get() > 0 {
            self.idle.notified().await;
        }
    }

    fn is_usable(&self) -> bool {
        match &*self.phase.borrow() {
            Phase::Connecting => true,
            Phase::Failed(_) => false,
            Phase::Open | Phase::Settled => {
                // Asks only whether the peer has said goodbye, so nobody needs to be woken.
                let mut cx = Context::from_waker(Waker::noop());
                self.open.borrow().clone().is_some_and(|mut open| {
                    matches!(
                        open.sender.poll_ready(&mut cx),
                        std::task::Poll::Ready(Ok(()))
                    )
                })
            }
        }
    }

    /// How many streams fit, as far as is known; `told` is what another tunnel's peer said.
    fn cap(&self, told: usize) -> usize {
        match (&*self.phase.borrow(), &*self.open.borrow()) {
            (Phase::Settled, Some(open)) => open.sender.current_max_send_streams(),
            _ => told.max(1),
        }
    }
}

/// A place on a tunnel; dropping it gives it back.
pub(super) struct Slot {
    tunnel: Rc<Tunnel>,
    share: Share,
}

impl Slot {
    /// Where its stream tells what it holds up.
    pub(super) const fn share(&self) -> &Share {
        &self.share
    }

    /// Whether the tunnel was ended because of a certificate.
    pub(super) fn is_revoked(&self) -> bool {
        matches!(
            &*self.tunnel.phase.borrow(),
            Phase::Failed(Error::CertRevoked)
        )
    }

    /// Waits until the tunnel can take a stream; `false` when it cannot take this one.
    async fn admitted(&self) -> Result<bool, Error> {
        let tunnel = &self.tunnel;
        let mut phase = tunnel.phase.subscribe();
        loop {
            match &*phase.borrow_and_update() {
                Phase::Open if !tunnel.early.replace(true) => return Ok(true),
                Phase::Connecting | Phase::Open => {}
                Phase::Settled => {
                    return Ok(tunnel.used.get() <= tunnel.cap(usize::MAX));
                }
                Phase::Failed(error) => return Err(error.clone()),
            }
            if phase.changed().await.is_err() {
                return Ok(false);
            }
        }
    }

    async fn request(self, request: Request<()>, params: &Params) -> Result<Opened, Refused> {
        let open = self.tunnel.open.borrow().clone();
        let Some(Open { sender, peer }) = open else {
            return Err(Refused::NotHere(Error::TunnelLost(None)));
        };
        let unsent = |e| Refused::NotHere(Error::TunnelLost(Some(Arc::new(e))));
        let mut sender = sender.ready().await.map_err(unsent)?;
        let (response, send) = sender.send_request(request, false).map_err(unsent)?;
        drop(sender);
        let Ok(response) = timeout(params.response_timeout, response).await else {
            return Err(Refused::Final(Error::PeerTimedOut(params.response_timeout)));
        };
        let response = response.map_err(|e| self.unanswered(e))?;
        if response.status() != StatusCode::OK {
            let status = response.status().as_u16();
            return Err(Refused::Final(Error::PeerRefused(status)));
        }
        let (parts, recv) = response.into_parts();
        Ok(Opened {
            stream: H2Stream::new(send, recv, Some(self)),
            response: Response::from_parts(parts, ()),
            peer,
        })
    }

    /// What a CONNECT without an answer means.
    // PROTOCOL.md#goaway
    fn unanswered(&self, error: h2::Error) -> Refused {
        if error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM) {
            return Refused::NotHere(Error::TunnelLost(Some(Arc::new(error))));
        }
        if error.is_reset() {
            return Refused::Final(Error::TunnelLost(Some(Arc::new(error))));
        }
        // The tunnel's own error says more than that of a stream on it.
        if let Phase::Failed(error) = &*self.tunnel.phase.borrow() {
            return Refused::Lost(error.clone());
        }
        Refused::Lost(Error::TunnelLost(Some(Arc::new(error))))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let used = self.tunnel.used.get().saturating_sub(1);
        self.tunnel.used.set(used);
        if used == 0 {
            self.tunnel.idle_since.set(Instant::now());
            self.tunnel.idle.notify_waiters();
        }
    }
}

/// Why a tunnel did not carry a request.
enum Refused {
    /// It is answered, or was heard.
    Final(Error),
    /// The tunnel died. One that was idle may have been dead for long: then another is tried, which
    /// is safe because no byte of the application has been sent.
    Lost(Error),
    /// The peer has not looked at it: another tunnel may carry it.
    NotHere(Error),
}

/// Tunnels that one request is offered to: a full one, one that says goodbye, one that is new.
const TRIES: usize = 4;
/// From so many tunnels on, streams that stand still open no further one.
const BUSY_TUNNELS: usize = 8;

#[cfg(test)]
mod tests;
