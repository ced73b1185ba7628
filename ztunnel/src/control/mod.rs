//! Updates in, snapshots out.

mod error;
mod file;
mod watch;

pub use error::Error;
pub use file::{PodEntry, State, parse};
pub use watch::FileSource;
