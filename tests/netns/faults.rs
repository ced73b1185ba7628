//! Peers that misbehave where our pods connect to: HBONE servers by hand, which stall, answer garbage,
//! vanish or never take a byte. Each connection ends with its own reason, and nobody else notices.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    access::Line,
    apps::{self, End, Server},
    meshfile::MeshFile,
    peer::{self, Identity, Listener},
    topology::{Pod, Topology},
    wait,
    ztunnel::{HBONE, Settings},
};

use crate::mesh::{Before, Mesh, PATIENCE, assert_alive, assert_echo, resident_bytes};

/// A mesh in which node a takes the pods `rogues` for pods of node b that speak HBONE; whoever
/// listens there does so on its own account.
pub(crate) fn with_rogues(rogues: &[&str]) -> Result<Mesh> {
    let mut builder = Topology::builder()
        .pod("client", "a")
        .pod("hasty", "a")
        .pod("server", "b");
    for rogue in rogues {
        builder = builder.pod(rogue, "b");
    }
    let topology = builder.build()?;
    let settings = Settings::of(&topology)?;
    let everybody = MeshFile::of(&topology);
    let known = rogues
        .iter()
        .fold(everybody.clone(), |file, rogue| file.without(rogue));
    let text = |node: &str| match node {
        "a" => everybody.for_node(node),
        _ => known.for_node(node),
    };
    Mesh::run(topology, text, |_| settings.clone())
}

/// A pod of the mesh whose HBONE port is ours, with the certificate that it should have.
pub(crate) fn rogue(mesh: &Mesh, name: &str) -> Result<(Pod, Listener)> {
    let pod = mesh.pod(name)?.clone();
    let identity = Identity::signed(&mesh.topology, &pod.spiffe_id())?;
    let listener = Listener::start(&pod.netns, HBONE, &identity)?;
    Ok((pod, listener))
}

/// What became of one connection to a rogue: how it ended for the application, after how long, and
/// the line of node a.
struct Fate {
    end: End,
    took: Duration,
    line: Line,
}

/// Connects to a rogue, says something, and waits for the end.
fn visit(mesh: &Mesh, to: &Pod, reason: &str) -> Result<Fate> {
    let mark = mesh.a.log().mark();
    let began = Instant::now();
    let (end, bytes) = match apps::dial(&mesh.pod("client")?.netns, to.at(9000)) {
        Ok(mut app) => apps::say(&mut app, b"is anybody there?", Duration::from_secs(90))?,
        // A reset can be faster than the application that asks how its connect went.
        Err(error) if is_reset(&error) => (End::Reset, Vec::new()),
        Err(error) => return Err(error),
    };
    let took = began.elapsed();
    ensure!(bytes.is_empty(), "{} answered {bytes:?}", to.name);
    let to_it = to.at(9000).to_string();
    let line = mesh.a.log().wait_since(
        mark,
        &format!("the line of {}", to.name),
        PATIENCE,
        |line| {
            let line = Line::access(line)?;
            let about = line.has(&[("direction", "outbound"), ("reason", reason)]);
            let to_rogue = line.get("dst.workload") == Some(to.name.as_str())
                || line.get("dst.addr").is_some_and(|dst| dst == to_it);
            (about && to_rogue).then_some(line)
        },
    )?;
    Ok(Fate { end, took, line })
}

