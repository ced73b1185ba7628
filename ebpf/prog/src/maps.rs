//! The maps, sized by the ABI. Those of a pod exist once per pod, beside its own copy of
//! `sk_lookup`; the others once per node process. It never reads one except to count.

use aya_ebpf::{
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SockMap},
};
use ebpf_abi::{
    Address, CidrKey, ConnectVerdict, InboundRules, LISTENER_SLOTS, LookupVerdict, MAX_CIDRS,
    MAX_PODS, MAX_RESOLVERS, OutboundRules, ResolverKey,
};

#[map]
pub(crate) static PODS: HashMap<u64, OutboundRules> = HashMap::with_max_entries(MAX_PODS, 0);

#[map]
pub(crate) static CIDRS: LpmTrie<CidrKey, u8> = LpmTrie::with_max_entries(MAX_CIDRS, 0);

#[map]
pub(crate) static RESOLVERS: LruHashMap<ResolverKey, Address> =
    LruHashMap::with_max_entries(MAX_RESOLVERS, 0);

#[btf_map]
pub(crate) static OURS: SkStorage<u32> = SkStorage::new();

#[map]
pub(crate) static CONNECT_VERDICTS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(ConnectVerdict::COUNT, 0);

#[map]
pub(crate) static LISTENERS: SockMap = SockMap::with_max_entries(LISTENER_SLOTS, 0);

#[map]
pub(crate) static POD: Array<InboundRules> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static LOOKUP_VERDICTS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(LookupVerdict::COUNT, 0);

/// Adds one to this CPU's counter. A verdict stands whether or not it could be counted.
#[inline(always)]
pub(crate) fn count(counters: &PerCpuArray<u64>, index: u32) {
    if let Some(counter) = counters.get_ptr_mut(index) {
        // SAFETY: the slot is this CPU's own and valid while the program runs.
        unsafe { *counter = (*counter).wrapping_add(1) };
    }
}
