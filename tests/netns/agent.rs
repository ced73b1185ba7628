//! Enrolment by a node agent: its messages and descriptors, in and out of order, and what becomes of
//! the pods when it dies, lies or talks nonsense. Our programs capture, so the pods hold no rules.

use std::{
    fs::File,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    panic::resume_unwind,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    agent::{self, Agent, Peer, SNAPSHOT_SENT},
    apps::{self, Server},
    http,
    meshfile::MeshFile,
    netns::Netns,
    process::output,
    topology::{Builder, LINK, Pod, Topology},
    wait,
    wire::Sniffer,
    ztunnel::{Node, Settings},
};

use crate::mesh::{PATIENCE, WATCH, assert_alive, assert_echo, knock, wait_end};

/// A node process and its agent.
pub(crate) struct Agented {
    pub(crate) node: Node,
    pub(crate) agent: Agent,
    pub(crate) peer: Peer,
}

impl Agented {
    /// The process, connected to its agent, which has said nothing yet.
    pub(crate) fn launch(
        topology: &Topology,
        node: &str,
        file: &MeshFile,
        settings: Settings,
    ) -> Result<Self> {
        let path = topology.directory()?.join(format!("{node}.sock"));
        let agent = Agent::listen(&path)?;
        let settings = settings.env("INPOD_UDS", &path.to_string_lossy());
        let node = Node::launch(topology, node, &file.for_node(node), settings)?;
        let peer = agent.accept()?;
        Ok(Self { node, agent, peer })
    }

    /// The same, ready, with all pods of the node added, each by its name as uid.
    fn start(topology: &Topology, node: &str, file: &MeshFile, settings: Settings) -> Result<Self> {
        let mut started = Self::launch(topology, node, file, settings)?;
        for pod in topology.pods().iter().filter(|pod| pod.node == node) {
            let answer = started.peer.add(&pod.name, pod)?;
            ensure!(answer.is_empty(), "{}: {answer}", pod.name);
        }
        succeeds(started.peer.snapshot_sent())?;
        started.node.wait_ready()?;
        Ok(started)
    }

    /// The next connection of the process, ended by an empty snapshot of kept pods.
    fn reconnect(&mut self, kept: &[&str]) -> Result<()> {
        self.peer = self.agent.accept()?;
        for uid in kept {
            succeeds(self.peer.keep(uid))?;
        }
        succeeds(self.peer.snapshot_sent())
    }
}

/// Our programs capture.
fn settings(topology: &Topology) -> Result<Settings> {
    Ok(Settings::of(topology)?.env("CAPTURE", "ebpf"))
}

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("second", "a")
        .pod("server", "b")
}

/// Both nodes with agents. The topology comes first, so that the processes end before it.
fn both() -> Result<(Topology, Agented, Agented)> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology).unlisted();
    let settings = settings(&topology)?;
    let a = Agented::start(&topology, "a", &file, settings.clone())?;
    let b = Agented::start(&topology, "b", &file, settings)?;
    Ok((topology, a, b))
}

pub(crate) fn succeeds(answer: Result<String>) -> Result<()> {
    let answer = answer?;
    ensure!(answer.is_empty(), "refused: {answer}");
    Ok(())
}

pub(crate) fn readiness(node: &Node) -> Result<(u16, String)> {
    let at = SocketAddr::from(([127, 0, 0, 1], 15021));
    let answer = http::get(node.netns(), at, "/healthz/ready")?;
    Ok((answer.status, answer.body))
}

fn wait_unready(node: &Node) -> Result<()> {
    wait::until("the node to be unready", PATIENCE, || {
        matches!(readiness(node), Ok((500, _))).then_some(())
    })
}

pub(crate) fn wait_metric(node: &Node, name: &str, value: f64) -> Result<()> {
    wait::until(&format!("{name} to be {value}"), PATIENCE, || {
        let now = node.metrics().ok()?.sum(name, &[]);
        ((now - value).abs() < 0.5).then_some(())
    })
}

