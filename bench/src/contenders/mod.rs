//! Who is measured, and how each is started in a topology. A contender takes two nodes with pods and gives processes, and
//! the addresses by which a client reaches a server through it; all serve the same applications with the same policy.

pub(crate) mod envoy;
mod limit;
mod ours;
mod peer;

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use ztunnel_tests::{
    http, metrics::Metrics, netns::Netns, process::Running, topology::Topology, ztunnel::Node,
};

/// One of those that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Contender {
    /// Plain TCP between the pods.
    None,
    /// This mesh.
    Ours,
    /// This mesh with the node-local path switched off; elsewhere it is the same.
    OursCrypto,
    /// A client and a server Envoy for the pair of pods.
    Envoy,
    /// Two relays that only copy and seal: a bound, not a product.
    Limit,
    /// Another node proxy, given by its path.
    Peer,
}

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Ours => "ours",
            Self::OursCrypto => "ours-crypto",
            Self::Envoy => "envoy",
            Self::Limit => "limit",
            Self::Peer => "peer",
        }
    }

    /// The application connects to its proxy's own address instead of being redirected to it.
    pub(crate) fn by_loopback(self) -> bool {
        matches!(self, Self::Envoy | Self::Limit)
    }

    /// It refuses whom policy does not admit.
    pub(crate) fn has_policy(self) -> bool {
        matches!(
            self,
            Self::Ours | Self::OursCrypto | Self::Envoy | Self::Peer
        )
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where the server is, seen from the client's pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// On the other node.
    Cross,
    /// On the same node.
    Local,
    /// On the other node, and not in the mesh.
    Outside,
}

impl Place {
    pub(crate) fn pod(self) -> &'static str {
        match self {
            Self::Cross => SERVER,
            Self::Local => NEIGHBOUR,
            Self::Outside => OUTSIDE,
        }
    }

    /// What stands for the server in the client's pod, for contenders that are reached there.
    fn loopback(self) -> Ipv4Addr {
        match self {
            Self::Cross => Ipv4Addr::new(127, 0, 1, 1),
            Self::Local => Ipv4Addr::new(127, 0, 1, 2),
            Self::Outside => Ipv4Addr::new(127, 0, 1, 3),
        }
    }
}

/// What every contender is started with.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) ztunnel: PathBuf,
    pub(crate) envoy: PathBuf,
    pub(crate) peer: Option<PathBuf>,
    pub(crate) peer_environment: Vec<(String, String)>,
    pub(crate) workers: usize,
    pub(crate) access_log: bool,
}

impl Setting {
    /// The log filter of node processes.
    fn log_filter(&self) -> &'static str {
        if self.access_log {
            "info"
        } else {
            "info,access=off"
        }
    }
}

/// The processes of a contender. Dropping them ends them and undoes their capture.
#[derive(Debug)]
pub(crate) enum Proxies {
    None,
    Ours(Vec<Node>),
    Plain(Vec<Running>),
    Peer(peer::Peers),
}

impl Proxies {
    /// Starts them and waits until they are ready.
    pub(crate) fn start(
        contender: Contender,
        topology: &Topology,
        setting: &Setting,
    ) -> Result<Self> {
        let started = match contender {
            Contender::None => Ok(Self::None),
            Contender::Ours => ours::start(topology, setting, true).map(Self::Ours),
            Contender::OursCrypto => ours::start(topology, setting, false).map(Self::Ours),
            Contender::Envoy => envoy::start(topology, setting).map(Self::Plain),
            Contender::Limit => limit::start(topology).map(Self::Plain),
            Contender::Peer => peer::start(topology, setting).map(Self::Peer),
        };
        started.with_context(|| format!("start {contender}"))
    }

    /// Its processes, whose CPU and memory are its cost.
    pub(crate) fn pids(&self) -> Vec<u32> {
        match self {
            Self::None => Vec::new(),
            Self::Ours(nodes) => nodes.iter().map(Node::pid).collect(),
            Self::Plain(running) => running.iter().map(Running::pid).collect(),
            Self::Peer(peers) => peers.pids(),
        }
    }

    /// Connections that node `a`'s process says it has carried, by this family and these labels of its metrics; nothing
    /// if it is not one that says.
    pub(crate) fn carried(
        &self,
        topology: &Topology,
        (family, labels): (&str, &[(&str, &str)]),
    ) -> Result<Option<f64>> {
        match self {
            Self::None | Self::Plain(_) => Ok(None),
            Self::Ours(_) | Self::Peer(_) => {
                let page = http::get(
                    &topology.node("a")?.netns,
                    SocketAddr::from((Ipv4Addr::LOCALHOST, STATS)),
                    "/metrics",
                )?;
                let metrics = Metrics::parse(&page.body)?;
                Ok(Some(metrics.sum(family, labels)))
            }
        }
    }
}

/// Where a client connects to reach `port` of the server at `place`.
pub(crate) fn target(
    contender: Contender,
    topology: &Topology,
    place: Place,
    port: u16,
) -> Result<SocketAddr> {
    if contender.by_loopback() {
        return Ok(SocketAddr::from((place.loopback(), port)));
    }
    Ok(topology.pod(place.pod())?.at(port))
}

/// Whence and whither a connection goes that policy must refuse.
pub(crate) fn forbidden(
    contender: Contender,
    topology: &Topology,
    place: Place,
) -> Result<(&Netns, SocketAddr)> {
    if contender == Contender::Envoy {
        // A sidecar has one identity; the stranger is a second set of listeners of the client's Envoy.
        let at = SocketAddr::from((envoy::stranger(place), ECHO));
        return Ok((&topology.pod(CLIENT)?.netns, at));
    }
    let stranger = &topology.pod(STRANGER)?.netns;
    Ok((stranger, topology.pod(place.pod())?.at(ECHO)))
}

pub(crate) const CLIENT: &str = "client";
pub(crate) const STRANGER: &str = "stranger";
pub(crate) const SERVER: &str = "server";
pub(crate) const NEIGHBOUR: &str = "neighbour";
pub(crate) const OUTSIDE: &str = "outside";
/// Clients whose first connection has not happened yet.
pub(crate) const COLD: [&str; 4] = ["cold0", "cold1", "cold2", "cold3"];

pub(crate) const IPERF: u16 = 5201;
pub(crate) const ECHO: u16 = 7000;
pub(crate) const HOLD: u16 = 7001;
pub(crate) const HTTP: u16 = 8080;
pub(crate) const SOCKPERF: u16 = 11111;
pub(crate) const PORTS: [u16; 5] = [IPERF, ECHO, HOLD, HTTP, SOCKPERF];
const STATS: u16 = 15020;
