//! Listeners in a pod: takes its namespace, gives every worker one listener per kind. They are
//! found by the kernel side's map, so their port matters to nobody; it never fails for a taken one.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{Error, Netns, netns, route};

/// One worker's listeners in one pod, nonblocking. An accepted socket's local address is the one that
/// the peer dialled.
#[derive(Debug)]
pub struct WorkerListeners {
    /// The pod's own connections. Local address: the original destination.
    pub outbound: TcpListener,
    /// HBONE from other nodes.
    pub hbone: TcpListener,
    /// Plaintext from outside, under [`super::PlaintextVerdict::Proxy`].
    pub plaintext: TcpListener,
    /// SOCKS5 on the pod's loopback device, if that is wanted and the application has left its port.
    pub socks5: Option<TcpListener>,
}

/// Opens the listeners of every worker. True beside them: some port was taken by the application, so
/// another serves in its place.
pub(super) fn open(
    netns: &Netns,
    workers: u32,
    socks5: bool,
) -> Result<(Vec<WorkerListeners>, bool), Error> {
    let mut displaced = false;
    let sets = netns
        .run(|| {
            (0..workers)
                .map(|_| {
                    Ok(WorkerListeners {
                        outbound: listen(OUTBOUND, &mut displaced)?,
                        hbone: listen(HBONE, &mut displaced)?,
                        plaintext: listen(PLAINTEXT, &mut displaced)?,
                        socks5: if socks5 { loopback() } else { None },
                    })
                })
                .collect::<Result<Vec<_>, Error>>()
        })
        .map_err(Error::NetnsEnter)??;
    Ok((sets, displaced))
}

struct Kind {
    purpose: &'static str,
    port: u16,
    captured: bool,
}

fn listen(kind: Kind, displaced: &mut bool) -> Result<TcpListener, Error> {
    let purpose = kind.purpose;
    let listener = match bound(&kind, kind.port) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            *displaced = true;
            bound(&kind, 0)
        }
        other => other,
    };
    let listener = listener.and_then(|socket| socket.listen(BACKLOG).map(|()| socket));
    listener
        .map(TcpListener::from)
        .map_err(|source| Error::Listen { purpose, source })
}

/// Applications find it by its port alone: another one would be found by nobody. A pod in which it
/// cannot be is enrolled all the same.
fn loopback() -> Option<TcpListener> {
    let bound = || -> io::Result<TcpListener> {
        let socket = Socket::new(
            Domain::IPV4,
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, SOCKS5_PORT)).into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    match bound() {
        Ok(listener) => Some(listener),
        Err(error) => {
            tracing::warn!(
                port = SOCKS5_PORT, %error,
                "no SOCKS5 in this pod: its application has the port, or its loopback is not as usual"
            );
            None
        }
    }
}

fn bound(kind: &Kind, port: u16) -> io::Result<Socket> {
    let stream = Type::STREAM.nonblocking();
    let (socket, any) = match Socket::new(Domain::IPV6, stream, Some(Protocol::TCP)) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        }
        // A kernel without IPv6.
        Err(_) => (
            Socket::new(Domain::IPV4, stream, Some(Protocol::TCP))?,
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
        ),
    };
    // The listeners of the other workers, and those of the process that we replace, share the port.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if kind.captured {
        // It answers in the name of addresses that are not the pod's, and only on the device that
        // the connecting socket is bound to.
        if any.is_ipv6() {
            socket.set_ip_transparent_v6(true)?;
        } else {
            socket.set_ip_transparent_v4(true)?;
        }
        socket.bind_device_by_index_v4(Some(netns::LOOPBACK))?;
        // What the kernel answers for an application's socket that is gone finds its way to us by
        // the mark of what we sent; by its addresses it would leave the pod. PROTOCOL.md#reply-mark
        socket.set_mark(route::REPLY_MARK)?;
    }
    socket.bind(&any.into())?;
    Ok(socket)
}

// PROTOCOL.md#ports
const OUTBOUND: Kind = Kind {
    purpose: "outbound connections",
    port: 15001,
    captured: true,
};
const HBONE: Kind = Kind {
    purpose: "HBONE",
    port: ebpf_abi::HBONE_PORT,
    captured: false,
};
const PLAINTEXT: Kind = Kind {
    purpose: "plaintext",
    port: 15006,
    captured: false,
};

// PROTOCOL.md#ports
const SOCKS5_PORT: u16 = 15080;

/// Bursts wait here while a worker is busy; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
