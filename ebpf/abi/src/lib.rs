//! What the kernel programs and the node process agree on: names of maps and programs, keys, values
//! and verdicts. It takes nothing, gives plain `repr(C)` data, and never touches a kernel or a socket.
#![no_std]
#![warn(missing_docs)]

mod verdict;

pub use verdict::{ConnectVerdict, LookupVerdict};

/// The version of everything in this crate that outlives a process in the pins. It grows whenever a
/// map's name, shape or meaning, or a program's attach point, changes.
pub const ABI_VERSION: u32 = 5;

/// Pods that one node process can hold; one more is refused, never captured by halves.
pub const MAX_PODS: u32 = 1024;
/// Excluded networks of all pods of one node process together.
pub const MAX_CIDRS: u32 = 16_384;
/// Addresses of one pod.
pub const MAX_ADDRESSES: usize = 8;
/// Excluded ports of one pod in one direction.
pub const MAX_PORTS: usize = 16;
/// Workers of one node process, each with its own listeners.
pub const MAX_WORKERS: u32 = 64;

/// Resolvers that the pods of one node process may ask at a time; the one that was asked longest ago
/// makes room. No pod has more than two times [`RESOLVER_SLOTS`] of them.
pub const MAX_RESOLVERS: u32 = 16_384;

// PROTOCOL.md#ports
/// Where DNS is asked.
pub const DNS_PORT: u16 = 53;
/// Where HBONE arrives.
pub const HBONE_PORT: u16 = 15008;

/// Names of the maps, as in the object and in the pins.
pub mod map {
    /// `u64` netns cookie -> [`super::OutboundRules`]: the pods that `connect` captures.
    pub const PODS: &str = "PODS";
    /// [`super::CidrKey`] (longest prefix) -> `u8`: networks that are not captured, or whose plaintext
    /// is judged; one of the `CIDR_*` constants.
    pub const CIDRS: &str = "CIDRS";
    /// Socket storage: the sockets of the node process itself, which `connect` lets through.
    pub const OURS: &str = "OURS";
    /// [`super::ResolverKey`] -> [`super::Address`]: the resolvers that stand-ins stand for.
    pub const RESOLVERS: &str = "RESOLVERS";
    /// Per CPU, by [`super::ConnectVerdict`]: what `connect` and `setsockopt` decided.
    pub const CONNECT_VERDICTS: &str = "CONNECT_VERDICTS";
    /// One per pod, by [`super::listener_slot`]: the sockets that `sk_lookup` hands connections to.
    pub const LISTENERS: &str = "LISTENERS";
    /// One per pod, one entry, [`super::InboundRules`].
    pub const POD: &str = "POD";
    /// One per pod, per CPU, by [`super::LookupVerdict`]: what `sk_lookup` decided.
    pub const LOOKUP_VERDICTS: &str = "LOOKUP_VERDICTS";
}

/// Names of the programs in the object. None may equal its section's name.
pub mod program {
    /// `cgroup/connect4`.
    pub const CONNECT4: &str = "on_connect4";
    /// `cgroup/connect6`.
    pub const CONNECT6: &str = "on_connect6";
    /// `cgroup/sendmsg4`.
    pub const SENDMSG4: &str = "on_sendmsg4";
    /// `cgroup/sendmsg6`.
    pub const SENDMSG6: &str = "on_sendmsg6";
    /// `cgroup/recvmsg4`.
    pub const RECVMSG4: &str = "on_recvmsg4";
    /// `cgroup/recvmsg6`.
    pub const RECVMSG6: &str = "on_recvmsg6";
    /// `cgroup/getpeername4`.
    pub const GETPEERNAME4: &str = "on_getpeername4";
    /// `cgroup/getpeername6`.
    pub const GETPEERNAME6: &str = "on_getpeername6";
    /// `cgroup/setsockopt`.
    pub const SETSOCKOPT: &str = "on_setsockopt";
    /// `sk_lookup`.
    pub const SK_LOOKUP: &str = "on_sk_lookup";
}

/// An address as the kernel's contexts show it: four words in network order, IPv4 in its
/// v4-mapped form.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// From an IPv4 address in network order.
    pub const fn from_v4(word: u32) -> Self {
        Self([0, 0, V4_MAPPED, word])
    }

    /// `127.0.0.0/8`, also v4-mapped, or `::1`.
    pub const fn is_loopback(&self) -> bool {
        let [a, b, c, d] = self.0;
        match (a, b, c) {
            (0, 0, V4_MAPPED) => u32::from_be(d) >> 24 == 127,
            (0, 0, 0) => u32::from_be(d) == 1,
            _ => false,
        }
    }

    /// `fe80::/10`: it means a device, too, which the hooks do not see.
    pub const fn is_link_local_v6(&self) -> bool {
        let [a, ..] = self.0;
        u32::from_be(a) >> 22 == 0xfe80 >> 6
    }

    /// `0.0.0.0`, also v4-mapped, or `::`: the kernel takes both for loopback.
    pub const fn is_unspecified(&self) -> bool {
        let [a, b, c, d] = self.0;
        a == 0 && b == 0 && (c == 0 || c == V4_MAPPED) && d == 0
    }
}

