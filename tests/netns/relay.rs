//! Bytes, ends and pressure: what a connection carries arrives whole, and its end arrives as what it
//! was.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::AsFd as _,
    sync::{Barrier, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};
use socket2::{Domain, Socket, Type};
use ztunnel_tests::{
    access::Line,
    apps::{self, End, Server},
    bulk,
    meshfile::MeshFile,
    netns::Netns,
    topology::{Builder, Topology},
    wait,
    ztunnel::HBONE,
};

use crate::mesh::{Before, Mesh, PATIENCE, assert_alive, assert_echo, resident_bytes, wait_end};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("near", "a")
        .pod("server", "b")
}

// 122, 124 (while the others run), 125, 130, B126, B130.
#[test]
fn every_size_arrives_whole_both_ways_and_memory_stays_bounded() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _echo = Server::start(&server.netns, 9001, apps::echo)?;
    let _bulk = Server::start(&server.netns, 9000, bulk::serve)?;
    let mut idle = apps::dial(&client.netns, server.at(9001))?;
    assert_alive(&mut idle)?;
    let base = [resident_bytes(mesh.a.pid())?, resident_bytes(mesh.b.pid())?];
    for (bytes, to) in [
        (0, server.at(9000)),
        (1, server.at(9000)),
        (1, server.at6(9000)),
        (16 << 10, server.at(9000)),
        (1 << 20, server.at(9000)),
        (1 << 20, server.at6(9000)),
        (256 << 20, server.at(9000)),
    ] {
        let marks = mesh.marks();
        let before = Before::of(&mesh.a)?;
        let done = bulk::exchange(&client.netns, to, bytes, 7)?;
        assert_eq!(done.bytes_each_way, bytes);
        // Length and seed go up first, both checksums come down last.
        let (up, down) = ((bytes + 16).to_string(), (bytes + 16).to_string());
        let line = mesh
            .a
            .wait_access(marks.0, &[("bytes_sent", &up), ("bytes_recv", &down)])?;
        assert_eq!(line.get("reason"), Some("complete"), "{line:?}");
        mesh.b
            .wait_access(marks.1, &[("bytes_sent", &down), ("bytes_recv", &up)])?;
        // Exact in binary: far below 2^53.
        let (up, down): (f64, f64) = (up.parse()?, down.parse()?);
        before.wait_gain(
            "istio_tcp_received_bytes_total",
            &[("reporter", "source")],
            up,
        )?;
        before.wait_gain(
            "istio_tcp_sent_bytes_total",
            &[("reporter", "source")],
            down,
        )?;
    }
    for (pid, base) in [mesh.a.pid(), mesh.b.pid()].into_iter().zip(base) {
        let grown = resident_bytes(pid)?.saturating_sub(base);
        assert!(
            grown < MEMORY_BYTES,
            "process {pid} has grown by {grown} bytes"
        );
    }
    assert_alive(&mut idle).context("the connection that was idle meanwhile")
}

// 20 (its good half), 21, 124.
#[test]
fn a_connection_without_traffic_stays_open() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _echo = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = mesh.sniffer()?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    let before = sniffer.seen()?.tls_records(HBONE).application_data;
    // Longer than the interval of the tunnel's pings, which is 10 s.
    let (end, bytes) = apps::read_end(&stream, Duration::from_secs(12))?;
    assert_eq!((end, bytes.len()), (End::Open, 0));
    wait::until("a ping and its answer in the silence", PATIENCE, || {
        let seen = sniffer.seen().ok()?;
        let after = seen.tls_records(HBONE).application_data;
        (after >= before + 2).then_some(())
    })?;
    assert_alive(&mut stream)
}

