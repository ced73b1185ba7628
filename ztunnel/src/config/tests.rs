//! Settings as an operator writes them, and what becomes of them.

use super::*;

fn config(vars: &[(&str, &str)]) -> Result<Config, Error> {
    let base = [("LOCAL_XDS_PATH", "/mesh.yaml")];
    let vars = base.iter().chain(vars);
    Config::from_vars(vars.map(|(n, v)| ((*n).into(), (*v).into())), 16)
}

#[test]
fn defaults_are_those_of_the_established_proxy() {
    let config = config(&[]).unwrap();
    assert_eq!(config.source, Some(Source::File("/mesh.yaml".into())));
    assert_eq!(
        (config.xds, config.ca),
        (None, None),
        "a file needs neither"
    );
    assert_eq!(config.workers, 4);
    assert_eq!(config.termination_deadline, Duration::from_secs(5));
    assert_eq!(config.pool_max_streams, 100);
    assert_eq!(config.stream_window_bytes, 4 << 20);
    assert!(!config.tls12, "TLS 1.3 alone");
    assert!(config.local_fast_path, "ours, and on");
    assert!(config.dns_capture && config.ipv6);
    assert_eq!(&*config.cluster_domain, "cluster.local");
    assert_eq!(config.preferred_namespace, None);
    assert_eq!(config.keepalive.unwrap().retries, 9);
    assert!(
        config.probe_addresses.is_empty(),
        "ours: nobody is trusted untold"
    );
    assert_eq!(config.ignored, []);
}

#[test]
fn a_node_is_told_the_addresses_of_its_probes() {
    let told = [
        ("HOST_PROBE_SNAT_IP", "169.254.7.127"),
        ("HOST_PROBE_SNAT_IPV6", "fd16:9254::1"),
    ];
    let both: [IpAddr; 2] = ["169.254.7.127", "fd16:9254::1"].map(|ip| ip.parse().unwrap());
    assert_eq!(config(&told).unwrap().probe_addresses, both);
    assert_eq!(config(&told[..1]).unwrap().probe_addresses, both[..1]);
    let empty = config(&[("HOST_PROBE_SNAT_IP", "")]).unwrap();
    assert!(empty.probe_addresses.is_empty());
    for (name, none) in [
        ("HOST_PROBE_SNAT_IP", "0.0.0.0"),
        ("HOST_PROBE_SNAT_IP", "127.0.0.1"),
        ("HOST_PROBE_SNAT_IPV6", "::ffff:127.0.0.1"),
    ] {
        let refused = config(&[(name, none)]).unwrap_err().to_string();
        assert!(
            refused.contains(name) && refused.contains(none),
            "{refused}"
        );
    }
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
        ("HOST_PROBE_SNAT_IP", "fd16::1"),
        ("HOST_PROBE_SNAT_IPV6", "169.254.7.127"),
        ("LOCAL_FAST_PATH", "sometimes"),
        ("ZTUNNEL_WORKER_THREADS", "150%"),
        ("ZTUNNEL_WORKER_THREADS", "many"),
        ("ZTUNNEL_WORKER_THREADS", "1000"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "0"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "65536"),
        ("HTTP2_FRAME_SIZE", "1"),
        ("HTTP2_STREAM_WINDOW_SIZE", "4294967295"),
        ("TLS12_ENABLED", "1.2"),
        ("COMPLIANCE_POLICY", "fips"),
        ("UNSTABLE_ENABLE_SOCKS5", "socks4"),
        ("LOG_FORMAT", "xml"),
        ("PROXY_MODE", "dedicated"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "-1"),
        ("ZTUNNEL_RESOURCE_CPU_LIMIT", "0"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "2.x"),
        ("ZTUNNEL_CPU_LIMIT", "0"),
        ("ENABLE_PROXY", "false"),
        ("USER_TIMEOUT_ENABLED", "yes"),
        ("CAPTURE", "iptables"),
        ("ENROLMENT", "magic"),
        ("PACKET_MARK", "0x539"),
        ("ENABLE_PROXY", "no"),
    ] {
        let text = config(&[(name, value)]).unwrap_err().to_string();
        assert!(text.contains(name) && text.contains(value), "{text}");
    }
}

