//! Revoked certificates: who holds one is refused from then on, and what it has open ends; nothing
//! else does, whatever becomes of the list's file.

use std::{fs, net::TcpStream, os::unix::fs::symlink, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    meshfile::MeshFile,
    peer::{Client, Identity, revocation_list},
    topology::{Builder, Topology},
    wait,
    ztunnel::{HBONE, Node, Settings},
};

use crate::mesh::{
    Before, Mesh, PATIENCE, WATCH, assert_alive, assert_echo, assert_refused, wait_end, wait_fate,
};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("stranger", "a")
        .pod("server", "b")
        .pod("other", "b")
}

/// A mesh in which one node follows a file of revoked certificates. The other does not: it would
/// take another certificate at once where its own is revoked.
struct Stage {
    mesh: Mesh,
    judge: &'static str,
    _apps: Vec<Server>,
}

impl Stage {
    /// The file is missing at first.
    fn set(judge: &'static str) -> Result<Self> {
        let topology = pods().build()?;
        let file = MeshFile::of(&topology);
        let settings = Settings::of(&topology)?;
        let list = topology.directory()?.join(LIST).display().to_string();
        let of_node = |node: &str| {
            let settings = settings.clone();
            if node == judge {
                settings.env("CRL_PATH", &list)
            } else {
                settings
            }
        };
        let mesh = Mesh::run(topology, |node| file.for_node(node), of_node)?;
        let mut apps = Vec::new();
        for pod in ["server", "other"] {
            apps.push(Server::start(&mesh.pod(pod)?.netns, 9000, apps::echo)?);
        }
        Ok(Self {
            mesh,
            judge,
            _apps: apps,
        })
    }

    fn judge(&self) -> &Node {
        if self.judge == "a" {
            &self.mesh.a
        } else {
            &self.mesh.b
        }
    }

    fn list(&self) -> Result<PathBuf> {
        Ok(self.mesh.topology.directory()?.join(LIST))
    }

    /// Puts a file in the place of the one before, and waits until the node has said this.
    fn put(&self, text: &str, said: &str) -> Result<()> {
        let (list, mark) = (self.list()?, self.judge().log().mark());
        let new = list.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, &list)?;
        self.wait_said(mark, said)
    }

    fn wait_said(&self, mark: usize, said: &str) -> Result<()> {
        let heard = |line: &str| line.contains(said).then_some(());
        self.judge().log().wait_since(mark, said, PATIENCE, heard)
    }

    /// The certificate with which this pod speaks now.
    fn certificate(&self, pod: &str) -> Result<Vec<u8>> {
        let pod = self.mesh.pod(pod)?;
        let identity = Identity::signed(&self.mesh.topology, &pod.spiffe_id())?;
        let from = &self.mesh.net(&pod.node)?.netns;
        Client::connect_tls(from, pod.at(HBONE), &identity)?.certificate()
    }

    fn open(&self, from: &str, to: &str) -> Result<TcpStream> {
        let (from, to) = (self.mesh.pod(from)?, self.mesh.pod(to)?);
        let mut stream = apps::dial(&from.netns, to.at(9000))?;
        assert_alive(&mut stream)?;
        Ok(stream)
    }

    /// The list with these certificates, in force.
    fn revoke(&self, certificates: &[&[u8]]) -> Result<()> {
        let list = revocation_list(&self.mesh.topology, certificates, false)?;
        self.put(&list, REPLACED)
    }

    /// What the judge says of a connection that is refused, or cut, because of a certificate.
    fn assert_judged(&self, mark: usize, direction: &str) -> Result<()> {
        let fields = [("reason", "cert_revoked"), ("direction", direction)];
        let line = self.judge().wait_access(mark, &fields)?;
        ensure!(
            line.get("error").is_some_and(|e| e.contains("revoked")),
            "{line:?}"
        );
        Ok(())
    }
}

