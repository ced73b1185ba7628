//! Pods come and go. Takes the list of pods that should be in the mesh and gives the difference:
//! pods that are captured from now on, and pods that are not any more. A pod whose namespace is
//! missing is reported and tried again; never lets one pod's trouble touch another.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
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

/// How the pods of this node are, for whoever asks at any time.
#[derive(Debug, Default)]
pub struct Census {
    enrolled: AtomicU64,
    troubled: AtomicU64,
    repairs: AtomicU64,
    started: AtomicU64,
    stopped: AtomicU64,
}

impl Census {
    /// Pods that are captured.
    #[must_use]
    pub fn enrolled(&self) -> u64 {
        self.enrolled.load(Ordering::Relaxed)
    }

    /// Pods that should be captured and are not, or not as they should.
    #[must_use]
    pub fn troubled(&self) -> u64 {
        self.troubled.load(Ordering::Relaxed)
    }

    /// How often something that capture needs in a pod was gone and was put back.
    #[must_use]
    pub fn repairs(&self) -> u64 {
        self.repairs.load(Ordering::Relaxed)
    }

    /// How many enrolments began.
    #[must_use]
    pub fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }

    /// How many of them ended.
    #[must_use]
    pub fn stopped(&self) -> u64 {
        self.stopped.load(Ordering::Relaxed)
    }

    /// A difference counts.
    fn take(&self, change: &Change) {
        let counter = match change {
            Change::Up { .. } => &self.started,
            Change::Down(_) => &self.stopped,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// The wanted pods whose namespace was found, by namespace.
type Found<'w> = BTreeMap<NetnsCookie, (&'w Wanted, Arc<Netns>)>;

/// The pods of this node, as they are and as they should be.
pub struct Enrolment {
    capture: Capture,
    enrolled: BTreeMap<NetnsCookie, Enrolled>,
    troubled: BTreeMap<PodRef, String>,
    /// Namespaces that this round has tried to enrol, while it is not finished.
    tried: BTreeSet<NetnsCookie>,
    census: Arc<Census>,
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
            tried: BTreeSet::new(),
            census: Arc::default(),
            next_id: 0,
            settled: false,
        }
    }

    /// Brings the pods to what is wanted and gives the difference. Call it when something changed
    /// and, because namespaces vanish without a word, from time to time. Enrolling takes some
    /// milliseconds each, so one call enrols a few: call it again while [`Self::is_behind`].
    ///
    /// Capture goes by namespace, so a pod that only changed its name or account stays captured
    /// all the while; and a pod whose path leads nowhere any more stays captured until its
    /// namespace is dead, because its processes may live on.
    pub fn reconcile(&mut self, wanted: &[Wanted]) -> Vec<Change> {
        let mut changes = Vec::new();
        let listed: BTreeSet<&PodRef> = wanted.iter().map(|wanted| &wanted.pod).collect();
        let (found, lost) = self.find(wanted);
        self.leave(&listed, &found, &mut changes);
        let mut behind = false;
        let before = self.tried.len();
        for (cookie, (wanted, netns)) in &found {
            if !self.enrolled.contains_key(cookie) && !self.tried.contains(cookie) {
                if self.tried.len() - before == BATCH {
                    behind = true;
                    continue;
                }
                self.tried.insert(*cookie);
            } else if !self.enrolled.contains_key(cookie) {
                // It failed in this round already.
                continue;
            }
            match self.keep_or_enrol(*cookie, wanted, netns) {
                Ok(Some(change)) => changes.push(change),
                Ok(None) => {}
                Err(trouble) => self.report(&wanted.pod, &trouble),
            }
        }
        self.troubled.retain(|pod, _| listed.contains(pod));
        self.count();
        changes.iter().for_each(|change| self.census.take(change));
        if behind {
            return changes;
        }
        self.tried.clear();
        // Pins that an earlier process left may be those of a pod that is not found now.
        if !self.settled && lost == 0 {
            self.settled = self.release_forgotten(&found);
        }
        self.collect();
        changes
    }

    /// Whether pods wait to be enrolled by another call.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        !self.tried.is_empty()
    }

    /// Takes an enrolment back that somebody cannot serve; its pod stays captured, and is enrolled
    /// anew by the next call.
    pub fn give_up(&mut self, id: PodId, error: &dyn std::error::Error) -> Option<Change> {
        let (&cookie, _) = self.enrolled.iter().find(|(_, held)| held.id == id)?;
        let held = self.enrolled.remove(&cookie)?;
        self.report(&held.wanted.pod, error);
        self.count();
        let change = Change::Down(id);
        self.census.take(&change);
        Some(change)
    }

    /// How the pods are, kept up to date by every call.
    #[must_use]
    pub fn census(&self) -> Arc<Census> {
        Arc::clone(&self.census)
    }

    fn count(&self) {
        let number = |count| u64::try_from(count).unwrap_or(u64::MAX);
        let Census {
            enrolled, troubled, ..
        } = &*self.census;
        enrolled.store(number(self.enrolled.len()), Ordering::Relaxed);
        troubled.store(number(self.troubled.len()), Ordering::Relaxed);
    }

    /// The namespaces of the wanted pods, and how many were not found.
    fn find<'w>(&mut self, wanted: &'w [Wanted]) -> (Found<'w>, usize) {
        let held: HashMap<&Path, Arc<Netns>> = self
            .enrolled
            .values()
            .filter(|held| held.netns.still_at(&held.wanted.netns))
            .map(|held| (&*held.wanted.netns, Arc::clone(&held.netns)))
            .collect();
        let mut found = Found::new();
        let mut troubles = Vec::new();
        for pod in wanted {
            let netns = match held.get(&*pod.netns) {
                Some(netns) => Arc::clone(netns),
                None => match Netns::open(&pod.netns) {
                    Ok(netns) => Arc::new(netns),
                    Err(error) => {
                        troubles.push((pod, Trouble::from(error)));
                        continue;
                    }
                },
            };
            match found.entry(netns.cookie()) {
                Entry::Vacant(free) => {
                    free.insert((pod, netns));
                }
                Entry::Occupied(taken) => {
                    let other = taken.get().0.pod.clone();
                    troubles.push((pod, Trouble::SharedNetns(other)));
                }
            }
        }
        drop(held);
        for (pod, trouble) in &troubles {
            self.report(&pod.pod, trouble);
        }
        (found, troubles.len())
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

    /// Whether a wanted pod is captured as it should be.
    #[must_use]
    pub fn is_up(&self, pod: &PodRef) -> bool {
        !self.troubled.contains_key(pod)
    }

    /// The kernel's side.
    #[must_use]
    pub fn capture(&self) -> &Capture {
        &self.capture
    }

    /// Ends what is not wanted any more. Only a pod that is not listed is released.
    fn leave(&mut self, listed: &BTreeSet<&PodRef>, found: &Found<'_>, changes: &mut Vec<Change>) {
        let gone: Vec<NetnsCookie> = self
            .enrolled
            .iter()
            .filter(|(cookie, held)| {
                let now = found.get(cookie).map(|(now, _)| &now.pod);
                now != Some(&held.wanted.pod)
            })
            .map(|(cookie, _)| *cookie)
            .collect();
        for cookie in gone {
            let Some(held) = self.enrolled.remove(&cookie) else {
                continue;
            };
            changes.push(Change::Down(held.id));
            let pod = &held.wanted.pod;
            let netns = held.wanted.netns.display();
            if let Some((now, _)) = found.get(&cookie) {
                info!(%pod, %netns, now = %now.pod, "the namespace belongs to another pod now");
            } else if listed.contains(pod) {
                warn!(
                    %pod, %netns,
                    "the path does not lead to the pod's namespace any more; its processes, if any \
                     live, stay captured, and so closed"
                );
                self.capture.abandon(cookie);
            } else {
                info!(%pod, %netns, "pod leaves the mesh");
                if let Err(error) = self.capture.release(cookie) {
                    warn!(%pod, %error, "capture not removed completely");
                }
            }
        }
    }

    fn keep_or_enrol(
        &mut self,
        cookie: NetnsCookie,
        wanted: &Wanted,
        netns: &Arc<Netns>,
    ) -> Result<Option<Change>, Trouble> {
        if let Some(held) = self.enrolled.get_mut(&cookie) {
            if held.wanted.settings != wanted.settings {
                held.capture.update(&wanted.settings)?;
            }
            if held.wanted != *wanted {
                held.wanted = wanted.clone();
            }
            if held.capture.repair()? {
                self.census.repairs.fetch_add(1, Ordering::Relaxed);
                let pod = &wanted.pod;
                warn!(%pod, "rules, routes or lo of the pod were changed; put back");
            }
            self.troubled.remove(&wanted.pod);
            return Ok(None);
        }
        let (capture, listeners) = self.capture.enrol(netns, &wanted.settings)?;
        self.next_id += 1;
        let id = PodId(self.next_id);
        let dialer = capture.dialer(&wanted.settings);
        let pod = wanted.pod.clone();
        self.troubled.remove(&pod);
        info!(%pod, netns = %wanted.netns.display(), cookie = cookie.0, "pod enrolled");
        let held = Enrolled {
            id,
            wanted: wanted.clone(),
            netns: Arc::clone(netns),
            capture,
        };
        self.enrolled.insert(cookie, held);
        Ok(Some(Change::Up {
            id,
            pod,
            listeners,
            dialer,
        }))
    }

    /// Says a trouble once, and again only when it changes.
    fn report(&mut self, pod: &PodRef, trouble: &dyn std::error::Error) {
        let text = error_chain(trouble);
        if self.troubled.get(pod) != Some(&text) {
            warn!(%pod, error = %text, "pod not enrolled; trying again");
            self.troubled.insert(pod.clone(), text);
        }
    }

    /// Releases pods that an earlier process enrolled and nobody wants now. False: try again.
    fn release_forgotten(&self, found: &Found<'_>) -> bool {
        let pinned = match self.capture.enrolled() {
            Ok(pinned) => pinned,
            Err(error) => {
                warn!(%error, "pins of an earlier process not read");
                return false;
            }
        };
        for cookie in pinned
            .into_iter()
            .filter(|cookie| !found.contains_key(cookie))
        {
            info!(
                cookie = cookie.0,
                "releasing a pod that is not listed any more"
            );
            if let Err(error) = self.capture.release(cookie) {
                warn!(cookie = cookie.0, %error, "capture not removed completely");
            }
        }
        true
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

/// Pods that one call enrols.
const BATCH: usize = 32;
