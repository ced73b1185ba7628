//! Descriptors run out: connections wait, nothing spins, and all is well when some come free.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    meshfile::MeshFile,
    process::output,
    topology::Topology,
    wait,
};

use crate::mesh::{Mesh, PATIENCE, REQUEST, assert_echo, cpu_time};

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
    let watched = Duration::from_secs(4);
    let last = streams.last().ok_or_else(|| anyhow::anyhow!("no stream"))?;
    let (_, bytes) = apps::read_end(last, watched)?;
    ensure!(bytes.is_empty());
    let spent = cpu_time(mesh.a.pid())?.saturating_sub(spent);
    ensure!(
        spent < watched / 2,
        "it used {spent:?} of processor time in {watched:?}"
    );
    // Some are served and some wait, whichever worker they fell to; whoever was served goes, and
    // makes room for another.
    for stream in &mut streams {
        stream.set_read_timeout(Some(Duration::from_millis(5)))?;
        // One that was refused meanwhile says so when it is read.
        drop(stream.write_all(REQUEST));
    }
    let mut served = 0;
    wait::until("every connection to be served or refused", PATIENCE, || {
        streams.retain_mut(|stream| match stream.read(&mut [0; 64]) {
            Ok(bytes) => {
                served += usize::from(bytes > 0);
                false
            }
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        });
        streams.is_empty().then_some(())
    })?;
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
