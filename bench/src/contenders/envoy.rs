//! Envoy as a sidecar would be: one beside the client and one beside each server, a TCP proxy over mutual TLS with
//! SPIFFE certificates, admitting by the peer's identity. Takes a topology and the binary; gives the processes once
//! they listen. The application connects to its Envoy by loopback: no redirection is paid for.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};
use ztunnel_tests::{
    process::Running,
    topology::{Pod, Topology},
    ztunnel::HBONE,
};

use super::{CLIENT, NEIGHBOUR, PORTS, Place, SERVER, STRANGER, Setting};
use crate::world;

pub(super) fn start(topology: &Topology, setting: &Setting) -> Result<Vec<Running>> {
    let authority = Authority::new(topology)?;
    for name in [CLIENT, STRANGER, SERVER, NEIGHBOUR] {
        authority.certify(topology.pod(name)?)?;
    }
    let run = Run {
        topology,
        setting,
        directory: topology.directory()?,
    };
    let mut running = Vec::new();
    // The client's first: it is the one whose memory a person asks for.
    for name in [CLIENT, SERVER, NEIGHBOUR] {
        let config = if name == CLIENT {
            run.client()?
        } else {
            run.server(name)?
        };
        running.push(run.start(name, &config)?);
    }
    world::wait_listening(&topology.pod(SERVER)?.netns, &[HBONE])?;
    world::wait_listening(&topology.pod(NEIGHBOUR)?.netns, &[HBONE])?;
    world::wait_listening(&topology.pod(CLIENT)?.netns, &PORTS)?;
    Ok(running)
}

/// Where the client's Envoy listens with the stranger's certificate.
pub(super) fn stranger(place: Place) -> Ipv4Addr {
    let [a, b, _, d] = place.loopback().octets();
    Ipv4Addr::new(a, b, 2, d)
}

struct Run<'a> {
    topology: &'a Topology,
    setting: &'a Setting,
    directory: PathBuf,
}

