//! Descriptors run out: connections wait, nothing spins, and all is well when some come free.

use std::{net::TcpStream, time::Duration};

use anyhow::{Result, ensure};
use ztunnel_tests::{
    apps::{self, End, Server},
    meshfile::MeshFile,
    process::output,
    topology::Topology,
};

use crate::mesh::{Mesh, PATIENCE, assert_alive, assert_echo, cpu_time};

#[test]
fn without_descriptors_connections_wait_and_nothing_spins() -> Result<()> {
    let mesh = Mesh::start(
        Topology::builder().pod("client", "a").pod("server", "b"),
        MeshFile::of,
    )?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    // The tunnel is there before the descriptors run out.
    assert_echo(&client.netns, server.at(9000))?;
    let pid = mesh.a.pid().to_string();
    let used = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    // A kernel limit on numbers, and they are taken from the lowest: some twenty more fit.
    let limit = format!("--nofile={}:", used + 20);
    output(None, "prlimit", &["--pid", &pid, &limit], "")?;
    let open = |_| apps::dial(&client.netns, server.at(9000));
    let mut streams = (0..60).map(open).collect::<Result<Vec<TcpStream>>>()?;
    let spent = cpu_time(mesh.a.pid())?;
    let watched = Duration::from_secs(2);
    let last = streams.last().ok_or_else(|| anyhow::anyhow!("no stream"))?;
    let (_, bytes) = apps::read_end(last, watched)?;
    ensure!(bytes.is_empty());
    let spent = cpu_time(mesh.a.pid())?.saturating_sub(spent);
    ensure!(
        spent < watched / 4,
        "it used {spent:?} of processor time in {watched:?}"
    );
    // Some are being served and some wait; the first twenty go, again and again, until all were.
    let mut served = 0;
    while !streams.is_empty() {
        let mut stream = streams.remove(0);
        if apps::read_end(&stream, Duration::from_millis(1))?.0 == End::Open {
            assert_alive(&mut stream)?;
            served += 1;
        }
    }
    let lines = mesh.a.access_lines();
    let bad: Vec<_> = lines
        .iter()
        .filter(|l| l.get("reason") != Some("complete"))
        .take(5)
        .collect();
    ensure!(served >= 50, "only {served} of 60 were served: {bad:#?}");
    let plenty = "--nofile=1024:";
    output(None, "prlimit", &["--pid", &pid, plenty], "")?;
    assert_echo(&client.netns, server.at(9000))?;
    ensure!(PATIENCE > watched);
    Ok(())
}