// B063, B064, B077, B082, B083.
#[test]
fn an_agents_pods_are_served_from_its_add_to_its_delete() -> Result<()> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology).unlisted();
    let settings = settings(&topology)?
        // Longer than anybody waits here: what ends, ends without it.
        .env("CONNECTION_TERMINATION_DEADLINE", "1h");
    let _b = Agented::start(&topology, "b", &file, settings.clone())?;
    let (client, server) = (topology.pod("client")?, topology.pod("server")?);
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut a = Agented::launch(&topology, "a", &file, settings)?;
    let pending = "not ready, pending: workload proxy manager";
    wait::until("readiness to answer", PATIENCE, || readiness(&a.node).ok())?;
    ensure!(readiness(&a.node)? == (500, pending.into()));
    succeeds(a.peer.add("uid-1", client))?;
    ensure!(
        readiness(&a.node)? == (500, pending.into()),
        "not before the end"
    );
    succeeds(a.peer.snapshot_sent())?;
    a.node.wait_ready()?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    ensure!(app.wait_seen(1, PATIENCE)?[0].peer.ip() == client.at(0).ip());
    for (name, value) in [
        ("workload_manager_active_proxy_count", 1.0),
        ("workload_manager_pending_proxy_count", 0.0),
        ("workload_manager_proxies_started_total", 1.0),
        ("workload_manager_proxies_stopped_total", 0.0),
    ] {
        wait_metric(&a.node, name, value)?;
    }
    succeeds(a.peer.delete("uid-1"))?;
    wait_end(&stream)?;
    a.node.wait_access(0, &[("reason", "pod_removed")])?;
    wait_metric(&a.node, "workload_manager_active_proxy_count", 0.0)?;
    wait_metric(&a.node, "workload_manager_proxies_stopped_total", 1.0)?;
    ensure!(readiness(&a.node)?.0 == 200);
    Ok(())
}

/// That a pod gets nowhere, and nothing of what it says is on its node's cable.
struct Closed<'a> {
    to: SocketAddr,
    sniffer: &'a Sniffer,
}

impl Closed<'_> {
    fn assert(&self, pod: &Pod, when: &str) -> Result<()> {
        let heard = knock(&pod.netns, self.to, CANARY, WATCH)?;
        ensure!(!heard.answered(), "{when}, {}: {heard:?}", pod.name);
        ensure!(
            self.sniffer
                .seen()?
                .segments_on(self.to.port())
                .next()
                .is_none(),
            "{when}, {}: the application's port is on the cable",
            pod.name
        );
        Ok(())
    }

    /// As long as the process takes for several rounds of its own, which would let go of what
    /// nobody wants.
    fn stays(&self, pod: &Pod, when: &str) -> Result<()> {
        (0..4).try_for_each(|_| self.assert(pod, when))
    }

    /// It has left the mesh: it goes out as it is, which also shows that this would be seen.
    fn wait_open(&self, pod: &Pod) -> Result<()> {
        wait::until(&format!("{} to leave the mesh", pod.name), PATIENCE, || {
            knock(&pod.netns, self.to, CANARY, WATCH)
                .is_ok_and(|heard| heard.answered())
                .then_some(())
        })?;
        ensure!(self.sniffer.seen()?.contains(CANARY)?, "nothing was seen");
        Ok(())
    }
}

