//! The kernel side of capture: one entry point per hook, each a call and a verdict. It takes the
//! kernel's context, gives a verdict, and never rewrites an address or judges a policy.
#![no_std]
#![no_main]
#![expect(
    unsafe_code,
    reason = "contexts are raw pointers and helpers are foreign functions"
)]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "one context read is a place and a load of it"
)]

mod connect;
mod dns;
mod maps;
mod setsockopt;
mod sk_lookup;

use aya_ebpf::{
    macros::{cgroup_sock_addr, cgroup_sockopt, sk_lookup},
    programs::{SkLookupContext, SockAddrContext, SockoptContext},
};

/// `cgroup/connect4`: 1 lets the connection go on, 0 refuses it with EPERM.
#[cgroup_sock_addr(connect4)]
pub(crate) fn on_connect4(ctx: SockAddrContext) -> i32 {
    connect::connect4(&ctx).into()
}

/// `cgroup/connect6`: as `connect4`; it also sees v4-mapped destinations.
#[cgroup_sock_addr(connect6)]
pub(crate) fn on_connect6(ctx: SockAddrContext) -> i32 {
    connect::connect6(&ctx).into()
}

/// `cgroup/sendmsg4`: 1 lets the datagram go on, 0 refuses it with EPERM.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn on_sendmsg4(ctx: SockAddrContext) -> i32 {
    dns::ask4(&ctx).into()
}

/// `cgroup/sendmsg6`: likewise.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn on_sendmsg6(ctx: SockAddrContext) -> i32 {
    dns::ask6(&ctx).into()
}

/// `cgroup/recvmsg4`: always 1, the kernel takes nothing else.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn on_recvmsg4(ctx: SockAddrContext) -> i32 {
    dns::show4(&ctx);
    1
}

/// `cgroup/recvmsg6`: likewise.
#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn on_recvmsg6(ctx: SockAddrContext) -> i32 {
    dns::show6(&ctx);
    1
}

/// `cgroup/getpeername4`: likewise.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn on_getpeername4(ctx: SockAddrContext) -> i32 {
    dns::show4(&ctx);
    1
}

/// `cgroup/getpeername6`: likewise.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn on_getpeername6(ctx: SockAddrContext) -> i32 {
    dns::show6(&ctx);
    1
}

/// `cgroup/setsockopt`: 1 lets the call go on or says that it is done, 0 refuses it.
#[cgroup_sockopt(setsockopt)]
pub(crate) fn on_setsockopt(ctx: SockoptContext) -> i32 {
    setsockopt::guard(&ctx).into()
}

/// `sk_lookup`: SK_PASS with or without a listener chosen, or SK_DROP.
#[sk_lookup]
pub(crate) fn on_sk_lookup(ctx: SkLookupContext) -> u32 {
    sk_lookup::steer(&ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses an endless loop, so an object in which a panic is left does not load.
    loop {}
}

// The helpers that we call are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";
