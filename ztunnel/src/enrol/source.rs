//! Where the list of pods comes from: one trait, one file per source. Takes nothing, gives the pods
//! that should be in the mesh and says when that changes; it never enrols one itself.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{PodRef, PodUid};

/// Somebody who says which pods should be in the mesh.
pub trait Source {
    /// The pods that should be in the mesh now.
    fn pods(&self) -> Vec<Listed>;

    /// How many more it wants of which it has said too little to enrol them.
    fn unclear(&self) -> usize;

    /// What the state lists; a source of its own does not look at it.
    fn listed(&mut self, pods: Vec<Listed>);

    /// Waits until somebody asks for something. Cancel safe.
    fn changed(&mut self) -> impl Future<Output = Asked>;

    /// What becomes of a captured pod that is not listed.
    fn unlisted(&self) -> Unlisted;

    /// Whether the list is complete, so that a node which has done all of it, but for this many
    /// pods, may be called ready.
    fn is_settled(&self, troubled: usize) -> bool;
}

/// What a source asks for, and who waits for the outcome.
#[derive(Debug)]
pub enum Asked {
    /// Nothing but to say how pods are: the source is there, or gone, or refused something.
    Report,
    /// This pod is listed from now on, or elsewhere.
    Enrol(PodUid, Answer),
    /// These pods leave the mesh; they are not listed any more.
    Release(Vec<PodUid>, Answer),
    /// The list is complete from now on; these pods leave the mesh.
    Settle(Vec<PodUid>, Answer),
}

/// What becomes of a captured pod that is not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlisted {
    /// It stays captured, and nobody serves it, until its source releases it by name or its
    /// namespace is dead: that nobody lists it may be an error.
    Closed,
    /// It leaves the mesh: the list is the whole truth.
    Released,
}

/// Somebody who waits to hear whether something is done, or why not.
pub struct Answer(Box<dyn FnOnce(Result<(), String>) + Send>);

impl Answer {
    pub(super) fn new(tell: impl FnOnce(Result<(), String>) + Send + 'static) -> Self {
        Self(Box::new(tell))
    }

    /// Tells.
    pub fn tell(self, outcome: Result<(), String>) {
        (self.0)(outcome);
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

/// A pod that should be in the mesh.
#[derive(Clone, Debug)]
pub struct Listed {
    /// What the source tells it from others by.
    pub uid: PodUid,
    /// Which pod.
    pub pod: PodRef,
    /// Its network namespace.
    pub place: Place,
    /// What is not captured.
    pub exclusions: Exclusions,
}

/// Where a pod's network namespace is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Somebody handed it over.
    Handed(Handed),
    /// It is bound in the file system.
    Path(PathBuf),
}

/// A descriptor that somebody handed over for a pod's namespace; whether it is one shows when it is
/// entered.
#[derive(Clone, Debug)]
pub struct Handed {
    descriptor: Arc<File>,
    /// Device and inode; equal for two descriptors of one namespace.
    at: Option<(u64, u64)>,
}

impl Handed {
    /// Takes the descriptor; it is closed with the last clone.
    #[must_use]
    pub fn new(descriptor: OwnedFd) -> Self {
        let descriptor = File::from(descriptor);
        let at = descriptor.metadata().ok();
        Self {
            at: at.map(|at| (at.dev(), at.ino())),
            descriptor: Arc::new(descriptor),
        }
    }

    /// The descriptor.
    #[must_use]
    pub const fn descriptor(&self) -> &Arc<File> {
        &self.descriptor
    }
}

impl PartialEq for Handed {
    fn eq(&self, other: &Self) -> bool {
        self.at.is_some() && self.at == other.at
    }
}

impl Eq for Handed {}

/// What is not captured in a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Destinations of its outbound connections.
    pub outbound_cidrs: Vec<IpNet>,
    /// Destination ports of its outbound connections.
    pub outbound_ports: Vec<u16>,
    /// Sources of its inbound connections.
    pub inbound_cidrs: Vec<IpNet>,
    /// Its own ports.
    pub inbound_ports: Vec<u16>,
    /// Questions to resolvers.
    pub dns: bool,
}

/// The pods that the state itself lists.
#[derive(Debug, Default)]
pub struct Listing(Vec<Listed>);

impl Source for Listing {
    fn pods(&self) -> Vec<Listed> {
        self.0.clone()
    }

    fn unclear(&self) -> usize {
        0
    }

    fn listed(&mut self, pods: Vec<Listed>) {
        self.0 = pods;
    }

    async fn changed(&mut self) -> Asked {
        std::future::pending().await
    }

    fn unlisted(&self) -> Unlisted {
        Unlisted::Released
    }

    fn is_settled(&self, _troubled: usize) -> bool {
        true
    }
}

impl Place {
    /// The path, if there is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Handed(_) => None,
            Self::Path(path) => Some(path),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handed(handed) => {
                write!(f, "net:[{}]", handed.at.map_or(0, |(_, inode)| inode))
            }
            Self::Path(path) => path.display().fmt(f),
        }
    }
}
