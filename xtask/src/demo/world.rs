//! The demo's world: two nodes, five pods, the programs in them, and the node processes once they
//! are started. Takes the binary; gives the pieces that the steps measure; never prints.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher as _, Hasher as _},
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use ztunnel_tests::{
    apps::{self, Server},
    bulk,
    inspect::{Eth0, Routing},
    meshfile::MeshFile,
    netns::Netns,
    programs::Nginx,
    topology::{LINK, Pod, Topology},
    wire::Sniffer,
    ztunnel::{Node, Settings},
};

/// Fields are dropped in this order: node processes, programs, namespaces.
pub(super) struct World {
    a: Option<Node>,
    b: Option<Node>,
    _nginx: Nginx,
    _servers: Vec<Server>,
    pub(super) file: MeshFile,
    /// What no stranger on the wire may read.
    pub(super) canary: String,
    before: Vec<(Eth0, Routing)>,
    pub(super) topology: Topology,
}

impl World {
    pub(super) fn build() -> Result<Self> {
        let topology = Topology::builder()
            .pod("client", "a")
            .pod("stranger", "a")
            .pod("nginx", "b")
            .pod("greeter", "b")
            .pod("neighbour", "b")
            .build()?;
        let nginx = Nginx::start(&topology.pod("nginx")?.netns, HTTP, &topology.directory()?)?;
        let greeter = &topology.pod("greeter")?.netns;
        let servers = vec![
            Server::start(greeter, GREETING, apps::banner(GREETING_TEXT))?,
            Server::start(greeter, ECHO, apps::echo)?,
            Server::start(greeter, BULK, bulk::serve)?,
            Server::start(greeter, RESET, apps::reset)?,
            Server::start(greeter, COUNT, apps::count_until_eof)?,
        ];
        let file = MeshFile::of(&topology).service(
            "nginx",
            &[SERVICE],
            &[(SERVICE_PORT, HTTP)],
            &["nginx"],
        );
        let before = untouched(&topology)?;
        let canary = format!("canary-{:016x}", RandomState::new().build_hasher().finish());
        Ok(Self {
            a: None,
            b: None,
            _nginx: nginx,
            _servers: servers,
            file,
            canary,
            before,
            topology,
        })
    }

    /// Starts both node processes; they become ready side by side.
    pub(super) fn enrol(&mut self, binary: &Path) -> Result<()> {
        let settings = Settings {
            binary: PathBuf::from(binary),
            ca_directory: self.topology.directory()?.join("ca"),
            environment: Vec::new(),
        };
        for (name, place) in [("a", &mut self.a), ("b", &mut self.b)] {
            let text = self.file.for_node(name);
            *place = Some(Node::launch(&self.topology, name, &text, settings.clone())?);
        }
        Ok(())
    }

    pub(super) fn a(&mut self) -> Result<&mut Node> {
        self.a
            .as_mut()
            .context("node a's process is not started yet")
    }

    pub(super) fn b(&mut self) -> Result<&mut Node> {
        self.b
            .as_mut()
            .context("node b's process is not started yet")
    }

    pub(super) fn nodes(&mut self) -> impl Iterator<Item = &mut Node> {
        self.a.iter_mut().chain(&mut self.b)
    }

    pub(super) fn pod(&self, name: &str) -> Result<&Pod> {
        self.topology.pod(name)
    }

    /// A capture on the cable between the nodes.
    pub(super) fn sniff(&self) -> Result<Sniffer> {
        Sniffer::on(&self.topology.node("a")?.netns, LINK)
    }

    /// Every namespace of this world, with its name in the story.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = (&str, &Netns)> {
        let pods = self
            .topology
            .pods()
            .iter()
            .map(|pod| (pod.name.as_str(), &pod.netns));
        let nodes = self
            .topology
            .nodes()
            .iter()
            .map(|node| (node.name.as_str(), &node.netns));
        pods.chain(nodes)
    }

    /// Pods whose eth0 is not what it was before the node processes started.
    pub(super) fn changed_eth0(&self) -> Result<Vec<&str>> {
        let changed = |pod: &&Pod, before: &(Eth0, Routing)| -> Result<bool> {
            Ok(Eth0::of(&pod.netns)? != before.0)
        };
        self.changed(changed)
    }

    /// Pods whose rules, routes or settings are not what they were.
    pub(super) fn changed_routing(&self) -> Result<Vec<&str>> {
        let changed = |pod: &&Pod, before: &(Eth0, Routing)| -> Result<bool> {
            Ok(Routing::of(&pod.netns)? != before.1)
        };
        self.changed(changed)
    }

    fn changed(&self, test: impl Fn(&&Pod, &(Eth0, Routing)) -> Result<bool>) -> Result<Vec<&str>> {
        let mut names = Vec::new();
        for (pod, before) in self.topology.pods().iter().zip(&self.before) {
            if test(&pod, before)? {
                names.push(pod.name.as_str());
            }
        }
        Ok(names)
    }
}

fn untouched(topology: &Topology) -> Result<Vec<(Eth0, Routing)>> {
    let look = |pod: &Pod| Ok((Eth0::of(&pod.netns)?, Routing::of(&pod.netns)?));
    topology.pods().iter().map(look).collect()
}

pub(super) const HTTP: u16 = 80;
pub(super) const GREETING: u16 = 25;
pub(super) const ECHO: u16 = 7;
pub(super) const BULK: u16 = 9000;
pub(super) const RESET: u16 = 9001;
pub(super) const COUNT: u16 = 9002;
pub(super) const GREETING_TEXT: &str = "220 greeter ready\r\n";
/// The address of the service in front of nginx; no device has it.
pub(super) const SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 80));
pub(super) const SERVICE_PORT: u16 = 8080;
