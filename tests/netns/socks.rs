//! SOCKS5 on a pod's loopback device: whoever asks it goes the ways of every other connection of the
//! pod, and whoever asks for something else is told so.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, End, Server},
    meshfile::{self, MeshFile},
    netns::Netns,
    process::output,
    programs::Nginx,
    topology::{Builder, Topology},
    ztunnel::{HBONE, Settings},
};

use crate::mesh::{Before, Mesh, PATIENCE, REQUEST, assert_alive, is_refused, knock};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("other", "a")
        .pod("server", "b")
}

fn file(topology: &Topology) -> MeshFile {
    let vip = IpAddr::V4(VIP);
    MeshFile::of(topology)
        .service("web", &[vip], &[(80, 8080)], &["server"])
        .policy(&meshfile::allow_accounts("clients", &["client"]))
        .attach("server", "demo/clients")
}

fn mesh() -> Result<Mesh> {
    let topology = pods().build()?;
    let file = file(&topology);
    let settings = Settings::of(&topology)?.env("UNSTABLE_ENABLE_SOCKS5", "true");
    Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())
}

/// What a server says of its client, asked for by SOCKS5: `how` is curl's way to say so.
fn fetch(mesh: &Mesh, how: &str, url: &str) -> Result<String> {
    let client = &mesh.pod("client")?.netns;
    let proxy = SOCKS.to_string();
    let patience = PATIENCE.as_secs().to_string();
    let args = [
        "--silent",
        "--show-error",
        // Whatever the machine's environment says.
        "--noproxy",
        "",
        "--max-time",
        &patience,
        how,
        &proxy,
        url,
    ];
    output(Some(client), "curl", &args, "").with_context(|| url.to_owned())
}

// 140, 141.
#[test]
fn curl_by_socks_goes_the_ways_of_the_mesh() -> Result<()> {
    let mesh = mesh()?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let directory = mesh.topology.directory()?;
    let _nginx = Nginx::start(&server.netns, 8080, &directory)?;
    let host = mesh.net("b")?;
    let _outside = Nginx::start(&host.netns, 8080, &directory)?;
    let (own4, own6) = (client.v4.to_string(), client.v6.to_string());
    let far = SocketAddr::new(IpAddr::V4(host.v4), 8080);
    for (how, url, peer, hbone) in [
        (
            "--socks5",
            format!("http://{}/whoami", server.at(8080)),
            &own4,
            true,
        ),
        (
            "--socks5",
            format!("http://{}/whoami", server.at6(8080)),
            &own6,
            true,
        ),
        ("--socks5", format!("http://{VIP}/whoami"), &own4, true),
        ("--socks5-hostname", WEB.to_owned(), &own4, true),
        ("--socks5", format!("http://{far}/whoami"), &own4, false),
    ] {
        let before = Before::of(&mesh.a)?;
        let mark = mesh.a.log().mark();
        let said = fetch(&mesh, how, &url)?;
        ensure!(
            said.lines().any(|line| line == format!("peer={peer}")),
            "{url}: {said}"
        );
        let fields = [("reason", "complete"), ("direction", "outbound")];
        let line = mesh.a.wait_access(mark, &fields)?;
        before.wait_gain("ztunnel_connections_total", &fields, 1.0)?;
        ensure!(line.get("src.workload") == Some("client"), "{line:?}");
        let proven = line.get("dst.identity") == Some(server.spiffe_id().as_str());
        ensure!(proven == hbone, "{url}: {line:?}");
        let source = line.get("src.addr").unwrap_or_default();
        ensure!(source.contains(peer.as_str()), "{url}: {line:?}");
    }
    Ok(())
}

// 141, 142.
#[test]
fn what_socks_cannot_do_is_answered_and_recorded() -> Result<()> {
    let mesh = mesh()?;
    let client = &mesh.pod("client")?.netns;
    let welcome: &[u8] = &[5, 0];
    let refused: &[u8] = &[5, 7, 0, 1, 0, 0, 0, 0, 0, 0];
    let unreachable: &[u8] = &[5, 4, 0, 1, 0, 0, 0, 0, 0, 0];
    let of = |command: u8| [&[5, 1, 0, 5, command, 0, 1], &[10, 88, 2, 11, 31, 144][..]].concat();
    // A label that no name server is asked for.
    let mut nobody = vec![5, 1, 0, 5, 1, 0, 3, 100];
    nobody.extend([b'x'; 100]);
    nobody.extend([0, 80]);
    for (name, said, answer, reason) in [
        ("BIND", of(2), [welcome, refused].concat(), "bad_request"),
        (
            "UDP ASSOCIATE",
            of(3),
            [welcome, refused].concat(),
            "bad_request",
        ),
        (
            "SOCKS4",
            vec![4, 1, 0, 80, 10, 0, 0, 1, 0],
            refused.to_vec(),
            "bad_request",
        ),
        ("a password", vec![5, 1, 2], refused.to_vec(), "bad_request"),
        (
            "HTTP",
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            refused.to_vec(),
            "bad_request",
        ),
        (
            "nobody",
            nobody,
            [welcome, unreachable].concat(),
            "no_endpoint",
        ),
    ] {
        let before = Before::of(&mesh.a)?;
        let mark = mesh.a.log().mark();
        let mut stream = begin(client, &said)?;
        let mut heard = vec![0; answer.len()];
        stream
            .read_exact(&mut heard)
            .with_context(|| format!("the answer to {name}"))?;
        ensure!(heard == answer, "{name}: {heard:?}");
        let fields = [("reason", reason), ("direction", "outbound")];
        mesh.a.wait_access(mark, &fields).context(name)?;
        before.wait_gain("ztunnel_connections_total", &fields, 1.0)?;
    }
    // Back to the node proxy itself.
    let mark = mesh.a.log().mark();
    let _stream = begin(client, &[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 58, 232])?;
    mesh.a.wait_access(mark, &[("reason", "self_call")])?;
    Ok(())
}

