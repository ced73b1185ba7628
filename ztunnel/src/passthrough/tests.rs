//! Plaintext into a pod, as its client and the application see it.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::*;
use crate::authz::Probes;
use crate::model::{Action, Clause, Match, PodRef, Policy, ProbeSource, Rule, Scope, StringMatch};
use crate::testing::{Pod, own_ip, worker, workload, world};

/// Refuses whoever proves no identity, except on a port.
fn strict(exempt: u16) -> Policy {
    let clause = |matches| Clause {
        matches: vec![matches],
    };
    Policy {
        key: "shop/strict".parse().unwrap(),
        scope: Scope::Global,
        action: Action::Deny,
        dry_run: false,
        rules: vec![Rule {
            clauses: vec![
                clause(Match {
                    not_principals: vec![StringMatch::Presence],
                    ..Match::default()
                }),
                clause(Match {
                    not_destination_ports: vec![exempt],
                    ..Match::default()
                }),
            ],
        }],
    }
}

async fn dial(pod: &Pod, to: SocketAddr) -> TcpStream {
    let (client, captured) = pod.captured(to, 15006).await;
    let cx = Rc::clone(&pod.cx);
    tokio::task::spawn_local(async move { serve(Box::new(captured), &cx).await });
    client
}

async fn is_closed_without_a_byte(mut client: TcpStream) {
    let mut heard = Vec::new();
    drop(client.read_to_end(&mut heard).await);
    assert_eq!(heard, b"");
}

/// Behaviours 93, 94, 95 and 97.
#[tokio::test]
async fn strictness_refuses_plaintext_before_the_application_but_for_the_exempted_port() {
    worker(async {
        let ip = own_ip();
        let app = TcpListener::bind((ip, 0)).await.unwrap();
        let at = app.local_addr().unwrap();
        for (policies, admitted) in [
            (vec![], true),
            (vec![strict(1)], false),
            (vec![strict(at.port())], true),
        ] {
            let pod = Pod::new(world(vec![workload("bank", ip)], vec![], policies));
            let mut client = dial(&pod, at).await;
            if admitted {
                let (mut socket, _) = app.accept().await.unwrap();
                socket.write_all(b"banner").await.unwrap();
                let mut heard = [0; 6];
                client.read_exact(&mut heard).await.unwrap();
                assert_eq!(&heard, b"banner");
            } else {
                is_closed_without_a_byte(client).await;
                assert_eq!(pod.made.count(), 0, "nothing was dialled");
                let nobody = timeout(Duration::from_millis(200), app.accept()).await;
                assert!(nobody.is_err());
                assert_eq!(pod.ended(Direction::Inbound, Reason::PolicyDenied), 1);
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_probe_passes_policy_if_the_node_holds_its_other_end() {
    worker(async {
        let ip = own_ip();
        let app = TcpListener::bind((ip, 0)).await.unwrap();
        let at = app.local_addr().unwrap();
        let bank = PodRef {
            name: "bank".into(),
            namespace: "shop".into(),
            service_account: "bank".into(),
        };
        let source = ProbeSource {
            address: "127.0.0.1".parse().unwrap(),
            ports: vec![at.port()],
        };
        let probes = Arc::new(Probes::new([(&bank, &[source][..])], Vec::new()));
        for held in [true, false] {
            let strict = world(vec![workload("bank", ip)], vec![], vec![strict(1)]);
            let pod = Pod::new(strict.with_probes(&probes).unwrap());
            pod.made.node_holds.set(held);
            let mut client = dial(&pod, at).await;
            if held {
                let (mut socket, _) = app.accept().await.unwrap();
                socket.write_all(b"alive").await.unwrap();
                let mut heard = [0; 5];
                client.read_exact(&mut heard).await.unwrap();
                assert_eq!(&heard, b"alive");
            } else {
                is_closed_without_a_byte(client).await;
                assert_eq!(pod.made.count(), 0, "nothing was dialled");
                assert_eq!(pod.ended(Direction::Inbound, Reason::PolicyDenied), 1);
            }
            let probes = u64::from(held);
            assert_eq!(pod.routed(Direction::Inbound, "probe"), probes);
            assert_eq!(pod.routed(Direction::Inbound, "plaintext"), 1 - probes);
        }
    })
    .await;
}

/// Behaviour 96.
#[tokio::test]
async fn the_proxys_own_ports_are_nobodys_application() {
    worker(async {
        let ip = own_ip();
        let pod = Pod::new(world(vec![workload("bank", ip)], vec![], vec![]));
        for (count, port) in (1..).zip(OWN_PORTS) {
            is_closed_without_a_byte(dial(&pod, SocketAddr::new(ip, port)).await).await;
            assert_eq!(pod.made.count(), 0, "nothing was dialled");
            assert_eq!(pod.ended(Direction::Inbound, Reason::ForbiddenPort), count);
        }
    })
    .await;
}

/// What a connection holds while it is open, besides its sockets and its record.
#[tokio::test]
async fn a_connection_is_small() {
    worker(async {
        let pod = Pod::new(world(vec![], vec![], vec![]));
        let at = SocketAddr::new(own_ip(), 8080);
        let (_app, captured) = pod.captured(at, 15006).await;
        let bytes = size_of_val(&serve(Box::new(captured), &pod.cx));
        assert!(bytes <= 448, "{bytes} bytes");
    })
    .await;
}
