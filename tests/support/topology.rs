//! Two nodes joined by a cable, and pods on each: network namespaces, veth pairs and static
//! routes. Takes the names of pods and where they live; gives their namespaces and addresses;
//! never touches a namespace, device or file that does not carry its prefix.
//!
//! ```text
//!  pod eth0 10.88.1.10/32 ── veth ── node a 10.88.1.1 ═ mesh0 10.88.0.0/24 ═ node b ── veth ── pod
//!           fd88:0:0:1::10/128                 (routes to every pod of the other node)
//! ```

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{leftovers, netns::Netns, process::output, wait};

/// Nodes and pods that exist until this value is dropped.
#[derive(Debug)]
pub struct Topology {
    prefix: String,
    nodes: Vec<NodeNet>,
    pods: Vec<Pod>,
}

/// A node: the namespace in which a node process runs, and its addresses.
#[derive(Clone, Debug)]
pub struct NodeNet {
    pub name: String,
    pub netns: Netns,
    /// On the cable between the nodes.
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    /// What the pods of this node see when the node speaks to them.
    pub gateway_v4: Ipv4Addr,
    pub gateway_v6: Ipv6Addr,
}

/// A pod: a namespace with `eth0`, routed to its node.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub node: String,
    pub netns: Netns,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

/// What a [`Topology`] is to contain.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    pods: Vec<PodSpec>,
}

#[derive(Clone, Debug)]
struct PodSpec {
    name: String,
    node: String,
    service_account: String,
}

impl Builder {
    /// A pod on node `a` or `b`, whose service account has the pod's name.
    #[must_use]
    pub fn pod(self, name: &str, node: &str) -> Self {
        self.pod_as(name, node, name)
    }

    /// A pod on node `a` or `b` with this service account.
    #[must_use]
    pub fn pod_as(mut self, name: &str, node: &str, service_account: &str) -> Self {
        self.pods.push(PodSpec {
            name: name.to_owned(),
            node: node.to_owned(),
            service_account: service_account.to_owned(),
        });
        self
    }

    /// Builds it. What runs that are no longer alive left behind is collected first.
    pub fn build(self) -> Result<Topology> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        ensure!(
            nix::unistd::geteuid().is_root(),
            "network namespaces need root"
        );
        leftovers::collect_dead()?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{}{number}-", leftovers::own_prefix());
        // From here on, dropping the value removes whatever part of it exists.
        let mut topology = Topology {
            prefix,
            nodes: Vec::new(),
            pods: Vec::new(),
        };
        topology.lay_out(&self.pods)?;
        topology.create().context("build the namespaces")?;
        Ok(topology)
    }
}

impl Topology {
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// What every name that belongs to this topology begins with: `zt-<pid>-<n>-`.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    #[must_use]
    pub fn nodes(&self) -> &[NodeNet] {
        &self.nodes
    }

