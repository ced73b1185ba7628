//! What a pod wants of its capture: takes addresses, ports and networks, gives the rules of the
//! kernel side. It never silently shortens a list.

use std::net::IpAddr;
use std::sync::Arc;

use ebpf_abi::{
    Address, CIDR_COOKIE_BITS, CIDR_EXCLUDED, CIDR_INBOUND, CIDR_JUDGED, CidrKey, InboundRules,
    MAX_ADDRESSES, MAX_PORTS, OutboundRules, PLAINTEXT_DROP, PLAINTEXT_PASS, PLAINTEXT_PROXY,
};
use ipnet::IpNet;

use super::{Error, NetnsCookie};

/// What the kernel side must know of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSettings {
    /// The pod's own addresses: traffic to them stays in the pod.
    pub addresses: Vec<IpAddr>,
    /// What happens to connections from outside that are not HBONE.
    pub plaintext: PlaintextVerdict,
    /// Destination ports that are not captured.
    pub excluded_outbound_ports: Vec<u16>,
    /// Destination networks that are not captured.
    pub excluded_outbound_cidrs: Vec<IpNet>,
    /// Ports of the pod that are reached without us.
    pub excluded_inbound_ports: Vec<u16>,
    /// Sources that reach the pod without us.
    pub excluded_inbound_cidrs: Vec<IpNet>,
    /// Sources whose plaintext comes to us also under [`PlaintextVerdict::Drop`].
    pub judged_sources: Vec<IpAddr>,
    /// Its questions to resolvers are captured, if those of any pod are.
    pub dns: bool,
}

/// Where a pod's questions to resolvers are answered, if they are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StandIns {
    /// The port of all stand-ins.
    pub(super) port: u16,
    /// Whether the pod's `lo` speaks IPv6.
    pub(super) v6: bool,
}

/// What happens to connections from outside that are not HBONE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlaintextVerdict {
    /// Refused at the SYN.
    #[default]
    Drop,
    /// Given to the plaintext listener.
    Proxy,
    /// Straight to the application.
    Pass,
}

impl PodSettings {
    /// Whether anything is not to be captured.
    pub(super) fn excludes_anything(&self) -> bool {
        let Self {
            addresses: _,
            plaintext: _,
            excluded_outbound_ports,
            excluded_outbound_cidrs,
            excluded_inbound_ports,
            excluded_inbound_cidrs,
            judged_sources: _,
            dns: _,
        } = self;
        !(excluded_outbound_ports.is_empty()
            && excluded_outbound_cidrs.is_empty()
            && excluded_inbound_ports.is_empty()
            && excluded_inbound_cidrs.is_empty())
    }

    /// The pod's own addresses in canonical form.
    pub(super) fn own_addresses(&self) -> Arc<[IpAddr]> {
        self.addresses
            .iter()
            .map(|address| address.to_canonical())
            .collect()
    }

    /// `dns` is where questions are answered.
    pub(super) fn outbound(&self, dns: StandIns) -> Result<OutboundRules, Error> {
        Ok(OutboundRules {
            addresses: self.address_slots()?,
            excluded_ports: port_slots("excluded outbound ports", &self.excluded_outbound_ports)?,
            has_cidrs: u32::from(!self.excluded_outbound_cidrs.is_empty()),
            dns: self.dns_port(dns),
            dns_v6: u32::from(dns.v6),
        })
    }

    /// With the fields that are not the pod's to choose taken from `base`.
    pub(super) fn inbound(
        &self,
        base: &InboundRules,
        cookie: NetnsCookie,
        dns: StandIns,
    ) -> Result<InboundRules, Error> {
        Ok(InboundRules {
            addresses: self.address_slots()?,
            excluded_ports: port_slots("excluded inbound ports", &self.excluded_inbound_ports)?,
            plaintext: match self.plaintext {
                PlaintextVerdict::Drop => PLAINTEXT_DROP,
                PlaintextVerdict::Proxy => PLAINTEXT_PROXY,
                PlaintextVerdict::Pass => PLAINTEXT_PASS,
            },
            workers: base.workers,
            sysctls_turned_on: base.sysctls_turned_on,
            dns: self.dns_port(dns),
            cidrs: match (&self.excluded_inbound_cidrs[..], &self.judged_sources[..]) {
                ([], []) => 0,
                _ => inbound_cookie(cookie),
            },
        })
    }

