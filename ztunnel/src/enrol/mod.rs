//! Pods come and go. Takes the list of pods that should be in the mesh and gives the difference:
//! pods that are captured from now on, and pods that are not any more. A pod whose namespace is
//! missing is reported and tried again; never lets one pod's trouble touch another, and never lets
//! a pod out that nobody said is to leave.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::capture::{
    self, Dialer, Means, Netns, NetnsCookie, PodMeans, PodSettings, WorkerListeners,
};
use crate::model::{PodRef, PodUid};
use retries::{Attempt, Retries};

mod retries;
mod roster;
mod source;
mod zds;

pub use source::{Answer, Asked, Exclusions, Handed, Listed, Listing, Place, Source, Unlisted};
pub use zds::{Agent, Tally};

/// A pod that should be in the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What its source tells it from others by.
    pub uid: PodUid,
    /// Which pod.
    pub pod: PodRef,
    /// Its network namespace.
    pub place: Place,
    /// What the kernel has to know of it.
    pub settings: PodSettings,
}

/// The number of one enrolment; a pod that leaves and comes back gets another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodId(u64);

/// A difference.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "on its way from the kernel's side to the workers, one at a time"
)]
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
    capture: PodMeans,
}

/// How the pods of this node are, for whoever asks at any time.
#[derive(Debug, Default)]
pub struct Census {
    enrolled: AtomicU64,
    closed: AtomicU64,
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

    /// Pods that are captured and not served, and so cut off.
    #[must_use]
    pub fn closed(&self) -> u64 {
        self.closed.load(Ordering::Relaxed)
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
    capture: Means,
    enrolled: BTreeMap<NetnsCookie, Enrolled>,
    troubled: BTreeMap<PodUid, String>,
    /// Pods of which their source has said too little.
    unclear: usize,
    retries: Retries,
    /// To be released, which failed.
    stuck: BTreeSet<NetnsCookie>,
    /// More pods wait to be enrolled than one call takes.
    behind: bool,
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
    pub fn new(capture: Means) -> Self {
        Self {
            capture,
            enrolled: BTreeMap::new(),
            troubled: BTreeMap::new(),
            unclear: 0,
            retries: Retries::new(Instant::now()),
            stuck: BTreeSet::new(),
            behind: false,
            census: Arc::default(),
            next_id: 0,
            settled: false,
        }
    }

    /// Brings the pods to what is wanted and gives the difference. Call it when something changed
    /// and, because namespaces vanish without a word, from time to time. Enrolling takes some
    /// milliseconds each, so one call enrols a few: call it again while [`Self::is_behind`]. Those
    /// that failed are tried again by calls that come later, a few at a time.
    ///
    /// Capture goes by namespace, so a pod that only changed its name or account stays captured
    /// all the while; and a pod whose path leads nowhere any more stays captured until its
    /// namespace is dead, because its processes may live on.
    pub fn reconcile(&mut self, wanted: &[Wanted], unlisted: Unlisted) -> Vec<Change> {
        let mut changes = Vec::new();
        let listed: BTreeSet<&PodUid> = wanted.iter().map(|wanted| &wanted.uid).collect();
        let (found, lost) = self.find(wanted);
        self.leave(&listed, &found, unlisted, &mut changes);
        if !self.stuck.is_empty() {
            self.let_go_again(&found);
        }
        self.behind = false;
        let mut first = 0;
        let round = self.retries.begin(Instant::now());
        let mut order: Vec<_> = found.iter().collect();
        order.sort_by_key(|(cookie, _)| self.retries.due(**cookie));
        for (cookie, (wanted, netns)) in order {
            if !self.enrolled.contains_key(cookie) {
                let now = Instant::now();
                match self.retries.attempt(*cookie, round.as_ref(), now) {
                    Attempt::First if first == BATCH => {
                        self.behind = true;
                        continue;
                    }
                    Attempt::First => first += 1,
                    Attempt::Again => {}
                    Attempt::Later => continue,
                }
            }
            self.bring(*cookie, wanted, netns, &mut changes);
        }
        self.keep_elsewhere(wanted, &found);
        self.troubled.retain(|uid, _| listed.contains(uid));
        self.retries.keep(|cookie| found.contains_key(cookie));
        if !self.behind {
            // Pins that an earlier process left may be those of a pod that is not found now.
            if !self.settled && lost == 0 && unlisted == Unlisted::Released {
                self.settled = self.release_forgotten(&found);
            }
            self.collect();
        }
        self.took(changes)
    }

    /// Brings one pod to what is wanted, whatever became of it before, and gives the difference. It
    /// costs nothing but this pod.
    pub fn enrol(&mut self, wanted: &Wanted) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut held = self.enrolled.values();
        let held = held.find(|held| held.wanted.uid == wanted.uid);
        match namespace(wanted, held) {
            Ok(netns) => {
                let cookie = netns.cookie();
                let other = self.enrolled.get(&cookie);
                match other.filter(|other| other.wanted.uid != wanted.uid) {
                    Some(other) => {
                        let trouble = Trouble::SharedNetns(other.wanted.pod.clone());
                        self.report(wanted, &trouble);
                    }
                    None => self.bring(cookie, wanted, &netns, &mut changes),
                }
            }
            Err(trouble) => self.report(wanted, &trouble),
        }
        self.took(changes)
    }

