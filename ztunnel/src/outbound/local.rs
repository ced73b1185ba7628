//! The way to a pod of this node: both ends are judged as over HBONE, then the bytes go from
//! socket to socket. Takes a connection that has its route and the pod that it leads to, gives one
//! ending for each of the two; never lets a byte pass before both have a permit.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use thiserror::Error;
use tokio::net::TcpStream;

use super::{Failure, Way};
use crate::account::{Learned, Ledger, Opening};
use crate::authz::Permit;
use crate::context::{Context, DialError, NotAdmitted, Unserved};
use crate::drain::Forced;
use crate::identity;
use crate::model::{
    ClientAddr, Direction, Flow, Meter, OrigDst, Reason, SecurityPolicy, SpiffeId, ToReason,
    Workload,
};
use crate::resolve::{self, Asked, Hop, InboundQuery};
use crate::tunnel;
use crate::wire::Traceparent;

/// A pod of this node that a route leads to.
pub(super) struct Neighbour {
    cx: Rc<Context>,
    workload: Arc<Workload>,
    identity: SpiffeId,
    /// The application.
    target: SocketAddr,
}

impl Way<'_> {
    /// The pod of this node that the route leads to, if nothing stands between. What HBONE would
    /// refuse or do differently is left to HBONE.
    // PROTOCOL.md#node-local
    pub(super) fn neighbour(&self) -> Option<Neighbour> {
        if !self.cx.settings.local_fast_path || !self.route.rule.is_direct() {
            return None;
        }
        let Hop::Hbone {
            authority: target,
            expected,
        } = &self.route.hop
        else {
            return None;
        };
        let target = *target;
        let workload = self.route.workload.as_ref()?;
        // A waypoint or a gateway is dialled elsewhere than at the target.
        let direct = self.route.upstream.ip() == target.ip() && workload.ips.contains(&target.ip());
        let plain = workload.application_tunnel.is_none() && !workload.native_tunnel;
        if !direct || !plain || workload.network != self.source.network {
            return None;
        }
        let identity = workload.identity.clone()?;
        let own = self.source.identity.as_ref()?;
        if !expected.contains(&identity) || own.trust_domain() != identity.trust_domain() {
            return None;
        }
        Some(Neighbour {
            cx: self.cx.neighbours.pod_of(workload)?,
            workload: Arc::clone(workload),
            identity,
            target,
        })
    }
}

/// Serves a connection between two pods of this node to its end. Each side's record says what it
/// would have said of a tunnel.
pub(super) async fn serve(
    way: Way<'_>,
    near: Neighbour,
    stream: Unserved,
    client: ClientAddr,
    trace: Traceparent,
) -> Result<(), Failure> {
    let inbound = near.cx.book.open(Opening {
        direction: Direction::Inbound,
        source: client,
        destination: OrigDst::new(way.route.upstream.addr()),
        trace_id: trace.trace_id(),
    });
    let (mut here, mut there) = (way.cx.drain.clone(), near.cx.drain.clone());
    let end = tokio::select! {
        biased;
        reason = here.forced() => Err(End::Here(Forced(reason).into())),
        reason = there.forced() => Err(End::There(Forced(reason).into(), Failure::NeighbourEnded)),
        end = walk(&way, &near, stream, client, &inbound) => end,
    };
    match end {
        Ok(()) => {
            inbound.close(Reason::Complete, None);
            Ok(())
        }
        Err(End::Both(error)) => {
            inbound.close(error.to_reason(), Some(&error));
            Err(error.into())
        }
        // As if the peer had reset its stream.
        Err(End::Here(failure)) => {
            inbound.close(Reason::Reset, None);
            Err(failure)
        }
        Err(End::There(refusal, failure)) => {
            inbound.close(refusal.to_reason(), Some(&refusal));
            Err(failure)
        }
        Err(End::Refused(refusal)) => {
            inbound.close(refusal.to_reason(), Some(&refusal));
            Err(Failure::NeighbourRefused(refusal))
        }
    }
}

/// Whose affair an ending is.
enum End {
    /// One of the two sockets.
    Both(tunnel::Error),
    /// The pod that it comes from.
    Here(Failure),
    /// The pod that it goes to, before a byte moved.
    Refused(Refusal),
    /// The pod that it goes to, and what the other side calls that.
    There(Refusal, Failure),
}

