//! What connections to a pod meet: HBONE, plaintext under each verdict, and our own dial to the
//! application from the client's address.

use std::{
    io::{ErrorKind, Result},
    net::{IpAddr, TcpStream},
};

use ztunnel::capture::{PlaintextVerdict, PodSettings};

use crate::world::{
    Enrolled, PATIENCE, PEER4, PEER6, POD4, POD6, PORT, World, accept, address, at, idle, said,
    settings,
};

#[test]
fn hbone_reaches_its_listener_and_is_refused_without_one() {
    let world = World::new();
    let Enrolled {
        capture,
        pod,
        listeners,
    } = world.enrolled(&settings());
    for pod in [POD4, POD6] {
        let peer = dial(&world, pod, 15008);
        let ours = accept(&listeners.hbone);
        assert_eq!(ours.local_addr().unwrap().port(), 15008);
        drop(peer.unwrap());
    }
    drop((pod, listeners));
    for pod in [POD4, POD6] {
        assert_eq!(
            dial(&world, pod, 15008).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
    }
    let enrolled = Enrolled::new(capture, &world, &settings());
    assert_eq!(enrolled.lookups("hbone"), 2);
    assert_eq!(enrolled.lookups("hbone_no_listener"), 2);
}

#[test]
fn plaintext_follows_its_verdict_and_the_verdict_changes_live() {
    let world = World::new();
    let app = world.pod_server();
    let enrolled = world.enrolled(&with(PlaintextVerdict::Drop));
    for pod in [POD4, POD6] {
        let refused = dial(&world, pod, PORT).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(enrolled.lookups("plaintext_dropped"), 2);
    assert_eq!(app.served(), 0);

    enrolled.pod.update(&with(PlaintextVerdict::Proxy)).unwrap();
    for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
        let client = dial(&world, pod, PORT);
        let ours = accept(&enrolled.listeners.plaintext);
        let (local, source) = (ours.local_addr().unwrap(), ours.peer_addr().unwrap());
        assert_eq!(local.ip().to_canonical(), address(pod));
        assert_eq!(local.port(), PORT);
        assert_eq!(source.ip().to_canonical(), address(peer));
        drop(client.unwrap());
    }
    assert_eq!(enrolled.lookups("plaintext_proxied"), 2);
    assert_eq!(app.served(), 0);

    enrolled.pod.update(&with(PlaintextVerdict::Pass)).unwrap();
    for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
        assert_eq!(
            said(dial(&world, pod, PORT).unwrap()),
            format!("app {peer}")
        );
    }
    assert!(enrolled.lookups("plaintext_passed") >= 2);
    assert!(idle(&enrolled.listeners.plaintext));
}

#[test]
fn plaintext_for_a_worker_that_is_gone_is_refused() {
    let world = World::new();
    let app = world.pod_server();
    let Enrolled {
        capture,
        pod,
        listeners,
    } = world.enrolled(&with(PlaintextVerdict::Proxy));
    drop((pod, listeners));
    let refused = dial(&world, POD4, PORT).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(app.served(), 0);
    let enrolled = Enrolled::new(capture, &world, &settings());
    assert_eq!(enrolled.lookups("plaintext_no_listener"), 1);
}

#[test]
fn excluded_inbound_ports_reach_the_application_whatever_the_verdict() {
    let world = World::new();
    let _app = world.pod_server();
    let enrolled = world.enrolled(&PodSettings {
        excluded_inbound_ports: vec![PORT],
        ..with(PlaintextVerdict::Drop)
    });
    assert_eq!(
        said(dial(&world, POD4, PORT).unwrap()),
        format!("app {PEER4}")
    );
    assert_eq!(
        said(dial(&world, POD6, PORT).unwrap()),
        format!("app {PEER6}")
    );
    assert!(enrolled.lookups("excluded_port") >= 2);
}

