//! Updates in, snapshots out.

mod error;
mod file;
mod watch;
mod world;

pub use error::Error;
pub use file::{MAX_FILE_BYTES, PodEntry, State, parse};
pub use watch::FileSource;
pub use world::World;
