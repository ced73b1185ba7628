//! The process's settings. Takes the environment, gives a checked `Config`; the only reader of the
//! environment, and never guesses at a value that does not parse.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

mod control_plane;
mod cores;
mod known;

use crate::control::XdsParams;
use crate::model::{KeyExchange, ProbeSource};
use crate::rpc;
use control_plane::ProxyConfig;
use cores::Cores;

/// Why the process cannot start with these settings. Each names the variable.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Two variables exclude each other.
    #[error("{0} and {1} are both set; set one of them")]
    Both(&'static str, &'static str),
    /// A variable makes no header of a call.
    #[error(
        "{0}: its end must be the name of a header that is not our own, and its value one that a header can have"
    )]
    Header(String),
    /// A needed variable is not set.
    #[error("{name} is not set; set it to {remedy}")]
    Missing {
        /// The variable.
        name: &'static str,
        /// What it should hold.
        remedy: &'static str,
    },
    /// A value is not UTF-8.
    #[error("{0} is not valid UTF-8")]
    NotUtf8(String),
    /// A value is none that the variable can have.
    #[error("{name}={value:?}: {why}")]
    Value {
        /// The variable.
        name: &'static str,
        /// What it held.
        value: String,
        /// What it may hold.
        why: String,
    },
}

/// Where workloads, services, policies and pods come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file, read again when it changes.
    File(PathBuf),
    /// Text from the environment, read once.
    Inline(String),
}

/// Who says which pods are enrolled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enrolment {
    /// The state lists them.
    Listed,
    /// A node agent, on this socket.
    Zds(PathBuf),
}

/// Who brings the pods' connections to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureBy {
    /// This process's eBPF programs.
    Ebpf,
    /// Somebody else's rules in the pods.
    External,
}

/// How lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// Tab separated.
    Plain,
}

/// TCP keepalive of relayed sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub time: Duration,
    /// Between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection is dead.
    pub retries: u32,
    /// Data that is not acknowledged for as long ends the connection too.
    pub user_timeout: bool,
}

/// All settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file that the state comes from, if any.
    pub source: Option<Source>,
    /// The control plane that it comes from, if any.
    pub xds: Option<XdsParams>,
    /// The CA that certificates come from; none if this process signs them.
    pub ca: Option<rpc::Params>,
    /// Who says which pods are enrolled.
    pub enrolment: Enrolment,
    /// Who brings their connections here.
    pub capture: CaptureBy,
    /// The mark of our sockets in pods; none if 0.
    pub packet_mark: Option<u32>,
    /// Another process may listen on our ports in pods, as during an upgrade.
    pub pod_port_reuse: bool,
    /// Listen on IPv6 too, and answer pods' questions with such addresses.
    pub ipv6: bool,
    /// The CA's directory.
    pub ca_dir: PathBuf,
    /// The file of revoked certificates, if there is to be one.
    pub crl_path: Option<PathBuf>,
    /// Where this node's programs and maps are pinned.
    pub bpf_pin_dir: PathBuf,
    /// The network that this node is on.
    pub network: Arc<str>,
    /// The name of this node; empty when not told.
    pub node: Arc<str>,
    /// The addresses that the node's CNI agent gives connections of the node to its pods.
    pub probe_addresses: Vec<IpAddr>,
    /// Data-plane threads.
    pub workers: usize,
    /// Lifetime of a workload certificate.
    pub secret_ttl: Duration,
    /// TLS 1.2 is spoken with peers that have nothing newer.
    pub tls12: bool,
    /// How keys are exchanged, with peers and with the control plane.
    pub key_exchange: KeyExchange,
    /// Applications find a SOCKS5 proxy on their pod's loopback device.
    pub socks5: bool,
    /// The application sees its client's own address.
    pub original_source: bool,
    /// The answer to a CONNECT describes this side.
    pub response_baggage: bool,
    /// `LOCALHOST_APP_TUNNEL`: an application that reads PROXY headers is reached on the pod's
    /// loopback device.
    pub localhost_app_tunnel: bool,
    /// Policy decisions are logged at info, not debug.
    pub policy_info_logging: bool,
    /// Between pods of this node, bytes go from socket to socket, without a tunnel.
    pub local_fast_path: bool,
    /// Pods' questions to resolvers are captured.
    pub dns_capture: bool,
    /// The domain of the cluster's services.
    pub cluster_domain: Arc<str>,
    /// The namespace that wins among several with a service of one name.
    pub preferred_namespace: Option<Arc<str>>,
    /// How long open connections may go on after SIGTERM.
    pub termination_deadline: Duration,
    /// TCP keepalive; `None` when switched off.
    pub keepalive: Option<Keepalive>,
    /// Streams of one pooled tunnel.
    pub pool_max_streams: u16,
    /// How long an unused tunnel is kept.
    pub pool_unused_release: Duration,
    /// HTTP/2 receive window of a stream, bytes.
    pub stream_window_bytes: u32,
    /// HTTP/2 receive window of a tunnel, bytes.
    pub connection_window_bytes: u32,
    /// HTTP/2 largest frame, bytes.
    pub frame_bytes: u32,
    /// Where operators ask.
    pub admin_port: u16,
    /// Where metrics are read.
    pub stats_port: u16,
    /// `RUST_LOG`.
    pub log_filter: String,
    /// How lines are written.
    pub log_format: LogFormat,
    /// The tag of the build metric.
    pub istio_version: String,
    /// Set variables that the established proxy knows and this one does not honour, and why.
    pub ignored: Vec<(String, &'static str)>,
    /// Set variables that are not used because of what they hold.
    pub unusable: Vec<String>,
}

