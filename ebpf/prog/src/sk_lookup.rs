//! `sk_lookup`: takes a packet that looks for a listener in its pod, gives it to one of our
//! listeners, to the application, or to nobody. It never falls through once traffic is ours.

use core::ptr::addr_of;

use aya_ebpf::{
    bindings::{
        BPF_SK_LOOKUP_F_NO_REUSEPORT, BPF_SK_LOOKUP_F_REPLACE, bpf_sk_lookup, sk_action::SK_DROP,
        sk_action::SK_PASS,
    },
    helpers::bpf_get_smp_processor_id,
    maps::lpm_trie::Key,
    programs::SkLookupContext,
};
use ebpf_abi::{
    Address, CIDR_COOKIE_BITS, CIDR_JUDGED, CidrKey, HBONE_PORT, InboundRules, ListenerKind,
    LookupVerdict, MAX_WORKERS, PLAINTEXT_DROP, PLAINTEXT_PASS, PLAINTEXT_PROXY, holds_address,
    holds_port, listener_slot,
};

use crate::maps::{CIDRS, LISTENERS, LOOKUP_VERDICTS, POD, count};

#[inline(always)]
pub(crate) fn steer(ctx: &SkLookupContext) -> u32 {
    // SAFETY: the verifier checks the offset and width of every context read. Volatile, because the
    // kernel translates single-word loads only, and the compiler would join neighbours.
    let protocol = unsafe { addr_of!((*ctx.lookup).protocol).read_volatile() };
    if protocol != IPPROTO_TCP && !asks_resolver(ctx.lookup) {
        return SK_PASS; // other datagrams are not ours
    }
    let Some(rules) = POD.get(0) else {
        return SK_DROP; // an array has its only entry; without rules nothing is admitted
    };
    let verdict = if protocol == IPPROTO_TCP {
        verdict(ctx, rules)
    } else if rules.dns != u32::from(local_port(ctx.lookup)) {
        return SK_PASS; // nor is this
    } else {
        assign(
            ctx,
            rules,
            ListenerKind::Dns,
            LookupVerdict::Dns,
            LookupVerdict::DnsNoListener,
        )
    };
    count(&LOOKUP_VERDICTS, verdict.index());
    match verdict {
        // A listener of ours was assigned.
        LookupVerdict::Outbound
        | LookupVerdict::Hbone
        | LookupVerdict::PlaintextProxied
        | LookupVerdict::Dns => SK_PASS,
        // Nothing was assigned: the kernel looks for the application's listener.
        LookupVerdict::InsidePod
        | LookupVerdict::ExcludedPort
        | LookupVerdict::ExcludedCidr
        | LookupVerdict::PlaintextPassed => SK_PASS,
        // PROTOCOL.md#lo-unanswered
        // Passing would hand it to whatever wildcard listener the application has. On `lo` no reset
        // can be routed back from the foreign address, so the connection waits (6.18).
        LookupVerdict::OutboundNoListener
        // PROTOCOL.md#dns-nobody
        // The kernel says that nobody listens there, which a connected socket is told.
        | LookupVerdict::DnsNoListener
        // To `::1` it can, and the connection is refused at once.
        | LookupVerdict::LoopRefused
        // From outside, the kernel answers a dropped lookup with a reset: refused at once.
        | LookupVerdict::HboneNoListener
        | LookupVerdict::PlaintextDropped
        | LookupVerdict::PlaintextNoListener
        | LookupVerdict::AssignFailed => SK_DROP,
    }
}

#[inline(always)]
fn verdict(ctx: &SkLookupContext, rules: &InboundRules) -> LookupVerdict {
    let (local, remote) = (local_address(ctx.lookup), remote_address(ctx.lookup));
    // SAFETY: a context read, as above.
    let interface = unsafe { addr_of!((*ctx.lookup).ingress_ifindex).read_volatile() };
    if interface == LOOPBACK_IFINDEX {
        if local.is_loopback() || holds_address(&rules.addresses, &local) {
            return LookupVerdict::InsidePod;
        }
        // PROTOCOL.md#untold-address
        // Of IPv6 the answer may come from another device, and would not find a captured socket.
        if local == remote && local.is_v4() {
            return LookupVerdict::InsidePod;
        }
        // PROTOCOL.md#loop-refused
        // Whoever captured it, its peer could never answer it; and it may be our own dial.
        if remote.is_loopback() {
            return LookupVerdict::LoopRefused;
        }
        return assign(
            ctx,
            rules,
            ListenerKind::Outbound,
            LookupVerdict::Outbound,
            LookupVerdict::OutboundNoListener,
        );
    }
    // PROTOCOL.md#self-traffic-ifindex
    // What a pod sends to its own address loops over `lo` but shows the device of that address.
    // From outside the kernel lets no such source in (IPv4), or its answer stays here (IPv6).
    // PROTOCOL.md#untold-address
    if local == remote || holds_address(&rules.addresses, &remote) {
        return LookupVerdict::InsidePod;
    }
    let port = local_port(ctx.lookup);
    if port == HBONE_PORT {
        return assign(
            ctx,
            rules,
            ListenerKind::Hbone,
            LookupVerdict::Hbone,
            LookupVerdict::HboneNoListener,
        );
    }
    if holds_port(&rules.excluded_ports, port) {
        return LookupVerdict::ExcludedPort;
    }
    let mut plaintext = rules.plaintext;
    if rules.cidrs != 0 {
        let key = CidrKey {
            cookie: rules.cidrs,
            address: remote,
        };
        match CIDRS.get(Key::new(CIDR_COOKIE_BITS + 128, key)) {
            // Whether it is admitted is not decided here.
            Some(&CIDR_JUDGED) if plaintext == PLAINTEXT_DROP => plaintext = PLAINTEXT_PROXY,
            Some(&CIDR_JUDGED) | None => {}
            Some(_) => return LookupVerdict::ExcludedCidr,
        }
    }
    match plaintext {
        PLAINTEXT_PASS => LookupVerdict::PlaintextPassed,
        PLAINTEXT_PROXY => assign(
            ctx,
            rules,
            ListenerKind::Plaintext,
            LookupVerdict::PlaintextProxied,
            LookupVerdict::PlaintextNoListener,
        ),
        // PLAINTEXT_DROP, and whatever we do not know.
        _ => LookupVerdict::PlaintextDropped,
    }
}

