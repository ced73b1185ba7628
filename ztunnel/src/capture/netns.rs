//! Network namespaces: takes a path, gives a handle that runs code inside and knows the namespace's
//! inode and cookie. It never leaves a thread in the wrong namespace.

use std::{
    fmt,
    fs::{self, File},
    io,
    num::NonZeroU32,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process,
    sync::Arc,
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};
use socket2::{Domain, Socket, Type};

use super::{Error, sys};

/// A network namespace, kept alive by this handle. Its pod is gone when [`Netns::still_at`] says so.
#[derive(Debug)]
pub struct Netns {
    namespace: Arc<File>,
    home: File,
    device: u64,
    inode: u64,
    cookie: NetnsCookie,
}

/// What the kernel side knows a network namespace by: unique until the next boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsCookie(pub u64);

impl Netns {
    /// Opens the namespace at `path`, such as `/run/netns/name` or `/proc/1/ns/net`.
    ///
    /// # Errors
    /// No such path, not a network namespace, no right to enter it, or the node's own.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let at_path = |source| Error::NetnsOpen {
            path: path.to_path_buf(),
            source,
        };
        // Nonblocking: whatever else may be there, a pipe for one, must not hold us.
        let namespace = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(at_path)?;
        Self::checked(Arc::new(namespace), at_path)
    }

    /// Shares a descriptor that somebody passed.
    ///
    /// # Errors
    /// It is not of a network namespace, there is no right to enter it, or it is the node's own.
    pub fn of(descriptor: Arc<File>) -> Result<Self, Error> {
        Self::checked(descriptor, Error::NetnsDescriptor)
    }

    fn checked(namespace: Arc<File>, failed: impl Fn(io::Error) -> Error) -> Result<Self, Error> {
        let found = fstatfs(&*namespace).map_err(|error| failed(error.into()))?;
        if found.filesystem_type() != NSFS_MAGIC {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a namespace",
            )));
        }
        let home = File::open(HOME).map_err(Error::NetnsEnter)?;
        let metadata = namespace.metadata().map_err(&failed)?;
        let (device, inode) = (metadata.dev(), metadata.ino());
        let home_inode = home.metadata().map_err(Error::NetnsEnter)?.ino();
        let mut netns = Self {
            namespace,
            home,
            device,
            inode,
            cookie: NetnsCookie(0),
        };
        // Entering is also the proof that it is a network namespace.
        let socket = netns
            .run(|| Socket::new(Domain::IPV4, Type::DGRAM, None))
            .map_err(&failed)?
            .map_err(Error::NetnsCookie)?;
        if inode == home_inode {
            return Err(Error::NetnsOwn);
        }
        netns.cookie = NetnsCookie(sys::socket_netns_cookie(&socket).map_err(Error::NetnsCookie)?);
        Ok(netns)
    }

    /// Looks for a living namespace by its inode, among the mounts and the processes that we see.
    pub fn find(inode: u32) -> Option<Self> {
        let name = format!("net:[{inode}]");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounted = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ').skip(3);
            (fields.next() == Some(name.as_str()))
                .then(|| fields.next())
                .flatten()
                .map(PathBuf::from)
        });
        let processes = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path().join("ns/net")))
            .filter(|link| fs::read_link(link).is_ok_and(|target| target.as_os_str() == &*name));
        mounted
            .chain(processes)
            .filter_map(|path| Self::open(&path).ok())
            .find(|netns| netns.inode == u64::from(inode))
    }

    /// The inode of the namespace: equal inodes, equal namespaces, while one is open.
    pub const fn inode(&self) -> u64 {
        self.inode
    }

    /// The cookie of the namespace.
    pub const fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// Whether `path` still leads to this namespace. A path that cannot be looked at says nothing, and
    /// counts as if it did.
    pub fn still_at(&self, path: &Path) -> bool {
        match fs::metadata(path) {
            Ok(metadata) => (metadata.dev(), metadata.ino()) == (self.device, self.inode),
            Err(error) => !matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ),
        }
    }

    /// Runs `inside` on this thread, inside the namespace (about 8 µs there and back). It must not
    /// wait for anything, and must not enter another namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered. If it cannot be left again the process ends: a thread in
    /// the wrong namespace would carry one pod's bytes as another's.
    pub fn run<T>(&self, inside: impl FnOnce() -> T) -> io::Result<T> {
        setns(&*self.namespace, CloneFlags::CLONE_NEWNET)?;
        let _way_home = WayHome(&self.home);
        Ok(inside())
    }

    /// Runs `inside` on a thread of its own, inside the namespace, and waits for it. It may block.
    ///
    /// # Errors
    /// No thread, the namespace cannot be entered, or `inside` panicked.
    pub(super) fn run_apart<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, || {
                    setns(&*self.namespace, CloneFlags::CLONE_NEWNET)?;
                    Ok(inside())
                })?
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.namespace
    }
}

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Brings the thread back, also when it unwinds.
struct WayHome<'a>(&'a File);

impl Drop for WayHome<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot leave a pod's network namespace");
            process::abort();
        }
    }
}

/// The index of `lo` in every namespace. Its name is the pod's to change.
pub(super) const LOOPBACK: NonZeroU32 = NonZeroU32::MIN;
const HOME: &str = "/proc/thread-self/ns/net";
