//! What a file may say, and how each fault is named.

use super::*;
use crate::model::{
    Action, AppProtocol, GatewayDestination, Health, HealthPolicy, IpFamilies, LoadBalancerMode,
    Protocol, RoutingScope, Scope, StringMatch, Visibility,
};

fn read(text: &str) -> Result<State, String> {
    parse(Path::new("mesh.yaml"), text).map_err(|error| error.to_string())
}

const EXAMPLE: &str = r#"
workloads:
  - uid: demo/pod/shop/cart-1
    name: cart-1
    namespace: shop
    serviceAccount: cart
    trustDomain: cluster.local
    workloadIps: ["10.50.0.11"]
    protocol: HBONE
    node: n1
    authorizationPolicies: ["shop/only-web"]
    services:
      "shop/cart.shop.svc.cluster.local":
        8080: 80
  - uid: demo/pod/shop/web-1
    name: web-1
    namespace: shop
    serviceAccount: web
    trustDomain: cluster.local
    workloadIps: ["10.50.0.12"]
    protocol: HBONE
    node: n2
    services: {}
services:
  - name: cart
    namespace: shop
    hostname: cart.shop.svc.cluster.local
    vips: ["/10.60.0.5"]
    ports: {8080: 80}
    loadBalancer:
      routingPreferences: [Zone]
      mode: Failover
      healthPolicy: OnlyHealthy
policies:
  - name: only-web
    namespace: shop
    scope: WorkloadSelector
    action: Allow
    dryRun: false
    rules:
      - - - serviceAccounts:
              - {namespace: shop, serviceAccount: web}
            destinationPorts: [80]
"#;

