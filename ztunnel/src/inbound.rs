//! The walk into a pod: HBONE → CONNECT → permit → dial the pod → 200 → relay. Takes a connection on
//! port 15008, gives one ending for each request on it; never answers 200 before the application
//! has accepted.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use thiserror::Error;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::spawn_local;

use crate::account::{Learned, Ledger, Opening};
use crate::authz::Permit;
use crate::capture::Captured;
use crate::context::{Context, DialError, NotAdmitted, Place};
use crate::drain::Forced;
use crate::model::{
    ClientAddr, Direction, Flow, OrigDst, Reason, SecurityPolicy, SpiffeId, ToReason, UpstreamAddr,
    Workload,
};
use crate::resolve::{self, Asked, InboundQuery};
use crate::tunnel::{self, Accepted, Carrying, Request};
use crate::wire::{self, Authority, Baggage, ConnectRequest, Malformed, ProxyHeader, Traceparent};

/// Serves one HBONE connection into the pod until its peer ends it. A connection that fails before
/// its first request is recorded once. It keeps its place until its peer has proved who it is.
pub async fn serve(conn: Captured, place: Place, cx: Rc<Context>) {
    let Captured {
        stream,
        client,
        original,
        ..
    } = conn;
    let _open = cx.book.socket(Direction::Inbound);
    let mut forced = cx.drain.clone();
    let handshake = tokio::select! {
        biased;
        handshake = handshake(stream, &cx) => handshake,
        reason = forced.forced() => Err(Forced(reason).into()),
        () = place.given_away() => Err(Failure::CrowdedOut),
    };
    drop(place);
    let accepted = match handshake {
        Ok(accepted) => accepted,
        Err(failure) => {
            let ledger = cx.book.open(Opening {
                direction: Direction::Inbound,
                source: client,
                destination: original,
                trace_id: fastrand::u128(..),
            });
            ledger.close(failure.to_reason(), Some(&failure));
            return;
        }
    };
    let peer = Rc::new(Peer {
        client,
        original,
        identity: accepted.peer.clone(),
    });
    let on_request = {
        let cx = Rc::clone(&cx);
        move |request: Request| {
            let cx = Rc::clone(&cx);
            let peer = Rc::clone(&peer);
            let request = Box::new(request);
            spawn_local(async move { request_to_end(request, &peer, &cx).await });
        }
    };
    // The HTTP/2 connection is the largest part of a tunnel; boxed, it is not moved with the rest.
    let served = tunnel::serve(accepted, &cx.tunnel, cx.drain.clone(), on_request);
    let served = Box::pin(served).await;
    if let Err(error) = served {
        tracing::debug!(pod = %cx.pod, peer = %client, %error, "tunnel ended");
    }
}

/// The other end of one HBONE connection.
struct Peer {
    client: ClientAddr,
    original: OrigDst,
    identity: SpiffeId,
}

async fn handshake(stream: TcpStream, cx: &Context) -> Result<Accepted<TcpStream>, Failure> {
    let local = cx.workload().await.ok_or(Failure::UnknownWorkload)?;
    let identity = local.identity.as_ref().ok_or(Failure::NoIdentity)?;
    let credentials = cx.store.get(identity).await?;
    Ok(tunnel::handshake(stream, &credentials, &cx.tunnel).await?)
}

/// Serves one request of the peer to its end.
async fn request_to_end(request: Box<Request>, peer: &Peer, cx: &Context) {
    let connect = Box::new(ConnectRequest::decode(&request.parts));
    let trace = connect.as_ref().as_ref().ok();
    let trace = trace.and_then(|connect| connect.traceparent);
    let ledger = cx.book.open(Opening {
        direction: Direction::Inbound,
        source: peer.client,
        destination: peer.original,
        trace_id: trace.map_or_else(|| fastrand::u128(..), Traceparent::trace_id),
    });
    let mut cut = request.tunnel();
    // Apart, so that what it needs is given back before bytes move.
    let opening = cx
        .drain
        .unless_forced(|| open(request, connect, peer, cx, &ledger));
    let end = tokio::select! {
        biased;
        // From its answer on it hears itself when it is told to end, and resets both sides.
        end = async { opening.await?.await } => end,
        // Dropping the walk resets both sides.
        reason = cut.forced() => Err(Failure::Cut(reason)),
    };
    ledger.ended(end);
}

/// Everything up to the answer.
async fn open<'a>(
    mut request: Box<Request>,
    connect: Box<Result<ConnectRequest, Malformed>>,
    peer: &Peer,
    cx: &Context,
    ledger: &'a Ledger,
) -> Result<Carrying<'a, Failure>, Failure> {
    let prepared = match *connect {
        Ok(connect) => tokio::select! {
            prepared = prepare(&connect, peer, cx, ledger) => prepared,
            // A peer that gave up must not keep us busy.
            withdrawn = request.withdrawn() => Err(withdrawn.into()),
        },
        Err(malformed) => Err(malformed.into()),
    };
    let (permit, app, local) = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => {
            request.refuse(wire::refused(failure.to_reason()).status());
            return Err(failure);
        }
    };
    let baggage = cx
        .settings
        .response_baggage
        .then(|| Baggage::of(&local).encode());
    let stream = request.accept(wire::accepted(baggage.as_ref()))?;
    Ok(tunnel::carry(stream, app, permit, ledger, cx.drain.clone()))
}

