//! A node with many pods: enrolling them takes a while, in which probes are answered, those that are
//! enrolled already are served, and a new file is taken.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    http,
    meshfile::MeshFile,
    process::output,
    topology::Topology,
    wait,
    ztunnel::{Node, Settings},
};

use crate::mesh::{Before, PATIENCE, assert_echo, cpu_time};

/// Empty namespaces beside those of a topology.
struct Crowd(Vec<String>);

impl Crowd {
    fn new(topology: &Topology, count: usize) -> Result<Self> {
        let names = (0..count).map(|n| format!("{}crowd{n}", topology.prefix()));
        let crowd = Self(names.collect());
        crowd.batch("add")?;
        Ok(crowd)
    }

    fn batch(&self, verb: &str) -> Result<()> {
        let line = |name: &String| format!("netns {verb} {name}\n");
        let lines: String = self.0.iter().map(line).collect();
        output(None, "ip", &["-force", "-batch", "-"], &lines).map(drop)
    }

    /// The file of a node, with this crowd in it.
    fn join(&self, file: &str) -> String {
        let (mut workloads, mut pods) = (String::new(), String::new());
        for (n, name) in self.0.iter().enumerate() {
            let (high, low) = (n / 250, n % 250 + 1);
            let workload = format!(
                "  - {{uid: demo//Pod/crowd/p{n}, name: p{n}, namespace: crowd, serviceAccount: p{n}, \
                 workloadIps: [\"10.77.{high}.{low}\"], protocol: HBONE, node: a, services: {{}}}}\n"
            );
            let pod = format!(
                "  - {{name: p{n}, namespace: crowd, serviceAccount: p{n}, netns: /run/netns/{name}}}\n"
            );
            workloads.push_str(&workload);
            pods.push_str(&pod);
        }
        file.replacen("pods:\n", &format!("{workloads}pods:\n{pods}"), 1)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        drop(self.batch("del"));
    }
}

#[test]
fn many_pods_are_enrolled_while_probes_and_connections_are_served() -> Result<()> {
    let topology = Topology::builder()
        .pod("client", "a")
        .pod("server", "b")
        .build()?;
    let count = how_many()?;
    let crowd = Crowd::new(&topology, count)?;
    let file = MeshFile::of(&topology);
    let settings = Settings::of(&topology)?;
    let b = Node::start(&topology, "b", &file.for_node("b"), settings.clone())?;
    let mut a = Node::start(&topology, "a", &file.for_node("a"), settings)?;
    let client = topology.pod("client")?;
    let server = topology.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;

    let mark = a.log().mark();
    let before = Before::of(&a)?;
    let began = Instant::now();
    a.replace_file(&crowd.join(&file.for_node("a")))?;
    let applied = |line: &str| line.contains("state applied").then_some(());
    let mut slowest = Duration::ZERO;
    let probe = SocketAddr::from(([127, 0, 0, 1], 15021));
    wait::until("the pods to be enrolled", Duration::from_secs(300), || {
        let asked = Instant::now();
        let ready = http::get(a.netns(), probe, "/healthz/ready").ok()?;
        slowest = slowest.max(asked.elapsed());
        assert_eq!(ready.status, 200, "{}", ready.body);
        assert_echo(&client.netns, server.at(9000)).ok()?;
        a.log().wait_since(mark, "", Duration::ZERO, applied).ok()
    })?;
    println!(
        "{count} pods: {:?}; a probe took {slowest:?} at most",
        began.elapsed()
    );
    ensure!(
        slowest < Duration::from_secs(15),
        "a probe took {slowest:?}"
    );
    let pods = u32::try_from(count).map(f64::from)?;
    before.wait_gain("ztunnel_enrol_pods", &[("state", "enrolled")], pods)?;

    // Nothing to do costs little, each second anew.
    let spent = cpu_time(a.pid())?;
    std::thread::sleep(Duration::from_secs(3));
    let spent = cpu_time(a.pid())?.saturating_sub(spent);
    println!("at rest it used {spent:?} of processor time in 3 s");
    ensure!(
        spent < Duration::from_millis(900),
        "at rest it used {spent:?} in 3 s"
    );

    // A pod in trouble is counted, and readiness tells.
    let mark = a.log().mark();
    let lost = crowd
        .join(&file.for_node("a"))
        .replacen("crowd0}", "nowhere}", 1);
    a.replace_file(&lost)?;
    a.log().wait_since(mark, "the reload", PATIENCE, applied)?;
    before.wait_gain("ztunnel_enrol_pods", &[("state", "troubled")], 1.0)?;
    before.wait_gain("ztunnel_enrol_pods", &[("state", "enrolled")], pods - 1.0)?;
    let ready = http::get(a.netns(), probe, "/healthz/ready")?;
    ensure!(ready.status == 200, "the others are served: {}", ready.body);
    ensure!(ready.body.contains("pods in trouble: 1"), "{}", ready.body);

    // All of them at the start of a process, and then none.
    a.kill()?;
    let began = Instant::now();
    a.restart()?;
    a.wait_ready()?;
    println!("started over {count} pods in {:?}", began.elapsed());
    assert_echo(&client.netns, server.at(9000))?;
    let mark = a.log().mark();
    let began = Instant::now();
    a.replace_file(&file.for_node("a"))?;
    a.log()
        .wait_since(mark, "the reload", Duration::from_secs(300), applied)?;
    println!("released {count} pods in {:?}", began.elapsed());
    assert_echo(&client.netns, server.at(9000)).context("after the crowd has left")?;
    drop(b);
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a test may be asked for more")]
fn how_many() -> Result<usize> {
    Ok(std::env::var("ZTUNNEL_TEST_PODS").map_or(Ok(PODS), |count| count.parse())?)
}

/// Enough for several rounds of enrolment. More by hand: `ZTUNNEL_TEST_PODS`.
const PODS: usize = 100;
