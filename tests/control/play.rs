//! What every test begins with: a control plane in node a's namespace and a node process that hears of everything but
//! its own pods from it. Takes pods and what the control plane holds; gives a running node and questions to it.

use std::{
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    access::Line,
    apps::{self, End, Heard},
    control_plane::{ControlPlane, workload_of},
    http,
    meshfile::MeshFile,
    netns::Netns,
    proto::{
        security::{Authorization, Clause, Match, Rule, ServiceAccountMatch},
        workload::{NetworkAddress, Port, PortList, Service, Workload},
    },
    topology::{Builder, Pod, Topology},
    wait,
    ztunnel::{Node, Settings},
};

/// For whatever should happen at once, on a machine that does much else.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Nodes with a control plane.
#[derive(Debug)]
pub(crate) struct Play {
    pub(crate) a: Node,
    pub(crate) b: Option<Node>,
    pub(crate) plane: ControlPlane,
    // Last, so that the processes end before their namespaces go.
    pub(crate) topology: Topology,
}

impl Play {
    /// Node a alone, ready, with every pod as a workload.
    pub(crate) fn start(builder: Builder) -> Result<Self> {
        let mut play = Self::launch(builder, &[], |_, _| Ok(()))?;
        play.a.wait_ready()?;
        Ok(play)
    }

    /// Node a alone, not waited for; `prepare` runs before it starts.
    pub(crate) fn launch(
        builder: Builder,
        environment: &[(&str, &str)],
        prepare: impl FnOnce(&mut ControlPlane, &Topology) -> Result<()>,
    ) -> Result<Self> {
        let topology = builder.build()?;
        let mut plane = ControlPlane::start(&topology, "a")?;
        for pod in topology.pods() {
            plane.workload(workload_of(pod));
        }
        prepare(&mut plane, &topology)?;
        let a = node(&topology, &plane, "a", environment)?;
        Ok(Self {
            a,
            b: None,
            plane,
            topology,
        })
    }

    /// Both nodes, ready; `prepare` runs before they start.
    pub(crate) fn both(
        builder: Builder,
        environment: &[(&str, &str)],
        prepare: impl FnOnce(&ControlPlane),
    ) -> Result<Self> {
        let prepare = |plane: &mut ControlPlane, _: &Topology| {
            prepare(plane);
            Ok(())
        };
        let mut play = Self::launch(builder, environment, prepare)?;
        let mut b = node(&play.topology, &play.plane, "b", environment)?;
        play.a.wait_ready()?;
        b.wait_ready()?;
        play.b = Some(b);
        Ok(play)
    }

    pub(crate) fn pod(&self, name: &str) -> Result<&Pod> {
        self.topology.pod(name)
    }

    /// What node a said last, for a failure's text.
    pub(crate) fn story(&self) -> String {
        let lines = self.a.log().lines();
        let last = lines.len().saturating_sub(60);
        lines.into_iter().skip(last).collect::<Vec<_>>().join("\n")
    }

    /// What the readiness port answers, once it does: the stream is opened beside it.
    pub(crate) fn readiness(&self) -> Result<http::Answer> {
        let at = SocketAddr::from(([127, 0, 0, 1], 15021));
        wait::until("the readiness port", PATIENCE, || {
            http::get(self.a.netns(), at, "/healthz/ready").ok()
        })
    }

    /// Waits until a counter of node a is what it should be.
    pub(crate) fn wait_metric(
        &self,
        name: &str,
        labels: &[(&str, &str)],
        value: f64,
    ) -> Result<()> {
        let mut last = f64::NAN;
        wait::until(&format!("{name}{labels:?} to be {value}"), PATIENCE, || {
            last = self.a.metrics().ok()?.sum(name, labels);
            ((last - value).abs() < 0.5).then_some(())
        })
        .with_context(|| format!("it is {last}"))
    }

    /// Waits for a log line of node a that holds all of these.
    pub(crate) fn wait_log(&self, mark: usize, parts: &[&str]) -> Result<String> {
        self.a
            .log()
            .wait_since(mark, &format!("a line with {parts:?}"), PATIENCE, |line| {
                parts
                    .iter()
                    .all(|part| line.contains(part))
                    .then(|| line.to_owned())
            })
    }

    /// Waits for an access line of node a with these fields.
    pub(crate) fn access(&self, mark: usize, fields: &[(&str, &str)]) -> Result<Line> {
        self.a.wait_access(mark, fields)
    }
}

