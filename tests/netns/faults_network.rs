//! What the network and the numbers do to a mesh: the link between the nodes goes dark and comes back,
//! the state is replaced ten times a second, thousands of connections come at once.

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
use ztunnel_tests::{
    apps::{self, Server},
    load::{Load, Outcome},
    meshfile::{self, MeshFile},
    netns::Netns,
    process::output,
    topology::{Builder, LINK, Topology},
};

use crate::mesh::{Before, Mesh, PATIENCE, assert_alive, assert_echo, resident_bytes, wait_fate};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("near", "a")
        .pod("server", "b")
}

/// Lets nothing through between the nodes until it is dropped.
struct Dark<'a>(&'a Netns);

impl<'a> Dark<'a> {
    fn on(node: &'a Netns) -> Result<Self> {
        shape(node, "add", "netem loss 100%").or_else(|_| filter(node, true))?;
        Ok(Self(node))
    }
}

impl Drop for Dark<'_> {
    fn drop(&mut self) {
        drop(shape(self.0, "del", "").or_else(|_| filter(self.0, false)));
    }
}

fn shape(node: &Netns, verb: &str, how: &str) -> Result<()> {
    let mut args = vec!["qdisc", verb, "dev", LINK, "root"];
    args.extend(how.split_whitespace());
    output(Some(node), "tc", &args, "").map(drop)
}

/// Where the kernel has no `netem`.
fn filter(node: &Netns, on: bool) -> Result<()> {
    let rules = format!(
        "add table netdev dark; add chain netdev dark out {{ type filter hook egress device {LINK} \
         priority 0; policy drop; }}\n"
    );
    let rules = if on {
        rules
    } else {
        "delete table netdev dark\n".to_owned()
    };
    output(Some(node), "nft", &["-f", "-"], &rules).map(drop)
}

// An open connection outlives a short darkness; in a long one its tunnel is found dead by its pings, new
// connections end with their reason, and all is well when the light comes back.
#[test]
fn a_dark_network_is_survived_when_short_and_named_when_long() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, near, server) = (mesh.pod("client")?, mesh.pod("near")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let _near_app = Server::start(&near.netns, 9000, apps::echo)?;
    let mut far = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut far)?;
    let mut beside = apps::dial(&client.netns, near.at(9000))?;
    assert_alive(&mut beside)?;
    let node = &mesh.net("a")?.netns;

    let dark = Dark::on(node)?;
    far.write_all(b"in the dark")?;
    assert_alive(&mut beside).context("what does not leave the node")?;
    thread::sleep(Duration::from_secs(2));
    drop(dark);
    let mut back = [0; 11];
    far.set_read_timeout(Some(PATIENCE))?;
    far.read_exact(&mut back)?;
    ensure!(&back == b"in the dark");

    let mark = mesh.a.log().mark();
    let before = Before::of(&mesh.a)?;
    let dark = Dark::on(node)?;
    let began = Instant::now();
    let (end, _) = apps::read_end(&far, Duration::from_secs(75))?;
    let took = began.elapsed();
    ensure!(end == apps::End::Reset, "{end:?}");
    ensure!(
        took > Duration::from_secs(15) && took < Duration::from_secs(70),
        "a dead tunnel was found after {took:?}"
    );
    mesh.a.wait_access(
        mark,
        &[("reason", "tunnel_lost"), ("direction", "outbound")],
    )?;
    // A new tunnel: its connect gets no answer.
    let began = Instant::now();
    let app = apps::dial(&client.netns, server.at(9000))?;
    let (end, _) = apps::read_end(&app, Duration::from_secs(30))?;
    ensure!(end == apps::End::Reset, "{end:?}");
    ensure!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    mesh.a.wait_access(mark, &[("reason", "network_policy")])?;
    before.wait_gain(
        "ztunnel_connections_total",
        &[("reason", "network_policy")],
        1.0,
    )?;
    assert_alive(&mut beside).context("what does not leave the node")?;
    drop(dark);
    wait_fate(
        &client.netns,
        server.at(9000),
        "the network to be back",
        |heard| heard.answered(),
    )?;
    Ok(())
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
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
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
    before.wait_gain(
        "ztunnel_connections_open",
        &[("direction", "outbound")],
        0.0,
    )?;
    assert_alive(&mut other)?;
    drop(crowd);
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
const COUNT: usize = 9_500;
