//! The harness proves itself: what it builds works, what it watches it sees, and what it leaves is
//! nothing. Needs root, nginx and curl; no node process.
#![expect(
    clippy::disallowed_types,
    reason = "real time: nothing here runs on a paused clock"
)]

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::Shutdown,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use ztunnel_tests::{
    access::Line,
    apps::{self, End, Server},
    bulk, inspect, leftovers,
    load::{Load, Outcome},
    meshfile::{self, MeshFile},
    metrics::Metrics,
    process::{Running, output},
    programs::{Nginx, curl},
    topology::{LINK, Topology},
    wait,
    wire::Sniffer,
};

const PATIENCE: Duration = Duration::from_secs(60);

#[expect(
    clippy::unwrap_used,
    reason = "called by tests only; clippy sees no #[test] here"
)]
fn two_pods() -> Topology {
    Topology::builder()
        .pod("client", "a")
        .pod("server", "b")
        .build()
        .unwrap()
}

#[test]
fn a_topology_leaves_nothing_when_dropped() {
    let topology = two_pods();
    let prefix = topology.prefix().to_owned();
    let directory = topology.directory().unwrap();
    let sleeper = output(None, "which", &["sleep"], "").unwrap();
    let mut command = Command::new(sleeper.trim());
    command.arg("1000");
    let running = Running::start(
        "sleep",
        Some(&topology.pod("client").unwrap().netns),
        command,
    )
    .unwrap();
    let there = leftovers::list(&prefix).unwrap();
    assert_eq!(there.namespaces.len(), 4, "{there:?}");
    assert_eq!(there.processes, [i32::try_from(running.pid()).unwrap()]);
    assert!(directory.is_dir());
    drop(topology);
    drop(running);
    assert!(leftovers::list(&prefix).unwrap().is_empty());
    assert!(!directory.exists());
}

#[test]
fn leftovers_of_a_dead_process_are_collected_by_the_next_topology() {
    // A pid that is free: that of a process which has ended and been collected.
    let mut child = Command::new("true").spawn().unwrap();
    let dead = child.id();
    child.wait().unwrap();
    let name = format!("zt-{dead}-0-left");
    output(None, "ip", &["netns", "add", &name], "").unwrap();
    let file = std::env::temp_dir().join(format!("zt-{dead}-0-files"));
    fs::create_dir(&file).unwrap();
    drop(two_pods());
    assert!(!Path::new("/run/netns").join(&name).exists());
    assert!(!file.exists());
}

#[test]
fn a_run_that_is_killed_leaves_nothing() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel-tests-victim"));
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let victim = Running::start("victim", None, command).unwrap();
    let built = |line: &str| line.strip_prefix("built ").map(str::to_owned);
    let prefix = victim.log().wait_for("built", PATIENCE, built).unwrap();
    let there = leftovers::list(&prefix).unwrap();
    assert_eq!(
        (there.namespaces.len(), there.processes.len()),
        (3, 1),
        "{there:?}"
    );
    assert_eq!(there.files.len(), 1, "{there:?}");
    victim.signal(Signal::SIGKILL).unwrap();
    wait::until("the reaper to finish", PATIENCE, || {
        leftovers::list(&prefix).unwrap().is_empty().then_some(())
    })
    .unwrap();
}

#[test]
fn load_tells_answered_from_refused_and_unanswered() {
    let topology = two_pods();
    let (client, server) = (
        topology.pod("client").unwrap(),
        topology.pod("server").unwrap(),
    );
    let start = |port, patience| Load::start(&client.netns, server.at(port), b"x", 2, patience);
    let echo = Server::start(&server.netns, 9000, apps::echo).unwrap();
    let began = Instant::now();
    let load = start(9000, PATIENCE);
    load.wait_answered(began, 20, PATIENCE).unwrap();
    assert!(
        load.finish()
            .unwrap()
            .iter()
            .all(|a| a.outcome == Outcome::Answered)
    );
    drop(echo);

    let load = start(9000, PATIENCE);
    wait::until("refusals", PATIENCE, || {
        (load.attempts().len() > 4).then_some(())
    })
    .unwrap();
    let refused = Outcome::NotConnected(ErrorKind::ConnectionRefused);
    assert!(load.finish().unwrap().iter().all(|a| a.outcome == refused));

    output(
        Some(&server.netns),
        "ip",
        &["link", "set", "eth0", "down"],
        "",
    )
    .unwrap();
    let load = start(9000, Duration::from_millis(500));
    let waiting = || inspect::unanswered_syns(&client.netns, 9000).unwrap();
    wait::until("two SYNs", PATIENCE, || (waiting() == 2).then_some(())).unwrap();
    let timed_out = Outcome::NotConnected(ErrorKind::TimedOut);
    assert!(
        load.finish()
            .unwrap()
            .iter()
            .all(|a| a.outcome == timed_out)
    );
}

