//! The story as far as nothing breaks: the request before and after enrolment, who is who, and
//! policy. Each step measures the world now and tells what it found; none assumes an earlier one
//! succeeded.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ztunnel_tests::{
    access::Line,
    apps::{self, End},
    inspect, meshfile,
    programs::curl,
    topology::Pod,
    wait,
    wire::{Segment, Sniffer},
    ztunnel::{HBONE, Node},
};

use super::{
    teller::{Measured, Teller, one_line, time},
    world::{self, World},
};

pub(super) fn introduce(teller: &mut Teller, world: &World) -> Result<()> {
    teller.step(
        "Two nodes, five pods",
        "Network namespaces joined by veth links. Each pod has its own eth0 and is\n\
         routed to its node. The pods run real programs and know of no mesh.",
    );
    for node in world.topology.nodes() {
        teller.say(&format!(
            "node {}  {:<15} {}",
            node.name, node.v4, node.netns
        ));
        for pod in world
            .topology
            .pods()
            .iter()
            .filter(|pod| pod.node == node.name)
        {
            let what = match pod.name.as_str() {
                "client" | "neighbour" => "curl and other clients",
                "stranger" => "a client that nobody has invited",
                "nginx" => "nginx, port 80",
                "greeter" => "speaks before its client does; echo, bulk, half-close",
                _ => "",
            };
            teller.say(&format!(
                "  {:<10} {:<12} {:<16} {what}",
                pod.name, pod.v4, pod.v6
            ));
        }
    }
    Ok(())
}

pub(super) fn before(teller: &mut Teller, world: &World) -> Result<()> {
    teller.step(
        "Before enrolment",
        "The client asks nginx on the other node; the request carries a random word, the\n\
         canary. A capture on the link looks for it, so that the hunt is known to work.",
    );
    let wire = world.sniff()?;
    let nginx = world.pod("nginx")?.at(world::HTTP);
    request(teller, world, "client to nginx", nginx);
    teller.measure("canary on the link", "found", || {
        let packets = wire.seen()?.count(world.canary.as_bytes())?;
        Ok((format!("found in {packets} packets: readable"), packets > 0))
    });
    teller.measure("plaintext from node b into nginx's pod", "answered", || {
        let (heard, took) = plaintext_from_node(world)?;
        Ok((format!("{heard} in {}", time(took)), heard.answered()))
    });
    Ok(())
}

pub(super) fn enrol(
    teller: &mut Teller,
    world: &mut World,
    binary: &std::path::Path,
) -> Result<()> {
    teller.step(
        "Enrolment",
        "One `ztunnel proxy` per node, each told about the mesh by a file. The pods, their\n\
         programs and their open sockets are left alone.",
    );
    world.enrol(binary)?;
    for node in world.nodes() {
        let pid = node.pid();
        let ready = node
            .wait_ready()
            .map(|took| (format!("ready, pid {pid}, {}", time(took)), true));
        let failed = ready.is_err();
        let name = format!("node {} is ready", node.name());
        teller.measure(&name, "ready", || ready);
        if failed {
            anyhow::bail!("without node {} the story cannot go on", node.name());
        }
    }
    Ok(())
}

pub(super) fn after(teller: &mut Teller, world: &mut World) -> Result<()> {
    teller.step(
        "After enrolment",
        "The same requests, by the same programs. Nothing in the pods was restarted.",
    );
    let wire = world.sniff()?;
    let (client, nginx) = (world.pod("client")?, world.pod("nginx")?);
    request(teller, world, "client to nginx", nginx.at(world::HTTP));
    request(
        teller,
        world,
        "client to nginx, IPv6",
        nginx.at6(world::HTTP),
    );
    teller.measure("source that nginx saw", &client.v4.to_string(), || {
        let body = curl(&client.netns, nginx.at(world::HTTP), "/whoami", &[])?.body;
        let seen = body
            .lines()
            .find_map(|line| line.strip_prefix("peer="))
            .context("no peer")?;
        Ok((seen.to_owned(), seen == client.v4.to_string()))
    });
    teller.measure(
        "peer that the client saw",
        &nginx.at(world::HTTP).to_string(),
        || {
            let peer = curl(&client.netns, nginx.at(world::HTTP), "/whoami", &[])?.peer;
            Ok((peer.to_string(), peer == nginx.at(world::HTTP)))
        },
    );
    let service = SocketAddr::new(world::SERVICE, world::SERVICE_PORT);
    teller.measure(
        "by service address",
        &format!("nginx, peer {service}"),
        || {
            let got = curl(&client.netns, service, "/whoami", &[])?;
            let right = got.body.contains(&format!("server={}\n", nginx.v4)) && got.peer == service;
            Ok((format!("nginx, peer {}", got.peer), right))
        },
    );
    teller.measure(
        "greeter speaks first",
        &format!("{:?}", world::GREETING_TEXT.trim()),
        || {
            let started = Instant::now();
            let to = world.pod("greeter")?.at(world::GREETING);
            let (_open, text) = apps::listen_first(&client.netns, to, world::GREETING_TEXT.len())?;
            let text = String::from_utf8_lossy(&text).into_owned();
            let said = format!("{:?} after {}", text.trim(), time(started.elapsed()));
            Ok((said, text == world::GREETING_TEXT))
        },
    );
    neighbour(teller, world)?;
    on_the_wire(teller, world, &wire);
    untouched(teller, world);
    Ok(())
}

