//! Questions that a pod's applications send to resolvers by datagrams. Takes the socket that they come
//! to, gives each with who asked and which resolver is to be asked, and carries answers back from where
//! the question arrived; it never reads what one says.

use std::{
    cell::Cell,
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aya::maps::{HashMap, Map, MapData};
use ebpf_abi::{Address, ResolverKey, map};
use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
    },
};
use tokio::{io::Interest, net::UdpSocket};

use super::{Error, NetnsCookie, maps, settings::address, sys};

/// Whether a pod's questions are captured now. Clones tell the same.
#[derive(Clone, Debug)]
pub struct Asking(Arc<AtomicBool>);

impl Asking {
    /// Whether they are.
    #[must_use]
    pub fn is_captured(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn new(captured: bool) -> Self {
        Self(Arc::new(AtomicBool::new(captured)))
    }

    pub(super) fn set(&self, captured: bool) {
        self.0.store(captured, Ordering::Relaxed);
    }
}

/// One worker's socket for the questions of one pod, nonblocking.
#[derive(Debug)]
pub struct QuestionSocket {
    pub(super) socket: std::net::UdpSocket,
    pub(super) meant: Meant,
    pub(super) asking: Asking,
}

/// Which resolvers the questions of a pod are passed on to.
#[derive(Clone, Debug)]
pub(super) enum Meant {
    /// The one that was asked: our programs show it as a stand-in, and remember it.
    StoodFor(Arc<Resolvers>, NetnsCookie),
    /// Those of this process: what redirects a datagram does not tell whom it was for.
    Own(Arc<[IpAddr]>),
}

impl QuestionSocket {
    pub(super) fn share(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
            meant: self.meant.clone(),
            asking: self.asking.clone(),
        })
    }

    /// Whether the pod's questions are captured now, also those over TCP.
    #[must_use]
    pub fn asking(&self) -> Asking {
        self.asking.clone()
    }
}

/// The resolvers that the stand-ins of this node's pods stand for.
#[derive(Debug)]
pub(super) struct Resolvers {
    map: HashMap<MapData, ResolverKey, Address>,
    descriptor: OwnedFd,
}

impl Resolvers {
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let failed = Error::map(map::RESOLVERS);
        let data = MapData::from_pin(dir.join(map::RESOLVERS)).map_err(&failed)?;
        Ok(Self {
            map: HashMap::try_from(Map::LruHashMap(data)).map_err(&failed)?,
            descriptor: maps::descriptor(dir, map::RESOLVERS)?,
        })
    }

    fn behind(&self, cookie: NetnsCookie, stand_in: IpAddr) -> Option<IpAddr> {
        let stand_in = address(stand_in);
        let number = stand_in.stand_in_number()?;
        let key = ResolverKey::of(cookie.0, &stand_in)?;
        let resolver = self.map.get(&key, 0).ok()?;
        if !resolver.is_behind(number) {
            return None;
        }
        // Whoever asks and reads on a connected socket passes no hook again, and a look-up from here
        // is none to the kernel: to it the oldest is who was connected first. Its end is another's.
        if let Err(error) = sys::resolver_touch(&self.descriptor, &key, &resolver) {
            tracing::debug!(%cookie, %error, "a resolver was forgotten while it was asked");
        }
        Some(ip(resolver))
    }
}

/// The socket on the worker that serves it.
#[derive(Debug)]
pub struct Questions {
    socket: UdpSocket,
    meant: Meant,
    /// Of several resolvers the one that answered last is asked first.
    first: Cell<usize>,
}

/// Who asked, and where: at a stand-in, or where rules redirect to.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    from: SockaddrStorage,
    asked_at: Option<IpAddr>,
}

impl Questions {
    /// Takes a nonblocking socket.
    ///
    /// # Errors
    /// When this runtime cannot wait for it.
    pub fn new(taken: QuestionSocket) -> io::Result<Self> {
        Ok(Self {
            socket: UdpSocket::from_std(taken.socket)?,
            meant: taken.meant,
            first: Cell::new(0),
        })
    }

