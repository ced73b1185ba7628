//! The node agent's socket: it says which pods come and go, and hands their network namespaces over.
//! Takes the socket's path, gives a source of pods that answers every message once; never lets a
//! pod go because the agent did, and never stops trying to reach it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::{debug, error, info, warn};

use super::roster::{Full, OutOfOrder, Roster};
use super::source::{Answer, Asked, Exclusions, Handed, Listed, Place, Source, Unlisted};
use crate::capture::{Packet, PacketSocket};
use crate::model::PodUid;
use crate::wire::{InvalidZds, MAX_ZDS_BYTES, ZdsRequest, zds_ack, zds_hello};

/// A node agent, as a source of pods.
#[derive(Debug)]
pub struct Agent {
    events: mpsc::Receiver<Event>,
    roster: Roster,
    tally: Arc<Tally>,
    _reader: Reader,
}

/// What happened between this process and its node agent, for whoever asks at any time.
#[derive(Debug, Default)]
pub struct Tally {
    connections: AtomicU64,
    failures: AtomicU64,
    refusals: AtomicU64,
}

impl Tally {
    /// How often the agent was connected to.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// How often it could not be, or a connection to it ended.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// How often it was answered with an error.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.load(Ordering::Relaxed)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What happens on the socket.
#[derive(Debug)]
enum Event {
    Connected,
    Lost,
    Asked(Order, oneshot::Sender<Outcome>),
}

/// A request with what came beside it.
#[derive(Debug)]
enum Order {
    Add(Box<Listed>),
    Delete(PodUid),
    Keep(PodUid),
    SnapshotSent,
    /// It asks for what cannot be done.
    Unclear(InvalidZds),
}

/// What became of a request.
type Outcome = Result<(), Refusal>;

/// Why a request is not done.
#[derive(Debug)]
enum Refusal {
    /// It cannot be done now, or not as it is; others can.
    NotNow(String),
    /// The two sides do not agree on where they are: the connection begins anew.
    OutOfOrder(OutOfOrder),
}

impl From<Full> for Refusal {
    fn from(full: Full) -> Self {
        Self::NotNow(full.to_string())
    }
}

impl From<OutOfOrder> for Refusal {
    fn from(error: OutOfOrder) -> Self {
        Self::OutOfOrder(error)
    }
}

/// Why a packet is not acted on.
#[derive(Debug, Error)]
enum Invalid {
    #[error("{0} descriptors came with a message that carries none")]
    DescriptorUnwanted(usize),
    #[error("{0} descriptors came with an Add, which carries one")]
    Descriptors(usize),
    #[error(
        "descriptors were lost on their way: this process has as many open as it may, or more came \
         than a packet holds"
    )]
    DescriptorsLost,
    #[error(transparent)]
    Message(#[from] InvalidZds),
    #[error("the packet is longer than {MAX_ZDS_BYTES} bytes")]
    Truncated,
}

/// Why there is no connection, or not any more.
#[derive(Debug, Error)]
enum Lost {
    #[error("no node agent: {0}")]
    Absent(io::Error),
    #[error("the agent closed the connection")]
    Closed,
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("an answer took longer than the agent waits, which would take it for the next one's")]
    Late,
    #[error(transparent)]
    OutOfOrder(#[from] OutOfOrder),
    #[error("the process ends")]
    Stopped,
}

impl Agent {
    /// Begins to connect. Call it on the runtime that is to read.
    #[must_use]
    pub fn connect(path: PathBuf) -> Self {
        let (send, events) = mpsc::channel(1);
        let tally = Arc::<Tally>::default();
        Self {
            events,
            roster: Roster::default(),
            _reader: Reader(tokio::spawn(follow(path, send, Arc::clone(&tally)))),
            tally,
        }
    }

    /// What happened so far, kept up to date.
    #[must_use]
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// Applies an event; what the agent hears of it is decided here, or by who enrols.
    fn apply(&mut self, event: Event) -> Asked {
        match event {
            Event::Connected => self.roster.connected(),
            Event::Lost => drop(self.roster.lost()),
            Event::Asked(order, answer) => match self.order(order) {
                Ok(Ordered::Done) => answered(answer, Ok(())),
                Ok(Ordered::Enrol(uid)) => return Asked::Enrol(uid, later(answer)),
                Ok(Ordered::Release(pods)) => return Asked::Release(pods, later(answer)),
                Ok(Ordered::Settle(pods)) => {
                    let named = self.roster.pods().count();
                    info!(pods = named, "the node agent has named every pod");
                    return Asked::Settle(pods, later(answer));
                }
                Err(refusal) => answered(answer, Err(refusal)),
            },
        }
        Asked::Report
    }

