//! The messages of the control plane and the node agent, generated from `proto/*.proto`: bytes to fields and back. Whatever is in a
//! message is unchecked; rooms that take it turn it into values of the model, or refuse it.
#![expect(
    clippy::large_enum_variant,
    reason = "generated; such a message lives for the time of its conversion"
)]

/// Discovery: requests and responses of a delta stream.
pub mod discovery {
    include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
}

/// Workloads and services.
pub mod workload {
    include!(concat!(env!("OUT_DIR"), "/istio.workload.rs"));
}

/// Authorization policies.
pub mod security {
    include!(concat!(env!("OUT_DIR"), "/istio.security.rs"));
}

/// The node agent's requests and our answers.
pub mod zds {
    include!(concat!(env!("OUT_DIR"), "/istio.workload.zds.rs"));
}

/// Certificate requests.
pub mod citadel {
    include!(concat!(env!("OUT_DIR"), "/istio.v1.auth.rs"));
}
