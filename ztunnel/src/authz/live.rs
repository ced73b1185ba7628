//! The permits in use on one worker. Takes flows to admit and, later, changed policies and
//! workloads; gives permits, and withdraws those that would be refused now; never leaves its
//! thread, so it needs no lock.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;

use super::check::{Denied, Verdict, check};
use super::permit::{Permit, Subject};
use super::policies::Policies;
use crate::model::{Flow, Reason, SpiffeId, Workload, WorkloadUid};

/// The registry of the permits in use on one worker. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Live(Rc<Registry>);

#[derive(Debug, Default)]
struct Registry {
    next: Cell<u64>,
    entries: RefCell<HashMap<u64, Rc<Entry>>>,
}

/// One permit as the registry knows it.
#[derive(Debug)]
struct Entry {
    subject: Subject,
    /// The workload of this node at whose end we are.
    workload: WorkloadUid,
    revoked: Cell<Option<Reason>>,
    wake: Notify,
}

/// A permit's place in the registry, given back on drop.
#[derive(Debug)]
pub(super) struct Registration {
    registry: Rc<Registry>,
    number: u64,
    entry: Rc<Entry>,
}

impl Live {
    /// Registers the flow, then judges it, so that no change can fall between the two.
    ///
    /// Take `policies` and `destination` from the worker's snapshot in the same breath: an `await`
    /// between the two would let a change pass unseen.
    ///
    /// # Errors
    /// The refusal; nothing stays registered.
    pub fn admit(
        &self,
        policies: &Policies,
        destination: &Arc<Workload>,
        flow: Flow,
    ) -> Result<Permit, Denied> {
        let registration = self.register(Subject::Inbound(flow.clone()), &destination.uid);
        let verdict = check(policies, destination, &flow)?;
        Ok(Permit::new(registration, verdict))
    }

    /// A permit for a connection that asks a pod how it is, past its policies; none if it is not
    /// listed as such. Whoever asks for it has seen the proof that the list demands.
    ///
    /// Take both from the worker's snapshot in the same breath.
    #[must_use]
    pub fn admit_probe(
        &self,
        policies: &Policies,
        destination: &Arc<Workload>,
        flow: Flow,
    ) -> Option<Permit> {
        policies.probes().of(destination, &flow)?;
        let registration = self.register(Subject::Probe(flow), &destination.uid);
        Some(Permit::new(registration, Verdict::default()))
    }

    /// A permit for a connection that leaves a pod which is enrolled here and whose identity we
    /// hold. Policy does not withdraw it; it lasts while this is the workload's identity.
    ///
    /// Take both from the worker's snapshot in the same breath.
    #[must_use]
    pub fn outbound(&self, workload: &WorkloadUid, identity: SpiffeId) -> Permit {
        let registration = self.register(Subject::Outbound(identity), workload);
        Permit::new(registration, Verdict::default())
    }

    /// Judges every connection again, with the policies and workloads as they are now, and
    /// withdraws the permits of those refused. Gives how many.
    pub fn judge_again(
        &self,
        policies: &Policies,
        current: impl Fn(&WorkloadUid) -> Option<Arc<Workload>>,
    ) -> usize {
        self.revoke_where(|entry| {
            let Some(workload) = current(&entry.workload) else {
                return Some(Reason::UnknownWorkload);
            };
            match &entry.subject {
                Subject::Inbound(flow) => check(policies, &workload, flow)
                    .is_err()
                    .then_some(Reason::PolicyRevoked),
                Subject::Probe(flow) => {
                    let probe = policies.probes().of(&workload, flow).is_some();
                    (!probe && check(policies, &workload, flow).is_err())
                        .then_some(Reason::PolicyRevoked)
                }
                // The other end was told an identity that is not the workload's any more.
                Subject::Outbound(identity) => (workload.identity.as_ref() != Some(identity))
                    .then_some(Reason::UnknownWorkload),
            }
        })
    }

    /// How many permits are in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.entries.borrow().len()
    }

    /// Whether no permit is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn register(&self, subject: Subject, workload: &WorkloadUid) -> Registration {
        let entry = Rc::new(Entry {
            subject,
            workload: workload.clone(),
            revoked: Cell::new(None),
            wake: Notify::new(),
        });
        let number = self.0.next.get();
        self.0.next.set(number.wrapping_add(1));
        self.0
            .entries
            .borrow_mut()
            .insert(number, Rc::clone(&entry));
        Registration {
            registry: Rc::clone(&self.0),
            number,
            entry,
        }
    }

    fn revoke_where(&self, judge: impl Fn(&Entry) -> Option<Reason>) -> usize {
        // The judge may look at this registry, so it runs while nothing is borrowed.
        let entries: Vec<_> = self.0.entries.borrow().values().map(Rc::clone).collect();
        let mut revoked = 0;
        for entry in entries.iter().filter(|entry| entry.revoked.get().is_none()) {
            if let Some(reason) = judge(entry) {
                entry.revoked.set(Some(reason));
                entry.wake.notify_waiters();
                revoked += 1;
            }
        }
        revoked
    }
}

impl Registration {
    pub(super) fn subject(&self) -> &Subject {
        &self.entry.subject
    }

    pub(super) async fn revoked(&self) -> Reason {
        loop {
            // Asked for before looking, so that a wake-up between the two is not lost.
            let woken = self.entry.wake.notified();
            if let Some(reason) = self.entry.revoked.get() {
                return reason;
            }
            woken.await;
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.entries.borrow_mut().remove(&self.number);
    }
}

#[cfg(test)]
mod tests;
