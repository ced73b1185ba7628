//! `connect4` and `connect6`: take a connecting socket, bind it to `lo` if it belongs to an enrolled
//! pod and nothing exempts it, give 1 (go on) or 0 (refuse). They never rewrite the destination of a
//! connection; what asks a resolver by datagrams is `dns`'s matter.

use core::ptr::{addr_of, null_mut};

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::{bpf_get_netns_cookie, bpf_setsockopt, generated::bpf_sk_storage_get},
    maps::lpm_trie::Key,
    programs::SockAddrContext,
};
use ebpf_abi::{
    Address, CIDR_COOKIE_BITS, CidrKey, ConnectVerdict, OutboundRules, holds_address, holds_port,
};

use crate::{
    dns,
    maps::{CIDRS, CONNECT_VERDICTS, OURS, PODS, count},
};

#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> bool {
    if is_datagram(ctx) {
        return dns::connect4(ctx);
    }
    let Some((cookie, rules)) = pod_of(ctx) else {
        return true;
    };
    judge(ctx, cookie, rules, address_v4(ctx))
}

#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrContext) -> bool {
    if is_datagram(ctx) {
        return dns::connect6(ctx);
    }
    let Some((cookie, rules)) = pod_of(ctx) else {
        return true;
    };
    judge(ctx, cookie, rules, address_v6(ctx))
}

/// Whether the socket speaks UDP.
#[inline(always)]
pub(crate) fn is_datagram(ctx: &SockAddrContext) -> bool {
    // SAFETY: the verifier checks the offset and width of every context read. Volatile, because the
    // kernel translates single-word loads only, and the compiler would join neighbours.
    let kind = unsafe { addr_of!((*ctx.sock_addr).type_).read_volatile() };
    // SAFETY: a context read, as above.
    let protocol = unsafe { addr_of!((*ctx.sock_addr).protocol).read_volatile() };
    kind == SOCK_DGRAM && protocol == IPPROTO_UDP
}

/// The pod that the socket belongs to, if it is enrolled and the socket speaks TCP.
#[inline(always)]
fn pod_of(ctx: &SockAddrContext) -> Option<(u64, &'static OutboundRules)> {
    // SAFETY: a context read, as above.
    let kind = unsafe { addr_of!((*ctx.sock_addr).type_).read_volatile() };
    // SAFETY: a context read, as above.
    let protocol = unsafe { addr_of!((*ctx.sock_addr).protocol).read_volatile() };
    if kind != SOCK_STREAM || (protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP) {
        return None; // no connection that we carry
    }
    // SAFETY: the context is the one that the kernel gave us.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the value is read once, below; an update replaces the entry, it does not edit it.
    let rules = unsafe { PODS.get(cookie) }?;
    Some((cookie, rules))
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, cookie: u64, rules: &OutboundRules, destination: Address) -> bool {
    let verdict = verdict(ctx, cookie, rules, destination);
    count(&CONNECT_VERDICTS, verdict.index());
    // Everything that is neither bound to `lo` nor exempt for a reason we know is refused.
    !matches!(verdict, ConnectVerdict::BindFailed)
}

#[inline(always)]
fn verdict(
    ctx: &SockAddrContext,
    cookie: u64,
    rules: &OutboundRules,
    destination: Address,
) -> ConnectVerdict {
    if destination.is_loopback() || destination.is_unspecified() {
        return ConnectVerdict::Loopback;
    }
    // Read once: of two reads the compiler makes one that the verifier does not follow (LLVM 22).
    // SAFETY: a context read, as above.
    let socket = unsafe { addr_of!((*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile() };
    if socket.is_null() {
        return ConnectVerdict::BindFailed;
    }
    if is_ours(socket) {
        return ConnectVerdict::OwnSocket;
    }
    if holds_address(&rules.addresses, &destination) {
        // A socket bound to `lo` that dials the pod's own address would never be answered.
        return ConnectVerdict::OwnAddress;
    }
    if holds_port(&rules.excluded_ports, port(ctx)) {
        return ConnectVerdict::ExcludedPort;
    }
    if rules.has_cidrs != 0 {
        let key = CidrKey {
            cookie,
            address: destination,
        };
        if CIDRS.get(Key::new(CIDR_COOKIE_BITS + 128, key)).is_some() {
            return ConnectVerdict::ExcludedCidr;
        }
    }
    if bind_to_lo(ctx, socket) {
        ConnectVerdict::Captured
    } else {
        ConnectVerdict::BindFailed
    }
}

/// Whether the node process tagged the socket. Nobody else can: the map is its own.
#[inline(always)]
pub(crate) fn is_ours(socket: *mut bpf_sock) -> bool {
    // SAFETY: the verifier knows the pointer for a socket and the map for socket storage.
    let tag = unsafe {
        bpf_sk_storage_get(
            addr_of!(OURS).cast_mut().cast(),
            socket.cast(),
            null_mut(),
            0,
        )
    };
    !tag.is_null()
}

/// Leaves the socket no way out but `lo`, where `sk_lookup` waits for it.
#[inline(always)]
fn bind_to_lo(ctx: &SockAddrContext, socket: *mut bpf_sock) -> bool {
    // A second connect of the same socket is bound already, and an application without CAP_NET_RAW
    // may not bind a bound socket again, not even through us (6.18: EPERM).
    // SAFETY: the verifier knows the pointer for a socket and checks the read.
    if unsafe { addr_of!((*socket).bound_dev_if).read_volatile() } == LOOPBACK_IFINDEX {
        return true;
    }
    // PROTOCOL.md#bind-by-index
    // By index, which is the kernel's: a pod that may rename devices could call another one `lo`.
    let mut index = LOOPBACK_IFINDEX;
    // SAFETY: the pointer and the length are those of `index`, which lives through the call.
    let refused = unsafe {
        bpf_setsockopt(
            ctx.as_ptr(),
            SOL_SOCKET,
            SO_BINDTOIFINDEX,
            (&raw mut index).cast(),
            INDEX_BYTES,
        )
    };
    refused == 0
}

/// The destination's port in host order; of `recvmsg` and `getpeername` the peer's.
#[inline(always)]
pub(crate) fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: a context read, as above.
    let port = unsafe { addr_of!((*ctx.sock_addr).user_port).read_volatile() };
    // The low half holds the port in network order.
    #[expect(
        clippy::as_conversions,
        clippy::cast_possible_truncation,
        reason = "the low half"
    )]
    u16::from_be(port as u16)
}

/// The destination, of `recvmsg` and `getpeername` the peer, of an IPv4 hook.
#[inline(always)]
pub(crate) fn address_v4(ctx: &SockAddrContext) -> Address {
    // SAFETY: a context read, as above.
    Address::from_v4(unsafe { addr_of!((*ctx.sock_addr).user_ip4).read_volatile() })
}

/// Likewise of an IPv6 hook, which also sees v4-mapped ones.
#[inline(always)]
pub(crate) fn address_v6(ctx: &SockAddrContext) -> Address {
    // SAFETY: context reads, as above, one word each.
    Address(unsafe {
        let words = addr_of!((*ctx.sock_addr).user_ip6).cast::<u32>();
        [
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ]
    })
}

pub(crate) const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
pub(crate) const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
pub(crate) const IPPROTO_MPTCP: u32 = 262;
pub(crate) const SOL_SOCKET: i32 = 1;
pub(crate) const SO_BINDTOIFINDEX: i32 = 62;
pub(crate) const INDEX_BYTES: i32 = 4;
/// The kernel gives every network namespace's `lo` this index.
pub(crate) const LOOPBACK_IFINDEX: u32 = 1;
