//! A contender's world: two nodes, pods with servers in them, its processes, and counters on the cables. Takes a
//! contender; gives targets, costs and proofs; everything that it makes is gone when it is dropped.

use std::{
    collections::hash_map::RandomState,
    env, fs,
    hash::{BuildHasher as _, Hasher as _},
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use ztunnel_tests::{
    apps,
    netns::Netns,
    process::{Running, output},
    topology::{LINK, Pod, Topology},
    wait,
    wire::Sniffer,
    ztunnel::HBONE,
};

use crate::{
    contenders::{
        self, CLIENT, COLD, Contender, ECHO, HOLD, HTTP, IPERF, NEIGHBOUR, OUTSIDE, Place, Proxies,
        SERVER, SOCKPERF, STRANGER, Setting,
    },
    machine::Usage,
    wirecount::{self, Counts},
};

/// Fields are dropped in this order.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) contender: Contender,
    proxies: Proxies,
    _servers: Vec<Running>,
    pub(crate) topology: Topology,
    setting: Setting,
}

impl World {
    pub(crate) fn build(contender: Contender, setting: &Setting) -> Result<Self> {
        let mut builder = Topology::builder().pod(CLIENT, "a").pod(STRANGER, "a");
        for name in COLD {
            builder = builder.pod(name, "a");
        }
        let topology = builder
            .pod(NEIGHBOUR, "a")
            .pod(SERVER, "b")
            .pod(OUTSIDE, "b")
            .build()?;
        tune(&topology)?;
        wirecount::install(&topology, &[CLIENT, NEIGHBOUR])?;
        let mut servers = Vec::new();
        for name in [NEIGHBOUR, SERVER, OUTSIDE] {
            servers.extend(start_servers(topology.pod(name)?, &topology.directory()?)?);
        }
        for name in [NEIGHBOUR, SERVER, OUTSIDE] {
            wait_listening(
                &topology.pod(name)?.netns,
                &[IPERF, ECHO, HOLD, HTTP, SOCKPERF],
            )?;
        }
        let proxies = Proxies::start(contender, &topology, setting)?;
        Ok(Self {
            contender,
            proxies,
            _servers: servers,
            topology,
            setting: setting.clone(),
        })
    }

    /// Ends the contender's processes and starts them again: nothing is warm.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.proxies = Proxies::None;
        self.proxies = Proxies::start(self.contender, &self.topology, &self.setting)?;
        Ok(())
    }

    pub(crate) fn target(&self, place: Place, port: u16) -> Result<SocketAddr> {
        contenders::target(self.contender, &self.topology, place, port)
    }

    pub(crate) fn client(&self) -> Result<&Netns> {
        Ok(&self.topology.pod(CLIENT)?.netns)
    }

    /// The client's pod in which nothing has been connected since the last restart, by number; for contenders that are
    /// reached by loopback there is one client, and every connection is its first.
    pub(crate) fn cold_client(&self, number: usize) -> Result<&Netns> {
        if self.contender.by_loopback() {
            return self.client();
        }
        let name = COLD.get(number).context("no such client")?;
        Ok(&self.topology.pod(name)?.netns)
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.proxies.pids()
    }

    pub(crate) fn usage(&self) -> Result<Usage> {
        Usage::now(&self.pids())
    }

    pub(crate) fn counts(&self) -> Result<Counts> {
        wirecount::read(&self.topology)
    }

    /// Logs grow with every connection; what is not read is not kept.
    pub(crate) fn forget_logs(&self) -> Result<()> {
        for entry in fs::read_dir(self.topology.directory()?)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                // Its writer appends, so it goes on at the new end.
                fs::File::options().write(true).open(&path)?.set_len(0)?;
            }
        }
        Ok(())
    }

    /// Shows that connections to `place` take the way that the contender claims; gives the evidence.
    pub(crate) fn prove(&self, place: Place) -> Result<String> {
        let claim = Claim::of(self.contender, place);
        let node = &self.topology.node("a")?.netns;
        let device = match place {
            Place::Cross | Place::Outside => LINK.to_owned(),
            Place::Local => format!("p-{CLIENT}"),
        };
        let counter = claim.counter();
        let carried = self.proxies.carried(&self.topology, counter)?;
        let sniffer = Sniffer::on(node, &device)?;
        let canary = format!("canary-{:016x}", RandomState::new().build_hasher().finish());
        let mut stream = apps::dial(self.client()?, self.target(place, ECHO)?)?;
        stream.write_all(canary.as_bytes())?;
        let mut back = vec![0; canary.len()];
        stream.read_exact(&mut back).context("the echo")?;
        ensure!(back == canary.as_bytes(), "the echo is not what was sent");
        let seen = sniffer.seen()?;
        let readable = seen.contains(canary.as_bytes())?;
        let hbone = seen.segments_on(HBONE).count();
        let all = seen.segments().count();
        claim.check(readable, hbone, all)?;
        if let Some(before) = carried {
            let what = "a connection that the process counts";
            wait::until(what, PATIENCE, || {
                let now = self.proxies.carried(&self.topology, counter).ok()??;
                (now > before).then_some(())
            })?;
        }
        self.prove_congestion_control()?;
        drop(stream);
        let refusal = self.prove_refusal(place)?;
        Ok(format!(
            "canary {}, {hbone} of {all} segments on {HBONE}, {refusal}",
            if readable { "readable" } else { "not readable" }
        ))
    }

    fn prove_congestion_control(&self) -> Result<()> {
        let sockets = output(
            Some(self.client()?),
            "ss",
            &["-tinH", "state", "established"],
            "",
        )?;
        ensure!(
            sockets.contains(&format!(" {CONGESTION_CONTROL} ")) && !sockets.contains(" bbr "),
            "not every socket uses {CONGESTION_CONTROL}:\n{sockets}"
        );
        Ok(())
    }

    fn prove_refusal(&self, place: Place) -> Result<&'static str> {
        if place == Place::Outside || self.contender == Contender::Limit {
            return Ok("nobody to refuse");
        }
        let (from, to) = contenders::forbidden(self.contender, &self.topology, place)?;
        let (heard, _) = apps::knock(from, to, b"let me in", PATIENCE)?;
        if self.contender.has_policy() {
            ensure!(
                !heard.answered(),
                "policy must refuse the stranger, and did not"
            );
            Ok("the stranger refused")
        } else {
            ensure!(heard.answered(), "the stranger's request: {heard}");
            Ok("the stranger answered, as there is no policy")
        }
    }
}

