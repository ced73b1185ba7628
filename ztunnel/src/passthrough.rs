//! Inbound that is not HBONE: captured → permit → dial the pod → relay. Takes a plaintext
//! connection into a pod, gives one ending; never claims to know who the peer is.

use std::sync::Arc;

use thiserror::Error;

use crate::account::{Learned, Ledger, Opening};
use crate::capture::Captured;
use crate::context::{Context, DialError, NotAdmitted, Unserved};
use crate::drain::Forced;
use crate::model::{
    AppAddr, ClientAddr, Direction, Flow, OrigDst, Reason, SecurityPolicy, ToReason, UpstreamAddr,
    Workload,
};
use crate::resolve::OWN_PORTS;
use crate::tunnel::{self, Carrying};

/// Serves one plaintext connection into the pod to its end. Cancelling it resets both sides and
/// records `drained`.
pub async fn serve(conn: Box<Captured>, cx: &Context) {
    let _open = cx.book.socket(Direction::Inbound);
    let ledger = cx.book.open(Opening {
        direction: Direction::Inbound,
        source: conn.client,
        destination: conn.original,
        trace_id: fastrand::u128(..),
    });
    // Apart, so that what it needs is given back before bytes move.
    let opening = cx.drain.unless_forced(|| open(conn, cx, &ledger));
    // From here on it hears itself when it is told to end, and resets both sides.
    let end = async { opening.await?.await }.await;
    ledger.ended(end);
}

/// Everything before the first byte.
async fn open<'a>(
    conn: Box<Captured>,
    cx: &'a Context,
    ledger: &'a Ledger,
) -> Result<Carrying<'a, Failure>, Failure> {
    let Captured {
        stream,
        client,
        original,
        listener,
        ..
    } = *conn;
    let stream = Unserved::new(stream);
    let port = original.port();
    // The listener has another port than usual where the application holds that one.
    if OWN_PORTS.contains(&port) || port == listener.port() {
        return Err(Failure::OwnPort(port));
    }
    // PROTOCOL.md#forwarded-plaintext
    if !cx.dial.is_of_pod(original.ip()) {
        return Err(Failure::WrongPod(original));
    }
    let local = cx.workload().await.ok_or(Failure::UnknownWorkload)?;
    let flow = Flow {
        source: client,
        source_identity: None,
        destination: original,
    };
    let admitted = match cx.admit_probe(&local, &flow) {
        Some(permit) => Ok(permit),
        None => cx.admit(&local, flow).await,
    };
    let security = match &admitted {
        Ok(permit) if permit.is_probe() => SecurityPolicy::Probe,
        Ok(_) | Err(_) => SecurityPolicy::Unknown,
    };
    learn(cx, ledger, &local, (client, original), security);
    let permit = admitted?;
    let app = AppAddr::new(original.addr());
    let app = async { Ok(cx.dial_app(client.ip(), app, &local).await?) };
    let app: Result<_, Failure> = stream.for_it(app).await;
    let app = app?;
    let drain = cx.drain.clone();
    Ok(tunnel::carry(stream.serve(), app, permit, ledger, drain))
}

fn learn(
    cx: &Context,
    ledger: &Ledger,
    local: &Arc<Workload>,
    (client, original): (ClientAddr, OrigDst),
    security: SecurityPolicy,
) {
    let world = cx.view.world();
    let source = world
        .snapshot
        .workload_at(&local.network, client.ip())
        .map(Arc::clone);
    ledger.learn(Learned {
        source,
        source_identity: None,
        destination: Some(Arc::clone(local)),
        destination_identity: None,
        service: None,
        dst_addr: UpstreamAddr::new(original.addr()),
        hbone_addr: None,
        security,
    });
}

/// Why a plaintext connection ended before its two ends ended it.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    NotAdmitted(#[from] NotAdmitted),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Forced(#[from] Forced),
    #[error("port {0} is one of the node proxy's own")]
    OwnPort(u16),
    #[error(transparent)]
    Relay(#[from] tunnel::Error),
    #[error("the mesh does not know this pod")]
    UnknownWorkload,
    #[error("{0} is no address of this pod")]
    WrongPod(OrigDst),
}

impl ToReason for Failure {
    fn to_reason(&self) -> Reason {
        match self {
            Self::NotAdmitted(e) => e.to_reason(),
            Self::Dial(e) => e.to_reason(),
            Self::Forced(e) => e.to_reason(),
            Self::OwnPort(_) => Reason::ForbiddenPort,
            Self::Relay(e) => e.to_reason(),
            Self::UnknownWorkload => Reason::UnknownWorkload,
            Self::WrongPod(_) => Reason::BadDestination,
        }
    }
}

#[cfg(test)]
mod tests;
