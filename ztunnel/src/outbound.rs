//! The walk out of a pod: captured → route → permit → stream → relay. Takes a captured connection,
//! gives one ending; never lets a byte out before there is a permit.

mod local;

use std::sync::Arc;

use thiserror::Error;

use crate::account::{Learned, Ledger, Opening};
use crate::authz::Permit;
use crate::capture::Captured;
use crate::context::{Context, DialError, Unserved};
use crate::identity;
use crate::model::{ClientAddr, Direction, Reason, SecurityPolicy, SpiffeId, ToReason, Workload};
use crate::resolve::{self, Hop, Query, Route};
use crate::tunnel::{self, Opened, Target};
use crate::wire::{Authority, Baggage, Connect, Malformed, Traceparent};

/// Serves one connection of the pod to its end. Cancelling it resets both sides and records
/// `drained`.
pub async fn serve(conn: Captured, cx: &Context) {
    let _open = cx.book.socket(Direction::Outbound);
    let trace = Traceparent::new(fastrand::u128(..), fastrand::u64(..));
    let ledger = cx.book.open(Opening {
        direction: Direction::Outbound,
        source: conn.client,
        destination: conn.original,
        trace_id: trace.trace_id(),
    });
    let mut forced = cx.drain.clone();
    let end = tokio::select! {
        // The relay, told to end, resets both sides itself; give it the first word.
        biased;
        end = walk(conn, cx, &ledger, trace) => end,
        reason = forced.forced() => Err(Failure::Forced(reason)),
    };
    match end {
        Ok(()) => ledger.close(Reason::Complete, None),
        Err(failure) => ledger.close(failure.to_reason(), Some(&failure)),
    }
}

async fn walk(
    conn: Captured,
    cx: &Context,
    ledger: &Ledger,
    trace: Traceparent,
) -> Result<(), Failure> {
    let Captured {
        stream,
        client,
        original: asked,
        ..
    } = conn;
    let stream = Unserved::new(stream);
    // Capture brings neither: such a connection was made to our listener, and would come back.
    if asked.ip().is_loopback() || asked.ip().is_unspecified() {
        return Err(Failure::SelfCall);
    }
    let source = cx.workload().await.ok_or(Failure::UnknownWorkload)?;
    if source.ips.contains(&asked.ip()) {
        return Err(Failure::SelfCall);
    }
    let world = cx.view.world();
    let query = Query {
        source: &source,
        destination: asked,
        dice: fastrand::u64(..),
    };
    let route = resolve::route(&world.snapshot, &query)?;
    drop(world);
    let way = Way {
        cx,
        ledger,
        source,
        route,
    };
    match way.route.hop.clone() {
        Hop::Hbone {
            authority,
            expected,
        } => {
            if let Some(near) = way.neighbour(authority, &expected) {
                // Apart, so that a connection through a tunnel is not as large as both.
                return Box::pin(local::serve(way, near, stream, client, trace)).await;
            }
            let authority = Authority::ip(authority);
            let opened = way.open(client, &authority, expected, trace);
            // Apart, so that what it needs is given back before bytes move.
            let opened = Box::pin(stream.for_it(opened)).await;
            way.tunnelled(stream, opened, &authority).await
        }
        Hop::Plain => way.plain(stream).await,
    }
}

/// A connection that has its route.
struct Way<'a> {
    cx: &'a Context,
    ledger: &'a Ledger,
    source: Arc<Workload>,
    route: Route,
}

impl Way<'_> {
    async fn tunnelled(
        self,
        stream: Unserved,
        opened: Result<(Permit, Opened), Failure>,
        authority: &Authority,
    ) -> Result<(), Failure> {
        let peer = opened.as_ref().ok().map(|(_, opened)| opened.peer.clone());
        self.learn(SecurityPolicy::MutualTls, peer, Some(authority.to_string()));
        let (permit, opened) = opened?;
        let mut drain = self.cx.drain.clone();
        let stream = stream.serve();
        tunnel::relay(stream, opened.stream, &permit, self.ledger, &mut drain).await?;
        Ok(())
    }

    async fn open(
        &self,
        client: ClientAddr,
        authority: &Authority,
        expected: Vec<SpiffeId>,
        trace: Traceparent,
    ) -> Result<(Permit, Opened), Failure> {
        let identity = self.source.identity.clone().ok_or(Failure::NoIdentity)?;
        let permit = self.cx.live.outbound(&self.source.uid, identity.clone());
        let host = self.route.service.as_ref().map(|s| &s.key.hostname);
        let request = Connect {
            authority,
            baggage: &Baggage::of(&self.source).encode(),
            source: client,
            host,
            traceparent: trace,
            network: None,
        };
        let target = Target {
            upstream: self.route.upstream,
            expected,
            source: identity,
            source_ip: client.ip(),
        };
        let opened = self.cx.pool.open(&permit, &target, request.encode()?);
        let opened = opened.await?;
        Ok((permit, opened))
    }

    async fn plain(self, stream: Unserved) -> Result<(), Failure> {
        let identity = self.source.identity.clone().ok_or(Failure::NoIdentity)?;
        let permit = self.cx.live.outbound(&self.source.uid, identity);
        let dialled = async { Ok(self.cx.dial_upstream(self.route.upstream).await?) };
        let dialled: Result<_, Failure> = stream.for_it(dialled).await;
        self.learn(SecurityPolicy::Unknown, None, None);
        let upstream = dialled?;
        let mut drain = self.cx.drain.clone();
        tunnel::relay(stream.serve(), upstream, &permit, self.ledger, &mut drain).await?;
        Ok(())
    }

    fn learn(&self, security: SecurityPolicy, peer: Option<SpiffeId>, hbone_addr: Option<String>) {
        let proven = peer.is_some().then(|| self.source.identity.clone());
        self.ledger.learn(Learned {
            source: Some(Arc::clone(&self.source)),
            source_identity: proven.flatten(),
            destination: self.route.workload.clone(),
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
    #[error("the pod leaves the mesh, or the process ends")]
    Forced(Reason),
    #[error("a header of the CONNECT cannot be written")]
    Header(#[from] Malformed),
    #[error("this node has no certificate for the pod")]
    Identity(#[source] identity::Error),
    #[error("ended at the pod that it goes to")]
    NeighbourEnded,
    #[error("refused at the pod that it goes to")]
    NeighbourRefused(#[source] local::Refusal),
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

impl ToReason for Failure {
    fn to_reason(&self) -> Reason {
        match self {
            Self::Dial(e) => e.to_reason(),
            Self::Forced(reason) => *reason,
            Self::Header(e) => e.to_reason(),
            Self::Identity(e) => e.to_reason(),
            Self::NeighbourEnded => Reason::Reset,
            Self::NeighbourRefused(_) => Reason::PeerRefused,
            Self::NoIdentity => Reason::IdentityUnavailable,
            Self::Resolve(e) => e.to_reason(),
            Self::SelfCall => Reason::SelfCall,
            Self::Tunnel(e) => e.to_reason(),
            Self::UnknownWorkload => Reason::UnknownWorkload,
        }
    }
}

#[cfg(test)]
mod tests;
