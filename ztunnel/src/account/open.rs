//! Connections that are open now. Takes what a ledger has learned, gives it to whoever asks for a list;
//! never holds a worker up for longer than it takes to copy a few hundred pointers.

use std::sync::Arc;

use super::ledger::Known;
use crate::model::{ClientAddr, Direction, SecurityPolicy, Workload};

/// An open connection that has its labels.
#[derive(Clone, Debug)]
pub struct OpenConnection(pub(super) Arc<Known>);

impl OpenConnection {
    /// Which way it crosses the edge of its pod.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.0.opening.direction
    }

    /// The pod of this node.
    #[must_use]
    pub fn pod(&self) -> Option<&Workload> {
        let learned = &self.0.learned;
        match self.direction() {
            Direction::Inbound => learned.destination.as_deref(),
            Direction::Outbound => learned.source.as_deref(),
        }
    }

    /// Where it comes from.
    #[must_use]
    pub fn source(&self) -> ClientAddr {
        self.0.opening.source
    }

    /// What was asked for: the address that the application dialled; of an inbound connection the
    /// service, if one is known.
    #[must_use]
    pub fn original(&self) -> Option<String> {
        match self.direction() {
            Direction::Inbound => {
                let service = self.0.learned.service.as_ref();
                service.map(|service| service.key.hostname.to_string())
            }
            Direction::Outbound => Some(self.0.opening.destination.to_string()),
        }
    }

    /// What is dialled for it: the next hop, or the application.
    #[must_use]
    pub fn actual(&self) -> String {
        let learned = &self.0.learned;
        match (self.direction(), &learned.hbone_addr) {
            (Direction::Inbound, Some(application)) => application.clone(),
            (Direction::Inbound, None) | (Direction::Outbound, _) => learned.dst_addr.to_string(),
        }
    }

    /// Whether it crosses the network in a tunnel.
    #[must_use]
    pub fn is_tunnelled(&self) -> bool {
        let learned = &self.0.learned;
        learned.hbone_addr.is_some() && learned.security == SecurityPolicy::MutualTls
    }
}
