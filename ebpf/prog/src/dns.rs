//! `sendmsg`, `recvmsg`, `getpeername` and the datagram side of `connect`: take a question to a resolver,
//! send it to the resolver's stand-in, which is local to the pod, and show the application the
//! resolver that it asked. They never look at another datagram, or at what one says.

use core::ptr::addr_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, BPF_NOEXIST, bpf_sock, bpf_sock_addr},
    helpers::{bpf_bind, bpf_get_netns_cookie, bpf_set_retval},
    maps::lpm_trie::Key,
    programs::SockAddrContext,
};
use ebpf_abi::{
    Address, CIDR_COOKIE_BITS, CidrKey, ConnectVerdict, DNS_PORT, OutboundRules, ResolverKey,
    STAND_IN_TRIES, holds_address, holds_port,
};

use crate::{
    connect::{LOOPBACK_IFINDEX, address_v4, address_v6, is_datagram, is_ours, port},
    maps::{CIDRS, CONNECT_VERDICTS, PODS, RESOLVERS, count},
};

/// `sendmsg4`: 1 goes on, 0 refuses.
#[inline(always)]
pub(crate) fn ask4(ctx: &SockAddrContext) -> bool {
    let put = |stand_in| put_v4(ctx, stand_in);
    ask(ctx, || address_v4(ctx), put, |_, _, _| true)
}

/// `sendmsg6`: likewise, also for v4-mapped resolvers.
#[inline(always)]
pub(crate) fn ask6(ctx: &SockAddrContext) -> bool {
    let put = |stand_in| put_v6(ctx, stand_in);
    ask(ctx, || address_v6(ctx), put, |_, _, _| true)
}

/// `connect4` of a datagram socket: 1 goes on, 0 refuses.
#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> bool {
    let put = |stand_in| put_v4(ctx, stand_in);
    ask(
        ctx,
        || address_v4(ctx),
        put,
        |rules, resolver, socket| speaks_as_pod(rules, resolver, |own| bind_v4(ctx, socket, own)),
    )
}

/// `connect6` of a datagram socket: likewise, also for v4-mapped resolvers.
#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrContext) -> bool {
    let put = |stand_in| put_v6(ctx, stand_in);
    ask(
        ctx,
        || address_v6(ctx),
        put,
        |rules, resolver, socket| speaks_as_pod(rules, resolver, |own| bind_v6(ctx, socket, own)),
    )
}

/// `recvmsg4` and `getpeername4`: the resolver takes the place of its stand-in.
#[inline(always)]
pub(crate) fn show4(ctx: &SockAddrContext) {
    if let Some(resolver) = shown(ctx, || address_v4(ctx)) {
        put_v4(ctx, resolver);
        put_port(ctx, DNS_PORT.into());
    }
}

/// `recvmsg6` and `getpeername6`: likewise, also for v4-mapped addresses.
#[inline(always)]
pub(crate) fn show6(ctx: &SockAddrContext) {
    if let Some(resolver) = shown(ctx, || address_v6(ctx)) {
        put_v6(ctx, resolver);
        put_port(ctx, DNS_PORT.into());
    }
}

