//! A node process and its control plane: real discovery, real certificate requests, a server that misbehaves on
//! command. Takes what a control plane says and does; gives what an operator sees of it: log lines, readiness, metrics
//! and traffic. Needs root.
//!
//! A number in a comment above a test is the behaviour of the established node proxy that it shows.
#![expect(
    clippy::disallowed_types,
    reason = "real time: nothing here runs on a paused clock"
)]

mod bad_days;
mod certificates;
mod on_demand;
mod play;
mod reconnect;
mod resources;
mod stream;