    /// Prefix length, data and meaning of every network that is not like the others.
    pub(super) fn cidrs(&self, cookie: NetnsCookie) -> Vec<(u32, CidrKey, u8)> {
        let outbound = cookie.0;
        let inbound = inbound_cookie(cookie);
        let excluded = |network: &IpNet, cookie| {
            let bits = match network {
                IpNet::V4(network) => 96 + u32::from(network.prefix_len()),
                IpNet::V6(network) => u32::from(network.prefix_len()),
            };
            let address = address(network.network());
            let key = CidrKey { cookie, address };
            (CIDR_COOKIE_BITS + bits, key, CIDR_EXCLUDED)
        };
        let judged = |source: &IpAddr| {
            let key = CidrKey {
                cookie: inbound,
                address: address(*source),
            };
            (CIDR_COOKIE_BITS + 128, key, CIDR_JUDGED)
        };
        let outbounds = self.excluded_outbound_cidrs.iter();
        let inbounds = self.excluded_inbound_cidrs.iter();
        // The longest prefix counts: whoever is in an excluded network would be judged all the same.
        let is_excluded = |source: &IpAddr| {
            let mut networks = self.excluded_inbound_cidrs.iter();
            networks.any(|network| holds(network, *source))
        };
        let judges = self.judged_sources.iter();
        let judges = judges.filter(|source| !is_excluded(source));
        outbounds
            .map(|network| excluded(network, outbound))
            .chain(inbounds.map(|network| excluded(network, inbound)))
            .chain(judges.map(judged))
            .collect()
    }

    fn dns_port(&self, dns: StandIns) -> u32 {
        if self.dns { dns.port.into() } else { 0 }
    }

    fn address_slots(&self) -> Result<[Address; MAX_ADDRESSES], Error> {
        let mut slots = [Address::default(); MAX_ADDRESSES];
        if self.addresses.len() > MAX_ADDRESSES {
            return Err(Error::TooMany {
                what: "addresses",
                count: self.addresses.len(),
                max: MAX_ADDRESSES,
            });
        }
        for (slot, own) in slots.iter_mut().zip(&self.addresses) {
            *slot = address(*own);
        }
        Ok(slots)
    }
}

/// Whether a network holds an address as the kernel side sees both: one of IPv6 may hold IPv4.
fn holds(network: &IpNet, address: IpAddr) -> bool {
    match (network, address) {
        (IpNet::V6(network), IpAddr::V4(address)) => network.contains(&address.to_ipv6_mapped()),
        _ => network.contains(&address),
    }
}

/// The cookie that a pod's sources have in the map of networks.
pub(super) const fn inbound_cookie(cookie: NetnsCookie) -> u64 {
    cookie.0 | CIDR_INBOUND
}

fn port_slots(what: &'static str, ports: &[u16]) -> Result<[u16; MAX_PORTS], Error> {
    if ports.len() > MAX_PORTS {
        return Err(Error::TooMany {
            what,
            count: ports.len(),
            max: MAX_PORTS,
        });
    }
    let mut slots = [0; MAX_PORTS];
    for (slot, port) in slots.iter_mut().zip(ports) {
        *slot = *port;
    }
    Ok(slots)
}

