//! The control plane's messages, generated from the product's `.proto` files.
#![expect(
    clippy::large_enum_variant,
    reason = "a message of its own is allocated a moment only"
)]

pub mod discovery {
    include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
}

pub mod workload {
    include!(concat!(env!("OUT_DIR"), "/istio.workload.rs"));
}

pub mod security {
    include!(concat!(env!("OUT_DIR"), "/istio.security.rs"));
}

pub mod citadel {
    include!(concat!(env!("OUT_DIR"), "/istio.v1.auth.rs"));
}