    fn order(&mut self, order: Order) -> Result<Ordered, Refusal> {
        Ok(match order {
            Order::Add(pod) => {
                let uid = pod.uid.clone();
                self.roster.add(*pod)?;
                Ordered::Enrol(uid)
            }
            Order::Delete(uid) => match self.roster.delete(uid)? {
                pods if pods.is_empty() => Ordered::Done,
                pods => Ordered::Release(pods),
            },
            Order::Keep(uid) => {
                if !self.roster.keep(&uid)?? {
                    warn!(
                        %uid,
                        "the node agent has lost the namespace of a pod that this process has never \
                         had; it is not served until the agent adds it"
                    );
                }
                Ordered::Done
            }
            Order::SnapshotSent => Ordered::Settle(self.roster.snapshot_sent()?),
            Order::Unclear(error) => {
                if let Some(uid) = error.unclear_pod()
                    && self.roster.unclear(uid)?
                {
                    warn!(%error, "the node agent wants a pod enrolled and says too little of it");
                }
                return Err(Refusal::NotNow(error.to_string()));
            }
        })
    }
}

/// What an order comes to.
enum Ordered {
    Done,
    Enrol(PodUid),
    Release(Vec<PodUid>),
    Settle(Vec<PodUid>),
}

impl Source for Agent {
    fn pods(&self) -> Vec<Listed> {
        self.roster.pods().cloned().collect()
    }

    fn unclear(&self) -> usize {
        self.roster.unclear_pods()
    }

    fn listed(&mut self, pods: Vec<Listed>) {
        if !pods.is_empty() {
            warn!(
                pods = pods.len(),
                "the state lists pods, but the node agent says which pods are enrolled"
            );
        }
    }

    async fn changed(&mut self) -> Asked {
        match self.events.recv().await {
            Some(event) => self.apply(event),
            None if self.roster.lost() => {
                error!("nobody reads the node agent's socket any more: start the process again");
                Asked::Report
            }
            None => std::future::pending().await,
        }
    }

    // PROTOCOL.md#zds-unnamed
    fn unlisted(&self) -> Unlisted {
        Unlisted::Closed
    }

    fn is_settled(&self, troubled: usize) -> bool {
        self.roster.is_complete() && troubled == 0
    }
}

/// Ends the reading task when it is dropped.
#[derive(Debug)]
struct Reader(JoinHandle<()>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Connects again and again, and follows each connection to its end. Of a fault that stays the same it
/// writes one line.
// PROTOCOL.md#zds-reconnect
async fn follow(path: PathBuf, events: mpsc::Sender<Event>, tally: Arc<Tally>) {
    let mut pause = PAUSE_MIN;
    let mut said = None;
    loop {
        let began = Instant::now();
        let (settled, lost) = match PacketSocket::connect(&path) {
            Ok(socket) => {
                count(&tally.connections);
                let session = Session {
                    socket,
                    events: &events,
                    tally: &tally,
                    settled: false,
                };
                session.run(&path).await
            }
            Err(error) => (false, Lost::Absent(error)),
        };
        if let Lost::Stopped = lost {
            return;
        }
        count(&tally.failures);
        let text = lost.to_string();
        if settled || said.as_ref() != Some(&text) {
            warn!(
                socket = %path.display(), error = %text,
                "no connection to the node agent; its pods stay as they are; trying again"
            );
            said = Some(text);
        } else {
            debug!(error = %text, "the node agent is still not there");
        }
        if events.send(Event::Lost).await.is_err() {
            return;
        }
        pause = pause_after(pause, settled, began.elapsed());
        sleep(spread(pause)).await;
    }
}

/// How long to wait after a connection of this length, or none, and the pause before. An agent with
/// which nothing works must not be asked in a loop, nor one that ends each connection soon.
fn pause_after(before: Duration, settled: bool, lasted: Duration) -> Duration {
    match settled {
        true if lasted >= STEADY => PAUSE_MIN,
        true => (before * 2).min(PAUSE_SETTLED_MAX),
        false => (before * 2).min(PAUSE_MAX),
    }
}

/// One connection.
struct Session<'a> {
    socket: PacketSocket,
    events: &'a mpsc::Sender<Event>,
    tally: &'a Tally,
    /// The snapshot has ended.
    settled: bool,
}