fn node(
    topology: &Topology,
    plane: &ControlPlane,
    name: &str,
    environment: &[(&str, &str)],
) -> Result<Node> {
    let mut settings = Settings::of(topology)?;
    settings.environment = plane.environment();
    let own = environment.iter();
    settings
        .environment
        .extend(own.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    Node::launch(
        topology,
        name,
        &MeshFile::of(topology).pods_of(name),
        settings,
    )
}

/// Asserts that an echo server behind this address answers.
pub(crate) fn assert_echo(netns: &Netns, to: SocketAddr) -> Result<()> {
    let heard = apps::knock(netns, to, REQUEST, PATIENCE)?.0;
    ensure!(
        heard == Heard::Answer(REQUEST.to_vec()),
        "{to} from {netns} should answer: {heard:?}"
    );
    Ok(())
}

/// Waits until an echo server behind this address answers, or does not.
pub(crate) fn wait_echo(netns: &Netns, to: SocketAddr, answers: bool) -> Result<Duration> {
    let started = Instant::now();
    let mut last = None;
    wait::until(&format!("{to} to answer: {answers}"), PATIENCE, || {
        last = apps::knock(netns, to, REQUEST, ATTEMPT).ok();
        last.as_ref()
            .is_some_and(|(heard, _)| heard.answered() == answers)
            .then_some(())
    })
    .with_context(|| format!("the last attempt: {last:?}"))?;
    Ok(started.elapsed())
}

/// Connects until node a refuses for this reason; what was under way before may end for another.
pub(crate) fn wait_refused(play: &Play, netns: &Netns, to: SocketAddr, reason: &str) -> Result<()> {
    let mark = play.a.access_lines().len();
    wait::until(
        &format!("{to} to be refused for {reason}"),
        PATIENCE,
        || {
            apps::knock(netns, to, REQUEST, ATTEMPT).ok()?;
            let lines = play.a.access_lines();
            let refused = |line: &Line| line.get("reason") == Some(reason);
            lines.iter().skip(mark).any(refused).then_some(())
        },
    )
    .with_context(|| play.story())
}

/// Asserts that an open connection carries bytes both ways.
pub(crate) fn assert_alive(stream: &mut TcpStream) -> Result<()> {
    use std::io::{Read as _, Write as _};
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(REQUEST).context("write")?;
    let mut back = vec![0; REQUEST.len()];
    stream.read_exact(&mut back).context("read")?;
    ensure!(back == REQUEST, "other bytes came back");
    Ok(())
}

/// Waits until an open connection ends without a byte.
pub(crate) fn assert_ends(stream: &TcpStream) -> Result<()> {
    let (end, bytes) = apps::read_end(stream, PATIENCE)?;
    ensure!(
        end != End::Open && bytes.is_empty(),
        "{end:?} {}",
        bytes.len()
    );
    Ok(())
}

/// A service on this VIP, port 80 to 9000.
pub(crate) fn service(name: &str, vip: [u8; 4]) -> Service {
    Service {
        name: name.to_owned(),
        namespace: "demo".to_owned(),
        hostname: format!("{name}.demo.svc.cluster.local"),
        addresses: vec![NetworkAddress {
            address: vip.to_vec().into(),
            ..NetworkAddress::default()
        }],
        ports: vec![Port {
            service_port: 80,
            target_port: 9000,
        }],
        ..Service::default()
    }
}

/// The pod as an endpoint of [`service`].
pub(crate) fn endpoint(pod: &Pod, service: &str) -> Workload {
    let port = Port {
        service_port: 80,
        target_port: 9000,
    };
    let key = format!("demo/{service}.demo.svc.cluster.local");
    Workload {
        services: [(key, PortList { ports: vec![port] })].into(),
        ..workload_of(pod)
    }
}

/// An ALLOW for workloads that name it, which admits these accounts.
pub(crate) fn allow(name: &str, accounts: &[&str]) -> Authorization {
    let account = |account: &&str| ServiceAccountMatch {
        namespace: "demo".to_owned(),
        service_account: (*account).to_owned(),
    };
    let only = Match {
        service_accounts: accounts.iter().map(account).collect(),
        ..Match::default()
    };
    Authorization {
        name: name.to_owned(),
        namespace: "demo".to_owned(),
        scope: 2,
        rules: vec![Rule {
            clauses: vec![Clause {
                matches: vec![only],
            }],
        }],
        ..Authorization::default()
    }
}

pub(crate) const REQUEST: &[u8] = b"is anybody there?";
/// For one attempt of several: none is taken for unanswered because the machine is slow.
const ATTEMPT: Duration = Duration::from_secs(10);
