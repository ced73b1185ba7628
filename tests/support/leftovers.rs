//! What runs leave behind, and its removal: namespaces, pins, files and the processes inside. Takes
//! a name prefix; gives what it found; never touches a name without that prefix, nor a process
//! outside the namespaces that carry it.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    netns::{Netns, RUN_NETNS},
    process::output,
};

/// Things on this machine that carry a prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    pub namespaces: Vec<String>,
    pub pins: Vec<PathBuf>,
    pub files: Vec<PathBuf>,
    pub processes: Vec<i32>,
}

impl Leftovers {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            namespaces,
            pins,
            files,
            processes,
        } = self;
        write!(
            f,
            "{} namespaces, {} pins, {} files, {} processes",
            namespaces.len(),
            pins.len(),
            files.len(),
            processes.len()
        )
    }
}

/// What every name made by this process begins with: `zt-<pid>-`.
#[must_use]
pub fn own_prefix() -> String {
    format!("{PREFIX}{}-", process::id())
}

/// Everything that carries `prefix` now.
pub fn list(prefix: &str) -> Result<Leftovers> {
    let namespaces = names(Path::new(RUN_NETNS), prefix)?;
    let processes = inside(&namespaces)?;
    let under = |parent: &Path| -> Result<Vec<PathBuf>> {
        Ok(names(parent, prefix)?
            .into_iter()
            .map(|name| parent.join(name))
            .collect())
    };
    Ok(Leftovers {
        pins: under(Path::new(BPFFS))?,
        files: under(&std::env::temp_dir())?,
        namespaces,
        processes,
    })
}

/// Removes everything that carries `prefix` and gives what is still there.
pub fn sweep(prefix: &str) -> Result<Leftovers> {
    let found = list(prefix)?;
    for pid in found.processes {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            // It may have ended by itself since it was seen.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("kill {pid}")),
        }
    }
    for path in found.pins.iter().chain(&found.files) {
        let removed = if path.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        };
        match removed {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
    }
    let lines: String = found
        .namespaces
        .iter()
        .map(|name| format!("netns del {name}\n"))
        .collect();
    if !lines.is_empty() {
        // Another process may be collecting the same leftovers.
        drop(output(None, "ip", &["-force", "-batch", "-"], &lines));
    }
    list(prefix)
}

/// Sweeps the prefixes of processes that no longer exist.
pub fn collect_dead() -> Result<()> {
    let mut owners = BTreeSet::new();
    for place in [
        Path::new(RUN_NETNS),
        Path::new(BPFFS),
        &std::env::temp_dir(),
    ] {
        for name in names(place, PREFIX)? {
            let pid = name
                .strip_prefix(PREFIX)
                .and_then(|rest| rest.split('-').next());
            owners.extend(pid.and_then(|pid| pid.parse::<u32>().ok()));
        }
    }
    for pid in owners {
        if !Path::new("/proc").join(pid.to_string()).exists() {
            sweep(&format!("{PREFIX}{pid}-"))?;
        }
    }
    Ok(())
}

/// Where the BPF file system is mounted.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Names in `parent` that begin with `prefix`; none if there is no such directory.
fn names(parent: &Path, prefix: &str) -> Result<Vec<String>> {
    let entries = match fs::read_dir(parent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list {}", parent.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

/// Processes, other than this one, that live in one of these namespaces.
fn inside(namespaces: &[String]) -> Result<Vec<i32>> {
    // A name that vanishes meanwhile has nobody to be found in it.
    let wanted: BTreeSet<_> = namespaces
        .iter()
        .filter_map(|name| Netns::named(name.as_str()).identity().ok())
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let own = i32::try_from(process::id())?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let meta = fs::metadata(entry.path().join("ns/net"));
        if pid != own && meta.is_ok_and(|meta| wanted.contains(&(meta.dev(), meta.ino()))) {
            found.push(pid);
        }
    }
    Ok(found)
}

const PREFIX: &str = "zt-";