/// The value of [`map::PODS`]: what `connect` must know of a pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutboundRules {
    /// The pod's own addresses; unused slots are unspecified.
    pub addresses: [Address; MAX_ADDRESSES],
    /// Destination ports that are not captured, in host order; unused slots are 0.
    pub excluded_ports: [u16; MAX_PORTS],
    /// 1 if [`map::CIDRS`] holds networks for this pod, so that the others pay no lookup.
    pub has_cidrs: u32,
    /// Where the pod's questions to resolvers are answered: the port of stand-ins, in host order. 0 if
    /// they are not captured.
    pub dns: u32,
    /// 1 if the pod's `lo` speaks IPv6, so that an IPv6 stand-in is local; else questions to IPv6
    /// resolvers are refused.
    pub dns_v6: u32,
}

/// The value of [`map::POD`]: what `sk_lookup` must know of its pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InboundRules {
    /// The cookie of [`map::CIDRS`] for connections into the pod; 0 if it holds no sources for this pod,
    /// so that the others pay no lookup.
    pub cidrs: u64,
    /// The pod's own addresses; unused slots are unspecified.
    pub addresses: [Address; MAX_ADDRESSES],
    /// Local ports whose connections go straight to the application; unused slots are 0.
    pub excluded_ports: [u16; MAX_PORTS],
    /// How many workers have listeners in [`map::LISTENERS`]; 0: none, everything waits.
    pub workers: u32,
    /// What happens to plaintext from outside: one of the `PLAINTEXT_*` constants.
    pub plaintext: u32,
    /// The sysctls that we turned on in this pod, a bit each, and so turn off on release.
    pub sysctls_turned_on: u32,
    /// The same, to tell questions from other datagrams.
    pub dns: u32,
}

/// Plaintext from outside is refused at its SYN; also the meaning of every value not listed here.
pub const PLAINTEXT_DROP: u32 = 0;
/// Plaintext from outside goes to the node process, which judges it.
pub const PLAINTEXT_PROXY: u32 = 1;
/// Plaintext from outside goes straight to the application.
pub const PLAINTEXT_PASS: u32 = 2;

/// The data of a key of [`map::CIDRS`]; the prefix length counts the bits of both fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CidrKey {
    /// The pod's netns cookie; with [`CIDR_INBOUND`] for sources of connections into it.
    pub cookie: u64,
    /// The network, or the address looked up.
    pub address: Address,
}

/// Bits of [`CidrKey::cookie`], always part of the prefix.
pub const CIDR_COOKIE_BITS: u32 = u64::BITS;
/// In [`CidrKey::cookie`]: sources of connections into the pod. The kernel counts cookies from 1.
pub const CIDR_INBOUND: u64 = 1 << 63;
/// Past the mesh; also the meaning of every value not listed here.
pub const CIDR_EXCLUDED: u8 = 1;
/// Plaintext from there is judged, also where that of others is refused at its SYN.
pub const CIDR_JUDGED: u8 = 2;

/// What a listener is for.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerKind {
    /// The pod's own connections.
    Outbound = 0,
    /// HBONE from other nodes.
    Hbone = 1,
    /// Plaintext from outside.
    Plaintext = 2,
    /// The pod's questions to resolvers, over UDP.
    Dns = 3,
}

impl ListenerKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Outbound, Self::Hbone, Self::Plaintext, Self::Dns];
}

/// Entries of [`map::LISTENERS`].
pub const LISTENER_SLOTS: u32 = 4 * MAX_WORKERS;

/// Where a worker's listener of this kind is in [`map::LISTENERS`]. `worker` is below
/// [`MAX_WORKERS`].
pub const fn listener_slot(kind: ListenerKind, worker: u32) -> u32 {
    #[expect(clippy::as_conversions, reason = "a fieldless enum of u32")]
    let kind = kind as u32;
    kind * MAX_WORKERS + worker
}

/// Whether the list holds the address; an unspecified address is in no list.
pub fn holds_address(list: &[Address; MAX_ADDRESSES], address: &Address) -> bool {
    !address.is_unspecified() && list.contains(address)
}

/// Whether the list holds the port; port 0 is in no list.
pub fn holds_port(list: &[u16; MAX_PORTS], port: u16) -> bool {
    port != 0 && list.contains(&port)
}

