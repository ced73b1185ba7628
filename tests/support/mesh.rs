//! What most tests begin with: two nodes with a process each, and questions to them. Takes pods and a
//! mesh file; gives running nodes, counters as differences, and attempts with their fate; never
//! asserts anything by itself, except in functions that say so.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    access::Line,
    apps::{self, End, Heard},
    meshfile::MeshFile,
    metrics::Metrics,
    netns::Netns,
    topology::{Builder, LINK, NodeNet, Pod, Topology},
    wait,
    wire::Sniffer,
    ztunnel::{Node, Settings},
};

/// For whatever should happen at once, on a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// For one attempt of several: none is taken for unanswered because the machine is slow.
const ATTEMPT: Duration = Duration::from_secs(5);
/// For how long counters that do not change are taken for final: while a connection is open, and when none is.
const REST: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(100)];
/// How long they are waited for at most.
const RESTLESS: Duration = Duration::from_secs(5);
/// How long something is watched that must not happen.
pub const WATCH: Duration = Duration::from_millis(500);

/// Two nodes, each with a running process.
#[derive(Debug)]
pub struct Mesh {
    pub a: Node,
    pub b: Node,
    // Last, so that the processes end before their namespaces go.
    pub topology: Topology,
}

impl Mesh {
    /// Builds the topology and starts both nodes with this file.
    pub fn start(builder: Builder, file: impl FnOnce(&Topology) -> MeshFile) -> Result<Self> {
        let topology = builder.build()?;
        let file = file(&topology);
        Self::start_with(topology, &file)
    }

    /// Starts both nodes of a topology with this file.
    pub fn start_with(topology: Topology, file: &MeshFile) -> Result<Self> {
        let settings = Settings::of(&topology)?;
        Self::run(topology, |node| file.for_node(node), |_| settings.clone())
    }

    /// Starts both nodes of a topology with a text and settings each.
    pub fn run(
        topology: Topology,
        text: impl Fn(&str) -> String,
        settings: impl Fn(&str) -> Settings,
    ) -> Result<Self> {
        let start = |node| Node::start(&topology, node, &text(node), settings(node));
        Ok(Self {
            a: start("a")?,
            b: start("b")?,
            topology,
        })
    }

    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.topology.pod(name)
    }

    pub fn net(&self, node: &str) -> Result<&NodeNet> {
        self.topology.node(node)
    }

    /// A capture on the cable between the nodes.
    pub fn sniffer(&self) -> Result<Sniffer> {
        Sniffer::on(&self.net("a")?.netns, LINK)
    }

    /// Gives both nodes another file and waits until they have taken it; workers may need a moment
    /// more.
    pub fn replace(&self, file: &MeshFile) -> Result<()> {
        let marks = self.marks();
        for (node, mark) in [(&self.a, marks.0), (&self.b, marks.1)] {
            let text = file.for_node(node.name());
            if fs::read_to_string(node.file())? == text {
                continue;
            }
            node.replace_file(&text)?;
            let applied = |line: &str| line.contains("state applied").then_some(());
            node.log()
                .wait_since(mark, "the new state", PATIENCE, applied)?;
        }
        Ok(())
    }

    /// Where the logs are now.
    pub fn marks(&self) -> (usize, usize) {
        (self.a.log().mark(), self.b.log().mark())
    }
}

/// The metrics of one node at one moment, to see what has come since.
#[derive(Debug)]
pub struct Before<'a> {
    node: &'a Node,
    metrics: Metrics,
}

impl<'a> Before<'a> {
    /// What an application saw end is counted a moment later: the moment begins when the counters
    /// of connections rest. Where traffic never rests, they are taken as they are.
    pub fn of(node: &'a Node) -> Result<Self> {
        let counted = |metrics: &Metrics| {
            [
                metrics.sum("ztunnel_connections_total", &[]),
                metrics.sum("ztunnel_connections_open", &[]),
            ]
        };
        let mut metrics = node.metrics()?;
        let mut since = Instant::now();
        drop(wait::until("the counters to rest", RESTLESS, || {
            let now = node.metrics().ok()?;
            if counted(&now) != counted(&metrics) {
                since = Instant::now();
            }
            metrics = now;
            let [some, none] = REST;
            let open = metrics.sum("ztunnel_connections_open", &[]);
            let rest = if open < 0.5 { none } else { some };
            (since.elapsed() >= rest).then_some(())
        }));
        Ok(Self { node, metrics })
    }