    /// Has a pod leave the mesh: what is captured by its name, by this process or one before it, is
    /// so no more. Its source does not list it any more.
    ///
    /// A pod of `listed` that waits for its namespace takes that over, and it never opens.
    pub fn release(&mut self, uid: &PodUid, listed: &[Wanted]) -> Vec<Change> {
        let mut changes = Vec::new();
        let is_it = |held: &&Enrolled| held.wanted.uid == *uid;
        let held: Vec<NetnsCookie> = self
            .enrolled
            .values()
            .filter(is_it)
            .map(Enrolled::cookie)
            .collect();
        for cookie in held {
            let place = self.enrolled.get(&cookie).map(|held| &held.wanted.place);
            let heir = listed
                .iter()
                .find(|heir| heir.uid != *uid && Some(&heir.place) == place);
            let netns = self.enrolled.get(&cookie);
            let netns = netns.map(|held| Arc::clone(&held.netns));
            if let Some((heir, netns)) = heir.zip(netns) {
                self.bring(cookie, heir, &netns, &mut changes);
            } else if let Some(held) = self.enrolled.remove(&cookie) {
                changes.push(Change::Down(held.id));
                let pod = &held.wanted.pod;
                info!(%pod, netns = %held.wanted.place, "pod leaves the mesh");
                self.let_go(cookie, pod);
            }
        }
        match self.capture.named(&uid.0) {
            Ok(closed) => {
                for cookie in closed {
                    // A pod that has the namespace now goes by another name.
                    if !self.enrolled.contains_key(&cookie) {
                        info!(%uid, %cookie, "a pod that was cut off leaves the mesh");
                        self.let_go(cookie, uid);
                    }
                }
            }
            Err(error) => warn!(%uid, %error, "pins not read; what they capture stays cut off"),
        }
        self.troubled.remove(uid);
        self.took(changes)
    }

    /// So many more pods are wanted, of which their source has said too little.
    pub fn set_unclear(&mut self, pods: usize) {
        self.unclear = pods;
        self.count();
    }

    /// Whether pods wait to be enrolled by another call.
    #[must_use]
    pub const fn is_behind(&self) -> bool {
        self.behind
    }

    /// Takes an enrolment back that somebody cannot serve; its pod stays captured, and is enrolled
    /// anew by a later call.
    pub fn give_up(&mut self, id: PodId, error: &dyn std::error::Error) -> Option<Change> {
        let (&cookie, _) = self.enrolled.iter().find(|(_, held)| held.id == id)?;
        let held = self.enrolled.remove(&cookie)?;
        // Until it is enrolled anew, only who lists it keeps its namespace.
        self.capture.abandon(cookie);
        self.report(&held.wanted, error);
        self.retries.failed(cookie, Instant::now());
        self.took(vec![Change::Down(id)]).pop()
    }

