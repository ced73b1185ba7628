//! What numbers do to a mesh: the state is replaced ten times a second, thousands of connections come at once.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{Backlog, listen};
use ztunnel_tests::{
    apps::{self, Server},
    load::{Load, Outcome},
    meshfile::{self, MeshFile},
    netns::Netns,
    process::output,
    topology::{Builder, Topology},
};

use crate::mesh::{Before, Mesh, PATIENCE, assert_alive, assert_echo, resident_bytes};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("near", "a")
        .pod("server", "b")
}

#[test]
fn a_state_that_is_replaced_ten_times_a_second_disturbs_no_connection() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut long = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut long)?;
    let allowing = |topology: &Topology, n: usize| {
        let name = format!("one-{}", n % 7);
        MeshFile::of(topology)
            .policy(&meshfile::allow_accounts(&name, &["client"]))
            .attach("server", &format!("demo/{name}"))
    };
    let base = resident_bytes(mesh.b.pid())?;
    let marks = mesh.marks();
    let load = Load::start(&client.netns, server.at(9000), b"hello", 4, PATIENCE);
    load.wait_answered(Instant::now(), 10, PATIENCE)?;
    for n in 0..100 {
        let began = Instant::now();
        let file = allowing(&mesh.topology, n);
        mesh.a.replace_file(&file.for_node("a"))?;
        mesh.b.replace_file(&file.for_node("b"))?;
        assert_alive(&mut long).with_context(|| format!("after {n} replacements"))?;
        thread::sleep(Duration::from_millis(100).saturating_sub(began.elapsed()));
    }
    load.wait_answered(Instant::now(), 20, PATIENCE)?;
    let attempts = load.finish()?;
    let bad: Vec<_> = attempts
        .iter()
        .filter(|attempt| attempt.outcome != Outcome::Answered)
        .collect();
    ensure!(bad.is_empty(), "of {} attempts: {bad:?}", attempts.len());
    let lines = mesh.b.log().lines();
    let applied = lines
        .iter()
        .skip(marks.1)
        .filter(|l| l.contains("state applied"))
        .count();
    ensure!(applied >= 5, "only {applied} states were applied");
    let grown = resident_bytes(mesh.b.pid())?.saturating_sub(base);
    ensure!(grown < 64 << 20, "it has grown by {grown} bytes");
    assert_alive(&mut long)
}

#[test]
fn thousands_of_connections_at_once_are_all_served() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, near, server) = (mesh.pod("client")?, mesh.pod("near")?, mesh.pod("server")?);
    let limit = format!("--nofile={}", 4 * COUNT);
    output(
        None,
        "prlimit",
        &["--pid", &std::process::id().to_string(), &limit],
        "",
    )?;
    let crowd = Crowd::start(&server.netns, 9100)?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut other = apps::dial(&near.netns, server.at(9000))?;
    assert_alive(&mut other)?;
    let (base_a, base_b) = (resident_bytes(mesh.a.pid())?, resident_bytes(mesh.b.pid())?);
    let before = Before::of(&mesh.a)?;
    let began = Instant::now();
    let mut streams = (0..COUNT)
        .map(|_| apps::dial(&client.netns, server.at(9100)))
        .collect::<Result<Vec<_>>>()?;
    for (n, stream) in streams.iter_mut().enumerate() {
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut greeting = [0];
        stream
            .read_exact(&mut greeting)
            .with_context(|| format!("connection {n}"))?;
        if n % 1000 == 0 {
            assert_alive(&mut other)?;
        }
    }
    println!("{COUNT} connections were open after {:?}", began.elapsed());
    before.wait_gain(
        "ztunnel_connections_open",
        &[("direction", "outbound")],
        as_f64(COUNT),
    )?;
    for (node, base) in [(&mesh.a, base_a), (&mesh.b, base_b)] {
        let each = resident_bytes(node.pid())?.saturating_sub(base) / u64::try_from(COUNT)?;
        println!("node {}: {each} bytes for each", node.name());
        ensure!(
            each < 24 << 10,
            "{each} bytes for each connection on {}",
            node.name()
        );
    }
    assert_echo(&near.netns, server.at(9000))?;
    drop(streams);
    // It keeps its ends open, and a connection that is half closed is open.
    drop(crowd);
    before.wait_gain(
        "ztunnel_connections_open",
        &[("direction", "outbound")],
        0.0,
    )?;
    assert_alive(&mut other)?;
    Ok(())
}

fn as_f64(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::NAN, f64::from)
}

/// A server for many: it greets with a byte and keeps every connection, in one thread.
struct Crowd {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Crowd {
    fn start(netns: &Netns, port: u16) -> Result<Self> {
        let any = std::net::SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port);
        let listener = netns.listen(any)?;
        listener.set_nonblocking(true)?;
        // Its accept queue must not be the narrowest place: what it drops comes again after a minute.
        listen(&listener, Backlog::new(4096)?)?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || greet(&listener, &stop)
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

fn greet(listener: &TcpListener, stop: &AtomicBool) {
    let mut kept: Vec<TcpStream> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((mut stream, _)) => {
                drop(stream.write_all(b"!"));
                kept.push(stream);
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// As many as the usual limit of descriptors lets one process have both ends of.
const COUNT: usize = 4_000;
