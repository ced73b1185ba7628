//! Where a connection goes. Takes a snapshot and a query, gives a route or the reason why there is
//! none; pure: never dials, waits, logs or rolls its own dice.
#![warn(clippy::wildcard_enum_match_arm)]

mod balance;
mod explain;
mod inbound;
mod index;
mod route;
mod snapshot;
#[cfg(test)]
mod testing;
mod waypoint;

pub use explain::{Explanation, Fate, LeftOut, Step, explain};
pub(crate) use inbound::OWN_PORTS;
pub use inbound::{Asked, Delivery, InboundQuery, deliver};
pub use route::{Found, Hop, Query, Route, Rule, Unresolved, route};
pub use snapshot::{Change, Snapshot, is_visible};

use std::sync::Arc;

use thiserror::Error;

use crate::model::{GatewayDestination, NamespacedHostname, Reason, ToReason, WorkloadUid};

/// Why there is no route.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The gateway of another network leads nowhere.
    #[error("network gateway {0} is not in the mesh or has no healthy endpoint")]
    GatewayMissing(GatewayDestination),
    /// The workload behind the address has no address of its own.
    #[error("workload {0} has no address to connect to")]
    NoAddress(WorkloadUid),
    /// Nobody serves this port of the service.
    #[error("service {service} has no healthy endpoint for port {port}")]
    NoEndpoint {
        /// The service.
        service: NamespacedHostname,
        /// The service port that was dialled.
        port: u16,
    },
    /// The workload is on another network that names no gateway.
    #[error("workload {0} is on another network that names no gateway")]
    NoGateway(WorkloadUid),
    /// The workload is known by a host name that has no address.
    #[error("host name {0:?} has no address")]
    NoSuchName(Arc<str>),
    /// The waypoint that must be passed leads nowhere; it is never gone past.
    #[error("waypoint {0} is not in the mesh or has no healthy endpoint")]
    NoWaypoint(GatewayDestination),
    /// What was dialled is no service, and its waypoint is on another network.
    #[error("waypoint {0} is on another network, where only services can be reached")]
    OtherNetwork(WorkloadUid),
    /// The port belongs to the node proxy.
    #[error("port {0} is one of the node proxy's own")]
    OwnPort(u16),
    /// A name in the authority that this pod does not serve.
    #[error("this pod serves no service {host:?} on port {port}")]
    UnknownHost {
        /// The host name.
        host: String,
        /// The port.
        port: u16,
    },
    /// Behind a gateway anybody could answer for it.
    #[error("{0} names no identity that its far end could prove")]
    Unproven(String),
    /// The CONNECT asks for an address that is not this pod's.
    #[error("the authority {asked} is not the pod {pod} that was dialled")]
    WrongPod {
        /// The authority's address.
        asked: std::net::IpAddr,
        /// The pod's address.
        pod: std::net::IpAddr,
    },
}

impl ToReason for Error {
    fn to_reason(&self) -> Reason {
        match self {
            Self::GatewayMissing(_)
            | Self::NoAddress(_)
            | Self::NoEndpoint { .. }
            | Self::NoGateway(_)
            | Self::NoSuchName(_)
            | Self::NoWaypoint(_)
            | Self::OtherNetwork(_)
            | Self::UnknownHost { .. }
            | Self::Unproven(_) => Reason::NoEndpoint,
            Self::OwnPort(_) => Reason::ForbiddenPort,
            Self::WrongPod { .. } => Reason::BadDestination,
        }
    }
}