    #[must_use]
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    pub fn node(&self, name: &str) -> Result<&NodeNet> {
        self.nodes
            .iter()
            .find(|n| n.name == name)
            .with_context(|| format!("no node {name}"))
    }

    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods
            .iter()
            .find(|p| p.name == name)
            .with_context(|| format!("no pod {name}"))
    }

    /// A directory for files of this topology, removed with it.
    pub fn directory(&self) -> Result<PathBuf> {
        let path = std::env::temp_dir().join(format!("{}files", self.prefix));
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }

    /// Where a node process of this topology pins its programs.
    #[must_use]
    pub fn pin_directory(&self, node: &str) -> PathBuf {
        Path::new(leftovers::BPFFS).join(format!("{}{node}", self.prefix))
    }

    fn lay_out(&mut self, pods: &[PodSpec]) -> Result<()> {
        for (name, number) in NODES {
            self.nodes.push(NodeNet {
                name: name.to_owned(),
                netns: Netns::named(format!("{}{name}", self.prefix)),
                v4: Ipv4Addr::new(10, 88, 0, number),
                v6: Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, u16::from(number)),
                gateway_v4: Ipv4Addr::new(10, 88, number, 1),
                gateway_v6: Ipv6Addr::new(0xfd88, 0, 0, u16::from(number), 0, 0, 0, 1),
            });
        }
        let mut names: BTreeSet<_> = NODES.iter().map(|(name, _)| (*name).to_owned()).collect();
        for (spec, host) in pods.iter().zip(FIRST_HOST..=u8::MAX) {
            let Some((_, number)) = NODES.iter().find(|(name, _)| *name == spec.node) else {
                bail!(
                    "pod {} is on node {}, which is neither a nor b",
                    spec.name,
                    spec.node
                );
            };
            ensure!(
                names.insert(spec.name.clone()),
                "the name {} is taken",
                spec.name
            );
            // The node's end of the veth carries the pod's name, and IFNAMSIZ is 16.
            ensure!(spec.name.len() <= 13, "the name {} is too long", spec.name);
            self.pods.push(Pod {
                name: spec.name.clone(),
                namespace: POD_NAMESPACE.to_owned(),
                service_account: spec.service_account.clone(),
                node: spec.node.clone(),
                netns: Netns::named(format!("{}{}", self.prefix, spec.name)),
                v4: Ipv4Addr::new(10, 88, *number, host),
                v6: Ipv6Addr::new(0xfd88, 0, 0, u16::from(*number), 0, 0, 0, as_hex(host)?),
            });
        }
        Ok(())
    }

    fn create(&self) -> Result<()> {
        let mut names = String::new();
        for netns in self.namespaces() {
            writeln!(names, "netns add {netns}")?;
        }
        batch(None, &names)?;
        for netns in self.namespaces() {
            // Before any device exists, so that each inherits them.
            netns.sysctl("ipv6/conf/all/accept_dad", "0")?;
            netns.sysctl("ipv6/conf/default/accept_dad", "0")?;
            netns.sysctl("ipv4/conf/all/rp_filter", LOOSE)?;
            netns.sysctl("ipv4/conf/default/rp_filter", LOOSE)?;
        }
        for node in &self.nodes {
            node.netns.sysctl("ipv4/ip_forward", "1")?;
            node.netns.sysctl("ipv6/conf/all/forwarding", "1")?;
        }
        batch(None, &self.cables()?)?;
        for node in &self.nodes {
            batch(Some(&node.netns), &self.node_setup(node)?)?;
        }
        for pod in &self.pods {
            batch(Some(&pod.netns), &self.pod_setup(pod)?)?;
        }
        // A route wants its device up, and that takes both ends of each veth.
        for node in &self.nodes {
            batch(Some(&node.netns), &self.node_routes(node)?)?;
        }
        self.wait_carriers()
    }

    /// The kernel takes notice of a carrier in its own time, and then adds addresses and routes; until then it drops
    /// what is sent.
    fn wait_carriers(&self) -> Result<()> {
        for node in &self.nodes {
            let own = self.pods.iter().filter(|pod| pod.node == node.name);
            let devices = own.map(|pod| format!("p-{}", pod.name));
            let devices: Vec<_> = devices.chain([LINK.to_owned()]).collect();
            wait_link_local(&node.netns, &devices)?;
        }
        for pod in &self.pods {
            wait_link_local(&pod.netns, &["eth0".to_owned()])?;
        }
        Ok(())
    }

    fn cables(&self) -> Result<String> {
        let mut text = String::new();
        if let [a, b] = self.nodes.as_slice() {
            let (a, b) = (&a.netns, &b.netns);
            writeln!(
                text,
                "link add {LINK} netns {a} type veth peer name {LINK} netns {b}"
            )?;
        }
        for pod in &self.pods {
            let (node, pod_ns, name) = (&self.node(&pod.node)?.netns, &pod.netns, &pod.name);
            writeln!(
                text,
                "link add p-{name} netns {node} type veth peer name eth0 netns {pod_ns}"
            )?;
        }
        Ok(text)
    }

    fn node_setup(&self, node: &NodeNet) -> Result<String> {
        let mut text = format!(
            "link set lo up\n\
             addr add {v4}/24 dev {LINK}\n\
             addr add {v6}/64 dev {LINK} nodad\n\
             addr add {gw4}/32 dev lo\n\
             addr add {gw6}/128 dev lo nodad\n\
             link set {LINK} up\n",
            v4 = node.v4,
            v6 = node.v6,
            gw4 = node.gateway_v4,
            gw6 = node.gateway_v6,
        );
        for pod in self.pods.iter().filter(|pod| pod.node == node.name) {
            writeln!(
                text,
                "addr add {GATEWAY_LINK_LOCAL}/64 dev p-{} nodad",
                pod.name
            )?;
            writeln!(text, "link set p-{} up", pod.name)?;
        }
        Ok(text)
    }

    fn pod_setup(&self, pod: &Pod) -> Result<String> {
        let gateway = self.node(&pod.node)?.gateway_v4;
        Ok(format!(
            "link set lo up\n\
             addr add {v4}/32 dev eth0\n\
             addr add {v6}/128 dev eth0 nodad\n\
             link set eth0 up\n\
             route add {gateway} dev eth0 scope link\n\
             route add default via {gateway} dev eth0\n\
             route add ::/0 via {GATEWAY_LINK_LOCAL} dev eth0\n",
            v4 = pod.v4,
            v6 = pod.v6,
        ))
    }

    fn node_routes(&self, node: &NodeNet) -> Result<String> {
        let mut text = String::new();
        let (src4, src6) = (node.gateway_v4, node.gateway_v6);
        for pod in &self.pods {
            let (v4, v6) = (pod.v4, pod.v6);
            if pod.node == node.name {
                let name = &pod.name;
                writeln!(text, "route add {v4}/32 dev p-{name} scope link src {src4}")?;
                writeln!(text, "route add {v6}/128 dev p-{name} src {src6}")?;
            }
        }
        for other in self.nodes.iter().filter(|other| other.name != node.name) {
            let (gw4, gw6) = (other.gateway_v4, other.gateway_v6);
            let [a, b, c, _] = gw4.octets();
            writeln!(
                text,
                "route add {a}.{b}.{c}.0/24 via {} dev {LINK}",
                other.v4
            )?;
            writeln!(text, "route add {gw6}/64 via {} dev {LINK}", other.v6)?;
        }
        Ok(text)
    }

    fn namespaces(&self) -> impl Iterator<Item = &Netns> {
        self.nodes
            .iter()
            .map(|n| &n.netns)
            .chain(self.pods.iter().map(|p| &p.netns))
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        // What cannot be removed now is collected by the next topology of any process.
        drop(leftovers::sweep(&self.prefix));
    }
}

