//! Inbound that is not HBONE: captured → permit → dial the pod → relay. Takes a plaintext
//! connection into a pod, gives one ending; never claims to know who the peer is.

use std::sync::Arc;

use thiserror::Error;

use crate::account::{Learned, Ledger, Opening};
use crate::authz::Denied;
use crate::capture::Captured;
use crate::context::{Context, DialError};
use crate::model::{
    AppAddr, Direction, Flow, Reason, SecurityPolicy, ToReason, UpstreamAddr, Workload,
};
use crate::resolve::OWN_PORTS;
use crate::tunnel;

/// Serves one plaintext connection into the pod to its end. Cancelling it resets both sides and
/// records `drained`.
pub async fn serve(conn: Captured, cx: &Context) {
    let _open = cx.book.socket(Direction::Inbound);
    let ledger = cx.book.open(Opening {
        direction: Direction::Inbound,
        source: conn.client,
        destination: conn.original,
        trace_id: fastrand::u128(..),
    });
    let mut forced = cx.drain.clone();
    let end = tokio::select! {
        biased;
        end = walk(conn, cx, &ledger) => end,
        reason = forced.forced() => Err(Failure::Forced(reason)),
    };
    match end {
        Ok(()) => ledger.close(Reason::Complete, None),
        Err(failure) => ledger.close(failure.to_reason(), Some(&failure)),
    }
}

async fn walk(conn: Captured, cx: &Context, ledger: &Ledger) -> Result<(), Failure> {
    let port = conn.original.port();
    // The listener has another port than usual where the application holds that one.
    if OWN_PORTS.contains(&port) || port == conn.listener.port() {
        return Err(Failure::OwnPort(port));
    }
    cx.tune(&conn.stream);
    let local = cx.workload().await.ok_or(Failure::UnknownWorkload)?;
    let flow = Flow {
        source: conn.client,
        source_identity: None,
        destination: conn.original,
    };
    let admitted = cx.admit(&local, flow).await;
    learn(&conn, cx, ledger, &local);
    let permit = admitted?;
    let app = AppAddr::new(conn.original.addr());
    let app = cx.dial_app(conn.client.ip(), app).await?;
    let mut drain = cx.drain.clone();
    tunnel::relay(conn.stream, app, &permit, ledger, &mut drain).await?;
    Ok(())
}

fn learn(conn: &Captured, cx: &Context, ledger: &Ledger, local: &Arc<Workload>) {
    let world = cx.view.world();
    let source = world
        .snapshot
        .workload_at(&local.network, conn.client.ip())
        .map(Arc::clone);
    ledger.learn(Learned {
        source,
        source_identity: None,
        destination: Some(Arc::clone(local)),
        destination_identity: None,
        service: None,
        dst_addr: UpstreamAddr::new(conn.original.addr()),
        hbone_addr: None,
        security: SecurityPolicy::Unknown,
    });
}

/// Why a plaintext connection ended before its two ends ended it.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the pod leaves the mesh, or the process ends")]
    Forced(Reason),
    #[error("port {0} is one of the node proxy's own")]
    OwnPort(u16),
    #[error(transparent)]
    Relay(#[from] tunnel::Error),
    #[error("the mesh does not know this pod")]
    UnknownWorkload,
}

impl ToReason for Failure {
    fn to_reason(&self) -> Reason {
        match self {
            Self::Denied(e) => e.to_reason(),
            Self::Dial(e) => e.to_reason(),
            Self::Forced(reason) => *reason,
            Self::OwnPort(_) => Reason::ForbiddenPort,
            Self::Relay(e) => e.to_reason(),
            Self::UnknownWorkload => Reason::UnknownWorkload,
        }
    }
}