#[test]
fn the_documented_example_loads() {
    let state = read(EXAMPLE).unwrap();
    let [cart, web] = &state.workloads[..] else {
        panic!("two workloads")
    };
    assert_eq!(cart.uid.to_string(), "demo/pod/shop/cart-1");
    assert_eq!(
        cart.identity.as_ref().unwrap().to_string(),
        "spiffe://cluster.local/ns/shop/sa/cart"
    );
    assert_eq!(
        cart.ips,
        ["10.50.0.11".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(
        (cart.protocol, &*cart.node, cart.capacity),
        (Protocol::Hbone, "n1", 1)
    );
    assert_eq!(cart.authorization_policies[0].to_string(), "shop/only-web");
    let key = "shop/cart.shop.svc.cluster.local".parse().unwrap();
    assert_eq!(cart.services[&key], [(8080, 80)].into());
    assert!(web.services.is_empty());

    let service = &state.services[0];
    assert_eq!(service.key, key);
    assert_eq!(service.vips, ["/10.60.0.5".parse().unwrap()]);
    assert_eq!(service.ports, [(8080, 80)].into());
    assert_eq!(
        service.load_balancer.routing_preferences,
        [RoutingScope::Zone]
    );
    assert_eq!(service.load_balancer.mode, LoadBalancerMode::Failover);

    let policy = &state.policies[0];
    assert_eq!(policy.key.to_string(), "shop/only-web");
    assert_eq!(
        (policy.scope, policy.action),
        (Scope::WorkloadSelector, Action::Allow)
    );
    let wanted = &policy.rules[0].clauses[0].matches[0];
    assert_eq!(&*wanted.service_accounts[0].service_account, "web");
    assert_eq!(wanted.destination_ports, [80]);
    assert!(state.pods.is_empty());
}

#[test]
fn every_key_of_a_workload_is_read() {
    let state = read(
        r"
workloads:
- workloadIps: [10.0.0.1, '::ffff:10.0.0.2', 'fd00::1']
  namespace: shop
  services: {}
  uid: u
  name: n
  trustDomain: td
  serviceAccount: sa
  network: net
  workloadName: wn
  workloadType: Deployment
  canonicalName: cn
  canonicalRevision: cr
  hostname: h.example
  node: node
  clusterId: c
  protocol: TCP
  networkMode: HostNetwork
  waypoint: {destination: net/10.0.0.9, hboneMtlsPort: 15008}
  networkGateway: {destination: gw/gw.example, hboneMtlsPort: 15009}
  nativeTunnel: true
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: [a/b]
  status: Unhealthy
  locality: {region: r, zone: z, subzone: s}
  capacity: 7
",
    )
    .unwrap();
    let workload = &state.workloads[0];
    let ips: Vec<_> = workload.ips.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["10.0.0.1", "10.0.0.2", "fd00::1"]);
    let texts = [
        &workload.uid.0,
        &workload.name,
        &workload.network,
        &workload.workload_name,
        &workload.workload_type,
        &workload.canonical_name,
        &workload.canonical_revision,
        &workload.hostname,
        &workload.node,
        &workload.cluster_id,
        &workload.locality.region,
        &workload.locality.zone,
        &workload.locality.subzone,
    ];
    assert_eq!(
        texts.map(|text| &**text).join(" "),
        "u n net wn deployment cn cr h.example node c r z s"
    );
    assert_eq!(
        workload.identity.as_ref().unwrap().to_string(),
        "spiffe://td/ns/shop/sa/sa"
    );
    assert_eq!(workload.protocol, Protocol::Tcp);
    assert_eq!(workload.network_mode, NetworkMode::HostNetwork);
    assert_eq!(workload.health, Health::Unhealthy);
    assert_eq!(workload.capacity, 7);
    assert!(workload.native_tunnel);
    let tunnel = workload.application_tunnel.unwrap();
    assert_eq!(
        (tunnel.protocol, tunnel.port),
        (AppProtocol::Proxy, Some(15088))
    );
    let waypoint = workload.waypoint.as_ref().unwrap();
    let address = "net/10.0.0.9".parse().unwrap();
    assert_eq!(waypoint.destination, GatewayDestination::Address(address));
    let gateway = workload.network_gateway.as_ref().unwrap();
    let hostname = "gw/gw.example".parse().unwrap();
    assert_eq!(gateway.destination, GatewayDestination::Hostname(hostname));
    assert_eq!(gateway.hbone_mtls_port, 15009);
}

#[test]
fn every_key_of_a_service_is_read() {
    let state = read(
        r"
services:
- name: cart
  namespace: shop
  hostname: cart.shop
  vips: [/10.0.0.1, 'net/fd00::1']
  ports: {80: 0, 443: 8443}
  cidrVips: [/10.1.0.0/16, 'net/fd01::/16']
  subjectAltNames: [spiffe://td/ns/a/sa/b]
  waypoint: {destination: ns/wp, hboneMtlsPort: 15008}
  weightedWaypoints:
  - {destination: {destination: ns/other, hboneMtlsPort: 15008}, weight: 3}
  loadBalancer:
    routingPreferences: [Region, Zone, Subzone, Node, Cluster, Network]
    mode: Strict
    healthPolicy: AllowAll
  ipFamilies: IPv6
  canonical: true
  visibility: Namespace
  endpoints: {}
",
    )
    .unwrap();
    let service = &state.services[0];
    assert_eq!(service.vips.len(), 2);
    assert_eq!(service.ports, [(80, 0), (443, 8443)].into());
    assert_eq!(
        service.cidr_vips,
        [
            ("".into(), "10.1.0.0/16".parse().unwrap()),
            ("net".into(), "fd01::/16".parse().unwrap())
        ]
    );
    assert_eq!(&*service.subject_alt_names[0], "spiffe://td/ns/a/sa/b");
    assert!(service.waypoint.is_some());
    assert_eq!(service.weighted_waypoints[0].weight, 3);
    assert_eq!(service.load_balancer.routing_preferences.len(), 6);
    assert_eq!(service.load_balancer.health_policy, HealthPolicy::AllowAll);
    assert_eq!(service.ip_families, Some(IpFamilies::Ipv6Only));
    assert!(service.canonical);
    assert_eq!(service.visibility, Visibility::Namespace);
}

#[test]
fn every_key_of_a_policy_is_read() {
    let state = read(
        r"
policies:
- name: p
  namespace: shop
  scope: Global
  action: Deny
  dryRun: true
  rules:
  - - - namespaces: [Exact: a, Prefix: b, Suffix: c, Presence: []]
        notNamespaces: [Exact: a]
        principals: [Exact: a]
        notPrincipals: [{Presence: []}]
        serviceAccounts: [{namespace: a, serviceAccount: b}]
        notServiceAccounts: [{namespace: a, serviceAccount: b}]
        sourceIps: [10.0.0.0/8, '::ffff:10.1.0.0/112']
        notSourceIps: [10.0.0.0/8]
        destinationIps: [10.0.0.0/8]
        notDestinationIps: [10.0.0.0/8]
        destinationPorts: [1, 65535]
        notDestinationPorts: [80]
      - {}
    - []
  - []
",
    )
    .unwrap();
    let policy = &state.policies[0];
    assert_eq!(
        (policy.scope, policy.action, policy.dry_run),
        (Scope::Global, Action::Deny, true)
    );
    let [rule, empty_rule] = &policy.rules[..] else {
        panic!("two rules")
    };
    assert!(empty_rule.clauses.is_empty());
    let [clause, empty_clause] = &rule.clauses[..] else {
        panic!("two clauses")
    };
    assert!(empty_clause.matches.is_empty());
    let [full, empty] = &clause.matches[..] else {
        panic!("two matches")
    };
    assert_eq!(*empty, crate::model::Match::default());
    assert_eq!(
        full.namespaces,
        [
            StringMatch::Exact("a".into()),
            StringMatch::Prefix("b".into()),
            StringMatch::Suffix("c".into()),
            StringMatch::Presence,
        ]
    );
    let nets: Vec<_> = full.source_ips.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.0.0.0/8", "10.1.0.0/16"]);
    assert_eq!(full.destination_ports, [1, 65535]);
    for length in [
        full.not_namespaces.len(),
        full.principals.len(),
        full.not_principals.len(),
        full.service_accounts.len(),
        full.not_service_accounts.len(),
        full.not_source_ips.len(),
        full.destination_ips.len(),
        full.not_destination_ips.len(),
        full.not_destination_ports.len(),
    ] {
        assert_eq!(length, 1);
    }
}

#[test]
fn pods_are_read_and_what_is_not_told_has_a_default() {
    let state = read(
        r"
workloads:
- {name: web-1, namespace: shop, workloadIps: [], services: {}}
pods:
- name: web-1
  namespace: shop
  netns: /run/netns/web-1
- name: cart-1
  namespace: shop
  serviceAccount: cart
  netns: /run/netns/cart-1
  excludeOutboundPorts: [53]
  excludeOutboundCidrs: [169.254.0.0/16]
  excludeInboundPorts: [9100]
  excludeInboundCidrs: [10.9.0.0/16, 'fd09::/16']
  probeSources: [{address: 10.0.0.1, ports: [8080]}, {address: 'fd00::1', ports: [80, 81]}]
  dnsCapture: false
",
    )
    .unwrap();
    let workload = &state.workloads[0];
    assert_eq!(workload.uid.to_string(), "file/shop/web-1");
    assert_eq!(
        workload.identity.as_ref().unwrap().to_string(),
        "spiffe://cluster.local/ns/shop/sa/default"
    );
    assert_eq!(workload.protocol, Protocol::Tcp);
    assert_eq!(workload.health, Health::Healthy);
    let [web, cart] = &state.pods[..] else {
        panic!("two pods")
    };
    assert_eq!(
        workload.pod().as_ref(),
        Some(&web.pod),
        "the pod finds its workload"
    );
    assert_eq!(web.netns, Path::new("/run/netns/web-1"));
    assert!(web.exclude_outbound_ports.is_empty());
    assert!(web.dns_capture, "unless it says otherwise");
    assert_eq!(&*cart.pod.service_account, "cart");
    assert_eq!(cart.exclude_outbound_ports, [53]);
    assert_eq!(
        cart.exclude_outbound_cidrs,
        ["169.254.0.0/16".parse().unwrap()]
    );
    assert_eq!(cart.exclude_inbound_ports, [9100]);
    let sources = cart.probe_sources.iter();
    let sources: Vec<_> = sources
        .map(|source| (source.address.to_string(), source.ports.clone()))
        .collect();
    let listed = [("10.0.0.1", vec![8080]), ("fd00::1", vec![80, 81])];
    assert_eq!(sources, listed.map(|(ip, ports)| (ip.to_owned(), ports)));
    assert!(web.probe_sources.is_empty());
    assert_eq!(
        cart.exclude_inbound_cidrs,
        ["10.9.0.0/16", "fd09::/16"].map(|net| net.parse().unwrap())
    );
    assert!(!cart.dns_capture);
}

#[test]
fn a_file_without_content_is_refused_but_an_empty_mesh_is_not() {
    for text in [
        "",
        "\n",
        "# nothing\n",
        "---\n",
        "--- # x\n...\n",
        "~",
        "null\n",
    ] {
        assert!(
            matches!(parse(Path::new("f"), text), Err(Error::Empty { .. })),
            "{text:?}"
        );
    }
    assert_eq!(
        read("").unwrap_err(),
        "mesh.yaml: empty file; write {} if nothing is meant"
    );
    assert_eq!(read("{}"), Ok(State::default()));
    assert_eq!(read("workloads: []\n"), Ok(State::default()));
}

#[test]
fn a_file_beyond_the_limit_is_refused_before_it_is_parsed() {
    let text = "[".repeat(usize::try_from(MAX_FILE_BYTES).unwrap() + 1);
    let error = parse(Path::new("f"), &text).unwrap_err();
    assert_eq!(error.to_string(), "f: more than 67108864 bytes");
}

/// A workload on lines 1 to 4 with one more key on line 5.
fn workload(key: &str) -> String {
    format!("workloads:\n- namespace: shop\n  services: {{}}\n  name: a\n  {key}\n")
}

fn service(key: &str) -> String {
    format!("services:\n- {{name: a, namespace: b}}\n- name: cart\n  {key}\n")
}

#[test]
fn text_that_is_no_such_document_is_refused_with_its_place() {
    for (text, want) in [
        (
            "workloads: [",
            "mesh.yaml:1:12: workloads: unclosed bracket",
        ),
        ("hello", "mesh.yaml:1:1: expected mapping"),
        ("- a", "mesh.yaml:1:1: expected mapping"),
        (
            "workloads: 5",
            "mesh.yaml:1:12: workloads: expected sequence",
        ),
        (
            "workload: []",
            "mesh.yaml:1:1: workload: unknown field `workload`",
        ),
        (
            "workloads: []\nworkloads: []",
            "mesh.yaml:2:1: duplicate mapping key: workloads",
        ),
        (
            "workloads: [x]",
            "mesh.yaml:1:13: workloads[0]: expected mapping",
        ),
        (
            "{}\n---\n{}\n",
            "mesh.yaml:3:1: only single YAML document expected",
        ),
        ("a: \u{0}", "mesh.yaml:1:"),
        ("pods: []\n bad", "mesh.yaml:2:"),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.starts_with(want), "{text:?}: {error}");
        assert!(
            !error.contains("from_str") && !error.contains("Options"),
            "{error}"
        );
    }
}

#[test]
fn values_that_are_none_are_refused_with_line_field_and_reason() {
    for (text, want) in [
        (
            workload("workloadIps: [10.0.0.1, \"10.0.0\"]"),
            "5:27: workloads[0].workloadIps[1]: \"10.0.0\" is not an IP address",
        ),
        (
            workload("workloadIps: 10.0.0.1"),
            "5:16: workloads[0].workloadIps: expected sequence start",
        ),
        (
            workload("workloadips: []"),
            "5:3: workloads[0].workloadips: unknown field",
        ),
        (
            workload("name: b"),
            "5:3: workloads[0]: duplicate mapping key: name",
        ),
        (
            workload("protocol: hbone"),
            "5:13: workloads[0].protocol: \"hbone\" is none of HBONE, TCP",
        ),
        (
            workload("networkMode: Host"),
            "5:16: workloads[0].networkMode: \"Host\" is none of",
        ),
        (
            workload("status: Sick"),
            "5:11: workloads[0].status: \"Sick\" is none of",
        ),
        (workload("capacity: -1"), "5:13: workloads[0].capacity: "),
        (
            workload("capacity: 4294967296"),
            "5:13: workloads[0].capacity: ",
        ),
        (
            workload("nativeTunnel: yes"),
            "5:17: workloads[0].nativeTunnel: ",
        ),
        (
            workload("authorizationPolicies: [only-web]"),
            "5:27: workloads[0].authorizationPolicies[0]: \"only-web\" is not of the form \
             namespace/name",
        ),
        (
            workload("waypoint: {destination: x, hboneMtlsPort: 1}"),
            "5:27: workloads[0].waypoint.destination: \"x\" is neither",
        ),
        (
            workload("waypoint: {destination: a/b, hboneMtlsPort: 0}"),
            "5:47: workloads[0].waypoint.hboneMtlsPort: \"0\" is not a port",
        ),
        (
            workload("waypoint: {destination: a/b}"),
            "5:14: workloads[0].waypoint: missing field `hboneMtlsPort`",
        ),
        (
            workload("locality: {country: x}"),
            "5:14: workloads[0].locality.country: unknown field `country`",
        ),
        (
            workload("workloadIps: []\n  trustDomain: a/b"),
            "2:3: workloads[0].trustDomain: trust domain has a character",
        ),
        (
            workload("workloadIps: []\n  serviceAccount: ä"),
            "2:3: workloads[0].serviceAccount: service account has a character",
        ),
    ] {
        let error = read(&text).unwrap_err();
        let error = error.strip_prefix("mesh.yaml:").unwrap();
        assert!(error.starts_with(want), "{text}: {error}");
    }
}

#[test]
fn ports_and_lengths_out_of_range_are_refused_and_never_wrapped() {
    for port in [
        "0",
        "65536",
        "-1",
        "99999999999",
        "1.5",
        "0x50",
        "080",
        "http",
        "''",
    ] {
        let ports = service(&format!("ports: {{{port}: 80}}"));
        let error = read(&ports).unwrap_err();
        assert!(
            error.contains("is not a port") || error.contains("missing field"),
            "{error}"
        );
        let text = format!(
            "policies:\n- {{name: p, namespace: n, scope: Global, action: Deny, dryRun: false,\n   \
             rules: [[[destinationPorts: [{port}]]]]}}\n"
        );
        let error = read(&text).unwrap_err();
        assert!(
            error.starts_with("mesh.yaml:3:") && error.contains("is not a port from 1 to 65535"),
            "{port}: {error}"
        );
        assert!(
            error.contains("policies[0].rules[0][0][0].destinationPorts[0]"),
            "{error}"
        );
    }
    for net in [
        "10.0.0.0/33",
        "fd00::/129",
        "10.0.0.0/-1",
        "10.0.0.1",
        "10.0.0.0/264",
        "x/8",
    ] {
        let text = format!(
            "pods:\n- {{name: a, namespace: b, netns: /x, excludeOutboundCidrs: ['{net}']}}\n"
        );
        let error = read(&text).unwrap_err();
        assert!(error.contains("pods[0].excludeOutboundCidrs[0]"), "{error}");
        assert!(error.contains("is not a CIDR"), "{error}");
    }
}

#[test]
fn missing_keys_are_named() {
    for (text, want) in [
        (
            "workloads: [{namespace: a, services: {}}]",
            "missing field `workloadIps`",
        ),
        (
            "workloads: [{workloadIps: [], services: {}}]",
            "missing field `namespace`",
        ),
        (
            "workloads: [{workloadIps: [], namespace: a}]",
            "missing field `services`",
        ),
        ("services: [{}]", "missing field `name`"),
        ("policies: [{name: a}]", "missing field `namespace`"),
        (
            "policies: [{name: a, namespace: b, scope: Global, action: Allow}]",
            "missing field `rules`",
        ),
        ("pods: [{name: a, namespace: b}]", "missing field `netns`"),
        (
            "pods: [{name: a, namespace: b, netns: /x, probeSources: [{address: 10.0.0.1}]}]",
            "missing field `ports`",
        ),
        (
            "pods: [{name: a, namespace: b, netns: /x, probeSources: [{address: 10.0.0.1, ports: []}]}]",
            "pods[0].probeSources: no port may be asked from 10.0.0.1",
        ),
        (
            "pods: [{name: a, namespace: b, netns: /x, probeSources: [{address: '::', ports: [1]}]}]",
            "pods[0].probeSources: nobody asks a pod from ::",
        ),
        (
            "pods: [{name: '', namespace: b, netns: /x}]",
            "a name cannot be empty",
        ),
        (
            "workloads: [{workloadIps: [], namespace: a, services: {}}]",
            "workloads[0].uid: neither uid nor name is given",
        ),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.contains(want), "{text}: {error}");
    }
}