impl Pod {
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.v4), port)
    }

    #[must_use]
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.v6), port)
    }

    /// The identity that this pod's certificate carries.
    #[must_use]
    pub fn spiffe_id(&self) -> String {
        format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            self.namespace, self.service_account
        )
    }
}

/// The device that joins the nodes, in both of them.
pub const LINK: &str = "mesh0";
/// The Kubernetes namespace of every pod.
pub const POD_NAMESPACE: &str = "demo";

/// The number whose hexadecimal digits are the decimal ones of `host`: 10.88.1.12 and …::12 belong
/// together.
fn as_hex(host: u8) -> Result<u16> {
    Ok(u16::from_str_radix(&host.to_string(), 16)?)
}

/// Waits until the kernel has made a link-local address for each of these devices. One that is set to make none is
/// waited for in vain, and not for long.
fn wait_link_local(netns: &Netns, devices: &[String]) -> Result<()> {
    netns.within(|| {
        drop(wait::until("the devices to be ready", CARRIER, || {
            // `/proc/net` would show the namespace of the process, not of this thread.
            let addresses = fs::read_to_string("/proc/thread-self/net/if_inet6").ok()?;
            let made = |device: &String| {
                addresses.lines().any(|line| {
                    let words: Vec<_> = line.split_whitespace().collect();
                    // The gateway's is ours.
                    words.first().is_some_and(|at| {
                        at.starts_with("fe80") && !at.ends_with("0000000000000001")
                    }) && words.last() == Some(&device.as_str())
                })
            };
            devices.iter().all(made).then_some(())
        }));
        Ok(())
    })
}

fn batch(netns: Option<&Netns>, lines: &str) -> Result<()> {
    let mut args = netns.map_or_else(Vec::new, |netns| vec!["-n", netns.name()]);
    args.extend(["-batch", "-"]);
    output(None, "ip", &args, lines)
        .map(drop)
        .with_context(|| format!("in\n{lines}"))
}

const NODES: [(&str, u8); 2] = [("a", 1), ("b", 2)];
const FIRST_HOST: u8 = 10;
/// The same on every node, as clusters do it; a pod needs no neighbour discovery of its own.
const GATEWAY_LINK_LOCAL: &str = "fe80::1";
/// How long the kernel may take to notice a carrier.
const CARRIER: Duration = Duration::from_secs(5);
/// Reverse path filtering as distributions set it: a source needs a route, by any device.
const LOOSE: &str = "2";
