//! The room that reads the local file, without the part that follows it. Takes the product's own
//! sources, gives what the `file` target needs.

#[path = "../../../ztunnel/src/control/error.rs"]
mod error;
#[path = "../../../ztunnel/src/control/file/mod.rs"]
mod file;

pub use error::Error;
pub use file::{MAX_FILE_BYTES, PodEntry, State, parse};
