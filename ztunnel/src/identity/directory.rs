//! The directory that keeps a root. Takes a path, gives the texts of a certificate and a key that
//! belong together on disk; never parses them.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::error::Error;

/// A certificate and a key, in PEM.
pub(super) struct Pair {
    pub(super) certificate: String,
    pub(super) key: String,
}

/// The directory and the names in it.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    pub(super) fn certificate(&self) -> PathBuf {
        self.path.join("root-cert.pem")
    }

    pub(super) fn key(&self) -> PathBuf {
        self.path.join("root-key.pem")
    }

    /// The pair that is there, or the one that `make` gives, then kept for good. Of several
    /// processes that start at once on one directory, one makes the pair and all get it; a crash
    /// at any point leaves either nothing that counts or what the next start completes.
    pub(super) fn load_or_create(
        &self,
        make: impl FnOnce() -> Result<Pair, Error>,
    ) -> Result<Pair, Error> {
        // Half a pair may be one that another process publishes right now: the lock's owner knows.
        let half = match self.load() {
            Ok(Some(pair)) => return Ok(pair),
            Ok(None) => None,
            Err(e @ Error::CaIncomplete { .. }) => Some(e),
            Err(e) => return Err(e),
        };
        DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(&self.path)
            .map_err(|e| failed("create", &self.path, e))?;
        // Held until this function returns; the kernel releases it if we die.
        let _lock = match (self.lock(), half) {
            (Err(Error::CaIo { .. }), Some(half)) => return Err(half),
            (lock, _) => lock?,
        };
        self.complete()?;
        if let Some(pair) = self.load()? {
            return Ok(pair);
        }
        let pair = make()?;
        self.publish(&pair)?;
        Ok(pair)
    }

    /// Both files, or `None` when neither is there.
    pub(super) fn load(&self) -> Result<Option<Pair>, Error> {
        let (certificate, key) = (self.certificate(), self.key());
        self.check()?;
        let key_text = read(&key, |file| private(&key, file))?;
        let certificate_text = read(&certificate, |file| ours(&certificate, file))?;
        match (certificate_text, key_text) {
            (Some(certificate), Some(key_text)) => Ok(Some(Pair {
                certificate,
                key: key_text,
            })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(Error::CaIncomplete {
                present: certificate,
                missing: key,
            }),
            (None, Some(_)) => Err(Error::CaIncomplete {
                present: key,
                missing: certificate,
            }),
        }
    }

    /// Nobody else may put a pair there. Where the sticky bit is set others can add files, but not
    /// replace ours, and what they add is not ours.
    fn check(&self) -> Result<(), Error> {
        let directory = match fs::metadata(&self.path) {
            Ok(directory) => directory,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed("inspect", &self.path, e)),
        };
        ours(&self.path, &directory)?;
        let mode = directory.mode() & 0o7777;
        if mode & 0o022 != 0 && mode & 0o1000 == 0 {
            return Err(Error::CaDirectoryExposed {
                path: self.path.clone(),
                mode,
            });
        }
        Ok(())
    }

    /// Writes both, synced, under other names, then renames the key and last the certificate.
    fn publish(&self, pair: &Pair) -> Result<(), Error> {
        let (new_key, new_certificate) = (self.path.join(NEW_KEY), self.unfinished());
        let written = write_synced(&new_key, &pair.key)
            .and_then(|()| write_synced(&new_certificate, &pair.certificate));
        if written.is_err() {
            // Best effort on a path that already fails: what stays is overwritten next time.
            drop(fs::remove_file(&new_certificate));
            drop(fs::remove_file(&new_key));
        }
        written?;
        rename(&new_key, &self.key())?;
        rename(&new_certificate, &self.certificate())?;
        self.sync()
    }

    /// Finishes a `publish` that died between its two renames, and forgets one that died before.
    fn complete(&self) -> Result<(), Error> {
        let unfinished = self.unfinished();
        if !unfinished.exists() {
            return Ok(());
        }
        if self.key().exists() && !self.certificate().exists() {
            rename(&unfinished, &self.certificate())?;
            return self.sync();
        }
        fs::remove_file(&unfinished).map_err(|e| failed("remove", &unfinished, e))
    }

    fn unfinished(&self) -> PathBuf {
        self.path.join(NEW_CERTIFICATE)
    }

    fn lock(&self) -> Result<File, Error> {
        let path = self.path.join(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(KEY_MODE)
            .open(&path)
            .map_err(|e| failed("create", &path, e))?;
        for _ in 0..LOCK_TRIES {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
                Err(TryLockError::Error(e)) => return Err(failed("lock", &path, e)),
            }
        }
        Err(Error::CaLocked(path))
    }

    fn sync(&self) -> Result<(), Error> {
        File::open(&self.path)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| failed("sync", &self.path, e))
    }
}