/// As the kernel's contexts show it: network order, IPv4 in its v4-mapped form.
pub(super) fn address(ip: IpAddr) -> Address {
    let octets = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let mut words = [0; 4];
    let (chunks, _) = octets.as_chunks::<4>();
    for (word, chunk) in words.iter_mut().zip(chunks) {
        *word = u32::from_ne_bytes(*chunk);
    }
    Address(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v4_addresses_take_their_mapped_form() {
        let v4 = address("10.1.2.3".parse().unwrap());
        assert_eq!(v4, Address::from_v4(u32::from_ne_bytes([10, 1, 2, 3])));
        assert_eq!(v4, address("::ffff:10.1.2.3".parse().unwrap()));
    }

    #[test]
    fn a_v4_prefix_counts_the_mapped_bits_and_the_cookie() {
        let settings = PodSettings {
            excluded_outbound_cidrs: vec![
                "10.0.0.0/8".parse().unwrap(),
                "fd00::/48".parse().unwrap(),
                "10.1.2.3/0".parse().unwrap(),
            ],
            ..PodSettings::default()
        };
        let keys = settings.cidrs(NetnsCookie(7));
        assert_eq!(
            keys.iter().map(|(bits, ..)| *bits).collect::<Vec<_>>(),
            [64 + 96 + 8, 64 + 48, 64 + 96]
        );
        assert!(keys.iter().all(|(_, key, _)| key.cookie == 7));
        // The whole of IPv4 excludes nothing of IPv6.
        assert_eq!(keys[2].1.address, address("0.0.0.0".parse().unwrap()));
    }

    #[test]
    fn sources_are_told_from_destinations_and_an_exclusion_beats_a_judgement() {
        let settings = PodSettings {
            excluded_outbound_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
            excluded_inbound_cidrs: ["10.1.2.3/32", "10.9.0.0/16"]
                .map(|network| network.parse().unwrap())
                .into(),
            judged_sources: ["10.1.2.3", "10.9.0.1", "fd00::1"]
                .map(|ip| ip.parse().unwrap())
                .into(),
            ..PodSettings::default()
        };
        let keys = settings.cidrs(NetnsCookie(7));
        let of = |ip: &str| -> Vec<_> {
            let is_it = |(_, key, _): &&(u32, CidrKey, u8)| {
                key.cookie == 7 | 1 << 63 && key.address == address(ip.parse().unwrap())
            };
            let found = keys.iter().filter(is_it);
            found.map(|(bits, _, meaning)| (*bits, *meaning)).collect()
        };
        assert_eq!(of("10.1.2.3"), [(64 + 128, CIDR_EXCLUDED)]);
        assert_eq!(of("10.9.0.0"), [(64 + 96 + 16, CIDR_EXCLUDED)]);
        assert_eq!(of("10.9.0.1"), [], "its network is excluded");
        assert_eq!(of("fd00::1"), [(64 + 128, CIDR_JUDGED)]);
        assert_eq!(of("10.0.0.0"), [], "a destination is no source");
        let cidrs = |settings: &PodSettings| {
            let base = InboundRules::default();
            let rules = settings.inbound(&base, NetnsCookie(7), StandIns::default());
            rules.unwrap().cidrs
        };
        assert_eq!(cidrs(&settings), 7 | 1 << 63);
        assert_eq!(cidrs(&PodSettings::default()), 0, "no lookup");
    }

    #[test]
    fn a_list_that_does_not_fit_is_an_error() {
        let ports = PodSettings {
            excluded_outbound_ports: (1..=17).collect(),
            ..PodSettings::default()
        };
        assert!(matches!(
            ports.outbound(StandIns::default()),
            Err(Error::TooMany { max: 16, .. })
        ));
        let addresses = PodSettings {
            addresses: (1..=9).map(|n| IpAddr::from([10, 0, 0, n])).collect(),
            ..PodSettings::default()
        };
        assert!(matches!(
            addresses.outbound(StandIns::default()),
            Err(Error::TooMany { max: 8, .. })
        ));
        assert!(matches!(
            addresses.inbound(
                &InboundRules::default(),
                NetnsCookie(7),
                StandIns::default()
            ),
            Err(Error::TooMany { max: 8, .. })
        ));
    }
}