    /// Waits until there may be a question. Cancel safe.
    ///
    /// # Errors
    /// The runtime has ended.
    pub async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// The next question, if there is one: how many bytes of `buffer` it is, and who asked.
    ///
    /// # Errors
    /// The socket is broken, or the process out of memory.
    pub fn take(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, Asker)>> {
        loop {
            let receive = || receive(&self.socket, buffer);
            let (length, from, asked_at) = match self.socket.try_io(Interest::READABLE, receive) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            };
            // A datagram always has a sender; one without could not be answered.
            if let Some(from) = from {
                return Ok(Some((length, Asker { from, asked_at })));
            }
        }
    }

    /// The resolvers that may know, to be asked one after the other: the one that was asked, if that is
    /// known, else this process's own. None when it was no stand-in, or one that was not used for long.
    #[must_use]
    pub fn resolvers(&self, asker: &Asker) -> Vec<IpAddr> {
        match &self.meant {
            Meant::StoodFor(resolvers, cookie) => asker
                .asked_at
                .and_then(|stand_in| resolvers.behind(*cookie, stand_in))
                .into_iter()
                .collect(),
            Meant::Own(resolvers) => {
                let (later, first) = resolvers.split_at(self.first.get().min(resolvers.len()));
                [first, later].concat()
            }
        }
    }

    /// Remembers that this resolver has answered.
    pub fn has_answered(&self, resolver: IpAddr) {
        if let Meant::Own(resolvers) = &self.meant
            && let Some(at) = resolvers.iter().position(|each| *each == resolver)
        {
            self.first.set(at);
        }
    }

    /// Sends an answer, from where the question was asked. Cancel safe.
    ///
    /// # Errors
    /// The asker has gone, or the answer is too long for a datagram.
    pub async fn answer(&self, asker: &Asker, answer: &[u8]) -> io::Result<()> {
        let send = || send(&self.socket, asker, answer);
        self.socket.async_io(Interest::WRITABLE, send).await
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// Those, or that it would have to wait.
    pub fn answer_at_once(&self, asker: &Asker, answer: &[u8]) -> io::Result<()> {
        send(&self.socket, asker, answer)
    }
}

type Received = (usize, Option<SockaddrStorage>, Option<IpAddr>);

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Received> {
    let mut iov = [IoSliceMut::new(buffer)];
    let mut control = cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut iov,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let asked_at = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(IpAddr::V4(Ipv4Addr::from_bits(
            u32::from_be(info.ipi_addr.s_addr),
        ))),
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)).to_canonical())
        }
        _ => None,
    });
    Ok((message.bytes, message.address, asked_at))
}

fn send(socket: &UdpSocket, asker: &Asker, answer: &[u8]) -> io::Result<()> {
    let iov = [IoSlice::new(answer)];
    let is_v6 = asker.from.as_sockaddr_in6().is_some();
    let (v4, v6);
    // The device is the one that the socket is bound to, or that the address is on.
    let control = match asker.asked_at {
        None => None,
        Some(IpAddr::V4(asked_at)) if !is_v6 => {
            v4 = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: asked_at.to_bits().to_be(),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            Some(ControlMessage::Ipv4PacketInfo(&v4))
        }
        Some(asked_at) => {
            let asked_at = match asked_at {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            v6 = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: asked_at.octets(),
                },
                ipi6_ifindex: 0,
            };
            Some(ControlMessage::Ipv6PacketInfo(&v6))
        }
    };
    sendmsg(
        socket.as_raw_fd(),
        &iov,
        control.as_slice(),
        MsgFlags::MSG_DONTWAIT,
        Some(&asker.from),
    )?;
    Ok(())
}

/// Of the pod's own network, as the kernel side wrote it.
fn ip(address: Address) -> IpAddr {
    let mut octets = [0; 16];
    let (chunks, _) = octets.as_chunks_mut::<4>();
    for (chunk, word) in chunks.iter_mut().zip(address.0) {
        *chunk = word.to_ne_bytes();
    }
    IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back_from_the_kernels_form() {
        for text in ["10.96.0.10", "fd00::a", "127.64.0.1"] {
            let wanted: IpAddr = text.parse().unwrap();
            assert_eq!(ip(address(wanted)), wanted);
        }
    }
}
