//! The walk out of a pod: captured → route → permit → stream → relay. Takes a captured connection,
//! gives one ending; never lets a byte out before there is a permit.

mod local;

use std::sync::Arc;

use thiserror::Error;
use tokio::net::TcpStream;

use crate::account::{self, Learned, Ledger, Opening};
use crate::authz::Permit;
use crate::capture::Captured;
use crate::context::{Context, DialError, NameError, Unserved};
use crate::drain::Forced;
use crate::identity;
use crate::model::{
    ClientAddr, Direction, OrigDst, Reason, SecurityPolicy, SpiffeId, ToReason, Workload,
};
use crate::resolve::{self, Found, Hop, Query, Route};
use crate::tunnel::{self, Carrying, Opened, Target};
use crate::wire::{Authority, Baggage, Connect, Malformed, Traceparent};
use local::Neighbour;

/// Serves one connection of the pod to its end. Cancelling it resets both sides and records
/// `drained`.
pub fn serve(conn: Box<Captured>, cx: &Context) -> impl Future<Output = ()> {
    let open = cx.book.socket(Direction::Outbound);
    let ledger = cx.book.open(Opening {
        direction: Direction::Outbound,
        source: conn.client,
        destination: conn.original,
        trace_id: fastrand::u128(..),
    });
    walk(conn, (ledger, open), cx)
}

/// The same for a connection whose record somebody else has begun.
pub fn walk(
    conn: Box<Captured>,
    record: (Ledger, account::Socket),
    cx: &Context,
) -> impl Future<Output = ()> {
    let span = fastrand::u64(..);
    // No function of its own: that would hold the record twice.
    async move {
        let (ledger, _) = &record;
        let trace = Traceparent::new(ledger.trace_id(), span);
        // Apart, so that what it needs is given back before bytes move.
        let opening = cx.drain.unless_forced(|| open(conn, cx, ledger, trace));
        // From here on it hears itself when it is told to end, and resets both sides.
        let end = async { opening.await?.await }.await;
        let (ledger, _open) = record;
        ledger.ended(end);
    }
}

/// Everything before the first byte.
async fn open<'a>(
    conn: Box<Captured>,
    cx: &'a Context,
    ledger: &'a Ledger,
    trace: Traceparent,
) -> Result<Carrying<'a, Failure>, Failure> {
    let Captured {
        stream,
        client,
        original: asked,
        direct,
        ..
    } = *conn;
    let stream = Unserved::new(stream);
    // Capture brings neither: such a connection was made to our listener, or asked for by SOCKS5,
    // and would come back.
    if direct || asked.ip().is_loopback() || asked.ip().is_unspecified() {
        return Err(Failure::SelfCall);
    }
    // PROTOCOL.md#untold-address
    // The pod dials an address of its own that nobody has told us of, and so would we.
    if client.ip() == asked.ip() {
        return Err(Failure::SelfCall);
    }
    let source = cx.workload().await.ok_or(Failure::UnknownWorkload)?;
    if source.ips.contains(&asked.ip()) {
        return Err(Failure::SelfCall);
    }
    cx.learn(&source, asked.ip()).await;
    match connect(cx, ledger, source, (client, asked, trace), &stream).await? {
        Reached::Far(way, permit, connected) => Ok(way.carry(stream, permit, connected)),
        Reached::Near(way, near) => Ok(Box::pin(local::serve(way, near, stream, client, trace))),
    }
}

