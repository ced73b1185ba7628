//! What must be true before anything is changed: takes the parameters, looks at capabilities, mounts and
//! kernel features, gives every problem with its remedy. It probes features, never versions.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{Error, Params};

/// Looks for everything that would make [`super::Capture::start`] fail, and changes nothing.
///
/// # Errors
/// All problems found, each with its remedy.
pub fn preflight(params: &Params) -> Result<(), Vec<Error>> {
    let mut problems = Vec::new();
    match fs::read_to_string(STATUS) {
        Ok(status) => problems.extend(missing_capabilities(&status)),
        Err(source) => problems.push(Error::Read {
            path: STATUS.into(),
            source,
        }),
    }
    problems.extend(cgroup_root().err());
    problems.extend(bpffs_missing(&params.pin_dir));
    // Without the capabilities every probe would fail, and name the wrong thing.
    if problems.is_empty() {
        problems.extend(missing_features());
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems)
    }
}

/// The same for capture by somebody else, which needs less.
///
/// # Errors
/// All problems found, each with its remedy.
pub fn preflight_external() -> Result<(), Vec<Error>> {
    let status = fs::read_to_string(STATUS).map_err(|source| {
        vec![Error::Read {
            path: STATUS.into(),
            source,
        }]
    })?;
    let problems = missing_capabilities(&status);
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems)
    }
}

/// The root of the cgroup2 hierarchy, wherever it is mounted: on hybrid hosts beside cgroup v1.
pub(super) fn cgroup_root() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string(MOUNTS).map_err(|source| Error::Read {
        path: MOUNTS.into(),
        source,
    })?;
    let mut below = None;
    for path in mounts.lines().filter_map(cgroup2_mount) {
        match fs::metadata(&path) {
            Ok(metadata) if metadata.ino() == CGROUP_ROOT_INODE => return Ok(path),
            _ => below = Some(path),
        }
    }
    Err(below.map_or(Error::CgroupMissing, |path| Error::CgroupNotRoot { path }))
}

/// Mounts a bpf file system at its usual place, if the pins belong there and none is mounted.
pub(super) fn mount_bpffs(pin_dir: &Path) -> Result<(), Error> {
    if in_bpffs(pin_dir) {
        return Ok(());
    }
    let path = Path::new(BPFFS);
    if !pin_dir.starts_with(path) || !path.is_dir() {
        return Err(Error::BpffsMissing {
            path: pin_dir.to_path_buf(),
        });
    }
    mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .map_err(|source| Error::BpffsMount {
        path: path.to_path_buf(),
        source,
    })?;
    tracing::info!(path = BPFFS, "mounted the bpf file system");
    Ok(())
}

fn bpffs_missing(pin_dir: &Path) -> Option<Error> {
    let mountable = pin_dir.starts_with(BPFFS) && Path::new(BPFFS).is_dir();
    (!in_bpffs(pin_dir) && !mountable).then(|| Error::BpffsMissing {
        path: pin_dir.to_path_buf(),
    })
}

/// Whether the directory is in a bpf file system, or will be when it is made.
fn in_bpffs(dir: &Path) -> bool {
    dir.ancestors()
        .find_map(|dir| statfs(dir).ok())
        .is_some_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// The mount point, if the line of mountinfo is of a cgroup2.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let (mount, file_system) = line.split_once(" - ")?;
    if file_system.split(' ').next()? != "cgroup2" {
        return None;
    }
    mount.split(' ').nth(4).map(PathBuf::from)
}

fn missing_capabilities(status: &str) -> Vec<Error> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    CAPABILITIES
        .iter()
        .filter(|(bit, _, _)| effective & (1 << bit) == 0)
        .map(|(_, capability, purpose)| Error::CapabilityMissing {
            capability,
            purpose,
        })
        .collect()
}

fn missing_features() -> Vec<Error> {
    let mut missing = Vec::new();
    let mut need = |feature, remedy, probe: Result<bool, String>| match probe {
        Ok(true) => {}
        Ok(false) => missing.push(Error::FeatureMissing { feature, remedy }),
        // A probe that cannot decide says nothing; loading will.
        Err(error) => tracing::debug!(feature, error, "undecided"),
    };
    for (feature, kind) in PROGRAMS {
        let probe = is_program_supported(kind).map_err(|error| error.to_string());
        need(feature, KERNEL, probe);
    }
    for (feature, kind) in MAPS {
        let probe = is_map_supported(kind).map_err(|error| error.to_string());
        need(feature, KERNEL, probe);
    }
    for (feature, kind, helper) in HELPERS {
        let probe = is_helper_supported(kind, helper).map_err(|error| error.to_string());
        need(feature, KERNEL, probe);
    }
    let sysctl = Path::new("/proc/sys/net/ipv4/tcp_fwmark_accept").exists();
    need("net.ipv4.tcp_fwmark_accept", KERNEL, Ok(sysctl));
    missing
}

