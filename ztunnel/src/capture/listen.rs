//! Listeners in a pod: takes its namespace, gives every worker one listener per kind. Where our
//! programs steer connections to them their port matters to nobody, and a taken one is no failure;
//! where rules redirect to ports, it never listens on another.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
};

use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Arrival, Error, Netns, QuestionSocket, netns,
    questions::{Asking, Meant},
    route, sys,
};

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
    /// The pod's questions to resolvers, where any pod's are captured.
    pub dns: Vec<QuestionSocket>,
    /// Its connections to resolvers, where those do not come with the others.
    pub dns_connections: Vec<TcpListener>,
    /// How the destination of what arrives on `outbound` and `plaintext` is known.
    pub arrival: Arrival,
    /// Another process may listen on the same ports meanwhile.
    pub shared: bool,
}

/// Who brings connections to the listeners.
#[derive(Clone, Copy, Debug)]
pub(super) enum Listening<'a> {
    /// Our programs, which know our sockets by this tag.
    Steered { ours: &'a OwnedFd },
    /// Rules of others, by port.
    Redirected {
        mark: Option<u32>,
        reuse_port: bool,
        ipv6: bool,
    },
}

/// What questions to resolvers are heard with, and passed on to.
#[derive(Clone, Debug)]
pub(super) struct Hearing {
    pub(super) meant: Meant,
    pub(super) asking: Asking,
}

/// What [`open`] gives.
pub(super) struct Opened {
    pub(super) workers: Vec<WorkerListeners>,
    /// The port of all sockets for questions.
    pub(super) dns_port: u16,
    /// Some port was taken by the application, so another serves in its place.
    pub(super) displaced: bool,
}

/// Opens the listeners of every worker.
pub(super) fn open(
    netns: &Netns,
    workers: usize,
    socks5: bool,
    listening: Listening<'_>,
    dns: Option<&Hearing>,
) -> Result<Opened, Error> {
    let mut displaced = false;
    let mut dns_port = DNS_PORT;
    let mut one = || -> Result<WorkerListeners, Error> {
        let mut listen = |kind| listen(kind, listening, &mut displaced);
        Ok(WorkerListeners {
            outbound: listen(&OUTBOUND)?,
            hbone: listen(&HBONE)?,
            plaintext: listen(&PLAINTEXT)?,
            dns_connections: match dns {
                Some(_) => redirected_connections(listening)?,
                None => Vec::new(),
            },
            dns: match dns {
                Some(hearing) => hear(hearing, listening, (&mut dns_port, &mut displaced))?,
                None => Vec::new(),
            },
            socks5: socks5.then(loopback).flatten(),
            arrival: match listening {
                Listening::Steered { .. } => Arrival::Steered,
                Listening::Redirected { .. } => Arrival::Redirected,
            },
            shared: listening.shares_ports(),
        })
    };
    let workers = netns
        .run(|| {
            let mut sets: Vec<WorkerListeners> = Vec::with_capacity(workers);
            for _ in 0..workers {
                let next = match sets.first() {
                    Some(first) if !listening.shares_ports() => first.share()?,
                    _ => one()?,
                };
                sets.push(next);
            }
            Ok::<_, Error>(sets)
        })
        .map_err(Error::NetnsEnter)??;
    Ok(Opened {
        workers,
        dns_port,
        displaced,
    })
}

impl WorkerListeners {
    /// The same for another worker. There is one queue of each: whoever wakes first takes what came.
    fn share(&self) -> Result<Self, Error> {
        fn all<S>(each: &[S], share: impl Fn(&S) -> io::Result<S>) -> io::Result<Vec<S>> {
            each.iter().map(share).collect()
        }
        let shared = || -> io::Result<Self> {
            Ok(Self {
                outbound: self.outbound.try_clone()?,
                hbone: self.hbone.try_clone()?,
                plaintext: self.plaintext.try_clone()?,
                socks5: self
                    .socks5
                    .as_ref()
                    .map(TcpListener::try_clone)
                    .transpose()?,
                dns: all(&self.dns, QuestionSocket::share)?,
                dns_connections: all(&self.dns_connections, TcpListener::try_clone)?,
                arrival: self.arrival,
                shared: self.shared,
            })
        };
        shared().map_err(|source| Error::Listen {
            purpose: "another worker",
            source,
        })
    }
}

impl Listening<'_> {
    /// The listeners of the other workers, and those of the process that we replace, share the port.
    const fn shares_ports(self) -> bool {
        match self {
            Self::Steered { .. } => true,
            Self::Redirected { reuse_port, .. } => reuse_port,
        }
    }

    const fn ipv6(self) -> bool {
        match self {
            Self::Steered { .. } => true,
            Self::Redirected { ipv6, .. } => ipv6,
        }
    }
}

struct Kind {
    purpose: &'static str,
    port: u16,
    captured: bool,
}

