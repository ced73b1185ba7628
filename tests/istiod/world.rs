//! What every test here begins with: a control plane, two nodes with a process and an agent each, and pods that exist
//! as objects and are enrolled. Takes a plan; gives the pieces, and says how long a write took to have its effect.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    agent::{Agent, Peer},
    cluster::{Cluster, Enrolled},
    mesh::PATIENCE,
    netns::Netns,
    process::output,
    rules,
    topology::{Builder, Pod, Topology},
    wait,
    ztunnel::{Node, Settings},
};

/// What there is to be.
pub(crate) struct Plan {
    builder: Builder,
    fates: Vec<(&'static str, Fate)>,
    namespaces: BTreeMap<&'static str, &'static str>,
    rules_on: Option<&'static str>,
    environment: Vec<(&'static str, &'static str, &'static str)>,
    istiod: Vec<&'static str>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Enrolled,
    Outside,
    Later,
}

/// A node process with the agent that tells it about pods. Fields are dropped in this order.
pub(crate) struct Served {
    pub(crate) node: Node,
    peer: Peer,
    _agent: Agent,
}

/// Two nodes under a real control plane.
pub(crate) struct World {
    pub(crate) a: Served,
    pub(crate) b: Served,
    pub(crate) cluster: Cluster,
    pods: Vec<Pod>,
    // Last, so that the processes end before their namespaces go.
    pub(crate) topology: Topology,
}

impl Plan {
    pub(crate) fn new() -> Self {
        Self {
            builder: Topology::builder(),
            fates: Vec::new(),
            namespaces: BTreeMap::new(),
            rules_on: None,
            environment: Vec::new(),
            istiod: Vec::new(),
        }
    }

    /// A pod of the mesh.
    pub(crate) fn pod(self, name: &'static str, node: &str) -> Self {
        self.with(name, node, Fate::Enrolled)
    }

    /// A pod that is not enrolled.
    pub(crate) fn outside(self, name: &'static str, node: &str) -> Self {
        self.with(name, node, Fate::Outside)
    }

    /// A pod that only [`World::enrol`] makes known to anybody.
    pub(crate) fn later(self, name: &'static str, node: &str) -> Self {
        self.with(name, node, Fate::Later)
    }

    fn with(mut self, name: &'static str, node: &str, fate: Fate) -> Self {
        self.builder = self.builder.pod(name, node);
        self.fates.push((name, fate));
        self
    }

    /// This pod is in another namespace than the rest.
    pub(crate) fn in_namespace(mut self, pod: &'static str, namespace: &'static str) -> Self {
        self.namespaces.insert(pod, namespace);
        self
    }

    /// On this node the agent's rules redirect, on the other one our programs do.
    pub(crate) fn rules_on(mut self, node: &'static str) -> Self {
        self.rules_on = Some(node);
        self
    }

    pub(crate) fn env(
        mut self,
        node: &'static str,
        name: &'static str,
        value: &'static str,
    ) -> Self {
        self.environment.push((node, name, value));
        self
    }

    /// Arguments of istiod.
    pub(crate) fn istiod(mut self, arguments: &[&'static str]) -> Self {
        self.istiod.extend(arguments);
        self
    }

    /// Everything up to the readiness of both nodes.
    pub(crate) fn start(self) -> Result<World> {
        let began = Instant::now();
        let topology = self.builder.clone().build()?;
        let mut pods = topology.pods().to_vec();
        for pod in &mut pods {
            if let Some(namespace) = self.namespaces.get(&*pod.name) {
                (*namespace).clone_into(&mut pod.namespace);
            }
        }
        for node in topology.nodes() {
            // Whoever dials a service that nobody knows yet is refused at once, and not left to the kernel's limit on
            // messages of what is unreachable.
            let refuse = ["route", "add", "local", SERVICES, "dev", "lo"];
            output(Some(&node.netns), "ip", &refuse, "")?;
        }
        let cluster = Cluster::start(&topology, "a", &self.istiod)?;
        println!(
            "measured: the control plane serves after {:?}",
            began.elapsed()
        );
        cluster.populate(&topology)?;
        let known = pods.iter().filter_map(|pod| match self.fate(pod) {
            Fate::Enrolled => Some((pod, Enrolled::Yes)),
            Fate::Outside => Some((pod, Enrolled::No)),
            Fate::Later => None,
        });
        cluster.add(&known.collect::<Vec<_>>())?;
        let mut launched = Vec::new();
        for node in ["a", "b"] {
            launched.push(self.launch(&topology, &cluster, node)?);
        }
        let mut served = Vec::new();
        for (mut node, agent) in launched {
            let peer = agent.accept()?;
            let name = node.name().to_owned();
            let own = pods
                .iter()
                .filter(|pod| pod.node == name && self.fate(pod) == Fate::Enrolled);
            for pod in own {
                if self.rules_on == Some(&*name) {
                    rules::install(&pod.netns)?;
                }
                let answer = peer.add(&pod.name, pod)?;
                ensure!(answer.is_empty(), "{}: {answer}", pod.name);
            }
            let answer = peer.snapshot_sent()?;
            ensure!(answer.is_empty(), "node {name}: {answer}");
            println!(
                "measured: node {name} is ready {:?} later",
                node.wait_ready()?
            );
            served.push(Served {
                node,
                peer,
                _agent: agent,
            });
        }
        let (b, a) = served.pop().zip(served.pop()).context("two nodes")?;
        Ok(World {
            a,
            b,
            cluster,
            pods,
            topology,
        })
    }

    fn fate(&self, pod: &Pod) -> Fate {
        let mut fates = self.fates.iter();
        let fate = fates.find(|(name, _)| *name == pod.name);
        fate.map_or(Fate::Later, |(_, fate)| *fate)
    }

    fn launch(&self, topology: &Topology, cluster: &Cluster, node: &str) -> Result<(Node, Agent)> {
        let path = topology.directory()?.join(format!("{node}.sock"));
        let agent = Agent::listen(&path)?;
        let mut settings = Settings::of(topology)?
            // Everything comes from the control plane.
            .env("LOCAL_XDS_PATH", "")
            .env("INPOD_UDS", &path.to_string_lossy());
        if self.rules_on != Some(node) {
            settings = settings.env("CAPTURE", "ebpf");
        }
        let environment = cluster.environment(topology, node)?;
        settings.environment.extend(environment);
        for (of, name, value) in &self.environment {
            if *of == node {
                settings = settings.env(name, value);
            }
        }
        Ok((Node::launch(topology, node, "", settings)?, agent))
    }
}

impl World {
    pub(crate) fn pod(&self, name: &str) -> Result<&Pod> {
        let mut pods = self.pods.iter();
        let found = pods.find(|pod| pod.name == name);
        found.with_context(|| format!("no pod {name}"))
    }

    /// The namespace that a pod's node runs in.
    pub(crate) fn node_netns(&self, node: &str) -> Result<&Netns> {
        Ok(&self.topology.node(node)?.netns)
    }

    /// The object first, as its kubelet has it before its node's agent does; then the agent's Add.
    pub(crate) fn enrol(&self, name: &str) -> Result<()> {
        let pod = self.pod(name)?;
        self.cluster.add(&[(pod, Enrolled::Yes)])?;
        let served = if pod.node == "a" { &self.a } else { &self.b };
        let answer = served.peer.add(name, pod)?;
        ensure!(answer.is_empty(), "{name}: {answer}");
        Ok(())
    }

    /// Writes objects, waits for their effect and says how long it took.
    pub(crate) fn apply(
        &self,
        what: &str,
        yaml: &str,
        effect: impl FnMut() -> Option<()>,
    ) -> Result<()> {
        timed(what, || self.cluster.apply(yaml), || poll(what, effect))
    }

    /// Deletes an object at once, waits for the effect and says how long it took.
    pub(crate) fn delete(
        &self,
        what: &str,
        object: &[&str],
        effect: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut args = vec!["delete", "--wait=false", "--grace-period=0", "--force"];
        args.extend(object);
        let write = || self.cluster.kubectl(&args, "").map(drop);
        timed(what, write, effect)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A test that passes is not read; one that fails wants to be understood.
        for served in [&self.a, &self.b] {
            let lines = served.node.log().lines();
            println!(
                "the last of {} lines of node {}:",
                lines.len(),
                served.node.name()
            );
            for line in lines.iter().rev().take(LOG_TAIL).rev() {
                println!("  {line}");
            }
        }
    }
}

/// Asks until the effect is there.
pub(crate) fn poll(what: &str, effect: impl FnMut() -> Option<()>) -> Result<()> {
    wait::until(what, PATIENCE, effect)
}

/// Makes a change, waits for its effect, and says how long that took: kubectl itself is most of it.
pub(crate) fn timed(
    what: &str,
    write: impl FnOnce() -> Result<()>,
    effect: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let began = Instant::now();
    write()?;
    let written = Instant::now();
    effect()?;
    let (all, after) = (began.elapsed(), written.elapsed());
    println!(
        "measured: {what}: effect {} ms after kubectl had ended, {} ms after it had begun",
        millis(after),
        millis(all)
    );
    Ok(())
}

fn millis(time: Duration) -> u128 {
    time.as_millis()
}

/// A service in front of the pods of one name.
pub(crate) fn service(name: &str, vip: SocketAddr, app: &str) -> String {
    let (ip, port) = (vip.ip(), vip.port());
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
         spec: {{clusterIP: {ip}, selector: {{app: {app}}}, ports: [{{port: {port}, targetPort: 9000}}]}}\n"
    )
}

pub(crate) fn authorization(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

pub(crate) fn peer_authentication(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

/// Where services have their addresses.
const SERVICES: &str = "10.96.0.0/16";
/// Lines of each node.
const LOG_TAIL: usize = 40;
