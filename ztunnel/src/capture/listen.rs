//! Listeners in a pod: takes its namespace, gives every worker one listener per kind. Where our
//! programs steer connections to them their port matters to nobody, and a taken one is no failure;
//! where rules redirect to ports, it never listens on another.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{Arrival, Error, Netns, netns, route};

/// One worker's listeners in one pod, nonblocking.
#[derive(Debug)]
pub struct WorkerListeners {
    /// The pod's own connections.
    pub outbound: TcpListener,
    /// HBONE from other nodes.
    pub hbone: TcpListener,
    /// Plaintext from outside, under [`super::PlaintextVerdict::Proxy`].
    pub plaintext: TcpListener,
    /// SOCKS5 on the pod's loopback device, if that is wanted and the application has left its port.
    pub socks5: Option<TcpListener>,
    /// How the destination of what arrives on `outbound` and `plaintext` is known.
    pub arrival: Arrival,
}

/// Who brings connections to the listeners.
#[derive(Clone, Copy, Debug)]
pub(super) enum Listening {
    /// Our programs.
    Steered,
    /// Rules of others, by port.
    Redirected {
        mark: Option<u32>,
        reuse_port: bool,
        ipv6: bool,
    },
}

/// Opens the listeners of every worker. True beside them: some port was taken by the application, so
/// another serves in its place.
pub(super) fn open(
    netns: &Netns,
    workers: usize,
    socks5: bool,
    listening: Listening,
) -> Result<(Vec<WorkerListeners>, bool), Error> {
    let mut displaced = false;
    let mut each = |kind: &Kind| -> Result<Vec<TcpListener>, Error> {
        let first = listen(kind, listening, &mut displaced)?;
        let mut all = Vec::with_capacity(workers);
        for _ in 1..workers {
            let next = if listening.shares_ports() {
                listen(kind, listening, &mut displaced)?
            } else {
                // One queue for all workers: whoever wakes first takes the connection.
                first.try_clone().map_err(|source| {
                    let purpose = kind.purpose;
                    Error::Listen { purpose, source }
                })?
            };
            all.push(next);
        }
        all.push(first);
        Ok(all)
    };
    let (outbound, hbone, plaintext, socks5) = netns
        .run(|| {
            let kinds = (each(&OUTBOUND)?, each(&HBONE)?, each(&PLAINTEXT)?);
            let socks5 = (0..workers).map(|_| socks5.then(loopback).flatten());
            Ok::<_, Error>((kinds.0, kinds.1, kinds.2, socks5.collect::<Vec<_>>()))
        })
        .map_err(Error::NetnsEnter)??;
    let arrival = match listening {
        Listening::Steered => Arrival::Steered,
        Listening::Redirected { .. } => Arrival::Redirected,
    };
    let sets = outbound
        .into_iter()
        .zip(hbone)
        .zip(plaintext)
        .zip(socks5)
        .map(|(((outbound, hbone), plaintext), socks5)| WorkerListeners {
            outbound,
            hbone,
            plaintext,
            socks5,
            arrival,
        })
        .collect();
    Ok((sets, displaced))
}

impl Listening {
    /// The listeners of the other workers, and those of the process that we replace, share the port.
    const fn shares_ports(self) -> bool {
        match self {
            Self::Steered => true,
            Self::Redirected { reuse_port, .. } => reuse_port,
        }
    }

    const fn ipv6(self) -> bool {
        match self {
            Self::Steered => true,
            Self::Redirected { ipv6, .. } => ipv6,
        }
    }
}

struct Kind {
    purpose: &'static str,
    port: u16,
    captured: bool,
}

fn listen(kind: &Kind, listening: Listening, displaced: &mut bool) -> Result<TcpListener, Error> {
    let purpose = kind.purpose;
    let listener = match (bound(kind, kind.port, listening), listening) {
        (Err(error), Listening::Steered) if error.kind() == io::ErrorKind::AddrInUse => {
            *displaced = true;
            bound(kind, 0, listening)
        }
        (other, _) => other,
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

fn bound(kind: &Kind, port: u16, listening: Listening) -> io::Result<Socket> {
    let stream = Type::STREAM.nonblocking();
    let v4 = || {
        let socket = Socket::new(Domain::IPV4, stream, Some(Protocol::TCP))?;
        Ok::<_, io::Error>((socket, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))
    };
    let (socket, any) = if listening.ipv6() {
        match Socket::new(Domain::IPV6, stream, Some(Protocol::TCP)) {
            Ok(socket) => {
                socket.set_only_v6(false)?;
                (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
            }
            // A kernel without IPv6.
            Err(_) => v4()?,
        }
    } else {
        v4()?
    };
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(listening.shares_ports())?;
    let steered = matches!(listening, Listening::Steered);
    if kind.captured || !steered {
        // It answers in the name of addresses that are not the pod's: those that were dialled.
        if any.is_ipv6() {
            socket.set_ip_transparent_v6(true)?;
        } else {
            socket.set_ip_transparent_v4(true)?;
        }
    }
    if kind.captured && steered {
        // And only on the device that the connecting socket is bound to.
        socket.bind_device_by_index_v4(Some(netns::LOOPBACK))?;
        // What the kernel answers for an application's socket that is gone finds its way to us by
        // the mark of what we sent; by its addresses it would leave the pod. PROTOCOL.md#reply-mark
        socket.set_mark(route::REPLY_MARK)?;
    }
    if let Listening::Redirected {
        mark: Some(mark), ..
    } = listening
    {
        socket.set_mark(mark)?;
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
