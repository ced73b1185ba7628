//! The way out of a pod. Takes what the application dialled, gives the next hop and who must be
//! there; never falls back to plain TCP for a destination of the mesh, and never goes past a
//! waypoint.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{
    IpFamilies, LoadBalancerMode, OrigDst, Protocol, Service, SpiffeId, UpstreamAddr, Workload,
};

use super::balance::{Place, Purpose, Search, place};
use super::explain::{Off, Step, Trace};
use super::waypoint::{self, Proxy};
use super::{Error, Snapshot};

/// What an application of this node dialled.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Its workload.
    pub source: &'a Workload,
    /// Its address.
    pub from: IpAddr,
    /// The address that it dialled.
    pub destination: OrigDst,
    /// Workloads that this connection was sent to in vain.
    pub avoid: &'a [Arc<Workload>],
    /// A random number: the choice among endpoints.
    pub dice: u64,
}

/// How the next hop is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hop {
    /// By HBONE to a gateway, and inside that by HBONE to whoever the gateway chooses.
    DoubleHbone {
        /// The service's host name and port: the authority of both CONNECTs.
        authority: (Arc<str>, u16),
        /// The identities of which the gateway must prove one.
        gateway: Vec<SpiffeId>,
        /// The identities of which the far end must prove one.
        expected: Vec<SpiffeId>,
    },
    /// By HBONE.
    Hbone {
        /// The authority of the CONNECT.
        authority: SocketAddr,
        /// The identities of which the peer must prove one.
        expected: Vec<SpiffeId>,
    },
    /// In plain TCP.
    Plain,
}

/// What decided the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// To an endpoint of the service that was dialled.
    Endpoint,
    /// To such an endpoint on another network, by that network's gateway.
    EndpointGateway,
    /// Where it was going: the service wants no balancing.
    PassthroughService,
    /// To the waypoint of the service that was dialled.
    ServiceWaypoint,
    /// To such a waypoint on another network, by that network's gateway.
    ServiceWaypointGateway,
    /// Where it was going: the mesh does not know the address.
    UnknownAddress,
    /// To the workload that was dialled.
    Workload,
    /// To the waypoint of the workload that was dialled.
    WorkloadWaypoint,
}

/// The way of one outbound connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// What decided it.
    pub rule: Rule,
    /// What to dial.
    pub upstream: UpstreamAddr,
    /// How to speak there.
    pub hop: Hop,
    /// The workload that was chosen, if the mesh knows the destination: an endpoint or a waypoint.
    pub workload: Option<Arc<Workload>>,
    /// The gateway's workload, if the way leads through one.
    pub gateway: Option<Arc<Workload>>,
    /// The service that was dialled, if one was.
    pub service: Option<Arc<Service>>,
}

/// A way, or what must be looked up to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The workload that is dialled has a host name and no address.
    Name(Unresolved),
    /// All is known.
    Route(Route),
}

/// A way to a host name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unresolved {
    name: Arc<str>,
    asked: IpAddr,
    dice: u64,
    plan: Plan,
}

/// Finds the way of one outbound connection.
///
/// # Errors
/// When the destination belongs to the mesh and cannot be reached as it must be.
pub fn route(snapshot: &Snapshot, query: &Query<'_>) -> Result<Found, Error> {
    decide(snapshot, query, &mut Off)
}

/// The decision itself, told to whoever listens.
// PROTOCOL.md#outbound-routing
pub(super) fn decide<T: Trace>(
    snapshot: &Snapshot,
    query: &Query<'_>,
    trace: &mut T,
) -> Result<Found, Error> {
    let asked = query.destination;
    let network = &query.source.network;
    if let Some(service) = snapshot.service_at(network, asked.ip(), &query.source.namespace) {
        trace.step(|| Step::Service(service.key.clone()));
        return to_service(snapshot, query, service, trace);
    }
    if let Some(workload) = snapshot.workload_at(network, asked.ip()) {
        trace.step(|| Step::Workload(workload.uid.clone()));
        return to_workload(snapshot, query, workload, trace);
    }
    trace.step(|| Step::Nobody);
    Ok(as_asked(asked, Rule::UnknownAddress, None))
}

