//! A network namespace by name: run a closure in it, read its files under `/proc`. Takes names
//! under `/run/netns`; gives what the closure gives; never moves the calling thread.

use std::{
    fmt,
    fs::File,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    panic::resume_unwind,
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{Backlog, listen},
};

use crate::wait;

/// The name of a namespace that `ip netns` knows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Netns(String);

impl Netns {
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(RUN_NETNS).join(&self.0)
    }

    pub fn open(&self) -> Result<File> {
        let path = self.path();
        File::open(&path).with_context(|| format!("open {}", path.display()))
    }

    /// Device and inode: equal for two descriptors of the same namespace.
    pub fn identity(&self) -> Result<(u64, u64)> {
        let meta = self.open()?.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Runs `work` on a fresh thread inside the namespace. Sockets made there keep belonging to
    /// the namespace and may be used on any thread afterwards.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.open()?;
        thread::scope(|scope| {
            let entered = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("enter netns {}", self.0))?;
                work()
            });
            entered.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Connects from inside the namespace, waiting at most `patience`.
    pub fn dial(&self, to: SocketAddr, patience: Duration) -> Result<TcpStream> {
        self.within(|| Ok(TcpStream::connect_timeout(&to, patience)?))
            .with_context(|| format!("connect to {to} in netns {}", self.0))
    }

    /// Listens inside the namespace. A listener that was just closed may live on for a moment in
    /// a program that another test is starting: between fork and exec it holds what we hold.
    pub fn listen(&self, at: SocketAddr) -> Result<TcpListener> {
        wait::until("the address to be free", FREED, || {
            match self.within(|| Ok(bound(at))) {
                Ok(Err(e)) if e.kind() == ErrorKind::AddrInUse => None,
                other => Some(other.and_then(|bound| Ok(bound?))),
            }
        })
        .and_then(|listening| listening)
        .with_context(|| format!("listen on {at} in netns {}", self.0))
    }

    /// Writes a setting under `/proc/sys/net`, which shows the namespace of the writing thread.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys/net").join(key);
        self.within(|| std::fs::write(&path, value).with_context(|| format!("set net/{key}")))
    }
}

impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn bound(at: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(at)?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Where `ip netns` keeps its names.
pub const RUN_NETNS: &str = "/run/netns";

/// For how long a listener that was closed may still be there.
const FREED: Duration = Duration::from_secs(30);
/// Its queue must not be the narrowest place of a test: what it drops comes again after seconds.
const BACKLOG: i32 = 4096;