fn is_reset(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

// DESIGN 4: no unbounded wait. Each step has its deadline and its reason; others go on meanwhile.
#[test]
fn a_peer_that_stalls_at_any_step_is_given_up_after_its_deadline() -> Result<()> {
    let mesh = with_rogues(&["deaf", "mute", "silent"])?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let (deaf, no_tls) = rogue(&mesh, "deaf")?;
    let (mute, no_preface) = rogue(&mesh, "mute")?;
    let (silent, no_answer) = rogue(&mesh, "silent")?;
    let mut other = apps::dial(&client.netns, server.at(9000))?;
    let before = Before::of(&mesh.a)?;
    thread::scope(|scope| -> Result<()> {
        let deaf_peer = scope.spawn(move || -> Result<TcpStream> {
            let mut tcp = no_tls.accept_tcp()?;
            // Until the other side gives up.
            let mut hello = Vec::new();
            drop(tcp.read_to_end(&mut hello));
            Ok(tcp)
        });
        let mute_peer = scope.spawn(move || -> Result<_> {
            let mut peer = no_preface.accept_tls()?;
            while matches!(peer.read_frame(), Ok(Some(_))) {}
            Ok(peer)
        });
        let silent_peer = scope.spawn(move || -> Result<u32> {
            let mut peer = no_answer.accept(&[])?;
            peer.wait(peer::HEADERS)?;
            let reset = peer.wait(peer::RST_STREAM)?;
            let code: [u8; 4] = reset.payload.as_slice().try_into()?;
            Ok(u32::from_be_bytes(code))
        });
        let mesh = &mesh;
        let visits = [
            (&deaf, "tls_timed_out", 10),
            (&mute, "h2_timed_out", 10),
            (&silent, "peer_timed_out", 20),
        ]
        .map(|(pod, reason, seconds)| (seconds, scope.spawn(move || visit(mesh, pod, reason))));
        for _ in 0..20 {
            assert_echo(&client.netns, server.at(9000))?;
            assert_alive(&mut other)?;
        }
        for (seconds, visit) in visits {
            let Fate { end, took, line } = visit.join().expect("the visit panicked")?;
            ensure!(end == End::Reset, "{line:?}: {end:?}");
            let due = Duration::from_secs(seconds);
            ensure!(
                took > due - Duration::from_secs(1) && took < due + Duration::from_secs(30),
                "{line:?}: after {took:?}"
            );
            ensure!(line.level == "info", "a peer cannot cause more: {line:?}");
        }
        deaf_peer.join().expect("the peer panicked")?;
        mute_peer.join().expect("the peer panicked")?;
        let cancelled = silent_peer.join().expect("the peer panicked")?;
        ensure!(cancelled == CANCEL, "reset with {cancelled}");
        Ok(())
    })?;
    for reason in ["tls_timed_out", "h2_timed_out", "peer_timed_out"] {
        before.wait_gain("ztunnel_connections_total", &[("reason", reason)], 1.0)?;
    }
    assert_alive(&mut other)
}

/// What a rogue does with one connection of node a.
type Deed = fn(&Listener, TcpStream) -> Result<()>;

#[test]
fn garbage_resets_and_refusals_end_the_connection_with_their_reason() -> Result<()> {
    let mesh = with_rogues(&["rogue"])?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let (pod, listener) = rogue(&mesh, "rogue")?;
    let listener = listener.patience(Duration::from_millis(100));
    let mut other = apps::dial(&client.netns, server.at(9000))?;
    let mut failures = Vec::new();
    for (name, reason, deed) in before_the_answer().into_iter().chain(with_the_answer()) {
        let done = AtomicBool::new(false);
        let outcome = thread::scope(|scope| -> Result<()> {
            // A tunnel that dies before it was asked for anything is tried again: each time the same.
            let peer = scope.spawn(|| {
                let mut said = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    if let Ok(tcp) = listener.accept_tcp() {
                        said.extend(deed(&listener, tcp).err());
                    }
                }
                said
            });
            let fate = visit(&mesh, &pod, reason);
            done.store(true, Ordering::Relaxed);
            let said = peer.join().expect("the peer panicked");
            let Fate { end, line, .. } = fate.with_context(|| format!("the peer: {said:?}"))?;
            ensure!(end == End::Reset, "{end:?}: {line:?}");
            assert_alive(&mut other)
        });
        if let Err(error) = outcome {
            let said: Vec<_> = mesh.a.access_lines().into_iter().rev().take(2).collect();
            failures.push(format!("{name}: {error:#}; {said:?}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    assert_echo(&client.netns, server.at(9000))
}

/// Until the CONNECT is asked for: the connection does not come to be.
fn before_the_answer() -> [(&'static str, &'static str, Deed); 6] {
    [
        ("no TLS", "tls_failed", |_, mut tcp| {
            tcp.write_all(&[0x42; 512])?;
            wait_closed(&mut tcp)
        }),
        ("a reset before TLS", "tls_failed", |_, mut tcp| {
            // By then the other side knows that it is connected.
            tcp.read_exact(&mut [0])?;
            Ok(apps::abort(tcp)?)
        }),
        ("an end before TLS", "tls_failed", |_, tcp| {
            Ok(tcp.shutdown(Shutdown::Both)?)
        }),
        ("no HTTP/2", "tunnel_lost", |l, tcp| {
            let mut peer = l.tls(tcp)?;
            peer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")?;
            peer.drain();
            Ok(())
        }),
        ("a frame that is too long", "tunnel_lost", |l, tcp| {
            let mut peer = l.tls(tcp)?;
            peer.write(&[0xff, 0xff, 0xff, peer::SETTINGS, 0, 0, 0, 0, 0])?;
            peer.drain();
            Ok(())
        }),
        ("no stream allowed", "h2_failed", |l, tcp| {
            let mut peer = l.http2(tcp, &[(peer::MAX_CONCURRENT_STREAMS, 0)])?;
            peer.wait_end().map(drop)
        }),
    ]
}

/// The CONNECT was heard.
fn with_the_answer() -> [(&'static str, &'static str, Deed); 6] {
    [
        ("a reset of the stream", "tunnel_lost", |l, tcp| {
            let mut peer = l.http2(tcp, &[])?;
            let asked = peer.wait(peer::HEADERS)?;
            peer.reset(asked.stream, CANCEL)?;
            // A reset of the connection would take from its reader what it has not read yet.
            peer.frame(peer::PING, 0, 0, &[0; 8])?;
            peer.wait(peer::PING)?;
            peer.abort()
        }),
        ("refused", "peer_refused", |l, tcp| {
            let mut peer = l.http2(tcp, &[])?;
            let asked = peer.wait(peer::HEADERS)?;
            peer.answer(asked.stream, "503")?;
            peer.wait(peer::RST_STREAM)?;
            peer.abort()
        }),
        ("an answer that is no number", "tunnel_lost", |l, tcp| {
            let mut peer = l.http2(tcp, &[])?;
            let asked = peer.wait(peer::HEADERS)?;
            peer.answer(asked.stream, "fine")?;
            peer.wait(peer::RST_STREAM).map(drop)?;
            peer.abort()
        }),
        ("a bomb of headers", "tunnel_lost", |l, tcp| {
            let mut peer = l.http2(tcp, &[])?;
            let asked = peer.wait(peer::HEADERS)?;
            let pad = "x".repeat(15_000);
            peer.frame(
                peer::HEADERS,
                0,
                asked.stream,
                &peer::block(&[(":status", "200")]),
            )?;
            for _ in 0..200 {
                let more = peer::block(&[("bomb", pad.as_str())]);
                if peer
                    .frame(peer::CONTINUATION, 0, asked.stream, &more)
                    .is_err()
                {
                    break;
                }
            }
            peer.wait_end().map(drop)
        }),
        ("a window that overflows", "reset", |l, tcp| {
            let mut peer = l.http2(tcp, &[])?;
            let asked = peer.wait(peer::HEADERS)?;
            peer.answer(asked.stream, "200")?;
            let most = 0x7fff_ffff_u32.to_be_bytes();
            peer.frame(peer::WINDOW_UPDATE, 0, asked.stream, &most)?;
            peer.frame(peer::WINDOW_UPDATE, 0, asked.stream, &most)?;
            peer.wait(peer::RST_STREAM).map(drop)?;
            peer.abort()
        }),
        ("gone while bytes move", "tunnel_lost", |l, tcp| {
            let mut peer = l.http2(tcp, &[])?;
            let asked = peer.wait(peer::HEADERS)?;
            peer.answer(asked.stream, "200")?;
            peer.wait(peer::DATA)?;
            peer.abort()
        }),
    ]
}

#[test]
fn a_peer_that_is_somebody_else_or_out_of_date_gets_no_byte() -> Result<()> {
    let mesh = with_rogues(&["rogue"])?;
    let pod = mesh.pod("rogue")?;
    let sign =
        |id: &str, seconds| Identity::lasting(&mesh.topology, id, Duration::from_secs(seconds));
    let expired = {
        let identity = sign(&pod.spiffe_id(), 1)?;
        thread::sleep(Duration::from_millis(2100));
        identity
    };
    for (name, identity) in [
        (
            "somebody else",
            sign("spiffe://cluster.local/ns/demo/sa/other", 60)?,
        ),
        (
            "another trust domain",
            sign("spiffe://else.where/ns/demo/sa/rogue", 60)?,
        ),
        ("expired", expired),
    ] {
        let listener = Listener::start(&pod.netns, HBONE, &identity)?;
        let fate = thread::scope(|scope| {
            let peer = scope.spawn(|| listener.accept(&[]).is_err());
            let fate = visit(&mesh, pod, "tls_failed");
            ensure!(
                peer.join().expect("the peer panicked"),
                "{name}: it was believed"
            );
            fate
        })?;
        ensure!(fate.end == End::Reset, "{name}: {:?}", fate.line);
        ensure!(
            fate.line.get("dst.identity").is_none(),
            "{name}: {:?}",
            fate.line
        );
    }
    Ok(())
}

// A peer whose window is closed for ever holds what fits into its buffers, and only its own stream.
#[test]
fn a_peer_that_never_takes_a_byte_costs_what_its_buffers_hold() -> Result<()> {
    let mesh = with_rogues(&["rogue"])?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let (pod, listener) = rogue(&mesh, "rogue")?;
    let mut other = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut other)?;
    let base = resident_bytes(mesh.a.pid())?;
    let streams = 8;
    let listener = &listener.patience(Duration::from_millis(100));
    let asked = &AtomicUsize::new(0);
    thread::scope(|scope| -> Result<()> {
        let (done, wait) = mpsc::channel::<()>();
        // A tunnel for each worker that gets a connection; all of them are heard at any time.
        let peer = scope.spawn(move || {
            thread::scope(|tunnels| -> Result<()> {
                let mut open = Vec::new();
                while wait.try_recv() == Err(TryRecvError::Empty) {
                    if let Ok(tcp) = listener.accept_tcp() {
                        open.push(tcp.try_clone()?);
                        tunnels.spawn(|| answer_without_window(listener, tcp, asked));
                    }
                }
                for tcp in open {
                    tcp.shutdown(Shutdown::Both)?;
                }
                Ok(())
            })
        });
        let mut apps = Vec::new();
        for _ in 0..streams {
            let mut app = apps::dial(&client.netns, pod.at(9000))?;
            app.set_write_timeout(Some(Duration::from_millis(300)))?;
            // Until nobody takes any more.
            while app.write(&[7; 1 << 16]).is_ok() {}
            apps.push(app);
        }
        wait::until("all to be asked for", PATIENCE, || {
            (asked.load(Ordering::Relaxed) >= streams).then_some(())
        })?;
        for _ in 0..10 {
            assert_echo(&client.netns, server.at(9000))?;
            assert_alive(&mut other)?;
        }
        let grown = resident_bytes(mesh.a.pid())?.saturating_sub(base);
        ensure!(grown < 32 << 20, "{streams} streams hold {grown} bytes");
        drop(done);
        peer.join().expect("the peer panicked")?;
        for app in apps {
            let (end, _) = apps::read_end(&app, PATIENCE)?;
            ensure!(end == End::Reset, "{end:?}");
        }
        Ok(())
    })?;
    assert_alive(&mut other)
}

/// Serves a tunnel on which nothing may be sent, until it ends.
fn answer_without_window(listener: &Listener, tcp: TcpStream, asked: &AtomicUsize) -> Result<()> {
    let mut peer = listener.http2(tcp, &[(peer::INITIAL_WINDOW_SIZE, 0)])?;
    while let Ok(headers) = peer.wait(peer::HEADERS) {
        peer.answer(headers.stream, "200")?;
        asked.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

// An application that gives up while its connection is still being made takes that back.
#[test]
fn an_application_that_resets_early_opens_nothing_at_the_other_end() -> Result<()> {
    let mesh = with_rogues(&["rogue"])?;
    let (pod, listener) = rogue(&mesh, "rogue")?;
    let mark = mesh.a.log().mark();
    let before = Before::of(&mesh.a)?;
    let app = apps::dial(&mesh.pod("client")?.netns, pod.at(9000))?;
    let mut peer = listener.accept(&[])?;
    let asked = peer.wait(peer::HEADERS)?;
    apps::abort(app)?;
    let reset = peer.wait(peer::RST_STREAM)?;
    ensure!(reset.stream == asked.stream, "{reset:?}");
    ensure!(reset.payload == CANCEL.to_be_bytes(), "{reset:?}");
    let fields = [("direction", "outbound"), ("reason", "reset")];
    let line = mesh.a.wait_access(mark, &fields)?;
    ensure!(line.get("error").is_none(), "{line:?}");
    before.wait_gain("ztunnel_connections_total", &fields, 1.0)?;
    before.wait_gain(
        "ztunnel_connections_open",
        &[("direction", "outbound")],
        0.0,
    )
}

/// Reads to the end, however it comes.
fn wait_closed(tcp: &mut TcpStream) -> Result<()> {
    let mut rest = Vec::new();
    drop(tcp.read_to_end(&mut rest));
    Ok(())
}

/// HTTP/2's CANCEL.
const CANCEL: u32 = 8;