impl Config {
    /// Reads the process's environment.
    ///
    /// # Errors
    /// When a variable is missing, contradicts another or does not parse.
    pub fn read() -> Result<Self, Error> {
        #[expect(
            clippy::disallowed_methods,
            reason = "config is the reader of the environment"
        )]
        let vars = std::env::vars_os();
        Self::from_vars(vars, available_cores())
    }

    fn from_vars(
        vars: impl IntoIterator<Item = (OsString, OsString)>,
        cores: usize,
    ) -> Result<Self, Error> {
        let env = Env::new(vars)?;
        let flag = |name, default| env.parse(name, default, "true or false");
        refuse(&env)?;
        let proxy = ProxyConfig::read(&env, Path::new(MESH_FILE))?;
        let xds = control_plane::xds(&env, &proxy)?;
        let source = source(&env, xds.is_some())?;
        let enrolment = enrolment(&env, source.as_ref())?;
        let capture = capture_by(&env, &enrolment)?;
        Ok(Self {
            packet_mark: packet_mark(&env, capture)?,
            capture,
            pod_port_reuse: flag("INPOD_PORT_REUSE", true)?,
            ipv6: flag("IPV6_ENABLED", true)?,
            enrolment,
            source,
            ca: control_plane::ca(&env, xds.is_some())?,
            xds,
            ca_dir: env.path("CA_DIR", "/var/lib/ztunnel/ca"),
            crl_path: Some(env.text("CRL_PATH"))
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            bpf_pin_dir: env.path("BPF_PIN_DIR", BPF_PIN_DIR),
            network: env.text("NETWORK").into(),
            node: env.text("NODE_NAME").into(),
            probe_addresses: probe_addresses(&env)?,
            workers: workers(&env, &proxy, cores)?,
            secret_ttl: secret_ttl(&env)?,
            tls12: flag("TLS12_ENABLED", false)?,
            key_exchange: key_exchange(&env)?,
            socks5: flag("UNSTABLE_ENABLE_SOCKS5", false)?,
            original_source: flag("ENABLE_ORIG_SRC", true)?,
            response_baggage: flag("ENABLE_RESPONSE_BAGGAGE", true)?,
            localhost_app_tunnel: flag("LOCALHOST_APP_TUNNEL", true)?,
            policy_info_logging: flag("AUTHZ_POLICY_INFO_LOGGING", false)?,
            local_fast_path: flag("LOCAL_FAST_PATH", true)?,
            dns_capture: control_plane::dns_capture(&env, &proxy),
            cluster_domain: cluster_domain(&env),
            preferred_namespace: env
                .get("PREFERED_SERVICE_NAMESPACE")
                .filter(|namespace| !namespace.is_empty())
                .map(Arc::from),
            termination_deadline: termination_deadline(&env)?,
            keepalive: keepalive(&env)?,
            pool_max_streams: env.at_least_one("POOL_MAX_STREAMS_PER_CONNECTION", 100)?,
            pool_unused_release: env
                .duration("POOL_UNUSED_RELEASE_TIMEOUT", Duration::from_mins(5))?,
            stream_window_bytes: env.within("HTTP2_STREAM_WINDOW_SIZE", 4 << 20, WINDOW_BYTES)?,
            connection_window_bytes: env.within(
                "HTTP2_CONNECTION_WINDOW_SIZE",
                16 << 20,
                WINDOW_BYTES,
            )?,
            frame_bytes: env.within("HTTP2_FRAME_SIZE", 1 << 20, FRAME_BYTES)?,
            admin_port: proxy.proxy_admin_port.unwrap_or(ADMIN_PORT),
            stats_port: proxy.stats_port.unwrap_or(STATS_PORT),
            log_filter: env.text("RUST_LOG").to_owned(),
            log_format: log_format(&env)?,
            istio_version: env
                .get("ISTIO_META_ISTIO_VERSION")
                .unwrap_or("unknown")
                .to_owned(),
            ignored: env.ignored(),
            unusable: env.unusable.into_inner(),
        })
    }
}

