//! The capture room on a real kernel: real namespaces, a veth link and real sockets. Needs root. Every
//! test has its own two namespaces and its own pins, and removes them, also when it fails.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up fails; the lint knows test functions, not their helpers"
)]

mod dns;
mod guard;
mod inbound;
mod lifecycle;
mod outbound;
mod world;
