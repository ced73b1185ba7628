//! What strangers may do to port 15008 of a pod: garbage, silence, half a handshake. The node ends
//! it, says why, and carries everybody else meanwhile.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, End, Server},
    meshfile::MeshFile,
    netns::Netns,
    process::output,
    topology::{Builder, Topology},
    ztunnel::HBONE,
};

use crate::mesh::{Before, Mesh, PATIENCE, assert_alive, assert_echo, resident_bytes};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b")
}

fn mesh() -> Result<Mesh> {
    Mesh::start(pods(), |topology| MeshFile::of(topology).without("outside"))
}

#[test]
fn what_is_no_tls_is_ended_and_named() -> Result<()> {
    let mesh = mesh()?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let client = &mesh.pod("client")?.netns;
    let app = Server::start(&server.netns, 9000, apps::echo)?;
    assert_echo(client, server.at(9000))?;
    let noise: Vec<u8> = (0..4096_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes())
        .collect();
    let long_record = [&[0x16, 0x03, 0x01, 0xff, 0xff][..], &[0; 70_000]].concat();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    for (name, bytes) in [
        ("noise", noise),
        (
            "a plain HTTP request",
            b"GET / HTTP/1.1\r\nHost: server\r\n\r\n".to_vec(),
        ),
        (
            "a plain CONNECT",
            b"CONNECT 10.88.2.12:9000 HTTP/1.1\r\n\r\n".to_vec(),
        ),
        ("a plain HTTP/2 preface", preface),
        ("a record that is too long", long_record),
        ("nulls", vec![0; 100_000]),
    ] {
        let mark = mesh.b.log().mark();
        let before = Before::of(&mesh.b)?;
        for to in [server.at(HBONE), server.at6(HBONE)] {
            let mut stream = apps::dial(&outside.netns, to)?;
            drop(stream.write_all(&bytes));
            let (end, answer) = apps::read_end(&stream, PATIENCE)?;
            ensure!(end != End::Open, "{name}: still open");
            // An alert at most.
            ensure!(
                answer.len() <= 64,
                "{name}: {} bytes came back",
                answer.len()
            );
        }
        let line = mesh
            .b
            .wait_access(mark, &[("reason", "tls_failed")])
            .context(name)?;
        ensure!(
            line.level == "info",
            "a peer cannot cause an error: {line:?}"
        );
        before.wait_gain(
            "ztunnel_connections_total",
            &[("reason", "tls_failed")],
            2.0,
        )?;
    }
    assert_echo(client, server.at(9000))?;
    assert_eq!(app.seen().len(), 2);
    ensure!(
        !mesh.b.log().lines().iter().any(|l| l.contains("panicked")),
        "it panicked"
    );
    Ok(())
}

// 73.
#[test]
fn a_client_without_a_certificate_is_refused() -> Result<()> {
    let mesh = mesh()?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let mark = mesh.b.log().mark();
    let said = s_client(&outside.netns, server.at(HBONE), &["-alpn", "h2"])?;
    ensure!(said.contains("alert"), "no alert:\n{said}");
    mesh.b.wait_access(mark, &[("reason", "tls_failed")])?;
    Ok(())
}

// 74 (its harder form: not even the same root).
#[test]
fn a_client_with_a_certificate_of_its_own_making_is_refused() -> Result<()> {
    let mesh = mesh()?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let directory = mesh.topology.directory()?;
    let (key, certificate) = (directory.join("forged.key"), directory.join("forged.pem"));
    let (key, certificate) = (key.to_string_lossy(), certificate.to_string_lossy());
    let request = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/O=forged",
        "-addext",
        "subjectAltName=URI:spiffe://cluster.local/ns/demo/sa/client",
        "-keyout",
        &key,
        "-out",
        &certificate,
    ];
    output(None, "openssl", &request, "")?;
    let mark = mesh.b.log().mark();
    let with = ["-alpn", "h2", "-key", &key, "-cert", &certificate];
    let said = s_client(&outside.netns, server.at(HBONE), &with)?;
    ensure!(said.contains("alert"), "no alert:\n{said}");
    let line = mesh.b.wait_access(mark, &[("reason", "tls_failed")])?;
    ensure!(
        line.get("src.identity").is_none(),
        "nobody proved it: {line:?}"
    );
    Ok(())
}

// 92.
#[test]
fn stalled_handshakes_are_dropped_after_their_deadline_and_hold_nobody_up() -> Result<()> {
    let mesh = mesh()?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let client = &mesh.pod("client")?.netns;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mark = mesh.b.log().mark();
    let base = resident_bytes(mesh.b.pid())?;
    let began = Instant::now();
    // Nothing at all, or the header of a ClientHello and no more.
    let stall = |number: usize| -> Result<TcpStream> {
        let mut stream = apps::dial(&outside.netns, server.at(HBONE))?;
        if number.is_multiple_of(2) {
            stream.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01])?;
        }
        Ok(stream)
    };
    let stalled = (0..300).map(stall).collect::<Result<Vec<_>>>()?;
    for _ in 0..20 {
        let asked = Instant::now();
        assert_echo(client, server.at(9000))?;
        let took = asked.elapsed();
        ensure!(took < Duration::from_secs(8), "held up for {took:?}");
    }
    for stream in &stalled {
        let (end, _) = apps::read_end(stream, Duration::from_secs(30))?;
        ensure!(end != End::Open, "still open after {:?}", began.elapsed());
    }
    ensure!(
        began.elapsed() > Duration::from_secs(2),
        "no time was given to shake hands"
    );
    let line = mesh.b.wait_access(mark, &[("reason", "tls_timed_out")])?;
    ensure!(line.level == "info", "{line:?}");
    let grown = resident_bytes(mesh.b.pid())?.saturating_sub(base);
    ensure!(grown < 64 << 20, "it has grown by {grown} bytes");
    assert_echo(client, server.at(9000))
}

/// Clients that come and go without a word, while a tunnel is in use.
#[test]
fn connections_that_leave_without_a_word_leave_nothing_behind() -> Result<()> {
    let mesh = mesh()?;
    let (outside, server) = (mesh.pod("outside")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut stream = apps::dial(&mesh.pod("client")?.netns, server.at(9000))?;
    assert_alive(&mut stream)?;
    let before = Before::of(&mesh.b)?;
    for number in 0..200 {
        let gone = apps::dial(&outside.netns, server.at(HBONE))?;
        if number % 2 == 0 {
            apps::abort(gone)?
        } else {
            drop(gone)
        }
    }
    assert_alive(&mut stream)?;
    before.wait_gain("istio_tcp_sockets_open", &[], 0.0)?;
    before.wait_gain("ztunnel_connections_open", &[], 0.0)
}

/// What `openssl s_client` says, with its input at an end.
fn s_client(netns: &Netns, to: SocketAddr, more: &[&str]) -> Result<String> {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", netns.path().display()))
        .args([
            "timeout",
            "60",
            "openssl",
            "s_client",
            "-connect",
            &to.to_string(),
            "-tls1_3",
        ])
        .args(more)
        .stdin(Stdio::piped());
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // Held open: the verdict on a client certificate comes after the client's own Finished.
    let held = child.stdin.take();
    let out = child.wait_with_output()?;
    drop(held);
    let said = [out.stdout, out.stderr].concat();
    Ok(String::from_utf8_lossy(&said).into_owned())
}
