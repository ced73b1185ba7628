//! Meshes for tests of this room. Takes names and addresses, gives workloads, services and the
//! routes through them; never compiled into the product.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::{
    GatewayAddress, LoadBalancer, NamespacedHostname, OrigDst, Service, UpstreamAddr, Visibility,
    Workload, WorkloadUid, testing,
};

use super::{Error, Found, Query, Route, Snapshot, route};

/// A workload of `shop` whose service account has its name.
pub(super) fn workload(name: &str, ip: &str) -> Workload {
    Workload {
        uid: WorkloadUid(name.into()),
        name: name.into(),
        identity: Workload::identity_of("cluster.local", "shop", name).unwrap(),
        ips: vec![ip.parse().unwrap()],
        ..testing::workload("shop")
    }
}

/// One that serves `shop/cart.shop`.
pub(super) fn endpoint(name: &str, ip: &str, ports: &[(u16, u16)]) -> Workload {
    endpoint_of("cart", name, ip, ports)
}

/// One that serves `shop/<service>.shop`.
pub(super) fn endpoint_of(service: &str, name: &str, ip: &str, ports: &[(u16, u16)]) -> Workload {
    let mut workload = workload(name, ip);
    workload
        .services
        .insert(key(service), ports.iter().copied().collect());
    workload
}

pub(super) fn key(name: &str) -> NamespacedHostname {
    format!("shop/{name}.shop").parse().unwrap()
}

pub(super) fn service(name: &str, vip: &str, ports: &[(u16, u16)]) -> Service {
    Service {
        name: name.into(),
        key: key(name),
        vips: vec![vip.parse().unwrap()],
        cidr_vips: Vec::new(),
        ports: ports.iter().copied().collect(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: LoadBalancer::default(),
        ip_families: None,
        canonical: false,
        visibility: Visibility::Public,
    }
}

/// A waypoint or gateway: `network/ip` or `namespace/hostname`, and its port.
pub(super) fn gateway(destination: &str, port: u16) -> GatewayAddress {
    use crate::model::GatewayDestination::{Address, Hostname};
    let destination = destination
        .parse()
        .map_or_else(|_| Hostname(destination.parse().unwrap()), Address);
    GatewayAddress {
        destination,
        hbone_mtls_port: port,
    }
}

pub(super) fn snapshot(workloads: Vec<Workload>, services: Vec<Service>) -> Snapshot {
    Snapshot::new(
        "".into(),
        workloads.into_iter().map(Arc::new),
        services.into_iter().map(Arc::new),
    )
}

/// What the pod `web` at 10.0.0.1 asks.
pub(super) fn dial(snapshot: &Snapshot, destination: &str) -> Result<Route, Error> {
    dial_with(snapshot, destination, 0)
}

pub(super) fn dial_with(snapshot: &Snapshot, destination: &str, dice: u64) -> Result<Route, Error> {
    let source = workload("web", "10.0.0.1");
    dial_from(snapshot, &source, destination, dice)
}

pub(super) fn dial_from(
    snapshot: &Snapshot,
    source: &Workload,
    destination: &str,
    dice: u64,
) -> Result<Route, Error> {
    match route(snapshot, &query(source, destination, dice))? {
        Found::Route(route) => Ok(route),
        Found::Name(name) => panic!("a name: {name:?}"),
    }
}

pub(super) fn query<'a>(source: &'a Workload, destination: &str, dice: u64) -> Query<'a> {
    Query {
        source,
        from: source.ips.first().copied().unwrap(),
        destination: OrigDst::new(destination.parse().unwrap()),
        avoid: &[],
        dice,
    }
}

pub(super) fn upstream(addr: &str) -> UpstreamAddr {
    UpstreamAddr::new(addr.parse().unwrap())
}

pub(super) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