impl Run<'_> {
    fn start(&self, name: &str, config: &Value) -> Result<Running> {
        let path = self.directory.join(format!("envoy-{name}.json"));
        fs::write(&path, serde_json::to_vec_pretty(config)?)?;
        let mut command = Command::new(&self.setting.envoy);
        command.arg("--config-path").arg(&path);
        command.args(["--concurrency", &self.setting.workers.to_string()]);
        command.args(["--disable-hot-restart", "--log-level", "warning"]);
        let netns = &self.topology.pod(name)?.netns;
        let log = self.directory.join(format!("envoy-{name}.log"));
        Running::start_unheard(&format!("envoy of {name}"), Some(netns), command, &log)
    }

    fn client(&self) -> Result<Value> {
        let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
        for port in PORTS {
            for place in [Place::Cross, Place::Local] {
                let to = self.topology.pod(place.pod())?;
                for (who, address) in [(CLIENT, place.loopback()), (STRANGER, stranger(place))] {
                    let name = format!("{who}-{}-{port}", to.name);
                    let mut cluster = self.cluster(&name, &to.v4.to_string(), HBONE);
                    put(
                        &mut cluster,
                        "transport_socket",
                        self.upstream_tls(who, to, port),
                    );
                    clusters.push(cluster);
                    listeners.push(self.listener(&name, address, port));
                }
            }
            let to = self.topology.pod(Place::Outside.pod())?;
            let name = format!("plain-{port}");
            clusters.push(self.cluster(&name, &to.v4.to_string(), port));
            listeners.push(self.listener(&name, Place::Outside.loopback(), port));
        }
        Ok(bootstrap(listeners, clusters))
    }

    fn server(&self, name: &str) -> Result<Value> {
        let client = self.topology.pod(CLIENT)?.spiffe_id();
        let admit = json!({
            "name": "envoy.filters.network.rbac",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC",
                "stat_prefix": "admit",
                "rules": { "action": "ALLOW", "policies": { "clients": {
                    "permissions": [{ "any": true }],
                    "principals": [{ "authenticated": { "principal_name": { "exact": client } } }],
                } } },
            },
        });
        let (mut chains, mut clusters) = (Vec::new(), Vec::new());
        for port in PORTS {
            let app = format!("app-{port}");
            clusters.push(self.cluster(&app, "127.0.0.1", port));
            chains.push(json!({
                "filter_chain_match": { "server_names": [server_name(port)] },
                "transport_socket": self.downstream_tls(name),
                "filters": [admit, self.tcp_proxy(&app)],
            }));
        }
        let listener = json!({
            "name": "hbone",
            "address": address("0.0.0.0", HBONE),
            "listener_filters": [{
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" },
            }],
            "filter_chains": chains,
        });
        Ok(bootstrap(vec![listener], clusters))
    }

    fn listener(&self, cluster: &str, at: Ipv4Addr, port: u16) -> Value {
        json!({
            "name": cluster,
            "address": address(&at.to_string(), port),
            "filter_chains": [{ "filters": [self.tcp_proxy(cluster)] }],
        })
    }

    fn tcp_proxy(&self, cluster: &str) -> Value {
        let mut config = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster,
            "cluster": cluster,
        });
        if self.setting.access_log {
            let log = json!([{
                "name": "envoy.access_loggers.file",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                    "path": self.directory.join("envoy-access.log"),
                },
            }]);
            put(&mut config, "access_log", log);
        }
        json!({ "name": "envoy.filters.network.tcp_proxy", "typed_config": config })
    }

    fn cluster(&self, name: &str, host: &str, port: u16) -> Value {
        let many = 1_000_000;
        json!({
            "name": name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "circuit_breakers": { "thresholds": [{
                "max_connections": many, "max_pending_requests": many, "max_requests": many,
            }] },
            "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [{
                "endpoint": { "address": address(host, port) },
            }] }] },
        })
    }

    fn upstream_tls(&self, who: &str, to: &Pod, port: u16) -> Value {
        json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": server_name(port),
                // No resumption, as in the mesh: identity is proven each time.
                "max_session_keys": 0,
                "common_tls_context": self.tls(who, Some(&to.spiffe_id())),
            },
        })
    }

    fn downstream_tls(&self, who: &str) -> Value {
        json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": true,
                "disable_stateless_session_resumption": true,
                "disable_stateful_session_resumption": true,
                "common_tls_context": self.tls(who, None),
            },
        })
    }

    fn tls(&self, who: &str, peer: Option<&str>) -> Value {
        let file =
            |name: &str| json!({ "filename": self.directory.join(format!("envoy-{name}.pem")) });
        let mut validation = json!({ "trusted_ca": file("root") });
        if let Some(peer) = peer {
            let names = json!([{ "san_type": "URI", "matcher": { "exact": peer } }]);
            put(&mut validation, "match_typed_subject_alt_names", names);
        }
        json!({
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "tls_certificates": [{
                "certificate_chain": file(who),
                "private_key": file(&format!("{who}-key")),
            }],
            "validation_context": validation,
        })
    }
}

fn bootstrap(listeners: Vec<Value>, clusters: Vec<Value>) -> Value {
    json!({ "static_resources": { "listeners": listeners, "clusters": clusters } })
}

fn address(host: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": host, "port_value": port } })
}

/// How the client's Envoy tells the server's which application it wants.
fn server_name(port: u16) -> String {
    format!("port-{port}.bench")
}

fn put(object: &mut Value, key: &str, value: Value) {
    if let Some(object) = object.as_object_mut() {
        object.insert(key.to_owned(), value);
    }
}

/// Signs for this benchmark's Envoys.
struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(topology: &Topology) -> Result<Self> {
        let directory = topology.directory()?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "bench root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = params.self_signed(&key)?;
        write(&directory, "root", &root.pem())?;
        Ok(Self {
            directory,
            issuer: Issuer::new(params, key),
        })
    }

    fn certify(&self, pod: &Pod) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(pod.spiffe_id().as_str().try_into()?)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let leaf = params.signed_by(&key, &self.issuer)?;
        write(&self.directory, &pod.name, &leaf.pem())?;
        write(
            &self.directory,
            &format!("{}-key", pod.name),
            &key.serialize_pem(),
        )
    }
}

fn write(directory: &Path, name: &str, pem: &str) -> Result<()> {
    let path = directory.join(format!("envoy-{name}.pem"));
    fs::write(&path, pem).with_context(|| format!("write {}", path.display()))
}
