//! `setsockopt`: takes an option that binds a socket to a device, does it itself on a socket of an
//! enrolled pod that has not connected, refuses it on any other, gives 1 (go on, or done) or 0
//! (refuse). It never changes another option or looks at another socket.

use core::ptr::addr_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, bpf_sockopt},
    helpers::{bpf_get_netns_cookie, bpf_set_retval, bpf_setsockopt},
    programs::SockoptContext,
};
use ebpf_abi::ConnectVerdict;

use crate::{
    connect::{
        INDEX_BYTES, IPPROTO_MPTCP, IPPROTO_TCP, SO_BINDTOIFINDEX, SOCK_STREAM, SOL_SOCKET, is_ours,
    },
    maps::{CONNECT_VERDICTS, PODS, count},
};

// PROTOCOL.md#rebind-guard
/// Every `setsockopt` of the host comes through here, so what is not ours leaves at once.
#[inline(always)]
pub(crate) fn guard(ctx: &SockoptContext) -> bool {
    // SAFETY: the verifier checks the offset and width of every context read. Volatile, because the
    // kernel translates single-word loads only, and the compiler would join neighbours.
    let level = unsafe { addr_of!((*ctx.sockopt).level).read_volatile() };
    // SAFETY: a context read, as above.
    let option = unsafe { addr_of!((*ctx.sockopt).optname).read_volatile() };
    let binds = level == SOL_SOCKET && (option == SO_BINDTODEVICE || option == SO_BINDTOIFINDEX);
    if !binds {
        return pass(ctx);
    }
    // SAFETY: a context read, as above.
    let socket = unsafe { addr_of!((*ctx.sockopt).__bindgen_anon_1.sk).read_volatile() };
    if !is_guarded(ctx, socket) {
        return pass(ctx);
    }
    // SAFETY: the verifier knows the pointer for a socket and checks the reads.
    let (protocol, state) = unsafe {
        (
            addr_of!((*socket).protocol).read_volatile(),
            addr_of!((*socket).state).read_volatile(),
        )
    };
    // Of MPTCP we see the outer socket, and the kernel binds the inner one; on 6.1 also after its
    // SYN. So it is bound to no device at all.
    if state != TCP_CLOSE || protocol == IPPROTO_MPTCP {
        count(&CONNECT_VERDICTS, ConnectVerdict::RebindRefused.index());
        return false;
    }
    bind(ctx, socket, option)
}

/// Leaves the call as it is. The kernel shows us at most a page of the value; when there is more,
/// saying nothing is read as "take that page for the value" and fails with EFAULT (before 6.4), for
/// everybody: think of iptables-restore. 0 means: take the caller's own.
#[inline(always)]
fn pass(ctx: &SockoptContext) -> bool {
    // SAFETY: a context read, as above.
    if unsafe { addr_of!((*ctx.sockopt).optlen).read_volatile() } > SMALLEST_PAGE_BYTES {
        set_length(ctx, LENGTH_ORIGINAL);
    }
    true
}

/// Whether the socket is of an enrolled pod, speaks TCP, and is not the node process's.
#[inline(always)]
fn is_guarded(ctx: &SockoptContext, socket: *mut bpf_sock) -> bool {
    // SAFETY: the verifier knows the pointer for a socket and checks the reads.
    let (kind, protocol) = unsafe {
        (
            addr_of!((*socket).type_).read_volatile(),
            addr_of!((*socket).protocol).read_volatile(),
        )
    };
    if kind != SOCK_STREAM || (protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP) {
        return false;
    }
    // SAFETY: the context is the one that the kernel gave us.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: nothing is read but whether there is an entry.
    unsafe { PODS.get(cookie) }.is_some() && !is_ours(socket)
}

/// Binds here, where the socket is locked. Were it left to the kernel, which lets go of the lock
/// first, a second thread could connect in between, and this call would take the connected socket
/// off `lo`.
#[inline(always)]
fn bind(ctx: &SockoptContext, socket: *mut bpf_sock, option: i32) -> bool {
    // SAFETY: a context read, as above.
    let length = unsafe { addr_of!((*ctx.sockopt).optlen).read_volatile() };
    // Another program has done it, or the kernel refuses so short a number. 0 may be what another
    // node process made of a long value, so it says nothing about the bytes.
    if length < 0 || (length != 0 && length < INDEX_BYTES && option == SO_BINDTOIFINDEX) {
        return true;
    }
    let Some(mut value) = value(ctx.sockopt) else {
        return false; // the kernel always gives 16 bytes
    };
    let given = if option == SO_BINDTOIFINDEX {
        INDEX_BYTES
    } else {
        NAME_BYTES
    };
    // SAFETY: the verifier knows the pointer for a socket; the value lives through the call and is
    // at least as long as said.
    let answer = unsafe {
        bpf_setsockopt(
            socket.cast(),
            SOL_SOCKET,
            option,
            value.as_mut_ptr().cast(),
            given,
        )
    };
    if answer != 0 {
        #[expect(
            clippy::as_conversions,
            clippy::cast_possible_truncation,
            reason = "an error number"
        )]
        let answer = answer as i32;
        // SAFETY: the helper takes any number.
        unsafe { bpf_set_retval(answer) };
        return false;
    }
    set_length(ctx, LENGTH_DONE);
    true
}

/// The value that the caller gave, as far as a device's name goes; behind its end are zeros.
#[inline(always)]
fn value(sockopt: *mut bpf_sockopt) -> Option<[u8; 16]> {
    // SAFETY: context reads, as above.
    let (start, end) = unsafe {
        (
            addr_of!((*sockopt).__bindgen_anon_2.optval).read_volatile(),
            addr_of!((*sockopt).__bindgen_anon_3.optval_end).read_volatile(),
        )
    };
    let start = start.cast::<[u8; 16]>();
    if start.wrapping_add(1).cast() > end {
        return None;
    }
    // SAFETY: the bytes are there, as just checked.
    Some(unsafe { start.read() })
}

#[inline(always)]
fn set_length(ctx: &SockoptContext, length: i32) {
    // SAFETY: a context write, which the verifier checks like a read.
    unsafe { (&raw mut (*ctx.sockopt).optlen).write_volatile(length) };
}

const SO_BINDTODEVICE: i32 = 25;
const TCP_CLOSE: u32 = 7;
const NAME_BYTES: i32 = 16;
/// The kernel shows one page of a value; 4096 is the smallest that there is.
const SMALLEST_PAGE_BYTES: i32 = 4096;
/// To the kernel: take the caller's own value.
const LENGTH_ORIGINAL: i32 = 0;
/// To the kernel: the call is done.
const LENGTH_DONE: i32 = -1;
