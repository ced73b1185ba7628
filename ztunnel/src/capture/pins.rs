//! What outlives the process, and where: takes the pin directory, gives its generations, their pods and
//! the links in them. A directory is complete from the rename that gave it its name; it never edits one
//! that is not.
//!
//! ```text
//! <pin dir>/abi1-gen7/                 the node: maps by name, links connect4, connect6,
//!                                      setsockopt; sendmsg4 and so on where DNS is captured
//! <pin dir>/abi1-gen7/pods/<cookie>/   one pod: maps by name, link
//! <pin dir>/abi1-gen7/pods/<cookie>/uid
//!                                      a symbolic link to nowhere: what its source calls the pod
//! <pin dir>/node-<cookie>/             empty: the network namespace of the node that serves it
//! <pin dir>/tmp-node, pods/tmp-<cookie>/
//!                                      under construction, or left by a crash
//! ```
//! The names of directories and links are the same in every ABI version, so that any binary can
//! replace or release what any other left.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use ebpf_abi::ABI_VERSION;

use super::{Error, NetnsCookie, sys};

pub(super) const CONNECT4: &str = "connect4";
pub(super) const CONNECT6: &str = "connect6";
pub(super) const SENDMSG4: &str = "sendmsg4";
pub(super) const SENDMSG6: &str = "sendmsg6";
pub(super) const RECVMSG4: &str = "recvmsg4";
pub(super) const RECVMSG6: &str = "recvmsg6";
pub(super) const GETPEERNAME4: &str = "getpeername4";
pub(super) const GETPEERNAME6: &str = "getpeername6";
pub(super) const SETSOCKOPT: &str = "setsockopt";
/// Every link to the cgroup.
pub(super) const NODE_LINKS: [&str; 9] = [
    CONNECT4,
    CONNECT6,
    SENDMSG4,
    SENDMSG6,
    RECVMSG4,
    RECVMSG6,
    GETPEERNAME4,
    GETPEERNAME6,
    SETSOCKOPT,
];
pub(super) const LINK: &str = "link";
pub(super) const PODS: &str = "pods";
const UID: &str = "uid";

/// One complete set of pins.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Generation {
    pub(super) number: u64,
    pub(super) abi: u32,
    pub(super) dir: PathBuf,
}

impl Generation {
    /// The successor of `newest`, in this binary's ABI version.
    pub(super) fn next(pin_dir: &Path, newest: Option<&Self>) -> Self {
        let number = newest.map_or(1, |newest| newest.number.saturating_add(1));
        Self {
            number,
            abi: ABI_VERSION,
            dir: pin_dir.join(format!("abi{ABI_VERSION}-gen{number}")),
        }
    }

    fn parse(dir: PathBuf) -> Option<Self> {
        let name = dir.file_name()?.to_str()?.strip_prefix("abi")?;
        let (abi, number) = name.split_once("-gen")?;
        Some(Self {
            number: number.parse().ok()?,
            abi: abi.parse().ok()?,
            dir,
        })
    }

    /// The pods enrolled in it.
    pub(super) fn pods(&self) -> Result<Vec<NetnsCookie>, Error> {
        let mut pods = entries(&self.dir.join(PODS))?
            .iter()
            .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
            .map(NetnsCookie)
            .collect::<Vec<_>>();
        pods.sort_unstable();
        Ok(pods)
    }

    pub(super) fn pod(&self, cookie: NetnsCookie) -> PathBuf {
        self.dir.join(PODS).join(cookie.to_string())
    }

    pub(super) fn unfinished_pod(&self, cookie: NetnsCookie) -> PathBuf {
        self.dir.join(PODS).join(format!("{UNFINISHED}{cookie}"))
    }
}

