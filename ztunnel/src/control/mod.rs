//! Updates in, snapshots out.

mod error;
mod file;
mod watch;

pub use error::Error;
pub use file::{MAX_FILE_BYTES, PodEntry, State, parse};
pub use watch::FileSource;
