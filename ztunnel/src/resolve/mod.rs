//! Where a connection goes. Takes a snapshot and a query, gives a route or the reason why there is
//! none; pure: never dials, waits, logs or rolls its own dice.
#![warn(clippy::wildcard_enum_match_arm)]

mod balance;
mod inbound;
mod index;
mod route;
mod snapshot;

pub(crate) use inbound::OWN_PORTS;
pub use inbound::{Asked, Delivery, InboundQuery, deliver};
pub use route::{Hop, Query, Route, route};
pub use snapshot::{Change, Snapshot};

use thiserror::Error;

use crate::model::{NamespacedHostname, Reason, ToReason, WorkloadUid};

/// Why there is no route.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
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
    /// The route needs something that is not built yet; refused rather than bypassed.
    #[error("the route needs {0}, which this node does not do yet")]
    Unsupported(&'static str),
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
            Self::NoAddress(_) | Self::NoEndpoint { .. } | Self::UnknownHost { .. } => {
                Reason::NoEndpoint
            }
            Self::OwnPort(_) => Reason::ForbiddenPort,
            Self::Unsupported(_) => Reason::Unsupported,
            Self::WrongPod { .. } => Reason::BadDestination,
        }
    }
}