/// What a contender says about the way of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// As it left the application.
    Plain,
    /// Sealed, on port 15008.
    Sealed,
    /// From socket to socket in one process: nothing leaves the pods.
    InProcess,
}

impl Claim {
    pub(crate) fn of(contender: Contender, place: Place) -> Self {
        match (contender, place) {
            (Contender::None, _) | (_, Place::Outside) => Self::Plain,
            (Contender::Ours, Place::Local) => Self::InProcess,
            (
                Contender::Ours
                | Contender::OursCrypto
                | Contender::Envoy
                | Contender::Limit
                | Contender::Peer,
                Place::Cross | Place::Local,
            ) => Self::Sealed,
        }
    }

    fn check(self, readable: bool, hbone: usize, all: usize) -> Result<()> {
        match self {
            Self::Plain if readable && hbone == 0 => Ok(()),
            Self::Sealed if !readable && hbone > 0 => Ok(()),
            Self::InProcess if !readable && all == 0 => Ok(()),
            _ => bail!(
                "claimed {self:?}, yet the canary is {}, and {hbone} of {all} segments are on {HBONE}",
                if readable { "readable" } else { "not readable" }
            ),
        }
    }

    /// The family and label of a node process's metrics that counts connections on this way.
    fn counter(self) -> (&'static str, &'static [(&'static str, &'static str)]) {
        match self {
            Self::Plain | Self::Sealed => ("istio_tcp_connections_opened_total", &[]),
            Self::InProcess => (
                "ztunnel_connections_routed_total",
                &[("path", "node_local")],
            ),
        }
    }

    /// Fails unless what crossed the cables during a measurement fits.
    pub(crate) fn check_counts(self, place: Place, counts: Counts) -> Result<()> {
        let crossed = match place {
            Place::Cross | Place::Outside => counts.between_nodes,
            Place::Local => counts.at_pods,
        };
        let fits = match self {
            Self::Plain => crossed.hbone_bytes <= BACKGROUND_BYTES && crossed.other_bytes > 0,
            Self::Sealed => {
                crossed.hbone_bytes > 0
                    && crossed.other_bytes <= crossed.hbone_bytes / 100 + BACKGROUND_BYTES
            }
            Self::InProcess => crossed.all() <= BACKGROUND_BYTES,
        };
        ensure!(fits, "claimed {self:?}, yet the cables carried {crossed:?}");
        if place == Place::Local {
            let between = counts.between_nodes;
            ensure!(
                between.all() <= BACKGROUND_BYTES,
                "a connection within the node crossed to the other one: {between:?}"
            );
        }
        Ok(())
    }
}

