//! The names of all variables: takes one, says whether this process honours it, or why it does not, as
//! deploy/CONFIGURATION.md says it to operators; it never reads a value.

/// Variables whose names only begin in a known way are all read.
pub(super) fn is_read(name: &str) -> bool {
    READ.contains(&name) || READ_BY_PREFIX.iter().any(|prefix| name.starts_with(prefix))
}

/// Why a variable of the established proxy is not honoured.
pub(super) fn why_not(name: &str) -> Option<&'static str> {
    let listed = KNOWN_TO_PEER.iter().find(|(known, _)| *known == name);
    listed.map(|(_, why)| *why)
}

/// Variables that this process honours.
const READ: [&str; 61] = [
    "ALT_CA_HOSTNAME",
    "ALT_XDS_HOSTNAME",
    "AUTHZ_POLICY_INFO_LOGGING",
    "AUTH_TOKEN",
    "BPF_PIN_DIR",
    "CAPTURE",
    "CA_ADDRESS",
    "CA_DIR",
    "CA_ROOT_CA",
    "CLUSTER_DOMAIN",
    "CLUSTER_ID",
    "COMPLIANCE_POLICY",
    "CONNECTION_TERMINATION_DEADLINE",
    "CRL_PATH",
    "ENABLE_ORIG_SRC",
    "ENABLE_PROXY",
    "ENABLE_RESPONSE_BAGGAGE",
    "ENROLMENT",
    "FAKE_CA",
    "HOST_PROBE_SNAT_IP",
    "HOST_PROBE_SNAT_IPV6",
    "HTTP2_CONNECTION_WINDOW_SIZE",
    "HTTP2_FRAME_SIZE",
    "HTTP2_STREAM_WINDOW_SIZE",
    "INPOD_PORT_REUSE",
    "INPOD_UDS",
    "INSTANCE_IP",
    "IPV6_ENABLED",
    "KEEPALIVE_ENABLED",
    "KEEPALIVE_INTERVAL",
    "KEEPALIVE_RETRIES",
    "KEEPALIVE_TIME",
    "KUBERNETES_SERVICE_HOST",
    "LOCALHOST_APP_TUNNEL",
    "LOCAL_FAST_PATH",
    "LOCAL_XDS",
    "LOCAL_XDS_PATH",
    "LOG_FORMAT",
    "NETWORK",
    "NODE_NAME",
    "PACKET_MARK",
    "POD_NAME",
    "POD_NAMESPACE",
    "POOL_MAX_STREAMS_PER_CONNECTION",
    "POOL_UNUSED_RELEASE_TIMEOUT",
    "PREFERED_SERVICE_NAMESPACE",
    "PROXY_CONFIG",
    "PROXY_MODE",
    "RUST_LOG",
    "SECRET_TTL",
    "TERMINATION_GRACE_PERIOD_SECONDS",
    "TLS12_ENABLED",
    "UNSTABLE_ENABLE_SOCKS5",
    "USER_TIMEOUT_ENABLED",
    "XDS_ADDRESS",
    "XDS_ON_DEMAND",
    "XDS_ROOT_CA",
    "ZTUNNEL_CPU_LIMIT",
    "ZTUNNEL_RESOURCE_CPU_LIMIT",
    "ZTUNNEL_RESOURCE_CPU_REQUEST",
    "ZTUNNEL_WORKER_THREADS",
];

/// Beginnings of variables that this process honours.
const READ_BY_PREFIX: [&str; 4] = [
    "CA_HEADER_",
    "ISTIO_METAJSON_",
    "ISTIO_META_",
    "XDS_HEADER_",
];

const NO_OWN_IDENTITY: &str =
    "the process has no identity of its own: its ports are not in the mesh";

/// Variables of the established proxy that are not honoured, and why; a start names them.
const KNOWN_TO_PEER: [(&str, &str); 5] = [
    (
        "INPOD_ENABLED",
        "nothing reads it, nor does the established proxy",
    ),
    (
        "ISTIO_META_DNS_PROXY_ADDR",
        "questions come to where the kernel or the rules in the pod bring them",
    ),
    (
        "PROXY_WORKLOAD_INFO",
        "there is no dedicated mode: one process serves all pods of the node",
    ),
    ("SERVICE_ACCOUNT", NO_OWN_IDENTITY),
    ("TRUST_DOMAIN", NO_OWN_IDENTITY),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    // A table that says something else than the program is worse than none.
    #[test]
    fn the_documented_table_is_what_the_program_does() {
        let table = include_str!("../../../deploy/CONFIGURATION.md");
        let mut rows = BTreeMap::new();
        for line in table.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<_> = line
                .split(" | ")
                .map(|cell| cell.trim_matches(['|', ' ']))
                .collect();
            let [names, status, text] = cells[..] else {
                panic!("not three cells: {line}");
            };
            for name in names.split(", ") {
                let name = name.trim_matches('`').to_owned();
                let before = rows.insert(name.clone(), (status, text));
                assert!(before.is_none(), "{name} is there twice");
            }
        }
        let prefixes = READ_BY_PREFIX.map(|prefix| format!("{prefix}*"));
        for name in READ.map(str::to_owned).into_iter().chain(prefixes) {
            let (status, _) = rows
                .remove(&name)
                .unwrap_or_else(|| panic!("no row for {name}"));
            assert_eq!(status, "honoured", "{name}");
        }
        for (name, why) in KNOWN_TO_PEER {
            let (status, text) = rows
                .remove(name)
                .unwrap_or_else(|| panic!("no row for {name}"));
            assert_eq!((status, text), ("not supported", why), "{name}");
        }
        // Fields, which have no list in the program: they are those of the struct that is read.
        let fields = [
            "concurrency",
            "discoveryAddress",
            "proxyAdminPort",
            "proxyMetadata",
            "statsPort",
        ];
        for field in fields {
            let row = rows.remove(field);
            assert_eq!(row.map(|(status, _)| status), Some("honoured"), "{field}");
        }
        assert!(rows.is_empty(), "the program does not know {rows:?}");
    }
}