fn listen(
    kind: &Kind,
    listening: Listening<'_>,
    displaced: &mut bool,
) -> Result<TcpListener, Error> {
    let purpose = kind.purpose;
    let bound = |port| bound(kind, port, listening);
    let listener = match listening {
        Listening::Steered { .. } => or_displaced(kind.port, displaced, bound),
        Listening::Redirected { .. } => bound(kind.port),
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

/// A worker's sockets for questions.
fn hear(
    hearing: &Hearing,
    listening: Listening<'_>,
    (port, displaced): (&mut u16, &mut bool),
) -> Result<Vec<QuestionSocket>, Error> {
    let sockets = match listening {
        Listening::Steered { ours } => steered_questions(port, displaced, ours).map(|it| vec![it]),
        Listening::Redirected { .. } => redirected(listening, Type::DGRAM),
    };
    let sockets = sockets.map_err(|source| Error::Listen {
        purpose: "questions to resolvers",
        source,
    })?;
    let heard = |socket: Socket| QuestionSocket {
        socket: socket.into(),
        meant: hearing.meant.clone(),
        asking: hearing.asking.clone(),
    };
    Ok(sockets.into_iter().map(heard).collect())
}

/// All workers have one port, because an answer comes from the port that was asked: `port` is the one
/// that is wanted, and then the one that it is.
// PROTOCOL.md#dns-stand-in
fn steered_questions(port: &mut u16, displaced: &mut bool, ours: &OwnedFd) -> io::Result<Socket> {
    let socket = or_displaced(*port, displaced, |port| {
        let (socket, any) = unbound(Type::DGRAM, Protocol::UDP, (port, true))?;
        // Who asks from a resolver's port, or from a stand-in, is answered there, and not by us.
        sys::socket_tag(ours, &socket)?;
        // With the other workers, and the process that we replace.
        socket.set_reuse_port(true)?;
        answer_for_others(&socket, any)?;
        // And only on the device that leads to the address which was asked.
        socket.bind_device_by_index_v4(Some(netns::LOOPBACK))?;
        tell_where(&socket, any)?;
        socket.bind(&any.into())?;
        Ok(socket)
    })?;
    let bound = socket.local_addr()?.as_socket();
    *port = bound.map_or(*port, |bound| bound.port());
    Ok(socket)
}

/// Each datagram tells where it arrived.
fn tell_where(socket: &Socket, at: SocketAddr) -> io::Result<()> {
    if at.is_ipv6() {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?;
    }
    Ok(())
}

fn redirected_connections(listening: Listening<'_>) -> Result<Vec<TcpListener>, Error> {
    let sockets = match listening {
        Listening::Steered { .. } => Ok(Vec::new()),
        Listening::Redirected { .. } => redirected(listening, Type::STREAM),
    };
    let listeners = sockets.and_then(|sockets| {
        let listen = |socket: Socket| socket.listen(BACKLOG).map(|()| socket.into());
        sockets.into_iter().map(listen).collect()
    });
    listeners.map_err(|source| Error::Listen {
        purpose: "connections to resolvers",
        source,
    })
}

/// Sockets that rules of others redirect what goes to resolvers to, one of each family of the pod's
/// loopback device: nobody else finds them there.
// PROTOCOL.md#dns-external
fn redirected(listening: Listening<'_>, kind: Type) -> io::Result<Vec<Socket>> {
    let Listening::Redirected {
        mark,
        reuse_port,
        ipv6,
    } = listening
    else {
        return Ok(Vec::new());
    };
    let bound = |ip: IpAddr| {
        let at = SocketAddr::new(ip, DNS_PORT);
        let socket = Socket::new(Domain::for_address(at), kind.nonblocking(), None)?;
        if at.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        if kind == Type::STREAM {
            socket.set_reuse_address(true)?;
        } else {
            tell_where(&socket, at)?;
        }
        socket.set_reuse_port(reuse_port)?;
        mark.map_or(Ok(()), |mark| socket.set_mark(mark))?;
        socket.bind(&at.into())?;
        Ok(socket)
    };
    let mut sockets = vec![bound(Ipv4Addr::LOCALHOST.into())?];
    if ipv6 {
        match bound(Ipv6Addr::LOCALHOST.into()) {
            Ok(socket) => sockets.push(socket),
            Err(error) if lacks_ipv6(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

/// The pod's loopback device, or the kernel, has no IPv6.
fn lacks_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error().map(Errno::from_raw) == Some(Errno::EAFNOSUPPORT)
}

/// On another port if the usual one is taken.
fn or_displaced(
    port: u16,
    displaced: &mut bool,
    bound: impl Fn(u16) -> io::Result<Socket>,
) -> io::Result<Socket> {
    match bound(port) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            *displaced = true;
            bound(0)
        }
        other => other,
    }
}

/// A socket for both families, where the kernel has them and `ipv6` wants them, and the address to bind
/// it to.
fn unbound(
    kind: Type,
    protocol: Protocol,
    (port, ipv6): (u16, bool),
) -> io::Result<(Socket, SocketAddr)> {
    let kind = kind.nonblocking();
    if ipv6 && let Ok(socket) = Socket::new(Domain::IPV6, kind, Some(protocol)) {
        socket.set_only_v6(false)?;
        return Ok((socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))));
    }
    Ok((
        Socket::new(Domain::IPV4, kind, Some(protocol))?,
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
    ))
}

fn bound(kind: &Kind, port: u16, listening: Listening<'_>) -> io::Result<Socket> {
    let (socket, any) = unbound(Type::STREAM, Protocol::TCP, (port, listening.ipv6()))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(listening.shares_ports())?;
    let steered = matches!(listening, Listening::Steered { .. });
    if kind.captured || !steered {
        answer_for_others(&socket, any)?;
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

/// It answers in the name of addresses that are not the pod's: those that were dialled.
fn answer_for_others(socket: &Socket, any: SocketAddr) -> io::Result<()> {
    if any.is_ipv6() {
        socket.set_ip_transparent_v6(true)
    } else {
        socket.set_ip_transparent_v4(true)
    }
}

// PROTOCOL.md#ports
pub(super) const DNS_PORT: u16 = 15053;
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