impl Config {
    /// The settings as operators are shown them; no value of a secret is among them.
    // PROTOCOL.md#config-dump
    #[must_use]
    pub fn shown(&self) -> serde_json::Value {
        let duration = |duration: Duration| {
            serde_json::json!({
                "secs": duration.as_secs(),
                "nanos": duration.subsec_nanos(),
            })
        };
        serde_json::json!({
            "source": match &self.source {
                Some(Source::File(path)) => Some(format!("file {}", path.display())),
                Some(Source::Inline(_)) => Some("inline".to_owned()),
                None => None,
            },
            "xdsAddress": self.xds.as_ref().map(|xds| xds.rpc.endpoint.to_string()),
            "xdsOnDemand": self.xds.as_ref().is_some_and(|xds| xds.on_demand),
            "caAddress": self.ca.as_ref().map(|ca| ca.endpoint.to_string()),
            "enrolment": match &self.enrolment {
                Enrolment::Listed => "file".to_owned(),
                Enrolment::Zds(path) => format!("zds {}", path.display()),
            },
            "capture": match self.capture {
                CaptureBy::Ebpf => "ebpf",
                CaptureBy::External => "external",
            },
            "packetMark": self.packet_mark,
            "inpodPortReuse": self.pod_port_reuse,
            "ipv6Enabled": self.ipv6,
            "caDir": self.ca_dir,
            "crlPath": self.crl_path,
            "bpfPinDir": self.bpf_pin_dir,
            "network": &*self.network,
            "localNode": &*self.node,
            "probeAddresses": self.probe_addresses,
            "numWorkerThreads": self.workers,
            "secretTtl": duration(self.secret_ttl),
            "tls12Enabled": self.tls12,
            "requireOriginalSource": self.original_source,
            "enableResponseBaggage": self.response_baggage,
            "localhostAppTunnel": self.localhost_app_tunnel,
            "localFastPath": self.local_fast_path,
            "authzPolicyInfoLogging": self.policy_info_logging,
            "selfTerminationDeadline": duration(self.termination_deadline),
            "keepaliveEnabled": self.keepalive.is_some(),
            "poolMaxStreamsPerConn": self.pool_max_streams,
            "poolUnusedReleaseTimeout": duration(self.pool_unused_release),
            "windowSize": self.stream_window_bytes,
            "connectionWindowSize": self.connection_window_bytes,
            "frameSize": self.frame_bytes,
            "adminPort": self.admin_port,
            "statsPort": self.stats_port,
            "logFilter": self.log_filter,
        })
    }
}

/// Where this node's programs and maps are pinned, for verbs that need no other setting.
#[must_use]
pub fn bpf_pin_dir() -> PathBuf {
    #[expect(
        clippy::disallowed_methods,
        reason = "config is the reader of the environment"
    )]
    let value = std::env::var_os("BPF_PIN_DIR").filter(|value| !value.is_empty());
    value.map_or_else(|| PathBuf::from(BPF_PIN_DIR), PathBuf::from)
}

/// The environment, checked for UTF-8 where we read it.
struct Env {
    vars: BTreeMap<String, String>,
    /// Those that were found to hold nothing that can be used.
    unusable: RefCell<Vec<String>>,
}

