//! Typed handles on the maps: takes a pin or a loaded object, gives the operations that the room needs
//! and checks every shape before use. It never creates a map.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf,
    maps::{
        Array, HashMap, Map, MapData, MapError, MapType, PerCpuArray, SockMap,
        lpm_trie::{Key, LpmTrie},
    },
};
use ebpf_abi::{
    Address, CidrKey, ConnectVerdict, InboundRules, LISTENER_SLOTS, ListenerKind, LookupVerdict,
    MAX_CIDRS, MAX_PODS, MAX_RESOLVERS, OutboundRules, ResolverKey, listener_slot, map,
};

use super::{
    Error, NetnsCookie, PodSettings, WorkerListeners,
    listen::DNS_PORT,
    settings::{StandIns, inbound_cookie},
    sys,
};

/// How often one verdict was given since its counter was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Who decided.
    pub source: CountSource,
    /// The verdict's label, from a closed list.
    pub verdict: &'static str,
    /// How often, over all CPUs.
    pub total: u64,
}

/// Which programs a count is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountSource {
    /// `connect4`, `connect6` and `setsockopt`, for all pods of this node process.
    Node,
    /// `sk_lookup` of one pod.
    Pod(NetnsCookie),
}

/// Name and shape of a map, as every process of this ABI made it.
pub(super) struct Shape {
    pub(super) name: &'static str,
    kind: MapType,
    key: usize,
    value: usize,
    entries: u32,
}

/// The maps of the node process.
pub(super) const NODE_MAPS: [Shape; 5] = [
    Shape {
        name: map::PODS,
        kind: MapType::Hash,
        key: size_of::<u64>(),
        value: size_of::<OutboundRules>(),
        entries: MAX_PODS,
    },
    Shape {
        name: map::CIDRS,
        kind: MapType::LpmTrie,
        key: size_of::<Key<CidrKey>>(),
        value: size_of::<u8>(),
        entries: MAX_CIDRS,
    },
    OURS,
    RESOLVERS,
    Shape {
        name: map::CONNECT_VERDICTS,
        kind: MapType::PerCpuArray,
        key: size_of::<u32>(),
        value: size_of::<u64>(),
        entries: ConnectVerdict::COUNT,
    },
];

/// The tags of our sockets: its shape is the same in every ABI version, so that a process and its
/// successor know each other's sockets.
pub(super) const OURS: Shape = Shape {
    name: map::OURS,
    kind: MapType::SkStorage,
    key: size_of::<i32>(),
    value: size_of::<u32>(),
    entries: 0,
};

/// The resolvers of stand-ins: carried over as it is where it has this shape, for a socket that is
/// connected to a stand-in never asks anew.
pub(super) const RESOLVERS: Shape = Shape {
    name: map::RESOLVERS,
    kind: MapType::LruHash,
    key: size_of::<ResolverKey>(),
    value: size_of::<Address>(),
    entries: MAX_RESOLVERS,
};

/// The maps of one pod.
pub(super) const POD_MAPS: [Shape; 3] = [
    Shape {
        name: map::LISTENERS,
        kind: MapType::SockMap,
        key: size_of::<u32>(),
        value: size_of::<u32>(),
        entries: LISTENER_SLOTS,
    },
    Shape {
        name: map::POD,
        kind: MapType::Array,
        key: size_of::<u32>(),
        value: size_of::<InboundRules>(),
        entries: 1,
    },
    Shape {
        name: map::LOOKUP_VERDICTS,
        kind: MapType::PerCpuArray,
        key: size_of::<u32>(),
        value: size_of::<u64>(),
        entries: LookupVerdict::COUNT,
    },
];

impl Shape {
    /// Whether `dir` holds a pin of this map, and it has this shape.
    pub(super) fn is_at(&self, dir: &Path) -> bool {
        let Ok(info) = MapData::from_pin(dir.join(self.name)).and_then(|map| map.info()) else {
            return false;
        };
        info.map_type().is_ok_and(|kind| kind == self.kind)
            && usize::try_from(info.key_size()) == Ok(self.key)
            && usize::try_from(info.value_size()) == Ok(self.value)
            && info.max_entries() == self.entries
    }
}

/// What `connect` reads, and counts.
pub(super) struct NodeMaps {
    pods: HashMap<MapData, u64, OutboundRules>,
    cidrs: LpmTrie<MapData, CidrKey, u8>,
    verdicts: PerCpuArray<MapData, u64>,
}

