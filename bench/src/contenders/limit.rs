//! The bound: two relays in the pods, reached by loopback. Takes a topology; gives both processes once they listen.

use std::{env, net::Ipv4Addr, net::SocketAddr, process::Command};

use anyhow::Result;
use ztunnel_tests::{process::Running, topology::Topology, ztunnel::HBONE};

use super::{CLIENT, PORTS, Place, SERVER};
use crate::world;

pub(super) fn start(topology: &Topology) -> Result<Vec<Running>> {
    let (client, server) = (topology.pod(CLIENT)?, topology.pod(SERVER)?);
    let own = env::current_exe()?;
    let mut far = Command::new(&own);
    far.args(["role", "limit-server", "--listen"]);
    far.arg(SocketAddr::from((Ipv4Addr::UNSPECIFIED, HBONE)).to_string());
    let far = Running::start("the server's relay", Some(&server.netns), far)?;
    world::wait_listening(&server.netns, &[HBONE])?;
    let listen: Vec<_> = PORTS
        .iter()
        .map(|port| SocketAddr::from((Place::Cross.loopback(), *port)).to_string())
        .collect();
    let mut near = Command::new(&own);
    near.args(["role", "limit-client", "--listen", &listen.join(",")]);
    near.arg("--to").arg(server.at(HBONE).to_string());
    let near = Running::start("the client's relay", Some(&client.netns), near)?;
    world::wait_listening(&client.netns, &PORTS)?;
    Ok(vec![near, far])
}