/// Two pods of one node: what they say does not reach the link at all.
fn neighbour(teller: &mut Teller, world: &World) -> Result<()> {
    let wire = world.sniff()?;
    let (neighbour, nginx) = (world.pod("neighbour")?, world.pod("nginx")?);
    teller.measure(
        "neighbour to nginx, same node",
        "200, nothing on the link",
        || {
            let header = format!("X-Canary: {}", world.canary);
            let got = curl(
                &neighbour.netns,
                nginx.at(world::HTTP),
                "/hello",
                &[&header],
            )?;
            let seen = wire.seen()?;
            // Earlier connections may still be closing; this one has the neighbour's address.
            let own = IpAddr::V4(neighbour.v4);
            let mine = |s: &Segment<'_>| s.src.ip() == own || s.dst.ip() == own;
            let segments = seen.complete()?.segments().filter(mine).count();
            let said = format!("{} in {}, {segments} segments", got.status, time(got.took));
            Ok((said, got.status == 200 && segments == 0))
        },
    );
    Ok(())
}

fn on_the_wire(teller: &mut Teller, world: &World, wire: &Sniffer) {
    teller.measure("canary on the link", "0 packets", || {
        let seen = wire.seen()?;
        let packets = seen.count(world.canary.as_bytes())?;
        Ok((
            format!("{packets} of {} packets", seen.frames().len()),
            packets == 0,
        ))
    });
    teller.measure("TLS records on port 15008", "handshake and data", || {
        let tls = wire.seen()?.tls_records(HBONE);
        let said = format!("{} handshake, {} data", tls.handshake, tls.application_data);
        Ok((said, tls.handshake > 0 && tls.application_data > 0))
    });
    teller.measure("other TCP on the link", "0 segments", || {
        let seen = wire.seen()?;
        let is_other = |s: &Segment<'_>| s.src.port() != HBONE && s.dst.port() != HBONE;
        let other = seen.complete()?.segments().filter(is_other).count();
        Ok((format!("{other} segments"), other == 0))
    });
}

fn untouched(teller: &mut Teller, world: &World) {
    teller.measure(
        "iptables and nftables rules",
        "none in 7 namespaces",
        || {
            let mut with_rules = Vec::new();
            for (name, netns) in world.namespaces() {
                if !inspect::packet_filter(netns)?.trim().is_empty() {
                    with_rules.push(name);
                }
            }
            let count = world.namespaces().count();
            Ok(none_of(
                &with_rules,
                &format!("none in {count} namespaces"),
                "rules in",
            ))
        },
    );
    eth0(teller, world);
}

/// Addresses and routes of every pod's eth0 against what they were before enrolment.
pub(super) fn eth0(teller: &mut Teller, world: &World) {
    teller.measure("eth0: addresses and routes", "unchanged in 5 pods", || {
        let changed = world.changed_eth0()?;
        let count = world.topology.pods().len();
        Ok(none_of(
            &changed,
            &format!("unchanged in {count} pods"),
            "changed in",
        ))
    });
}

pub(super) fn who(teller: &mut Teller, world: &mut World) -> Result<()> {
    teller.step(
        "Who is who",
        "Each end proved its identity with a certificate of its own. The access line of\n\
         each node says who spoke to whom.",
    );
    let (client, nginx) = (world.pod("client")?.clone(), world.pod("nginx")?.clone());
    let marks = (world.a()?.log().mark(), world.b()?.log().mark());
    curl(&client.netns, nginx.at(world::HTTP), "/who", &[])?;
    let out = access(world.a()?, marks.0, "outbound", &client, &nginx)?;
    let into = access(world.b()?, marks.1, "inbound", &client, &nginx)?;
    for (node, line) in [("a", &out), ("b", &into)] {
        for (end, pod) in [("src", &client), ("dst", &nginx)] {
            let expected = format!("…/ns/{}/sa/{}", pod.namespace, pod.service_account);
            let field = format!("{end}.identity");
            let said = line.get(&field).unwrap_or("no identity");
            let holds = said == pod.spiffe_id();
            teller.fact(
                &format!("node {node}: {field}"),
                &expected,
                (said.to_owned(), holds),
            );
        }
    }
    teller.measure("bytes that a sent and b received", "equal", || {
        let sent = out.get("bytes_sent").context("no bytes_sent")?;
        let received = into.get("bytes_recv").context("no bytes_recv")?;
        Ok((
            format!("{sent} and {received}"),
            sent == received && sent != "0",
        ))
    });
    Ok(())
}