impl Env {
    fn new(vars: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self, Error> {
        let mut map = BTreeMap::new();
        for (name, value) in vars {
            let Ok(name) = name.into_string() else {
                continue;
            };
            if !known::is_read(&name) && known::why_not(&name).is_none() {
                continue;
            }
            let Ok(value) = value.into_string() else {
                return Err(Error::NotUtf8(name));
            };
            map.insert(name, value);
        }
        Ok(Self {
            vars: map,
            unusable: RefCell::default(),
        })
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str)
    }

    fn text(&self, name: &str) -> &str {
        self.get(name).unwrap_or_default()
    }

    fn path(&self, name: &str, default: &str) -> PathBuf {
        PathBuf::from(
            self.get(name)
                .filter(|value| !value.is_empty())
                .unwrap_or(default),
        )
    }

    fn parse<T: FromStr>(&self, name: &'static str, default: T, may_be: &str) -> Result<T, Error> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        let Ok(parsed) = value.parse() else {
            return Err(refused(name, value, format!("must be {may_be}")));
        };
        Ok(parsed)
    }

    fn duration(&self, name: &'static str, default: Duration) -> Result<Duration, Error> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        let duration = match humantime::parse_duration(value) {
            Ok(duration) => duration,
            Err(e) => {
                let why = format!("not a duration such as 90s or 5m: {e}");
                return Err(refused(name, value, why));
            }
        };
        if duration > LONGEST {
            return Err(refused(name, value, "longer than ten years".into()));
        }
        Ok(duration)
    }

    fn at_least_one<T>(&self, name: &'static str, default: T) -> Result<T, Error>
    where
        T: FromStr + From<u8> + PartialOrd,
    {
        let value = self.parse(name, default, "a whole number of at least 1 that fits")?;
        if value < T::from(1) {
            return Err(refused(name, self.text(name), "must be at least 1".into()));
        }
        Ok(value)
    }

    fn within(&self, name: &'static str, default: u32, range: (u32, u32)) -> Result<u32, Error> {
        let (low, high) = range;
        let may_be = format!("a number of bytes from {low} to {high}");
        let value = self.parse(name, default, &may_be)?;
        if value < low || value > high {
            return Err(refused(name, self.text(name), format!("must be {may_be}")));
        }
        Ok(value)
    }

    /// The variables whose name begins so, without that beginning.
    fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.vars.iter().filter_map(move |(name, value)| {
            let rest = name.strip_prefix(prefix)?;
            Some((rest, value.as_str()))
        })
    }

    fn unusable(&self, name: String) {
        self.unusable.borrow_mut().push(name);
    }

    fn ignored(&self) -> Vec<(String, &'static str)> {
        self.vars
            .keys()
            .filter_map(|name| Some((name.clone(), known::why_not(name)?)))
            .collect()
    }
}

fn refused(name: &'static str, value: &str, why: String) -> Error {
    Error::Value {
        name,
        value: value.to_owned(),
        why,
    }
}

/// What would be dangerous to pass over.
fn refuse(env: &Env) -> Result<(), Error> {
    let name = "ENABLE_PROXY";
    if env.parse(name, true, "true or false")? {
        return Ok(());
    }
    let why = "this process is the proxy; to have none, do not start it";
    Err(refused(name, env.text(name), why.into()))
}

/// Off unless they are told: whoever can send from such an address passes policy.
// PROTOCOL.md#probes
fn probe_addresses(env: &Env) -> Result<Vec<IpAddr>, Error> {
    let (four, six) = ("HOST_PROBE_SNAT_IP", "HOST_PROBE_SNAT_IPV6");
    let mut addresses = Vec::new();
    let mut add = |name: &'static str, address: IpAddr| {
        let address = address.to_canonical();
        if !ProbeSource::can_be(address) {
            let why = "nobody asks a pod from there";
            return Err(refused(name, env.text(name), why.into()));
        }
        addresses.push(address);
        Ok(())
    };
    if !env.text(four).is_empty() {
        let address = env.parse(four, Ipv4Addr::UNSPECIFIED, "an IPv4 address")?;
        add(four, address.into())?;
    }
    if !env.text(six).is_empty() {
        let address = env.parse(six, Ipv6Addr::UNSPECIFIED, "an IPv6 address")?;
        add(six, address.into())?;
    }
    Ok(addresses)
}