// B071, B072, B078, B079.
#[test]
fn an_agent_that_dies_takes_no_pod_along() -> Result<()> {
    let (topology, mut a, _b) = both()?;
    let (client, second) = (topology.pod("client")?, topology.pod("second")?);
    let server = topology.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    let path = a.agent.path().to_owned();
    let Agented { node, agent, peer } = a;
    drop(peer);
    drop(agent);
    wait_unready(&node)?;
    let absent = |line: &str| line.contains("no node agent:").then_some(());
    node.log().wait_for("the absent agent", PATIENCE, absent)?;
    assert_alive(&mut stream).context("an open connection")?;
    assert_echo(&client.netns, server.at(9000)).context("a new connection")?;
    // It comes back, has lost one namespace, and does not name the other pod any more.
    let agent = Agent::listen(&path)?;
    let peer = agent.accept()?;
    succeeds(peer.keep("client"))?;
    assert_echo(&second.netns, server.at(9000)).context("before the end of the snapshot")?;
    let unnamed = apps::dial(&second.netns, server.at(9000))?;
    succeeds(peer.snapshot_sent())?;
    a = Agented { node, agent, peer };
    a.node.wait_ready()?;
    wait_metric(&a.node, "workload_manager_active_proxy_count", 1.0)?;
    assert_alive(&mut stream).context("across the agent's death")?;
    assert_echo(&client.netns, server.at(9000))?;
    // The other one is cut off, and stays so: nobody has said that it leaves.
    wait_end(&unnamed)?;
    let sniffer = Sniffer::on(&topology.node("a")?.netns, LINK)?;
    let closed = Closed {
        to: server.at(9000),
        sniffer: &sniffer,
    };
    closed.stays(second, "not named any more")?;
    let is_closed = || {
        let now = a.node.metrics().ok()?;
        let pods = now.sum("ztunnel_enrol_pods", &[("state", "closed")]);
        (pods > 0.5).then_some(())
    };
    wait::until("the pod to count as closed", PATIENCE, is_closed)?;
    // Named again it is served again; deleted it leaves.
    succeeds(a.peer.add("second", second))?;
    assert_echo(&second.netns, server.at(9000)).context("named again")?;
    succeeds(a.peer.delete("second"))?;
    closed.wait_open(second)
}