#[test]
fn access_lines_are_read_in_both_formats() {
    let plain = "2025-01-01T00:00:00Z\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.1:5 \
                 src.identity=\"spiffe://t/ns/n/sa/s\" duration=\"12ms\" error=it broke: a=b";
    let line = Line::access(plain).unwrap();
    assert_eq!(line.get("src.identity"), Some("spiffe://t/ns/n/sa/s"));
    assert!(line.has(&[
        ("src.addr", "10.0.0.1:5"),
        ("duration", "12ms"),
        ("error", "it broke: a=b")
    ]));
    let json = r#"{"level":"info","time":"t","scope":"access","message":"m","bytes_sent":7}"#;
    let line = Line::access(json).unwrap();
    assert_eq!(
        (line.message.as_str(), line.get("bytes_sent")),
        ("m", Some("7"))
    );
    assert_eq!(Line::access("time\tinfo\tstate\tloaded"), None);
    assert_eq!(Line::access("thread panicked"), None);
}

#[test]
fn metrics_are_read_with_their_labels() {
    let page = "# TYPE a counter\na_total{x=\"1\",y=\"a\\\"}b\"} 3\na_total{x=\"2\",y=\"\"} 4 1.5\nb 0.5\n# EOF\n";
    let metrics = Metrics::parse(page).unwrap();
    assert!((metrics.sum("a_total", &[]) - 7.0).abs() < f64::EPSILON);
    assert!((metrics.sum("a_total", &[("y", "a\"}b")]) - 3.0).abs() < f64::EPSILON);
    assert_eq!(metrics.matching("b", &[]).count(), 1);
    Metrics::parse("a{x=\"1} 2").unwrap_err();
}

#[test]
fn every_pod_reaches_every_pod_and_node_on_both_families_at_once() {
    let topology = Topology::builder()
        .pod("one", "a")
        .pod("two", "a")
        .pod("three", "b")
        .build()
        .unwrap();
    for to in topology.pods() {
        let server = Server::start(&to.netns, 9000, apps::echo).unwrap();
        for from in topology.pods().iter().filter(|from| from.name != to.name) {
            for (address, own) in [(to.at(9000), from.at(0)), (to.at6(9000), from.at6(0))] {
                let reply = apps::ask(&from.netns, address, b"hello").unwrap();
                assert_eq!(reply.bytes, b"hello");
                assert_eq!((reply.peer, reply.local.ip()), (address, own.ip()));
                let seen = server.seen();
                assert_eq!(seen.last().unwrap().peer, reply.local, "{seen:?}");
                assert_eq!(seen.last().unwrap().local, address);
            }
        }
        for node in topology.nodes() {
            for address in [to.at(9000), to.at6(9000)] {
                assert_eq!(apps::ask(&node.netns, address, b"hi").unwrap().bytes, b"hi");
            }
        }
    }
}

