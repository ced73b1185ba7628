//! The settings of the control plane and of the CA. Takes the environment, gives where they are and how we and they
//! prove who we are; never opens a connection.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use http::{HeaderName, HeaderValue};
use serde::Deserialize;

use super::{Env, Error, key_exchange, refused};
use crate::control::{NodeParams, XdsParams};
use crate::rpc;

/// What a proxy's own configuration document says. Other keys are somebody else's.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProxyConfig {
    pub(super) discovery_address: Option<String>,
    pub(super) concurrency: Option<usize>,
    pub(super) proxy_admin_port: Option<u16>,
    pub(super) stats_port: Option<u16>,
    #[serde(default)]
    proxy_metadata: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MeshConfig {
    #[serde(default)]
    default_config: ProxyConfig,
}

impl ProxyConfig {
    /// `PROXY_CONFIG` over the mesh's file, if there is one.
    // PROTOCOL.md#settings-order
    pub(super) fn read(env: &Env, mesh_file: &Path) -> Result<Self, Error> {
        let mesh: MeshConfig = match std::fs::read_to_string(mesh_file) {
            Ok(text) => parsed("the mesh file", &text)?,
            Err(_absent) => MeshConfig::default(),
        };
        let mut config = mesh.default_config;
        let text = env.text("PROXY_CONFIG");
        if !text.trim().is_empty() {
            let own: Self = parsed("PROXY_CONFIG", text)?;
            config.discovery_address = own.discovery_address.or(config.discovery_address);
            config.concurrency = own.concurrency.or(config.concurrency);
            config.proxy_admin_port = own.proxy_admin_port.or(config.proxy_admin_port);
            config.stats_port = own.stats_port.or(config.stats_port);
            config.proxy_metadata.extend(own.proxy_metadata);
        }
        Ok(config)
    }
}

fn parsed<T: for<'de> Deserialize<'de>>(name: &'static str, text: &str) -> Result<T, Error> {
    serde_saphyr::from_str(text).map_err(|e| {
        refused(
            name,
            text,
            format!("not a proxy configuration in YAML: {e}"),
        )
    })
}

/// The control plane, if there is one beside or instead of the file.
// PROTOCOL.md#control-plane-address
pub(super) fn xds(env: &Env, proxy: &ProxyConfig) -> Result<Option<XdsParams>, Error> {
    let name = "XDS_ADDRESS";
    let address = match (env.get(name), &proxy.discovery_address) {
        (Some(""), _) => return Ok(None),
        (Some(address), _) => address,
        (None, Some(address)) => address,
        (None, None) if env.get("KUBERNETES_SERVICE_HOST").is_some() => IN_CLUSTER,
        (None, None) => return Ok(None),
    };
    let on_demand = env.parse("XDS_ON_DEMAND", false, "true or false")?;
    if on_demand && dns_capture(env, proxy) {
        let why = "answering DNS needs to know every service: set ISTIO_META_DNS_CAPTURE=false, or XDS_ON_DEMAND=false";
        return Err(refused("XDS_ON_DEMAND", "true", why.into()));
    }
    Ok(Some(XdsParams {
        rpc: rpc::Params {
            endpoint: endpoint(name, address)?,
            roots: roots(env, "XDS_ROOT_CA"),
            other_name: filled(env, "ALT_XDS_HOSTNAME"),
            headers: headers(env, "XDS_HEADER_")?,
            token: token(env),
            cluster_id: cluster_id(env),
            key_exchange: key_exchange(env)?,
        },
        node: node(env, proxy)?,
        on_demand,
    }))
}

/// Whether pods' questions to resolvers are captured: metadata like any other, which this process
/// heeds, too.
// PROTOCOL.md#dns-setting
pub(super) fn dns_capture(env: &Env, proxy: &ProxyConfig) -> bool {
    let metadata = || proxy.proxy_metadata.get("DNS_CAPTURE").map(String::as_str);
    let set = env.get("ISTIO_META_DNS_CAPTURE").or_else(metadata);
    set.is_none_or(|value| value.eq_ignore_ascii_case("true"))
}