#[test]
fn what_only_one_may_have_is_refused_the_second_time_and_both_are_named() {
    let workload = |uid: &str, network: &str, ip: &str| {
        format!(
            "- {{uid: {uid}, network: {network}, workloadIps: ['{ip}'], namespace: a, services: {{}}}}\n"
        )
    };
    let service = "- {name: s, namespace: a, hostname: s.a, vips: [], ports: {}}\n";
    let policy =
        "- {name: p, namespace: a, scope: Global, action: Allow, dryRun: false, rules: []}\n";
    let pod =
        |name: &str, netns: &str| format!("- {{name: {name}, namespace: a, netns: {netns}}}\n");
    for (text, want) in [
        (
            format!(
                "workloads:\n{}{}",
                workload("u", "n", "10.0.0.1"),
                workload("u", "n", "10.0.0.2")
            ),
            "3:3: workloads[1].uid: uid u is already that of workloads[0] in line 2",
        ),
        (
            format!(
                "workloads:\n{}{}",
                workload("u", "n", "10.0.0.1"),
                workload("v", "n", "::ffff:10.0.0.1")
            ),
            "3:38: workloads[1].workloadIps[0]: address n/10.0.0.1 is already that of workloads[0] \
             in line 2",
        ),
        (
            format!("services:\n{service}{service}"),
            "3:3: services[1].hostname: service a/s.a is already that of services[0] in line 2",
        ),
        (
            format!("policies:\n{policy}{policy}"),
            "3:3: policies[1].name: policy a/p is already that of policies[0] in line 2",
        ),
        (
            format!("pods:\n{}{}", pod("p", "/x"), pod("p", "/y")),
            "3:3: pods[1].name: pod a/p is already that of pods[0] in line 2",
        ),
        (
            format!("pods:\n{}{}", pod("p", "/x"), pod("q", "/x")),
            "3:3: pods[1].netns: network namespace /x is already that of pods[0] in line 2",
        ),
    ] {
        assert_eq!(read(&text).unwrap_err(), format!("mesh.yaml:{want}"));
    }
    let other_network = workload("v", "m", "10.0.0.1");
    let host = "- {uid: w, network: n, workloadIps: [10.0.0.1], namespace: a, services: {}, \
                networkMode: HostNetwork}\n";
    let fine = format!(
        "workloads:\n{}{other_network}{host}",
        workload("u", "n", "10.0.0.1")
    );
    assert_eq!(
        read(&fine).unwrap().workloads.len(),
        3,
        "another network, the host's address"
    );
}

