//! Real counterparts: Envoy at the other end of HBONE, and the applications that people run. Takes
//! what their own programs do; gives what both sides, the access lines and Envoy's own log say of it;
//! nothing here speaks a protocol that a real program could have spoken. Needs root and what
//! `cargo xtask setup` installs.
//!
//! A number in a comment above a test is the behaviour of the established node proxy that it shows.
#![expect(
    clippy::disallowed_types,
    reason = "real time: nothing here runs on a paused clock"
)]

mod direct;
mod exercise;
mod gateway;
mod matrix;
mod rows;
mod servers;
mod traffic;
mod waypoint;
