//! Any bytes are a resource in which nothing is out of range, or are refused with a reason.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::control::{Change, Interner, Rejected, address, authorization};

fuzz_target!(|data: &[u8]| {
    let mut interner = Interner::default();
    let bytes = Bytes::copy_from_slice(data);
    judge(address(&mut interner, Some(bytes.clone())));
    judge(authorization(&mut interner, Some(bytes)));
});

fn judge(converted: Result<Change, Rejected>) {
    match converted {
        Ok(Change::Workload(workload)) => {
            assert!(!workload.uid.0.is_empty());
            assert!(workload.identity.is_some());
            assert!(workload.ips.iter().all(|ip| *ip == ip.to_canonical()));
            let mut ports = workload.services.values().flatten();
            assert!(ports.all(|(port, target)| *port != 0 && *target != 0));
            for gateway in workload.waypoint.iter().chain(&workload.network_gateway) {
                assert_ne!(gateway.hbone_mtls_port, 0);
            }
        }
        Ok(Change::Service(service)) => {
            assert!(!service.key.hostname.is_empty() && !service.key.hostname.contains('/'));
            assert!(service.ports.keys().all(|port| *port != 0));
        }
        Ok(Change::Policy(policy)) => {
            assert!(!policy.key.name.is_empty());
            let name = policy.key.to_string();
            assert_eq!(name.matches('/').count(), 1, "it can be named by workloads");
        }
        Ok(other) => panic!("a resource is no removal: {other:?}"),
        Err(why) => assert!(!why.to_string().is_empty()),
    }
}
