//! What becomes of a question. Takes one of a pod's, gives our answer, or says that another resolver
//! must know; never holds more of one pod than its bounds, so that no pod crowds out another.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tracing::{Level, debug, event};

use super::counts::Refused;
use super::{Params, Tally, look_up};
use crate::context::Context;
use crate::model::Workload;
use crate::wire::dns::{self as message, Failed, Read, Transport};

/// What the pods of one worker have in common.
#[derive(Debug)]
pub struct Server {
    params: Params,
    tally: Tally,
    /// Of all pods together, as `asking` and `connections` of one.
    asking: Places,
    connections: Places,
    /// For whatever is read: used within one step, so that nobody who waits holds one.
    pub(super) buffer: RefCell<Box<[u8]>>,
}

impl Server {
    /// Answers so, and counts there.
    #[must_use]
    pub fn new(params: Params, tally: Tally) -> Rc<Self> {
        Rc::new(Self {
            params,
            tally,
            asking: Places::new(MAX_ASKING_TOGETHER, MAX_ASKING_BYTES_TOGETHER),
            connections: Places::new(MAX_CONNECTIONS_TOGETHER, 0),
            buffer: RefCell::new(vec![0; LARGEST_BYTES].into()),
        })
    }
}

/// One pod on one worker.
#[derive(Debug)]
pub struct Pod {
    pub(super) cx: Rc<Context>,
    pub(super) server: Rc<Server>,
    /// Questions in datagrams that wait for an answer.
    asking: Places,
    /// Connections to resolvers.
    connections: Places,
}

impl Pod {
    /// A pod of which nobody asks anything yet.
    #[must_use]
    pub fn new(cx: Rc<Context>, server: Rc<Server>) -> Rc<Self> {
        Rc::new(Self {
            cx,
            server,
            asking: Places::new(MAX_ASKING, MAX_ASKING_BYTES),
            connections: Places::new(MAX_CONNECTIONS, 0),
        })
    }

    /// What its walks share.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.cx
    }

    /// Room for a question in a datagram of this length; none when the pod, or all together, have taken
    /// theirs.
    pub(super) fn enter_question(&self, length: usize) -> Option<[Place; 2]> {
        both((&self.asking, &self.server.asking), length)
    }

    /// Room for a connection to a resolver; likewise.
    pub(super) fn enter_connection(&self) -> Option<[Place; 2]> {
        both((&self.connections, &self.server.connections), 0)
    }

    /// What becomes of a question. Waits for the pod's own workload to be known. Cancel safe.
    pub(super) async fn judge(&self, bytes: &[u8], by: Transport) -> Judged {
        let cx = &self.cx;
        let asked = match message::read(bytes) {
            Ok(asked) => asked,
            Err(malformed) => {
                debug!(target: "dns", pod = %cx.pod, error = %malformed, "refused");
                return Judged::Answer(message::failure(bytes, Failed::Format));
            }
        };
        let Some(client) = cx.workload().await else {
            debug!(target: "dns", pod = %cx.pod, "the mesh does not know this pod");
            return Judged::Answer(message::failure(bytes, Failed::Server));
        };
        self.server.tally.asked(asked.label(), by, &client);
        let known = match &asked {
            Read::Other(_) => None,
            Read::Addresses(question) => look_up(
                &cx.view.world().snapshot,
                &self.server.params,
                &client,
                (&question.name, question.family),
                fastrand::u64(..),
            ),
        };
        let Some(known) = known else {
            return Judged::Forward { asked, client };
        };
        log(&client, &asked, "NOERROR", known.addresses.len());
        Judged::Answer(message::answer(bytes, &known, by))
    }

    /// Says that a question or a connection was one too many.
    pub(super) fn refused(&self, why: Refused) {
        debug!(target: "dns", pod = %self.cx.pod, ?why, "one too many");
        self.server.tally.refused(why);
    }

    /// Says how a question ended that was passed on.
    pub(super) fn forwarded(
        &self,
        (asked, client): (&Read, &Workload),
        by: Transport,
        (answered, took): (bool, Duration),
    ) {
        let result = if answered { "forwarded" } else { "SERVFAIL" };
        log(client, asked, result, 0);
        let tally = &self.server.tally;
        tally.forwarded(asked.label(), by, client, (answered, took));
    }
}