// 118, 119.
#[test]
fn either_side_may_end_its_direction_first() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server, near) = (mesh.pod("client")?, mesh.pod("server")?, mesh.pod("near")?);
    for app in [server, near] {
        let _count = Server::start(&app.netns, 9000, apps::count_until_eof)?;
        for to in [app.at(9000), app.at6(9000)] {
            let reply = apps::ask(&client.netns, to, &[7; 100_000])?;
            assert_eq!(reply.text(), "received 100000");
        }
        let (tell, told) = mpsc::channel();
        let tell = Mutex::new(tell);
        let _first = Server::start(&app.netns, 9001, move |mut stream| {
            stream.write_all(b"that was all")?;
            stream.shutdown(Shutdown::Write)?;
            let received = io::copy(&mut stream, &mut io::sink());
            tell.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .send(received)
                .map_err(io::Error::other)
        })?;
        let mark = mesh.a.log().mark();
        let mut stream = apps::dial(&client.netns, app.at(9001))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        assert_eq!(text, "that was all");
        stream
            .write_all(&[7; 200_000])
            .context("the other direction must still work")?;
        stream.shutdown(Shutdown::Write)?;
        assert_eq!(told.recv_timeout(PATIENCE)??, 200_000);
        let fields = [
            ("bytes_sent", "200000"),
            ("bytes_recv", "12"),
            ("direction", "outbound"),
        ];
        let line = mesh.a.wait_access(mark, &fields)?;
        assert_eq!(line.get("reason"), Some("complete"), "{line:?}");
    }
    Ok(())
}

// 120, 121: a reset arrives as a reset, and the tunnel's other streams do not notice.
#[test]
fn a_reset_arrives_as_a_reset_in_both_directions() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server, near) = (mesh.pod("client")?, mesh.pod("server")?, mesh.pod("near")?);
    for app in [server, near] {
        let _echo = Server::start(&app.netns, 9000, apps::echo)?;
        let _reset = Server::start(&app.netns, 9001, apps::reset)?;
        let (tell, told) = mpsc::channel();
        let tell = Mutex::new(tell);
        let _reads = Server::start(&app.netns, 9002, move |mut stream| {
            stream.read_exact(&mut [0])?;
            stream.write_all(b"y")?;
            let end = stream.read(&mut [0]).map_err(|e| e.kind());
            tell.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .send(end)
                .map_err(io::Error::other)
        })?;
        let mut other = apps::dial(&client.netns, app.at(9000))?;
        assert_alive(&mut other)?;
        for to in [app.at(9001), app.at6(9001)] {
            let mark = mesh.a.log().mark();
            let mut stream = apps::dial(&client.netns, to)?;
            stream.write_all(b"x")?;
            assert_eq!(wait_end(&stream)?.0, End::Reset, "the server's reset, {to}");
            let fields = [
                ("reason", "reset"),
                ("direction", "outbound"),
                ("bytes_sent", "1"),
            ];
            mesh.a.wait_access(mark, &fields)?;
        }
        let (mark, mark_b) = mesh.marks();
        let mut stream = apps::dial(&client.netns, app.at(9002))?;
        stream.write_all(b"x")?;
        // A reset takes along what is on its way, so it waits for the answer.
        stream.read_exact(&mut [0])?;
        apps::abort(stream)?;
        let end = told.recv_timeout(PATIENCE)?;
        assert_eq!(end, Err(ErrorKind::ConnectionReset), "the client's reset");
        let fields = [
            ("reason", "reset"),
            ("direction", "outbound"),
            ("bytes_sent", "1"),
        ];
        mesh.a.wait_access(mark, &fields)?;
        if app.name == "server" {
            mesh.b
                .wait_access(mark_b, &[("reason", "reset"), ("direction", "inbound")])?;
        }
        assert_alive(&mut other).context("another stream of the same tunnel")?;
    }
    Ok(())
}

