//! The system calls that aya, nix and socket2 do not have: links by pin, program swap on a live link,
//! socket tags, netns cookies, descriptors that packets carry. It takes descriptors and paths, gives descriptors and numbers; the
//! only unsafe code of this package.
#![expect(
    unsafe_code,
    reason = "bpf(2), getsockopt(2) and recvmsg(2) read and write through pointers; \
              everything unsafe of the package is in this file"
)]

use std::{
    ffi::{CString, c_char, c_int, c_long, c_void},
    io, mem,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use ebpf_abi::{Address, ResolverKey};

/// What a packet socket gave.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) bytes: usize,
    pub(super) descriptors: Vec<OwnedFd>,
    /// Bytes were cut off.
    pub(super) truncated: bool,
    /// Descriptors came that the kernel could not give us, and closed.
    pub(super) descriptors_lost: bool,
}

/// Takes a packet from a socket, and takes over every descriptor that came with it; of more than `room`
/// the kernel closes the rest. It does not wait.
pub(super) fn receive(socket: impl AsFd, buffer: &mut [u8], room: u32) -> io::Result<Received> {
    let bytes = room.saturating_mul(DESCRIPTOR_BYTES);
    // SAFETY: it computes with its argument alone.
    let bytes = unsafe { libc::CMSG_SPACE(bytes) };
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    // Of words, because headers are aligned to them.
    let mut control = vec![0_u64; bytes.div_ceil(size_of::<u64>())];
    let mut slice = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a header of zeroes is one without anything.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = bytes;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the buffers behind `message` outlive the call, and are as long as it says.
    let read = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags) };
    let bytes = usize::try_from(read).map_err(|_negative| io::Error::last_os_error())?;
    Ok(Received {
        bytes,
        descriptors: passed(&message),
        truncated: message.msg_flags & libc::MSG_TRUNC != 0,
        descriptors_lost: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// The descriptors of a message that the kernel has just filled in, whatever its flags say.
fn passed(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has written whole headers into the buffer, and their length into `message`.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: a header of the buffer, or null.
    while let Some(found) = unsafe { header.as_ref() } {
        if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: it computes with its argument alone.
            let head = unsafe { libc::CMSG_LEN(0) };
            let head = usize::try_from(head).unwrap_or(usize::MAX);
            let count = found.cmsg_len.saturating_sub(head) / size_of::<RawFd>();
            // SAFETY: the data of a header that the kernel has written.
            let data = unsafe { libc::CMSG_DATA(found) }.cast::<RawFd>();
            for index in 0..count {
                // SAFETY: within the length that the header says.
                let at = unsafe { data.add(index) };
                // SAFETY: the kernel has written a number there.
                let number = unsafe { at.read_unaligned() };
                // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
                // JUSTIFICATION: nix gives no numbers when the kernel says that it dropped some.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: `found` is a header of the buffer of `message`.
        header = unsafe { libc::CMSG_NXTHDR(message, found) };
    }
    descriptors
}

/// Opens the object pinned at `path`.
pub(super) fn object_get(path: &Path) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjectAttr {
        path: name.as_ptr(),
        fd: 0,
        flags: 0,
    };
    // SAFETY: `name` outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &attr) }?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    // JUSTIFICATION: aya opens pinned links too, but keeps their descriptor to itself.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins an object at `path`.
pub(super) fn object_pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjectAttr {
        path: name.as_ptr(),
        fd: object.as_fd().as_raw_fd(),
        flags: 0,
    };
    // SAFETY: `name` outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &attr) }.map(drop)
}

/// Where the node's programs are attached to a cgroup (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum CgroupHook {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Setsockopt = 22,
    Getpeername4 = 29,
    Getpeername6 = 30,
}

/// Attaches a program to a cgroup, beside those of others.
pub(super) fn cgroup_link_create(
    program: impl AsFd,
    cgroup: impl AsFd,
    hook: CgroupHook,
) -> io::Result<OwnedFd> {
    #[expect(clippy::as_conversions, reason = "a fieldless enum of u32")]
    let attr = LinkCreateAttr {
        program: program.as_fd().as_raw_fd(),
        target: cgroup.as_fd().as_raw_fd(),
        attach_type: hook as u32,
        flags: 0,
    };
    // SAFETY: the attributes hold no pointer.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &attr) }?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    // JUSTIFICATION: aya keeps the link of a setsockopt program to itself.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Swaps the program of a live link; no packet or connection meets a moment without one.
pub(super) fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let attr = LinkUpdateAttr {
        link: link.as_fd().as_raw_fd(),
        program: program.as_fd().as_raw_fd(),
        flags: 0,
        old_program: 0,
    };
    // SAFETY: the attributes hold no pointer.
    // JUSTIFICATION: aya updates XDP and TC links only.
    unsafe { bpf(BPF_LINK_UPDATE, &attr) }.map(drop)
}

/// Detaches a link, whoever else still holds it.
pub(super) fn link_detach(link: impl AsFd) -> io::Result<()> {
    let attr = LinkDetachAttr {
        link: link.as_fd().as_raw_fd(),
    };
    // SAFETY: the attributes hold no pointer.
    unsafe { bpf(BPF_LINK_DETACH, &attr) }.map(drop)
}

/// The inode of the network namespace that a link is attached to; 0 when that is gone.
pub(super) fn link_netns_inode(link: impl AsFd) -> io::Result<u32> {
    link_info(link).map(|info| info.netns_inode)
}

/// The number of the program on a link to a network namespace.
pub(super) fn link_program(link: impl AsFd) -> io::Result<u32> {
    link_info(link).map(|info| info.program)
}

/// The numbers of the `sk_lookup` programs of a network namespace.
pub(super) fn netns_sk_lookups(netns: impl AsFd) -> io::Result<Vec<u32>> {
    let mut programs = vec![0_u32; MAX_ATTACHED];
    let mut attr = QueryAttr {
        target: netns.as_fd().as_raw_fd(),
        attach_type: BPF_SK_LOOKUP,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr(),
        count: u32::try_from(programs.len()).map_err(io::Error::other)?,
        padding: 0,
    };
    // SAFETY: `programs` outlives the call and has room for `count` numbers. The kernel writes
    // into `attr` too, which is borrowed for writing.
    unsafe { bpf(BPF_PROG_QUERY, &raw mut attr) }?;
    programs.truncate(usize::try_from(attr.count).map_err(io::Error::other)?);
    Ok(programs)
}

fn link_info(link: impl AsFd) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let attr = InfoAttr {
        fd: link.as_fd().as_raw_fd(),
        length: LINK_INFO_BYTES,
        info: (&raw mut info).cast(),
    };
    // SAFETY: `info` outlives the call and is `length` bytes long.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &attr) }?;
    if info.kind == BPF_LINK_TYPE_NETNS {
        Ok(info)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("link of type {}, not of a network namespace", info.kind),
        ))
    }
}