pub(super) fn policy(teller: &mut Teller, world: &mut World) -> Result<()> {
    teller.step(
        "Policy",
        "The stranger and the client each hold a connection open. Then the file is edited:\n\
         nginx and greeter admit the service account of the client, and nobody else.",
    );
    let (client, stranger) = (world.pod("client")?.clone(), world.pod("stranger")?.clone());
    let (nginx, greeter) = (world.pod("nginx")?.clone(), world.pod("greeter")?.clone());
    let mut kept = apps::dial(&client.netns, greeter.at(world::ECHO))?;
    let mut cut = apps::dial(&stranger.netns, greeter.at(world::ECHO))?;
    let open = echoes(&mut kept).and_then(|()| echoes(&mut cut));
    teller.measure("before: both connections", "answer", || {
        open.map(|()| ("answer".into(), true))
    });

    world.file = world
        .file
        .clone()
        .policy(&meshfile::allow_accounts(
            "only-client",
            &[&client.service_account],
        ))
        .attach("nginx", "demo/only-client")
        .attach("greeter", "demo/only-client");
    let texts = (world.file.for_node("a"), world.file.for_node("b"));
    world.a()?.replace_file(&texts.0)?;
    let edited = Instant::now();
    world.b()?.replace_file(&texts.1)?;
    teller.measure("the stranger's open connection", "ends within 5 s", || {
        let (end, _) = apps::read_end(&cut, Duration::from_secs(5))?;
        let took = time(edited.elapsed());
        Ok(match end {
            End::Open => (format!("still open after {took}"), false),
            End::Fin | End::Reset => (format!("ended {took} after the edit"), true),
        })
    });
    teller.measure("the client's open connection", "still answers", || {
        echoes(&mut kept).map(|()| ("still answers".into(), true))
    });
    request(teller, world, "client to nginx", nginx.at(world::HTTP));
    let mark = world.b()?.log().mark();
    teller.measure("stranger to nginx", "refused", || {
        let (heard, took) = apps::knock(&stranger.netns, nginx.at(world::HTTP), GET, PATIENCE)?;
        Ok((format!("{heard}, {}", time(took)), !heard.answered()))
    });
    let refusal = access(world.b()?, mark, "inbound", &stranger, &nginx);
    teller.measure(
        "the reason on node b's access line",
        "policy_denied",
        || {
            let refusal = refusal?;
            let reason = refusal.get("reason").unwrap_or("none");
            Ok((reason.to_owned(), reason == "policy_denied"))
        },
    );
    teller.measure("plaintext from node b into nginx's pod", "refused", || {
        // The kernel is told a moment after the open connections are.
        let refused = || match plaintext_from_node(world) {
            Ok((heard, took)) if !heard.answered() => Some(Ok((heard, took))),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        };
        let (heard, took) = wait::until("a refusal", Duration::from_secs(5), refused)??;
        Ok((format!("{heard}, {}", time(took)), true))
    });
    Ok(())
}

/// One request with the canary in it, as a fact.
pub(super) fn request(teller: &mut Teller, world: &World, name: &str, to: SocketAddr) {
    teller.measure(name, "200", || {
        let path = format!("/{}", world.canary);
        let header = format!("X-Canary: {}", world.canary);
        let got = curl(&world.pod("client")?.netns, to, &path, &[&header])?;
        let right = got.status == 200 && got.body.contains(&world.canary);
        Ok((format!("{} in {}", got.status, time(got.took)), right))
    });
}

/// Nothing to complain about, or who there is to complain about.
pub(super) fn none_of(names: &[&str], good: &str, bad: &str) -> Measured {
    if names.is_empty() {
        (good.to_owned(), true)
    } else {
        (format!("{bad} {}", names.join(", ")), false)
    }
}

fn plaintext_from_node(world: &World) -> Result<(apps::Heard, Duration)> {
    let (node, nginx) = (&world.topology.node("b")?.netns, world.pod("nginx")?);
    apps::knock(node, nginx.at(world::HTTP), GET, PATIENCE)
}

/// The line of a connection that ended since `mark`. That of an earlier one may come late: whose it
/// is has to be said.
fn access(node: &Node, mark: usize, direction: &str, from: &Pod, to: &Pod) -> Result<Line> {
    node.wait_access(
        mark,
        &[
            ("direction", direction),
            ("src.workload", &from.name),
            ("dst.workload", &to.name),
        ],
    )
    .map_err(|error| anyhow::anyhow!(one_line(&error)))
}

fn echoes(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"still there?")?;
    stream.read_exact(&mut [0; 12]).context("no echo")
}

const GET: &[u8] = b"GET /whoami HTTP/1.0\r\n\r\n";
const PATIENCE: Duration = Duration::from_secs(5);
