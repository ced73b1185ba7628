//! Node processes beside the real control plane: etcd, kube-apiserver and istiod run, objects are written through the
//! API, and traffic says what became of them. Needs root and `cargo xtask setup --with controlplane`.
#![expect(
    clippy::disallowed_types,
    reason = "real time: nothing here runs on a paused clock"
)]
#![expect(clippy::print_stdout, reason = "each effect is measured and printed")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Heard, Server},
    cluster::Cluster,
    http,
    mesh::assert_alive,
    meshfile::MeshFile,
    netns::Netns,
    topology::{Pod, Topology},
    wait,
    ztunnel::{Node, Settings},
};

/// Two nodes, each with a node process, under a real control plane.
struct World {
    a: Node,
    b: Node,
    cluster: Cluster,
    // Last, so that the processes end before their namespaces go.
    topology: Topology,
}

impl World {
    fn start() -> Result<Self> {
        let began = Instant::now();
        let topology = Topology::builder()
            .pod("client", "a")
            .pod("other", "a")
            .pod("server", "b")
            .build()?;
        let cluster = Cluster::start(&topology, "a")?;
        println!("control plane serves after {:?}", began.elapsed());
        cluster.populate(&topology)?;
        let start = |node: &str| -> Result<Node> {
            let mut settings = Settings::of(&topology)?;
            settings.environment = cluster.environment(&topology, node)?;
            let text = MeshFile::of(&topology).pods_of(node);
            Node::launch(&topology, node, &text, settings)
        };
        let (mut a, mut b) = (start("a")?, start("b")?);
        println!("node a ready after {:?}", a.wait_ready()?);
        println!("node b ready after {:?}", b.wait_ready()?);
        Ok(Self {
            a,
            b,
            cluster,
            topology,
        })
    }

    fn pod(&self, name: &str) -> Result<&Pod> {
        self.topology.pod(name)
    }

    /// Writes objects, and says how long their effect took.
    fn apply(&self, what: &str, yaml: &str, effect: impl FnMut() -> Option<()>) -> Result<()> {
        let began = Instant::now();
        self.cluster.apply(yaml)?;
        wait::until(what, PATIENCE, effect)?;
        println!(
            "{what}: {:?} from the API write to its effect",
            began.elapsed()
        );
        Ok(())
    }
}

fn answers(from: &Netns, to: SocketAddr) -> bool {
    apps::knock(from, to, b"hello", Duration::from_secs(2))
        .is_ok_and(|(heard, _)| heard == Heard::Answer(b"hello".to_vec()))
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: demo}}\nspec: {spec}\n"
    )
}

#[test]
fn from_nothing_to_traffic_between_pods_of_two_nodes() -> Result<()> {
    let mut world = World::start()?;
    let (client, other, server) = (
        world.pod("client")?.clone(),
        world.pod("other")?.clone(),
        world.pod("server")?.clone(),
    );
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = world.a.log().mark();
    for to in [server.at(9000), server.at6(9000)] {
        ensure!(answers(&client.netns, to), "{to} does not answer");
    }
    let line = world
        .a
        .wait_access(mark, &[("direction", "outbound"), ("reason", "complete")])?;
    ensure!(
        line.get("dst.identity") == Some(&*server.spiffe_id()),
        "{line:?}"
    );
    ensure!(
        line.get("src.identity") == Some(&*client.spiffe_id()),
        "{line:?}"
    );
    println!("{line:?}");

    // A service gets its endpoints from its selector.
    let vip: SocketAddr = ([10, 96, 7, 7], 80).into();
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: demo}\n\
                   spec: {clusterIP: 10.96.7.7, selector: {app: server}, ports: [{port: 80, targetPort: 9000}]}\n";
    world.apply("a service", service, || {
        answers(&client.netns, vip).then_some(())
    })?;

    // Policy, with a connection of each kind open.
    let allow = "{selector: {matchLabels: {app: server}}, action: ALLOW, \
                 rules: [{from: [{source: {principals: [cluster.local/ns/demo/sa/client]}}]}]}";
    let to = server.at(9000);
    world.apply(
        "an ALLOW for the client",
        &policy("only-client", allow),
        || (!answers(&other.netns, to)).then_some(()),
    )?;
    ensure!(answers(&client.netns, to), "the one that it allows");
    let began = Instant::now();
    world.cluster.kubectl(
        &["-n", "demo", "delete", "authorizationpolicy", "only-client"],
        "",
    )?;
    wait::until("the ALLOW to go", PATIENCE, || {
        answers(&other.netns, to).then_some(())
    })?;
    println!("a deleted policy: {:?}", began.elapsed());

    // istiod dies; traffic does not notice; what changed meanwhile arrives when it is back.
    world.cluster.kill_istiod()?;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        ensure!(
            answers(&client.netns, to),
            "without istiod, after {:?}",
            began.elapsed()
        );
    }
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                  metadata: {name: strict, namespace: demo}\nspec: {mtls: {mode: STRICT}}\n";
    world.cluster.apply(strict)?;
    world.cluster.start_istiod(&[])?;
    let node = world.topology.node("b")?.netns.clone();
    let began = Instant::now();
    wait::until("STRICT", PATIENCE, || (!answers(&node, to)).then_some(()))?;
    println!(
        "STRICT, written while istiod was away: {:?} after it was back",
        began.elapsed()
    );
    ensure!(answers(&client.netns, to), "the mesh's own");
    ensure!(world.b.access_lines().len() > 4);
    Ok(())
}

