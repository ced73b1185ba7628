//! The root that this process signs with, followed on disk. Takes its directory, gives whoever signs
//! now; never makes a root once the process runs, and cuts no connection.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tracing::{info, warn};

use crate::control::FileSource;
use crate::identity::{Ca, Error, LocalCa, Store};
use crate::mesh::Reader;
use crate::model::Chain;

/// A directory with a root that may be exchanged.
pub(super) struct FollowedRoot {
    directory: PathBuf,
    clock: fn() -> SystemTime,
    files: [FileSource<()>; 2],
    replace: watch::Sender<Arc<LocalCa>>,
}

impl FollowedRoot {
    /// Opens the authority in `directory`, or makes it.
    pub(super) fn open(directory: &Path, clock: fn() -> SystemTime) -> Result<(Ca, Self), Error> {
        // Before they are read, so that no change is missed.
        let files = LocalCa::files(directory).map(FileSource::unread);
        let first = LocalCa::open(directory, clock())?;
        let (replace, current) = watch::channel(Arc::new(first));
        let root = Self {
            directory: directory.to_owned(),
            clock,
            files,
            replace,
        };
        Ok((Ca::Local(current), root))
    }

    /// Reads the pair again when one of its files changes, and has every certificate of `store`
    /// made anew by another root. What cannot be used is refused, and the root before stays.
    // PROTOCOL.md#root-rotation
    pub(super) fn follow(self, store: Arc<Store>) -> Reader {
        Reader(tokio::spawn(async move {
            let Self {
                directory,
                clock,
                files: [mut certificate, mut key],
                replace,
            } = self;
            // Why the last pair was refused.
            let mut refused: Option<String> = None;
            loop {
                // Whether the one file can be read says nothing about the pair. What is wrong with it
                // may go away without a change of its bytes: its mode, its owner, the time.
                tokio::select! {
                    _ = certificate.changed() => {}
                    _ = key.changed() => {}
                    () = tokio::time::sleep(AGAIN), if refused.is_some() => {}
                }
                let path = directory.clone();
                let read = move || LocalCa::reopen(&path, clock());
                match tokio::task::spawn_blocking(read).await {
                    Ok(Ok(ca)) if ca.is(&replace.borrow()) => refused = None,
                    Ok(Ok(ca)) => {
                        refused = None;
                        let roots = ca.roots();
                        replace.send_replace(Arc::new(ca));
                        store.renew_all();
                        info!(roots, "root replaced");
                    }
                    Ok(Err(error)) => {
                        let why = Chain(&error).to_string();
                        if refused.as_ref() != Some(&why) {
                            warn!(error = why, "root refused; the one before stays");
                        }
                        refused = Some(why);
                    }
                    Err(error) => warn!(%error, "root not read; the one before stays"),
                }
            }
        }))
    }
}

/// Between two looks at a pair that was refused.
const AGAIN: Duration = Duration::from_secs(2);
