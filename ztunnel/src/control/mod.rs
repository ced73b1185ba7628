//! Updates in, snapshots out.

mod apply;
mod error;
mod file;
mod watch;
mod world;
mod xds;

pub use apply::{Change, Interner, Rejected, address, authorization};
pub use error::Error;
pub use file::{MAX_FILE_BYTES, PodEntry, State, parse};
pub use watch::FileSource;
pub use world::World;
pub use xds::{Counts, Demander, Ended, Event, NodeParams, Xds, XdsParams};