// 143, 145, B061, B062.
#[test]
fn a_revoked_server_is_refused_by_its_clients_node_and_cut_off_at_once() -> Result<()> {
    let stage = Stage::set("a")?;
    let warned = |line: &str| line.contains("the file is missing").then_some(());
    stage
        .judge()
        .log()
        .wait_since(0, "a warning", PATIENCE, warned)?;
    let (client, server) = (stage.mesh.pod("client")?, stage.mesh.pod("server")?);
    let open = stage.open("client", "server")?;
    let mut other = stage.open("client", "other")?;
    let before = Before::of(&stage.mesh.a)?;
    let mark = stage.mesh.a.log().mark();

    stage.revoke(&[&stage.certificate("server")?])?;
    let (_, took) = wait_end(&open)?;
    ensure!(took < Duration::from_secs(20), "it took {took:?}");
    stage.assert_judged(mark, "outbound")?;
    let mark = stage.mesh.a.log().mark();
    assert_refused(&client.netns, server.at(9000))?;
    assert_refused(&client.netns, server.at6(9000))?;
    stage.assert_judged(mark, "outbound")?;
    assert_alive(&mut other).context("a tunnel of another identity")?;
    assert_echo(&client.netns, stage.mesh.pod("other")?.at(9000))?;

    let source = [("reporter", "source")];
    before.wait_gain("istio_crl_policy_rejections_total", &source, 3.0)?;
    let labels = [("reporter", "source"), ("response_flags", "CERT_REVOKED")];
    before.wait_gain("istio_tcp_connections_failed_total", &labels, 3.0)
}

// 144, 145.
#[test]
fn a_revoked_client_is_refused_by_the_servers_node_and_cut_off_at_once() -> Result<()> {
    let stage = Stage::set("b")?;
    let (client, server) = (stage.mesh.pod("client")?, stage.mesh.pod("server")?);
    let open = stage.open("client", "server")?;
    let mut stranger = stage.open("stranger", "server")?;
    let before = Before::of(&stage.mesh.b)?;
    let mark = stage.mesh.b.log().mark();

    stage.revoke(&[&stage.certificate("client")?])?;
    wait_end(&open)?;
    stage.assert_judged(mark, "inbound")?;
    let mark = stage.mesh.b.log().mark();
    assert_refused(&client.netns, server.at(9000))?;
    stage.assert_judged(mark, "inbound")?;
    assert_alive(&mut stranger).context("a tunnel of another identity")?;
    assert_echo(&stage.mesh.pod("stranger")?.netns, server.at(9000))?;

    let destination = [("reporter", "destination")];
    let refused = before.gained("istio_crl_policy_rejections_total", &destination)?;
    ensure!(refused >= 2.0, "{refused} counted");
    Ok(())
}

// 146.
#[test]
fn a_list_is_taken_by_a_swapped_link_and_garbage_keeps_the_one_before() -> Result<()> {
    let stage = Stage::set("a")?;
    let (client, server) = (stage.mesh.pod("client")?, stage.mesh.pod("server")?);
    let to = server.at(9000);
    let list = revocation_list(
        &stage.mesh.topology,
        &[&stage.certificate("server")?],
        false,
    )?;
    let directory = stage.mesh.topology.directory()?;
    // As Kubernetes mounts a ConfigMap: the file is a link through a link that is exchanged.
    for (version, text) in [("first", ""), ("second", list.as_str())] {
        let of_version = directory.join(version);
        fs::create_dir(&of_version)?;
        fs::write(of_version.join(LIST), text)?;
        let mark = stage.judge().log().mark();
        symlink(version, directory.join("data-new"))?;
        fs::rename(directory.join("data-new"), directory.join("data"))?;
        if version == "first" {
            symlink(format!("data/{LIST}"), stage.list()?)?;
        }
        stage.wait_said(mark, REPLACED)?;
        if version == "first" {
            assert_echo(&client.netns, to)?;
        } else {
            wait_fate(&client.netns, to, "the refusal", crate::mesh::is_refused)?;
        }
    }
    let good = list.replacen("-----END", "garbage\n-----END", 1);
    for garbage in ["garbage", good.as_str()] {
        let mark = stage.judge().log().mark();
        stage.put(garbage, "revocation lists refused; those before stay")?;
        let named = |line: &str| (line.contains("refused") && line.contains(LIST)).then_some(());
        let log = stage.judge().log();
        log.wait_since(mark, "the file's name", PATIENCE, named)?;
        assert_refused(&client.netns, to)?;
    }
    let mark = stage.judge().log().mark();
    fs::remove_file(stage.list()?)?;
    stage.wait_said(mark, "those before stay")?;
    assert_refused(&client.netns, to)?;
    stage.put("", REPLACED)?;
    assert_echo(&client.netns, to)
}