#[test]
fn a_service_does_not_list_endpoints_and_may_be_unknown_to_workloads() {
    let error = read(
        "services: [{name: a, namespace: b, hostname: c, vips: [], ports: {}, endpoints: {x: 1}}]",
    )
    .unwrap_err();
    assert!(
        error.contains("services[0].endpoints: endpoints are"),
        "{error}"
    );
    let staged = "workloads: [{name: a, namespace: b, workloadIps: [], services: {c/d: {80: 80}}}]";
    assert!(read(staged).is_ok());
}

#[test]
fn aliases_and_merges_work_and_bombs_do_not() {
    let text = "
workloads:
- &base {name: a, namespace: shop, workloadIps: [], services: {}, node: n1}
- {<<: *base, name: b}
";
    let state = read(text).unwrap();
    assert_eq!(&*state.workloads[1].node, "n1");
    let mut bomb = "services:\n- name: a\n  endpoints:\n    a0: &a0 [x]\n".to_owned();
    for i in 1..40 {
        let last = i - 1;
        bomb.push_str(&format!(
            "    a{i}: &a{i} [*a{last}, *a{last}, *a{last}, *a{last}]\n"
        ));
    }
    let error = read(&bomb).unwrap_err();
    assert!(error.contains("services[0].endpoints.a"), "{error}");
    let deep = format!("workloads: {}", "[".repeat(100_000));
    assert!(read(&deep).is_err());
}

#[test]
fn a_mesh_beyond_the_parsers_own_limits_loads() {
    let mut text = String::from("workloads:\n");
    for i in 0..25_000_u32 {
        let [_, a, b, c] = i.to_be_bytes();
        text.push_str(&format!(
            "- name: w{i}\n  namespace: shop\n  workloadIps: [10.{a}.{b}.{c}]\n  protocol: HBONE\n  \
             services: {{shop/cart.shop: {{80: 8080}}}}\n"
        ));
    }
    assert_eq!(read(&text).unwrap().workloads.len(), 25_000);
}
