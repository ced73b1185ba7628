//! The harness of every test that needs a kernel: it builds nodes and pods out of network
//! namespaces, runs applications and node processes in them, watches the wire, and leaves nothing
//! behind. It never reaches inside the product: it sees what an operator sees.
//!
//! ```text
//! Topology ── nodes and pods        MeshFile ── what the node processes are told
//! Sniffer  ── the wire              Node     ── a `ztunnel proxy`, its log, metrics, lines
//! apps     ── servers and clients   inspect  ── what must not change, what must not remain
//! Cluster  ── the real control plane: etcd, kube-apiserver, istiod
//! ControlPlane ── discovery and a CA that speak the real protocols and misbehave on command
//! Mesh     ── all of it, started
//! ```
//!
//! Everything created carries [`topology::Topology::prefix`] in its name. A value's `Drop` removes
//! what it made; child processes die with their parent; what a killed run left is collected by the
//! next one, or at once by a [`reaper::Reaper`].
#![expect(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "a harness measures real time, shares buffers between its threads and takes \
              ZTUNNEL_BIN from the environment; the bans are for the product"
)]

pub mod access;
pub mod agent;
pub mod apps;
pub mod bulk;
pub mod certs;
pub mod cluster;
pub mod control_plane;
pub mod dns;
pub mod envoy;
mod grpc;
pub mod http;
pub mod inspect;
pub mod leftovers;
pub mod load;
pub mod mesh;
pub mod meshfile;
pub mod metrics;
pub mod netns;
pub mod peer;
pub mod process;
pub mod programs;
#[path = "../../ztunnel/src/proto.rs"]
pub mod proto;
pub mod reaper;
pub mod rules;
mod sys;
pub mod topology;
pub mod traffic;
pub mod wait;
pub mod wire;
pub mod ztunnel;