#[test]
fn an_agent_enrols_and_its_rules_redirect_unless_something_else_is_said() {
    let agent = || Enrolment::Zds("/a.sock".into());
    for (vars, enrolment, capture) in [
        (&[][..], Enrolment::Listed, CaptureBy::Ebpf),
        (&[("INPOD_UDS", "/a.sock")], agent(), CaptureBy::External),
        (
            &[("ENROLMENT", "zds")],
            Enrolment::Zds("/var/run/ztunnel/ztunnel.sock".into()),
            CaptureBy::External,
        ),
        (
            &[("INPOD_UDS", "/a.sock"), ("CAPTURE", "ebpf")],
            agent(),
            CaptureBy::Ebpf,
        ),
        (
            &[("INPOD_UDS", "/a.sock"), ("ENROLMENT", "file")],
            Enrolment::Listed,
            CaptureBy::Ebpf,
        ),
        (
            &[("CAPTURE", "external")],
            Enrolment::Listed,
            CaptureBy::External,
        ),
    ] {
        let config = config(vars).unwrap();
        assert_eq!(config.enrolment, enrolment, "{vars:?}");
        assert_eq!(config.capture, capture, "{vars:?}");
        assert_eq!(config.packet_mark, Some(1337));
    }
    assert_eq!(config(&[("PACKET_MARK", "0")]).unwrap().packet_mark, None);
    let unmarked = config(&[("PACKET_MARK", "0"), ("CAPTURE", "external")]);
    let unmarked = unmarked.unwrap_err().to_string();
    assert!(unmarked.contains("PACKET_MARK"), "{unmarked}");
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

// B110.
#[test]
fn without_a_number_of_workers_the_processors_decide() {
    let (all, limit, request) = (
        "ZTUNNEL_CPU_LIMIT",
        "ZTUNNEL_RESOURCE_CPU_LIMIT",
        "ZTUNNEL_RESOURCE_CPU_REQUEST",
    );
    for (vars, workers) in [
        (vec![], 4),
        (vec![(request, "6")], 6),
        (vec![(request, "500m")], 4),
        (vec![(limit, "1")], 1),
        (vec![(limit, "2500m"), (request, "1")], 3),
        (vec![(limit, "1"), (request, "2")], 2),
        (vec![(all, "32")], 8),
        (vec![(all, "1")], 2),
        (vec![(all, "32"), ("ZTUNNEL_WORKER_THREADS", "50%")], 16),
        (vec![(all, "32"), ("ZTUNNEL_WORKER_THREADS", "0")], 32),
        (vec![(all, "9999")], MAX_WORKERS),
    ] {
        let config = config(&vars).unwrap();
        assert_eq!(config.workers, workers, "{vars:?}");
    }
    for name in [all, limit, request] {
        let error = config(&[(name, "0")]).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn the_operators_ports_are_where_the_proxy_config_says() {
    let ports = |vars: &[(&str, &str)]| {
        let config = config(vars).unwrap();
        (config.admin_port, config.stats_port)
    };
    assert_eq!(ports(&[]), (15000, 15020));
    let elsewhere = "{proxyAdminPort: 15100, statsPort: 15120}";
    assert_eq!(ports(&[("PROXY_CONFIG", elsewhere)]), (15100, 15120));
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
    let config = config(&[
        ("TRUST_DOMAIN", "x"),
        ("ISTIO_META_FOO", "y"),
        ("HOME", "/"),
    ]);
    let ignored = config.unwrap().ignored;
    let names: Vec<_> = ignored.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["TRUST_DOMAIN"]);
    assert!(ignored.iter().all(|(_, why)| !why.is_empty()));
}

// B112.
#[test]
fn dns_is_captured_unless_another_word_than_true_says_otherwise() {
    for (value, captured) in [
        ("true", true),
        ("TRUE", true),
        ("false", false),
        ("", false),
    ] {
        let config = config(&[("ISTIO_META_DNS_CAPTURE", value)]).unwrap();
        assert_eq!(config.dns_capture, captured, "{value:?}");
    }
    let text = "proxyMetadata: {DNS_CAPTURE: \"false\"}\n";
    assert!(!config(&[("PROXY_CONFIG", text)]).unwrap().dns_capture);
    let names = config(&[
        ("CLUSTER_DOMAIN", "Mesh.Example."),
        ("IPV6_ENABLED", "false"),
        ("PREFERED_SERVICE_NAMESPACE", "shared"),
    ]);
    let names = names.unwrap();
    assert_eq!(&*names.cluster_domain, "mesh.example");
    assert_eq!(names.preferred_namespace.as_deref(), Some("shared"));
    assert!(!names.ipv6);
}

fn alone(vars: &[(&str, &str)]) -> Result<Config, Error> {
    Config::from_vars(vars.iter().map(|(n, v)| ((*n).into(), (*v).into())), 4)
}

// 5.
#[test]
fn the_post_quantum_policy_binds_the_control_planes_connections_too() {
    let xds = ("XDS_ADDRESS", "istiod:15012");
    for (policy, exchange) in [("", KeyExchange::Any), ("pqc", KeyExchange::PostQuantum)] {
        let config = alone(&[xds, ("COMPLIANCE_POLICY", policy)]).unwrap();
        let (xds, ca) = (config.xds.unwrap().rpc, config.ca.unwrap());
        let all = [config.key_exchange, xds.key_exchange, ca.key_exchange];
        assert_eq!(all, [exchange; 3], "{policy}");
    }
}

// B005, B006, B034, B108.
#[test]
fn a_control_plane_is_described_by_the_variables_of_the_established_proxy() {
    let config = alone(&[
        ("XDS_ADDRESS", "istiod:15012"),
        ("XDS_ROOT_CA", "/roots.pem"),
        ("XDS_HEADER_x-tenant", "blue"),
        ("ALT_XDS_HOSTNAME", "other"),
        ("AUTH_TOKEN", "literal"),
        ("CLUSTER_ID", "c2"),
        ("CA_ADDRESS", "https://ca:1"),
        ("CA_ROOT_CA", "SYSTEM"),
        ("POD_NAME", "zt"),
        ("POD_NAMESPACE", "istio-system"),
        ("INSTANCE_IP", "10.0.0.1"),
        ("NODE_NAME", "n1"),
        ("ISTIO_META_FOO", "bar"),
        ("ISTIO_METAJSON_LABELS", "{\"app\": \"zt\"}"),
        ("ISTIO_METAJSON_BAD", "{"),
    ]);
    let config = config.unwrap();
    assert_eq!(config.source, None);
    assert_eq!(config.unusable, ["ISTIO_METAJSON_BAD"]);
    let xds = config.xds.unwrap();
    assert_eq!(xds.rpc.endpoint.to_string(), "istiod:15012");
    assert_eq!(xds.rpc.roots, rpc::Roots::File("/roots.pem".into()));
    assert_eq!(xds.rpc.token, Some(rpc::Token::Literal("literal".into())));
    assert_eq!(xds.rpc.cluster_id, "c2");
    assert_eq!(xds.rpc.headers.len(), 1);
    assert_eq!(xds.node.metadata["FOO"], "bar");
    assert_eq!(xds.node.metadata["LABELS"]["app"], "zt");
    let ca = config.ca.unwrap();
    assert_eq!(
        (ca.endpoint.to_string(), ca.roots),
        ("ca:1".into(), rpc::Roots::System)
    );
}

// B010, B031, B035, B060.
#[test]
fn what_cannot_be_is_refused_by_name() {
    for (vars, name) in [
        (&[("XDS_ADDRESS", "http://istiod:15010")][..], "XDS_ADDRESS"),
        (
            &[("XDS_ADDRESS", "a:1"), ("XDS_ON_DEMAND", "true")],
            "ISTIO_META_DNS_CAPTURE",
        ),
        (&[("XDS_ADDRESS", "a:1"), ("CA_ADDRESS", "")], "CA_ADDRESS"),
        (&[("XDS_ADDRESS", "a:1"), ("FAKE_CA", "true")], "FAKE_CA"),
        (
            &[("XDS_ADDRESS", "a:1"), ("XDS_HEADER_clusterid", "x")],
            "XDS_HEADER_clusterid",
        ),
        (&[("XDS_ADDRESS", "")], "LOCAL_XDS_PATH"),
        (
            &[("XDS_ADDRESS", "a:1"), ("ENROLMENT", "file")],
            "ENROLMENT",
        ),
        (
            &[("XDS_ADDRESS", "a:1"), ("ENROLMENT", "file")],
            "LOCAL_XDS_PATH",
        ),
        (
            &[("XDS_ADDRESS", "a:1"), ("PROXY_CONFIG", "- x")],
            "PROXY_CONFIG",
        ),
    ] {
        let text = alone(vars).unwrap_err().to_string();
        assert!(text.contains(name), "{text}");
    }
    let ready = config(&[("XDS_ADDRESS", "")]).unwrap();
    assert_eq!(ready.xds, None);
}

#[test]
fn the_proxys_own_document_gives_address_threads_and_metadata() {
    let text = "discoveryAddress: istiod.x:15012\nconcurrency: 3\nproxyMetadata: {A: b}\n";
    let config = alone(&[("PROXY_CONFIG", text), ("ISTIO_META_A", "c")]).unwrap();
    assert_eq!(config.workers, 3);
    let xds = config.xds.unwrap();
    assert_eq!(xds.rpc.endpoint.to_string(), "istiod.x:15012");
    assert_eq!(xds.node.metadata["A"], "c", "the environment wins");
}