// PROTOCOL.md#dns-stand-in
/// The key of [`map::RESOLVERS`]. A datagram to a resolver is sent to the resolver's *stand-in*
/// instead, an address that is local to every pod: `127.64.0.0/10` and a range of `fd15:53::/96`.
/// Its number holds a slot and some bits of the resolver's hash, so that the stand-in of a resolver
/// that made room in the slot does not stand for the one that took it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolverKey {
    /// The pod's netns cookie: what one pod asks is no matter of another's.
    pub cookie: u64,
    /// The slot of the stand-in's number.
    pub slot: u32,
    /// 1 for an IPv4 stand-in.
    pub v4: u32,
}

/// Stand-ins of each family.
pub const STAND_INS: u32 = 1 << 22;
/// Of which a pod can use so many at a time. What it uses beyond takes the place of its own, never of
/// another pod's.
pub const RESOLVER_SLOTS: u32 = 1 << 7;
/// The network of the IPv6 ones, which must be local to a pod: `fd15:53::/106`.
pub const STAND_INS_V6: (u128, u8) = (0xfd15_0053 << 96, 106);
/// How many slots a resolver looks at for a free one, before it takes the first.
pub const STAND_IN_TRIES: u32 = 4;

impl ResolverKey {
    /// Where the resolver behind this stand-in is found. `None` for every other address.
    pub const fn of(cookie: u64, stand_in: &Address) -> Option<Self> {
        match stand_in.stand_in_number() {
            Some(number) => Some(Self {
                cookie,
                slot: number % RESOLVER_SLOTS,
                v4: if stand_in.is_v4() { 1 } else { 0 },
            }),
            None => None,
        }
    }
}

impl Address {
    /// The stand-in of this number, in the family of the address.
    pub const fn stand_in(&self, number: u32) -> Self {
        let number = number % STAND_INS;
        if self.is_v4() {
            Self::from_v4((STAND_IN_V4 | number).to_be())
        } else {
            Self([STAND_IN_V6.to_be(), 0, 0, number.to_be()])
        }
    }

    /// The number of a stand-in; `None` for every other address.
    pub const fn stand_in_number(&self) -> Option<u32> {
        let [a, b, c, d] = self.0;
        let d = u32::from_be(d);
        if self.is_v4() {
            return if d & !(STAND_INS - 1) == STAND_IN_V4 {
                Some(d & (STAND_INS - 1))
            } else {
                None
            };
        }
        if a == STAND_IN_V6.to_be() && b == 0 && c == 0 && d < STAND_INS {
            Some(d)
        } else {
            None
        }
    }

    /// The number of this resolver's stand-in when it takes the slot so many after its own.
    pub const fn stand_in_at(&self, step: u32) -> u32 {
        let hash = self.stand_in_hash();
        let slot = hash.wrapping_add(step) % RESOLVER_SLOTS;
        hash - hash % RESOLVER_SLOTS + slot
    }

    /// Whether the stand-in of this number is that of this resolver, and not of one that was in its slot
    /// before.
    pub const fn is_behind(&self, number: u32) -> bool {
        number / RESOLVER_SLOTS == self.stand_in_hash() / RESOLVER_SLOTS
    }

    const fn stand_in_hash(&self) -> u32 {
        let [a, b, c, d] = self.0;
        // A multiplicative hash: well spread is enough, as each pod has numbers of its own.
        let mut hash = a;
        hash = (hash ^ b).wrapping_mul(0x9e37_79b1);
        hash = (hash ^ (hash >> 15) ^ c).wrapping_mul(0x85eb_ca77);
        hash = (hash ^ (hash >> 13) ^ d).wrapping_mul(0xc2b2_ae3d);
        (hash ^ (hash >> 16)) % STAND_INS
    }

    /// Whether it is an IPv4 address.
    pub const fn is_v4(&self) -> bool {
        let [a, b, c, _] = self.0;
        a == 0 && b == 0 && c == V4_MAPPED
    }
}

/// `127.64.0.0`.
const STAND_IN_V4: u32 = 0x7f40_0000;
/// `fd15:53::`.
const STAND_IN_V6: u32 = 0xfd15_0053;
const V4_MAPPED: u32 = 0xffff_u32.to_be();

const _: () = {
    // No padding: the kernel compares and copies whole values.
    assert!(size_of::<Address>() == 16);
    assert!(size_of::<OutboundRules>() == 16 * MAX_ADDRESSES + 2 * MAX_PORTS + 12);
    assert!(size_of::<InboundRules>() == 16 * MAX_ADDRESSES + 2 * MAX_PORTS + 24);
    assert!(size_of::<CidrKey>() == 24);
    assert!(size_of::<ResolverKey>() == 16);
};

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for plain data is an unsafe trait")]
mod user {
    use super::{Address, CidrKey, InboundRules, OutboundRules, ResolverKey};