/// All complete generations, newest first. More than one means that a crash came between a publishing
/// and the removal of what it replaced.
pub(super) fn generations(pin_dir: &Path) -> Result<Vec<Generation>, Error> {
    let mut found = entries(pin_dir)?
        .into_iter()
        .filter_map(Generation::parse)
        .collect::<Vec<_>>();
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

/// Removes what a crash left unfinished. Its links are on no complete pin, so nobody relies on them.
pub(super) fn clean(pin_dir: &Path) -> Result<(), Error> {
    let mut places = vec![pin_dir.to_path_buf()];
    places.extend(generations(pin_dir)?.into_iter().map(|g| g.dir.join(PODS)));
    for path in places
        .iter()
        .map(|dir| entries(dir))
        .collect::<Result<Vec<_>, _>>()?
        .concat()
    {
        if is_unfinished(&path) {
            tracing::warn!(path = %path.display(), "removing pins that were never completed");
            remove(&path)?;
        }
    }
    Ok(())
}

/// The node that serves the directory, or served it last: the cookie of its network namespace.
pub(super) fn owner(pin_dir: &Path) -> Result<Option<NetnsCookie>, Error> {
    Ok(entries(pin_dir)?.iter().find_map(|path| owner_of(path)))
}

/// Writes down who serves the directory. Only while nobody else does.
pub(super) fn set_owner(pin_dir: &Path, owner: NetnsCookie) -> Result<(), Error> {
    remove_owner(pin_dir)?;
    create(&pin_dir.join(format!("{OWNER}{owner}")))
}

pub(super) fn remove_owner(pin_dir: &Path) -> Result<(), Error> {
    for path in entries(pin_dir)? {
        if owner_of(&path).is_some() {
            remove(&path)?;
        }
    }
    Ok(())
}

/// What the pod was called by whoever had it enrolled.
pub(super) fn uid(pod: &Path) -> Option<OsString> {
    fs::read_link(pod.join(UID))
        .ok()
        .map(PathBuf::into_os_string)
}

/// Writes down what the pod is called, in one step.
pub(super) fn set_uid(pod: &Path, called: &OsStr) -> Result<(), Error> {
    if uid(pod).as_deref() == Some(called) {
        return Ok(());
    }
    let unfinished = pod.join(format!("{UNFINISHED}{UID}"));
    remove_file(&unfinished)?;
    symlink(called, &unfinished).map_err(Error::pin(&unfinished))?;
    publish(&unfinished, &pod.join(UID))
}

/// The pod is called nothing.
pub(super) fn remove_uid(pod: &Path) -> Result<(), Error> {
    remove_file(&pod.join(UID))
}

/// Where the node's pins are made before they are published.
pub(super) fn unfinished_node(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("{UNFINISHED}{NODE}"))
}

/// Makes an empty directory; one that is there already is a leftover, and goes.
pub(super) fn create(dir: &Path) -> Result<(), Error> {
    remove(dir)?;
    fs::create_dir(dir).map_err(Error::pin(dir))
}

/// Gives a finished directory its name.
pub(super) fn publish(finished: &Path, name: &Path) -> Result<(), Error> {
    fs::rename(finished, name).map_err(Error::pin(name))
}

/// Removes a directory of pins; one that is gone is fine.
pub(super) fn remove(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::pin(dir)),
    }
}

/// Removes one pin; one that is gone is fine.
pub(super) fn remove_file(pin: &Path) -> Result<(), Error> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::pin(pin)),
    }
}

/// Swaps the program of the link pinned at `path`; none if there is no such link, or what it was
/// attached to is gone.
pub(super) fn swap(path: &Path, program: impl AsFd) -> Result<Option<OwnedFd>, Error> {
    let Some(link) = link(path)? else {
        return Ok(None);
    };
    match sys::link_update(&link, program) {
        Ok(()) => Ok(Some(link)),
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(None),
        Err(source) => Err(Error::LinkUpdate {
            link: path.to_path_buf(),
            source,
        }),
    }
}

/// The link pinned at `path`, if there is one.
pub(super) fn link(path: &Path) -> Result<Option<OwnedFd>, Error> {
    match sys::object_get(path) {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::pin(path)(error)),
    }
}

/// The inode of the netns that a pod's link is attached to: 0 when it is gone, none without a link.
pub(super) fn netns_inode(pod: &Path) -> Result<Option<u32>, Error> {
    let path = pod.join(LINK);
    link(&path)?
        .map(|link| sys::link_netns_inode(link).map_err(Error::pin(&path)))
        .transpose()
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let listed = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::pin(dir))?,
    };
    listed
        .map(|entry| entry.map(|entry| entry.path()).map_err(Error::pin(dir)))
        .collect()
}

fn owner_of(path: &Path) -> Option<NetnsCookie> {
    let cookie = path.file_name()?.to_str()?.strip_prefix(OWNER)?;
    cookie.parse().ok().map(NetnsCookie)
}

/// Whether we gave it its name: there may be other people's pins beside ours.
fn is_unfinished(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str()?.strip_prefix(UNFINISHED))
        .is_some_and(|rest| rest == NODE || rest.parse::<u64>().is_ok())
}

/// Pins may not have a dot in their name.
const UNFINISHED: &str = "tmp-";
const NODE: &str = "node";
const OWNER: &str = "node-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_generation_comes_first_whatever_its_abi() {
        let mut all = ["abi2-gen3", "abi1-gen10", "abi1-gen9"]
            .map(|name| Generation::parse(PathBuf::from("/pins").join(name)).unwrap());
        all.sort_unstable_by(|a, b| b.cmp(a));
        assert_eq!(all.map(|generation| generation.number), [10, 9, 3]);
    }

    #[test]
    fn other_names_are_no_generation() {
        for name in [
            "abi1",
            "abi-gen1",
            "abi1-genx",
            "tmp-node",
            "abi1-gen-1",
            "xabi1-gen1",
        ] {
            assert_eq!(
                Generation::parse(PathBuf::from("/pins").join(name)),
                None,
                "{name}"
            );
        }
    }

    #[test]
    fn a_successor_parses_back() {
        let first = Generation::next(Path::new("/pins"), None);
        let second = Generation::next(Path::new("/pins"), Some(&first));
        assert_eq!(Generation::parse(second.dir.clone()), Some(second));
    }
}
