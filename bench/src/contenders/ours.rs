//! This mesh: one node process per node, told by a file. Takes the binary; gives both processes once they are ready.

use anyhow::Result;
use ztunnel_tests::{
    meshfile::{self, MeshFile},
    topology::Topology,
    ztunnel::{Node, Settings},
};

use super::{CLIENT, COLD, NEIGHBOUR, OUTSIDE, SERVER, Setting};

pub(super) fn start(
    topology: &Topology,
    setting: &Setting,
    local_fast_path: bool,
) -> Result<Vec<Node>> {
    let file = mesh(topology);
    let mut nodes = Vec::new();
    for node in topology.nodes() {
        let settings = Settings {
            binary: setting.ztunnel.clone(),
            ca_directory: topology.directory()?.join("ca"),
            environment: vec![
                (
                    "ZTUNNEL_WORKER_THREADS".to_owned(),
                    setting.workers.to_string(),
                ),
                ("RUST_LOG".to_owned(), setting.log_filter().to_owned()),
                ("LOCAL_FAST_PATH".to_owned(), local_fast_path.to_string()),
            ],
        };
        let text = file.for_node(&node.name);
        nodes.push(Node::launch_unheard(topology, &node.name, &text, settings)?);
    }
    for node in &mut nodes {
        node.wait_ready()?;
    }
    Ok(nodes)
}

/// Everybody may talk to the servers but the stranger.
pub(super) fn mesh(topology: &Topology) -> MeshFile {
    let admitted: Vec<&str> = [CLIENT].into_iter().chain(COLD).collect();
    MeshFile::of(topology)
        .without(OUTSIDE)
        .policy(&meshfile::allow_accounts("clients", &admitted))
        .attach(SERVER, "demo/clients")
        .attach(NEIGHBOUR, "demo/clients")
}