    // SAFETY: `repr(C)` of integers without padding (asserted above), valid for every bit pattern.
    unsafe impl aya::Pod for CidrKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for InboundRules {}
    // SAFETY: as above.
    unsafe impl aya::Pod for OutboundRules {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ResolverKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Address {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v6(segments: [u16; 8]) -> Address {
        let mut words = [0u32; 4];
        for (word, pair) in words.iter_mut().zip(segments.chunks(2)) {
            *word = (u32::from(pair[0]) << 16 | u32::from(pair[1])).to_be();
        }
        Address(words)
    }

    #[test]
    fn loopback_and_unspecified_are_known_in_every_form() {
        let v4 = |a, b, c, d| Address::from_v4(u32::from_be_bytes([a, b, c, d]).to_be());
        assert!(v4(127, 0, 0, 1).is_loopback());
        assert!(v4(127, 255, 1, 2).is_loopback());
        assert!(v6([0, 0, 0, 0, 0, 0, 0, 1]).is_loopback());
        assert!(!v4(128, 0, 0, 1).is_loopback());
        assert!(!v6([0, 0, 0, 0, 0, 0, 0, 2]).is_loopback());
        assert!(!v6([0xfd00, 0, 0, 0, 0, 0, 0, 1]).is_loopback());
        assert!(v6([0xfe80, 0, 0, 0, 0, 0, 0, 1]).is_link_local_v6());
        assert!(v6([0xfebf, 0, 0, 0, 0, 0, 0, 1]).is_link_local_v6());
        assert!(!v6([0xfec0, 0, 0, 0, 0, 0, 0, 1]).is_link_local_v6());
        assert!(!v4(254, 128, 0, 1).is_link_local_v6());
        assert!(v4(0, 0, 0, 0).is_unspecified());
        assert!(v6([0; 8]).is_unspecified());
        assert!(!v4(0, 0, 0, 1).is_unspecified());
        assert_eq!(v6([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1]), v4(127, 0, 0, 1));
    }

    #[test]
    fn a_stand_in_is_known_by_its_number_and_nothing_else_is_one() {
        let v4 = Address::from_v4(u32::from_be_bytes([10, 96, 0, 10]).to_be());
        let v6 = v6([0xfd00, 0, 0, 0, 0, 0, 0, 10]);
        for resolver in [v4, v6] {
            for number in [0, 1, resolver.stand_in_at(0), STAND_INS - 1] {
                let stand_in = resolver.stand_in(number);
                assert_eq!(stand_in.stand_in_number(), Some(number));
                assert_eq!(stand_in.is_v4(), resolver.is_v4());
            }
            assert_eq!(resolver.stand_in_number(), None);
        }
        assert!(v4.stand_in(7).is_loopback());
        let (network, bits) = STAND_INS_V6;
        let Address([a, b, c, d]) = v6.stand_in(0);
        assert_eq!([a, b, c, d].map(u32::from_be), [0xfd15_0053, 0, 0, 0]);
        assert_eq!(network >> 96, 0xfd15_0053);
        assert_eq!(1_u128 << (128 - u32::from(bits)), u128::from(STAND_INS));
        let outside = [[127, 0, 0, 53], [127, 128, 0, 0], [127, 63, 255, 255]];
        for octets in outside {
            let address = Address::from_v4(u32::from_be_bytes(octets).to_be());
            assert_eq!(address.stand_in_number(), None);
        }
    }

    #[test]
    fn a_pod_has_so_many_slots_and_who_took_one_does_not_answer_for_who_had_it() {
        let mut mistaken = 0;
        for host in 0..4096_u32 {
            let resolver = Address::from_v4((0x0a00_0000 + host).to_be());
            let before = Address::from_v4((0x0b00_0000 + host).to_be());
            for step in 0..STAND_IN_TRIES {
                let number = resolver.stand_in_at(step);
                assert!(number < STAND_INS);
                assert!(resolver.is_behind(number));
                mistaken += u32::from(before.is_behind(number));
                let key = ResolverKey::of(7, &resolver.stand_in(number)).unwrap();
                assert!(key.slot < RESOLVER_SLOTS && key.v4 == 1 && key.cookie == 7);
            }
        }
        assert!(mistaken < 16, "{mistaken} of 16384");
        assert_eq!(ResolverKey::of(7, &Address::from_v4(7)), None);
    }

    #[test]
    fn empty_slots_match_nothing() {
        assert!(!holds_address(
            &[Address::default(); MAX_ADDRESSES],
            &Address::default()
        ));
        assert!(!holds_port(&[0; MAX_PORTS], 0));
    }

    #[test]
    fn listener_slots_do_not_overlap() {
        let mut seen = [false; 256];
        for kind in ListenerKind::ALL {
            for worker in 0..MAX_WORKERS {
                let slot = usize::try_from(listener_slot(kind, worker)).unwrap();
                assert!(!seen[slot]);
                seen[slot] = true;
            }
        }
        assert!(seen.iter().all(|slot| *slot));
    }
}