// What a kernel answers for a socket that is gone is routed anew: it must find the way back to us.
#[test]
fn an_application_that_vanishes_without_a_word_is_answered_for_inside_its_pod() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let (go, gate) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    let both = Mutex::new((gate, tell));
    let _speaks = Server::start(&server.netns, 9000, move |mut stream| {
        stream.read_exact(&mut [0])?;
        stream.write_all(b"y")?;
        let both = both.lock().unwrap_or_else(PoisonError::into_inner);
        both.0.recv_timeout(PATIENCE).map_err(io::Error::other)?;
        // The reset answers what is said here, or what was said before and not acknowledged.
        let end = stream
            .write_all(b"are you there?")
            .and_then(|()| stream.read(&mut [0]));
        both.1
            .send(end.map_err(|e| e.kind()))
            .map_err(io::Error::other)
    })?;
    let sniffer = mesh.sniffer()?;
    for to in [server.at(9000), server.at6(9000)] {
        let mut app = apps::dial(&client.netns, to)?;
        app.write_all(b"x")?;
        // From here on it owes nobody an answer: what came is acknowledged, what it sent was answered.
        app.read_exact(&mut [0])?;
        // A socket under repair is closed without a packet.
        setsockopt(&app, sockopt::TcpRepair, &1)?;
        drop(app);
        go.send(())?;
        let end = told.recv_timeout(PATIENCE)?;
        assert_eq!(end, Err(ErrorKind::ConnectionReset), "{to}");
        let seen = sniffer.seen()?;
        let other = seen
            .segments()
            .find(|s| s.src.port() != HBONE && s.dst.port() != HBONE);
        assert!(other.is_none(), "{to}: on the link: {other:?}");
    }
    Ok(())
}

// 90 (one stalled stream), 123, B126.
#[test]
fn a_reader_that_stops_holds_its_sender_back_and_nobody_else() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _echo = Server::start(&server.netns, 9001, apps::echo)?;
    let (go, gate) = mpsc::channel();
    let gate = Mutex::new(gate);
    let _stalls = Server::start(&server.netns, 9000, move |stream| {
        let gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.recv_timeout(Duration::from_secs(300))
            .map_err(io::Error::other)?;
        drop(gate);
        apps::count_until_eof(stream.try_clone()?)?;
        stream.shutdown(Shutdown::Write)
    })?;
    let base = [resident_bytes(mesh.a.pid())?, resident_bytes(mesh.b.pid())?];
    let before = Before::of(&mesh.a)?;
    let mut stream = apps::dial(&client.netns, server.at(9000))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let block = vec![7; 64 * 1024];
    let mut sent: u64 = 0;
    while sent < LIMIT_BYTES {
        // Nothing has moved for the whole time-out: the sender is held back.
        match stream.write(&block) {
            Ok(length) => sent += u64::try_from(length)?,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e).context("write"),
        }
    }
    assert!(sent < LIMIT_BYTES, "the sender was never held back");
    let counted = before.gained("istio_tcp_received_bytes_total", &[("reporter", "source")])?;
    assert!(counted > 0.0, "bytes are counted while they move");
    for (pid, base) in [mesh.a.pid(), mesh.b.pid()].into_iter().zip(base) {
        let grown = resident_bytes(pid)?.saturating_sub(base);
        assert!(
            grown < MEMORY_BYTES,
            "process {pid} has grown by {grown} bytes"
        );
    }
    assert_echo(&client.netns, server.at(9001)).context("another stream of the tunnel")?;
    go.send(())?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&block)?;
    sent += u64::try_from(block.len())?;
    stream.shutdown(Shutdown::Write)?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    assert_eq!(reply, format!("received {sent}"));
    Ok(())
}

// 22, 23, 24.
#[test]
fn connections_share_tunnels_up_to_the_limit_and_all_work() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _echo = Server::start(&server.netns, 9000, apps::echo)?;
    let sniffer = mesh.sniffer()?;
    let tunnels = || -> Result<usize> {
        let seen = sniffer.seen()?;
        let opened = seen.segments_on(HBONE).filter(|s| s.syn && !s.ack);
        let mut clients: Vec<_> = opened.map(|s| s.src).collect();
        clients.sort_unstable();
        clients.dedup();
        Ok(clients.len())
    };
    // Pools belong to workers: one after the other, each worker opens one tunnel at most.
    for _ in 0..10 {
        assert_echo(&client.netns, server.at(9000))?;
    }
    let few = tunnels()?;
    assert!(
        (1..=WORKERS).contains(&few),
        "{few} tunnels for 10 connections in a row"
    );
    let before = Before::of(&mesh.a)?;
    let mut streams = together(&client.netns, server.at(9000), 200)?;
    for stream in &mut streams {
        assert_alive(stream)?;
    }
    let many = tunnels()?;
    // A hundred streams a tunnel.
    assert!(
        (2..=2 * WORKERS).contains(&many),
        "{many} tunnels for 200 connections"
    );
    before.wait_gain(
        "ztunnel_connections_open",
        &[("direction", "outbound")],
        200.0,
    )?;
    drop(streams);
    before.wait_gain(
        "ztunnel_connections_open",
        &[("direction", "outbound")],
        0.0,
    )?;
    before.wait_gain("istio_tcp_connections_closed_total", &[], 200.0)?;
    before.wait_gain("istio_tcp_connections_failed_total", &[], 0.0)
}

