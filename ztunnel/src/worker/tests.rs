//! What a worker says when it cannot do its work.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;

use super::*;
use crate::testing::{Pod, own_ip, worker, workload, world};

fn accepting() -> (Accepting, mpsc::Receiver<Unserved>) {
    let (unserved, told) = mpsc::channel(1);
    let names = dns::Params {
        cluster_domain: "cluster.local".into(),
        ipv6: true,
        preferred_namespace: None,
    };
    let accepting = Accepting {
        descriptors: Descriptors::default(),
        warned: Rc::default(),
        unserved,
        dns: dns::Server::new(names, dns::Tally::default()),
    };
    (accepting, told)
}

#[tokio::test]
async fn a_listener_that_cannot_be_served_is_told_and_not_left_alone() {
    worker(async {
        let pod = Pod::new(world(vec![workload("bank", own_ip())], vec![], vec![]));
        let (accepting, mut told) = accepting();
        // The kernel waits for no regular file.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("Cargo.toml");
        let listener = std::net::TcpListener::from(OwnedFd::from(file.unwrap()));
        let id = PodId::default();
        let serve = async |_, _| panic!("nothing can arrive");
        accept(
            (id, (listener, Arrival::Steered), accepting),
            Rc::clone(&pod.cx),
            serve,
        )
        .await;
        let unserved = told.recv().await.unwrap();
        assert_eq!(unserved.id, id);
        assert_eq!(unserved.error.raw_os_error(), Some(libc::EPERM));
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_ends_without_being_told_is_noticed() {
    let (orders, inbox) = mpsc::channel(1);
    let thread = std::thread::spawn(move || {
        drop(inbox);
    });
    Worker { orders, thread }.ended().await;
}
