//! The rooms that read the local file and the control plane's resources, without the parts that follow them. Takes
//! the product's own sources, gives what the targets need.

#[path = "../../../ztunnel/src/control/apply/mod.rs"]
mod apply;
#[path = "../../../ztunnel/src/control/error.rs"]
mod error;
#[path = "../../../ztunnel/src/control/file/mod.rs"]
mod file;

pub use apply::{Change, Interner, Rejected, address, authorization};
pub use error::Error;
pub use file::{MAX_FILE_BYTES, PodEntry, State, parse};
