//! Why a connection goes where it goes. Takes the same question as a route, gives every step to
//! its answer in words; costs a connection nothing, for nobody listens then.

use std::fmt;

use crate::model::{
    GatewayDestination, LoadBalancerMode, NamespacedHostname, RoutingScope, WorkloadUid,
};

use super::route::{Found, decide};
use super::{Error, Query, Snapshot};

/// Listens to a decision while it is made.
pub(super) trait Trace {
    fn step(&mut self, step: impl FnOnce() -> Step);
}

/// Nobody listens.
#[derive(Debug)]
pub(super) struct Off;

impl Trace for Off {
    fn step(&mut self, _step: impl FnOnce() -> Step) {}
}

impl Trace for Vec<Step> {
    fn step(&mut self, step: impl FnOnce() -> Step) {
        self.push(step());
    }
}

/// A decision with its reasons.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// What was found and decided, in this order.
    pub steps: Vec<Step>,
    /// What came of it.
    pub outcome: Result<Found, Error>,
}

/// Decides as [`super::route()`] does for this query, and says why.
#[must_use]
pub fn explain(snapshot: &Snapshot, query: &Query<'_>) -> Explanation {
    let mut steps = Vec::new();
    let outcome = decide(snapshot, query, &mut steps);
    Explanation { steps, outcome }
}

/// One step of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// An endpoint was to be chosen.
    Balanced {
        /// Of this service.
        service: NamespacedHostname,
        /// For this port of it.
        port: u16,
        /// In this way.
        mode: LoadBalancerMode,
        /// What became of each endpoint.
        endpoints: Vec<(WorkloadUid, Fate)>,
    },
    /// What was found is on another network, which is entered here.
    Gateway {
        /// What is to be reached.
        to: WorkloadUid,
        /// Its network's gateway.
        by: GatewayDestination,
    },
    /// The address is no workload's and no service's.
    Nobody,
    /// The service wants connections to go where they were going.
    Passthrough(NamespacedHostname),
    /// The address is a VIP of this service.
    Service(NamespacedHostname),
    /// The source is the waypoint of this workload: it goes there directly.
    SourceIsWaypoint(WorkloadUid),
    /// L7 policy is applied here first.
    Waypoint {
        /// The waypoint.
        at: GatewayDestination,
        /// It was drawn among several, by weight.
        weighted: bool,
    },
    /// The address is this workload's.
    Workload(WorkloadUid),
}

/// What became of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The connection goes there.
    Chosen,
    /// It could not be chosen.
    LeftOut(LeftOut),
    /// It could have been chosen as well.
    NotDrawn,
}

/// Why an endpoint could not be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// A strict service has a preference that it does not meet.
    Elsewhere(RoutingScope),
    /// It has neither an address that the service allows nor a host name.
    NoAddress,
    /// Its capacity is 0.
    NoCapacity,
    /// It is on another network that names no gateway.
    NoGateway,
    /// It does not serve the port.
    NoPort,
    /// Another one meets more preferences.
    Outranked,
    /// This connection was refused there already.
    Tried,
    /// It is not healthy, and the service wants only those that are.
    Unhealthy,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        match &self.outcome {
            Ok(found) => write!(f, "{found}"),
            Err(error) => write!(f, "refused: {error}"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Balanced {
                service,
                port,
                mode,
                endpoints,
            } => {
                let mode = mode_word(*mode);
                write!(f, "endpoints of {service} for port {port}, {mode}:")?;
                if endpoints.is_empty() {
                    write!(f, " none")?;
                }
                for (uid, fate) in endpoints {
                    write!(f, "\n  {uid}: {fate}")?;
                }
                Ok(())
            }
            Self::Gateway { to, by } => write!(f, "{to} is on another network, entered by {by}"),
            Self::Nobody => f.write_str("the address is nobody's in the mesh"),
            Self::Passthrough(service) => write!(f, "{service} is passed through"),
            Self::Service(service) => write!(f, "the address is a VIP of {service}"),
            Self::SourceIsWaypoint(uid) => write!(f, "the source is the waypoint of {uid}"),
            Self::Waypoint { at, weighted: true } => write!(f, "waypoint {at}, by weight"),
            Self::Waypoint {
                at,
                weighted: false,
            } => write!(f, "waypoint {at}"),
            Self::Workload(uid) => write!(f, "the address is that of {uid}"),
        }
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen => f.write_str("chosen"),
            Self::LeftOut(why) => write!(f, "left out, {why}"),
            Self::NotDrawn => f.write_str("as good, not drawn"),
        }
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Elsewhere(scope) => {
                return write!(f, "in another {}", scope_word(*scope));
            }
            Self::NoAddress => "no address",
            Self::NoCapacity => "capacity 0",
            Self::NoGateway => "on another network without a gateway",
            Self::NoPort => "does not serve the port",
            Self::Outranked => "others are nearer",
            Self::Tried => "tried before",
            Self::Unhealthy => "unhealthy",
        })
    }
}

const fn mode_word(mode: LoadBalancerMode) -> &'static str {
    match mode {
        LoadBalancerMode::Failover => "failover",
        LoadBalancerMode::Passthrough => "passthrough",
        LoadBalancerMode::Standard => "standard",
        LoadBalancerMode::Strict => "strict",
    }
}

const fn scope_word(scope: RoutingScope) -> &'static str {
    match scope {
        RoutingScope::Cluster => "cluster",
        RoutingScope::Network => "network",
        RoutingScope::Node => "node",
        RoutingScope::Region => "region",
        RoutingScope::Subzone => "subzone",
        RoutingScope::Zone => "zone",
    }
}