const KERNEL: &str = "run a kernel from 6.1 on with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and \
                      CONFIG_INET";

const PROGRAMS: [(&str, ProgramType); 3] = [
    ("cgroup/connect programs", ProgramType::CgroupSockAddr),
    ("cgroup/setsockopt programs", ProgramType::CgroupSockopt),
    ("sk_lookup programs", ProgramType::SkLookup),
];

const MAPS: [(&str, MapType); 5] = [
    ("hash maps", MapType::Hash),
    ("longest-prefix maps", MapType::LpmTrie),
    ("per-CPU arrays", MapType::PerCpuArray),
    ("socket storage", MapType::SkStorage),
    ("socket maps", MapType::SockMap),
];

// bpf_setsockopt in cgroup/setsockopt is as old as the others there, but the probe is made as a
// getsockopt program, which lacks it.
const HELPERS: [(&str, ProgramType, BpfHelper); 7] = [
    (
        "bpf_get_netns_cookie in cgroup/connect",
        ProgramType::CgroupSockAddr,
        BpfHelper::BPF_FUNC_get_netns_cookie,
    ),
    (
        "bpf_setsockopt in cgroup/connect",
        ProgramType::CgroupSockAddr,
        BpfHelper::BPF_FUNC_setsockopt,
    ),
    (
        "bpf_sk_storage_get in cgroup/connect",
        ProgramType::CgroupSockAddr,
        BpfHelper::BPF_FUNC_sk_storage_get,
    ),
    (
        "bpf_get_netns_cookie in cgroup/setsockopt",
        ProgramType::CgroupSockopt,
        BpfHelper::BPF_FUNC_get_netns_cookie,
    ),
    (
        "bpf_set_retval in cgroup/setsockopt",
        ProgramType::CgroupSockopt,
        BpfHelper::BPF_FUNC_set_retval,
    ),
    (
        "bpf_sk_storage_get in cgroup/setsockopt",
        ProgramType::CgroupSockopt,
        BpfHelper::BPF_FUNC_sk_storage_get,
    ),
    (
        "bpf_sk_assign in sk_lookup",
        ProgramType::SkLookup,
        BpfHelper::BPF_FUNC_sk_assign,
    ),
];

/// Bit (linux/capability.h), name, and what for. CAP_SYS_ADMIN includes CAP_BPF (6.18).
const CAPABILITIES: [(u32, &str, &str); 2] = [
    (
        12,
        "CAP_NET_ADMIN",
        "for programs on sockets, transparent sockets, marks and routes in pods",
    ),
    (
        21,
        "CAP_SYS_ADMIN",
        "to enter the network namespaces of pods",
    ),
];

const STATUS: &str = "/proc/thread-self/status";
const MOUNTS: &str = "/proc/self/mountinfo";
const BPFFS: &str = "/sys/fs/bpf";
/// The kernel numbers the nodes of a cgroup hierarchy from its root on; a mount from inside a cgroup
/// namespace shows a later one (6.18).
const CGROUP_ROOT_INODE: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_capability_is_named() {
        let named = |mask: u64| {
            missing_capabilities(&format!("Name:\tx\nCapEff:\t{mask:016x}\n"))
                .into_iter()
                .map(|error| error.to_string())
                .collect::<Vec<_>>()
                .join("; ")
        };
        assert_eq!(named(u64::MAX), "");
        let without_admin = named(!(1 << 21));
        assert!(without_admin.contains("CAP_SYS_ADMIN"), "{without_admin}");
        assert!(!without_admin.contains("CAP_NET_ADMIN"), "{without_admin}");
        assert_eq!(missing_capabilities("").len(), CAPABILITIES.len());
    }

    #[test]
    fn cgroup2_is_found_among_hybrid_mounts() {
        let v1 = "31 24 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu";
        let v2 = "40 24 0:36 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";
        assert_eq!(cgroup2_mount(v1), None);
        assert_eq!(
            cgroup2_mount(v2),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        assert_eq!(cgroup2_mount("nonsense"), None);
    }

    #[test]
    fn pins_outside_a_bpf_file_system_are_refused_with_the_remedy() {
        let error = bpffs_missing(Path::new("/proc/ztunnel")).unwrap();
        assert!(error.to_string().contains("mount -t bpf"), "{error}");
    }
}
