//! The file changes while the node runs: however it is written, it is followed, and traffic does not
//! notice.

use std::{
    fs,
    os::unix::fs::symlink,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    load::{Load, Outcome},
    meshfile::{self, MeshFile},
    topology::{Builder, Topology},
};

use crate::{
    mesh::{Mesh, PATIENCE, assert_alive, assert_echo},
    plaintext::STRICT,
};

fn pods() -> Builder {
    Topology::builder()
        .pod("client", "a")
        .pod("other", "a")
        .pod("server", "b")
}

#[test]
fn the_file_is_followed_however_it_is_changed() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let texts = [
        MeshFile::of(&mesh.topology).for_node("a"),
        MeshFile::of(&mesh.topology).policy(STRICT).for_node("a"),
    ];
    let file = mesh.a.file().to_owned();
    let directory = mesh.topology.directory()?;
    // As a ConfigMap is mounted: the file leads through a link that is swapped.
    let mount = |name: &str, text: &str| -> Result<()> {
        fs::create_dir_all(directory.join(name))?;
        Ok(fs::write(directory.join(name).join("mesh.yaml"), text)?)
    };
    let [open, strict] = &texts;
    let way: [(&str, &dyn Fn() -> Result<()>); 6] = [
        ("overwritten", &|| mesh.a.overwrite_file(strict)),
        ("replaced", &|| mesh.a.replace_file(open)),
        ("removed and written anew", &|| {
            fs::remove_file(&file)?;
            Ok(fs::write(&file, strict)?)
        }),
        ("replaced by a link", &|| {
            mount("v1", open)?;
            symlink("v1", directory.join("data"))?;
            symlink("data/mesh.yaml", directory.join("link"))?;
            Ok(fs::rename(directory.join("link"), &file)?)
        }),
        ("a link on the way swapped", &|| {
            mount("v2", strict)?;
            symlink("v2", directory.join("data.new"))?;
            Ok(fs::rename(
                directory.join("data.new"),
                directory.join("data"),
            )?)
        }),
        ("the file behind the links overwritten", &|| {
            mount("v2", open)
        }),
    ];
    for (name, change) in way {
        let mark = mesh.a.log().mark();
        change().context(name)?;
        let applied = |line: &str| line.contains("state applied").then_some(());
        mesh.a
            .log()
            .wait_since(mark, "the new state", PATIENCE, applied)
            .with_context(|| format!("when {name}"))?;
    }
    Ok(())
}

#[test]
fn reloading_again_and_again_under_load_disturbs_nobody() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let mut open = apps::dial(&client.netns, server.at(9000))?;
    assert_alive(&mut open)?;
    let sniffer = mesh.sniffer()?;
    let loads = [server.at(9000), server.at6(9000)]
        .map(|to| Load::start(&client.netns, to, b"kanarienvogel", 2, PATIENCE));
    let began = Instant::now();
    let mut reloads = 0;
    while began.elapsed() < Duration::from_secs(5) {
        let file = MeshFile::of(&mesh.topology);
        // Policies that admit the load, another pod that comes and goes, plaintext open and shut.
        let file = match reloads % 3 {
            0 => file
                .policy(&meshfile::allow_accounts("one", &["client"]))
                .attach("server", "demo/one"),
            1 => file
                .policy(STRICT)
                .attach("server", "demo/strict")
                .without("other"),
            _ => file,
        };
        mesh.replace(&file)?;
        reloads += 1;
    }
    for load in loads {
        let attempts = load.finish()?;
        let bad: Vec<_> = attempts
            .iter()
            .filter(|a| a.outcome != Outcome::Answered)
            .take(3)
            .collect();
        ensure!(
            bad.is_empty(),
            "of {} in {reloads} reloads: {bad:?}",
            attempts.len()
        );
        ensure!(attempts.len() > 5, "{} attempts", attempts.len());
    }
    assert_alive(&mut open).context("the connection from before")?;
    ensure!(
        sniffer.seen()?.count(b"kanarienvogel")? == 0,
        "plaintext on the link"
    );
    assert_echo(&client.netns, server.at(9000))
}
