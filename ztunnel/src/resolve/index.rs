//! The parts of an index that is copied only where it changes. Takes workloads and services one by
//! one, gives them by key and in an order that does not depend on when they came; never looks at
//! the mesh as a whole.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use rpds::HashTrieMapSync;

use crate::model::{Service, Workload, WorkloadUid};

/// A map whose copies share what they have in common; an insertion copies a few nodes.
pub(super) type Map<K, V> = HashTrieMapSync<K, V, foldhash::fast::RandomState>;

/// Several things of one key: at least one, best first. Of one thing there is one.
#[derive(Clone, Debug)]
pub(super) struct Ranked<T> {
    best: T,
    rest: Vec<T>,
}

/// A thing that can be ranked among others of its key. The order is total and does not depend on
/// history: what was added and removed in any order gives one result.
pub(super) trait Rank {
    /// What tells two of them apart.
    type Id: Ord + ?Sized;

    fn id(&self) -> &Self::Id;

    /// Whether it goes before another one.
    fn precedes(&self, other: &Self) -> bool;
}

impl<T: Rank + Clone> Ranked<T> {
    pub(super) const fn new(best: T) -> Self {
        Self {
            best,
            rest: Vec::new(),
        }
    }

    pub(super) const fn best(&self) -> &T {
        &self.best
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.best).chain(&self.rest)
    }

    fn insert(&mut self, item: T) {
        let place = self.iter().take_while(|held| held.precedes(&item)).count();
        match place.checked_sub(1) {
            Some(place) => self.rest.insert(place, item),
            None => self.rest.insert(0, std::mem::replace(&mut self.best, item)),
        }
    }

    /// What is left without the thing of this id.
    fn without(mut self, id: &T::Id) -> Option<Self> {
        self.rest.retain(|held| held.id() != id);
        if self.best.id() != id {
            return Some(self);
        }
        if self.rest.is_empty() {
            return None;
        }
        self.best = self.rest.remove(0);
        Some(self)
    }
}

/// Adds a thing under a key.
pub(super) fn add<K, T>(map: &mut Map<K, Ranked<T>>, key: K, item: T)
where
    K: std::hash::Hash + Eq + Clone,
    T: Rank + Clone,
{
    match map.get_mut(&key) {
        Some(ranked) => ranked.insert(item),
        None => map.insert_mut(key, Ranked::new(item)),
    }
}

/// Takes a thing away from under a key.
pub(super) fn take<K, T>(map: &mut Map<K, Ranked<T>>, key: &K, id: &T::Id)
where
    K: std::hash::Hash + Eq + Clone,
    T: Rank + Clone,
{
    let Some(held) = map.get(key) else {
        return;
    };
    match held.clone().without(id) {
        Some(left) => map.insert_mut(key.clone(), left),
        None => {
            map.remove_mut(key);
        }
    }
}

/// What has an address on one network.
#[derive(Clone, Debug, Default)]
pub(super) struct Network {
    pub(super) addresses: Map<IpAddr, Ranked<Arc<Workload>>>,
    pub(super) vips: Map<IpAddr, Ranked<Arc<Service>>>,
    ranges: Map<IpNet, Ranked<Arc<Service>>>,
    /// How many different ranges there are of each length, by family.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Network {
    pub(super) fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.vips.is_empty() && self.ranges.is_empty()
    }

    /// The services of the ranges that hold an address, with the length of the range; the longest
    /// ranges first.
    pub(super) fn ranges_around(&self, ip: IpAddr) -> impl Iterator<Item = (u8, &Arc<Service>)> {
        let family = ip.is_ipv4();
        self.lengths
            .range((family, 0)..=(family, u8::MAX))
            .rev()
            .filter_map(move |((_, bits), _)| {
                let net = IpNet::new(ip, *bits).ok()?.trunc();
                Some((*bits, self.ranges.get(&net)?))
            })
            .flat_map(|(bits, services)| services.iter().map(move |service| (bits, service)))
    }

    pub(super) fn add_range(&mut self, net: IpNet, service: Arc<Service>) {
        let net = net.trunc();
        if !self.ranges.contains_key(&net) {
            *self.lengths.entry(length(net)).or_default() += 1;
        }
        add(&mut self.ranges, net, service);
    }

    pub(super) fn take_range(&mut self, net: IpNet, service: &Arc<Service>) {
        let net = net.trunc();
        if !self.ranges.contains_key(&net) {
            return;
        }
        take(&mut self.ranges, &net, service.id());
        if self.ranges.contains_key(&net) {
            return;
        }
        let left = self.lengths.get(&length(net)).map_or(0, |count| count - 1);
        if left == 0 {
            self.lengths.remove(&length(net));
        } else {
            self.lengths.insert(length(net), left);
        }
    }
}

fn length(net: IpNet) -> (bool, u8) {
    (net.addr().is_ipv4(), net.prefix_len())
}

/// The endpoints of one service in the order of their UIDs, in blocks: a change copies one of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Endpoints {
    /// None of them is empty.
    blocks: Vec<Arc<Vec<Arc<Workload>>>>,
}

impl Endpoints {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.blocks.iter().flat_map(|block| block.iter())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub(super) fn insert(&mut self, workload: Arc<Workload>) {
        let at = self.block_of(&workload.uid);
        let Some(block) = self.blocks.get_mut(at) else {
            self.blocks.push(Arc::new(vec![workload]));
            return;
        };
        let block = Arc::make_mut(block);
        match block.binary_search_by(|held| held.uid.cmp(&workload.uid)) {
            Ok(here) => {
                if let Some(held) = block.get_mut(here) {
                    *held = workload;
                }
            }
            Err(here) => block.insert(here, workload),
        }
        if block.len() > BLOCK_ENDPOINTS {
            let upper = block.split_off(BLOCK_ENDPOINTS / 2);
            self.blocks.insert(at + 1, Arc::new(upper));
        }
    }

    pub(super) fn remove(&mut self, uid: &WorkloadUid) {
        let at = self.block_of(uid);
        let Some(block) = self.blocks.get_mut(at) else {
            return;
        };
        let Ok(here) = block.binary_search_by(|held| held.uid.cmp(uid)) else {
            return;
        };
        let block = Arc::make_mut(block);
        block.remove(here);
        if block.is_empty() {
            self.blocks.remove(at);
        }
    }

    /// The block that holds a UID, if any does.
    fn block_of(&self, uid: &WorkloadUid) -> usize {
        let starts_before =
            |block: &Arc<Vec<Arc<Workload>>>| block.first().is_some_and(|first| first.uid <= *uid);
        self.blocks.partition_point(starts_before).saturating_sub(1)
    }
}

/// Large enough that a walk over all endpoints is a walk over memory, small enough to copy.
const BLOCK_ENDPOINTS: usize = 64;
