//! A node process, run as an operator runs it: arguments, environment, signals, log, metrics. Takes a
//! topology, a node and a mesh file; gives what the process says about itself; never looks inside.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::{
    access::Line,
    http,
    metrics::Metrics,
    netns::Netns,
    process::{Log, Running, output},
    topology::Topology,
    wait,
};

/// How a node process is to run.
#[derive(Clone, Debug)]
pub struct Settings {
    pub binary: PathBuf,
    /// Where the mesh's root lives; shared by the nodes of one mesh.
    pub ca_directory: PathBuf,
    /// Besides what every node gets; later entries win.
    pub environment: Vec<(String, String)>,
}

impl Settings {
    /// The binary under test, and a CA in the topology's directory.
    pub fn of(topology: &Topology) -> Result<Self> {
        Self::with_binary(topology, binary()?)
    }

    /// Another binary, and a CA in the topology's directory.
    pub fn with_binary(topology: &Topology, binary: PathBuf) -> Result<Self> {
        Ok(Self {
            binary,
            ca_directory: topology.directory()?.join("ca"),
            environment: Vec::new(),
        })
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A node with its process, which may be dead at times. Dropping it undoes its capture.
#[derive(Debug)]
pub struct Node {
    name: String,
    netns: Netns,
    settings: Settings,
    file: PathBuf,
    pins: PathBuf,
    output: PathBuf,
    running: Running,
}

impl Node {
    /// Writes the file, starts the process and waits until it is ready.
    pub fn start(topology: &Topology, node: &str, file: &str, settings: Settings) -> Result<Self> {
        let mut started = Self::launch(topology, node, file, settings)?;
        started.wait_ready()?;
        Ok(started)
    }

    /// Writes the file and starts the process; readiness is the caller's affair.
    pub fn launch(topology: &Topology, node: &str, file: &str, settings: Settings) -> Result<Self> {
        Self::launch_by(topology, node, file, settings, Running::start_with_file)
    }

    /// The same for a node under load: what it writes is in [`Node::output`] only, and [`Node::log`] stays empty.
    pub fn launch_unheard(
        topology: &Topology,
        node: &str,
        file: &str,
        settings: Settings,
    ) -> Result<Self> {
        Self::launch_by(topology, node, file, settings, Running::start_unheard)
    }

    fn launch_by(
        topology: &Topology,
        node: &str,
        file: &str,
        settings: Settings,
        start: Start,
    ) -> Result<Self> {
        let netns = topology.node(node)?.netns.clone();
        let path = topology.directory()?.join(format!("{node}.yaml"));
        fs::write(&path, file)?;
        let pins = topology.pin_directory(node);
        let command = command(&settings, node, &path, &pins, "proxy");
        let output = topology.directory()?.join(format!("{node}.log"));
        let running = start(&format!("ztunnel {node}"), Some(&netns), command, &output)?;
        Ok(Self {
            name: node.to_owned(),
            netns,
            settings,
            file: path,
            pins,
            output,
            running,
        })
    }

    /// Waits until `/healthz/ready` answers 200; fails at once if the process ends.
    pub fn wait_ready(&mut self) -> Result<Duration> {
        let started = Instant::now();
        let Self {
            name,
            netns,
            running,
            ..
        } = self;
        let mut last = String::from("nothing answers on the readiness port");
        let ready = wait::until(&format!("node {name} to be ready"), PATIENCE, || {
            match running.ended() {
                Ok(None) => {}
                Ok(Some(status)) => return Some(Err(format!("it ended with {status}"))),
                Err(error) => return Some(Err(error.to_string())),
            }
            match http::get(netns, at(READINESS), "/healthz/ready") {
                Ok(answer) if answer.status == 200 => Some(Ok(())),
                Ok(answer) => {
                    last = answer.body;
                    None
                }
                Err(_) => None,
            }
        });
        let tail = || tail(running.log());
        match ready.with_context(|| format!("{last}\n{}", tail()))? {
            Ok(()) => Ok(started.elapsed()),
            Err(why) => bail!("node {name}: {why}\n{}", tail()),
        }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    #[must_use]
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// A file with everything that the node's processes have written.
    #[must_use]
    pub fn output(&self) -> &Path {
        &self.output
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// What this process has written since it was started last.
    #[must_use]
    pub fn log(&self) -> &Log {
        self.running.log()
    }

    /// All access lines so far.
    #[must_use]
    pub fn access_lines(&self) -> Vec<Line> {
        self.log()
            .lines()
            .iter()
            .filter_map(|line| Line::access(line))
            .collect()
    }

    /// The first access line after `mark` (see [`Log::mark`]) that has all of these fields.
    pub fn wait_access(&self, mark: usize, fields: &[(&str, &str)]) -> Result<Line> {
        let what = format!("an access line with {fields:?} on node {}", self.name);
        self.log().wait_since(mark, &what, PATIENCE, |line| {
            Line::access(line)
                .filter(|line| line.message != "connection opened" && line.has(fields))
        })
    }

    /// The metrics page.
    pub fn metrics(&self) -> Result<Metrics> {
        let answer = http::get(&self.netns, at(STATS), "/metrics")?;
        ensure!(answer.status == 200, "/metrics answered {}", answer.status);
        Metrics::parse(&answer.body)
    }

    /// Replaces the file as an editor does: a new one, renamed over the old.
    pub fn replace_file(&self, text: &str) -> Result<()> {
        let new = self.file.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.file).with_context(|| format!("replace {}", self.file.display()))
    }

    /// Writes into the file that is there.
    pub fn overwrite_file(&self, text: &str) -> Result<()> {
        fs::write(&self.file, text).with_context(|| format!("write {}", self.file.display()))
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.running.kill()
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.running.signal(signal)
    }

    pub fn wait_exit(&mut self, patience: Duration) -> Result<ExitStatus> {
        self.running.wait_exit(patience)
    }

    /// Starts a new process with the same file, directories and pins. The old one must have ended.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(
            self.running.ended()?.is_some(),
            "node {} is still running",
            self.name
        );
        let command = command(&self.settings, &self.name, &self.file, &self.pins, "proxy");
        let name = format!("ztunnel {}", self.name);
        self.running = Running::start_with_file(&name, Some(&self.netns), command, &self.output)?;
        Ok(())
    }

    /// `ztunnel release`: undoes the capture of this node on purpose.
    pub fn release(&self) -> Result<String> {
        let mut command = command(
            &self.settings,
            &self.name,
            &self.file,
            &self.pins,
            "release",
        );
        crate::process::finish(Some(&self.netns), &mut command)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Killing and releasing are both tried, whatever the other gives; the topology sweeps the
        // rest.
        drop(self.running.kill());
        drop(self.release());
        drop(fs::remove_dir_all(&self.pins));
    }
}

type Start = fn(&str, Option<&Netns>, Command, &Path) -> Result<Running>;

/// The binary under test: `ZTUNNEL_BIN`, or what the dev profile built beside the running program.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("ZTUNNEL_BIN") {
        return Ok(path.into());
    }
    // `<target>/debug/deps/<test>` or `<target>/debug/<program>`.
    let here = std::env::current_exe()?;
    let found = here
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("ztunnel"))
        .find(|p| p.is_file());
    found.with_context(|| {
        format!(
            "no ztunnel beside {}: build it, or set ZTUNNEL_BIN",
            here.display()
        )
    })
}