// B066, B067, B070, B073, B085.
#[test]
fn an_agent_that_talks_nonsense_is_told_and_met_again_and_no_pod_notices() -> Result<()> {
    let (topology, mut a, _b) = both()?;
    let (client, server) = (topology.pod("client")?, topology.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    let netns = client.netns.open()?;
    let add = agent::add("client", client);
    let half = &add[..add.len() / 2];
    let long = agent::delete(&"x".repeat(1100));
    let keep = agent::keep("client");
    for (name, bytes, descriptors, said) in [
        ("half a message", half, &[][..], "protobuf"),
        ("noise", b"\xff\xfe\xfd".as_slice(), &[], "protobuf"),
        ("more than a packet", &long, &[], "longer than"),
        ("an Add without a descriptor", &add, &[], "0 descriptors"),
        ("with two", &add, &[&netns, &netns], "2 descriptors"),
        ("a Keep with one", &keep, &[&netns], "1 descriptors"),
        ("a Keep after the snapshot", &keep, &[], "before the end"),
        ("a second end of it", SNAPSHOT_SENT, &[], "has ended before"),
    ] {
        let check = || -> Result<()> {
            a.peer.send(bytes, descriptors)?;
            let answer = a.peer.answer()?;
            ensure!(answer.contains(said), "it said {answer}");
            a.peer.wait_closed()
        };
        check().context(name)?;
        a.reconnect(&["client", "second"]).context(name)?;
        assert_alive(&mut stream).context(name)?;
    }
    assert_echo(&client.netns, server.at(9000))?;
    wait_metric(&a.node, "workload_manager_active_proxy_count", 2.0)?;
    // All that came beside those messages is closed, and what it came from is held once.
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", a.node.pid()))?;
    let inode = netns.metadata()?.ino();
    let held = descriptors
        .flatten()
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .filter(|behind| behind.ino() == inode)
        .count();
    ensure!(held == 1, "{held} descriptors of the pod's namespace");
    Ok(())
}

// B070, B077, and whatever else one pod lacks: it is refused, counts as one that is not served, keeps
// what capture it has, and no other pod notices.
#[test]
fn a_pod_that_cannot_be_enrolled_stays_as_it_is_and_the_node_is_unready() -> Result<()> {
    let (topology, mut a, _b) = both()?;
    let (client, second) = (topology.pod("client")?, topology.pod("second")?);
    let server = topology.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = Sniffer::on(&topology.node("a")?.netns, LINK)?;
    let closed = Closed {
        to: server.at(9000),
        sniffer: &sniffer,
    };
    let nameless = Pod {
        service_account: String::new(),
        ..second.clone()
    };
    let bare = b"\x0a\x0a\x0a\x08no-more-";
    let null = File::open("/dev/null")?;
    // One with a descriptor of something else, one without an account, one without anything.
    let spoilt = |peer: &Peer| -> Result<()> {
        peer.send(&agent::add("client", client), &[&null])?;
        let answer = peer.answer()?;
        ensure!(answer.contains("not of a network namespace"), "{answer}");
        let answer = peer.add("second", &nameless)?;
        ensure!(
            answer.contains("pod second has no service account"),
            "{answer}"
        );
        peer.send(bare, &[&second.netns.open()?])?;
        let answer = peer.answer()?;
        ensure!(answer.contains("has no workload"), "{answer}");
        peer.send(b"\x32\x00", &[])?;
        let answer = peer.answer()?;
        ensure!(answer.contains("nothing that is known"), "{answer}");
        succeeds(peer.snapshot_sent())
    };
    let unready = |node: &Node| -> Result<()> {
        let pending = "not ready, pending: workload proxy manager\npods in trouble: 3, see the log";
        wait::until("three pods to be in trouble", PATIENCE, || {
            (readiness(node).ok()? == (500, pending.into())).then_some(())
        })?;
        wait_metric(node, "workload_manager_pending_proxy_count", 3.0)
    };
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    // While they are served.
    drop(a.peer);
    a.peer = a.agent.accept()?;
    spoilt(&a.peer)?;
    unready(&a.node)?;
    assert_alive(&mut stream)?;
    for pod in [client, second] {
        assert_echo(&pod.netns, server.at(9000)).context(pod.name.clone())?;
    }
    ensure!(
        sniffer.seen()?.segments_on(9000).next().is_none(),
        "in plaintext"
    );
    // While nobody serves them: a new process has no namespace of them.
    a.node.kill()?;
    a.node.restart()?;
    a.peer = a.agent.accept()?;
    spoilt(&a.peer)?;
    unready(&a.node)?;
    for pod in [client, second] {
        closed.stays(pod, "refused")?;
    }
    // As it should be, pod by pod; the third leaves, which is all that can be done with it.
    succeeds(a.peer.add("client", client))?;
    assert_echo(&client.netns, server.at(9000))?;
    succeeds(a.peer.add("second", second))?;
    assert_echo(&second.netns, server.at(9000))?;
    ensure!(readiness(&a.node)?.0 == 500, "one is still in trouble");
    succeeds(a.peer.delete("no-more-"))?;
    a.node.wait_ready()?;
    ensure!(readiness(&a.node)? == (200, "ready".into()));
    // It has been one connection all the time.
    wait_metric(&a.node, "ztunnel_enrol_agent_connections_total", 1.0)?;
    wait_metric(&a.node, "ztunnel_enrol_agent_refusals_total", 4.0)
}

// An answer waits for its own pod, whatever is the matter with others.
#[test]
fn pods_in_trouble_hold_up_no_answer() -> Result<()> {
    let mut builder = Topology::builder();
    let names: Vec<String> = (0..12).map(|number| format!("taken{number}")).collect();
    for name in &names {
        builder = builder.pod(name, "a");
    }
    let topology = builder.pod("own", "b").build()?;
    let settings = settings(&topology)?;
    // Another node's process serves them: they are refused, again and again.
    let file = MeshFile::of(&topology);
    let mut a = Node::start(&topology, "a", &file.for_node("a"), settings.clone())?;
    let file = MeshFile::of(&topology).unlisted();
    let mut b = Agented::launch(&topology, "b", &file, settings)?;
    for name in &names {
        let answer = b.peer.add(name, topology.pod(name)?)?;
        ensure!(answer.contains("another node process"), "{answer}");
    }
    let own = topology.pod("own")?;
    succeeds(b.peer.snapshot_sent())?;
    for _ in 0..20 {
        succeeds(b.peer.add("own", own))?;
        succeeds(b.peer.delete("own"))?;
    }
    succeeds(b.peer.add("own", own))?;
    wait_metric(&b.node, "workload_manager_pending_proxy_count", 12.0)?;
    wait_metric(&b.node, "ztunnel_enrol_agent_connections_total", 1.0)?;
    // The other one lets them go, and nobody has to ask again.
    a.kill()?;
    a.release()?;
    b.node.wait_ready()?;
    wait_metric(&b.node, "workload_manager_active_proxy_count", 13.0)
}

// An agent that ends every connection at once is asked less and less often, and fills no log.
#[test]
fn an_agent_that_hangs_up_is_asked_after_pauses_that_grow_and_named_once() -> Result<()> {
    let topology = Topology::builder().pod("client", "a").build()?;
    let file = MeshFile::of(&topology).unlisted();
    let Agented { node, agent, peer } =
        Agented::launch(&topology, "a", &file, settings(&topology)?)?;
    let started = Instant::now();
    drop(peer);
    for _ in 0..4 {
        drop(agent.accept()?);
    }
    // 200, 400, 800 and 1600 ms, each a fifth less at the least.
    let took = started.elapsed();
    ensure!(took > Duration::from_millis(2400), "four times in {took:?}");
    let failures = || {
        let now = node.metrics().ok()?;
        (now.sum("ztunnel_enrol_agent_failures_total", &[]) > 4.5).then_some(())
    };
    wait::until("five failures to be counted", PATIENCE, failures)?;
    let lines = node.log().lines();
    let named = lines
        .iter()
        .filter(|line| line.contains("no connection to the node agent"))
        .count();
    ensure!(named == 1, "{named} lines: {lines:?}");
    Ok(())
}

// A process that may open no more descriptors loses those that come; it says so and asks again.
#[test]
fn a_process_without_room_for_a_descriptor_says_so_and_gets_it_later() -> Result<()> {
    let topology = Topology::builder().pod("client", "a").build()?;
    let file = MeshFile::of(&topology).unlisted();
    let mut a = Agented::launch(&topology, "a", &file, settings(&topology)?)?;
    let client = topology.pod("client")?;
    let pid = a.node.pid().to_string();
    let limit = |limit: &str| output(None, "prlimit", &["--pid", &pid, limit], "");
    limit("--nofile=3:")?;
    let answer = a.peer.add("client", client)?;
    ensure!(answer.contains("descriptors were lost"), "{answer}");
    a.peer.wait_closed()?;
    limit("--nofile=4096:")?;
    a.peer = a.agent.accept()?;
    succeeds(a.peer.add("client", client))?;
    succeeds(a.peer.snapshot_sent())?;
    a.node.wait_ready()?;
    Ok(())
}

// B068, B069, B074, B075, and what is no namespace.
#[test]
fn adds_again_elsewhere_and_of_nothing_and_deletes_of_nobody() -> Result<()> {
    let (topology, a, _b) = both()?;
    let (client, second) = (topology.pod("client")?, topology.pod("second")?);
    let server = topology.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    // Twice the same is once.
    succeeds(a.peer.add("client", client))?;
    assert_alive(&mut stream)?;
    wait_metric(&a.node, "workload_manager_proxies_started_total", 2.0)?;
    // Nobody to delete.
    succeeds(a.peer.delete("never-there"))?;
    // No namespace: this one is refused, the connection and all others go on.
    let null = File::open("/dev/null")?;
    let pid = File::open("/proc/self/ns/pid")?;
    let own = a.node.netns().open()?;
    for (what, not) in [
        ("a device", &null),
        ("another kind", &pid),
        ("the node's", &own),
    ] {
        a.peer.send(&agent::add("odd", client), &[not])?;
        let answer = a.peer.answer()?;
        ensure!(answer.contains("namespace"), "{what}: {answer}");
    }
    succeeds(a.peer.add("second", second))?;
    // Elsewhere: what was there ends.
    succeeds(a.peer.delete("second"))?;
    succeeds(a.peer.add("client", second))?;
    wait_end(&stream).context("the connection of the namespace that it left")?;
    wait_metric(&a.node, "workload_manager_active_proxy_count", 1.0)?;
    // A delete before the end of a snapshot takes effect at its end.
    let path = a.agent.path().to_owned();
    let Agented { node, agent, peer } = a;
    drop((peer, agent));
    let agent = Agent::listen(&path)?;
    let peer = agent.accept()?;
    succeeds(peer.delete("early"))?;
    succeeds(peer.add("early", client))?;
    succeeds(peer.keep("client"))?;
    succeeds(peer.delete("client"))?;
    ensure!(
        node.metrics()?
            .sum("workload_manager_active_proxy_count", &[])
            > 1.5
    );
    succeeds(peer.snapshot_sent())?;
    wait_metric(&node, "workload_manager_active_proxy_count", 1.0)?;
    assert_echo(&client.netns, server.at(9000))
}

#[test]
fn a_hundred_adds_at_once_are_each_answered_once_and_in_order() -> Result<()> {
    let topology = pods().build()?;
    let file = MeshFile::of(&topology).unlisted();
    let mut a = Agented::launch(&topology, "a", &file, settings(&topology)?)?;
    let names: Vec<String> = (0..100)
        .map(|number| format!("{}h{number}", topology.prefix()))
        .collect();
    let batch: String = names
        .iter()
        .map(|name| format!("netns add {name}\n"))
        .collect();
    output(None, "ip", &["-batch", "-"], &batch)?;
    let like = topology.pod("client")?;
    // One of them cannot be done: its place among the answers shows it.
    let send = || -> Result<()> {
        for name in &names {
            let pod = Pod {
                name: name.clone(),
                netns: Netns::named(name),
                ..like.clone()
            };
            a.peer
                .send(&agent::add(name, &pod), &[&pod.netns.open()?])?;
        }
        let odd = agent::add("odd", like);
        a.peer.send(&odd, &[&File::open("/dev/null")?])
    };
    thread::scope(|scope| {
        // Without waiting for an answer.
        let sent = scope.spawn(send);
        for name in &names {
            succeeds(a.peer.answer()).with_context(|| name.clone())?;
        }
        ensure!(a.peer.answer()?.contains("namespace"));
        sent.join().unwrap_or_else(|panic| resume_unwind(panic))
    })?;
    succeeds(a.peer.snapshot_sent())?;
    wait_metric(&a.node, "workload_manager_pending_proxy_count", 1.0)?;
    succeeds(a.peer.delete("odd"))?;
    a.node.wait_ready()?;
    wait_metric(&a.node, "workload_manager_active_proxy_count", 100.0)?;
    let listening = output(Some(&Netns::named(&names[99])), "ss", &["-Hltn"], "")?;
    for port in [15001, 15006, 15008] {
        ensure!(listening.contains(&format!(":{port} ")), "{listening}");
    }
    Ok(())
}

/// What an agent does before it dies.
type Step<'a> = &'a dyn Fn(&Peer) -> Result<()>;

// The agent is killed at each point of a conversation.
#[test]
fn an_agent_killed_in_any_state_is_met_again() -> Result<()> {
    let topology = pods().build()?;
    let (client, server) = (topology.pod("client")?, topology.pod("server")?);
    let file = MeshFile::of(&topology).unlisted();
    let settings = settings(&topology)?;
    let _b = Agented::start(&topology, "b", &file, settings.clone())?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let a = Agented::launch(&topology, "a", &file, settings)?;
    let path = a.agent.path().to_owned();
    let Agented {
        mut node,
        agent,
        peer,
    } = a;
    let mut alive = (agent, peer);
    let netns = client.netns.open()?;
    // After the hello; in the middle of the snapshot; with an answer under way; after its end.
    let steps: [Step<'_>; 4] = [
        &|_| Ok(()),
        &|peer| succeeds(peer.add("client", client)),
        &|peer| peer.send(&agent::add("client", client), &[&netns]),
        &|peer| {
            succeeds(peer.add("client", client))?;
            succeeds(peer.snapshot_sent())
        },
    ];
    for (step, number) in steps.iter().zip(0..) {
        step(&alive.1).with_context(|| format!("step {number}"))?;
        drop(alive);
        let agent = Agent::listen(&path)?;
        let peer = agent
            .accept()
            .with_context(|| format!("after step {number}"))?;
        alive = (agent, peer);
    }
    succeeds(alive.1.keep("client"))?;
    succeeds(alive.1.snapshot_sent())?;
    node.wait_ready()?;
    assert_echo(&client.netns, server.at(9000))
}

// What an earlier process captured stays captured, and so closed, also when the agent has spoken and did
// not name it; until it says that the pod leaves.
#[test]
fn a_process_that_starts_again_lets_no_pod_out_unless_its_agent_says_so() -> Result<()> {
    let (topology, mut a, _b) = both()?;
    let (client, second) = (topology.pod("client")?, topology.pod("second")?);
    let server = topology.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(&client.netns, server.at(9000))?;
    a.node.kill()?;
    let sniffer = Sniffer::on(&topology.node("a")?.netns, LINK)?;
    a.node.restart()?;
    a.peer = a.agent.accept()?;
    let closed = Closed {
        to: server.at(9000),
        sniffer: &sniffer,
    };
    for pod in [client, second] {
        closed.assert(pod, "before the agent says anything")?;
    }
    succeeds(a.peer.add("client", client))?;
    assert_echo(&client.netns, server.at(9000)).context("as soon as it is added")?;
    closed.assert(second, "in the middle of the snapshot")?;
    succeeds(a.peer.snapshot_sent())?;
    a.node.wait_ready()?;
    closed.stays(second, "not named")?;
    // An agent that has lost its namespace cannot have it served, and that shows.
    drop(a.peer);
    a.peer = a.agent.accept()?;
    succeeds(a.peer.keep("client"))?;
    succeeds(a.peer.keep("second"))?;
    succeeds(a.peer.snapshot_sent())?;
    wait_metric(&a.node, "workload_manager_pending_proxy_count", 1.0)?;
    ensure!(readiness(&a.node)?.0 == 500);
    closed.stays(second, "kept, and unknown")?;
    // It leaves by the agent's word, though only an earlier process had its namespace.
    succeeds(a.peer.delete("second"))?;
    closed.wait_open(second)?;
    assert_echo(&client.netns, server.at(9000))
}

// A pod that waits for a namespace takes it over from the one that had it, and it is open at no time.
#[test]
fn a_namespace_that_an_agent_gives_to_another_pod_never_opens() -> Result<()> {
    let (topology, a, _b) = both()?;
    let (second, server) = (topology.pod("second")?, topology.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = Sniffer::on(&topology.node("a")?.netns, LINK)?;
    let answer = a.peer.add("heir", second)?;
    ensure!(answer.contains("the same as that of pod"), "{answer}");
    succeeds(a.peer.delete("second"))?;
    assert_echo(&second.netns, server.at(9000))?;
    wait_metric(&a.node, "workload_manager_active_proxy_count", 2.0)?;
    ensure!(sniffer.seen()?.segments_on(9000).next().is_none());
    // It is the heir's now.
    succeeds(a.peer.delete("second"))?;
    assert_echo(&second.netns, server.at(9000))?;
    ensure!(sniffer.seen()?.segments_on(9000).next().is_none());
    succeeds(a.peer.delete("heir"))?;
    let to = server.at(9000);
    let sniffer = &sniffer;
    Closed { to, sniffer }.wait_open(second)
}

// A process that reads a file lets out no pod that an agent had enrolled.
#[test]
fn a_file_that_does_not_list_an_agents_pod_does_not_let_it_out() -> Result<()> {
    let (topology, mut a, _b) = both()?;
    let (client, second) = (topology.pod("client")?, topology.pod("second")?);
    let server = topology.pod("server")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    a.node.kill()?;
    let sniffer = Sniffer::on(&topology.node("a")?.netns, LINK)?;
    let closed = Closed {
        to: server.at(9000),
        sniffer: &sniffer,
    };
    let file = MeshFile::of(&topology).without("second");
    let settings = settings(&topology)?;
    let mut node = Node::start(&topology, "a", &file.for_node("a"), settings)?;
    let said = |line: &str| line.contains("had this pod enrolled").then_some(());
    node.log().wait_for("the pod's name", PATIENCE, said)?;
    assert_echo(&client.netns, server.at(9000))?;
    closed.stays(second, "not listed")?;
    node.kill()?;
    node.release()?;
    closed.wait_open(second)
}

const CANARY: &[u8] = b"kanarienvogel-agent";
