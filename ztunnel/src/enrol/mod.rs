//! Pods come and go. Takes the list of pods that should be in the mesh and gives the difference:
//! pods that are captured from now on, and pods that are not any more. A pod whose namespace is
//! missing is reported and tried again; never lets one pod's trouble touch another.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use tracing::{info, warn};

use crate::capture::{
    self, Capture, Dialer, Netns, NetnsCookie, PodCapture, PodSettings, WorkerListeners,
};
use crate::model::PodRef;

/// A pod that should be in the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which pod.
    pub pod: PodRef,
    /// The path of its network namespace.
    pub netns: PathBuf,
    /// What the kernel has to know of it.
    pub settings: PodSettings,
}

/// The number of one enrolment; a pod that leaves and comes back gets another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodId(u64);

/// A difference.
#[derive(Debug)]
pub enum Change {
    /// The pod is captured; its listeners want to be served.
    Up {
        /// This enrolment.
        id: PodId,
        /// Which pod.
        pod: PodRef,
        /// One set a worker, in the workers' order.
        listeners: Vec<WorkerListeners>,
        /// Makes sockets in the pod.
        dialer: Dialer,
    },
    /// The pod left; its connections end.
    Down(PodId),
}

/// Why a pod is not captured.
#[derive(Debug, Error)]
enum Trouble {
    #[error(transparent)]
    Capture(#[from] capture::Error),
    #[error("its network namespace is the same as that of pod {0}")]
    SharedNetns(PodRef),
}

struct Enrolled {
    id: PodId,
    wanted: Wanted,
    netns: Arc<Netns>,
    capture: PodCapture,
}

/// The pods of this node, as they are and as they should be.
pub struct Enrolment {
    capture: Capture,
    enrolled: BTreeMap<PodRef, Enrolled>,
    troubled: BTreeMap<PodRef, String>,
    next_id: u64,
    settled: bool,
}

impl std::fmt::Debug for Enrolment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enrolment")
            .field("enrolled", &self.enrolled.len())
            .field("troubled", &self.troubled)
            .finish_non_exhaustive()
    }
}

impl Enrolment {
    /// Takes the node's capture; nothing is enrolled by this process yet.
    #[must_use]
    pub fn new(capture: Capture) -> Self {
        Self {
            capture,
            enrolled: BTreeMap::new(),
            troubled: BTreeMap::new(),
            next_id: 0,
            settled: false,
        }
    }

    /// Brings the pods to what is wanted and gives the difference. Call it when something changed
    /// and, because namespaces vanish without a word, from time to time.
    pub fn reconcile(&mut self, wanted: &[Wanted]) -> Vec<Change> {
        let mut changes = Vec::new();
        self.remove_unwanted(wanted, &mut changes);
        for pod in wanted {
            match self.keep_or_enrol(pod) {
                Ok(Some(change)) => changes.push(change),
                Ok(None) => {}
                Err(trouble) => self.report(&pod.pod, &trouble),
            }
        }
        if !self.settled {
            self.settled = true;
            self.release_forgotten();
        }
        self.collect();
        changes
    }

    /// How many pods are captured.
    #[must_use]
    pub fn enrolled(&self) -> usize {
        self.enrolled.len()
    }

    /// How many wanted pods are not captured.
    #[must_use]
    pub fn troubled(&self) -> usize {
        self.troubled.len()
    }

    /// The kernel's side.
    #[must_use]
    pub fn capture(&self) -> &Capture {
        &self.capture
    }

    /// Ends what is not wanted any more: pods not listed, and pods whose namespace is another now.
    fn remove_unwanted(&mut self, wanted: &[Wanted], changes: &mut Vec<Change>) {
        let gone: Vec<(PodRef, bool)> = self
            .enrolled
            .values()
            .filter_map(|held| {
                let listed = wanted.iter().find(|w| w.pod == held.wanted.pod);
                let vanished = !held.netns.still_at(&held.wanted.netns);
                let stays = listed.is_some_and(|w| w.netns == held.wanted.netns) && !vanished;
                (!stays).then(|| (held.wanted.pod.clone(), vanished))
            })
            .collect();
        for (pod, vanished) in gone {
            let Some(held) = self.enrolled.remove(&pod) else {
                continue;
            };
            changes.push(Change::Down(held.id));
            let netns = held.wanted.netns.display();
            if vanished {
                warn!(%pod, %netns, "pod's network namespace is gone; its capture is removed");
            } else {
                info!(%pod, %netns, "pod leaves the mesh");
            }
            if let Err(error) = self.capture.release(held.netns.cookie()) {
                warn!(%pod, %error, "capture not removed completely");
            }
        }
        self.troubled
            .retain(|pod, _| wanted.iter().any(|w| w.pod == *pod));
    }

    fn keep_or_enrol(&mut self, wanted: &Wanted) -> Result<Option<Change>, Trouble> {
        if let Some(held) = self.enrolled.get_mut(&wanted.pod) {
            if held.wanted.settings != wanted.settings {
                held.capture.update(&wanted.settings)?;
                held.wanted.settings = wanted.settings.clone();
            }
            return Ok(None);
        }
        let netns = Arc::new(Netns::open(&wanted.netns)?);
        let cookie = netns.cookie();
        if let Some(other) = self.holder_of(cookie) {
            return Err(Trouble::SharedNetns(other));
        }
        let (capture, listeners) = self.capture.enrol(&netns, &wanted.settings)?;
        self.next_id += 1;
        let id = PodId(self.next_id);
        let dialer = capture.dialer(&wanted.settings);
        let pod = wanted.pod.clone();
        self.troubled.remove(&pod);
        info!(%pod, netns = %wanted.netns.display(), cookie = cookie.0, "pod enrolled");
        self.enrolled.insert(
            pod.clone(),
            Enrolled {
                id,
                wanted: wanted.clone(),
                netns,
                capture,
            },
        );
        Ok(Some(Change::Up {
            id,
            pod,
            listeners,
            dialer,
        }))
    }

    fn holder_of(&self, cookie: NetnsCookie) -> Option<PodRef> {
        self.enrolled
            .values()
            .find(|held| held.netns.cookie() == cookie)
            .map(|held| held.wanted.pod.clone())
    }

    /// Says a trouble once, and again only when it changes.
    fn report(&mut self, pod: &PodRef, trouble: &Trouble) {
        let text = error_chain(trouble);
        if self.troubled.get(pod) != Some(&text) {
            warn!(%pod, error = %text, "pod not enrolled; trying again");
            self.troubled.insert(pod.clone(), text);
        }
    }

    /// Releases pods that an earlier process enrolled and nobody wants now. A pod that is wanted
    /// and in trouble keeps its old capture: it stays closed.
    fn release_forgotten(&self) {
        if !self.troubled.is_empty() {
            return;
        }
        let pinned = match self.capture.enrolled() {
            Ok(pinned) => pinned,
            Err(error) => {
                warn!(%error, "pins of an earlier process not read");
                return;
            }
        };
        for cookie in pinned {
            if self.holder_of(cookie).is_none() {
                info!(
                    cookie = cookie.0,
                    "releasing a pod that is not listed any more"
                );
                if let Err(error) = self.capture.release(cookie) {
                    warn!(cookie = cookie.0, %error, "capture not removed completely");
                }
            }
        }
    }

    fn collect(&self) {
        match self.capture.collect() {
            Ok(gone) => {
                for cookie in gone {
                    info!(
                        cookie = cookie.0,
                        "removed the pins of a namespace that is gone"
                    );
                }
            }
            Err(error) => warn!(%error, "pins of dead namespaces not collected"),
        }
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