/// Everything that must hold before the answer is 200.
async fn prepare(
    connect: &ConnectRequest,
    peer: &Peer,
    cx: &Context,
    ledger: &Ledger,
) -> Result<(Permit, TcpStream, Arc<Workload>), Failure> {
    let local = cx.workload().await.ok_or(Failure::UnknownWorkload)?;
    let world = cx.view.world();
    let query = InboundQuery {
        local: &local,
        dialled: peer.original,
        asked: asked(&connect.authority),
        forwarded_host: connect.forwarded.host.as_deref(),
    };
    let delivery = resolve::deliver(&world.snapshot, &query)?;
    let source = source(&world.snapshot, &local, connect, peer);
    drop(world);
    let flow = Flow {
        source: peer.client,
        source_identity: Some(peer.identity.clone()),
        destination: OrigDst::new(delivery.app.addr()),
    };
    let admitted = cx.admit(&local, flow).await;
    ledger.learn(Learned {
        source,
        source_identity: Some(peer.identity.clone()),
        destination: Some(Arc::clone(&local)),
        destination_identity: local.identity.clone(),
        service: delivery.service,
        dst_addr: UpstreamAddr::new(peer.original.addr()),
        hbone_addr: Some(delivery.app.to_string()),
        security: SecurityPolicy::MutualTls,
    });
    let permit = admitted?;
    let app = match delivery.announced {
        Some(_) if cx.settings.localhost_app_tunnel => cx.dial_loopback(delivery.app).await,
        Some(_) | None => cx.dial_app(peer.client.ip(), delivery.app, &local).await,
    };
    let mut app = app?;
    if let Some(destination) = delivery.announced {
        let header = ProxyHeader {
            source: peer.client,
            destination,
            identity: Some(&peer.identity),
        };
        // The first bytes of a connection: the kernel has room for them.
        let written = app.write_all(&header.encode()?).await;
        written.map_err(Failure::Announce)?;
    }
    Ok((permit, app, local))
}

/// The workload behind the peer's address, if it is who the certificate says. What comes from
/// another network has its address there.
// PROTOCOL.md#source-workload
fn source(
    snapshot: &resolve::Snapshot,
    local: &Workload,
    connect: &ConnectRequest,
    peer: &Peer,
) -> Option<Arc<Workload>> {
    let here = |network: &Arc<str>| network.eq_ignore_ascii_case(snapshot.node_network());
    if !connect.network.as_ref().is_none_or(here) {
        return None;
    }
    snapshot
        .workload_at(&local.network, peer.client.ip())
        .filter(|workload| workload.identity.as_ref() == Some(&peer.identity))
        .map(Arc::clone)
}

fn asked(authority: &Authority) -> Asked {
    match authority {
        Authority::Ip(addr) => Asked::Ip(*addr),
        Authority::Host { name, port } => Asked::Host(name.to_string(), *port),
    }
}

/// Why an inbound request ended before its two ends ended it.
#[derive(Debug, Error)]
enum Failure {
    #[error("tell the application where the connection comes from")]
    Announce(#[source] io::Error),
    #[error("the tunnel was cut: {0}")]
    Cut(Reason),
    #[error("the TLS handshake was not finished, and its place was needed for another")]
    CrowdedOut,
    #[error(transparent)]
    NotAdmitted(#[from] NotAdmitted),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Forced(#[from] Forced),
    #[error(transparent)]
    Identity(#[from] crate::identity::Error),
    #[error("the CONNECT is malformed")]
    Malformed(#[from] Malformed),
    #[error("the pod's workload has no identity")]
    NoIdentity,
    #[error(transparent)]
    Resolve(#[from] resolve::Error),
    #[error(transparent)]
    Tunnel(#[from] tunnel::Error),
    #[error("the mesh does not know this pod")]
    UnknownWorkload,
}

impl ToReason for Failure {
    fn to_reason(&self) -> Reason {
        match self {
            Self::Announce(_) => Reason::ConnectFailed,
            Self::CrowdedOut => Reason::CrowdedOut,
            Self::NotAdmitted(e) => e.to_reason(),
            Self::Dial(e) => e.to_reason(),
            Self::Cut(reason) => *reason,
            Self::Forced(e) => e.to_reason(),
            Self::Identity(e) => e.to_reason(),
            Self::Malformed(e) => e.to_reason(),
            Self::NoIdentity => Reason::IdentityUnavailable,
            Self::Resolve(e) => e.to_reason(),
            Self::Tunnel(e) => e.to_reason(),
            Self::UnknownWorkload => Reason::UnknownWorkload,
        }
    }
}

#[cfg(test)]
mod tests;
