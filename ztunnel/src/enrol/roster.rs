//! The pods as a node agent has named them, across its connections. Takes its requests in their order,
//! gives the pods that should be in the mesh; never forgets one because the agent went away, and never
//! grows beyond what a node can have.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;

use thiserror::Error;

use super::source::Listed;
use crate::model::PodUid;

/// What the agent has said so far.
#[derive(Debug, Default)]
pub(super) struct Roster {
    pods: BTreeMap<PodUid, Listed>,
    /// Named since the hello of this connection.
    present: BTreeSet<PodUid>,
    /// Named, but with too little about them to enrol them.
    unclear: BTreeSet<PodUid>,
    /// To leave when the snapshot ends: the agent was told that they will.
    leaving: BTreeSet<PodUid>,
    phase: Phase,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// There is none.
    #[default]
    Away,
    /// The agent names every pod that it has.
    Snapshot,
    /// From here it names changes.
    Changes,
}

/// Why a request cannot come now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum OutOfOrder {
    #[error("a pod can be kept only before the end of the snapshot")]
    Keep,
    #[error("the snapshot has ended before")]
    SnapshotSent,
}

/// There is no room for another pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{MAX_PODS} pods are named already, which is the limit")]
pub(super) struct Full;

// PROTOCOL.md#zds-order
impl Roster {
    /// A connection begins. Pods stay until its snapshot has ended.
    pub(super) fn connected(&mut self) {
        self.phase = Phase::Snapshot;
        self.present.clear();
        self.unclear.clear();
    }

    /// The connection is gone. Pods stay. False if there was none.
    pub(super) fn lost(&mut self) -> bool {
        mem::replace(&mut self.phase, Phase::Away) != Phase::Away
    }

    pub(super) fn add(&mut self, mut pod: Listed) -> Result<(), Full> {
        self.name(&pod.uid)?;
        self.unclear.remove(&pod.uid);
        // Of a namespace that is the same, one descriptor is enough.
        if let Some(before) = self.pods.get(&pod.uid).filter(|old| old.place == pod.place) {
            pod.place = before.place.clone();
        }
        self.pods.insert(pod.uid.clone(), pod);
        Ok(())
    }

    /// An Add says too little of a pod: what is known of it stays, and it counts as one that is not
    /// served. True if it did not count as one before.
    pub(super) fn unclear(&mut self, uid: PodUid) -> Result<bool, Full> {
        self.name(&uid)?;
        Ok(self.unclear.insert(uid))
    }

    /// The agent has a pod and has lost its namespace: what was known of it stays. False if nothing
    /// was, so that it counts as a pod that is not served.
    pub(super) fn keep(&mut self, uid: &PodUid) -> Result<Result<bool, OutOfOrder>, Full> {
        if self.phase == Phase::Changes {
            return Ok(Err(OutOfOrder::Keep));
        }
        self.name(uid)?;
        let is_known = self.pods.contains_key(uid);
        if !is_known {
            self.unclear.insert(uid.clone());
        }
        Ok(Ok(is_known))
    }

    /// The pods that leave now. A pod that the agent has not named, or not yet, is none the worse;
    /// an earlier process may know it.
    pub(super) fn delete(&mut self, uid: PodUid) -> Result<Vec<PodUid>, Full> {
        self.present.remove(&uid);
        self.unclear.remove(&uid);
        if self.phase == Phase::Changes {
            self.pods.remove(&uid);
            return Ok(vec![uid]);
        }
        if self.leaving.len() >= MAX_PODS && !self.leaving.contains(&uid) {
            return Err(Full);
        }
        self.leaving.insert(uid);
        Ok(Vec::new())
    }

    /// The pods that leave now: those that were deleted and not named again. Others that were not
    /// named are no longer listed, but nobody has said that they leave.
    pub(super) fn snapshot_sent(&mut self) -> Result<Vec<PodUid>, OutOfOrder> {
        if self.phase == Phase::Changes {
            return Err(OutOfOrder::SnapshotSent);
        }
        self.phase = Phase::Changes;
        self.pods.retain(|uid, _| self.present.contains(uid));
        Ok(mem::take(&mut self.leaving).into_iter().collect())
    }