impl Session<'_> {
    /// Whether the snapshot ended, and why the connection did.
    async fn run(mut self, path: &Path) -> (bool, Lost) {
        let lost = match self.talk(path).await {
            Ok(never) => match never {},
            Err(lost) => lost,
        };
        (self.settled, lost)
    }

    async fn talk(&mut self, path: &Path) -> Result<std::convert::Infallible, Lost> {
        let Ok(()) = self.events.send(Event::Connected).await else {
            return Err(Lost::Stopped);
        };
        self.socket.send(&zds_hello()).await?;
        debug!(socket = %path.display(), "connected to the node agent");
        loop {
            let Some(packet) = self.socket.receive(MAX_ZDS_BYTES).await? else {
                return Err(Lost::Closed);
            };
            let asked = Instant::now();
            let order = match understand(packet) {
                Ok(order) => order,
                Err(invalid) => {
                    self.refuse(&invalid.to_string()).await?;
                    return Err(invalid.into());
                }
            };
            let ends_snapshot = matches!(order, Order::SnapshotSent);
            debug!(?order, "the node agent asks");
            let (answer, answered) = oneshot::channel();
            let Ok(()) = self.events.send(Event::Asked(order, answer)).await else {
                return Err(Lost::Stopped);
            };
            let outcome = answered.await.unwrap_or_else(|_| {
                let why = "the process ends".to_owned();
                Err(Refusal::NotNow(why))
            });
            if asked.elapsed() > ANSWER_WITHIN {
                return Err(Lost::Late);
            }
            match outcome {
                Ok(()) => self.socket.send(&zds_ack(Ok(()))).await?,
                Err(Refusal::NotNow(why)) => self.refuse(&why).await?,
                Err(Refusal::OutOfOrder(error)) => {
                    self.refuse(&error.to_string()).await?;
                    return Err(error.into());
                }
            }
            self.settled |= ends_snapshot;
        }
    }

    async fn refuse(&self, why: &str) -> io::Result<()> {
        count(&self.tally.refusals);
        self.socket.send(&zds_ack(Err(why))).await
    }
}

/// A packet with its descriptors, all of which are closed unless the order keeps one.
// PROTOCOL.md#zds-descriptors
fn understand(packet: Packet) -> Result<Order, Invalid> {
    if packet.descriptors_lost {
        return Err(Invalid::DescriptorsLost);
    }
    if packet.truncated {
        return Err(Invalid::Truncated);
    }
    let count = packet.descriptors.len();
    let mut descriptors = packet.descriptors.into_iter();
    let request = match ZdsRequest::decode(&packet.bytes) {
        Ok(request) => request,
        Err(error) if error.is_a_message() => return Ok(Order::Unclear(error)),
        Err(error) => return Err(error.into()),
    };
    let order = match (request, descriptors.next()) {
        (ZdsRequest::Add(uid, pod), Some(netns)) if count == 1 => Order::Add(Box::new(Listed {
            uid,
            pod,
            place: Place::Handed(Handed::new(netns)),
            exclusions: Exclusions::default(),
        })),
        (ZdsRequest::Add(..), _) => return Err(Invalid::Descriptors(count)),
        (_, Some(_)) => return Err(Invalid::DescriptorUnwanted(count)),
        (ZdsRequest::Delete(uid), None) => Order::Delete(uid),
        (ZdsRequest::Keep(uid), None) => Order::Keep(uid),
        (ZdsRequest::SnapshotSent, None) => Order::SnapshotSent,
    };
    Ok(order)
}

/// The agent hears from who enrols.
fn later(answer: oneshot::Sender<Outcome>) -> Answer {
    Answer::new(|outcome| answered(answer, outcome.map_err(Refusal::NotNow)))
}

fn answered(answer: oneshot::Sender<Outcome>, outcome: Outcome) {
    if answer.send(outcome).is_err() {
        debug!("the node agent's connection ended before its answer");
    }
}

/// The pause, a fifth shorter or longer, so that the nodes of a restarted agent do not move as one.
fn spread(pause: Duration) -> Duration {
    pause.mul_f64(0.8 + 0.4 * fastrand::f64())
}