/// Where a connection's way ends.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one of them, and it is moved twice: not worth an allocation"
)]
enum Reached<'a> {
    /// At another node, a gateway or outside the mesh, and it is open.
    Far(Way<'a>, Permit, Connected),
    /// At a pod of this node.
    Near(Way<'a>, Neighbour),
}

/// Finds the way and opens it. A destination that was not even reached is left out, and another is
/// tried, a few times: nobody has heard of the connection yet.
// PROTOCOL.md#retry
async fn connect<'a>(
    cx: &'a Context,
    ledger: &'a Ledger,
    source: Arc<Workload>,
    (client, asked, trace): (ClientAddr, OrigDst, Traceparent),
    stream: &Unserved,
) -> Result<Reached<'a>, Failure> {
    let mut avoid = Vec::new();
    let mut failed: Option<(Way<'a>, Failure)> = None;
    let dice = fastrand::u64(..);
    loop {
        let query = Query {
            source: &source,
            from: client.ip(),
            destination: asked,
            avoid: &avoid,
            dice,
        };
        let route = match (route(cx, &query).await, failed) {
            (Ok(route), None) => route,
            (Ok(route), Some(_)) => {
                ledger.retried();
                route
            }
            (Err(failure), None) => return Err(failure),
            // Nobody is left: it ends as the last attempt did.
            (Err(_), Some((way, failure))) => return Err(way.refused(failure)),
        };
        let way = Way {
            cx,
            ledger,
            source: Arc::clone(&source),
            route,
        };
        if let Some(near) = way.neighbour() {
            return Ok(Reached::Near(way, near));
        }
        let failure = match Box::pin(stream.for_it(way.open(client, trace))).await {
            Ok((permit, connected)) => return Ok(Reached::Far(way, permit, connected)),
            Err(failure) => failure,
        };
        match way.route.chosen() {
            Some(tried) if failure.is_unheard() && avoid.len() < RETRIES => {
                avoid.push(Arc::clone(tried));
            }
            Some(_) | None => return Err(way.refused(failure)),
        }
        failed = Some((way, failure));
    }
}

/// The route of now, with an address to dial.
async fn route(cx: &Context, query: &Query<'_>) -> Result<Route, Failure> {
    let world = cx.view.world();
    let found = resolve::route(&world.snapshot, query)?;
    drop(world);
    match found {
        Found::Route(route) => Ok(route),
        Found::Name(unresolved) => {
            let addresses = cx.names.look_up(unresolved.name()).await?;
            Ok(unresolved.resolved(&addresses)?)
        }
    }
}

/// A connection that has its route.
struct Way<'a> {
    cx: &'a Context,
    ledger: &'a Ledger,
    source: Arc<Workload>,
    route: Route,
}

/// The other side of a connection, ready for bytes.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one of them, and it is moved twice: not worth an allocation"
)]
enum Connected {
    Plain(TcpStream),
    Tunnel(Opened),
}

