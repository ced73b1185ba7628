//! A real Envoy with a static configuration made of typed parts. Takes listeners and clusters; gives a
//! running process and its access log as values; never a configuration that somebody wrote by hand.
//!
//! ```text
//! Listener { at: Socket | Internal, tls, serves: Tunnel | Connect | Http }
//! Cluster  { to: Address | Internal, tls, tunnels }
//! ```
//!
//! An L7 waypoint is two of each: HBONE in (`Connect`) leads to an internal listener (`Http`), whose
//! rules lead to another one (`Tunnel`), which is HBONE out.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value, json};

use crate::{
    certs::Issued,
    http,
    netns::Netns,
    process::{Log, Running},
    wait,
};

/// What one Envoy does.
#[derive(Clone, Debug, Default)]
pub struct Config {
    pub listeners: Vec<Listener>,
    pub clusters: Vec<Cluster>,
}

#[derive(Clone, Debug)]
pub struct Listener {
    /// Also what its access lines are known by, and an internal listener's address.
    pub name: String,
    pub at: At,
    pub tls: Option<Tls>,
    pub serves: Serves,
}

#[derive(Clone, Debug)]
pub enum At {
    Socket(SocketAddr),
    /// Reached by a cluster of the same Envoy.
    Internal,
}

#[derive(Clone, Debug)]
pub enum Serves {
    /// Bytes, each connection in an HTTP/2 CONNECT of its own.
    Tunnel {
        cluster: &'static str,
        authority: String,
        /// Sent with the CONNECT. Values may use Envoy's `%COMMAND%`s.
        headers: Vec<(&'static str, String)>,
    },
    /// HTTP/2 CONNECT, ended here: each authority has a cluster; another one is answered 404.
    Connect {
        routes: Vec<(String, &'static str)>,
        /// Kept under a key for the internal listeners behind: `%FILTER_STATE(key:PLAIN)%`.
        remember: Vec<(&'static str, &'static str)>,
    },
    /// HTTP/1.1; the first rule that matches applies, and there is none behind them.
    Http(Vec<Rule>),
}

/// What becomes of some requests.
#[derive(Clone, Debug)]
pub struct Rule {
    pub method: Option<&'static str>,
    pub path_prefix: &'static str,
    pub then: Then,
}

#[derive(Clone, Debug)]
pub enum Then {
    Forward {
        cluster: &'static str,
        add: Vec<(&'static str, &'static str)>,
    },
    Answer {
        status: u16,
        body: &'static str,
    },
}

#[derive(Clone, Debug)]
pub struct Cluster {
    pub name: &'static str,
    pub to: To,
    pub tls: Option<Tls>,
    /// Spoken to in HTTP/2, for the CONNECTs of a [`Serves::Tunnel`].
    pub http2: bool,
}

#[derive(Clone, Debug)]
pub enum To {
    Address(SocketAddr),
    Internal(&'static str),
}

/// Mutual TLS 1.3 with ALPN `h2`, as HBONE is.
#[derive(Clone, Debug)]
pub struct Tls {
    pub own: Issued,
    /// SPIFFE IDs that the peer may have; anybody of the mesh if there are none.
    pub peers: Vec<String>,
}

/// A running Envoy.
#[derive(Debug)]
pub struct Envoy {
    running: Running,
}

impl Envoy {
    /// Starts it and waits until it says that it is ready. Its files live in `directory`.
    pub fn start(netns: &Netns, config: &Config, directory: &Path) -> Result<Self> {
        let file = directory.join(format!("envoy-{netns}.json"));
        fs::write(&file, serde_json::to_vec_pretty(&bootstrap(config))?)?;
        let mut command = Command::new(binary()?);
        command
            .arg("--config-path")
            .arg(&file)
            .args(["--concurrency", "2", "--disable-hot-restart"])
            .args(["--log-level", "warning", "--file-flush-interval-msec", "20"]);
        let mut running = Running::start("envoy", Some(netns), command)?;
        let admin = SocketAddr::from(([127, 0, 0, 1], ADMIN));
        let ready = wait::until("Envoy to be ready", PATIENCE, || {
            running.ended().ok()?.map_or_else(
                || {
                    let answer = http::get(netns, admin, "/ready").ok()?;
                    (answer.status == 200).then_some(Ok(()))
                },
                |status| Some(Err(status)),
            )
        });
        let said = || running.log().lines().join("\n");
        let ready = ready.with_context(said)?;
        ensure!(ready.is_ok(), "Envoy ended at once:\n{}", said());
        Ok(Self { running })
    }

    #[must_use]
    pub fn log(&self) -> &Log {
        self.running.log()
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// The first access line after `mark` that has these values; see [`ACCESS`] for the keys.
    pub fn wait_access(
        &self,
        mark: usize,
        fields: &[(&str, &str)],
    ) -> Result<BTreeMap<String, String>> {
        let what = format!("Envoy's access line with {fields:?}");
        self.log().wait_since(mark, &what, PATIENCE, |line| {
            let line = access(line)?;
            let has = |(key, value): &(&str, &str)| line.get(*key).is_some_and(|v| v == value);
            fields.iter().all(has).then_some(line)
        })
    }
}

/// The program: beside the node process under test, where `cargo xtask setup` leaves it.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("ENVOY_BIN") {
        return Ok(path.into());
    }
    // `<target>/debug/deps/<test>` or `<target>/debug/<program>`.
    let here = std::env::current_exe()?;
    let versions = |dir: &Path| fs::read_dir(dir.join("envoy")).ok();
    let is_envoy = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        path.is_file() && name.is_some_and(|name| name.starts_with("envoy-"))
    };
    let found = here.ancestors().filter_map(versions).flatten();
    found
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(is_envoy)
        .context("no envoy in the target directory: run `cargo xtask setup`, or set ENVOY_BIN")
}

fn access(line: &str) -> Option<BTreeMap<String, String>> {
    let Value::Object(object) = serde_json::from_str(line).ok()? else {
        return None;
    };
    let shown = |(key, value)| match value {
        Value::String(text) => (key, text),
        other => (key, other.to_string()),
    };
    Some(object.into_iter().map(shown).collect())
}

fn bootstrap(config: &Config) -> Value {
    json!({
        "admin": {"address": address(SocketAddr::from(([127, 0, 0, 1], ADMIN)))},
        "bootstrap_extensions": [
            named("envoy.bootstrap.internal_listener", "bootstrap.internal_listener.v3.InternalListener", json!({}))
        ],
        "static_resources": {
            "listeners": config.listeners.iter().map(listener).collect::<Vec<_>>(),
            "clusters": config.clusters.iter().map(cluster).collect::<Vec<_>>(),
        },
    })
}

fn listener(listener: &Listener) -> Value {
    let Listener {
        name,
        at,
        tls,
        serves,
    } = listener;
    let filter = match serves {
        Serves::Tunnel {
            cluster,
            authority,
            headers,
        } => tunnel(name, cluster, authority, headers),
        Serves::Connect { routes, remember } => connect(name, routes, remember),
        Serves::Http(rules) => rules_of(name, rules),
    };
    let mut chain = json!({"filters": [filter]});
    if let Some(tls) = tls {
        let context =
            json!({"require_client_certificate": true, "common_tls_context": common(tls)});
        put(
            &mut chain,
            "transport_socket",
            named(
                "tls",
                "transport_sockets.tls.v3.DownstreamTlsContext",
                context,
            ),
        );
    }
    let mut value = json!({"name": name, "filter_chains": [chain]});
    match at {
        At::Socket(at) => put(&mut value, "address", address(*at)),
        At::Internal => put(&mut value, "internal_listener", json!({})),
    }
    value
}

fn tunnel(name: &str, cluster: &str, authority: &str, headers: &[(&str, String)]) -> Value {
    let headers: Vec<_> = headers.iter().map(|(k, v)| header(k, v)).collect();
    named(
        "tunnel",
        "filters.network.tcp_proxy.v3.TcpProxy",
        json!({
            "stat_prefix": name,
            "cluster": cluster,
            // No time-out of Envoy's own: what ends a stream is to be ours or the application's.
            "idle_timeout": "0s",
            "tunneling_config": {"hostname": authority, "headers_to_add": headers},
            "access_log": [logger(name)],
        }),
    )
}

fn connect(name: &str, routes: &[(String, &str)], remember: &[(&str, &str)]) -> Value {
    let host = |(authority, cluster): &(String, &str)| {
        json!({
            "name": authority,
            "domains": [authority],
            "routes": [{
                "match": {"connect_matcher": {}},
                "route": {
                    "cluster": cluster,
                    "timeout": "0s",
                    "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                },
            }],
        })
    };
    let keep = |(key, format): &(&str, &str)| {
        json!({
            "object_key": key,
            // With a hash, so that no connection is shared where the value differs.
            "factory_key": "envoy.hashable_string",
            "format_string": {"text_format_source": {"inline_string": format}},
            "shared_with_upstream": "TRANSITIVE",
        })
    };
    let mut filters = Vec::new();
    if !remember.is_empty() {
        let kept: Vec<_> = remember.iter().map(keep).collect();
        filters.push(named(
            "remember",
            "filters.http.set_filter_state.v3.Config",
            json!({"on_request_headers": kept}),
        ));
    }
    let hosts: Vec<_> = routes.iter().map(host).collect();
    let more = json!({
        "codec_type": "HTTP2",
        "http2_protocol_options": {"allow_connect": true},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
    });
    http_manager(name, &hosts, filters, more)
}

fn rules_of(name: &str, rules: &[Rule]) -> Value {
    let route = |rule: &Rule| {
        let mut matches = json!({"prefix": rule.path_prefix});
        if let Some(method) = rule.method {
            let headers = json!([{"name": ":method", "string_match": {"exact": method}}]);
            put(&mut matches, "headers", headers);
        }
        match &rule.then {
            Then::Forward { cluster, add } => json!({
                "match": matches,
                "route": {"cluster": cluster, "timeout": "0s"},
                "request_headers_to_add": add.iter().map(|(k, v)| header(k, v)).collect::<Vec<_>>(),
            }),
            Then::Answer { status, body } => json!({
                "match": matches,
                "direct_response": {"status": status, "body": {"inline_string": body}},
            }),
        }
    };
    let routes: Vec<_> = rules.iter().map(route).collect();
    let host = json!({"name": name, "domains": ["*"], "routes": routes});
    let more = json!({"codec_type": "HTTP1", "upgrade_configs": [{"upgrade_type": "websocket"}]});
    http_manager(name, &[host], Vec::new(), more)
}

fn http_manager(name: &str, hosts: &[Value], mut filters: Vec<Value>, more: Value) -> Value {
    filters.push(named(
        "router",
        "filters.http.router.v3.Router",
        json!({"suppress_envoy_headers": true}),
    ));
    let mut manager = json!({
        "stat_prefix": name,
        "route_config": {"virtual_hosts": hosts},
        "http_filters": filters,
        "stream_idle_timeout": "0s",
        "access_log": [logger(name)],
    });
    if let (Value::Object(manager), Value::Object(more)) = (&mut manager, more) {
        manager.extend(more);
    }
    named(
        "http",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        manager,
    )
}

fn cluster(cluster: &Cluster) -> Value {
    let Cluster {
        name,
        to,
        tls,
        http2,
    } = cluster;
    let at = match to {
        To::Address(at) => address(*at),
        To::Internal(listener) => {
            json!({"envoy_internal_address": {"server_listener_name": listener}})
        }
    };
    let mut value = json!({
        "name": name,
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at}}]}],
        },
    });
    if *http2 {
        let options = "upstreams.http.v3.HttpProtocolOptions";
        let kind = format!("envoy.extensions.{options}");
        let config =
            json!({"explicit_http_config": {"http2_protocol_options": {"allow_connect": true}}});
        put(
            &mut value,
            "typed_extension_protocol_options",
            json!({kind: typed(options, config)}),
        );
    }
    let raw = || {
        named(
            "raw",
            "transport_sockets.raw_buffer.v3.RawBuffer",
            json!({}),
        )
    };
    let socket = match (to, tls) {
        (To::Internal(_), _) => named(
            "internal",
            "transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
            json!({"transport_socket": raw()}),
        ),
        (To::Address(_), Some(tls)) => named(
            "tls",
            "transport_sockets.tls.v3.UpstreamTlsContext",
            json!({"common_tls_context": common(tls)}),
        ),
        (To::Address(_), None) => raw(),
    };
    put(&mut value, "transport_socket", socket);
    value
}

