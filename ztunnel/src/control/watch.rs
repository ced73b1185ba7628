//! A local file that is followed. Takes its path, gives what it says at the start and then each
//! content or fault that a change brings; never gives the same content twice, and never judges a
//! fault.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::error::Error;
use super::file::{MAX_FILE_BYTES, State, parse};
use crate::identity::RevocationLists;

/// A file whose changes are followed by the kernel's notifications and, for file systems that have
/// none, by looking at it now and then.
#[derive(Debug)]
pub struct FileSource<T> {
    path: PathBuf,
    understand: Understand<T>,
    watch: Option<Watch>,
    wake: Arc<Notify>,
    next_look: Instant,
    /// Something happened that no look has answered yet.
    due: bool,
    seen: Arc<Seen>,
}

/// What the bytes of a file say.
type Understand<T> = fn(&Path, &[u8]) -> Result<T, Error>;

/// The directories in which an event can mean a change.
#[derive(Debug)]
struct Watch {
    watcher: RecommendedWatcher,
    directories: BTreeSet<PathBuf>,
}

/// What the last look found.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    stamp: Option<Stamp>,
    content: Content,
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    Bytes(Vec<u8>),
    /// Why it cannot be read, in the words of the error.
    Unreadable(String),
}

/// What changes when a file is written or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What one look at the file brings.
enum Look<T> {
    /// It was written while it was read.
    InMotion,
    /// What was there before.
    Same(Seen),
    /// Something else.
    New(Seen, Result<T, Error>),
}

impl FileSource<State> {
    /// Reads the mesh file and begins to follow it. Blocks while it reads.
    ///
    /// # Errors
    /// When the file cannot be read or is not a valid state.
    pub fn open(path: impl Into<PathBuf>) -> Result<(State, Self), Error> {
        let (bytes, source) = Self::follow(path.into(), understand);
        let state = understand(&source.path, &bytes?)?;
        Ok((state, source))
    }
}

impl FileSource<RevocationLists> {
    /// Reads a file of revocation lists and begins to follow it; `None` while there is no such
    /// file. Blocks while it reads.
    ///
    /// # Errors
    /// When the file cannot be read or a list in it is malformed.
    // PROTOCOL.md#crl-file
    pub fn open_revocations(
        path: impl Into<PathBuf>,
    ) -> Result<(Option<RevocationLists>, Self), Error> {
        let (bytes, source) = Self::follow(path.into(), revocations);
        let lists = match bytes {
            Ok(bytes) => Some(revocations(&source.path, &bytes)?),
            Err(error) if error.is_missing() => None,
            Err(error) => return Err(error),
        };
        Ok((lists, source))
    }
}

impl FileSource<()> {
    /// Begins to follow a file that somebody else reads. Blocks while it reads.
    #[must_use]
    pub fn unread(path: PathBuf) -> Self {
        Self::follow(path, |_, _| Ok(())).1
    }
}

impl<T: Send + 'static> FileSource<T> {
    fn follow(path: PathBuf, understand: Understand<T>) -> (Result<Vec<u8>, Error>, Self) {
        let wake = Arc::new(Notify::new());
        // Before the first look, so that a change during it is not missed.
        let mut watch = Watch::new(&path, Arc::clone(&wake));
        if let Some(watch) = &mut watch {
            watch.follow(&path);
        }
        let stamp = Stamp::of(&path);
        let bytes = read(&path);
        let source = Self {
            path,
            understand,
            watch,
            wake,
            next_look: Instant::now() + LOOK_EVERY,
            due: false,
            seen: Arc::new(Seen {
                stamp,
                content: Content::of(&bytes),
            }),
        };
        (bytes, source)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the content is another, and gives what it says. Cancel safe.
    ///
    /// # Errors
    /// When the new content is not valid, or is gone. The next change is waited for as if nothing
    /// had happened.
    pub async fn changed(&mut self) -> Result<T, Error> {
        loop {
            if !self.due {
                self.woken().await;
                self.due = true;
            }
            self.settled().await;
            let (path, seen) = (self.path.clone(), Arc::clone(&self.seen));
            let understand = self.understand;
            let look = tokio::task::spawn_blocking(move || look(&path, &seen, understand)).await;
            match look {
                Ok(Look::InMotion) => {}
                Ok(Look::Same(seen)) => self.saw(seen),
                Ok(Look::New(seen, outcome)) => {
                    self.saw(seen);
                    return outcome;
                }
                Err(source) => {
                    self.due = false;
                    let file = self.path.clone();
                    return Err(Error::Interrupted { file, source });
                }
            }
        }
    }

    fn saw(&mut self, seen: Seen) {
        self.seen = Arc::new(seen);
        self.due = false;
        // A link may lead elsewhere now.
        if let Some(watch) = &mut self.watch {
            watch.follow(&self.path);
        }
    }

    /// Returns when the file may have changed.
    async fn woken(&mut self) {
        loop {
            tokio::select! {
                () = self.wake.notified() => return,
                () = tokio::time::sleep_until(self.next_look) => {}
            }
            self.next_look = Instant::now() + LOOK_EVERY;
            if Stamp::of(&self.path) != self.seen.stamp {
                return;
            }
        }
    }

    /// Waits for a writer to finish: until nothing happens for a moment, but not for ever.
    async fn settled(&self) {
        let latest = Instant::now() + SETTLE_AT_MOST;
        loop {
            let quiet = (Instant::now() + SETTLE).min(latest);
            tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep_until(quiet) => return,
            }
            if Instant::now() >= latest {
                return;
            }
        }
    }
}

