//! Watches what capture needs in a pod's namespace and the pod may change. Takes the namespace, says
//! whether rules, routes, devices or sysctls were touched; never waits and never puts anything back.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::{Error, Netns, route};

/// One pod's watch. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Watch {
    events: Arc<OwnedFd>,
    turn: Arc<AtomicU32>,
}

impl Watch {
    /// Sees every change from now on.
    pub(super) fn open(netns: &Netns) -> Result<Self, Error> {
        let events = netns.run(listen).map_err(Error::NetnsEnter)?;
        let events = events.map_err(|error| Error::Route {
            purpose: "watch the pod's rules and routes",
            answer: error.to_string(),
        })?;
        Ok(Self {
            events: Arc::new(events),
            turn: Arc::default(),
        })
    }

    /// Whether something was touched since the last call; at times it looks at the sysctls, of which
    /// the kernel tells nobody.
    pub(super) fn is_disturbed(&self, netns: &Netns) -> Result<bool, Error> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let due = turn % SYSCTLS_EVERY == SYSCTLS_EVERY - 1;
        let sysctls = due
            && !netns
                .run(route::sysctls_are_on)
                .map_err(Error::NetnsEnter)?;
        Ok(self.drain() || sysctls)
    }

    /// Forgets what was seen up to now: it was our own doing.
    pub(super) fn forget(&self) {
        self.drain();
    }

    /// Reads everything that is there; true if that was anything, or if too much came to be kept.
    fn drain(&self) -> bool {
        let mut seen = false;
        // What it says is of no matter, and a message may be cut.
        let mut message = [0; 64];
        for _ in 0..AT_ONCE {
            match recv(
                self.events.as_raw_fd(),
                &mut message,
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => seen = true,
                Err(_) => break,
            }
        }
        seen
    }
}

fn listen() -> io::Result<OwnedFd> {
    let events = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkRoute,
    )?;
    bind(events.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    Ok(events)
}

// PROTOCOL.md#watch-groups
/// `RTMGRP_LINK`, `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV4_RULE`, `RTMGRP_IPV6_ROUTE`, and the bit of
/// `RTNLGRP_IPV6_RULE` (19).
const GROUPS: u32 = 0x1 | 0x40 | 0x80 | 0x400 | 1 << 18;

/// More than the socket's buffer holds, so that one call empties it.
const AT_ONCE: usize = 4096;

/// Of so many calls, one looks at the sysctls: three files in the pod's namespace.
const SYSCTLS_EVERY: u32 = 10;