/// The CA that is asked; `None` for the one in our own directory.
pub(super) fn ca(env: &Env, has_xds: bool) -> Result<Option<rpc::Params>, Error> {
    if env.parse("FAKE_CA", false, "true or false")? {
        let why = "there is no pretended CA in this program: use CA_DIR for one of its own";
        return Err(refused("FAKE_CA", "true", why.into()));
    }
    let name = "CA_ADDRESS";
    let address = match env.get(name) {
        Some("") => {
            let why = "must be an address; leave it unset and set CA_DIR to sign in this process";
            return Err(refused(name, "", why.into()));
        }
        Some(address) => address,
        None if !has_xds || env.get("CA_DIR").is_some() => return Ok(None),
        None if env.get("KUBERNETES_SERVICE_HOST").is_some() => IN_CLUSTER,
        None => ON_THIS_HOST,
    };
    Ok(Some(rpc::Params {
        endpoint: endpoint(name, address)?,
        roots: roots(env, "CA_ROOT_CA"),
        other_name: filled(env, "ALT_CA_HOSTNAME"),
        headers: headers(env, "CA_HEADER_")?,
        token: token(env),
        cluster_id: cluster_id(env),
        key_exchange: key_exchange(env)?,
    }))
}

fn endpoint(name: &'static str, text: &str) -> Result<rpc::Endpoint, Error> {
    text.parse()
        .map_err(|why: rpc::InvalidEndpoint| refused(name, text, why.to_string()))
}

fn roots(env: &Env, name: &str) -> rpc::Roots {
    match env.get(name) {
        Some("SYSTEM") => rpc::Roots::System,
        Some(pem) if pem.contains("-----BEGIN") => rpc::Roots::Inline(pem.to_owned()),
        None | Some("") => rpc::Roots::File(ROOT_FILE.into()),
        Some(path) => rpc::Roots::File(path.into()),
    }
}

fn token(env: &Env) -> Option<rpc::Token> {
    let text = match env.get("AUTH_TOKEN").filter(|text| !text.is_empty()) {
        None if Path::new(TOKEN_FILE).exists() => TOKEN_FILE,
        None => return None,
        Some(text) => text,
    };
    // A path that leads nowhere yet is a path all the same; a token never looks like one.
    let is_path = text.starts_with(['/', '.']) || Path::new(text).exists();
    Some(if is_path {
        rpc::Token::File(PathBuf::from(text))
    } else {
        rpc::Token::Literal(text.to_owned())
    })
}

pub(super) fn cluster_id(env: &Env) -> String {
    let given = filled(env, "ISTIO_META_CLUSTER_ID").or_else(|| filled(env, "CLUSTER_ID"));
    given.unwrap_or_else(|| "Kubernetes".to_owned())
}

fn headers(env: &Env, prefix: &str) -> Result<Vec<(HeaderName, HeaderValue)>, Error> {
    let mut headers = Vec::new();
    for (suffix, value) in env.with_prefix(prefix) {
        let header = suffix
            .parse::<HeaderName>()
            .ok()
            .filter(|name| !OURS.contains(&name.as_str()))
            .zip(HeaderValue::try_from(value).ok());
        let Some(header) = header else {
            return Err(Error::Header(format!("{prefix}{suffix}")));
        };
        headers.push(header);
    }
    Ok(headers)
}

fn node(env: &Env, proxy: &ProxyConfig) -> Result<NodeParams, Error> {
    let text = |text: &str| serde_json::Value::String(text.to_owned());
    let mut metadata: BTreeMap<String, serde_json::Value> = proxy
        .proxy_metadata
        .iter()
        .map(|(key, value)| (key.clone(), text(value)))
        .collect();
    for (key, value) in env.with_prefix("ISTIO_META_") {
        metadata.insert(key.to_owned(), text(value));
    }
    for (key, value) in env.with_prefix("ISTIO_METAJSON_") {
        match serde_json::from_str(value) {
            Ok(value) => drop(metadata.insert(key.to_owned(), value)),
            // Said by the process at its start: nothing that follows depends on it.
            Err(_no_json) => env.unusable(format!("ISTIO_METAJSON_{key}")),
        }
    }
    Ok(NodeParams {
        instance_ip: filled(env, "INSTANCE_IP").unwrap_or_else(|| "1.1.1.1".to_owned()),
        pod: env.text("POD_NAME").to_owned(),
        namespace: env.text("POD_NAMESPACE").to_owned(),
        node: env.text("NODE_NAME").to_owned(),
        metadata,
    })
}

fn filled(env: &Env, name: &str) -> Option<String> {
    env.get(name)
        .filter(|value| !value.is_empty())
        .map(str::to_owned)
}

const IN_CLUSTER: &str = "https://istiod.istio-system.svc:15012";
const ON_THIS_HOST: &str = "https://localhost:15012";
const ROOT_FILE: &str = "./var/run/secrets/istio/root-cert.pem";
const TOKEN_FILE: &str = "./var/run/secrets/tokens/istio-token";
/// Headers that say who we are.
const OURS: [&str; 5] = [
    "authorization",
    "clusterid",
    "content-type",
    "te",
    "user-agent",
];