impl Watch {
    fn new(path: &Path, wake: Arc<Notify>) -> Option<Self> {
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // An error, such as an overflow, may hide a change.
            if event.map_or(true, |event| may_change(event.kind)) {
                wake.notify_one();
            }
        });
        match watcher {
            Ok(watcher) => Some(Self {
                watcher,
                directories: BTreeSet::new(),
            }),
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "no change notifications, polling");
                None
            }
        }
    }

    /// Watches the directories that the path leads through now, and no others.
    fn follow(&mut self, path: &Path) {
        let wanted = directories(path);
        for gone in self.directories.difference(&wanted) {
            if let Err(error) = self.watcher.unwatch(gone) {
                // The kernel has dropped the watch together with the directory.
                tracing::debug!(directory = %gone.display(), %error, "unwatch");
            }
        }
        let mut watched = BTreeSet::new();
        for directory in wanted {
            if !self.directories.contains(&directory) {
                let added = self.watcher.watch(&directory, RecursiveMode::NonRecursive);
                if let Err(error) = added {
                    tracing::debug!(directory = %directory.display(), %error, "watch");
                    continue;
                }
            }
            watched.insert(directory);
        }
        self.directories = watched;
    }
}

impl Stamp {
    /// `None` when there is no such file.
    fn of(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|file| Self {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    }
}

impl Content {
    fn of(read: &Result<Vec<u8>, Error>) -> Self {
        match read {
            Ok(bytes) => Self::Bytes(bytes.clone()),
            Err(error) => Self::Unreadable(error.to_string()),
        }
    }
}

fn look<T>(path: &Path, last: &Seen, understand: Understand<T>) -> Look<T> {
    let stamp = Stamp::of(path);
    let read = read(path);
    if Stamp::of(path) != stamp {
        return Look::InMotion;
    }
    let content = Content::of(&read);
    let same = content == last.content;
    let seen = Seen { stamp, content };
    if same {
        return Look::Same(seen);
    }
    Look::New(seen, read.and_then(|bytes| understand(path, &bytes)))
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source: io::Error| Error::Read {
        file: path.to_owned(),
        source,
    };
    // Asked before opening: to open a pipe is to wait for its writer.
    let about = std::fs::metadata(path).map_err(failed)?;
    if !about.is_file() {
        return Err(Error::NotAFile {
            file: path.to_owned(),
        });
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(failed)?;
    Ok(bytes)
}

fn understand(path: &Path, bytes: &[u8]) -> Result<State, Error> {
    match std::str::from_utf8(bytes) {
        Ok(text) => parse(path, text),
        Err(error) => Err(Error::NotUtf8 {
            file: path.to_owned(),
            valid_up_to: error.valid_up_to(),
        }),
    }
}

fn revocations(path: &Path, bytes: &[u8]) -> Result<RevocationLists, Error> {
    RevocationLists::parse(bytes).map_err(|source| Error::Revocations {
        file: path.to_owned(),
        source,
    })
}

/// The directory of the path and of each link on the way to the file. A directory link inside one
/// of them, as Kubernetes swaps them, is replaced by an event in that directory.
fn directories(path: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut next = Some(path.to_owned());
    for _ in 0..MAX_LINKS {
        let Some(here) = next.take() else { break };
        let directory = match here.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        next = std::fs::read_link(&here).ok().map(|to| directory.join(to));
        found.insert(directory);
    }
    if let Ok(file) = std::fs::canonicalize(path)
        && let Some(parent) = file.parent()
    {
        found.insert(parent.to_owned());
    }
    found
}

/// Whether an event can mean new content; reading the file is an event too.
const fn may_change(kind: EventKind) -> bool {
    !matches!(
        kind,
        EventKind::Access(
            AccessKind::Any
                | AccessKind::Read
                | AccessKind::Open(_)
                | AccessKind::Close(AccessMode::Any | AccessMode::Execute | AccessMode::Read)
                | AccessKind::Other
        )
    )
}

/// How often a file is looked at when nothing says that it changed.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a writer must be silent before its work is read.
const SETTLE: Duration = Duration::from_millis(75);
/// How long a busy directory can put off a look.
const SETTLE_AT_MOST: Duration = Duration::from_secs(1);
/// As many links as Linux follows.
const MAX_LINKS: usize = 40;

#[cfg(test)]
mod tests;