impl NodeMaps {
    pub(super) fn take(object: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            pods: take(object, map::PODS)?,
            cidrs: take(object, map::CIDRS)?,
            verdicts: take(object, map::CONNECT_VERDICTS)?,
        })
    }

    /// From here on the pod's connections are captured.
    pub(super) fn put_pod(
        &mut self,
        cookie: NetnsCookie,
        rules: &OutboundRules,
    ) -> Result<(), Error> {
        self.pods
            .insert(cookie.0, rules, 0)
            .map_err(|error| match full(&error) {
                true => Error::PodsFull { pods: MAX_PODS },
                false => Error::map(map::PODS)(error),
            })
    }

    /// From here on the pod's connections are not captured.
    pub(super) fn remove_pod(&mut self, cookie: NetnsCookie) -> Result<(), Error> {
        gone_is_fine(self.pods.remove(&cookie.0)).map_err(Error::map(map::PODS))?;
        self.replace_cidrs(cookie, &[])
    }

    /// Says whether an IPv6 stand-in is local to the pod, if it is enrolled.
    pub(super) fn set_dns_v6(&mut self, cookie: NetnsCookie, v6: bool) -> Result<(), Error> {
        let rules = match self.pods.get(&cookie.0, 0) {
            Ok(rules) => rules,
            Err(error) => return gone_is_fine(Err(error)).map_err(Error::map(map::PODS)),
        };
        let dns_v6 = u32::from(v6);
        self.put_pod(cookie, &OutboundRules { dns_v6, ..rules })
    }

    /// From here on no pod's questions to resolvers are captured.
    pub(super) fn release_questions(&mut self) -> Result<(), Error> {
        let failed = Error::map(map::PODS);
        let pods = self.pods.iter().collect::<Result<Vec<_>, _>>();
        for (cookie, rules) in pods.map_err(&failed)? {
            if rules.dns != 0 {
                self.put_pod(NetnsCookie(cookie), &OutboundRules { dns: 0, ..rules })?;
            }
        }
        Ok(())
    }

    pub(super) fn pods(&self) -> Result<Vec<NetnsCookie>, Error> {
        self.pods
            .keys()
            .map(|key| key.map(NetnsCookie).map_err(Error::map(map::PODS)))
            .collect()
    }

    /// Adds what is new before it removes what is old: a network in both never stops being excluded.
    pub(super) fn replace_cidrs(
        &mut self,
        cookie: NetnsCookie,
        list: &[(u32, CidrKey, u8)],
    ) -> Result<(), Error> {
        let stale = self
            .cidrs
            .keys()
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::map(map::CIDRS))?
            .into_iter()
            .filter(|key| {
                let owners = [cookie.0, inbound_cookie(cookie)];
                let wanted = |(bits, data, _): &(u32, CidrKey, u8)| {
                    (*bits, *data) == (key.prefix_len(), key.data())
                };
                owners.contains(&key.data().cookie) && !list.iter().any(wanted)
            })
            .collect::<Vec<_>>();
        for (bits, data, meaning) in list {
            self.cidrs
                .insert(&Key::new(*bits, *data), meaning, 0)
                .map_err(|error| match full(&error) {
                    true => Error::CidrsFull { max: MAX_CIDRS },
                    false => Error::map(map::CIDRS)(error),
                })?;
        }
        for key in stale {
            gone_is_fine(self.cidrs.remove(&key)).map_err(Error::map(map::CIDRS))?;
        }
        Ok(())
    }

    pub(super) fn counts(&self) -> Result<Vec<Count>, Error> {
        ConnectVerdict::ALL
            .iter()
            .map(|verdict| {
                Ok(Count {
                    source: CountSource::Node,
                    verdict: verdict.label(),
                    total: total(&self.verdicts, verdict.index(), map::CONNECT_VERDICTS)?,
                })
            })
            .collect()
    }
}

/// What `sk_lookup` of one pod reads.
pub(super) struct PodMaps {
    listeners: MapData,
    rules: Array<MapData, InboundRules>,
}