fn to_service<T: Trace>(
    snapshot: &Snapshot,
    query: &Query<'_>,
    service: &Arc<Service>,
    trace: &mut T,
) -> Result<Found, Error> {
    let asked = query.destination;
    let to = To::Service(service);
    if let Some((at, weighted)) = waypoint::of_service(service, mixed(query.dice, BY_WEIGHT)) {
        trace.step(|| Step::Waypoint {
            at: at.destination.clone(),
            weighted,
        });
        let ask = (at, Purpose::Waypoint, query.dice);
        let proxy = waypoint::reach(snapshot, query, ask, trace)
            .ok_or_else(|| Error::NoWaypoint(at.destination.clone()))?;
        return through_waypoint(snapshot, query, (to, proxy), trace);
    }
    if service.load_balancer.mode == LoadBalancerMode::Passthrough {
        trace.step(|| Step::Passthrough(service.key.clone()));
        return Ok(as_asked(asked, Rule::PassthroughService, Some(service)));
    }
    let search = Search {
        snapshot,
        query,
        purpose: Purpose::Endpoint,
        service,
        port: asked.port(),
        asked: asked.ip(),
        dice: query.dice,
    };
    let chosen = search.choose(trace).ok_or_else(|| Error::NoEndpoint {
        service: service.key.clone(),
        port: asked.port(),
    })?;
    let workload = chosen.workload;
    if workload.network != query.source.network {
        let far = (service, service, Rule::EndpointGateway);
        return through_gateway(snapshot, query, (far, workload), trace);
    }
    let mut expected = waypoint::identities(service);
    expected.extend(workload.identity.clone());
    direct(query, (to, workload), chosen.port, expected)
}

fn to_workload<T: Trace>(
    snapshot: &Snapshot,
    query: &Query<'_>,
    workload: &Arc<Workload>,
    trace: &mut T,
) -> Result<Found, Error> {
    let to = To::Workload;
    if let Some(at) = &workload.waypoint {
        if waypoint::is_at(snapshot, at, query.source, query.from) {
            trace.step(|| Step::SourceIsWaypoint(workload.uid.clone()));
        } else {
            trace.step(|| Step::Waypoint {
                at: at.destination.clone(),
                weighted: false,
            });
            let ask = (at, Purpose::Waypoint, query.dice);
            let proxy = waypoint::reach(snapshot, query, ask, trace)
                .ok_or_else(|| Error::NoWaypoint(at.destination.clone()))?;
            return through_waypoint(snapshot, query, (to, proxy), trace);
        }
    }
    let expected = workload.identity.clone().into_iter().collect();
    direct(query, (to, workload), query.destination.port(), expected)
}

/// What was dialled.
#[derive(Clone, Copy)]
enum To<'a> {
    Service(&'a Arc<Service>),
    Workload,
}

impl To<'_> {
    fn service(self) -> Option<Arc<Service>> {
        match self {
            Self::Service(service) => Some(Arc::clone(service)),
            Self::Workload => None,
        }
    }
}

/// By HBONE to a waypoint, which is told what was dialled.
fn through_waypoint<T: Trace>(
    snapshot: &Snapshot,
    query: &Query<'_>,
    (to, proxy): (To<'_>, Proxy<'_>),
    trace: &mut T,
) -> Result<Found, Error> {
    let rule = match to {
        To::Service(service) if proxy.workload.network != query.source.network => {
            let of_waypoint = proxy
                .service
                .ok_or_else(|| Error::Unproven(proxy.workload.uid.to_string()))?;
            let far = (service, of_waypoint, Rule::ServiceWaypointGateway);
            return through_gateway(snapshot, query, (far, proxy.workload), trace);
        }
        To::Workload if proxy.workload.network != query.source.network => {
            return Err(Error::OtherNetwork(proxy.workload.uid.clone()));
        }
        To::Service(_) => Rule::ServiceWaypoint,
        To::Workload => Rule::WorkloadWaypoint,
    };
    let plan = Plan {
        rule,
        port: proxy.port,
        speak: Speak::Hbone {
            authority: query.destination.addr(),
            expected: proxy.expected(),
        },
        workload: Some(Arc::clone(proxy.workload)),
        gateway: None,
        service: to.service(),
    };
    let families = proxy.service.and_then(|service| service.ip_families);
    plan.to(query, proxy.workload, proxy.asked, families)
}

/// The service that was dialled, the one whose identity the far end proves, and the rule.
type Far<'a> = (&'a Arc<Service>, &'a Arc<Service>, Rule);

