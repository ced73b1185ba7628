//! The values that pass between the rooms: constructing one is validating it. Takes parts, gives
//! values that cannot be wrong; never does I/O, reads a clock or logs.
#![warn(clippy::wildcard_enum_match_arm, missing_docs)]

mod addr;
mod chain;
mod flow;
mod identity;
mod key_exchange;
mod policy;
mod probe;
mod reason;
mod service;
#[cfg(test)]
pub(crate) mod testing;
mod workload;

pub use addr::{
    AppAddr, ClientAddr, InvalidNetworkAddr, ListenAddr, NetworkAddr, OrigDst, UpstreamAddr,
    canonical,
};
pub use chain::Chain;
pub use flow::{Direction, Flow, Meter, SecurityPolicy};
pub use identity::{InvalidSpiffeId, SpiffeId, TrustDomain};
pub use key_exchange::KeyExchange;
pub use policy::{
    Action, Clause, Match, Policy, PolicyKey, Rule, Scope, ServiceAccountMatch, StringMatch,
};
pub use probe::ProbeSource;
pub use reason::{LogLevel, Reason, ToReason};
pub use service::{
    HealthPolicy, IpFamilies, LoadBalancer, LoadBalancerMode, PortMap, RoutingScope, Service,
    Visibility, WeightedWaypoint,
};
pub use workload::{
    AppProtocol, ApplicationTunnel, GatewayAddress, GatewayDestination, Health, InvalidName,
    Locality, NamespacedHostname, NetworkMode, PodRef, PodUid, Protocol, Workload, WorkloadUid,
};