impl<'a> Way<'a> {
    fn carry(
        self,
        stream: Unserved,
        permit: Permit,
        connected: Connected,
    ) -> Carrying<'a, Failure> {
        let drain = self.cx.drain.clone();
        match connected {
            Connected::Plain(upstream) => {
                self.learn(SecurityPolicy::Unknown, None, None);
                tunnel::carry(stream.serve(), upstream, permit, self.ledger, drain)
            }
            Connected::Tunnel(Opened {
                stream: far, peer, ..
            }) => {
                self.learn(SecurityPolicy::MutualTls, Some(peer), self.asked_for());
                tunnel::carry(stream.serve(), far, permit, self.ledger, drain)
            }
        }
    }

    /// The record of a way that could not be opened.
    fn refused(&self, failure: Failure) -> Failure {
        let security = match self.route.hop {
            Hop::DoubleHbone { .. } | Hop::Hbone { .. } => SecurityPolicy::MutualTls,
            Hop::Plain => SecurityPolicy::Unknown,
        };
        self.learn(security, None, self.asked_for());
        failure
    }

    async fn open(
        &self,
        client: ClientAddr,
        trace: Traceparent,
    ) -> Result<(Permit, Connected), Failure> {
        let identity = self.source.identity.clone().ok_or(Failure::NoIdentity)?;
        let permit = self.cx.live.outbound(&self.source.uid, identity.clone());
        let target = |expected: &[SpiffeId]| Target {
            upstream: self.route.upstream,
            expected: expected.to_vec(),
            source: identity,
            source_ip: client.ip(),
        };
        let connected = match &self.route.hop {
            Hop::Plain => Connected::Plain(self.cx.dial_upstream(self.route.upstream).await?),
            Hop::Hbone {
                authority,
                expected,
            } => {
                let request = self.request(&Authority::ip(*authority), client, trace, None)?;
                let target = target(expected);
                let opened = self.cx.pool.open(&permit, &target, request);
                Connected::Tunnel(opened.await?)
            }
            Hop::DoubleHbone {
                authority: (host, port),
                gateway,
                expected,
            } => {
                let authority = Authority::host(host, *port)?;
                let network = Arc::clone(self.cx.view.world().snapshot.node_network());
                let inner = self.request(&authority, client, trace, Some(&network))?;
                let outer = self.request(&authority, client, trace, None)?;
                let mut target = target(gateway);
                let outer = self.cx.pool.open(&permit, &target, outer).await?;
                target.expected.clone_from(expected);
                let with = self.cx.inside();
                let opened = tunnel::open_inside(&permit, outer.stream, &target, inner, with);
                Connected::Tunnel(opened.await?)
            }
        };
        Ok((permit, connected))
    }

    fn request(
        &self,
        authority: &Authority,
        source: ClientAddr,
        traceparent: Traceparent,
        network: Option<&str>,
    ) -> Result<http::Request<()>, Malformed> {
        let request = Connect {
            authority,
            baggage: &Baggage::of(&self.source).encode(),
            source,
            host: self.route.service.as_ref().map(|s| &s.key.hostname),
            traceparent,
            network,
        };
        request.encode()
    }

    /// What the CONNECT asks for.
    fn asked_for(&self) -> Option<String> {
        match &self.route.hop {
            Hop::DoubleHbone {
                authority: (host, port),
                ..
            } => Some(format!("{host}:{port}")),
            Hop::Hbone { authority, .. } => Some(authority.to_string()),
            Hop::Plain => None,
        }
    }

    fn learn(&self, security: SecurityPolicy, peer: Option<SpiffeId>, hbone_addr: Option<String>) {
        let proven = peer.is_some().then(|| self.source.identity.clone());
        // Beyond a gateway it may be another one of the service: who, its proof tells.
        let is_it = |workload: &&Arc<Workload>| {
            self.route.gateway.is_none() || peer.is_none() || workload.identity == peer
        };
        let destination = self.route.workload.as_ref().filter(is_it).map(Arc::clone);
        self.ledger.learn(Learned {
            source: Some(Arc::clone(&self.source)),
            source_identity: proven.flatten(),
            destination,
            destination_identity: peer,
            service: self.route.service.clone(),
            dst_addr: self.route.upstream,
            hbone_addr,
            security,
        });
    }
}

/// Why an outbound connection ended before its two ends ended it.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Forced(#[from] Forced),
    #[error("a header of the CONNECT cannot be written")]
    Header(#[from] Malformed),
    #[error("this node has no certificate for the pod")]
    Identity(#[source] identity::Error),
    #[error("ended at the pod that it goes to")]
    NeighbourEnded,
    #[error("refused at the pod that it goes to")]
    NeighbourRefused(#[source] local::Refusal),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("the pod's workload has no identity")]
    NoIdentity,
    #[error(transparent)]
    Resolve(#[from] resolve::Error),
    #[error("the connection was made to the node proxy itself")]
    SelfCall,
    #[error(transparent)]
    Tunnel(#[from] tunnel::Error),
    #[error("the mesh does not know this pod")]
    UnknownWorkload,
}

impl Failure {
    /// Whether what was dialled did not answer at all.
    const fn is_unheard(&self) -> bool {
        matches!(
            self,
            Self::Dial(DialError::Refused { .. } | DialError::TimedOut { .. })
                | Self::Tunnel(
                    tunnel::Error::Connect { .. } | tunnel::Error::ConnectTimedOut { .. }
                )
        )
    }
}

impl ToReason for Failure {
    fn to_reason(&self) -> Reason {
        match self {
            Self::Dial(e) => e.to_reason(),
            Self::Forced(e) => e.to_reason(),
            Self::Header(e) => e.to_reason(),
            Self::Identity(e) => e.to_reason(),
            Self::NeighbourEnded => Reason::Reset,
            Self::NeighbourRefused(_) => Reason::PeerRefused,
            Self::Name(e) => e.to_reason(),
            Self::NoIdentity => Reason::IdentityUnavailable,
            Self::Resolve(e) => e.to_reason(),
            Self::SelfCall => Reason::SelfCall,
            Self::Tunnel(e) => e.to_reason(),
            Self::UnknownWorkload => Reason::UnknownWorkload,
        }
    }
}

/// How many more destinations a connection is offered to.
const RETRIES: usize = 2;

#[cfg(test)]
mod tests;