#[test]
fn a_node_reaches_its_pod_from_its_gateway_address() {
    let topology = two_pods();
    let (node, pod) = (topology.node("b").unwrap(), topology.pod("server").unwrap());
    let server = Server::start(&pod.netns, 9000, apps::whoami).unwrap();
    apps::ask(&node.netns, pod.at(9000), b"GET / HTTP/1.0\r\n\r\n").unwrap();
    apps::ask(&node.netns, pod.at6(9000), b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let peers: Vec<_> = server.seen().iter().map(|seen| seen.peer.ip()).collect();
    assert_eq!(
        peers,
        [node.gateway_v4.to_string(), node.gateway_v6.to_string()]
            .map(|ip| { ip.parse::<std::net::IpAddr>().unwrap() })
    );
}

#[test]
fn nginx_and_curl_talk_across_nodes_and_the_sniffer_finds_the_canary() {
    let topology = two_pods();
    let (client, server) = (
        topology.pod("client").unwrap(),
        topology.pod("server").unwrap(),
    );
    let nginx = Nginx::start(&server.netns, 80, &topology.directory().unwrap()).unwrap();
    let sniffer = Sniffer::on(&topology.node("a").unwrap().netns, LINK).unwrap();
    for to in [server.at(80), server.at6(80)] {
        let fetched = curl(&client.netns, to, "/whoami", &["X-Canary: kanarienvogel"]).unwrap();
        assert_eq!(fetched.status, 200);
        assert_eq!(fetched.peer, to);
        let body = format!("peer={}\nserver={}\n", fetched.local.ip(), to.ip());
        assert_eq!(fetched.body, body);
    }
    let seen = sniffer.seen().unwrap();
    // A slow machine may send a packet again.
    assert!(seen.count(b"kanarienvogel").unwrap() >= 2, "{seen:?}");
    assert_eq!(seen.count(b"nachtigall").unwrap(), 0);
    assert!(seen.segments_on(80).filter(|s| s.syn && !s.ack).count() >= 2);
    // nginx writes its line once the answer is gone.
    wait::until("nginx's lines", PATIENCE, || {
        (nginx.requests().unwrap().len() == 2).then_some(())
    })
    .unwrap();
    sniffer.clear().unwrap();
    assert_eq!(sniffer.seen().unwrap().count(b"kanarienvogel").unwrap(), 0);
}

#[test]
fn a_needle_that_is_split_over_segments_is_found() {
    let topology = two_pods();
    let (client, server) = (
        topology.pod("client").unwrap(),
        topology.pod("server").unwrap(),
    );
    let _echo = Server::start(&server.netns, 9000, apps::echo).unwrap();
    let sniffer = Sniffer::on(&topology.node("b").unwrap().netns, LINK).unwrap();
    let mut stream = apps::dial(&client.netns, server.at(9000)).unwrap();
    stream.set_nodelay(true).unwrap();
    for half in [b"kanarien", b"--vogel-"] {
        stream.write_all(half).unwrap();
        stream.read_exact(&mut [0; 8]).unwrap();
    }
    assert_eq!(
        sniffer.seen().unwrap().count(b"kanarien--vogel-").unwrap(),
        2
    );
}

#[test]
fn the_bulk_exchange_carries_every_byte_both_ways() {
    let topology = two_pods();
    let (client, server) = (
        topology.pod("client").unwrap(),
        topology.pod("server").unwrap(),
    );
    let _bulk = Server::start(&server.netns, 9000, bulk::serve).unwrap();
    for bytes in [0, 1, 7, 65_536, 65_537, 64 << 20] {
        let done = bulk::exchange(&client.netns, server.at(9000), bytes, 42).unwrap();
        assert_eq!(done.bytes_each_way, bytes);
        assert_eq!(done.sum_up == done.sum_down, bytes == 0);
    }
}

#[test]
fn ends_of_connections_are_told_apart() {
    let topology = two_pods();
    let (client, server) = (
        topology.pod("client").unwrap(),
        topology.pod("server").unwrap(),
    );
    let _reset = Server::start(&server.netns, 9000, apps::reset).unwrap();
    let _count = Server::start(&server.netns, 9001, apps::count_until_eof).unwrap();
    let _speaks = Server::start(&server.netns, 9002, apps::banner("220 ready\r\n")).unwrap();

    let mut stream = apps::dial(&client.netns, server.at(9000)).unwrap();
    stream.write_all(b"x").unwrap();
    assert_eq!(apps::read_end(&stream, PATIENCE).unwrap().0, End::Reset);

    let mut stream = apps::dial(&client.netns, server.at(9001)).unwrap();
    stream.write_all(b"12345").unwrap();
    assert_eq!(
        apps::read_end(&stream, Duration::from_millis(50))
            .unwrap()
            .0,
        End::Open
    );
    stream.shutdown(Shutdown::Write).unwrap();
    let (end, bytes) = apps::read_end(&stream, PATIENCE).unwrap();
    assert_eq!((end, bytes.as_slice()), (End::Fin, &b"received 5"[..]));

    let (_stream, banner) = apps::listen_first(&client.netns, server.at(9002), 11).unwrap();
    assert_eq!(banner, b"220 ready\r\n");
}

#[test]
fn a_change_to_eth0_or_a_filter_rule_is_noticed() {
    let topology = two_pods();
    let netns = &topology.pod("client").unwrap().netns;
    let before = inspect::Eth0::of(netns).unwrap();
    assert_eq!(inspect::Eth0::of(netns).unwrap(), before);
    inspect::no_packet_filter(netns).unwrap();
    output(
        Some(netns),
        "ip",
        &["route", "add", "192.0.2.0/24", "dev", "eth0"],
        "",
    )
    .unwrap();
    assert_ne!(inspect::Eth0::of(netns).unwrap(), before);
    output(Some(netns), "nft", &["add", "table", "inet", "left"], "").unwrap();
    inspect::no_packet_filter(netns).unwrap_err();
}

#[test]
fn a_mesh_file_names_every_workload_and_only_the_pods_of_its_node() {
    let topology = two_pods();
    let file = MeshFile::of(&topology)
        .service(
            "web",
            &["10.96.0.1".parse().unwrap()],
            &[(8080, 80)],
            &["server"],
        )
        .policy(&meshfile::allow_accounts("only-client", &["client"]))
        .attach("server", "demo/only-client");
    let text = file.for_node("b");
    assert_eq!(text.matches("protocol: HBONE").count(), 2, "{text}");
    assert_eq!(text.matches("netns: ").count(), 1, "{text}");
    assert!(
        text.contains(&format!("netns: /run/netns/{}server", topology.prefix())),
        "{text}"
    );
    assert!(
        text.contains("\"demo/web.demo.svc.cluster.local\": {8080: 80}"),
        "{text}"
    );
    assert!(text.contains("  - name: only-client\n"), "{text}");
    assert!(file.without("server").for_node("b").contains("pods: []\n"));
}