/// What becomes of a question.
#[derive(Debug)]
pub(super) enum Judged {
    /// We answer so; none if it cannot be answered at all.
    Answer(Option<Vec<u8>>),
    /// Another resolver must know.
    Forward {
        /// What is asked.
        asked: Read,
        /// Who asks.
        client: Arc<Workload>,
    },
}

fn log(client: &Workload, asked: &Read, result: &str, endpoints: usize) {
    let domain = match asked {
        Read::Addresses(question) => &*question.name,
        Read::Other(_) => "",
    };
    event!(
        target: "dns",
        Level::DEBUG,
        src.workload = %client.name,
        src.namespace = %client.namespace,
        query = asked.label(),
        domain,
        result,
        endpoints,
        "answered"
    );
}

/// So many at a time, and so many bytes of them.
#[derive(Debug)]
pub(super) struct Places(Rc<Cell<Free>>);

#[derive(Clone, Copy, Debug)]
struct Free {
    places: usize,
    bytes: usize,
}

impl Places {
    fn new(places: usize, bytes: usize) -> Self {
        Self(Rc::new(Cell::new(Free { places, bytes })))
    }

    /// One of them, until it is dropped; none when they are taken.
    pub(super) fn take(&self, bytes: usize) -> Option<Place> {
        let free = self.0.get();
        self.0.set(Free {
            places: free.places.checked_sub(1)?,
            bytes: free.bytes.checked_sub(bytes)?,
        });
        Some(Place {
            of: Rc::clone(&self.0),
            bytes,
        })
    }
}

fn both((own, shared): (&Places, &Places), bytes: usize) -> Option<[Place; 2]> {
    Some([own.take(bytes)?, shared.take(bytes)?])
}

/// Somebody who waits.
#[derive(Debug)]
pub(super) struct Place {
    of: Rc<Cell<Free>>,
    bytes: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        let free = self.of.get();
        self.of.set(Free {
            places: free.places + 1,
            bytes: free.bytes + self.bytes,
        });
    }
}

/// The largest datagram.
const LARGEST_BYTES: usize = 65_535;
/// Questions in datagrams of one pod on one worker that may wait at a time; each that is passed on has
/// a socket.
const MAX_ASKING: usize = 256;
/// What they may hold together: a question has a hundred bytes or so, and may have 64 KiB.
const MAX_ASKING_BYTES: usize = 512 * 1024;
/// Connections of one pod on one worker to resolvers; each holds up to two messages of 64 KiB.
const MAX_CONNECTIONS: usize = 128;
/// What the pods of one worker may have together: each of them a descriptor or two of the process, which
/// connections need as well.
const MAX_ASKING_TOGETHER: usize = 4096;
const MAX_ASKING_BYTES_TOGETHER: usize = 8 * 1024 * 1024;
const MAX_CONNECTIONS_TOGETHER: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_by_number_and_by_bytes_and_come_back() {
        let places = Places::new(2, 100);
        let first = places.take(60).unwrap();
        assert!(places.take(60).is_none(), "too much together");
        let second = places.take(40).unwrap();
        assert!(places.take(0).is_none(), "too many");
        drop(first);
        let third = places.take(60).unwrap();
        drop((second, third));
        assert!(places.take(100).is_some());
        assert!(places.take(101).is_none());
    }

    #[test]
    fn who_finds_no_room_among_all_gives_back_its_own() {
        let (own, shared) = (Places::new(1, 100), Places::new(1, 50));
        assert!(both((&own, &shared), 60).is_none());
        let place = both((&own, &shared), 50).unwrap();
        assert!(both((&Places::new(1, 100), &shared), 0).is_none());
        drop(place);
        assert!(both((&own, &shared), 0).is_some());
    }
}
