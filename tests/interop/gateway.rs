//! Envoy where HTTP is understood: as the ingress in front of the mesh, and as the waypoint in the
//! middle of it.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::Server,
    certs::Authority,
    envoy::{At, Cluster, Config, Envoy, Listener, Rule, Serves, Then, Tls, To},
    mesh::Mesh,
    meshfile::{MeshFile, allow_accounts},
    netns::Netns,
    process::output,
    topology::{Builder, Pod, Topology},
    ztunnel::HBONE,
};

pub(crate) fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b")
        .pod("envoy", "b")
}

/// Only Envoy may talk to the server.
pub(crate) fn file(topology: &Topology) -> MeshFile {
    MeshFile::of(topology)
        .without("outside")
        .with_own_hbone("envoy")
        .service("web", &[VIP.into()], &[(80, APP)], &["server"])
        .policy(&allow_accounts("gateway-only", &["envoy"]))
        .attach("server", "demo/gateway-only")
}

/// The rules that both kinds of gateway apply, and HBONE out to the server.
pub(crate) fn behind(mesh: &Mesh, envoy: &Pod, rules_at: At) -> Result<Config> {
    let server = mesh.pod("server")?;
    let rule = |method, path_prefix, then| Rule {
        method,
        path_prefix,
        then,
    };
    let forward = Then::Forward {
        cluster: "to-out",
        add: vec![
            ("x-gateway", "seen"),
            ("x-client", "%FILTER_STATE(zt.client:PLAIN)%"),
        ],
    };
    let refuse = Then::Answer {
        status: 403,
        body: "not this\n",
    };
    let at = server.at(APP).to_string();
    let forwarded = "%FILTER_STATE(zt.forwarded:PLAIN)%".to_owned();
    Ok(Config {
        listeners: vec![
            Listener {
                name: "rules".to_owned(),
                at: rules_at,
                tls: None,
                serves: Serves::Http(vec![
                    rule(Some("DELETE"), "/orders", refuse),
                    rule(None, "/", forward),
                ]),
            },
            Listener {
                name: "out".to_owned(),
                at: At::Internal,
                tls: None,
                serves: Serves::Tunnel {
                    cluster: "server",
                    authority: at,
                    headers: vec![("forwarded", forwarded)],
                },
            },
        ],
        clusters: vec![
            Cluster {
                name: "to-out",
                to: To::Internal("out"),
                tls: None,
                http2: false,
            },
            Cluster {
                name: "server",
                to: To::Address(server.at(HBONE)),
                tls: Some(tls(mesh, envoy, &[server])?),
                http2: true,
            },
        ],
    })
}

pub(crate) fn tls(mesh: &Mesh, own: &Pod, peers: &[&Pod]) -> Result<Tls> {
    let directory = mesh.topology.directory()?.join("certs");
    let id = format!("URI:{}", own.spiffe_id());
    Ok(Tls {
        own: Authority::of_mesh(&mesh.topology)?.issue(&directory, &own.name, &[id])?,
        peers: peers.iter().map(|pod| pod.spiffe_id()).collect(),
    })
}

// 98, 109 (its address part), B129.
#[test]
fn envoy_as_ingress_takes_plain_http_to_a_pod_of_the_mesh() -> Result<()> {
    let mesh = Mesh::start(pods(), file)?;
    let (envoy_pod, outside) = (mesh.pod("envoy")?, mesh.pod("outside")?);
    let server = mesh.pod("server")?;
    let app = Server::start(&server.netns, APP, mirror)?;
    let at = envoy_pod.at(80);
    let config = behind(&mesh, envoy_pod, At::Socket(at))?;
    let envoy = Envoy::start(&envoy_pod.netns, &config, &mesh.topology.directory()?)?;
    let marks = (envoy.log().mark(), mesh.b.log().mark());
    let (status, head) = ask(&outside.netns, at, "GET", "/orders/1")?;
    ensure!(
        status == 200 && head.starts_with("GET /orders/1 HTTP/1.1"),
        "{status} {head}"
    );
    ensure!(head.contains("x-gateway: seen"), "{head}");
    served_for_envoy(&mesh, &app, marks.1)?;
    let line = envoy.wait_access(marks.0, &[("listener", "rules"), ("status", "200")])?;
    let from = line.get("from").context("from")?;
    ensure!(from.starts_with(&format!("{}:", outside.v4)), "{line:?}");
    refused_by_rule(&envoy, &app, &outside.netns, at)?;
    // Past the gateway there is no way.
    let (status, _) = ask(&outside.netns, server.at(APP), "GET", "/")?;
    ensure!(status == 0, "the policy let it pass: {status}");
    ensure!(app.seen().len() == 1, "{:?}", app.seen());
    Ok(())
}

/// As the application and our access line tell it: the client is Envoy, with its address and identity.
pub(crate) fn served_for_envoy(mesh: &Mesh, app: &Server, mark: usize) -> Result<()> {
    let (envoy, server) = (mesh.pod("envoy")?, mesh.pod("server")?);
    let seen = app.seen().last().copied().context("nobody came")?;
    ensure!(seen.peer.ip() == IpAddr::V4(envoy.v4), "{seen:?}");
    let (from, to) = (envoy.spiffe_id(), server.spiffe_id());
    let fields = [
        ("direction", "inbound"),
        ("src.identity", from.as_str()),
        ("src.workload", "envoy"),
        ("dst.identity", to.as_str()),
        ("dst.workload", "server"),
    ];
    mesh.b.wait_access(mark, &fields).map(drop)
}

pub(crate) fn refused_by_rule(
    envoy: &Envoy,
    app: &Server,
    from: &Netns,
    at: SocketAddr,
) -> Result<()> {
    let (mark, before) = (envoy.log().mark(), app.seen().len());
    let (status, body) = ask(from, at, "DELETE", "/orders/1")?;
    ensure!(
        (status, body.as_str()) == (403, "not this\n"),
        "{status} {body}"
    );
    let fields = [
        ("method", "DELETE"),
        ("path", "/orders/1"),
        ("status", "403"),
    ];
    envoy.wait_access(mark, &fields)?;
    ensure!(app.seen().len() == before, "the application was asked");
    Ok(())
}

/// Status and body that curl gets; status 0 where nobody answered.
pub(crate) fn ask(from: &Netns, to: SocketAddr, method: &str, path: &str) -> Result<(u16, String)> {
    let url = format!("http://{to}{path}");
    let script = format!(
        "curl --silent --noproxy '*' --max-time 60 --request {method} \
         --write-out '\\n%{{http_code}}' {url} || true"
    );
    let said = output(Some(from), "sh", &["-c", &script], "")?;
    let (body, status) = said.rsplit_once('\n').context("curl told nothing")?;
    Ok((status.parse()?, body.to_owned()))
}

/// Answers one request with its own head.
pub(crate) fn mirror(stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(());
        }
    }
    let length = head.len();
    write!(
        &stream,
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{head}"
    )
}

pub(crate) const APP: u16 = 9000;
/// No device has it.
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 90);