/// The agent waits 5 s for an answer and takes the one that comes after for that to its next
/// message, because answers carry no number.
// PROTOCOL.md#zds-order
const ANSWER_WITHIN: Duration = Duration::from_millis(4500);
/// After a connection that lasted.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// After one whose snapshot ended, and which did not last.
const PAUSE_SETTLED_MAX: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// A connection that was there for so long may be made anew at once.
const STEADY: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    #[test]
    fn pauses_double_to_seconds_and_begin_anew_after_a_connection_that_lasted() {
        let pauses = |settled, lasted, times| {
            let mut pause = PAUSE_MIN;
            for _ in 0..times {
                pause = pause_after(pause, settled, lasted);
            }
            pause
        };
        let short = Duration::from_secs(1);
        assert_eq!(pauses(false, STEADY, 1), PAUSE_MIN * 2, "nothing worked");
        assert_eq!(pauses(false, short, 20), PAUSE_MAX);
        assert_eq!(pauses(true, short, 20), PAUSE_SETTLED_MAX);
        assert_eq!(pause_after(PAUSE_MAX, true, STEADY), PAUSE_MIN);
        for _ in 0..100 {
            let pause = spread(PAUSE_MAX);
            assert!(pause >= PAUSE_MAX.mul_f64(0.79) && pause <= PAUSE_MAX.mul_f64(1.21));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_the_agent_waits_for_no_more_is_not_given_and_ends_the_connection() {
        let in_time = ANSWER_WITHIN;
        for took in [in_time, in_time + Duration::from_millis(1)] {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
            let (near, far) = pair.unwrap();
            let (events, mut told) = mpsc::channel(1);
            let tally = Tally::default();
            let session = Session {
                socket: PacketSocket::of(near).unwrap(),
                events: &events,
                tally: &tally,
                settled: false,
            };
            let agent = async {
                let agent = PacketSocket::of(far).unwrap();
                assert!(matches!(told.recv().await, Some(Event::Connected)));
                let hello = agent.receive(MAX_ZDS_BYTES).await.unwrap();
                assert_eq!(hello.unwrap().bytes, zds_hello());
                agent.send(SNAPSHOT_SENT).await.unwrap();
                let Some(Event::Asked(Order::SnapshotSent, answer)) = told.recv().await else {
                    panic!("the end of the snapshot is not told of");
                };
                tokio::time::advance(took).await;
                answer.send(Ok(())).unwrap();
                let heard = agent.receive(MAX_ZDS_BYTES).await.unwrap();
                heard.map(|packet| packet.bytes)
            };
            let ((settled, lost), heard) =
                tokio::join!(session.run(Path::new("agent.sock")), agent);
            if took == in_time {
                assert_eq!(heard, Some(zds_ack(Ok(()))));
                assert!(settled && matches!(lost, Lost::Closed), "{lost}");
            } else {
                assert_eq!(heard, None);
                assert!(!settled && matches!(lost, Lost::Late), "{lost}");
            }
        }
    }

    fn packet(bytes: &[u8], descriptors: usize) -> Packet {
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        Packet {
            bytes: bytes.to_vec(),
            descriptors: std::iter::repeat_with(null).take(descriptors).collect(),
            truncated: false,
            descriptors_lost: false,
        }
    }

    const SNAPSHOT_SENT: &[u8] = b"\x1a\x00";
    const ADD: &[u8] = b"\x0a\x11\x0a\x02u1\x12\x0b\x0a\x01n\x12\x02ns\x1a\x02sa";

    #[test]
    fn a_pod_of_which_too_little_is_said_ends_no_connection_and_lost_descriptors_do() {
        assert!(matches!(understand(packet(ADD, 1)), Ok(Order::Add(_))));
        // Without an account, and without a workload.
        for bytes in [
            &b"\x0a\x0d\x0a\x02u1\x12\x07\x0a\x01n\x12\x02ns"[..],
            b"\x0a\x04\x0a\x02u1",
        ] {
            assert!(matches!(
                understand(packet(bytes, 1)),
                Ok(Order::Unclear(_))
            ));
        }
        let lost = Packet {
            descriptors_lost: true,
            ..packet(ADD, 0)
        };
        assert!(matches!(understand(lost), Err(Invalid::DescriptorsLost)));
        let long = Packet {
            truncated: true,
            ..packet(ADD, 1)
        };
        assert!(matches!(understand(long), Err(Invalid::Truncated)));
    }
}