#[inline(always)]
fn ask(
    ctx: &SockAddrContext,
    resolver: impl Fn() -> Address,
    put: impl Fn(Address),
    reaches: impl Fn(&OutboundRules, &Address, *mut bpf_sock) -> bool,
) -> bool {
    // Every datagram of the host that names its destination comes through here: what is not
    // a question leaves at once.
    if port(ctx) != DNS_PORT {
        return true;
    }
    // SAFETY: the context is the one that the kernel gave us.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the value is read once, here; an update replaces the entry, it does not edit it.
    let Some(rules) = (unsafe { PODS.get(cookie) }) else {
        return true;
    };
    let resolver = resolver();
    // Read once: of two reads the compiler makes one that the verifier does not follow (LLVM 22).
    // SAFETY: the verifier checks the offset and width of every context read.
    let socket = unsafe { addr_of!((*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile() };
    if !is_captured(socket, cookie, rules, &resolver) {
        return true;
    }
    let stand_in = if rules.dns_v6 != 0 || resolver.is_v4() {
        stand_in(cookie, &resolver)
    } else {
        // Where no IPv6 address is local, its stand-in would leave the pod.
        None
    };
    let verdict = if stand_in.is_some() {
        ConnectVerdict::DnsCaptured
    } else {
        ConnectVerdict::DnsRefused
    };
    count(&CONNECT_VERDICTS, verdict.index());
    stand_in.is_some_and(|stand_in| {
        if !reaches(rules, &resolver, socket) {
            return false;
        }
        put(stand_in);
        put_port(ctx, rules.dns);
        true
    })
}

/// Whether the question is one of a pod whose questions are captured, and nothing exempts it.
// PROTOCOL.md#dns-stand-in
#[inline(always)]
fn is_captured(
    socket: *mut bpf_sock,
    cookie: u64,
    rules: &OutboundRules,
    resolver: &Address,
) -> bool {
    if rules.dns == 0
        || resolver.is_loopback()
        || resolver.is_unspecified()
        || resolver.is_link_local_v6()
        || resolver.stand_in_number().is_some()
        || holds_address(&rules.addresses, resolver)
        || holds_port(&rules.excluded_ports, DNS_PORT)
    {
        return false;
    }
    if !socket.is_null() {
        // What is bound to a device finds no way to a stand-in.
        // SAFETY: the verifier knows the pointer for a socket and checks the read.
        let device = unsafe { addr_of!((*socket).bound_dev_if).read_volatile() };
        // What speaks from a resolver's port is a resolver, and may answer one that asked it from there.
        // SAFETY: likewise; this field is in host order.
        let from = unsafe { addr_of!((*socket).src_port).read_volatile() };
        if (device != 0 && device != LOOPBACK_IFINDEX)
            || from == u32::from(DNS_PORT)
            || is_ours(socket)
        {
            return false;
        }
    }
    if rules.has_cidrs != 0 {
        let key = CidrKey {
            cookie,
            address: *resolver,
        };
        if CIDRS.get(Key::new(CIDR_COOKIE_BITS + 128, key)).is_some() {
            return false;
        }
    }
    true
}

/// Gives a socket that connects the address that it would have without us: some connect only to learn
/// it, and never ask. False when the pod has none of the resolver's family, and so no way to it.
// PROTOCOL.md#dns-stand-in
#[inline(always)]
fn speaks_as_pod(rules: &OutboundRules, resolver: &Address, bind: impl Fn(&Address)) -> bool {
    // Chosen without leaving the loop, and used after it: where a loop has a way out in its middle, the
    // compiler may lay it out so that the verifier of 6.1 takes its end for an endless loop.
    let (mut known, mut chosen) = (false, Address([0; 4]));
    for own in &rules.addresses {
        let set = !own.is_unspecified();
        known |= set;
        if set && chosen.is_unspecified() && own.is_v4() == resolver.is_v4() {
            chosen = *own;
        }
    }
    if !chosen.is_unspecified() {
        bind(&chosen);
        return true;
    }
    if known {
        // SAFETY: the helper takes any number.
        unsafe { bpf_set_retval(NETWORK_UNREACHABLE) };
    }
    // Of a pod whose settings are not known we say nothing.
    !known
}

/// What is bound stays so, and what cannot be bound shows the pod's loopback address.
#[inline(always)]
fn bind_v4(ctx: &SockAddrContext, socket: *mut bpf_sock, own: &Address) {
    if socket.is_null() {
        return;
    }
    // SAFETY: the verifier knows the pointer for a socket and checks the reads.
    let bound = unsafe {
        addr_of!((*socket).src_port).read_volatile() | addr_of!((*socket).src_ip4).read_volatile()
    };
    if bound != 0 {
        return;
    }
    let [.., word] = own.0;
    let mut to = SockaddrIn {
        family: AF_INET,
        port: 0,
        address: word,
        zero: [0; 2],
    };
    // SAFETY: the pointer and the length are those of `to`, which lives through the call.
    unsafe { bpf_bind(ctx.sock_addr, (&raw mut to).cast(), SOCKADDR_IN_BYTES) };
}

/// Likewise; an IPv4 address takes its mapped form.
#[inline(always)]
fn bind_v6(ctx: &SockAddrContext, socket: *mut bpf_sock, own: &Address) {
    if socket.is_null() {
        return;
    }
    // SAFETY: the verifier knows the pointer for a socket and checks the read.
    if unsafe { addr_of!((*socket).src_port).read_volatile() } != 0 {
        return;
    }
    let mut to = SockaddrIn6 {
        family: AF_INET6,
        port: 0,
        flow: 0,
        address: own.0,
        scope: 0,
    };
    // SAFETY: the pointer and the length are those of `to`, which lives through the call.
    unsafe { bpf_bind(ctx.sock_addr, (&raw mut to).cast(), SOCKADDR_IN6_BYTES) };
}

/// The resolver's stand-in, which remembers it. None when the kernel has no room for it.
#[inline(always)]
fn stand_in(cookie: u64, resolver: &Address) -> Option<Address> {
    for step in 0..STAND_IN_TRIES {
        let stand_in = resolver.stand_in(resolver.stand_in_at(step));
        let key = ResolverKey::of(cookie, &stand_in)?;
        // SAFETY: the value is copied at once; entries are never edited, only replaced.
        let taken = unsafe { RESOLVERS.get(key) }.copied();
        let ours = match taken {
            Some(other) => other == *resolver,
            None => RESOLVERS.insert(key, resolver, BPF_NOEXIST.into()).is_ok(),
        };
        if ours {
            return Some(stand_in);
        }
    }
    // A pod that asks so many has forgotten most of them; it has only itself to push aside.
    let stand_in = resolver.stand_in(resolver.stand_in_at(0));
    let key = ResolverKey::of(cookie, &stand_in)?;
    let replaced = RESOLVERS.insert(key, resolver, BPF_ANY.into());
    replaced.is_ok().then_some(stand_in)
}

#[inline(always)]
fn shown(ctx: &SockAddrContext, from: impl Fn() -> Address) -> Option<Address> {
    let from = from();
    let number = from.stand_in_number()?;
    // SAFETY: the verifier checks the offset and width of every context read.
    let socket = unsafe { addr_of!((*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile() };
    // We are asked by whoever speaks from there, and not by a resolver.
    if socket.is_null() || is_ours(socket) {
        return None;
    }
    // SAFETY: the context is the one that the kernel gave us.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the value is read once, here; an update replaces the entry, it does not edit it.
    let rules = unsafe { PODS.get(cookie) }?;
    // From another port it is not we who speak, and a stand-in is anybody's in its pod to bind.
    if rules.dns != u32::from(port(ctx)) || !is_datagram(ctx) {
        return None;
    }
    let key = ResolverKey::of(cookie, &from)?;
    // SAFETY: the value is copied at once; entries are never edited, only replaced.
    let resolver = unsafe { RESOLVERS.get(key) }.copied()?;
    resolver.is_behind(number).then_some(resolver)
}

/// The other side's port, given in host order.
#[inline(always)]
fn put_port(ctx: &SockAddrContext, port: u32) {
    #[expect(
        clippy::as_conversions,
        clippy::cast_possible_truncation,
        reason = "a port"
    )]
    let port = (port as u16).to_be();
    // SAFETY: the verifier checks the offset and width of every context write.
    unsafe { (&raw mut (*ctx.sock_addr).user_port).write_volatile(port.into()) };
}

#[inline(always)]
fn put_v4(ctx: &SockAddrContext, address: Address) {
    let [.., word] = address.0;
    // SAFETY: the verifier checks the offset and width of every context write.
    unsafe { (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(word) };
}

#[inline(always)]
fn put_v6(ctx: &SockAddrContext, address: Address) {
    let [a, b, c, d] = address.0;
    let context: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: context writes, as above, one word each.
    unsafe {
        let words = (&raw mut (*context).user_ip6).cast::<u32>();
        words.write_volatile(a);
        words.add(1).write_volatile(b);
        words.add(2).write_volatile(c);
        words.add(3).write_volatile(d);
    }
}

/// `struct sockaddr_in`.
#[repr(C)]
struct SockaddrIn {
    family: u16,
    port: u16,
    address: u32,
    zero: [u32; 2],
}

/// `struct sockaddr_in6`.
#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port: u16,
    flow: u32,
    address: [u32; 4],
    scope: u32,
}

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const SOCKADDR_IN_BYTES: i32 = 16;
const SOCKADDR_IN6_BYTES: i32 = 28;
/// `-ENETUNREACH`.
const NETWORK_UNREACHABLE: i32 = -101;