#[test]
fn a_connection_age_limit_is_not_noticed() -> Result<()> {
    let mut world = World::start()?;
    let (client, server) = (world.pod("client")?.clone(), world.pod("server")?.clone());
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    ensure!(answers(&client.netns, server.at(9000)));
    world.cluster.kill_istiod()?;
    let mark = world.a.log().mark();
    world
        .cluster
        .start_istiod(&["--keepaliveMaxServerConnectionAge", "6s"])?;
    for _ in 0..2 {
        let left = |line: &str| line.contains("announced its leave").then_some(());
        world
            .a
            .log()
            .wait_since(mark, "a swap of streams", PATIENCE, left)?;
        ensure!(answers(&client.netns, server.at(9000)));
    }
    let cut = world.a.log().lines();
    let cut = cut
        .iter()
        .skip_while(|line| !line.contains("connected to the control plane"));
    ensure!(cut.clone().count() > 0);
    world.a.metrics().context("metrics").map(|metrics| {
        println!(
            "{:?}",
            metrics.sum("istio_xds_connection_terminations_total", &[])
        )
    })
}

// B120: the established tools read the dump.
#[test]
fn istioctl_lists_what_a_node_knows() -> Result<()> {
    let world = World::start()?;
    let (client, server) = (world.pod("client")?, world.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: demo}\n\
                   spec: {clusterIP: 10.96.7.7, selector: {app: server}, ports: [{port: 80, targetPort: 9000}]}\n";
    let vip: SocketAddr = ([10, 96, 7, 7], 80).into();
    world.apply("a service", service, || {
        answers(&client.netns, vip).then_some(())
    })?;
    let allow = "{selector: {matchLabels: {app: server}}, action: ALLOW, \
                 rules: [{from: [{source: {principals: [cluster.local/ns/demo/sa/client]}}]}]}";
    let other = &world.pod("other")?.netns;
    world.apply(
        "an ALLOW for the client",
        &policy("only-client", allow),
        || (!answers(other, server.at(9000))).then_some(()),
    )?;
    let mut open = apps::dial(&client.netns, vip)?;
    assert_alive(&mut open)?;
    let netns = world.a.netns();
    let at = SocketAddr::from(([127, 0, 0, 1], 15000));
    let dump = wait::until("the policy on the client's node", PATIENCE, || {
        let dump = http::get(netns, at, "/config_dump").ok()?.body;
        dump.contains("only-client").then_some(dump)
    })?;
    let file = world.topology.directory()?.join("dump.json");
    std::fs::write(&file, dump)?;
    let file = file.to_string_lossy();
    let list = |what: &str| -> Result<String> {
        let table = world
            .cluster
            .istioctl(netns, &["ztunnel-config", what, "--file", &file])?;
        println!("{table}");
        Ok(table)
    };
    for (what, row) in [
        ("workloads", &["demo", "client", "a", "None", "HBONE"][..]),
        ("workloads", &["demo", "server", "b", "None", "HBONE"]),
        ("services", &["demo", "web", "10.96.7.7", "None", "1/1"]),
        (
            "policies",
            &["demo", "only-client", "Allow", "WorkloadSelector"],
        ),
        (
            "certificates",
            &[&client.spiffe_id(), "Leaf", "Available", "true"],
        ),
        (
            "certificates",
            &[&client.spiffe_id(), "Root", "Available", "true"],
        ),
        (
            "connections",
            &["client", "Outbound", "web.demo.svc.cluster.local", "HBONE"],
        ),
    ] {
        let table = list(what)?;
        let has = |line: &str| row.iter().all(|part| line.contains(part));
        ensure!(table.lines().any(has), "{what}: no row with {row:?}");
    }
    let all = list("all")?;
    for part in ["client", "only-client", "Leaf", "Outbound"] {
        ensure!(all.contains(part), "all: nothing of {part}");
    }
    drop(open);
    Ok(())
}

const PATIENCE: Duration = Duration::from_secs(60);