fn common(tls: &Tls) -> Value {
    let mut trust = json!({"trusted_ca": {"filename": tls.own.root}});
    if !tls.peers.is_empty() {
        let peer = |id: &String| json!({"san_type": "URI", "matcher": {"exact": id}});
        let peers = tls.peers.iter().map(peer).collect();
        put(&mut trust, "match_typed_subject_alt_names", peers);
    }
    json!({
        "alpn_protocols": ["h2"],
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [{
            "certificate_chain": {"filename": tls.own.certificate},
            "private_key": {"filename": tls.own.key},
        }],
        "validation_context": trust,
    })
}

fn logger(listener: &str) -> Value {
    let mut format: Map<String, Value> = ACCESS
        .iter()
        .map(|(key, command)| ((*key).to_owned(), json!(command)))
        .collect();
    format.insert("listener".to_owned(), json!(listener));
    named(
        "stdout",
        "access_loggers.stream.v3.StdoutAccessLog",
        json!({"log_format": {"json_format": format}}),
    )
}

fn header(name: &str, value: &str) -> Value {
    json!({"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"})
}

fn named(name: &str, kind: &str, config: Value) -> Value {
    json!({"name": name, "typed_config": typed(kind, config)})
}

fn typed(kind: &str, mut config: Value) -> Value {
    let kind = format!("type.googleapis.com/envoy.extensions.{kind}");
    put(&mut config, "@type", json!(kind));
    config
}

/// Adds a key to an object.
fn put(object: &mut Value, key: &str, value: Value) {
    if let Value::Object(object) = object {
        object.insert(key.to_owned(), value);
    }
}

fn address(at: SocketAddr) -> Value {
    json!({"socket_address": {"address": at.ip(), "port_value": at.port()}})
}

/// The keys of an access line, beside `listener`, and what Envoy writes there; `-` or `null` where
/// there is nothing.
pub const ACCESS: [(&str, &str); 13] = [
    ("method", "%REQ(:METHOD)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("path", "%REQ(:PATH)%"),
    ("status", "%RESPONSE_CODE%"),
    ("flags", "%RESPONSE_FLAGS%"),
    ("from", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("peer", "%DOWNSTREAM_PEER_URI_SAN%"),
    ("forwarded", "%REQ(FORWARDED)%"),
    ("baggage", "%REQ(BAGGAGE)%"),
    ("upstream", "%UPSTREAM_HOST%"),
    ("upstream_peer", "%UPSTREAM_PEER_URI_SAN%"),
    ("received", "%BYTES_RECEIVED%"),
    ("sent", "%BYTES_SENT%"),
];
const ADMIN: u16 = 9901;
const PATIENCE: Duration = Duration::from_secs(60);
