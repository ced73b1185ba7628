//! The dump of a mesh that a local file describes, key by key as the tools read it.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::account::{Learned, Opening};
use crate::control::parse;
use crate::identity::testing::{Authority, id, store};
use crate::model::{ClientAddr, OrigDst, SecurityPolicy, UpstreamAddr, WorkloadUid};

// The example of the established proxy's documentation; B114.
const MESH: &str = r#"
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
      "shop/late.shop.svc.cluster.local":
        1: 2
  - uid: demo/pod/shop/web-1
    name: web-1
    namespace: shop
    serviceAccount: web
    workloadIps: ["10.50.0.12", "fd00::12"]
    waypoint: {destination: "/10.60.0.9", hboneMtlsPort: 15008}
    locality: {region: r, zone: z}
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
            notPrincipals: [{Presence: []}, {Prefix: "a"}]
            destinationPorts: [80]
"#;

fn sources() -> (Sources, World) {
    let state = parse(Path::new("mesh"), MESH).unwrap();
    let world = World::default().next("".into(), state.workloads, state.services, state.policies);
    let pods: Arc<[PodStatus]> = [
        ("uid-1", "cart-1", "cart", true),
        ("uid-2", "x", "x", false),
    ]
    .map(|(uid, name, account, up)| PodStatus {
        uid: PodUid(uid.into()),
        pod: PodRef {
            name: name.into(),
            namespace: "shop".into(),
            service_account: account.into(),
        },
        up,
    })
    .into();
    let sources = Sources {
        world: watch::channel(world.clone()).1,
        pods: watch::channel(pods).1,
        store: store(Authority::new()),
        accounts: Accounts::new(2),
        config: json!({"capture": "ebpf"}),
        istio_version: "1.30".into(),
    };
    (sources, world)
}

fn dumped(sources: &Sources) -> Value {
    serde_json::from_slice(&sources.dump().unwrap()).unwrap()
}

// B120.
#[test]
fn the_documented_example_is_dumped_under_the_keys_of_the_established_proxy() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _in = runtime.enter();
    let (sources, _) = sources();
    let dump = dumped(&sources);
    let keys: Vec<_> = dump
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut want = vec![
        "workloads",
        "services",
        "policies",
        "stagedServices",
        "staticConfig",
        "version",
        "config",
        "certificates",
        "workloadState",
    ];
    want.sort_unstable();
    assert_eq!(keys, want);
    assert_eq!(
        dump["workloads"][0],
        json!({
            "workloadIps": ["10.50.0.11"], "protocol": "HBONE", "uid": "demo/pod/shop/cart-1",
            "name": "cart-1", "namespace": "shop", "trustDomain": "cluster.local",
            "serviceAccount": "cart", "workloadName": "", "workloadType": "", "canonicalName": "",
            "canonicalRevision": "", "node": "n1", "authorizationPolicies": ["shop/only-web"],
            "status": "Healthy", "clusterId": "", "capacity": 1,
            "services": {
                "shop/cart.shop.svc.cluster.local": {"8080": 80},
                "shop/late.shop.svc.cluster.local": {"1": 2},
            },
        })
    );
    let web = &dump["workloads"][1];
    assert_eq!(
        web["waypoint"],
        json!({"destination": "/10.60.0.9", "hboneMtlsPort": 15008})
    );
    assert_eq!(
        web["locality"],
        json!({"region": "r", "zone": "z", "subzone": ""})
    );
    assert_eq!(
        (&web["protocol"], &web["trustDomain"]),
        (&json!("TCP"), &json!("cluster.local"))
    );
}

#[test]
fn services_policies_and_what_waits_for_its_service_are_dumped_likewise() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _in = runtime.enter();
    let (sources, _) = sources();
    let dump = dumped(&sources);
    assert_eq!(
        dump["services"],
        json!([{
            "name": "cart", "namespace": "shop", "hostname": "cart.shop.svc.cluster.local",
            "vips": ["/10.60.0.5"], "ports": {"8080": 80},
            "endpoints": {"demo/pod/shop/cart-1": {
                "workloadUid": "demo/pod/shop/cart-1", "port": {"8080": 80}, "status": "Healthy",
            }},
            "loadBalancer": {
                "routingPreferences": ["Zone"], "mode": "Failover", "healthPolicy": "OnlyHealthy",
            },
            "canonical": false, "visibility": "Public",
        }])
    );
    assert_eq!(
        dump["policies"],
        json!([{
            "name": "only-web", "namespace": "shop", "scope": "WorkloadSelector", "action": "Allow",
            "rules": [[[{
                "serviceAccounts": [{"namespace": "shop", "serviceAccount": "web"}],
                "notPrincipals": [{"Presence": []}, {"Prefix": "a"}],
                "destinationPorts": [80],
            }]]],
            "dryRun": false,
        }])
    );
    assert_eq!(
        dump["stagedServices"]["shop/late.shop.svc.cluster.local"]["demo/pod/shop/cart-1"]["port"],
        json!({"1": 2})
    );
    assert_eq!(
        dump["staticConfig"],
        json!({"workloads": [], "services": [], "policies": []})
    );
    assert_eq!(dump["version"]["istioVersion"], "1.30");
    assert_eq!(dump["config"]["capture"], "ebpf");
}

fn opening(direction: Direction, source: &str, destination: &str) -> Opening {
    Opening {
        direction,
        source: ClientAddr::new(source.parse().unwrap()),
        destination: OrigDst::new(destination.parse().unwrap()),
        trace_id: 1,
    }
}

