//! Each application through each kind of mesh: strict, permissive, and with one side outside, from the
//! same node and from another one, by IPv4 and IPv6. Servers are started once and live through all of
//! it: a pod joins and leaves the mesh while its programs run.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    access::Line,
    apps::{self, Heard, Server},
    mesh::{Mesh, PATIENCE, WATCH, is_refused, knock, wait_fate},
    meshfile::MeshFile,
    topology::{Pod, Topology},
    wait,
    ztunnel::Node,
};

use crate::{
    rows::{ROWS, Way, upload},
    servers::{PORTS, Servers},
};

/// What the mesh is, and who is to be served in it.
struct Kind {
    name: &'static str,
    file: fn(&Topology) -> MeshFile,
    served: &'static [&'static str],
    refused: &'static [&'static str],
}

const KINDS: [Kind; 3] = [
    Kind {
        name: "strict",
        file: |topology| {
            outsiders(topology)
                .policy(STRICT)
                .attach("apps", "demo/strict")
        },
        served: &["far", "near"],
        refused: &["out-far", "out-near"],
    },
    // With a client of the mesh, and mixed: with one that is not.
    Kind {
        name: "permissive",
        file: outsiders,
        served: &["far", "near", "out-far", "out-near"],
        refused: &[],
    },
    // Mixed: the server is not.
    Kind {
        name: "server outside",
        file: |topology| outsiders(topology).without("apps"),
        served: &["far", "near"],
        refused: &[],
    },
];

// 31–34, 83–86, 93–95, 97, 118–125.
#[test]
fn every_application_works_through_every_kind_of_mesh() -> Result<()> {
    let topology = Topology::builder()
        .pod("far", "a")
        .pod("out-far", "a")
        .pod("near", "b")
        .pod("out-near", "b")
        .pod("apps", "b")
        .build()?;
    // Before the node processes: whoever joins the mesh has been running for a while.
    let directory = topology.directory()?;
    let apps_pod = topology.pod("apps")?.clone();
    let servers = Servers::start(&apps_pod, &directory)?;
    let _marker = Server::start(&apps_pod.netns, MARKER, apps::echo)?;
    let mesh = {
        let [first, ..] = &KINDS;
        let file = (first.file)(&topology);
        let settings = ztunnel_tests::ztunnel::Settings::of(&topology)?;
        Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?
    };
    let mut failures = Vec::new();
    for kind in &KINDS {
        mesh.replace(&(kind.file)(&mesh.topology))?;
        wait_for(&mesh, kind, &apps_pod).context(kind.name)?;
        for client in kind.served {
            serve(&mesh, kind, client, &servers, &mut failures)?;
        }
        for client in kind.refused {
            let netns = &mesh.pod(client)?.netns;
            for to in PORTS.iter().flat_map(|port| both(&apps_pod, *port)) {
                let heard = knock(netns, to, b"", PATIENCE)?;
                ensure!(
                    is_refused(&heard),
                    "{}, {client} to {to}: {heard}",
                    kind.name
                );
            }
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// Every row for one client, in both families.
fn serve(
    mesh: &Mesh,
    kind: &Kind,
    client: &str,
    servers: &Servers,
    failures: &mut Vec<String>,
) -> Result<()> {
    let (pod, apps_pod) = (mesh.pod(client)?, mesh.pod("apps")?);
    let directory = mesh.topology.directory()?;
    for (own, to) in both(pod, 0).into_iter().zip(both(apps_pod, 0)) {
        let way = Way {
            from: &pod.netns,
            to: to.ip(),
            own: own.ip(),
            servers,
            directory: &directory,
        };
        for (name, check) in ROWS {
            let marks = mesh.marks();
            let told = check(&way).and_then(|()| told(mesh, kind, pod, marks));
            if let Err(error) = told {
                failures.push(format!(
                    "{}, {client} to {to}: {name}: {error:#}",
                    kind.name
                ));
            }
        }
        if kind.name == "strict" && client == "far" && to.is_ipv4() {
            upload(&way, UPLOAD_BYTES).context("upload")?;
        }
    }
    Ok(())
}

/// The access lines of a row: whoever is in the mesh tells of it, and identities are proven where both
/// sides are.
fn told(mesh: &Mesh, kind: &Kind, client: &Pod, marks: (usize, usize)) -> Result<()> {
    let outside = client.name.starts_with("out-");
    let server_inside = kind.name != "server outside";
    if !outside {
        let (node, mark) = node_of(mesh, client, marks);
        let fields = [
            ("direction", "outbound"),
            ("src.workload", client.name.as_str()),
            ("dst.workload", "apps"),
        ];
        let line = node.wait_access(mark, &fields)?;
        ended_well(&line)?;
        let proven = line.get("dst.identity").is_some();
        ensure!(proven == server_inside, "{line:?}");
    } else if server_inside {
        let fields = [("direction", "inbound"), ("dst.workload", "apps")];
        let line = mesh.b.wait_access(marks.1, &fields)?;
        ended_well(&line)?;
        ensure!(line.get("src.identity").is_none(), "{line:?}");
    }
    Ok(())
}

/// Applications may end a connection by a reset; the mesh may not.
fn ended_well(line: &Line) -> Result<()> {
    let reason = line.get("reason");
    ensure!(matches!(reason, Some("complete" | "reset")), "{line:?}");
    Ok(())
}

fn node_of<'a>(mesh: &'a Mesh, pod: &Pod, marks: (usize, usize)) -> (&'a Node, usize) {
    if pod.node == "a" {
        (&mesh.a, marks.0)
    } else {
        (&mesh.b, marks.1)
    }
}

/// The new file has been read; what it changes in the kernel may take a moment more.
fn wait_for(mesh: &Mesh, kind: &Kind, apps_pod: &Pod) -> Result<()> {
    for to in both(apps_pod, MARKER) {
        for client in kind.served {
            let netns = &mesh.pod(client)?.netns;
            wait_fate(netns, to, "an answer", Heard::answered).context(*client)?;
        }
        for client in kind.refused {
            let netns = &mesh.pod(client)?.netns;
            wait_fate(netns, to, "a refusal", is_refused).context(*client)?;
        }
    }
    // Both nodes must agree on whether the server is in the mesh.
    for client in [mesh.pod("far")?, mesh.pod("near")?] {
        wait::until("the way that connections take", PATIENCE, || {
            let marks = mesh.marks();
            knock(&client.netns, apps_pod.at(MARKER), b"hello", WATCH).ok()?;
            told(mesh, kind, client, marks).ok()
        })?;
    }
    Ok(())
}

fn both(pod: &Pod, port: u16) -> [SocketAddr; 2] {
    [pod.at(port), pod.at6(port)]
}

fn outsiders(topology: &Topology) -> MeshFile {
    MeshFile::of(topology)
        .without("out-far")
        .without("out-near")
}

/// Nobody without an identity.
const STRICT: &str = "name: strict\nnamespace: demo\nscope: WorkloadSelector\naction: Deny\n\
                      dryRun: false\nrules:\n- - - notPrincipals:\n      - Presence: []\n";
/// Where the test asks whether a change has taken effect.
const MARKER: u16 = 7;
const UPLOAD_BYTES: u64 = 1 << 30;