#[test]
fn excluded_sources_reach_the_application_and_judged_ones_the_judge() {
    let world = World::new();
    let app = world.pod_server();
    let sources = |excluded: [&str; 2], judged: [&str; 2]| PodSettings {
        excluded_inbound_cidrs: excluded.map(|network| network.parse().unwrap()).into(),
        judged_sources: judged.map(address).into(),
        ..with(PlaintextVerdict::Drop)
    };
    let others = ["10.98.0.0/16", "fd98::/16"];
    let nobody = ["10.98.0.1", "fd98::1"];
    let enrolled = world.enrolled(&sources(["10.99.0.0/24", "fd99::/64"], nobody));
    for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
        assert_eq!(
            said(dial(&world, pod, PORT).unwrap()),
            format!("app {peer}")
        );
        // HBONE has a port of its own, whoever speaks it.
        let hbone = dial(&world, pod, 15008);
        drop(accept(&enrolled.listeners.hbone));
        drop(hbone.unwrap());
    }
    assert!(enrolled.lookups("excluded_cidr") >= 2);
    let served = app.served();

    // Changed while the pod is captured: other sources are as they ever were.
    enrolled.pod.update(&sources(others, nobody)).unwrap();
    for pod in [POD4, POD6] {
        let refused = dial(&world, pod, PORT).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(enrolled.lookups("plaintext_dropped"), 2);

    // Judged: ours to admit, where everybody else is refused; an exclusion of the same source wins.
    enrolled
        .pod
        .update(&sources(others, [PEER4, PEER6]))
        .unwrap();
    for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
        let client = dial(&world, pod, PORT);
        let ours = accept(&enrolled.listeners.plaintext);
        assert_eq!(ours.peer_addr().unwrap().ip().to_canonical(), address(peer));
        drop(client.unwrap());
    }
    assert_eq!(enrolled.lookups("plaintext_proxied"), 2);
    assert_eq!(app.served(), served);
    let both = sources(["10.99.0.1/32", "fd99::1/128"], [PEER4, PEER6]);
    enrolled.pod.update(&both).unwrap();
    for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
        let answer = said(dial(&world, pod, PORT).unwrap());
        assert_eq!(answer, format!("app {peer}"));
    }

    // Nothing stays behind.
    enrolled.pod.update(&with(PlaintextVerdict::Drop)).unwrap();
    for pod in [POD4, POD6] {
        let refused = dial(&world, pod, PORT).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn the_application_sees_the_client_that_we_dial_for() {
    let world = World::new();
    let _app = world.pod_server();
    // Every verdict for plaintext: our dial is no plaintext from outside.
    for plaintext in [PlaintextVerdict::Drop, PlaintextVerdict::Proxy] {
        let settings = with(plaintext);
        let enrolled = world.enrolled(&settings);
        let dialer = enrolled.pod.dialer(&settings);
        let cases = [
            // A client elsewhere, one on the pod's own network, and the peer itself.
            (Some("203.0.113.5"), POD4, "203.0.113.5"),
            (Some("10.99.0.77"), POD4, "10.99.0.77"),
            (Some(PEER4), POD4, PEER4),
            (Some("::ffff:203.0.113.5"), POD4, "203.0.113.5"),
            (Some("2001:db8::5"), POD6, "2001:db8::5"),
            (Some("fd99::77"), POD6, "fd99::77"),
            // Nobody to show, or the pod itself.
            (None, POD4, POD4),
            (None, POD6, POD6),
            (Some(POD4), POD4, POD4),
            (Some(POD6), POD6, POD6),
            (Some("127.0.0.1"), POD4, POD4),
            (Some("203.0.113.5"), POD6, POD6),
        ];
        for (client, app, seen) in cases {
            let client: Option<IpAddr> = client.map(address);
            let socket = dialer.app_socket(client, address(app)).unwrap();
            socket.set_nonblocking(false).unwrap();
            socket
                .connect_timeout(&at(app, PORT).into(), PATIENCE)
                .unwrap_or_else(|error| panic!("{client:?} -> {app}: {error}"));
            assert_eq!(
                said(socket.into()),
                format!("app {seen}"),
                "{client:?} -> {app}"
            );
        }
        assert!(idle(&enrolled.listeners.outbound));
        assert!(idle(&enrolled.listeners.plaintext));
        assert_eq!(enrolled.connects("captured"), 0);
    }
}

fn with(plaintext: PlaintextVerdict) -> PodSettings {
    PodSettings {
        plaintext,
        ..settings()
    }
}

fn dial(world: &World, pod: &str, port: u16) -> Result<TcpStream> {
    let to = at(pod, port);
    world.in_peer(move || TcpStream::connect_timeout(&to, PATIENCE))
}