    /// How the pods are, kept up to date by every call.
    #[must_use]
    pub fn census(&self) -> Arc<Census> {
        Arc::clone(&self.census)
    }

    /// Counts what a call changed, and how things are after it.
    fn took(&self, changes: Vec<Change>) -> Vec<Change> {
        changes.iter().for_each(|change| self.census.take(change));
        self.count();
        changes
    }

    fn count(&self) {
        let Census {
            enrolled, troubled, ..
        } = &*self.census;
        enrolled.store(number(self.enrolled.len()), Ordering::Relaxed);
        troubled.store(number(self.troubled()), Ordering::Relaxed);
    }

    /// The namespaces of the wanted pods, and how many were not found.
    fn find<'w>(&mut self, wanted: &'w [Wanted]) -> (Found<'w>, usize) {
        let held: HashMap<&PodUid, &Enrolled> = self
            .enrolled
            .values()
            .map(|held| (&held.wanted.uid, held))
            .collect();
        let mut found = Found::new();
        let mut troubles = Vec::new();
        for pod in wanted {
            let netns = match namespace(pod, held.get(&pod.uid).copied()) {
                Ok(netns) => netns,
                Err(trouble) => {
                    troubles.push((pod, trouble));
                    continue;
                }
            };
            match found.entry(netns.cookie()) {
                Entry::Vacant(free) => {
                    free.insert((pod, netns));
                }
                Entry::Occupied(mut taken) => {
                    // Who has it keeps it.
                    let holder = self.enrolled.get(taken.key()).map(|held| &held.wanted.uid);
                    let mut late = pod;
                    if holder == Some(&pod.uid) {
                        late = taken.insert((pod, netns)).0;
                    }
                    let other = taken.get().0.pod.clone();
                    troubles.push((late, Trouble::SharedNetns(other)));
                }
            }
        }
        drop(held);
        for (pod, trouble) in &troubles {
            self.report(pod, trouble);
        }
        (found, troubles.len())
    }

    /// How many pods are captured.
    #[must_use]
    pub fn enrolled(&self) -> usize {
        self.enrolled.len()
    }

    /// How many pods are not captured as they should be, or are and should not.
    #[must_use]
    pub fn troubled(&self) -> usize {
        let waiting = self.troubled.len().saturating_add(self.unclear);
        waiting.saturating_add(self.stuck.len())
    }

    /// Why a wanted pod is not captured as it should be, if it is not.
    #[must_use]
    pub fn trouble(&self, uid: &PodUid) -> Option<&str> {
        self.troubled.get(uid).map(String::as_str)
    }

    /// The pods that are served as they should be.
    #[must_use]
    pub fn up(&self) -> HashSet<&PodUid> {
        let uids = self.enrolled.values().map(|held| &held.wanted.uid);
        uids.filter(|uid| !self.troubled.contains_key(uid))
            .collect()
    }

    /// The kernel's side.
    #[must_use]
    pub fn capture(&self) -> &Means {
        &self.capture
    }

    /// Ends what is not wanted any more. A pod is released only if its source's list is the whole
    /// truth and it is not on it.
    fn leave(
        &mut self,
        listed: &BTreeSet<&PodUid>,
        found: &Found<'_>,
        unlisted: Unlisted,
        changes: &mut Vec<Change>,
    ) {
        let gone = self.enrolled.iter().filter(|(cookie, held)| {
            let is_listed = listed.contains(&held.wanted.uid);
            match &held.wanted.place {
                // Served where it was, until it is elsewhere.
                Place::Handed(_) if is_listed => false,
                Place::Handed(_) | Place::Path(_) => !found.contains_key(cookie),
            }
        });
        let gone: Vec<NetnsCookie> = gone.map(|(cookie, _)| *cookie).collect();
        for cookie in gone {
            let Some(held) = self.enrolled.remove(&cookie) else {
                continue;
            };
            changes.push(Change::Down(held.id));
            let pod = &held.wanted.pod;
            let netns = &held.wanted.place;
            if listed.contains(&held.wanted.uid) {
                warn!(
                    %pod, %netns,
                    "the path does not lead to the pod's namespace any more; its processes, if any \
                     live, stay captured, and so closed"
                );
                self.capture.abandon(cookie);
                continue;
            }
            match unlisted {
                Unlisted::Closed => {
                    warn!(
                        %pod, %netns,
                        "the pod is not listed any more, and nobody said that it leaves; it stays \
                         captured, and so closed"
                    );
                    self.capture.abandon(cookie);
                }
                Unlisted::Released => {
                    info!(%pod, %netns, "pod leaves the mesh");
                    self.let_go(cookie, pod);
                }
            }
        }
    }

    /// Keeps up what is served where it was, because it cannot be served where it is now.
    fn keep_elsewhere(&mut self, wanted: &[Wanted], found: &Found<'_>) {
        let elsewhere = self.enrolled.iter_mut();
        for (_, held) in elsewhere.filter(|(cookie, _)| !found.contains_key(cookie)) {
            let Some(now) = wanted.iter().find(|pod| pod.uid == held.wanted.uid) else {
                continue;
            };
            if let Err(error) = held.keep(&now.settings, &self.census) {
                warn!(pod = %now.pod, %error, "the pod's settings are not brought up to date");
            }
        }
    }

    fn let_go(&mut self, cookie: NetnsCookie, pod: &dyn std::fmt::Display) {
        match self.capture.release(cookie) {
            Ok(()) => drop(self.stuck.remove(&cookie)),
            Err(error) => {
                if self.stuck.insert(cookie) {
                    warn!(%pod, %error, "capture not removed completely; trying again");
                }
            }
        }
    }

    /// Releases what could not be released before.
    fn let_go_again(&mut self, found: &Found<'_>) {
        let pinned = self.capture.enrolled().unwrap_or_default();
        self.stuck
            .retain(|cookie| pinned.contains(cookie) && !found.contains_key(cookie));
        for cookie in self.stuck.clone() {
            self.let_go(cookie, &cookie);
        }
    }

    /// Brings the pod of a namespace to what is wanted.
    fn bring(
        &mut self,
        cookie: NetnsCookie,
        wanted: &Wanted,
        netns: &Arc<Netns>,
        changes: &mut Vec<Change>,
    ) {
        let other = |held: &&Enrolled| !held.is_of(wanted);
        if let Some(id) = self.enrolled.get(&cookie).filter(other).map(|held| held.id) {
            info!(%cookie, now = %wanted.pod, "the namespace belongs to another pod now");
            self.enrolled.remove(&cookie);
            self.capture.abandon(cookie);
            changes.push(Change::Down(id));
        }
        match self.keep_or_enrol(cookie, wanted, netns) {
            Ok(change) => {
                self.retries.forget(cookie);
                self.troubled.remove(&wanted.uid);
                if change.is_some() {
                    self.leave_elsewhere(cookie, wanted, changes);
                }
                changes.extend(change);
            }
            Err(trouble) => {
                self.report(wanted, &trouble);
                self.retries.failed(cookie, Instant::now());
            }
        }
    }

    /// Ends what the pod was elsewhere. Its processes, if any live there, stay captured.
    // PROTOCOL.md#zds-again
    fn leave_elsewhere(&mut self, cookie: NetnsCookie, wanted: &Wanted, changes: &mut Vec<Change>) {
        if let Place::Path(_) = wanted.place {
            // Whether a path leads elsewhere is seen when it is looked at.
            return;
        }
        let is_elsewhere =
            |held: &&Enrolled| held.wanted.uid == wanted.uid && held.cookie() != cookie;
        let Some(before) = self
            .enrolled
            .values()
            .find(is_elsewhere)
            .map(Enrolled::cookie)
        else {
            return;
        };
        if let Some(held) = self.enrolled.remove(&before) {
            info!(pod = %wanted.pod, before = %held.wanted.place, "the pod has another namespace now");
            changes.push(Change::Down(held.id));
            self.capture.abandon(before);
        }
    }

    fn keep_or_enrol(
        &mut self,
        cookie: NetnsCookie,
        wanted: &Wanted,
        netns: &Arc<Netns>,
    ) -> Result<Option<Change>, Trouble> {
        if let Some(held) = self.enrolled.get_mut(&cookie) {
            held.keep(&wanted.settings, &self.census)?;
            if held.wanted != *wanted {
                held.wanted = wanted.clone();
            }
            return Ok(None);
        }
        // What an earlier process captured is this pod's from now on, whatever comes next: nobody
        // releases it by the name that it had. What is captured only now has no name to change.
        let name = match &wanted.place {
            Place::Handed(_) => Some(&*wanted.uid.0),
            Place::Path(_) => None,
        };
        if let Err(error) = self.capture.set_name(cookie, name) {
            debug!(pod = %wanted.pod, %error, "not captured by an earlier process");
        }
        let (capture, listeners) = self.capture.enrol(netns, &wanted.settings)?;
        if let Err(error) = self.capture.set_name(cookie, name) {
            // After a restart nobody could release it by its name.
            warn!(pod = %wanted.pod, %error, "the pod's identifier is not pinned");
        }
        self.next_id += 1;
        let id = PodId(self.next_id);
        let dialer = capture.dialer(&wanted.settings);
        let pod = wanted.pod.clone();
        info!(%pod, netns = %wanted.place, cookie = cookie.0, "pod enrolled");
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
    fn report(&mut self, wanted: &Wanted, trouble: &dyn std::error::Error) {
        let text = error_chain(trouble);
        if self.troubled.get(&wanted.uid) != Some(&text) {
            let Wanted { pod, uid, .. } = wanted;
            warn!(%pod, %uid, error = %text, "pod not enrolled; trying again");
            self.troubled.insert(uid.clone(), text);
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
            if self.capture.is_named(cookie) {
                warn!(
                    %cookie,
                    "a node agent had this pod enrolled, and nobody lists it; it stays captured, and \
                     so closed, until `ztunnel release`"
                );
                continue;
            }
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
        if let Ok(pinned) = self.capture.enrolled() {
            let closed = pinned.len().saturating_sub(self.enrolled.len());
            self.census.closed.store(number(closed), Ordering::Relaxed);
        }
    }
}

impl Enrolled {
    fn cookie(&self) -> NetnsCookie {
        self.netns.cookie()
    }

    /// Gives it these settings, and puts back what the pod took away.
    fn keep(&mut self, settings: &PodSettings, census: &Census) -> Result<(), Trouble> {
        if self.wanted.settings != *settings {
            self.capture.update(settings)?;
            self.wanted.settings = settings.clone();
        }
        if self.capture.repair()? {
            census.repairs.fetch_add(1, Ordering::Relaxed);
            let pod = &self.wanted.pod;
            warn!(%pod, "rules, routes or lo of the pod were changed; put back");
        }
        Ok(())
    }

    /// Whether it is this pod, under the same name and account.
    fn is_of(&self, wanted: &Wanted) -> bool {
        (&self.wanted.uid, &self.wanted.pod) == (&wanted.uid, &wanted.pod)
    }
}

/// The namespace of a pod, of which this is held already.
fn namespace(wanted: &Wanted, held: Option<&Enrolled>) -> Result<Arc<Netns>, Trouble> {
    let held = held.filter(|held| held.wanted.place == wanted.place);
    let netns = match (&wanted.place, held) {
        (Place::Handed(_), Some(held)) => return Ok(Arc::clone(&held.netns)),
        (Place::Path(path), Some(held)) if held.netns.still_at(path) => {
            return Ok(Arc::clone(&held.netns));
        }
        (Place::Handed(handed), None) => Netns::of(Arc::clone(handed.descriptor()))?,
        (Place::Path(path), _) => Netns::open(path)?,
    };
    Ok(Arc::new(netns))
}

fn number(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
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
