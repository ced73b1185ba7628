//! The house. A connection walks through five rooms, always the same way:
//! **capture → resolve → authorise → tunnel → account**. Modules stand in floor order; a room
//! imports only from floors below it (`cargo xtask floors`), and ARCHITECTURE.md draws it.

// Floor 1: values, and messages that are not values yet.
pub mod model;
pub mod proto;
// Floor 2: pure rooms.
pub mod authz;
pub mod resolve;
pub mod wire;
// Floor 3.
pub mod drain;
pub mod rpc;
// Floor 4: devices.
pub mod account;
pub mod capture;
pub mod identity;
// Floor 5.
pub mod control;
pub mod enrol;
pub mod tunnel;
// Floor 6: what the walks share, the two walks, plaintext, names, and another door to the walk outwards.
pub mod context;
pub mod dns;
pub mod inbound;
pub mod outbound;
pub mod passthrough;
pub mod socks5;
// Floor 7: the process.
pub mod admin;
pub mod app;
pub mod config;
pub mod logging;
pub mod mesh;
pub mod stats;
pub mod worker;

#[cfg(test)]
mod testing;