/// Gives the packet to the listener of this CPU's worker, so that it is accepted where it arrived.
#[inline(always)]
fn assign(
    ctx: &SkLookupContext,
    rules: &InboundRules,
    kind: ListenerKind,
    given: LookupVerdict,
    missing: LookupVerdict,
) -> LookupVerdict {
    let workers = rules.workers;
    if workers == 0 || workers > MAX_WORKERS {
        return missing;
    }
    // SAFETY: the helper only reads the number of the CPU that runs us.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let slot = listener_slot(kind, cpu % workers);
    // PROTOCOL.md#no-reuseport
    // REPLACE: another program of this namespace has no say. NO_REUSEPORT: neither has a process of
    // the pod that joined our listener's port group.
    let flags = BPF_SK_LOOKUP_F_REPLACE | BPF_SK_LOOKUP_F_NO_REUSEPORT;
    match LISTENERS.redirect_sk_lookup(ctx, slot, flags.into()) {
        Ok(()) => given,
        Err(NO_SUCH_ENTRY) => missing,
        Err(_) => LookupVerdict::AssignFailed,
    }
}

/// Whether a datagram was sent inside the pod to what may be a resolver's stand-in.
#[inline(always)]
fn asks_resolver(context: *mut bpf_sk_lookup) -> bool {
    // SAFETY: a context read, as above.
    let interface = unsafe { addr_of!((*context).ingress_ifindex).read_volatile() };
    interface == LOOPBACK_IFINDEX && local_address(context).stand_in_number().is_some()
}

#[inline(always)]
fn local_port(context: *mut bpf_sk_lookup) -> u16 {
    // SAFETY: a context read, as above; this field is in host order.
    let port = unsafe { addr_of!((*context).local_port).read_volatile() };
    #[expect(
        clippy::as_conversions,
        clippy::cast_possible_truncation,
        reason = "a port"
    )]
    {
        port as u16
    }
}

#[inline(always)]
fn local_address(context: *mut bpf_sk_lookup) -> Address {
    // SAFETY: context reads, as above, one word each.
    let (v4, v6) = unsafe {
        (
            addr_of!((*context).local_ip4).read_volatile(),
            words(addr_of!((*context).local_ip6).cast()),
        )
    };
    of_family(context, v4, v6)
}

#[inline(always)]
fn remote_address(context: *mut bpf_sk_lookup) -> Address {
    // SAFETY: context reads, as above, one word each.
    let (v4, v6) = unsafe {
        (
            addr_of!((*context).remote_ip4).read_volatile(),
            words(addr_of!((*context).remote_ip6).cast()),
        )
    };
    of_family(context, v4, v6)
}

/// Both were read, because of a read in either branch the compiler makes one whose offset the verifier
/// does not know; of the other family the kernel gives zeroes.
#[inline(always)]
fn of_family(context: *mut bpf_sk_lookup, v4: u32, v6: Address) -> Address {
    // SAFETY: a context read, as above.
    if unsafe { addr_of!((*context).family).read_volatile() } == AF_INET {
        Address::from_v4(v4)
    } else {
        v6
    }
}

/// # Safety
/// `words` points to an IPv6 address in a program's context.
#[inline(always)]
unsafe fn words(words: *const u32) -> Address {
    // SAFETY: four words in network order, by contract; one load each, as the verifier wants.
    unsafe {
        Address([
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ])
    }
}

const IPPROTO_TCP: u32 = 6;
const AF_INET: u32 = 2;
/// The kernel gives every network namespace's `lo` this index.
const LOOPBACK_IFINDEX: u32 = 1;
/// `-ENOENT`: the slot holds no socket.
const NO_SUCH_ENTRY: i32 = -2;
