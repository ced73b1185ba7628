//! Out of a pod by SOCKS5: greeting → request → the walk of a captured connection. Takes a
//! connection to the pod's loopback, gives it on with the destination that it asked for; never
//! relays a byte itself.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::account::Opening;
use crate::capture::Captured;
use crate::context::{Context, NameError};
use crate::drain::Forced;
use crate::model::{ClientAddr, Direction, NetworkAddr, OrigDst, Reason, ToReason, Workload};
use crate::outbound;
use crate::wire::{
    SOCKS_WELCOME, Socks, SocksFault, SocksReply, SocksTarget, socks_greeting, socks_request,
};

/// Serves one connection to its end. A client that asks for nothing that we do is told so and
/// recorded once.
// PROTOCOL.md#socks5
pub async fn serve(mut conn: Captured, cx: &Context) {
    let open = cx.book.socket(Direction::Outbound);
    let ledger = cx.book.open(Opening {
        direction: Direction::Outbound,
        source: conn.client,
        destination: conn.original,
        trace_id: fastrand::u128(..),
    });
    let mut forced = cx.drain.clone();
    let asked = tokio::select! {
        biased;
        asked = timeout(PATIENCE, asked(&mut conn.stream, cx)) => {
            asked.unwrap_or(Err(Failure::Silent(PATIENCE)))
        }
        reason = forced.forced() => Err(Forced(reason).into()),
    };
    match asked {
        Ok((own, destination)) => {
            // What leaves the pod is the pod's; only the port is the connection's own.
            let client = ClientAddr::new(SocketAddr::new(own, conn.client.port()));
            let original = OrigDst::new(destination);
            let ledger = ledger.redirected(client, original);
            let asked = Captured {
                client,
                original,
                ..conn
            };
            // Apart, so that whoever is still heard is not as large as a connection.
            outbound::walk(Box::new(asked), (ledger, open), cx).await;
        }
        Err(failure) => {
            if let Some(reply) = failure.reply()
                && let Err(error) = conn.stream.write_all(&reply.encode()).await
            {
                tracing::debug!(%error, "a SOCKS client is gone before it was refused");
            }
            ledger.close(failure.to_reason(), Some(&failure));
        }
    }
}

/// Hears where the client wants to go and tells it that it may. Gives the address of the pod that
/// fits, and the destination.
async fn asked(stream: &mut TcpStream, cx: &Context) -> Result<(IpAddr, SocketAddr), Failure> {
    read(stream, socks_greeting).await?;
    stream.write_all(&SOCKS_WELCOME).await?;
    let target = read(stream, socks_request).await?;
    let local = cx.workload().await.ok_or(Failure::UnknownWorkload)?;
    let destination = match target {
        SocksTarget::Ip(address) => address,
        SocksTarget::Host(name, port) => SocketAddr::new(find(&name, &local, cx).await?, port),
    };
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == destination.is_ipv4();
    let own = local
        .ips
        .iter()
        .find(same_family)
        .or_else(|| local.ips.first());
    let own = own.ok_or(Failure::UnknownWorkload)?;
    stream.write_all(&SocksReply::Success.encode()).await?;
    Ok((*own, destination))
}

/// An address for a name: of the mesh's service, else what the node's resolver says.
async fn find(name: &Arc<str>, local: &Workload, cx: &Context) -> Result<IpAddr, Failure> {
    let world = cx.view.world();
    // As names are compared; the dot at the end says only that nothing is to be added.
    let host = name.trim_end_matches('.').to_ascii_lowercase();
    let service = world.snapshot.service_named(&host, &local.namespace);
    let vip = service.and_then(|service| {
        let here = |vip: &&NetworkAddr| vip.network == local.network;
        let vips = service.vips.iter().filter(here).map(|vip| vip.ip);
        preferred(&vips.collect::<Vec<_>>(), local)
    });
    drop(world);
    if let Some(vip) = vip {
        return Ok(vip);
    }
    let found = cx.names.look_up(name).await?;
    preferred(&found, local).ok_or_else(|| Failure::NoAddress(Arc::clone(name)))
}

/// An address of a family that the pod has, IPv4 first; else any.
fn preferred(ips: &[IpAddr], local: &Workload) -> Option<IpAddr> {
    let has = |ip: &IpAddr| local.ips.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
    ips.iter().copied().max_by_key(|ip| (has(ip), ip.is_ipv4()))
}

/// Reads one message, and not a byte of what follows.
async fn read<T>(
    stream: &mut TcpStream,
    decode: impl Fn(&[u8]) -> Result<Socks<T>, SocksFault>,
) -> Result<T, Failure> {
    let mut bytes = Vec::new();
    loop {
        match decode(&bytes)? {
            Socks::Complete(message) => return Ok(message),
            Socks::Incomplete(missing) => {
                let begin = bytes.len();
                bytes.resize(begin + missing, 0);
                let missing = bytes.get_mut(begin..).unwrap_or_default();
                match stream.read_exact(missing).await {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return Err(Failure::Unfinished);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
}

/// Why a SOCKS connection did not become one of the pod's.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Forced(#[from] Forced),
    #[error("speak SOCKS5 with the application")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("host name {0:?} has no address")]
    NoAddress(Arc<str>),
    #[error("the application did not finish its SOCKS5 request within {0:?}")]
    Silent(Duration),
    #[error("not a SOCKS5 request that is served")]
    Socks(#[from] SocksFault),
    #[error("the application ended before its SOCKS5 request did")]
    Unfinished,
    #[error("the mesh does not know this pod")]
    UnknownWorkload,
}

impl Failure {
    /// What the client is told, if it still listens.
    const fn reply(&self) -> Option<SocksReply> {
        match self {
            Self::Forced(_) | Self::Io(_) | Self::Silent(_) | Self::Unfinished => None,
            Self::Name(_) | Self::NoAddress(_) => Some(SocksReply::HostUnreachable),
            Self::Socks(_) => Some(SocksReply::NotSupported),
            Self::UnknownWorkload => Some(SocksReply::Failure),
        }
    }
}

impl ToReason for Failure {
    fn to_reason(&self) -> Reason {
        match self {
            Self::Forced(e) => e.to_reason(),
            Self::Io(_) => Reason::Reset,
            Self::Name(e) => e.to_reason(),
            Self::NoAddress(_) => Reason::NoEndpoint,
            Self::Silent(_) | Self::Unfinished => Reason::BadRequest,
            Self::Socks(e) => e.to_reason(),
            Self::UnknownWorkload => Reason::UnknownWorkload,
        }
    }
}

/// For a client to say where it wants to go, and for the name to be found.
const PATIENCE: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
