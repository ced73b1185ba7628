//! Where traffic runs: two nodes, clients and servers on both, in each way that a client can reach a
//! server. Takes settings; gives running nodes, servers and the list of paths.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::kinds::Kind;
use crate::{
    apps::{self, Server},
    bulk,
    mesh::Mesh,
    meshfile::MeshFile,
    netns::Netns,
    programs::{Nginx, Redis},
    topology::{Pod, Topology},
    ztunnel::{Node, Settings},
};

/// From a pod to an address of a server.
#[derive(Clone, Debug)]
pub(super) struct Path {
    pub(super) name: &'static str,
    pub(super) from: Netns,
    /// Which pod's servers are behind it.
    pub(super) server: &'static str,
    address: IpAddr,
    /// Node b's process has a part in it.
    pub(super) over_b: bool,
    /// The one that a policy change is about.
    pub(super) victim: bool,
}

impl Path {
    pub(super) fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }

    /// The victim asks one thing only, so that its answers are easy to judge.
    pub(super) fn carries(&self, kind: &Kind) -> bool {
        !self.victim || kind.name == "tiny"
    }
}

/// The nodes, and the servers of two pods.
#[derive(Debug)]
pub(super) struct World {
    sites: HashMap<&'static str, Arc<Site>>,
    pub(super) file: MeshFile,
    // Last, so that programs end before their namespaces go.
    pub(super) mesh: Mesh,
}

/// The servers of one pod.
#[derive(Debug)]
pub(super) struct Site {
    _servers: Vec<Server>,
    _nginx: Nginx,
    _redis: Redis,
    ends: Arc<Ends>,
}

/// How connections ended for the server that only reads, by the number that the client gave.
#[derive(Debug, Default)]
struct Ends {
    seen: Mutex<HashMap<u64, Option<ErrorKind>>>,
    bell: Condvar,
}

impl World {
    pub(super) fn build(settings: impl FnOnce(&Topology) -> Result<Settings>) -> Result<Self> {
        let topology = Topology::builder()
            .pod("client", "a")
            .pod("victim", "a")
            .pod(ON_A, "a")
            .pod("near", "b")
            .pod(ON_B, "b")
            .build()?;
        let ports: Vec<_> = PORTS.map(|port| (port, port)).into();
        let file = MeshFile::of(&topology).service("site", &[VIP.into()], &ports, &[ON_B]);
        let settings = settings(&topology)?;
        let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
        let mut sites = HashMap::new();
        for name in [ON_A, ON_B] {
            sites.insert(
                name,
                Arc::new(Site::start(mesh.pod(name)?, &mesh.topology)?),
            );
        }
        Ok(Self { sites, file, mesh })
    }

    pub(super) fn site(&self, name: &str) -> Result<Arc<Site>> {
        let site = self.sites.get(name).map(Arc::clone);
        site.with_context(|| format!("no servers in {name}"))
    }

    pub(super) fn paths(&self) -> Result<Vec<Path>> {
        let pod = |name| self.mesh.pod(name);
        let (on_a, on_b) = (pod(ON_A)?, pod(ON_B)?);
        let path = |name, from: &Pod, server, address| Path {
            name,
            from: from.netns.clone(),
            server,
            address,
            over_b: from.node == "b" || server == ON_B,
            victim: from.name == "victim",
        };
        let client = pod("client")?;
        Ok(vec![
            path("a to b", client, ON_B, on_b.v4.into()),
            path("a to b, IPv6", client, ON_B, on_b.v6.into()),
            path("a to b, service", client, ON_B, VIP.into()),
            path("within a", client, ON_A, on_a.v4.into()),
            path("b to a", pod("near")?, ON_A, on_a.v4.into()),
            path("within b", pod("near")?, ON_B, on_b.v6.into()),
            path(VICTIM, pod("victim")?, ON_B, on_b.v4.into()),
        ])
    }

    pub(super) fn b(&mut self) -> &mut Node {
        &mut self.mesh.b
    }
}

impl Site {
    fn start(pod: &Pod, topology: &Topology) -> Result<Self> {
        let directory = topology.directory()?;
        let ends = Arc::new(Ends::default());
        let netns = &pod.netns;
        let reads = {
            let ends = Arc::clone(&ends);
            move |mut stream: TcpStream| {
                let mut number = [0; 8];
                stream.read_exact(&mut number)?;
                stream.write_all(b"y")?;
                let end = match stream.read(&mut [0]) {
                    Ok(_) => None,
                    Err(error) => Some(error.kind()),
                };
                ends.tell(u64::from_be_bytes(number), end);
                Ok(())
            }
        };
        let slow = apps::slow_reader(SLOW_BYTES, Duration::from_millis(10));
        Ok(Self {
            _servers: vec![
                Server::start(netns, ECHO, patient_echo)?,
                Server::start(netns, BULK, bulk::serve)?,
                Server::start(netns, COUNT, apps::count_until_eof)?,
                Server::start(netns, RESET, apps::reset)?,
                Server::start(netns, BANNER, apps::banner(GREETING))?,
                Server::start(netns, SLOW, slow)?,
                Server::start(netns, READS, reads)?,
            ],
            _nginx: Nginx::start(netns, HTTP, &directory)?,
            _redis: Redis::start(netns, REDIS, &directory)?,
            ends,
        })
    }

    /// Waits until the server that only reads has seen the end of the connection with this number.
    pub(super) fn end_of(&self, number: u64, patience: Duration) -> Result<Option<ErrorKind>> {
        let seen = self.ends.lock();
        let (mut seen, _) = self
            .ends
            .bell
            .wait_timeout_while(seen, patience, |seen| !seen.contains_key(&number))
            .unwrap_or_else(PoisonError::into_inner);
        seen.remove(&number)
            .with_context(|| format!("the server has not seen the end after {patience:?}"))
    }
}

impl Ends {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Option<ErrorKind>>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, number: u64, end: Option<ErrorKind>) {
        self.lock().insert(number, end);
        self.bell.notify_all();
    }
}

/// However long the client is silent.
fn patient_echo(stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    apps::echo(stream)
}

pub(super) const ECHO: u16 = 7000;
pub(super) const BULK: u16 = 7001;
pub(super) const COUNT: u16 = 7002;
pub(super) const RESET: u16 = 7003;
pub(super) const BANNER: u16 = 7004;
pub(super) const SLOW: u16 = 7005;
pub(super) const READS: u16 = 7006;
pub(super) const HTTP: u16 = 7080;
pub(super) const REDIS: u16 = 7379;
const PORTS: [u16; 9] = [ECHO, BULK, COUNT, RESET, BANNER, SLOW, READS, HTTP, REDIS];
pub(super) const GREETING: &str = "220 ready when you are\r\n";
pub(super) const VICTIM: &str = "a to b, victim";
/// What the slow reader takes at a time.
const SLOW_BYTES: usize = 16 * 1024;
const ON_A: &str = "server-a";
const ON_B: &str = "server-b";
/// No device has it.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 70);