/// Puts a socket into a socket-storage map: from now on the kernel side knows it for ours.
pub(super) fn socket_tag(map: impl AsFd, socket: impl AsFd) -> io::Result<()> {
    let key: RawFd = socket.as_fd().as_raw_fd();
    let value: u32 = 1;
    let attr = MapUpdateAttr {
        map: map.as_fd().as_raw_fd(),
        padding: 0,
        key: (&raw const key).cast(),
        value: (&raw const value).cast(),
        flags: 0,
    };
    // SAFETY: `key` and `value` outlive the call and have the sizes of the map, which is checked when
    // it is opened.
    // JUSTIFICATION: aya's handle wants `&mut` for an update, but every worker tags its sockets
    // through one shared descriptor.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attr) }.map(drop)
}

/// Puts the value of an entry that is there in its place again, so that the kernel knows it for used.
pub(super) fn resolver_touch(map: impl AsFd, key: &ResolverKey, value: &Address) -> io::Result<()> {
    let attr = MapUpdateAttr {
        map: map.as_fd().as_raw_fd(),
        padding: 0,
        key: std::ptr::from_ref(key).cast(),
        value: std::ptr::from_ref(value).cast(),
        flags: BPF_EXIST,
    };
    // SAFETY: `key` and `value` outlive the call and have the sizes of the map, which is checked when
    // it is opened.
    // JUSTIFICATION: as above.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attr) }.map(drop)
}

/// The cookie of the network namespace that a socket belongs to: unique until the next boot.
pub(super) fn socket_netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie: u64 = 0;
    let mut length: libc::socklen_t = COOKIE_BYTES;
    // SAFETY: `cookie` and `length` outlive the call, and `length` is the size of `cookie`.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if answer == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// # Safety
/// Every pointer in `attr` is valid for what `command` does with it, for the time of the call.
unsafe fn bpf<T>(command: c_int, attr: *const T) -> io::Result<c_long> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` of the length given; the kernel takes the rest for
    // zero. What it points to is the caller's promise.
    // JUSTIFICATION: the C library has no wrapper.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attr.cast::<c_void>(),
            size_of::<T>(),
        )
    };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

// From linux/bpf.h; stable ABI. Pointers are 64 bits wide there.
const _: () = assert!(size_of::<*const c_void>() == 8, "64-bit kernels only");

#[repr(C)]
struct ObjectAttr {
    path: *const c_char,
    fd: RawFd,
    flags: u32,
}

#[repr(C)]
struct LinkCreateAttr {
    program: RawFd,
    target: RawFd,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdateAttr {
    link: RawFd,
    program: RawFd,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct LinkDetachAttr {
    link: RawFd,
}

#[repr(C)]
struct InfoAttr {
    fd: RawFd,
    length: u32,
    info: *mut c_void,
}

#[repr(C)]
struct QueryAttr {
    target: RawFd,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: *mut u32,
    count: u32,
    padding: u32,
}

#[repr(C)]
struct MapUpdateAttr {
    map: RawFd,
    padding: u32,
    key: *const c_void,
    value: *const c_void,
    flags: u64,
}

/// `struct bpf_link_info` as far as a netns link fills it.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    netns_inode: u32,
    attach_type: u32,
}

const LINK_INFO_BYTES: u32 = 24;
const COOKIE_BYTES: libc::socklen_t = 8;
const _: () = assert!(size_of::<LinkInfo>() == 24);

/// The kernel passes no more in one message (`SCM_MAX_FD`).
pub(super) const MAX_DESCRIPTORS: u32 = 253;
const DESCRIPTOR_BYTES: u32 = 4;
const _: () = assert!(size_of::<RawFd>() == 4);
const BPF_MAP_UPDATE_ELEM: c_int = 2;
/// An update of an entry that is there, and of nothing else.
const BPF_EXIST: u64 = 2;
const BPF_OBJ_PIN: c_int = 6;
const BPF_OBJ_GET: c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: c_int = 15;
const BPF_PROG_QUERY: c_int = 16;
const BPF_LINK_CREATE: c_int = 28;
const BPF_LINK_UPDATE: c_int = 29;
const BPF_LINK_DETACH: c_int = 34;
const BPF_SK_LOOKUP: u32 = 36;
/// The kernel attaches no more to one namespace.
const MAX_ATTACHED: usize = 64;
const BPF_LINK_TYPE_NETNS: u32 = 5;
const SO_NETNS_COOKIE: c_int = 71;
