//! The process's settings. Takes the environment, gives a checked `Config`; the only reader of the
//! environment, and never guesses at a value that does not parse.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

/// Why the process cannot start with these settings. Each names the variable.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Two variables exclude each other.
    #[error("{0} and {1} are both set; set one of them")]
    Both(&'static str, &'static str),
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
}

/// All settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the state comes from.
    pub source: Source,
    /// The CA's directory.
    pub ca_dir: PathBuf,
    /// Where this node's programs and maps are pinned.
    pub bpf_pin_dir: PathBuf,
    /// The network that this node is on.
    pub network: Arc<str>,
    /// The name of this node; empty when not told.
    pub node: Arc<str>,
    /// Data-plane threads.
    pub workers: usize,
    /// Lifetime of a workload certificate.
    pub secret_ttl: Duration,
    /// TLS 1.2 is spoken with peers that have nothing newer.
    pub tls12: bool,
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
    /// `RUST_LOG`.
    pub log_filter: String,
    /// How lines are written.
    pub log_format: LogFormat,
    /// The tag of the build metric.
    pub istio_version: String,
    /// Set variables that the established proxy knows and this one does not honour.
    pub ignored: Vec<String>,
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
        Ok(Self {
            source: source(&env)?,
            ca_dir: env.path("CA_DIR", "/var/lib/ztunnel/ca"),
            bpf_pin_dir: env.path("BPF_PIN_DIR", BPF_PIN_DIR),
            network: env.text("NETWORK").into(),
            node: env.text("NODE_NAME").into(),
            workers: workers(&env, cores)?,
            secret_ttl: secret_ttl(&env)?,
            tls12: flag("TLS12_ENABLED", false)?,
            original_source: flag("ENABLE_ORIG_SRC", true)?,
            response_baggage: flag("ENABLE_RESPONSE_BAGGAGE", true)?,
            localhost_app_tunnel: flag("LOCALHOST_APP_TUNNEL", true)?,
            policy_info_logging: flag("AUTHZ_POLICY_INFO_LOGGING", false)?,
            local_fast_path: flag("LOCAL_FAST_PATH", true)?,
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
            log_filter: env.text("RUST_LOG").to_owned(),
            log_format: log_format(&env)?,
            istio_version: env
                .get("ISTIO_META_ISTIO_VERSION")
                .unwrap_or("unknown")
                .to_owned(),
            ignored: env.ignored(),
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
struct Env(BTreeMap<String, String>);

impl Env {
    fn new(vars: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self, Error> {
        let mut map = BTreeMap::new();
        for (name, value) in vars {
            let Ok(name) = name.into_string() else {
                continue;
            };
            if !READ.contains(&name.as_str()) && !is_known_to_peer(&name) {
                continue;
            }
            let Ok(value) = value.into_string() else {
                return Err(Error::NotUtf8(name));
            };
            map.insert(name, value);
        }
        Ok(Self(map))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
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

    fn ignored(&self) -> Vec<String> {
        self.0
            .keys()
            .filter(|name| !READ.contains(&name.as_str()))
            .cloned()
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

fn source(env: &Env) -> Result<Source, Error> {
    if env.get("PROXY_MODE").is_some_and(|mode| mode != "shared") {
        let why = "only shared is supported: one process for all pods of the node";
        return Err(refused("PROXY_MODE", env.text("PROXY_MODE"), why.into()));
    }
    match (env.get("LOCAL_XDS_PATH"), env.get("LOCAL_XDS")) {
        (Some(_), Some(_)) => Err(Error::Both("LOCAL_XDS_PATH", "LOCAL_XDS")),
        (Some(path), None) if !path.is_empty() => Ok(Source::File(path.into())),
        (None, Some(text)) => Ok(Source::Inline(text.to_owned())),
        (Some(_) | None, None) => Err(Error::Missing {
            name: "LOCAL_XDS_PATH",
            remedy: "the file that holds workloads, services, policies and pods",
        }),
    }
}

/// The number of data-plane threads.
// PROTOCOL.md#worker-threads
fn workers(env: &Env, cores: usize) -> Result<usize, Error> {
    let name = "ZTUNNEL_WORKER_THREADS";
    let Some(value) = env.get(name) else {
        return Ok(cores.div_ceil(4).max(2));
    };
    let workers = match value.strip_suffix('%') {
        Some(percent) => percent
            .parse::<usize>()
            .ok()
            .filter(|percent| *percent <= 100)
            .map(|percent| (cores * percent).div_ceil(100)),
        None => value.parse().ok(),
    };
    let Some(workers) = workers else {
        let why = "must be a number, a percentage to 100%, or 0 for all cores";
        return Err(refused(name, value, why.into()));
    };
    let workers = if workers == 0 { cores } else { workers };
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
    };
    let enabled = env.parse("KEEPALIVE_ENABLED", true, "true or false")?;
    Ok(enabled.then_some(keepalive))
}

fn log_format(env: &Env) -> Result<LogFormat, Error> {
    match env.get("LOG_FORMAT") {
        None | Some("" | "plain") => Ok(LogFormat::Plain),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(refused("LOG_FORMAT", other, "must be plain or json".into())),
    }
}

fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn is_known_to_peer(name: &str) -> bool {
    KNOWN_TO_PEER.contains(&name)
        || [
            "XDS_HEADER_",
            "CA_HEADER_",
            "ISTIO_META_",
            "ISTIO_METAJSON_",
        ]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// Where programs and maps are pinned when nothing else is said.
const BPF_PIN_DIR: &str = "/sys/fs/bpf/ztunnel";

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

/// Variables that this process honours.
const READ: [&str; 29] = [
    "AUTHZ_POLICY_INFO_LOGGING",
    "BPF_PIN_DIR",
    "CA_DIR",
    "CONNECTION_TERMINATION_DEADLINE",
    "ENABLE_ORIG_SRC",
    "ENABLE_RESPONSE_BAGGAGE",
    "HTTP2_CONNECTION_WINDOW_SIZE",
    "HTTP2_FRAME_SIZE",
    "HTTP2_STREAM_WINDOW_SIZE",
    "ISTIO_META_ISTIO_VERSION",
    "KEEPALIVE_ENABLED",
    "KEEPALIVE_INTERVAL",
    "KEEPALIVE_RETRIES",
    "KEEPALIVE_TIME",
    "LOCALHOST_APP_TUNNEL",
    "LOCAL_FAST_PATH",
    "LOCAL_XDS",
    "LOCAL_XDS_PATH",
    "LOG_FORMAT",
    "NETWORK",
    "NODE_NAME",
    "POOL_MAX_STREAMS_PER_CONNECTION",
    "POOL_UNUSED_RELEASE_TIMEOUT",
    "PROXY_MODE",
    "RUST_LOG",
    "SECRET_TTL",
    "TERMINATION_GRACE_PERIOD_SECONDS",
    "TLS12_ENABLED",
    "ZTUNNEL_WORKER_THREADS",
];

/// Variables of the established proxy that are not honoured yet, so that a start names them.
const KNOWN_TO_PEER: [&str; 36] = [
    "ALT_CA_HOSTNAME",
    "ALT_XDS_HOSTNAME",
    "AUTH_TOKEN",
    "CA_ADDRESS",
    "CA_ROOT_CA",
    "CLUSTER_DOMAIN",
    "CLUSTER_ID",
    "COMPLIANCE_POLICY",
    "CRL_PATH",
    "ENABLE_PROXY",
    "FAKE_CA",
    "INPOD_ENABLED",
    "INPOD_PORT_REUSE",
    "INPOD_UDS",
    "INSTANCE_IP",
    "IPV6_ENABLED",
    "PACKET_MARK",
    "POD_NAME",
    "POD_NAMESPACE",
    "PREFERED_SERVICE_NAMESPACE",
    "PROXY_CONFIG",
    "PROXY_WORKLOAD_INFO",
    "SERVICE_ACCOUNT",
    "TRUST_DOMAIN",
    "UNSTABLE_ENABLE_SOCKS5",
    "USER_TIMEOUT_ENABLED",
    "XDS_ADDRESS",
    "XDS_ON_DEMAND",
    "XDS_ROOT_CA",
    "ZTUNNEL_CPU_LIMIT",
    "ZTUNNEL_RESOURCE_CPU_LIMIT",
    "ZTUNNEL_RESOURCE_CPU_REQUEST",
    "DNS_CAPTURE",
    "DNS_PROXY_ADDR",
    "ISTIO_META_CLUSTER_ID",
    "KUBERNETES_SERVICE_HOST",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vars: &[(&str, &str)]) -> Result<Config, Error> {
        let base = [("LOCAL_XDS_PATH", "/mesh.yaml")];
        let vars = base.iter().chain(vars);
        Config::from_vars(vars.map(|(n, v)| ((*n).into(), (*v).into())), 16)
    }

    #[test]
    fn defaults_are_those_of_the_established_proxy() {
        let config = config(&[]).unwrap();
        assert_eq!(config.source, Source::File("/mesh.yaml".into()));
        assert_eq!(config.workers, 4);
        assert_eq!(config.termination_deadline, Duration::from_secs(5));
        assert_eq!(config.pool_max_streams, 100);
        assert_eq!(config.stream_window_bytes, 4 << 20);
        assert!(!config.tls12, "TLS 1.3 alone");
        assert!(config.local_fast_path, "ours, and on");
        assert_eq!(config.keepalive.unwrap().retries, 9);
        assert_eq!(config.ignored, Vec::<String>::new());
    }

    #[test]
    fn a_value_that_does_not_parse_names_its_variable() {
        for (name, value) in [
            ("SECRET_TTL", "soon"),
            ("SECRET_TTL", "0s"),
            ("SECRET_TTL", "500000000000y"),
            ("POOL_UNUSED_RELEASE_TIMEOUT", "11y"),
            ("KEEPALIVE_TIME", "3 parsecs"),
            ("CONNECTION_TERMINATION_DEADLINE", "x"),
            ("ENABLE_ORIG_SRC", "maybe"),
            ("LOCAL_FAST_PATH", "sometimes"),
            ("ZTUNNEL_WORKER_THREADS", "150%"),
            ("ZTUNNEL_WORKER_THREADS", "many"),
            ("ZTUNNEL_WORKER_THREADS", "1000"),
            ("POOL_MAX_STREAMS_PER_CONNECTION", "0"),
            ("POOL_MAX_STREAMS_PER_CONNECTION", "65536"),
            ("HTTP2_FRAME_SIZE", "1"),
            ("HTTP2_STREAM_WINDOW_SIZE", "4294967295"),
            ("TLS12_ENABLED", "1.2"),
            ("LOG_FORMAT", "xml"),
            ("PROXY_MODE", "dedicated"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "-1"),
        ] {
            let text = config(&[(name, value)]).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(value), "{text}");
        }
    }

    #[test]
    fn the_grace_period_leaves_time_to_end() {
        for (grace, seconds) in [
            ("30", 25),
            ("10", 9),
            ("8", 7),
            ("5", 4),
            ("1", 1),
            ("0", 1),
        ] {
            let config = config(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]).unwrap();
            assert_eq!(config.termination_deadline.as_secs(), seconds, "{grace}");
        }
        let both = [
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
            ("CONNECTION_TERMINATION_DEADLINE", "2s"),
        ];
        assert_eq!(config(&both).unwrap().termination_deadline.as_secs(), 2);
    }

    #[test]
    fn worker_threads_are_a_number_a_percentage_or_all() {
        for (value, workers) in [("0", 16), ("50%", 8), ("3", 3), ("1%", 1)] {
            let config = config(&[("ZTUNNEL_WORKER_THREADS", value)]).unwrap();
            assert_eq!(config.workers, workers, "{value}");
        }
    }

    #[test]
    fn a_source_is_needed_and_only_one() {
        let none = Config::from_vars([], 1).unwrap_err().to_string();
        assert!(none.contains("LOCAL_XDS_PATH"), "{none}");
        let both = config(&[("LOCAL_XDS", "workloads: []")]).unwrap_err();
        assert_eq!(both, Error::Both("LOCAL_XDS_PATH", "LOCAL_XDS"));
    }

    #[test]
    fn what_the_peer_knows_and_this_process_does_not_is_listed() {
        let config = config(&[("XDS_ADDRESS", "x"), ("ISTIO_META_FOO", "y"), ("HOME", "/")]);
        assert_eq!(config.unwrap().ignored, ["ISTIO_META_FOO", "XDS_ADDRESS"]);
    }
}
