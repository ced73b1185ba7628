//! What can be wrong with a source of state. Takes nothing, gives the errors of this room; each
//! names the file and, where there is one, the place in it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::identity::ListFault;

/// Why there is no new state. The running state stays.
#[derive(Debug, Error)]
pub enum Error {
    /// Nothing is in it: more likely a writer that has not finished than a mesh without members.
    #[error("{}: empty file; write {{}} if nothing is meant", file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// The task that reads the file was ended before it was done.
    #[error("{}: reading was interrupted", file.display())]
    Interrupted {
        /// The file.
        file: PathBuf,
        /// How it ended.
        source: tokio::task::JoinError,
    },
    /// A key or value is wrong.
    #[error("{}:{line}:{column}: {}{reason}", file.display(), prefix(field))]
    Invalid {
        /// The file.
        file: PathBuf,
        /// From 1; 0 when the place is not known.
        line: u64,
        /// From 1; 0 when the place is not known.
        column: u64,
        /// The path of keys, such as `workloads[0].workloadIps[1]`; empty for the file as such.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It is a directory, a pipe or a device.
    #[error("{}: not a regular file", file.display())]
    NotAFile {
        /// The file.
        file: PathBuf,
    },
    /// It holds bytes that are not text.
    #[error("{}: not UTF-8 from byte {valid_up_to} on", file.display())]
    NotUtf8 {
        /// The file.
        file: PathBuf,
        /// How many bytes are text.
        valid_up_to: usize,
    },
    /// It cannot be read.
    #[error("read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A list of revoked certificates in it cannot be used.
    #[error("{}", file.display())]
    Revocations {
        /// The file.
        file: PathBuf,
        /// Which list, and why.
        source: ListFault,
    },
    /// It is larger than any mesh that one node serves.
    #[error("{}: more than {limit_bytes} bytes", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// The largest that is read.
        limit_bytes: u64,
    },
}

impl Error {
    /// Whether there is no such file.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

fn prefix(field: &str) -> String {
    if field.is_empty() {
        String::new()
    } else {
        format!("{field}: ")
    }
}