impl From<tunnel::Error> for End {
    fn from(error: tunnel::Error) -> Self {
        Self::Both(error)
    }
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

async fn walk(
    way: &Way<'_>,
    near: &Neighbour,
    stream: Unserved,
    client: ClientAddr,
    inbound: &Ledger,
) -> Result<(), End> {
    let identity = way.source.identity.clone();
    let identity = identity.ok_or(End::Here(Failure::NoIdentity))?;
    let out = way.cx.live.outbound(&way.source.uid, identity.clone());
    if let Err(error) = way.cx.attest(&identity).await {
        return Err(End::Here(Failure::Identity(error)));
    }
    let lost = lost(way, near);
    let mut lost = std::pin::pin!(lost);
    let preparing = async {
        tokio::select! {
            biased;
            end = &mut lost => Err(end),
            prepared = near.prepare(way, client, identity, inbound) => Ok(prepared?),
        }
    };
    // Apart, so that what it needs is given back before bytes move.
    let prepared: Result<_, End> = Box::pin(stream.for_it(preparing)).await;
    way.learn(
        SecurityPolicy::NodeLocal,
        Some(near.identity.clone()),
        Some(near.target.to_string()),
    );
    let (permit, app) = prepared?;
    // The relay resets what it has begun with; until then the holder of the connection does.
    tokio::select! {
        biased;
        reason = permit.revoked() => return Err(Refusal::Revoked(reason).into()),
        () = std::future::ready(()) => {}
    }
    let both = Both(way.ledger, inbound);
    let mut drain = way.cx.drain.clone();
    let relayed = tunnel::relay(stream.serve(), app, &out, &both, &mut drain);
    tokio::select! {
        biased;
        // Dropping the relay resets both sides.
        reason = permit.revoked() => {
            Err(End::There(Refusal::Revoked(reason), Failure::NeighbourEnded))
        }
        end = &mut lost => Err(end),
        end = relayed => end.map_err(|error| match error {
            tunnel::Error::Revoked(_) | tunnel::Error::Drained(_) => End::Here(error.into()),
            error => End::Both(error),
        }),
    }
}

/// Waits until the certificate of one of the two pods is revoked. No tunnel would be open then, and
/// both sides' records say why.
// PROTOCOL.md#live-revocation
async fn lost(way: &Way<'_>, near: &Neighbour) -> End {
    tokio::select! {
        () = way.cx.attested.lost() => {}
        () = near.cx.attested.lost() => {}
    }
    End::Both(tunnel::Error::CertRevoked)
}

impl Neighbour {
    /// Everything that must hold before a byte reaches the application.
    async fn prepare(
        &self,
        way: &Way<'_>,
        client: ClientAddr,
        source: SpiffeId,
        inbound: &Ledger,
    ) -> Result<(Permit, TcpStream), Refusal> {
        let cx = &self.cx;
        cx.attest(&self.identity).await?;
        let world = cx.view.world();
        let host = way.route.service.as_ref().map(|s| &*s.key.hostname);
        let query = InboundQuery {
            local: &self.workload,
            dialled: OrigDst::new(way.route.upstream.addr()),
            asked: Asked::Ip(self.target),
            forwarded_host: host,
        };
        let delivery = resolve::deliver(&world.snapshot, &query)?;
        drop(world);
        let flow = Flow {
            source: client,
            source_identity: Some(source.clone()),
            destination: OrigDst::new(delivery.app.addr()),
        };
        let admitted = cx.admit(&self.workload, flow).await;
        inbound.learn(Learned {
            source: Some(Arc::clone(&way.source)),
            source_identity: Some(source),
            destination: Some(Arc::clone(&self.workload)),
            destination_identity: Some(self.identity.clone()),
            service: delivery.service,
            dst_addr: way.route.upstream,
            hbone_addr: Some(delivery.app.to_string()),
            security: SecurityPolicy::NodeLocal,
        });
        let permit = admitted?;
        let app = cx.dial_app(client.ip(), delivery.app, &self.workload);
        Ok((permit, app.await?))
    }
}

/// Counts for both ends.
struct Both<'a>(&'a Ledger, &'a Ledger);

impl Meter for Both<'_> {
    fn received(&self, bytes: u64) {
        self.0.received(bytes);
        self.1.received(bytes);
    }

    fn sent(&self, bytes: u64) {
        self.0.sent(bytes);
        self.1.sent(bytes);
    }
}

/// Why the pod that a connection goes to did not take it, or gave it up.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Forced(#[from] Forced),
    #[error(transparent)]
    Identity(#[from] identity::Error),
    #[error(transparent)]
    NotAdmitted(#[from] NotAdmitted),
    #[error(transparent)]
    Resolve(#[from] resolve::Error),
    #[error("the permit was withdrawn: {0}")]
    Revoked(Reason),
}

impl ToReason for Refusal {
    fn to_reason(&self) -> Reason {
        match self {
            Self::Dial(e) => e.to_reason(),
            Self::Forced(e) => e.to_reason(),
            Self::Identity(e) => e.to_reason(),
            Self::NotAdmitted(e) => e.to_reason(),
            Self::Resolve(e) => e.to_reason(),
            Self::Revoked(reason) => *reason,
        }
    }
}

#[cfg(test)]
mod tests;
