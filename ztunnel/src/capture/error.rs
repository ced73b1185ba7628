//! What goes wrong at the kernel: each variant names the thing and, where a person can help, the
//! remedy. It never carries a guess about a peer.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, pin::PinError, programs::ProgramError};

use super::NetnsCookie;

/// Faults of this node: its kernel, its privileges, its pods.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no bpf file system at {path}; mount one: mount -t bpf bpf /sys/fs/bpf")]
    BpffsMissing { path: PathBuf },
    #[error("mount a bpf file system at {path}; do it by hand: mount -t bpf bpf {path}")]
    BpffsMount { path: PathBuf, source: nix::Error },
    #[error("capability {capability} is missing ({purpose}); grant it to the process")]
    CapabilityMissing {
        capability: &'static str,
        purpose: &'static str,
    },
    #[error("cgroup2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")]
    CgroupMissing,
    #[error(
        "the cgroup2 mount at {path} is not the root of the hierarchy; run in the host's cgroup \
         namespace with the host's cgroup2 mounted"
    )]
    CgroupNotRoot { path: PathBuf },
    #[error("excluded networks of all pods exceed {max}; exclude fewer")]
    CidrsFull { max: u32 },
    #[error("this kernel lacks {feature}; {remedy}")]
    FeatureMissing {
        feature: &'static str,
        remedy: &'static str,
    },
    #[error("attach the eBPF program {name}")]
    Link {
        name: &'static str,
        source: io::Error,
    },
    #[error("replace the program of {link}")]
    LinkUpdate { link: PathBuf, source: io::Error },
    #[error("listen for {purpose} in the pod's network namespace")]
    Listen {
        purpose: &'static str,
        source: io::Error,
    },
    #[error("load the eBPF object")]
    Load(#[from] EbpfError),
    #[error("eBPF map {name}")]
    Map {
        name: &'static str,
        source: MapError,
    },
    #[error("the eBPF object has no map {name}; the build is broken: cargo xtask setup")]
    MapMissing { name: &'static str },
    #[error("create a socket in the pod's network namespace")]
    NetnsCookie(#[source] io::Error),
    #[error("the descriptor that was passed is not of a network namespace")]
    NetnsDescriptor(#[source] io::Error),
    #[error("enter the network namespace")]
    NetnsEnter(#[source] io::Error),
    #[error("ask for the programs in the pod's network namespace")]
    NetnsPrograms(#[source] io::Error),
    #[error("open the network namespace {path}")]
    NetnsOpen { path: PathBuf, source: io::Error },
    #[error("the network namespace is the node's own; host-network pods are not enrolled")]
    NetnsOwn,
    #[error("pod {cookie} is not enrolled")]
    NotEnrolled { cookie: NetnsCookie },
    #[error("{path} in the bpf file system")]
    Pin { path: PathBuf, source: io::Error },
    #[error("{path} is not in a bpf file system, so nothing of ours is pinned there")]
    PinsElsewhere { path: PathBuf },
    #[error(
        "{pods} pods are captured by eBPF, their pins are in {path}; release them (ztunnel release), or \
         set CAPTURE=ebpf"
    )]
    PinsHoldPods { path: PathBuf, pods: usize },
    #[error("a node process serves the pins in {path}; stop it first")]
    PinsServed { path: PathBuf },
    #[error(
        "the process of another node serves the pins in {path}; give each node of a kernel a \
         BPF_PIN_DIR of its own"
    )]
    PinsTaken { path: PathBuf },
    #[error("pin a link at {path}")]
    PinLink { path: PathBuf, source: PinError },
    #[error(
        "another node process captures this pod, its pins are elsewhere; release them: BPF_PIN_DIR=... \
         ztunnel release"
    )]
    PodTaken,
    #[error("{pods} pods are enrolled already, which is the limit")]
    PodsFull { pods: u32 },
    #[error("eBPF program {name}")]
    Program {
        name: &'static str,
        source: ProgramError,
    },
    #[error("the eBPF object has no program {name}; the build is broken: cargo xtask setup")]
    ProgramMissing { name: &'static str },
    #[error("read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{purpose} in the pod's network namespace: {answer}")]
    Route {
        purpose: &'static str,
        answer: String,
    },
    #[error("start a thread or a runtime to configure a network namespace")]
    Runtime(#[source] io::Error),
    #[error("set {path} in the pod's network namespace; /proc/sys/net must be writable")]
    Sysctl { path: PathBuf, source: io::Error },
    #[error("{count} {what}, but a pod can have {max}")]
    TooMany {
        what: &'static str,
        count: usize,
        max: usize,
    },
    #[error("{workers} workers, but there can be 1 to {max}")]
    Workers { workers: usize, max: u32 },
}

impl Error {
    pub(super) fn map(name: &'static str) -> impl Fn(MapError) -> Self {
        move |source| Self::Map { name, source }
    }

    pub(super) fn pin(path: &std::path::Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Pin {
            path: path.clone(),
            source,
        }
    }

    pub(super) fn program(name: &'static str) -> impl Fn(ProgramError) -> Self {
        move |source| Self::Program { name, source }
    }
}