/// The text of a file that `check` accepts, or `None` when there is none. What is checked is what
/// is read, whatever the name becomes meanwhile; neither a pipe nor an endless file holds it up.
fn read(
    path: &Path,
    check: impl FnOnce(&fs::Metadata) -> Result<(), Error>,
) -> Result<Option<String>, Error> {
    let wrong = |e| failed("read", path, e);
    let open = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = match open {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(wrong(e)),
    };
    let found = file.metadata().map_err(wrong)?;
    if !found.is_file() {
        let e = io::Error::new(io::ErrorKind::InvalidData, "not a regular file");
        return Err(wrong(e));
    }
    check(&found)?;
    let mut text = String::new();
    let mut file = file.take(FILE_BYTES + 1);
    file.read_to_string(&mut text).map_err(wrong)?;
    if file.limit() == 0 {
        let e = io::Error::new(io::ErrorKind::InvalidData, "larger than 1 MiB");
        return Err(wrong(e));
    }
    Ok(Some(text))
}

/// Only root and we may decide what is in it.
fn ours(path: &Path, found: &fs::Metadata) -> Result<(), Error> {
    let owner = found.uid();
    // The kernel lets a process own its own entry there.
    let we = fs::metadata("/proc/self").map_or(0, |process| process.uid());
    if owner == 0 || owner == we {
        return Ok(());
    }
    Err(Error::CaOwnedByOther {
        path: path.to_owned(),
        owner,
    })
}

fn private(path: &Path, found: &fs::Metadata) -> Result<(), Error> {
    ours(path, found)?;
    let mode = found.mode() & 0o7777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    Err(Error::CaKeyExposed {
        path: path.to_owned(),
        mode,
    })
}

fn write_synced(path: &Path, text: &str) -> Result<(), Error> {
    // A file left by a crash may have another mode or be a link: it goes first.
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed("remove", path, e)),
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(KEY_MODE)
        .open(path)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .map_err(|e| failed("write", path, e))
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(|e| failed("create", to, e))
}

fn failed(doing: &'static str, path: &Path, source: io::Error) -> Error {
    let remedy = match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free space there, then start again"
        }
        io::ErrorKind::PermissionDenied => "let the user that runs this process own it",
        io::ErrorKind::ReadOnlyFilesystem => {
            "choose a directory that can be written, or put an existing pair there"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "choose a path that is a directory or can become one"
        }
        io::ErrorKind::IsADirectory | io::ErrorKind::InvalidData => {
            "replace it by a PEM file, or remove the pair to create a new root"
        }
        _ => "check the directory and its file system",
    };
    Error::CaIo {
        doing,
        path: path.to_owned(),
        remedy,
        source: Arc::new(source),
    }
}

const DIRECTORY_MODE: u32 = 0o700;
const KEY_MODE: u32 = 0o600;
/// More than any pair and its further roots need.
const FILE_BYTES: u64 = 1 << 20;
const LOCK: &str = ".lock";
const NEW_CERTIFICATE: &str = ".root-cert.pem.new";
const NEW_KEY: &str = ".root-key.pem.new";
/// Creating a root takes milliseconds; ten seconds of waiting means that something is stuck.
const LOCK_TRIES: u32 = 500;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests;
