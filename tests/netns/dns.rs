//! Names: what a pod asks of any resolver, by every kind of socket, and who answers.

use std::{
    io::{self, ErrorKind, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    panic::resume_unwind,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use domain::base::{Rtype, iana::Rcode};
use ztunnel_tests::{
    apps::{self, Server},
    dns::{
        self, Answer, OUTSIDE, Resolver, Socket, ask, ask_tcp, ask_within, getent, question, reply,
    },
    meshfile::{self, MeshFile},
    process::output,
    topology::Topology,
    wait,
    ztunnel::{Node, Settings},
};

use crate::mesh::{Before, Mesh, PATIENCE, assert_echo, assert_refused};

const SHOP: &str = "shop.demo.svc.cluster.local";
const VIP4: &str = "10.96.0.10";
const VIP6: &str = "fd96::10";
const SOCKETS: [Socket; 3] = [
    Socket::Connected,
    Socket::Unconnected,
    Socket::UnconnectedMapped,
];

fn file(topology: &Topology) -> MeshFile {
    let vip = |text: &str| text.parse::<IpAddr>();
    let vips: Vec<IpAddr> = [VIP4, VIP6].into_iter().flat_map(vip).collect();
    MeshFile::of(topology)
        .service("shop", &vips, &[(80, 9000)], &["server"])
        .service("pods", &[], &[(80, 9000)], &["server", "client"])
}

/// A client and a server on node `a`; the resolver is on node `b`, which has a process of its own.
fn start(change: impl FnOnce(Settings) -> Settings) -> Result<(Mesh, Resolver)> {
    let topology = Topology::builder()
        .pod("client", "a")
        .pod("server", "a")
        .build()?;
    start_in(topology, change)
}

fn start_in(
    topology: Topology,
    change: impl FnOnce(Settings) -> Settings,
) -> Result<(Mesh, Resolver)> {
    let file = file(&topology);
    let settings = change(Settings::of(&topology)?.env("RUST_LOG", "info,dns=debug"));
    let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let host = mesh.net("b")?;
    let resolver = Resolver::start(&host.netns, &[host.v4.into(), host.v6.into()])?;
    Ok((mesh, resolver))
}

fn resolvers(mesh: &Mesh) -> Result<[IpAddr; 2]> {
    let host = mesh.net("b")?;
    Ok([host.v4.into(), host.v6.into()])
}

/// 126, 129, 130, 132, 139.
#[test]
fn names_of_the_mesh_are_answered_here_and_all_others_by_the_resolver_that_was_asked() -> Result<()>
{
    let (mesh, resolver) = start(|settings| settings)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    for ip in resolvers(&mesh)? {
        let to = (ip, dns::PORT).into();
        for (kind, id) in SOCKETS.into_iter().zip(0x1000..) {
            let what = format!("{kind:?} to {to}");
            let before = Before::of(&mesh.a)?;
            let ours = question(id, SHOP, Rtype::A, true);
            let answer = Answer::read(&ask(&client.netns, kind, to, &ours)?)?;
            assert_eq!(answer.records, [format!("{SHOP} 30 {VIP4}")], "{what}");
            assert!(answer.authoritative, "{what}");
            assert_eq!(resolver.seen(), [], "{what}: it was not asked");

            for (name, rtype) in [("outside.example", Rtype::A), (SHOP, Rtype::MX)] {
                let others = question(id, name, rtype, true);
                let answer = ask(&client.netns, kind, to, &others)?;
                assert_eq!(Some(answer), reply(&others), "{what}: byte for byte");
                let seen = resolver.take();
                assert_eq!(seen.len(), 1, "{what}");
                assert_eq!(seen[0].bytes, others, "{what}: byte for byte");
                let own: [IpAddr; 2] = [client.v4.into(), client.v6.into()];
                assert!(own.contains(&seen[0].from), "{what}: {:?}", seen[0].from);
            }

            // 139.
            let mut update = question(id, SHOP, Rtype::A, false);
            update[2] = 5 << 3;
            let answer = ask(&client.netns, kind, to, &update)?;
            assert_eq!(Some(answer), reply(&update), "{what}: another opcode");
            assert_eq!(resolver.take()[0].bytes, update, "{what}");

            let labels = |rtype| {
                [
                    ("request_query_type", rtype),
                    ("request_protocol", "udp"),
                    ("source_canonical_service", "client"),
                    ("source_canonical_revision", "v1"),
                ]
            };
            before.wait_gain("istio_dns_requests_total", &labels("A"), 2.0)?;
            for rtype in ["A", "MX"] {
                let labels = labels(rtype);
                before.wait_gain("istio_dns_upstream_requests_total", &labels, 1.0)?;
                let took = "istio_dns_upstream_request_duration_seconds_count";
                before.wait_gain(took, &labels, 1.0)?;
                let [rtype, transport, ..] = labels;
                let any = [rtype, transport, ("le", "+Inf")];
                let took = "istio_dns_upstream_request_duration_seconds_bucket";
                before.wait_gain(took, &any, 1.0)?;
            }
            before.wait_gain("istio_dns_upstream_failures_total", &[], 0.0)?;
            let captured = [("verdict", "dns_captured")];
            before.wait_gain("ztunnel_capture_verdicts_total", &captured, 4.0)?;
        }
    }
    // Endpoints of a name without a VIP.
    let to = (resolvers(&mesh)?[0], dns::PORT).into();
    let headless = question(7, "pods.demo", Rtype::AAAA, false);
    let answer = Answer::read(&ask(&client.netns, Socket::Connected, to, &headless)?)?;
    let mut wanted = [client.v6, server.v6].map(|ip| format!("pods.demo 30 {ip}"));
    wanted.sort();
    assert_eq!(answer.records, wanted);
    let line = |line: &str| {
        let said = ["query", SHOP, "client", "NOERROR"];
        said.iter().all(|word| line.contains(word)).then_some(())
    };
    mesh.a
        .log()
        .wait_since(0, "a line per question", PATIENCE, line)?;
    Ok(())
}

#[test]
fn the_c_library_finds_a_service_by_its_short_name_and_its_pod_through_the_mesh() -> Result<()> {
    let (mesh, _resolver) = start(|settings| settings)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let directory = mesh.topology.directory()?;
    let _echo = Server::start(&server.netns, 9000, apps::echo)?;
    for resolver in resolvers(&mesh)? {
        for name in ["shop", "shop.demo", SHOP] {
            let said = getent(&client.netns, &directory, resolver, name)?;
            assert!(said.contains(VIP4) && said.contains(VIP6), "{name}: {said}");
        }
        let said = getent(&client.netns, &directory, resolver, "outside.example")?;
        assert!(said.contains(&OUTSIDE.to_string()), "{said}");
    }
    assert_echo(&client.netns, (VIP4.parse::<IpAddr>()?, 80).into())
}

/// 127, 128, 131, 133, 134, 135, 136, 137.
#[test]
fn a_name_is_what_it_is_to_the_pod_that_asks() -> Result<()> {
    let topology = Topology::builder()
        .pod("client", "a")
        .pod("server", "a")
        .build()?;
    let many: Vec<_> = (0..256).map(|n| format!("\"/10.97.0.{n}\"")).collect();
    let services: String = [
        ("other", "*.x.com", "\"/10.96.1.1\"", ""),
        ("other", "*.b.x.com", "\"/10.96.1.2\"", ""),
        ("other", "www.y.com", "\"/10.96.1.3\"", ""),
        ("demo", "four.com", "\"/10.96.1.4\", \"/fd96::4\"", ", ipFamilies: IPv4"),
        ("demo", "far.com", "\"/10.96.1.5\", \"far/10.96.1.6\"", ""),
        ("other", "hidden.com", "\"/10.96.1.7\"", ", visibility: Namespace"),
        ("other", "same.com", "\"/10.96.1.8\"", ", canonical: true"),
        ("demo", "same.com", "\"/10.96.1.9\"", ""),
        ("other", "many.com", &many.join(", "), ""),
    ]
    .into_iter()
    .zip(0..)
    .map(|((namespace, host, vips, more), number)| {
        format!(
            "  - {{name: s{number}, namespace: {namespace}, hostname: \"{host}\", vips: [{vips}], ports: {{80: 80}}{more}}}\n"
        )
    })
    .collect();
    let file = file(&topology);
    let text = |node: &str| {
        let text = file.for_node(node);
        text.replace("\nservices:\n", &format!("\nservices:\n{services}"))
    };
    let settings = Settings::of(&topology)?.env("IPV6_ENABLED", "false");
    let mesh = Mesh::run(topology, text, |_| settings.clone())?;
    let host = mesh.net("b")?;
    let resolver = Resolver::start(&host.netns, &[host.v4.into()])?;
    let client = mesh.pod("client")?;
    let to = (host.v4, dns::PORT).into();
    let answer = |name: &str, rtype| -> Result<Answer> {
        let asked = question(1, name, rtype, false);
        Answer::read(&ask(&client.netns, Socket::Connected, to, &asked)?)
    };
    for (name, rtype, records) in [
        ("q.x.com", Rtype::A, vec!["q.x.com 30 10.96.1.1"]),
        ("a.b.x.com", Rtype::A, vec!["a.b.x.com 30 10.96.1.2"]),
        (
            "q.x.com.demo.svc.cluster.local",
            Rtype::A,
            vec!["q.x.com.demo.svc.cluster.local 30 10.96.1.1"],
        ),
        (
            "www.y.com.demo.svc.cluster.local",
            Rtype::A,
            vec![
                "www.y.com 30 10.96.1.3",
                "www.y.com.demo.svc.cluster.local 30 www.y.com.",
            ],
        ),
        ("four.com", Rtype::AAAA, vec![]),
        ("four.com", Rtype::A, vec!["four.com 30 10.96.1.4"]),
        ("far.com", Rtype::A, vec!["far.com 30 10.96.1.5"]),
        ("same.com", Rtype::A, vec!["same.com 30 10.96.1.9"]),
        (SHOP, Rtype::AAAA, vec![]),
    ] {
        let said = answer(name, rtype)?;
        assert_eq!(said.records, records, "{name} {rtype}");
        assert!(said.authoritative, "{name} {rtype}");
        assert_eq!(said.rcode, Rcode::NOERROR, "{name} {rtype}");
    }
    assert_eq!(resolver.seen(), []);
    assert!(!answer("hidden.com", Rtype::A)?.authoritative);
    assert_eq!(resolver.take().len(), 1, "as if nobody knew it");

    let asked = question(1, "many.com", Rtype::A, false);
    let cut = ask(&client.netns, Socket::Unconnected, to, &asked)?;
    assert!(cut.len() <= 512 && Answer::read(&cut)?.truncated);
    let whole = ask_tcp(&client.netns, to, &[asked])?;
    let whole = Answer::read(&whole[0])?;
    assert!(!whole.truncated);
    assert_eq!(whole.records.len(), 256);
    assert_eq!(resolver.seen(), []);
    Ok(())
}

#[test]
fn over_tcp_both_kinds_of_names_are_answered_in_one_connection() -> Result<()> {
    let (mesh, resolver) = start(|settings| settings)?;
    let client = mesh.pod("client")?;
    for ip in resolvers(&mesh)? {
        let to = (ip, dns::PORT).into();
        let before = Before::of(&mesh.a)?;
        let questions: Vec<Vec<u8>> = [SHOP, "one.example", "shop", "two.example"]
            .into_iter()
            .zip(1..)
            .map(|(name, id)| question(id, name, Rtype::A, id == 2))
            .collect();
        let answers = ask_tcp(&client.netns, to, &questions)?;
        let of = |id: usize| {
            let question = &questions[id - 1];
            let found = answers.iter().find(|answer| answer[..2] == question[..2]);
            found.with_context(|| format!("no answer to {id}"))
        };
        assert_eq!(Answer::read(of(1)?)?.records, [format!("{SHOP} 30 {VIP4}")]);
        assert_eq!(Answer::read(of(3)?)?.records, [format!("shop 30 {VIP4}")]);
        for id in [2, 4] {
            assert_eq!(Some(of(id)?.clone()), reply(&questions[id - 1]), "{id}");
        }
        let seen = resolver.take();
        assert!(seen.iter().all(|asked| asked.tcp), "{seen:?}");
        let bytes: Vec<_> = seen.into_iter().map(|asked| asked.bytes).collect();
        assert_eq!(bytes, [questions[1].clone(), questions[3].clone()]);
        let tcp = [("request_protocol", "tcp")];
        before.wait_gain("istio_dns_requests_total", &tcp, 4.0)?;
        before.wait_gain("istio_dns_upstream_requests_total", &tcp, 2.0)?;
    }
    Ok(())
}

/// 138.
#[test]
fn where_the_resolver_is_down_only_names_of_the_mesh_are_known() -> Result<()> {
    let (mesh, resolver) = start(|settings| settings)?;
    drop(resolver);
    let client = mesh.pod("client")?;
    for ip in resolvers(&mesh)? {
        let to = (ip, dns::PORT).into();
        let before = Before::of(&mesh.a)?;
        let ours = question(1, SHOP, Rtype::A, false);
        let others = question(2, "outside.example", Rtype::A, false);
        let fail = |bytes: &[u8]| -> Result<()> {
            assert_eq!(Answer::read(bytes)?.rcode, Rcode::SERVFAIL);
            Ok(())
        };
        // Its host says at once that nobody listens there; without heed of it, this takes five seconds.
        for kind in [Socket::Connected, Socket::Unconnected] {
            let mark = mesh.a.log().mark();
            fail(&ask(&client.netns, kind, to, &others)?)?;
            let told = |line: &str| line.contains("Connection refused").then_some(());
            mesh.a
                .log()
                .wait_since(mark, "why there is no answer", PATIENCE, told)?;
        }
        fail(&ask_tcp(&client.netns, to, &[others])?[0])?;
        let answer = Answer::read(&ask(&client.netns, Socket::Connected, to, &ours)?)?;
        assert_eq!(answer.records.len(), 1);
        before.wait_gain("istio_dns_upstream_failures_total", &[], 3.0)?;
    }
    Ok(())
}

/// B088, B112.
#[test]
fn where_dns_is_not_captured_questions_go_where_they_were_sent() -> Result<()> {
    let (mesh, resolver) = start(|settings| settings)?;
    let client = mesh.pod("client")?;
    let to = (resolvers(&mesh)?[0], dns::PORT).into();
    let ours = question(1, SHOP, Rtype::A, false);
    // From before each change: one that was connected outside stays with its resolver.
    let open = dns::socket(&client.netns, Socket::Unconnected, to)?;
    open.set_read_timeout(Some(PATIENCE))?;
    let asked = |captured: bool| -> Result<()> {
        open.send_to(&ours, to)?;
        let mut buffer = [0; 2048];
        let (length, from) = open.recv_from(&mut buffer)?;
        let answer = Answer::read(&buffer[..length])?;
        ensure!(from == to && answer.authoritative == captured, "{answer:?}");
        for kind in SOCKETS {
            let answer = Answer::read(&ask(&client.netns, kind, to, &ours)?)?;
            ensure!(answer.authoritative == captured, "{kind:?}: {answer:?}");
        }
        let answer = Answer::read(&ask_tcp(&client.netns, to, std::slice::from_ref(&ours))?[0])?;
        ensure!(answer.authoritative == captured, "TCP: {answer:?}");
        Ok(())
    };
    let is_ours = |captured: bool| {
        let mut last = Ok(());
        wait::until("questions to go where they should", PATIENCE, || {
            last = asked(captured);
            last.is_ok().then_some(())
        })
        .and(last)
    };
    is_ours(true)?;
    let file = file(&mesh.topology);
    mesh.replace(&file.clone().pod_setting("client", "dnsCapture: false"))?;
    is_ours(false).context("the pod's entry says no")?;
    mesh.replace(&file)?;
    is_ours(true).context("and yes again")?;
    drop((mesh, resolver));

    let (mesh, resolver) = start(|settings| settings.env("ISTIO_META_DNS_CAPTURE", "false"))?;
    let client = mesh.pod("client")?;
    for kind in SOCKETS {
        let answer = ask(&client.netns, kind, to, &ours)?;
        assert_eq!(Some(answer), reply(&ours), "{kind:?}");
    }
    let answer = ask_tcp(&client.netns, to, std::slice::from_ref(&ours))?;
    assert_eq!(Some(answer[0].clone()), reply(&ours));
    assert_eq!(resolver.seen().len(), 4);
    let metrics = mesh.a.metrics()?;
    let mut names = metrics.samples().iter().map(|sample| &sample.name);
    assert!(!names.any(|name| name.starts_with("istio_dns")));
    let hooks = wait::until("the pins", PATIENCE, || {
        std::fs::read_dir(mesh.a.pins()).ok()
    })?;
    for generation in hooks.flatten() {
        assert!(!generation.path().join("sendmsg4").exists());
    }
    Ok(())
}

#[test]
fn while_nobody_serves_no_name_is_known_and_no_question_leaves() -> Result<()> {
    let (mut mesh, resolver) = start(|settings| settings)?;
    let client = mesh.pod("client")?.netns.clone();
    let resolver_ips = resolvers(&mesh)?;
    mesh.a.kill()?;
    for ip in resolver_ips {
        for kind in SOCKETS {
            let others = question(1, "outside.example", Rtype::A, false);
            let to = (ip, dns::PORT).into();
            let answer = ask_within(&client, kind, to, &others, Duration::from_millis(300));
            assert!(answer.is_err(), "{kind:?} to {to}: {answer:?}");
        }
    }
    // Had one left, it would have come before this one.
    let host = mesh.net("b")?;
    for ip in resolver_ips {
        let last = question(2, "last.example", Rtype::A, false);
        let answer = ask(
            &host.netns,
            Socket::Unconnected,
            (ip, dns::PORT).into(),
            &last,
        )?;
        assert_eq!(Some(answer), reply(&last));
        let seen: Vec<_> = resolver.take().into_iter().map(|it| it.bytes).collect();
        assert_eq!(seen, [last], "{ip}");
    }
    restart(&mut mesh.a)?;
    for ip in resolver_ips {
        let ours = question(1, SHOP, Rtype::A, false);
        let answer = ask(&client, Socket::Unconnected, (ip, dns::PORT).into(), &ours)?;
        assert_eq!(Answer::read(&answer)?.records.len(), 1);
    }
    Ok(())
}

/// 129.
#[test]
fn what_is_no_answer_to_the_question_is_not_passed_back() -> Result<()> {
    let (mesh, resolver) = start(|settings| settings)?;
    drop(resolver);
    let host = mesh.net("b")?;
    let _liar = Resolver::that_says(&host.netns, &[host.v4.into(), host.v6.into()], |asked| {
        let other = question(7, "elsewhere.example", Rtype::A, false);
        let of_another = reply(&other).unwrap_or_default();
        let number = |of: &[u8], number: [u8; 2]| {
            let rest = of.get(2..).unwrap_or_default();
            [number.as_slice(), rest].concat()
        };
        let own = asked.first_chunk().copied().unwrap_or_default();
        let right = reply(asked).unwrap_or_default();
        vec![
            number(&right, [!own[0], own[1]]),
            number(&of_another, own),
            asked.to_vec(),
            right,
        ]
    })?;
    let client = mesh.pod("client")?;
    for ip in resolvers(&mesh)? {
        for kind in SOCKETS {
            let others = question(0x1234, "outside.example", Rtype::A, true);
            let answer = ask(&client.netns, kind, (ip, dns::PORT).into(), &others)?;
            assert_eq!(Some(answer), reply(&others), "{kind:?}");
        }
    }
    Ok(())
}

#[test]
fn a_resolver_in_the_pod_itself_is_asked_directly() -> Result<()> {
    let (mesh, resolver) = start(|settings| settings)?;
    let client = mesh.pod("client")?;
    let own: [IpAddr; 4] = [
        Ipv4Addr::LOCALHOST.into(),
        Ipv6Addr::LOCALHOST.into(),
        client.v4.into(),
        client.v6.into(),
    ];
    let inside = Resolver::start(&client.netns, &own)?;
    for ip in own {
        let to = (ip, dns::PORT).into();
        let ours = question(1, SHOP, Rtype::A, false);
        for kind in [Socket::Connected, Socket::Unconnected] {
            let answer = ask(&client.netns, kind, to, &ours)?;
            assert_eq!(Some(answer), reply(&ours), "{kind:?} to {ip}");
        }
        let answers = ask_tcp(&client.netns, to, std::slice::from_ref(&ours))?;
        assert_eq!(Some(answers[0].clone()), reply(&ours), "TCP to {ip}");
    }
    assert_eq!(inside.seen().len(), 12);
    assert_eq!(resolver.seen(), []);
    // It asks others as any application, and what it says from its port is its own.
    let host: IpAddr = mesh.net("b")?.v4.into();
    let to = SocketAddr::from((host, dns::PORT));
    let ours = question(2, SHOP, Rtype::A, false);
    let answer = Answer::read(&ask(&client.netns, Socket::Unconnected, to, &ours)?)?;
    assert!(answer.authoritative);
    Ok(())
}

/// Bytes between two pods of the mesh are the mesh's, whatever port they go to.
#[test]
fn a_connection_to_a_resolver_in_the_mesh_goes_the_ways_of_the_mesh() -> Result<()> {
    let topology = Topology::builder()
        .pod("client", "a")
        .pod("stranger", "a")
        .pod("server", "b")
        .build()?;
    let file = file(&topology)
        .policy(&meshfile::allow_accounts("clients", &["client"]))
        .attach("server", "demo/clients");
    let mesh = Mesh::start_with(topology, &file)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let resolver = Resolver::start(&server.netns, &[server.v4.into()])?;
    let to = server.at(dns::PORT);
    let sniffer = mesh.sniffer()?;
    let mark = mesh.marks();
    let ours = question(1, SHOP, Rtype::A, false);
    let answers = ask_tcp(&client.netns, to, std::slice::from_ref(&ours))?;
    assert_eq!(Some(answers[0].clone()), reply(&ours), "whom it asked");
    assert_eq!(resolver.seen().len(), 1);
    let (at, id) = (to.to_string(), client.spiffe_id());
    let proven = [
        ("dst.hbone_addr", at.as_str()),
        ("src.identity", id.as_str()),
    ];
    mesh.b.wait_access(mark.1, &proven)?;
    let seen = sniffer.seen()?;
    assert_eq!(
        seen.segments()
            .filter(|s| s.dst.port() == dns::PORT)
            .count(),
        0,
        "in plain TCP"
    );
    assert_refused(&mesh.pod("stranger")?.netns, to)
}

/// What one pod does to us, the others do not notice.
#[test]
fn a_pod_that_floods_is_bounded_and_others_are_answered() -> Result<()> {
    let two = |settings: Settings| settings.env("ZTUNNEL_WORKER_THREADS", "2");
    let (mesh, resolver) = start(|settings| two(settings.env("RUST_LOG", "info")))?;
    drop(resolver);
    let (client, hostile) = (mesh.pod("client")?, mesh.pod("server")?);
    let host = mesh.net("b")?;
    let resolver = Resolver::start(&host.netns, &[host.v4.into()])?;
    // Nobody is ever answered there: each question waits as long as we do.
    let silent: IpAddr = host.v6.into();
    let _mute = Resolver::that_says(&host.netns, &[silent], |_| Vec::new())?;
    let before = Before::of(&mesh.a)?;
    let ended = AtomicBool::new(false);
    let to = (resolvers(&mesh)?[0], dns::PORT).into();
    thread::scope(|scope| -> Result<()> {
        let flood = scope.spawn(|| -> Result<()> {
            let socket = dns::socket(&hostile.netns, Socket::Unconnected, (silent, 53).into())?;
            let others = question(1, "outside.example", Rtype::A, false);
            let large = [others.as_slice(), &[0; 60_000]].concat();
            while !ended.load(Ordering::Relaxed) {
                for _ in 0..50 {
                    drop(socket.send_to(&others, (silent, dns::PORT)));
                    drop(socket.send_to(&large, (silent, dns::PORT)));
                }
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        });
        let mut idle = Vec::new();
        let judged = (|| -> Result<()> {
            wait::until("the flood to be refused", PATIENCE, || {
                let dial = || hostile.netns.dial((silent, dns::PORT).into(), PATIENCE);
                idle.extend((0..100).map_while(|_| dial().ok()));
                let refused = "ztunnel_dns_refused_total";
                let gained = |of| before.gained(refused, &[("reason", of)]).ok();
                let both = gained("too_many_questions")?.min(gained("too_many_connections")?);
                (both > 0.5).then_some(())
            })?;
            for id in 0..20 {
                let ours = question(id, SHOP, Rtype::A, false);
                let answer = Answer::read(&ask(&client.netns, Socket::Connected, to, &ours)?)?;
                ensure!(answer.records.len() == 1, "{answer:?}");
                let others = question(id, "outside.example", Rtype::A, false);
                // On a slow machine the resolver may be slower than we wait; who asks asks again.
                wait::until("the resolver's answer", PATIENCE, || {
                    let answer = ask(&client.netns, Socket::Unconnected, to, &others);
                    (answer.ok() == reply(&others)).then_some(())
                })?;
            }
            let answers = ask_tcp(&client.netns, to, &[question(9, SHOP, Rtype::A, false)])?;
            ensure!(Answer::read(&answers[0])?.records.len() == 1);
            Ok(())
        })();
        ended.store(true, Ordering::Relaxed);
        drop(idle);
        flood.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        judged
    })?;
    assert!(resolver.seen().iter().all(|asked| asked.from == client.v4));
    Ok(())
}

#[test]
fn whoever_does_not_finish_a_question_is_left() -> Result<()> {
    let (mesh, _resolver) = start(|settings| settings.env("RUST_LOG", "info"))?;
    let client = mesh.pod("client")?;
    let to = (resolvers(&mesh)?[0], dns::PORT).into();
    // A byte now and then never makes a message.
    let mut slow = client.netns.dial(to, PATIENCE)?;
    let begin = Instant::now();
    slow.write_all(&[0xff, 0xff])?;
    while slow.write_all(&[0]).is_ok() {
        ensure!(begin.elapsed() < PATIENCE, "still open");
        thread::sleep(Duration::from_millis(100));
    }
    let ours = question(1, SHOP, Rtype::A, false);
    let answers = ask_tcp(&client.netns, to, &[ours])?;
    assert_eq!(Answer::read(&answers[0])?.records.len(), 1);
    Ok(())
}

/// 161.
#[test]
fn a_pod_without_ipv6_on_its_loopback_is_served_over_ipv4() -> Result<()> {
    let topology = Topology::builder()
        .pod("client", "a")
        .pod("server", "a")
        .build()?;
    let client = topology.pod("client")?.clone();
    client.netns.sysctl("ipv6/conf/lo/disable_ipv6", "1")?;
    let (mesh, resolver) = start_in(topology, |settings| settings)?;
    let [four, six] = resolvers(&mesh)?;
    let to = (four, dns::PORT).into();
    let ours = question(1, SHOP, Rtype::A, false);
    for kind in SOCKETS {
        let answer = Answer::read(&ask(&client.netns, kind, to, &ours)?)?;
        assert_eq!(answer.records, [format!("{SHOP} 30 {VIP4}")], "{kind:?}");
        let others = question(2, "outside.example", Rtype::A, false);
        let answer = ask(&client.netns, kind, to, &others)?;
        assert_eq!(Some(answer), reply(&others), "{kind:?}");
    }
    let answers = ask_tcp(&client.netns, to, std::slice::from_ref(&ours))?;
    assert_eq!(Answer::read(&answers[0])?.records.len(), 1);
    // What cannot be answered is not let out: it is refused.
    drop(resolver.take());
    for kind in [Socket::Connected, Socket::Unconnected] {
        let refused = ask(&client.netns, kind, (six, dns::PORT).into(), &ours).unwrap_err();
        let by = refused.chain().find_map(|e| e.downcast_ref::<io::Error>());
        let by = by.map(io::Error::kind);
        assert_eq!(by, Some(ErrorKind::PermissionDenied), "{refused:?}");
    }
    assert_eq!(resolver.seen(), []);
    Ok(())
}

#[test]
fn a_pod_with_ipv6_alone_is_served() -> Result<()> {
    let (mesh, _resolver) = start(|settings| settings)?;
    let client = mesh.pod("client")?;
    output(
        None,
        "ip",
        &[
            "-n",
            client.netns.name(),
            "-4",
            "addr",
            "flush",
            "dev",
            "eth0",
        ],
        "",
    )?;
    let to = (resolvers(&mesh)?[1], dns::PORT).into();
    for kind in [Socket::Connected, Socket::Unconnected] {
        let ours = question(1, "shop", Rtype::AAAA, true);
        let answer = Answer::read(&ask(&client.netns, kind, to, &ours)?)?;
        assert_eq!(answer.records, [format!("shop 30 {VIP6}")], "{kind:?}");
        let others = question(2, "outside.example", Rtype::A, true);
        let answer = ask(&client.netns, kind, to, &others)?;
        assert_eq!(Some(answer), reply(&others), "{kind:?}");
    }
    let others = question(3, "outside.example", Rtype::A, true);
    let answers = ask_tcp(&client.netns, to, std::slice::from_ref(&others))?;
    assert_eq!(Some(answers[0].clone()), reply(&others));
    Ok(())
}

#[test]
fn a_pod_that_left_asks_for_itself_again() -> Result<()> {
    let (mut mesh, _resolver) = start(|settings| settings)?;
    let client = mesh.pod("client")?.netns.clone();
    let resolver_ips = resolvers(&mesh)?;
    let ours = question(1, SHOP, Rtype::A, false);
    let to = (resolver_ips[0], dns::PORT).into();
    assert!(Answer::read(&ask(&client, Socket::Unconnected, to, &ours)?)?.authoritative);
    mesh.a.kill()?;
    mesh.a.release()?;
    for ip in resolver_ips {
        for kind in SOCKETS {
            let answer = ask(&client, kind, (ip, dns::PORT).into(), &ours)?;
            assert_eq!(Some(answer), reply(&ours), "{kind:?} to {ip}");
        }
    }
    Ok(())
}

fn restart(node: &mut Node) -> Result<()> {
    node.restart()?;
    node.wait_ready().map(drop)
}
