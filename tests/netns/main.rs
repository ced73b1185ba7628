//! The end-to-end proof: two nodes and their pods as network namespaces, real programs, the real
//! binary. Takes what an operator would do to a node, gives what applications, the wire, the log and
//! the metrics show of it; never looks inside the process. Needs root, nginx, curl and openssl.
//!
//! A number in a comment above a test is the behaviour of the established node proxy that it shows:
//! `1`–`161` of its data plane, `B001`–`B140` of its operation.
#![expect(
    clippy::disallowed_types,
    reason = "real time: nothing here runs on a paused clock"
)]

mod agent;
mod crl;
mod dark;
mod dns;
mod drain;
mod enrolment;
mod exclusions;
mod external;
mod faults;
mod faults_inbound;
mod faults_network;
mod hostile;
mod identity;
mod input;
mod journey;
mod kill;
mod limits;
mod listener;
mod local;
mod many;
mod operate;
mod plaintext;
mod policy;
mod probes;
mod relay;
mod reload;
mod revocation;
mod roots;
mod routes;
mod socks;
mod workers;

pub(crate) use ztunnel_tests::mesh;