/// Waits until somebody listens on each of these ports.
pub(crate) fn wait_listening(netns: &Netns, ports: &[u16]) -> Result<()> {
    let what = format!("{ports:?} to listen in {netns}");
    wait::until(&what, PATIENCE, || {
        let sockets = output(Some(netns), "ss", &["-tlnH"], "").ok()?;
        let listening = |port: &u16| {
            let suffix = format!(":{port}");
            sockets
                .lines()
                .filter_map(|line| line.split_whitespace().nth(3))
                .any(|local| local.ends_with(&suffix))
        };
        ports.iter().all(listening).then_some(())
    })
}

/// The same TCP for every contender. A new namespace takes the machine's default congestion control, and another one
/// has to be allowed by the machine: it is, for the moment that this takes.
fn tune(topology: &Topology) -> Result<()> {
    let nodes = topology.nodes().iter().map(|node| &node.netns);
    let pods = topology.pods().iter().map(|pod| &pod.netns);
    let before = fs::read_to_string(ALLOWED).with_context(|| format!("read {ALLOWED}"))?;
    fs::write(ALLOWED, format!("{} {CONGESTION_CONTROL}", before.trim()))
        .with_context(|| format!("allow {CONGESTION_CONTROL} in {ALLOWED}"))?;
    let tuned = nodes.chain(pods).try_for_each(|netns| {
        netns.sysctl("ipv4/tcp_congestion_control", CONGESTION_CONTROL)?;
        netns.sysctl("ipv4/ip_local_port_range", "1024 65000")?;
        netns.sysctl("ipv4/tcp_tw_reuse", "1")
    });
    fs::write(ALLOWED, before.trim()).with_context(|| format!("restore {ALLOWED}"))?;
    tuned
}

fn start_servers(pod: &Pod, directory: &Path) -> Result<Vec<Running>> {
    let start = |name: &str, command| {
        let log = directory.join(format!("{name}-{}.log", pod.name));
        Running::start_unheard(name, Some(&pod.netns), command, &log)
    };
    let mut iperf = Command::new("iperf3");
    iperf.args(["--server", "--port", &IPERF.to_string()]);
    let mut sockperf = Command::new("sockperf");
    sockperf.args(["server", "--tcp", "--port", &SOCKPERF.to_string()]);
    let mut own = Command::new(env::current_exe()?);
    own.args(["role", "serve", "--echo", &ECHO.to_string()]);
    own.args(["--hold", &HOLD.to_string()]);
    let home = directory.join(format!("nginx-{}", pod.name));
    fs::create_dir_all(&home)?;
    let config = home.join("nginx.conf");
    fs::write(&config, nginx_configuration(&home))?;
    let mut nginx = Command::new("nginx");
    nginx
        .arg("-p")
        .arg(&home)
        .arg("-c")
        .arg(&config)
        .args(["-e", "stderr"]);
    Ok(vec![
        start("iperf3", iperf)?,
        start("sockperf", sockperf)?,
        start("serve", own)?,
        start("nginx", nginx)?,
    ])
}

/// One kilobyte for every request, and no log.
fn nginx_configuration(home: &Path) -> String {
    let home = home.display();
    let body = "x".repeat(1024);
    format!(
        "daemon off;\n\
         user root;\n\
         worker_processes 2;\n\
         pid {home}/pid;\n\
         events {{ worker_connections 8192; }}\n\
         http {{\n\
         access_log off;\n\
         client_body_temp_path {home}/body;\n\
         proxy_temp_path {home}/proxy;\n\
         fastcgi_temp_path {home}/fastcgi;\n\
         uwsgi_temp_path {home}/uwsgi;\n\
         scgi_temp_path {home}/scgi;\n\
         default_type text/plain;\n\
         keepalive_requests 100000000;\n\
         server {{\n\
         listen {HTTP} backlog=4096;\n\
         location / {{ return 200 '{body}'; }}\n\
         }}\n\
         }}\n"
    )
}

/// What every socket of a benchmark uses: BBR, a common default, paces itself on a cable without a bottleneck.
pub(crate) const CONGESTION_CONTROL: &str = "cubic";
const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
const PATIENCE: Duration = Duration::from_secs(10);
/// What may cross beside a measurement: pings of tunnels that are kept, ends of connections of the turn before.
const BACKGROUND_BYTES: u64 = 50_000;
