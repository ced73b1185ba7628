//! Any text is a state in which nothing is there twice and nothing is out of range, or is refused.
#![no_main]

use std::collections::HashSet;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::control::parse;
use ztunnel_fuzz::model::NetworkMode;

fuzz_target!(|text: &str| {
    let state = match parse(Path::new("fuzz"), text) {
        Ok(state) => state,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let mut uids = HashSet::new();
    let mut addresses = HashSet::new();
    for workload in &state.workloads {
        assert!(uids.insert(&workload.uid), "a uid is there twice");
        assert!(!workload.uid.0.is_empty() && !workload.namespace.is_empty());
        assert!(workload.identity.is_some());
        for ip in &workload.ips {
            assert_eq!(*ip, ip.to_canonical());
            if workload.network_mode == NetworkMode::Standard {
                let first = addresses.insert((&workload.network, ip));
                assert!(first, "an address is there twice");
            }
        }
        for ports in workload.services.values() {
            assert!(
                ports
                    .iter()
                    .all(|(port, target)| *port != 0 && *target != 0)
            );
        }
    }
    let services: HashSet<_> = state.services.iter().map(|s| &s.key).collect();
    assert_eq!(services.len(), state.services.len());
    let policies: HashSet<_> = state.policies.iter().map(|p| &p.key).collect();
    assert_eq!(policies.len(), state.policies.len());
    let namespaces: HashSet<_> = state.pods.iter().map(|p| &p.netns).collect();
    assert_eq!(namespaces.len(), state.pods.len());
});