/// What `ztunnel version` prints.
pub fn version(binary: &Path) -> Result<String> {
    output(None, &binary.to_string_lossy(), &["version"], "").map(|text| text.trim().to_owned())
}

fn command(settings: &Settings, node: &str, file: &Path, pins: &Path, verb: &str) -> Command {
    let mut command = Command::new(&settings.binary);
    // The files are reached by absolute paths, so any directory does; one that is always there.
    command.arg(verb).current_dir("/").env_clear();
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("RUST_BACKTRACE", "1");
    command
        .env("NODE_NAME", node)
        .env("LOCAL_XDS_PATH", file)
        .env("BPF_PIN_DIR", pins);
    command.env("CA_DIR", &settings.ca_directory);
    command.envs(
        settings
            .environment
            .iter()
            .map(|(name, value)| (name, value)),
    );
    command
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn tail(log: &Log) -> String {
    let lines = log.lines();
    lines
        .iter()
        .rev()
        .take(25)
        .rev()
        .cloned()
        .collect::<Vec<_>>()
        .join("\n")
}

/// HBONE, where the other node's process is reached.
pub const HBONE: u16 = 15008;
const READINESS: u16 = 15021;
const STATS: u16 = 15020;
const PATIENCE: Duration = Duration::from_secs(120);