/// Opens a connection to the proxy of a pod and says so much.
fn begin(netns: &Netns, said: &[u8]) -> Result<TcpStream> {
    let mut stream = apps::dial(netns, SOCKS)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(said)?;
    Ok(stream)
}

// 140.
#[test]
fn policy_and_encryption_are_those_of_every_other_connection() -> Result<()> {
    let mesh = mesh()?;
    let (client, other, server) = (mesh.pod("client")?, mesh.pod("other")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 8080, apps::echo)?;
    let [a, b, c, d] = server.v4.octets();
    let request = [&[5, 1, 0, 5, 1, 0, 1, a, b, c, d, 31, 144], REQUEST].concat();
    let success = [5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0];

    let sniffer = mesh.sniffer()?;
    let mut allowed = begin(&client.netns, &request)?;
    let mut heard = vec![0; success.len() + REQUEST.len()];
    allowed.read_exact(&mut heard)?;
    ensure!(heard == [&success, REQUEST].concat(), "{heard:?}");
    let seen = sniffer.seen()?;
    ensure!(seen.count(REQUEST)? == 0, "the request is in plaintext");
    ensure!(seen.segments_on(HBONE).count() > 0, "nothing was tunnelled");

    let marks = mesh.marks();
    let before = (Before::of(&mesh.a)?, Before::of(&mesh.b)?);
    let refused = begin(&other.netns, &request)?;
    let (end, heard) = apps::read_end(&refused, PATIENCE)?;
    ensure!(end == End::Reset, "{end:?}: {heard:?}");
    let counted = "ztunnel_connections_total";
    let fields = [("reason", "peer_refused"), ("direction", "outbound")];
    mesh.a.wait_access(marks.0, &fields)?;
    before.0.wait_gain(counted, &fields, 1.0)?;
    let fields = [("reason", "policy_denied"), ("direction", "inbound")];
    let line = mesh.b.wait_access(marks.1, &fields)?;
    before.1.wait_gain(counted, &fields, 1.0)?;
    ensure!(
        line.get("src.identity") == Some(other.spiffe_id().as_str()),
        "{line:?}"
    );
    assert_alive(&mut allowed)
}

// 142.
#[test]
fn whoever_stops_in_the_middle_is_left_and_disturbs_nobody() -> Result<()> {
    let mesh = mesh()?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _nginx = Nginx::start(&server.netns, 8080, &mesh.topology.directory()?)?;
    let before = Before::of(&mesh.a)?;
    let mark = mesh.a.log().mark();
    let parts: [&[u8]; 4] = [
        b"",
        b"\x05\x02\x00",
        b"\x05\x01\x00",
        b"\x05\x01\x00\x05\x01\x00\x03\x09web",
    ];
    let silent = parts
        .iter()
        .map(|said| begin(&client.netns, said))
        .collect::<Result<Vec<_>>>()?;
    let said = fetch(&mesh, "--socks5-hostname", WEB)?;
    ensure!(said.contains(&client.v4.to_string()), "{said}");
    for stream in &silent {
        let (end, _) = apps::read_end(stream, LONG)?;
        ensure!(end != End::Open, "still open after {LONG:?}");
    }
    let fields = [("reason", "bad_request"), ("direction", "outbound")];
    let line = mesh.a.wait_access(mark, &fields)?;
    let took = line.get("duration").context("no duration")?;
    let took: u64 = took.trim_end_matches("ms").parse()?;
    ensure!(took >= 15_000, "{line:?}");
    before.wait_gain("ztunnel_connections_total", &fields, 4.0)
}

#[test]
fn socks_is_off_unless_it_is_wanted() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let fate = knock(&mesh.pod("client")?.netns, SOCKS, b"\x05\x01\x00", PATIENCE)?;
    ensure!(is_refused(&fate), "{fate:?}");
    Ok(())
}

const SOCKS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15080);
/// Longer than a client is waited for, on a machine that does much else.
const LONG: Duration = Duration::from_secs(60);
const WEB: &str = "http://web.demo.svc.cluster.local/whoami";
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
