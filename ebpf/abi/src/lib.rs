//! What the kernel programs and the node process agree on: names of maps and programs, keys, values
//! and verdicts. It takes nothing, gives plain `repr(C)` data, and never touches a kernel or a socket.
#![no_std]
#![warn(missing_docs)]

mod verdict;

pub use verdict::{ConnectVerdict, LookupVerdict};

/// The version of everything in this crate that outlives a process in the pins. It grows whenever a
/// map's name, shape or meaning, or a program's attach point, changes.
pub const ABI_VERSION: u32 = 3;

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

// PROTOCOL.md#ports
/// Where HBONE arrives.
pub const HBONE_PORT: u16 = 15008;

/// Names of the maps, as in the object and in the pins.
pub mod map {
    /// `u64` netns cookie -> [`super::OutboundRules`]: the pods that `connect` captures.
    pub const PODS: &str = "PODS";
    /// [`super::CidrKey`] (longest prefix) -> `u8`: networks that are not captured.
    pub const CIDRS: &str = "CIDRS";
    /// Socket storage: the sockets of the node process itself, which `connect` lets through.
    pub const OURS: &str = "OURS";
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
}

/// The value of [`map::POD`]: what `sk_lookup` must know of its pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InboundRules {
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
    /// The pod's netns cookie.
    pub cookie: u64,
    /// The network, or the address looked up.
    pub address: Address,
}

/// Bits of [`CidrKey::cookie`], always part of the prefix.
pub const CIDR_COOKIE_BITS: u32 = u64::BITS;

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
}

/// Entries of [`map::LISTENERS`].
pub const LISTENER_SLOTS: u32 = 3 * MAX_WORKERS;

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

const V4_MAPPED: u32 = 0xffff_u32.to_be();

const _: () = {
    // No padding: the kernel compares and copies whole values.
    assert!(size_of::<Address>() == 16);
    assert!(size_of::<OutboundRules>() == 16 * MAX_ADDRESSES + 2 * MAX_PORTS + 4);
    assert!(size_of::<InboundRules>() == 16 * MAX_ADDRESSES + 2 * MAX_PORTS + 12);
    assert!(size_of::<CidrKey>() == 24);
};

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for plain data is an unsafe trait")]
mod user {
    use super::{CidrKey, InboundRules, OutboundRules};

    // SAFETY: `repr(C)` of integers without padding (asserted above), valid for every bit pattern.
    unsafe impl aya::Pod for CidrKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for InboundRules {}
    // SAFETY: as above.
    unsafe impl aya::Pod for OutboundRules {}
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
        assert!(v4(0, 0, 0, 0).is_unspecified());
        assert!(v6([0; 8]).is_unspecified());
        assert!(!v4(0, 0, 0, 1).is_unspecified());
        assert_eq!(v6([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1]), v4(127, 0, 0, 1));
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
        let mut seen = [false; 192];
        for kind in [
            ListenerKind::Outbound,
            ListenerKind::Hbone,
            ListenerKind::Plaintext,
        ] {
            for worker in 0..MAX_WORKERS {
                let slot = usize::try_from(listener_slot(kind, worker)).unwrap();
                assert!(!seen[slot]);
                seen[slot] = true;
            }
        }
        assert!(seen.iter().all(|slot| *slot));
    }
}