    pub(super) fn pods(&self) -> impl Iterator<Item = &Listed> {
        self.pods.values()
    }

    /// How many pods are named with too little about them.
    pub(super) fn unclear_pods(&self) -> usize {
        self.unclear.len()
    }

    /// Whether the agent is there and has named every pod.
    pub(super) fn is_complete(&self) -> bool {
        self.phase == Phase::Changes
    }

    /// The agent names a pod.
    fn name(&mut self, uid: &PodUid) -> Result<(), Full> {
        let is_new = !self.pods.contains_key(uid) && !self.present.contains(uid);
        // Pods of the snapshot before are there beside those of this one.
        let known = self.pods.len().max(self.present.len());
        if is_new && known >= MAX_PODS {
            return Err(Full);
        }
        self.present.insert(uid.clone());
        self.leaving.remove(uid);
        Ok(())
    }
}

/// More than the kernel side has room for, and than a node runs.
const MAX_PODS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrol::source::{Exclusions, Handed, Place};
    use crate::model::PodRef;

    fn pod(uid: &str) -> Listed {
        Listed {
            uid: PodUid(uid.into()),
            pod: PodRef {
                name: uid.into(),
                namespace: "shop".into(),
                service_account: "cart".into(),
            },
            place: Place::Path("/none".into()),
            exclusions: Exclusions::default(),
        }
    }

    fn uid(uid: &str) -> PodUid {
        PodUid(uid.into())
    }

    fn keep(roster: &mut Roster, name: &str) {
        assert!(roster.keep(&uid(name)).unwrap().unwrap(), "it is known");
    }

    fn names(roster: &Roster) -> String {
        let names: Vec<&str> = roster.pods().map(|pod| &*pod.uid.0).collect();
        names.join(" ")
    }

    /// A roster with these pods, whose snapshot has ended.
    fn with(pods: &[&str]) -> Roster {
        let mut roster = Roster::default();
        roster.connected();
        pods.iter().for_each(|uid| roster.add(pod(uid)).unwrap());
        assert_eq!(roster.snapshot_sent(), Ok(vec![]));
        roster
    }

    #[test]
    fn pods_stay_while_the_agent_is_away_and_those_it_does_not_name_again_go() {
        let mut roster = with(&["kept", "named", "gone"]);
        assert!(roster.is_complete());
        assert!(roster.lost() && !roster.lost());
        assert!(!roster.is_complete());
        assert_eq!(names(&roster), "gone kept named");
        roster.connected();
        keep(&mut roster, "kept");
        roster.add(pod("named")).unwrap();
        roster.add(pod("new")).unwrap();
        assert_eq!(names(&roster), "gone kept named new", "not before the end");
        assert!(!roster.is_complete());
        assert_eq!(
            roster.snapshot_sent(),
            Ok(vec![]),
            "nobody said that one leaves"
        );
        assert_eq!(names(&roster), "kept named new");
    }

    #[test]
    fn a_delete_before_the_end_of_the_snapshot_takes_effect_at_its_end() {
        let mut roster = with(&["a", "b"]);
        roster.connected();
        assert_eq!(roster.delete(uid("early")), Ok(vec![]));
        roster.add(pod("a")).unwrap();
        keep(&mut roster, "b");
        assert_eq!(roster.delete(uid("b")), Ok(vec![]));
        assert_eq!(names(&roster), "a b");
        assert_eq!(roster.snapshot_sent(), Ok(vec![uid("b"), uid("early")]));
        assert_eq!(names(&roster), "a");
    }

    #[test]
    fn a_delete_that_was_acknowledged_outlives_its_connection_unless_the_pod_is_named_again() {
        let mut roster = with(&["a", "b"]);
        roster.connected();
        roster.delete(uid("a")).unwrap();
        roster.delete(uid("b")).unwrap();
        assert!(roster.lost());
        roster.connected();
        keep(&mut roster, "b");
        assert_eq!(roster.snapshot_sent(), Ok(vec![uid("a")]));
        assert_eq!(names(&roster), "b");
    }

    #[test]
    fn after_the_snapshot_changes_apply_at_once_and_a_pod_that_was_never_there_may_go() {
        let mut roster = with(&["a"]);
        assert_eq!(roster.delete(uid("never")), Ok(vec![uid("never")]));
        roster.add(pod("b")).unwrap();
        roster.add(pod("b")).unwrap();
        assert_eq!(names(&roster), "a b");
        assert_eq!(roster.delete(uid("a")), Ok(vec![uid("a")]));
        assert_eq!(names(&roster), "b");
    }

    #[test]
    fn what_belongs_into_a_snapshot_is_refused_after_it() {
        let mut roster = with(&["a"]);
        assert_eq!(roster.keep(&uid("a")), Ok(Err(OutOfOrder::Keep)));
        assert_eq!(roster.snapshot_sent(), Err(OutOfOrder::SnapshotSent));
        assert_eq!(names(&roster), "a");
    }

    #[test]
    fn a_kept_pod_that_is_unknown_here_is_not_invented_and_counts() {
        let mut roster = Roster::default();
        roster.connected();
        assert_eq!(roster.keep(&uid("unknown")), Ok(Ok(false)));
        assert_eq!(roster.keep(&uid("deleted")), Ok(Ok(false)));
        roster.delete(uid("deleted")).unwrap();
        roster.snapshot_sent().unwrap();
        assert_eq!(names(&roster), "");
        assert_eq!(roster.unclear_pods(), 1, "nobody serves it");
        roster.add(pod("unknown")).unwrap();
        assert_eq!(roster.unclear_pods(), 0);
    }

    #[test]
    fn a_pod_of_which_too_little_is_said_counts_and_stays_what_it_was() {
        let mut roster = with(&["a"]);
        roster.connected();
        assert_eq!(roster.unclear(uid("a")), Ok(true));
        assert_eq!(roster.unclear(uid("a")), Ok(false));
        assert_eq!(roster.unclear(uid("new")), Ok(true));
        assert_eq!(roster.unclear_pods(), 2);
        assert_eq!(roster.snapshot_sent(), Ok(vec![]));
        assert_eq!(names(&roster), "a", "it was named");
        roster.add(pod("a")).unwrap();
        roster.delete(uid("new")).unwrap();
        assert_eq!(roster.unclear_pods(), 0);
    }

    #[test]
    fn a_namespace_that_is_handed_over_again_is_held_once() {
        let handed = || {
            let null = std::fs::File::open("/dev/null").unwrap();
            Place::Handed(Handed::new(null.into()))
        };
        let mut roster = Roster::default();
        roster.connected();
        for _ in 0..2 {
            let place = handed();
            roster.add(Listed { place, ..pod("a") }).unwrap();
        }
        let Place::Handed(held) = &roster.pods().next().unwrap().place else {
            panic!("it was handed over");
        };
        assert_eq!(std::sync::Arc::strong_count(held.descriptor()), 1);
    }

    #[test]
    fn more_pods_than_a_node_can_have_are_refused_one_by_one() {
        let mut roster = Roster::default();
        roster.connected();
        for number in 0..MAX_PODS {
            roster.keep(&uid(&number.to_string())).unwrap().unwrap();
        }
        assert_eq!(roster.add(pod("one more")), Err(Full));
        assert_eq!(roster.unclear(uid("one more")), Err(Full));
        assert_eq!(roster.keep(&uid("one more")), Err(Full));
        roster.add(pod("7")).unwrap();
        roster.delete(uid("8")).unwrap();
        roster.add(pod("one more")).unwrap();
        for number in 0..MAX_PODS {
            roster
                .delete(uid(&format!("gone{number}")))
                .unwrap_or_default();
        }
        assert_eq!(roster.delete(uid("and gone")), Err(Full));
    }
}