    /// How much these samples have grown.
    pub fn gained(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.node.metrics()?.sum(name, labels) - self.metrics.sum(name, labels))
    }

    /// Waits until these samples have grown by `expected`, and fails if they end elsewhere.
    pub fn wait_gain(&self, name: &str, labels: &[(&str, &str)], expected: f64) -> Result<()> {
        let mut last = f64::NAN;
        let what = format!("{name}{labels:?} to grow by {expected}");
        wait::until(&what, PATIENCE, || {
            last = self.gained(name, labels).ok()?;
            ((last - expected).abs() < 0.5).then_some(())
        })
        .with_context(|| format!("node {}: it grew by {last}", self.node.name()))
    }
}

/// Connects, sends `request`, ends its direction, and listens to the end; `patience` for each.
pub fn knock(netns: &Netns, to: SocketAddr, request: &[u8], patience: Duration) -> Result<Heard> {
    apps::knock(netns, to, request, patience).map(|(heard, _)| heard)
}

/// Made and reset, or never made: but not silence, no byte, and no clean end that could be taken for
/// an empty answer.
pub fn is_refused(heard: &Heard) -> bool {
    matches!(
        heard,
        // A reset can be faster than the application that asks how its connect went.
        Heard::Nothing(End::Reset)
            | Heard::NotConnected(ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset)
    )
}

/// Asserts that nobody behind this address answers, and that saying so takes no time-out.
pub fn assert_refused(netns: &Netns, to: SocketAddr) -> Result<()> {
    let fate = knock(netns, to, REQUEST, PATIENCE)?;
    ensure!(
        is_refused(&fate),
        "{to} from {netns} should be refused: {fate:?}"
    );
    Ok(())
}

/// Asserts that an echo server behind this address answers.
pub fn assert_echo(netns: &Netns, to: SocketAddr) -> Result<()> {
    let fate = knock(netns, to, REQUEST, PATIENCE)?;
    ensure!(
        fate == Heard::Answer(REQUEST.to_vec()),
        "{to} from {netns} should answer: {fate:?}"
    );
    Ok(())
}

/// Asks until the fate is as wanted: for changes that announce themselves to nobody.
pub fn wait_fate(
    netns: &Netns,
    to: SocketAddr,
    what: &str,
    wanted: impl Fn(&Heard) -> bool,
) -> Result<Duration> {
    let started = Instant::now();
    let mut last = None;
    wait::until(what, PATIENCE, || {
        last = knock(netns, to, REQUEST, ATTEMPT).ok();
        last.as_ref().is_some_and(&wanted).then_some(())
    })
    .with_context(|| format!("the last attempt: {last:?}"))?;
    Ok(started.elapsed())
}

/// Asserts that an open connection to an echo server carries bytes both ways.
pub fn assert_alive(stream: &mut TcpStream) -> Result<()> {
    use std::io::Read as _;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(REQUEST).context("write")?;
    let mut back = vec![0; REQUEST.len()];
    stream.read_exact(&mut back).context("read")?;
    ensure!(back == REQUEST, "other bytes came back");
    Ok(())
}

/// Waits until an open connection ends, without a byte; gives how and how long that took.
pub fn wait_end(stream: &TcpStream) -> Result<(End, Duration)> {
    let started = Instant::now();
    let (end, bytes) = apps::read_end(stream, PATIENCE)?;
    ensure!(bytes.is_empty(), "{} bytes came first", bytes.len());
    ensure!(
        end != End::Open,
        "the connection is still open after {PATIENCE:?}"
    );
    Ok((end, started.elapsed()))
}

/// A field of an access line that must be a number.
pub fn number(line: &Line, field: &str) -> Result<u64> {
    let value = line
        .get(field)
        .with_context(|| format!("{field} is missing in {line:?}"))?;
    value.parse().with_context(|| format!("{field}={value}"))
}

/// The address with an IPv4 one in its mapped form.
pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port())),
        v6 @ SocketAddr::V6(_) => v6,
    }
}

/// Resident memory of a process, in bytes.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// Processor time that a process has used, user and system.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, after) = stat.rsplit_once(')').context("no name in stat")?;
    let ticks: u64 = after
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<u64>().unwrap_or(0))
        .sum();
    // USER_HZ is 100 wherever we run.
    Ok(Duration::from_millis(ticks * 10))
}

/// A program that runs another one with its own arguments, as `Settings::binary`.
pub fn wrapper(directory: &Path, name: &str, script: &str) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// What is asked where the answer does not matter.
pub const REQUEST: &[u8] = b"is anybody there?";
