//! A mesh of any size for the benches of pure rooms: takes how many of each, gives checked nouns with one service for
//! every ten workloads and one policy that admits one account each; the same call gives the same mesh.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::Arc,
};

use ztunnel::{
    control::{State, parse},
    model::{Policy, Workload, WorkloadUid},
};

/// Many workloads, made from one that the product itself has read.
pub(crate) fn workloads(count: u32) -> Vec<Arc<Workload>> {
    let state = example(1);
    let pattern = state.workloads.first().expect("the example has a workload");
    (0..count)
        .map(|number| {
            let mut workload = Workload::clone(pattern);
            workload.uid = WorkloadUid(format!("demo//Pod/shop/web-{number}").into());
            workload.name = format!("web-{number}").into();
            workload.ips = vec![ip(number)];
            Arc::new(workload)
        })
        .collect()
}

/// Many policies, all of which speak for everybody.
pub(crate) fn policies(count: u32) -> Vec<Arc<Policy>> {
    example(count).policies
}

/// The address of a workload.
pub(crate) fn ip(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(0x0a00_0001 + number))
}

/// One workload, one service, and policies.
pub(crate) fn example(policies: u32) -> State {
    let mut text = String::from(
        "workloads:\n\
         - uid: demo//Pod/shop/web\n  \
         name: web\n  \
         namespace: shop\n  \
         serviceAccount: web\n  \
         workloadName: web\n  \
         canonicalName: web\n  \
         canonicalRevision: v1\n  \
         clusterId: demo\n  \
         trustDomain: cluster.local\n  \
         workloadIps: [\"10.0.0.1\"]\n  \
         protocol: HBONE\n  \
         node: a\n  \
         services:\n    \
         \"shop/web.shop.svc.cluster.local\": {80: 8080}\n\
         services:\n\
         - name: web\n  \
         namespace: shop\n  \
         hostname: web.shop.svc.cluster.local\n  \
         vips: [\"/10.96.0.1\"]\n  \
         ports: {80: 8080}\n\
         policies:\n",
    );
    for number in 0..policies {
        text.push_str(&format!(
            "- name: allow-{number}\n  \
             namespace: shop\n  \
             scope: Namespace\n  \
             action: Allow\n  \
             dryRun: false\n  \
             rules:\n  \
             - - - serviceAccounts: [{{namespace: shop, serviceAccount: client-{number}}}]\n"
        ));
    }
    text.push_str("pods: []\n");
    parse(Path::new("bench"), &text).expect("the example is a mesh")
}
