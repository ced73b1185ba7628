//! Who serves a pin directory: takes the directory, gives a claim that lives as long as its process, or
//! the refusal. It never waits long, and never takes a directory from a process that lives.

use std::{
    fs::{self, File},
    io,
    path::Path,
    thread,
    time::Duration,
};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use socket2::{Domain, Socket, Type};

use super::{Error, NetnsCookie, pins, sys};

/// While one is open, its process serves the directory.
#[derive(Debug)]
pub(super) struct Claim {
    /// Locked, shared with the processes of the same node; the lock ends with the process.
    _directory: File,
}

impl Claim {
    /// For this process. Another process of this node may be leaving; one of another node may not be
    /// there at all: two nodes with one directory would take each other's pods.
    // PROTOCOL.md#pin-owner
    pub(super) fn serve(pin_dir: &Path) -> Result<Self, Error> {
        let directory = File::open(pin_dir).map_err(Error::pin(pin_dir))?;
        let own = own_netns()?;
        match directory.try_lock() {
            Ok(()) => pins::set_owner(pin_dir, own)?,
            Err(fs::TryLockError::WouldBlock) => {}
            Err(fs::TryLockError::Error(error)) => return Err(Error::pin(pin_dir)(error)),
        }
        // Not atomic after the exclusive lock: whoever came in between has written its own name.
        directory.lock_shared().map_err(Error::pin(pin_dir))?;
        if pins::owner(pin_dir)? == Some(own) {
            Ok(Self {
                _directory: directory,
            })
        } else {
            Err(Error::PinsTaken {
                path: pin_dir.to_path_buf(),
            })
        }
    }

    /// To undo everything: no process may serve the directory. None if there is no such directory.
    pub(super) fn undo(pin_dir: &Path) -> Result<Option<Self>, Error> {
        let directory = match File::open(pin_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                on_bpffs(pin_dir.parent().unwrap_or(pin_dir))?;
                return Ok(None);
            }
            other => other.map_err(Error::pin(pin_dir))?,
        };
        on_bpffs(pin_dir)?;
        for _ in 0..TRIES {
            match directory.try_lock() {
                Ok(()) => {
                    return Ok(Some(Self {
                        _directory: directory,
                    }));
                }
                // A process that is ending, or a child of one that has not yet become its program.
                Err(fs::TryLockError::WouldBlock) => thread::sleep(PAUSE),
                Err(fs::TryLockError::Error(error)) => return Err(Error::pin(pin_dir)(error)),
            }
        }
        Err(Error::PinsServed {
            path: pin_dir.to_path_buf(),
        })
    }
}

/// The network namespace of this thread, which is the node's.
fn own_netns() -> Result<NetnsCookie, Error> {
    Socket::new(Domain::IPV4, Type::DGRAM, None)
        .and_then(|socket| sys::socket_netns_cookie(&socket))
        .map(NetnsCookie)
        .map_err(Error::NetnsCookie)
}

fn on_bpffs(dir: &Path) -> Result<(), Error> {
    match statfs(dir) {
        Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => Ok(()),
        Ok(_) => Err(Error::PinsElsewhere {
            path: dir.to_path_buf(),
        }),
        Err(error) => Err(Error::pin(dir)(error.into())),
    }
}

/// Together half a second.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(10);