fn learned(
    (source, destination): (Option<Arc<Workload>>, Option<Arc<Workload>>),
    dst_addr: &str,
    hbone_addr: Option<&str>,
    service: Option<Arc<Service>>,
) -> Learned {
    let security = hbone_addr.map_or(SecurityPolicy::Unknown, |_| SecurityPolicy::MutualTls);
    Learned {
        source,
        source_identity: None,
        destination,
        destination_identity: None,
        service,
        dst_addr: UpstreamAddr::new(dst_addr.parse().unwrap()),
        hbone_addr: hbone_addr.map(str::to_owned),
        security,
    }
}

// B084.
#[test]
fn open_connections_are_listed_under_their_pod_until_they_end() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _in = runtime.enter();
    let (sources, world) = sources();
    let workload = |uid: &str| world.snapshot.workload(&WorkloadUid(uid.into())).cloned();
    let (cart, web) = (
        workload("demo/pod/shop/cart-1"),
        workload("demo/pod/shop/web-1"),
    );
    let service = world.snapshot.services().next().cloned();
    let book = sources.accounts.book(1);
    let open = |direction, source, destination| book.open(opening(direction, source, destination));
    let out = open(Direction::Outbound, "10.50.0.11:4000", "10.60.0.9:80");
    assert_eq!(
        dumped(&sources)["workloadState"]["uid-1"]["connections"]["outbound"],
        json!([])
    );
    let to = Some("10.50.0.12:80");
    out.learn(learned(
        (cart.clone(), web.clone()),
        "10.50.0.12:15008",
        to,
        None,
    ));
    let inbound = open(Direction::Inbound, "10.50.0.12:5000", "10.50.0.11:15008");
    let app = Some("10.50.0.11:80");
    inbound.learn(learned(
        (web, cart.clone()),
        "10.50.0.11:15008",
        app,
        service,
    ));
    let plain = open(Direction::Inbound, "192.0.2.1:6000", "10.50.0.11:80");
    plain.learn(learned((None, cart.clone()), "10.50.0.11:80", None, None));
    let near = open(Direction::Inbound, "10.50.0.13:7000", "10.50.0.11:80");
    near.learn(Learned {
        security: SecurityPolicy::NodeLocal,
        ..learned((None, cart), "10.50.0.11:80", app, None)
    });
    assert_eq!(
        dumped(&sources)["workloadState"],
        json!({
            "uid-1": {
                "state": "Up",
                "connections": {
                    "inbound": [
                        {
                            "src": "10.50.0.12:5000", "actualDst": "10.50.0.11:80",
                            "originalDst": "cart.shop.svc.cluster.local", "protocol": "HBONE",
                        },
                        {
                            "src": "192.0.2.1:6000", "originalDst": null,
                            "actualDst": "10.50.0.11:80", "protocol": "TCP",
                        },
                        {
                            "src": "10.50.0.13:7000", "originalDst": null,
                            "actualDst": "10.50.0.11:80", "protocol": "TCP",
                        },
                    ],
                    "outbound": [{
                        "src": "10.50.0.11:4000", "originalDst": "10.60.0.9:80",
                        "actualDst": "10.50.0.12:15008", "protocol": "HBONE",
                    }],
                },
                "info": {"name": "cart-1", "namespace": "shop", "serviceAccount": "cart"},
            },
            "uid-2": {
                "state": "Pending",
                "info": {"name": "x", "namespace": "shop", "serviceAccount": "x"},
            },
        })
    );
    drop((out, inbound, plain, near));
    let connections = &dumped(&sources)["workloadState"]["uid-1"]["connections"];
    assert_eq!(*connections, json!({"inbound": [], "outbound": []}));
}

#[tokio::test]
async fn a_certificate_is_shown_with_its_chain_and_without_its_key() {
    let (sources, _) = sources();
    let credentials = sources.store.get(&id("cart")).await.unwrap();
    let dump = sources.dump().unwrap();
    let text = String::from_utf8(dump.clone()).unwrap();
    assert!(!text.contains("PRIVATE"));
    let dump: Value = serde_json::from_slice(&dump).unwrap();
    let shown = &dump["certificates"][0];
    assert_eq!(shown["identity"], id("cart").to_string());
    assert_eq!(shown["state"], "Available");
    assert_eq!(
        shown["certChain"].as_array().unwrap().len(),
        credentials.chain().len()
    );
    assert!(!shown["rootCerts"].as_array().unwrap().is_empty());
    let leaf = &shown["certChain"][0];
    let serial = leaf["serialNumber"].as_str().unwrap();
    assert!(serial.bytes().all(|b| b.is_ascii_digit()), "{serial}");
    let until = leaf["expirationTime"].as_str().unwrap();
    assert!(until.ends_with('Z') && until.contains('T'), "{until}");
    use base64::Engine as _;
    let pem = base64::engine::general_purpose::STANDARD
        .decode(leaf["pem"].as_str().unwrap())
        .unwrap();
    let pem = String::from_utf8(pem).unwrap();
    let (first, last) = (
        "-----BEGIN CERTIFICATE-----\n",
        "\n-----END CERTIFICATE-----\n",
    );
    let inner = pem
        .strip_prefix(first)
        .and_then(|rest| rest.strip_suffix(last));
    let inner: String = inner.unwrap().lines().collect();
    let der = base64::engine::general_purpose::STANDARD
        .decode(inner)
        .unwrap();
    assert_eq!(der, credentials.chain()[0].as_ref());
}
