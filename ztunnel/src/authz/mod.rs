//! Policies and a flow in, a permit or a refusal out; pure.
#![warn(clippy::wildcard_enum_match_arm)]

mod check;
mod live;
mod matcher;
mod permit;
mod plaintext;
mod policies;
mod probes;
#[cfg(test)]
mod testing;

pub use check::{Denied, DryRun, Verdict, check};
pub use live::Live;
pub use permit::Permit;
pub use plaintext::{PlaintextVerdict, plaintext_verdict};
pub use policies::Policies;
pub use probes::{Probe, Probes};
