//! How many descriptors the process may hold. Takes nothing, raises the soft limit to the hard one;
//! never fails the start over it.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

/// Raises the limit of open files as far as it goes: each connection holds two.
pub fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "limit of open files not raised");
    }
}
