//! The root of a mesh without a control plane, exchanged on disk while everything runs.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};
use ztunnel_tests::{
    apps::{self, Server},
    meshfile::MeshFile,
    peer::{Client, Identity},
    topology::{LINK, Pod, Topology},
    wait,
    wire::Sniffer,
    ztunnel::{HBONE, Node, Settings},
};

use crate::mesh::{Mesh, PATIENCE, assert_alive, assert_echo};

/// A root and its key, in PEM.
struct Root {
    certificate: String,
    key: String,
}

impl Root {
    fn of(directory: &Path) -> Result<Self> {
        Ok(Self {
            certificate: fs::read_to_string(directory.join("root-cert.pem"))?,
            key: fs::read_to_string(directory.join("root-key.pem"))?,
        })
    }

    fn new(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self {
            certificate: params.self_signed(&key)?.pem(),
            key: key.serialize_pem(),
        })
    }

    /// Puts it where it signs, with others that are trusted beside it: the key, then the certificates.
    fn install(&self, directory: &Path, others: &[&Self]) -> Result<()> {
        let certificates = others.iter().fold(self.certificate.clone(), |text, root| {
            text + "\n" + &root.certificate
        });
        replace(directory, "root-key.pem", &self.key)?;
        replace(directory, "root-cert.pem", &certificates)
    }
}

fn replace(directory: &Path, name: &str, text: &str) -> Result<()> {
    let new = directory.join("unfinished");
    fs::write(&new, text)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, directory.join(name)).with_context(|| format!("replace {name}"))
}

// B059, of the built-in CA.
#[test]
fn a_root_is_replaced_step_by_step_and_nothing_is_cut() -> Result<()> {
    let topology = Topology::builder()
        .pod("client", "a")
        .pod("outside", "a")
        .pod("server", "b")
        .build()?;
    let file = MeshFile::of(&topology).without("outside");
    let settings = Settings::of(&topology)?.env("POOL_UNUSED_RELEASE_TIMEOUT", "100ms");
    let directory = settings.ca_directory.clone();
    let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let outside = mesh.pod("outside")?;
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut long = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut long)?;
    assert_echo(&client.netns, server.at6(9000))?;

    let (old, new) = (Root::of(&directory)?, Root::new("second")?);
    let hour = Duration::from_secs(3600);
    let by_old = Identity::by(&directory, &client.spiffe_id(), hour)?;
    let aside = mesh.topology.directory()?.join("aside");
    fs::create_dir_all(&aside)?;
    new.install(&aside, &[])?;
    let by_new = Identity::by(&aside, &client.spiffe_id(), hour)?;
    ensure!(is_taken(outside, server, &by_old));
    ensure!(!is_taken(outside, server, &by_new), "before it is trusted");

    for (step, signing, trusted, takes_old, shows_new) in [
        ("both are trusted", &old, &[&new][..], true, false),
        ("the new one signs", &new, &[&old], true, true),
        ("the old one is gone", &new, &[], false, true),
    ] {
        let marks = mesh.marks();
        signing.install(&directory, trusted)?;
        wait_renewed(&mesh.a, marks.0, client).context(step)?;
        wait_renewed(&mesh.b, marks.1, server).context(step)?;
        ensure!(is_taken(outside, server, &by_new), "{step}: the new one");
        ensure!(
            is_taken(outside, server, &by_old) == takes_old,
            "{step}: the old one"
        );
        let shown =
            Client::connect_tls(&outside.netns, server.at(HBONE), &by_new)?.certificate()?;
        let (_, shown) = X509Certificate::from_der(&shown)?;
        let issuer = shown.issuer().to_string();
        ensure!(issuer.contains("second") == shows_new, "{step}: {issuer}");
        assert_new_tunnel(&mesh, client, server).context(step)?;
        assert_alive(&mut long).with_context(|| format!("{step}: what was open"))?;
    }

    // What is no root is refused, and changes nothing.
    let marks = mesh.marks();
    replace(&directory, "root-cert.pem", "not a root")?;
    for (node, mark) in [(&mesh.a, marks.0), (&mesh.b, marks.1)] {
        let refused = |line: &str| line.contains("root refused").then_some(());
        node.log()
            .wait_since(mark, "the refusal", PATIENCE, refused)?;
    }
    assert_new_tunnel(&mesh, client, server).context("after a bad one")?;

    // What is wrong may be mended without another byte.
    let third = Root::new("third")?;
    let key = directory.join("root-key.pem");
    let marks = mesh.marks();
    replace(&directory, "root-key.pem", &third.key)?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644))?;
    let both = format!("{}\n{}", third.certificate, new.certificate);
    replace(&directory, "root-cert.pem", &both)?;
    for (node, mark) in [(&mesh.a, marks.0), (&mesh.b, marks.1)] {
        let refused = |line: &str| line.contains("chmod 600").then_some(());
        node.log()
            .wait_since(mark, "the refusal", PATIENCE, refused)?;
    }
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    wait_renewed(&mesh.a, marks.0, client).context("the mode is mended")?;
    wait_renewed(&mesh.b, marks.1, server).context("the mode is mended")?;
    assert_new_tunnel(&mesh, client, server).context("under the third")?;
    assert_alive(&mut long).context("what was open after a bad one")
}

/// Waits until the pod's certificate is one under the roots of now.
fn wait_renewed(node: &Node, mark: usize, pod: &Pod) -> Result<()> {
    let id = pod.spiffe_id();
    let renewed = |line: &str| {
        let line = line.contains("under other roots") && line.contains(&id);
        line.then_some(())
    };
    node.log()
        .wait_since(mark, "the certificate", PATIENCE, renewed)
}

/// Whether a peer with this identity gets as far as HTTP/2.
fn is_taken(from: &Pod, to: &Pod, identity: &Identity) -> bool {
    let peer = Client::connect(&from.netns, to.at(HBONE), identity);
    let frame = peer.and_then(|mut peer| peer.read_frame());
    matches!(frame, Ok(Some(_)))
}

/// Asserts that a tunnel is made that no one has used before: each pause lets the last one go.
fn assert_new_tunnel(mesh: &Mesh, client: &Pod, server: &Pod) -> Result<()> {
    let sniffer = Sniffer::on(&mesh.net("a")?.netns, LINK)?;
    let began = std::time::Instant::now();
    loop {
        sniffer.clear()?;
        assert_echo(&client.netns, server.at6(9000))?;
        let seen = sniffer.seen()?;
        if seen.segments_on(HBONE).any(|s| s.syn && !s.ack) {
            return Ok(());
        }
        ensure!(
            began.elapsed() < PATIENCE,
            "the old tunnel is used for ever"
        );
        wait::until("the old tunnel to be let go", PATIENCE, || {
            let seen = sniffer.seen().ok()?;
            let gone = seen.segments_on(HBONE).any(|s| s.fin || s.rst);
            gone.then_some(())
        })?;
    }
}