/// The lifetime of a workload certificate: long enough to be used before it is renewed.
fn secret_ttl(env: &Env) -> Result<Duration, Error> {
    let name = "SECRET_TTL";
    let ttl = env.duration(name, Duration::from_hours(24))?;
    if ttl < SHORTEST_TTL {
        let why = "a certificate must live for at least a second";
        return Err(refused(name, env.text(name), why.into()));
    }
    Ok(ttl)
}

fn source(env: &Env, has_xds: bool) -> Result<Option<Source>, Error> {
    if env.get("PROXY_MODE").is_some_and(|mode| mode != "shared") {
        let why = "only shared is supported: one process for all pods of the node";
        return Err(refused("PROXY_MODE", env.text("PROXY_MODE"), why.into()));
    }
    match (env.get("LOCAL_XDS_PATH"), env.get("LOCAL_XDS")) {
        (Some(_), Some(_)) => Err(Error::Both("LOCAL_XDS_PATH", "LOCAL_XDS")),
        (Some(path), None) if !path.is_empty() => Ok(Some(Source::File(path.into()))),
        (None, Some(text)) => Ok(Some(Source::Inline(text.to_owned()))),
        (Some(_) | None, None) if has_xds => Ok(None),
        (Some(_) | None, None) => Err(Error::Missing {
            name: "LOCAL_XDS_PATH",
            remedy: "the file that holds workloads, services, policies and pods, or XDS_ADDRESS to the control plane",
        }),
    }
}

/// A node agent is asked where its socket is named, and where no file could list pods.
fn enrolment(env: &Env, source: Option<&Source>) -> Result<Enrolment, Error> {
    let name = "ENROLMENT";
    let agent = env.get("INPOD_UDS").filter(|path| !path.is_empty());
    match env.get(name) {
        None | Some("") => Ok(match (agent, source) {
            (Some(path), _) => Enrolment::Zds(path.into()),
            (None, None) => Enrolment::Zds(INPOD_UDS.into()),
            (None, Some(_)) => Enrolment::Listed,
        }),
        Some("file") if source.is_some() => Ok(Enrolment::Listed),
        Some(file @ "file") => {
            let why = "no file lists pods: name one with LOCAL_XDS_PATH, or let a node agent say";
            Err(refused(name, file, why.into()))
        }
        Some("zds") => Ok(Enrolment::Zds(agent.unwrap_or(INPOD_UDS).into())),
        Some(other) => Err(refused(name, other, "must be file or zds".into())),
    }
}

/// The mark of our sockets in pods; none if 0. By it alone do rules of others tell us from the pod: what
/// we dial without it they bring back to us.
fn packet_mark(env: &Env, capture: CaptureBy) -> Result<Option<u32>, Error> {
    let mark = env.parse("PACKET_MARK", PACKET_MARK, "a number of 32 bits")?;
    if mark == 0 && capture == CaptureBy::External {
        let why = "with CAPTURE=external the rules in the pods tell our sockets by their mark";
        return Err(refused("PACKET_MARK", "0", why.into()));
    }
    Ok(Some(mark).filter(|mark| *mark != 0))
}

/// A node agent's rules redirect to us, unless something else is said.
fn capture_by(env: &Env, enrolment: &Enrolment) -> Result<CaptureBy, Error> {
    let name = "CAPTURE";
    match (env.get(name), enrolment) {
        (None | Some(""), Enrolment::Listed) | (Some("ebpf"), _) => Ok(CaptureBy::Ebpf),
        (None | Some(""), Enrolment::Zds(_)) | (Some("external"), _) => Ok(CaptureBy::External),
        (Some(other), _) => Err(refused(name, other, "must be ebpf or external".into())),
    }
}

/// The number of data-plane threads.
// PROTOCOL.md#worker-threads
fn workers(env: &Env, proxy: &ProxyConfig, cores: usize) -> Result<usize, Error> {
    let name = "ZTUNNEL_WORKER_THREADS";
    let cores = Cores::new(env, cores)?;
    let Some(value) = env.get(name) else {
        let workers = match proxy.concurrency {
            None => cores.workers(),
            Some(0) => cores.all,
            Some(workers) => workers,
        };
        return Ok(workers.min(MAX_WORKERS));
    };
    let workers = match value.strip_suffix('%') {
        Some(percent) => percent
            .parse::<usize>()
            .ok()
            .filter(|percent| *percent <= 100)
            .map(|percent| cores.all.saturating_mul(percent).div_ceil(100)),
        None => value.parse().ok(),
    };
    let Some(workers) = workers else {
        let why = "must be a number, a percentage to 100%, or 0 for all cores";
        return Err(refused(name, value, why.into()));
    };
    let workers = if workers == 0 { cores.all } else { workers };
    if workers > MAX_WORKERS {
        return Err(refused(
            name,
            value,
            format!("at most {MAX_WORKERS} workers"),
        ));
    }
    Ok(workers)
}