/// To a workload on another network: by HBONE to that network's gateway, and through it by HBONE
/// to one that proves to be of `proving`.
// PROTOCOL.md#double-hbone
fn through_gateway<T: Trace>(
    snapshot: &Snapshot,
    query: &Query<'_>,
    ((service, proving, rule), workload): (Far<'_>, &Arc<Workload>),
    trace: &mut T,
) -> Result<Found, Error> {
    let uid = &workload.uid;
    let at = workload
        .network_gateway
        .as_ref()
        .ok_or_else(|| Error::NoGateway(uid.clone()))?;
    trace.step(|| Step::Gateway {
        to: uid.clone(),
        by: at.destination.clone(),
    });
    let expected = waypoint::identities(proving);
    if expected.is_empty() {
        return Err(Error::Unproven(proving.key.to_string()));
    }
    let ask = (at, Purpose::Gateway, mixed(query.dice, BY_GATEWAY));
    let proxy = waypoint::reach(snapshot, query, ask, trace)
        .ok_or_else(|| Error::GatewayMissing(at.destination.clone()))?;
    let plan = Plan {
        rule,
        port: proxy.port,
        speak: Speak::DoubleHbone {
            authority: (Arc::clone(&service.key.hostname), query.destination.port()),
            gateway: proxy.expected(),
            expected,
        },
        workload: Some(Arc::clone(workload)),
        gateway: Some(Arc::clone(proxy.workload)),
        service: Some(Arc::clone(service)),
    };
    let families = proxy.service.and_then(|service| service.ip_families);
    plan.to(query, proxy.workload, proxy.asked, families)
}

/// To the workload itself.
fn direct(
    query: &Query<'_>,
    (to, workload): (To<'_>, &Arc<Workload>),
    port: u16,
    expected: Vec<SpiffeId>,
) -> Result<Found, Error> {
    let (rule, families) = match to {
        To::Service(service) => (Rule::Endpoint, service.ip_families),
        To::Workload => (Rule::Workload, None),
    };
    let (dialled, speak) = match workload.protocol {
        Protocol::Hbone => (HBONE_PORT, Speak::HboneItself { port, expected }),
        Protocol::Tcp => (port, Speak::Plain),
    };
    let plan = Plan {
        rule,
        port: dialled,
        speak,
        workload: Some(Arc::clone(workload)),
        gateway: None,
        service: to.service(),
    };
    plan.to(query, workload, query.destination.ip(), families)
}

fn as_asked(asked: OrigDst, rule: Rule, service: Option<&Arc<Service>>) -> Found {
    Found::Route(Route {
        rule,
        upstream: UpstreamAddr::new(asked.addr()),
        hop: Hop::Plain,
        workload: None,
        gateway: None,
        service: service.map(Arc::clone),
    })
}

/// A route that lacks only the address to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plan {
    rule: Rule,
    port: u16,
    speak: Speak,
    workload: Option<Arc<Workload>>,
    gateway: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
}

/// How to speak to whoever is at the address.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Speak {
    DoubleHbone {
        authority: (Arc<str>, u16),
        gateway: Vec<SpiffeId>,
        expected: Vec<SpiffeId>,
    },
    Hbone {
        authority: SocketAddr,
        expected: Vec<SpiffeId>,
    },
    /// The authority is the address that is dialled, with another port.
    HboneItself {
        port: u16,
        expected: Vec<SpiffeId>,
    },
    Plain,
}

impl Plan {
    fn to(
        self,
        query: &Query<'_>,
        workload: &Workload,
        asked: IpAddr,
        families: Option<IpFamilies>,
    ) -> Result<Found, Error> {
        match place(workload, families, asked) {
            Some(Place::At(ip)) => Ok(Found::Route(self.at(ip))),
            Some(Place::Named(name)) => Ok(Found::Name(Unresolved {
                name,
                asked,
                dice: query.dice,
                plan: self,
            })),
            None => Err(Error::NoAddress(workload.uid.clone())),
        }
    }