// 147.
#[test]
fn an_outdated_list_and_an_issuer_without_one_are_no_obstacle() -> Result<()> {
    for judge in ["a", "b"] {
        let stage = Stage::set(judge)?;
        let (client, server) = (stage.mesh.pod("client")?, stage.mesh.pod("server")?);
        let mut open = stage.open("client", "server")?;
        let unused = Identity::signed(&stage.mesh.topology, "spiffe://cluster.local/ns/x/sa/y")?;
        let outdated = revocation_list(&stage.mesh.topology, &[unused.certificate()?], true)?;
        for list in [outdated.as_str(), ELSEWHERE] {
            stage.put(list, REPLACED)?;
            assert_alive(&mut open)?;
            assert_echo(&client.netns, server.at(9000))?;
            assert_echo(&client.netns, server.at6(9000))?;
        }
        // What an outdated list names is revoked all the same.
        let pod = if judge == "a" { "server" } else { "client" };
        let certificate = stage.certificate(pod)?;
        let list = revocation_list(&stage.mesh.topology, &[&certificate], true)?;
        stage.put(&list, REPLACED)?;
        wait_end(&open)?;
        assert_refused(&client.netns, server.at(9000))?;
    }
    Ok(())
}

// Between two pods of one node no certificate is shown, but each end stands on one.
#[test]
fn a_node_gives_up_its_own_revoked_certificate_and_what_stands_on_it() -> Result<()> {
    let stage = Stage::set("b")?;
    let (server, other) = (stage.mesh.pod("server")?, stage.mesh.pod("other")?);
    let near = stage.open("other", "server")?;
    let far = stage.open("client", "server")?;
    let mut beside = stage.open("client", "other")?;
    let first = stage.certificate("server")?;
    let mark = stage.mesh.b.log().mark();
    stage.revoke(&[&first])?;
    wait_end(&near).context("from the same node")?;
    wait_end(&far).context("from the other node")?;
    for direction in ["inbound", "outbound"] {
        stage.assert_judged(mark, direction)?;
    }
    assert_alive(&mut beside)?;
    // Another certificate is signed at once, and whoever comes is served.
    for from in [other, stage.mesh.pod("client")?] {
        wait_fate(
            &from.netns,
            server.at(9000),
            "another certificate",
            apps::Heard::answered,
        )?;
    }
    let second = wait::until("another certificate", PATIENCE, || {
        stage.certificate("server").ok()
    })?;
    ensure!(first != second, "it still shows the revoked one");
    ensure!(
        apps::read_end(&beside, WATCH)?.0 == apps::End::Open,
        "cut later"
    );
    Ok(())
}

const LIST: &str = "crl.pem";
const REPLACED: &str = "revocation lists replaced";

/// An authority that nobody here knows: `openssl ecparam`, `openssl req -x509 -subj /CN=elsewhere`,
/// `openssl ca -gencrl`, ten years, one certificate of which is revoked.
const ELSEWHERE: &str = "\
-----BEGIN X509 CRL-----\n\
MIHjMIGKAgEBMAoGCCqGSM49BAMCMBQxEjAQBgNVBAMMCWVsc2V3aGVyZRcNMjYx\n\
MTIxMTU1MjM2WhcNMzYxMTE4MTU1MjM2WjAUMBICAQEXDTI2MTEyMTE1NTIzNlqg\n\
LzAtMB8GA1UdIwQYMBaAFEtDG9eJvPguY8T6gqkJjv+MCXdXMAoGA1UdFAQDAgEB\n\
MAoGCCqGSM49BAMCA0gAMEUCICvoN69db9Mazyk5TpzsxhC/LRBiIgYbAdtyekqU\n\
eWa1AiEA7tinOQA78C79+UdGJAS8zT0Jm1iF/diTYmEjdl/QP1Q=\n\
-----END X509 CRL-----\n";
