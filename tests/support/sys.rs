//! The kernel calls that no safe wrapper offers: what a child does before it becomes its program,
//! a packet socket, a fork. Takes plain values, gives owned descriptors; never keeps state.
#![expect(
    unsafe_code,
    reason = "packet sockets, hooks before exec and fork have no safe wrapper in nix or socket2"
)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    os::unix::process::CommandExt as _,
    process::Command,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{SigSet, Signal},
    },
    unistd::{ForkResult, Pid, getpid, getppid, setpgid},
};

/// Makes `command` start in its own process group, with no signal blocked, in `netns` if one is
/// given, and die with the thread that spawns it.
pub(crate) fn adopt(command: &mut Command, netns: Option<File>) {
    let parent = getpid();
    let hook = move || {
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        // std hands on our mask, and a program that never sees SIGTERM does not drain.
        SigSet::empty().thread_set_mask()?;
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() != parent {
            // The parent was gone before the line above took effect.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        if let Some(netns) = &netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        Ok(())
    };
    // SAFETY: the hook runs between fork and exec; it makes system calls only and does not
    // allocate, lock or touch memory that another thread may hold.
    unsafe { command.pre_exec(hook) };
}

/// A packet socket that sees every frame of the device with this index, in the namespace of the
/// calling thread.
pub(crate) fn packet_socket(ifindex: u32) -> io::Result<OwnedFd> {
    let protocol = u16::try_from(libc::ETH_P_ALL)
        .map_err(io::Error::other)?
        .to_be();
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointer is passed. Protocol 0: nothing is received before the bind below.
    let raw = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?,
        sll_protocol: protocol,
        sll_ifindex: i32::try_from(ifindex).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    // SAFETY: pointer and length describe `address`, which outlives the call.
    let done = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// Frames that the kernel could not queue on this packet socket since the last call.
pub(crate) fn packet_drops(socket: &OwnedFd) -> io::Result<u64> {
    let mut stats = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut length = libc::socklen_t::try_from(size_of_val(&stats)).map_err(io::Error::other)?;
    // SAFETY: both pointers are to live locals and the length is that of `stats`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut length,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::from(stats.tp_drops))
}

/// Forks; gives the child's pid to the parent and `None` to the child. The caller must be the
/// only thread of its process.
pub(crate) fn fork_alone() -> io::Result<Option<Pid>> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!(
            "fork with {threads} threads running"
        )));
    }
    // SAFETY: this is the only thread, so the child inherits no lock held by another one.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => Ok(None),
        ForkResult::Parent { child } => Ok(Some(child)),
    }
}