#[test]
fn a_thousand_connections_at_once_all_succeed() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _echo = Server::start(&server.netns, 9000, apps::echo)?;
    let before = [Before::of(&mesh.a)?, Before::of(&mesh.b)?];
    let mut streams = together(&client.netns, server.at(9000), 1000)?;
    let mut check = || streams.iter_mut().try_for_each(assert_alive);
    check().with_context(|| {
        let lines = [&mesh.a, &mesh.b].map(|node| node.access_lines());
        let bad = |line: &&Line| line.get("error").is_some();
        let bad: Vec<_> = lines.iter().flatten().filter(bad).take(5).collect();
        format!("{bad:#?}")
    })?;
    before[0].wait_gain(
        "ztunnel_connections_open",
        &[("direction", "outbound")],
        1000.0,
    )?;
    before[1].wait_gain(
        "ztunnel_connections_open",
        &[("direction", "inbound")],
        1000.0,
    )?;
    drop(streams);
    for before in &before {
        before.wait_gain("ztunnel_connections_open", &[], 0.0)?;
        before.wait_gain("istio_tcp_connections_closed_total", &[], 1000.0)?;
        before.wait_gain("istio_tcp_connections_failed_total", &[], 0.0)?;
    }
    Ok(())
}

#[test]
fn a_connect_that_does_not_block_says_when_it_is_done() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _echo = Server::start(&server.netns, 9000, apps::echo)?;
    for to in [server.at(9000), server.at6(9000)] {
        let socket = client.netns.within(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            match socket.connect(&to.into()) {
                Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
                other => anyhow::bail!("connect to {to} gave {other:?}"),
            }
        })?;
        let mut watched = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        let ready = poll(&mut watched, PollTimeout::try_from(PATIENCE)?)?;
        assert_eq!(ready, 1, "the socket never became writable");
        ensure!(socket.take_error()?.is_none(), "the connect failed");
        socket.set_nonblocking(false)?;
        let mut stream = TcpStream::from(socket);
        assert_eq!(stream.peer_addr()?, to);
        assert_alive(&mut stream)?;
    }
    Ok(())
}

/// This many connections, begun at the same moment.
fn together(netns: &Netns, to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let barrier = Barrier::new(count);
    netns.within(|| {
        thread::scope(|scope| {
            let connect = || {
                barrier.wait();
                let began = Instant::now();
                TcpStream::connect_timeout(&to, PATIENCE)
                    .with_context(|| format!("after {:?}", began.elapsed()))
            };
            // Threads inherit the namespace of the one that makes them.
            let start = |_| {
                thread::Builder::new()
                    .stack_size(256 * 1024)
                    .spawn_scoped(scope, connect)
            };
            let threads = (0..count).map(start).collect::<io::Result<Vec<_>>>()?;
            let join = |t: thread::ScopedJoinHandle<'_, _>| t.join().ok().context("a panic")?;
            threads.into_iter().map(join).collect()
        })
    })
}

/// What a node process may grow by under one busy or stalled connection: the windows of HTTP/2 (16
/// MiB each way), and what the allocator keeps.
const MEMORY_BYTES: u64 = 96 << 20;
/// Far beyond every buffer on the way, the kernel's included.
const LIMIT_BYTES: u64 = 256 << 20;
/// Of a node process on a small machine; see `ZTUNNEL_WORKER_THREADS`.
const WORKERS: usize = 2;
