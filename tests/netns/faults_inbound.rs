//! Peers that misbehave where they connect to our pods: HBONE clients by hand, with a good certificate
//! and bad manners. Their tunnel ends or their streams are refused; memory stays bounded, and nobody
//! else notices.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    meshfile::MeshFile,
    peer::{self, Client, Identity},
    topology::{Builder, Topology},
    wait,
    ztunnel::HBONE,
};

use crate::mesh::{Before, Mesh, PATIENCE, assert_alive, assert_echo, resident_bytes};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b")
}

/// A mesh, and what a misbehaving client needs: `outside` is not captured and has the certificate of
/// `outside`.
struct Stage {
    mesh: Mesh,
    identity: Identity,
    _app: Server,
}

impl Stage {
    fn set(app: impl Fn(TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> Result<Self> {
        let mesh = Mesh::start(pods(), |topology| MeshFile::of(topology).without("outside"))?;
        let identity = Identity::signed(&mesh.topology, &mesh.pod("outside")?.spiffe_id())?;
        let app = Server::start(&mesh.pod("server")?.netns, 9000, app)?;
        Ok(Self {
            mesh,
            identity,
            _app: app,
        })
    }

    fn connect(&self) -> Result<Client> {
        let (outside, server) = (self.mesh.pod("outside")?, self.mesh.pod("server")?);
        Client::connect(&outside.netns, server.at(HBONE), &self.identity)
    }

    /// What the CONNECT asks for.
    fn authority(&self) -> Result<String> {
        Ok(self.mesh.pod("server")?.at(9000).to_string())
    }

    /// A well-behaved connection through node a.
    fn bystander(&self) -> Result<TcpStream> {
        let (client, server) = (self.mesh.pod("client")?, self.mesh.pod("server")?);
        let mut stream = apps::dial(&client.netns, server.at(9000))?;
        assert_alive(&mut stream)?;
        Ok(stream)
    }

    /// New connections of others still find their way, soon.
    fn assert_serving(&self) -> Result<()> {
        let (client, server) = (self.mesh.pod("client")?, self.mesh.pod("server")?);
        let began = Instant::now();
        assert_echo(&client.netns, server.at(9000))?;
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(9), "it took {took:?}");
        Ok(())
    }
}

// CVE-2023-44487: streams opened and reset at once, thousands of them.
#[test]
fn rapid_resets_end_the_tunnel_and_reach_no_application_for_long() -> Result<()> {
    let stage = Stage::set(apps::echo)?;
    let mut other = stage.bystander()?;
    let base = resident_bytes(stage.mesh.b.pid())?;
    let before = Before::of(&stage.mesh.b)?;
    let mut peer = stage.connect()?;
    let authority = stage.authority()?;
    let asked = 10_000_u32;
    for stream in (1..2 * asked).step_by(2) {
        let opened = peer.ask(stream, &authority);
        if opened.and_then(|()| peer.reset(stream, 8)).is_err() {
            break;
        }
    }
    let code = peer.wait_end();
    ensure!(
        matches!(code, Ok(None | Some(ENHANCE_YOUR_CALM))),
        "the tunnel should end: {code:?}"
    );
    assert_alive(&mut other)?;
    stage.assert_serving()?;
    before.wait_gain("ztunnel_connections_open", &[("direction", "inbound")], 0.0)?;
    let grown = resident_bytes(stage.mesh.b.pid())?.saturating_sub(base);
    ensure!(grown < 32 << 20, "it has grown by {grown} bytes");
    let panicked = |line: &String| line.contains("panicked");
    ensure!(
        !stage.mesh.b.log().lines().iter().any(panicked),
        "it panicked"
    );
    Ok(())
}

#[test]
fn more_streams_than_allowed_are_refused_and_the_rest_go_on() -> Result<()> {
    let stage = Stage::set(apps::echo)?;
    let mut peer = stage.connect()?;
    let authority = stage.authority()?;
    for stream in (1..2 * 201).step_by(2) {
        peer.ask(stream, &authority)?;
    }
    let refused = peer.wait(peer::RST_STREAM)?;
    ensure!(
        refused.payload == REFUSED_STREAM.to_be_bytes(),
        "{refused:?}"
    );
    ensure!(refused.stream == 401, "{refused:?}");
    peer.data(1, b"still here")?;
    let echoed = peer.wait(peer::DATA)?;
    ensure!(echoed.payload == b"still here", "{echoed:?}");
    stage.assert_serving()
}

#[test]
fn header_bombs_and_broken_frames_end_their_tunnel_only() -> Result<()> {
    let stage = Stage::set(apps::echo)?;
    let mut other = stage.bystander()?;
    let base = resident_bytes(stage.mesh.b.pid())?;
    let authority = stage.authority()?;
    let start = peer::block(&[(":method", "CONNECT"), (":authority", authority.as_str())]);
    let pad = "x".repeat(15_000);
    let bomb = |peer: &mut Client| -> Result<()> {
        peer.frame(peer::HEADERS, 0, 1, &start)?;
        let more = peer::block(&[("bomb", pad.as_str())]);
        for _ in 0..10_000 {
            peer.frame(peer::CONTINUATION, 0, 1, &more)?;
        }
        Ok(())
    };
    // Nothing but beginnings: a header block that never ends.
    let drip = |peer: &mut Client| -> Result<()> {
        peer.frame(peer::HEADERS, 0, 1, &start)?;
        for _ in 0..100_000 {
            peer.frame(peer::CONTINUATION, 0, 1, &[])?;
        }
        Ok(())
    };
    let too_long = |peer: &mut Client| peer.write(&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]);
    let on_zero = |peer: &mut Client| peer.frame(peer::HEADERS, peer::END_HEADERS, 0, &start);
    let no_hpack = |peer: &mut Client| peer.frame(peer::HEADERS, peer::END_HEADERS, 1, &[0xff; 64]);
    let overflow = |peer: &mut Client| {
        let most = 0x7fff_ffff_u32.to_be_bytes();
        peer.frame(peer::WINDOW_UPDATE, 0, 0, &most)?;
        peer.frame(peer::WINDOW_UPDATE, 0, 0, &most)
    };
    type Deed<'a> = &'a dyn Fn(&mut Client) -> Result<()>;
    let deeds: [(&str, Deed<'_>); 6] = [
        ("a bomb", &bomb),
        ("an endless block", &drip),
        ("a frame that is too long", &too_long),
        ("headers on stream 0", &on_zero),
        ("no HPACK", &no_hpack),
        ("a window that overflows", &overflow),
    ];
    for (name, deed) in deeds {
        let mut peer = stage.connect()?;
        // It may be cut off before it is done.
        drop(deed(&mut peer));
        peer.wait_end()
            .with_context(|| format!("{name}: the tunnel should end"))?;
        assert_alive(&mut other).context(name)?;
        stage.assert_serving().context(name)?;
    }
    let grown = resident_bytes(stage.mesh.b.pid())?.saturating_sub(base);
    ensure!(grown < 32 << 20, "it has grown by {grown} bytes");
    Ok(())
}

#[test]
fn a_wrong_authority_is_answered_and_the_tunnel_goes_on() -> Result<()> {
    let stage = Stage::set(apps::echo)?;
    let server = stage.mesh.pod("server")?;
    let client = stage.mesh.pod("client")?.at(9000).to_string();
    let own_port = server.at(HBONE).to_string();
    let no_port = server.v4.to_string();
    let (port_0, port_70000) = (format!("{no_port}:0"), format!("{no_port}:70000"));
    let mut peer = stage.connect()?;
    let mut stream = 1;
    for (authority, reason) in [
        (client.as_str(), "bad_destination"),
        (no_port.as_str(), "bad_request"),
        (port_0.as_str(), "bad_request"),
        (port_70000.as_str(), "bad_request"),
        ("nobody.demo.svc.cluster.local:80", ""),
        (own_port.as_str(), ""),
    ] {
        let mark = stage.mesh.b.log().mark();
        peer.ask(stream, authority)?;
        let answer = peer.wait(peer::HEADERS);
        let answer = answer.with_context(|| format!("{authority:?} should be answered"))?;
        ensure!(answer.stream == stream, "{answer:?}");
        ensure!(
            answer.flags & peer::END_STREAM != 0,
            "{authority}: {answer:?}"
        );
        let line = stage
            .mesh
            .b
            .wait_access(mark, &[("direction", "inbound")])?;
        let found = line.get("reason").unwrap_or_default();
        let refused = found != "complete" && (reason.is_empty() || found == reason);
        ensure!(refused, "{authority}: {line:?}");
        ensure!(line.level == "info", "{line:?}");
        stream += 2;
    }
    // What is no authority at all does not even reach us.
    peer.ask(stream, "not an authority")?;
    // Those that were answered early are reset as well.
    while peer.wait(peer::RST_STREAM)?.stream != stream {}
    stream += 2;
    peer.ask(stream, &stage.authority()?)?;
    peer.wait(peer::HEADERS)?;
    peer.data(stream, b"at last")?;
    ensure!(peer.wait(peer::DATA)?.payload == b"at last");
    Ok(())
}

#[test]
fn a_byte_per_frame_for_long_is_carried_and_costs_little() -> Result<()> {
    let stage = Stage::set(apps::echo)?;
    let base = resident_bytes(stage.mesh.b.pid())?;
    let mut peer = stage.connect()?;
    peer.ask(1, &stage.authority()?)?;
    peer.wait(peer::HEADERS)?;
    // Many frames a write, so that the node reads them in bursts.
    let burst = 1000;
    let frames = peer::frame(peer::DATA, 0, 1, b"x").repeat(burst);
    for _ in 0..60 {
        peer.write(&frames)?;
        let mut back = 0;
        while back < burst {
            back += peer.wait(peer::DATA)?.payload.len();
        }
    }
    let grown = resident_bytes(stage.mesh.b.pid())?.saturating_sub(base);
    ensure!(grown < 32 << 20, "it has grown by {grown} bytes");
    stage.assert_serving()
}

// Nobody reads them: they are counted, not kept.
#[test]
fn a_flood_of_tiny_frames_ends_its_tunnel_before_it_fills_the_memory() -> Result<()> {
    let stage = Stage::set(apps::read_nothing)?;
    let base = resident_bytes(stage.mesh.b.pid())?;
    let mut peer = stage.connect()?;
    peer.ask(1, &stage.authority()?)?;
    peer.wait(peer::HEADERS)?;
    let frames = peer::frame(peer::DATA, 0, 1, b"x").repeat(1000);
    // What the application's socket takes comes on top.
    let cut = (0..20_000).any(|_| peer.write(&frames).is_err());
    ensure!(cut, "twenty million frames were taken");
    let grown = resident_bytes(stage.mesh.b.pid())?.saturating_sub(base);
    ensure!(grown < 64 << 20, "it has grown by {grown} bytes");
    Ok(())
}

#[test]
fn empty_frames_for_ever_do_not_hold_others_up() -> Result<()> {
    let stage = Stage::set(apps::echo)?;
    let mut other = stage.bystander()?;
    let mut peer = stage.connect()?;
    peer.ask(1, &stage.authority()?)?;
    peer.wait(peer::HEADERS)?;
    let frames = peer::frame(peer::DATA, 0, 1, &[]).repeat(1000);
    for _ in 0..100 {
        if peer.write(&frames).is_err() {
            break;
        }
        assert_alive(&mut other)?;
    }
    stage.assert_serving()
}

// A peer that asks for much and takes nothing: the application's bytes wait where they are.
#[test]
fn a_window_that_stays_closed_costs_what_the_buffers_hold() -> Result<()> {
    let stage = Stage::set(|mut stream| {
        stream.read_exact(&mut [0])?;
        loop {
            stream.write_all(&[7; 1 << 16])?;
        }
    })?;
    let base = resident_bytes(stage.mesh.b.pid())?;
    let mut peers = Vec::new();
    for _ in 0..4 {
        let mut peer = stage.connect()?;
        peer.settings(&[(peer::INITIAL_WINDOW_SIZE, 0)])?;
        for stream in [1, 3, 5, 7] {
            peer.ask(stream, &stage.authority()?)?;
            peer.wait(peer::HEADERS)?;
            peer.data(stream, b"x")?;
        }
        peers.push(peer);
    }
    let pumped = |_: &()| resident_bytes(stage.mesh.b.pid()).map(|now| now.saturating_sub(base));
    let mut last = 0;
    wait::until("memory to settle", PATIENCE, || {
        let now = pumped(&()).ok()?;
        let settled = now.abs_diff(last) < 64 << 10;
        last = now;
        std::thread::sleep(Duration::from_millis(200));
        settled.then_some(())
    })?;
    // 512 KiB a stream, and the same again for what is on its way into it.
    ensure!(last < 32 << 20, "16 streams hold {last} bytes");
    let before = Before::of(&stage.mesh.b)?;
    for peer in peers {
        peer.abort()?;
    }
    before.wait_gain(
        "ztunnel_connections_open",
        &[("direction", "inbound")],
        -16.0,
    )
}

#[test]
fn more_bytes_than_the_window_allows_end_the_offender() -> Result<()> {
    let stage = Stage::set(apps::read_nothing)?;
    let mut peer = stage.connect()?;
    peer.ask(1, &stage.authority()?)?;
    peer.wait(peer::HEADERS)?;
    let frame = peer::frame(peer::DATA, 0, 1, &[7; 16_000]);
    // The window of a stream is 4 MiB.
    for _ in 0..4096 {
        if peer.write(&frame).is_err() {
            break;
        }
    }
    let ended = match peer.wait(peer::RST_STREAM) {
        Ok(reset) => reset.payload == FLOW_CONTROL_ERROR.to_be_bytes(),
        Err(_) => true,
    };
    ensure!(ended, "it may go on");
    let grown = resident_bytes(stage.mesh.b.pid())?;
    ensure!(grown < 128 << 20, "it holds {grown} bytes");
    Ok(())
}

// A peer that has proved who it is and then says nothing.
#[test]
fn a_client_that_stalls_after_tls_is_given_up_after_its_deadline() -> Result<()> {
    let stage = Stage::set(apps::echo)?;
    let (outside, server) = (stage.mesh.pod("outside")?, stage.mesh.pod("server")?);
    let began = Instant::now();
    let silent = Client::connect_tls(&outside.netns, server.at(HBONE), &stage.identity);
    let mut silent = silent?;
    stage.assert_serving()?;
    // Its SETTINGS at most, and then the end.
    while silent.read_frame()?.is_some() {}
    let took = began.elapsed();
    ensure!(took > Duration::from_secs(9), "no time was given: {took:?}");
    ensure!(took < Duration::from_secs(40), "it took {took:?}");
    Ok(())
}

// Strangers need no certificate to take places; whoever speaks finds one all the same.
#[test]
fn silent_strangers_by_the_hundreds_give_way_to_those_who_speak() -> Result<()> {
    let stage = Stage::set(apps::echo)?;
    let (outside, server) = (stage.mesh.pod("outside")?, stage.mesh.pod("server")?);
    let base = resident_bytes(stage.mesh.b.pid())?;
    let before = Before::of(&stage.mesh.b)?;
    let mark = stage.mesh.b.log().mark();
    // More than all workers have places for, on whichever they fall.
    let strangers = (0..1500)
        .map(|_| apps::dial(&outside.netns, server.at(HBONE)))
        .collect::<Result<Vec<_>>>()?;
    for _ in 0..5 {
        let began = Instant::now();
        // Each time another tunnel, which stands in the queue behind the strangers.
        let mut peer = stage.connect()?;
        peer.ask(1, &stage.authority()?)?;
        peer.wait(peer::HEADERS)?;
        let took = began.elapsed();
        ensure!(
            took < Duration::from_secs(9),
            "it took {took:?} to be served"
        );
    }
    let line = stage
        .mesh
        .b
        .wait_access(mark, &[("reason", "crowded_out")])?;
    ensure!(line.level == "info", "{line:?}");
    // Those that wait for a place push out one after the other, a second after it came.
    let crowded = [("reason", "crowded_out")];
    wait::until("many to give way", PATIENCE, || {
        let crowded = before.gained("ztunnel_connections_total", &crowded).ok()?;
        (crowded > 100.0).then_some(())
    })?;
    let grown = resident_bytes(stage.mesh.b.pid())?.saturating_sub(base);
    ensure!(grown < 48 << 20, "it has grown by {grown} bytes");
    drop(strangers);
    before.wait_gain(
        "istio_tcp_sockets_open",
        &[("reporter", "destination")],
        0.0,
    )
}

const ENHANCE_YOUR_CALM: u32 = 11;
const FLOW_CONTROL_ERROR: u32 = 3;
const REFUSED_STREAM: u32 = 7;