/// How long open connections may go on after SIGTERM.
// PROTOCOL.md#termination-deadline
fn termination_deadline(env: &Env) -> Result<Duration, Error> {
    let deadline = "CONNECTION_TERMINATION_DEADLINE";
    if env.get(deadline).is_some() {
        return env.duration(deadline, Duration::ZERO);
    }
    let name = "TERMINATION_GRACE_PERIOD_SECONDS";
    if env.get(name).is_none() {
        return Ok(Duration::from_secs(5));
    }
    let grace: u64 = env.parse(name, 0, "a whole number of seconds")?;
    let seconds = if grace > 10 {
        grace - 5
    } else {
        grace.saturating_sub(1).max(1)
    };
    Ok(Duration::from_secs(seconds))
}

fn keepalive(env: &Env) -> Result<Option<Keepalive>, Error> {
    let keepalive = Keepalive {
        time: env.duration("KEEPALIVE_TIME", Duration::from_mins(3))?,
        interval: env.duration("KEEPALIVE_INTERVAL", Duration::from_mins(3))?,
        retries: env.at_least_one("KEEPALIVE_RETRIES", 9)?,
        user_timeout: env.parse("USER_TIMEOUT_ENABLED", false, "true or false")?,
    };
    let enabled = env.parse("KEEPALIVE_ENABLED", true, "true or false")?;
    Ok(enabled.then_some(keepalive))
}

fn cluster_domain(env: &Env) -> Arc<str> {
    let domain = env
        .get("CLUSTER_DOMAIN")
        .filter(|domain| !domain.is_empty());
    let domain = domain.unwrap_or("cluster.local").trim_end_matches('.');
    domain.to_ascii_lowercase().into()
}

fn log_format(env: &Env) -> Result<LogFormat, Error> {
    match env.get("LOG_FORMAT") {
        None | Some("" | "plain") => Ok(LogFormat::Plain),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(refused("LOG_FORMAT", other, "must be plain or json".into())),
    }
}

// PROTOCOL.md#tls
fn key_exchange(env: &Env) -> Result<KeyExchange, Error> {
    let name = "COMPLIANCE_POLICY";
    match env.text(name) {
        "" => Ok(KeyExchange::Any),
        "pqc" => Ok(KeyExchange::PostQuantum),
        other => Err(refused(name, other, "must be pqc or empty".into())),
    }
}

fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Where operators ask, and where metrics are read.
// PROTOCOL.md#ports
const ADMIN_PORT: u16 = 15000;
const STATS_PORT: u16 = 15020;

/// Where a mesh's configuration is mounted.
const MESH_FILE: &str = "./etc/istio/config/mesh";

/// Where programs and maps are pinned when nothing else is said.
const BPF_PIN_DIR: &str = "/sys/fs/bpf/ztunnel";

/// Where a node agent listens.
// PROTOCOL.md#zds
const INPOD_UDS: &str = "/var/run/ztunnel/ztunnel.sock";

/// The mark by which a node agent's rules know our sockets.
// PROTOCOL.md#packet-mark
const PACKET_MARK: u32 = 1337;

/// The most data-plane threads; the kernel side has as many listener slots a pod.
pub(crate) const MAX_WORKERS: usize = 64;

/// No setting is meant to outlive the machine, and clocks end somewhere.
const LONGEST: Duration = Duration::from_hours(10 * 365 * 24);

/// The shortest life of a certificate.
const SHORTEST_TTL: Duration = Duration::from_secs(1);

/// What HTTP/2 allows for a window that must hold at least one default frame.
const WINDOW_BYTES: (u32, u32) = (65_535, 0x7fff_ffff);

/// What HTTP/2 allows for a frame.
const FRAME_BYTES: (u32, u32) = (16_384, 0x00ff_ffff);

#[cfg(test)]
mod tests;