    fn at(self, ip: IpAddr) -> Route {
        let hop = match self.speak {
            Speak::DoubleHbone {
                authority,
                gateway,
                expected,
            } => Hop::DoubleHbone {
                authority,
                gateway,
                expected,
            },
            Speak::Hbone {
                authority,
                expected,
            } => Hop::Hbone {
                authority,
                expected,
            },
            Speak::HboneItself { port, expected } => Hop::Hbone {
                authority: SocketAddr::new(ip, port),
                expected,
            },
            Speak::Plain => Hop::Plain,
        };
        Route {
            rule: self.rule,
            upstream: UpstreamAddr::new(SocketAddr::new(ip, self.port)),
            hop,
            workload: self.workload,
            gateway: self.gateway,
            service: self.service,
        }
    }
}

impl Route {
    /// The workload that is dialled, if the mesh knows it.
    #[must_use]
    pub const fn dialled(&self) -> Option<&Arc<Workload>> {
        match &self.gateway {
            Some(gateway) => Some(gateway),
            None => self.workload.as_ref(),
        }
    }

    /// The workload that is dialled, if it was chosen: in its place there may be another.
    #[must_use]
    pub const fn chosen(&self) -> Option<&Arc<Workload>> {
        match self.rule {
            Rule::Endpoint
            | Rule::EndpointGateway
            | Rule::ServiceWaypoint
            | Rule::ServiceWaypointGateway
            | Rule::WorkloadWaypoint => self.dialled(),
            Rule::PassthroughService | Rule::UnknownAddress | Rule::Workload => None,
        }
    }
}

impl Unresolved {
    /// The name to look up.
    #[must_use]
    pub const fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The way to one of the addresses that the name has, of the family that was dialled if there
    /// is one.
    ///
    /// # Errors
    /// When it has none.
    pub fn resolved(self, addresses: &[IpAddr]) -> Result<Route, Error> {
        let same = |ip: &&IpAddr| ip.is_ipv4() == self.asked.is_ipv4();
        let of_family = addresses.iter().filter(same).count();
        let pick = |count: usize| {
            let count = u64::try_from(count).unwrap_or(u64::MAX);
            let ticket = mixed(self.dice, BY_ADDRESS).checked_rem(count)?;
            usize::try_from(ticket).ok()
        };
        let ip = match pick(of_family) {
            Some(at) => addresses.iter().filter(same).nth(at),
            None => pick(addresses.len()).and_then(|at| addresses.get(at)),
        };
        let ip = ip.ok_or_else(|| Error::NoSuchName(Arc::clone(&self.name)))?;
        Ok(self.plan.at(ip.to_canonical()))
    }
}

impl Rule {
    /// The word for people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Endpoint => "endpoint",
            Self::EndpointGateway => "endpoint behind a gateway",
            Self::PassthroughService => "passthrough service",
            Self::ServiceWaypoint => "waypoint of the service",
            Self::ServiceWaypointGateway => "waypoint of the service behind a gateway",
            Self::UnknownAddress => "unknown address",
            Self::Workload => "workload",
            Self::WorkloadWaypoint => "waypoint of the workload",
        }
    }

    /// Whether the destination's own workload is dialled: no waypoint and no gateway between.
    #[must_use]
    pub const fn is_direct(self) -> bool {
        match self {
            Self::Endpoint | Self::Workload => true,
            Self::EndpointGateway
            | Self::PassthroughService
            | Self::ServiceWaypoint
            | Self::ServiceWaypointGateway
            | Self::UnknownAddress
            | Self::WorkloadWaypoint => false,
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(unresolved) => {
                let Plan { rule, port, .. } = &unresolved.plan;
                write!(f, "{}: to {}:{port}", rule.as_str(), unresolved.name)
            }
            Self::Route(route) => route.fmt(f),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: to {}", self.rule.as_str(), self.upstream)?;
        match &self.hop {
            Hop::DoubleHbone {
                authority: (host, port),
                ..
            } => write!(f, " by HBONE inside HBONE, asking for {host}:{port}"),
            Hop::Hbone { authority, .. } => write!(f, " by HBONE, asking for {authority}"),
            Hop::Plain => f.write_str(" in plain TCP"),
        }
    }
}

/// Another random number from the same dice: choices that have nothing to do with each other must
/// not fall together. (The finaliser of SplitMix64.)
const fn mixed(dice: u64, choice: u64) -> u64 {
    let mut x = dice.wrapping_add(choice.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

const BY_WEIGHT: u64 = 1;
const BY_GATEWAY: u64 = 2;
const BY_ADDRESS: u64 = 3;

/// Where workloads take HBONE.
// PROTOCOL.md#ports
const HBONE_PORT: u16 = 15008;

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