impl PodMaps {
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        Ok(Self {
            listeners: pinned(dir, map::LISTENERS)?,
            rules: Array::try_from(Map::Array(pinned(dir, map::POD)?))
                .map_err(Error::map(map::POD))?,
        })
    }

    pub(super) fn rules(&self) -> Result<InboundRules, Error> {
        self.rules.get(&0, 0).map_err(Error::map(map::POD))
    }

    pub(super) fn set_rules(&mut self, rules: &InboundRules) -> Result<(), Error> {
        self.rules.set(0, rules, 0).map_err(Error::map(map::POD))
    }

    /// Puts every worker's listeners in their slots; the listeners that they replace get nothing more.
    pub(super) fn put_listeners(&self, workers: &[WorkerListeners]) -> Result<(), Error> {
        let mut slots = self.slots()?;
        for (worker, listeners) in (0..).zip(workers) {
            for (kind, listener) in [
                (ListenerKind::Outbound, &listeners.outbound),
                (ListenerKind::Hbone, &listeners.hbone),
                (ListenerKind::Plaintext, &listeners.plaintext),
            ] {
                slots
                    .set(listener_slot(kind, worker), listener, 0)
                    .map_err(Error::map(map::LISTENERS))?;
            }
            let slot = listener_slot(ListenerKind::Dns, worker);
            match listeners.dns.first() {
                Some(dns) => slots
                    .set(slot, &dns.socket, 0)
                    .map_err(Error::map(map::LISTENERS))?,
                None => clear(&mut slots, slot),
            }
        }
        Ok(())
    }

    /// Empties the slots of workers that this process does not have.
    pub(super) fn clear_listeners(&self, from_worker: u32) -> Result<(), Error> {
        let mut slots = self.slots()?;
        for kind in ListenerKind::ALL {
            for worker in from_worker..ebpf_abi::MAX_WORKERS {
                clear(&mut slots, listener_slot(kind, worker));
            }
        }
        Ok(())
    }

    fn slots(&self) -> Result<SockMap<MapData>, Error> {
        let fd = self
            .listeners
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| Error::map(map::LISTENERS)(error.into()))?;
        MapData::from_fd(fd)
            .and_then(|data| SockMap::try_from(Map::SockMap(data)))
            .map_err(Error::map(map::LISTENERS))
    }
}

/// The counters of one pod.
pub(super) fn pod_counts(dir: &Path, cookie: NetnsCookie) -> Result<Vec<Count>, Error> {
    let counters =
        PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(pinned(dir, map::LOOKUP_VERDICTS)?))
            .map_err(Error::map(map::LOOKUP_VERDICTS))?;
    LookupVerdict::ALL
        .iter()
        .map(|verdict| {
            Ok(Count {
                source: CountSource::Pod(cookie),
                verdict: verdict.label(),
                total: total(&counters, verdict.index(), map::LOOKUP_VERDICTS)?,
            })
        })
        .collect()
}

/// The tags of our sockets, as a descriptor that all workers share.
pub(super) fn ours(dir: &Path) -> Result<OwnedFd, Error> {
    descriptor(dir, map::OURS)
}

/// A map as nothing but a descriptor.
pub(super) fn descriptor(dir: &Path, name: &'static str) -> Result<OwnedFd, Error> {
    let path = dir.join(name);
    sys::object_get(&path).map_err(Error::pin(&path))
}

/// The rules of a pod whose settings are not known: everything captured, nothing admitted.
pub(super) fn closed_rules(dns: bool) -> Result<(OutboundRules, InboundRules), Error> {
    let settings = PodSettings {
        dns,
        ..PodSettings::default()
    };
    let base = InboundRules {
        sysctls_turned_on: 1,
        ..InboundRules::default()
    };
    // Whether IPv6 is there, the next enrolment tells.
    let stand_ins = StandIns {
        port: DNS_PORT,
        v6: false,
    };
    Ok((
        settings.outbound(stand_ins)?,
        settings.inbound(&base, NetnsCookie(0), stand_ins)?,
    ))
}

/// An empty slot is an error of many names (EINVAL, ENOENT by kernel version).
fn clear(slots: &mut SockMap<MapData>, slot: u32) {
    drop(slots.clear_index(&slot));
}

fn pinned(dir: &Path, name: &'static str) -> Result<MapData, Error> {
    MapData::from_pin(dir.join(name)).map_err(Error::map(name))
}

fn take<T>(object: &mut Ebpf, name: &'static str) -> Result<T, Error>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = object.take_map(name).ok_or(Error::MapMissing { name })?;
    T::try_from(map).map_err(Error::map(name))
}

fn total(
    counters: &PerCpuArray<MapData, u64>,
    index: u32,
    name: &'static str,
) -> Result<u64, Error> {
    let values = counters.get(&index, 0).map_err(Error::map(name))?;
    Ok(values.iter().fold(0, |sum, value| sum.wrapping_add(*value)))
}

/// The kernel's words for a map without room: E2BIG (hash), ENOSPC (trie).
fn full(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(call)
        if matches!(call.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)))
}

fn gone_is_fine(answer: Result<(), MapError>) -> Result<(), MapError> {
    match answer {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(call)) if call.io_error.raw_os_error() == Some(libc::ENOENT) => {
            Ok(())
        }
        other => other,
    }
}
