//! The control plane's stream. Takes where it is, gives changes as they come and the moment when the state is
//! complete; it reconnects for ever, keeps what it has meanwhile, and never touches what serves traffic.

mod backoff;
mod counts;
mod demand;
mod held;
mod node;
mod session;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::apply::{Change, Interner};
use crate::model::Chain;
use crate::rpc::{self, Code, Connection};
use backoff::Backoff;
pub use counts::{Counts, Ended};
pub use demand::Demander;
use demand::{Demand, Names};
use held::Held;
pub use node::NodeParams;
use session::{End, Session};

/// How the control plane is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct XdsParams {
    /// Where it is, and how we prove who we are.
    pub rpc: rpc::Params,
    /// Who we are.
    pub node: NodeParams,
    /// Only what this node uses is asked for.
    pub on_demand: bool,
}

/// What the control plane brings.
#[derive(Debug)]
pub enum Event {
    /// These things are different from now on.
    Changes(Vec<Change>),
    /// Everything that was asked for at the start has come; it comes once.
    Complete,
}

/// The stream, on a thread of its own. Dropping it ends the thread.
#[derive(Debug)]
pub struct Xds {
    events: mpsc::Receiver<Event>,
    counts: Arc<Counts>,
    demander: Option<Demander>,
    _thread: JoinHandle<()>,
}

impl Xds {
    /// Starts the thread; it connects by itself.
    ///
    /// # Errors
    /// When the kernel gives no thread or no event queue.
    pub fn start(params: XdsParams) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (send, events) = mpsc::channel(EVENTS);
        let counts = Arc::new(Counts::default());
        let (demander, demands) = Demander::new();
        let demander = params.on_demand.then_some(demander);
        let client = Client {
            demands,
            names: Names::default(),
            counts: Arc::clone(&counts),
            held: Held::default(),
            interner: Interner::default(),
            events: send,
            params,
        };
        let thread = std::thread::Builder::new()
            .name("xds".to_owned())
            .spawn(move || runtime.block_on(client.run()))?;
        Ok(Self {
            events,
            counts,
            demander,
            _thread: thread,
        })
    }

    /// The next event. Cancel safe.
    pub async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            // The thread ends only with this value.
            None => std::future::pending().await,
        }
    }

    /// Asks for single names; none if everything is asked for.
    #[must_use]
    pub fn demander(&self) -> Option<Demander> {
        self.demander.clone()
    }

    /// What the stream counts.
    #[must_use]
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }
}

/// What outlives a stream.
struct Client {
    params: XdsParams,
    events: mpsc::Sender<Event>,
    counts: Arc<Counts>,
    held: Held,
    interner: Interner,
    demands: mpsc::Receiver<Demand>,
    names: Names,
}

impl Client {
    async fn run(mut self) {
        let events = self.events.clone();
        tokio::select! {
            () = events.closed() => {}
            () = self.serve() => {}
        }
        debug!("the control plane's stream ended with the process");
    }

    async fn serve(&mut self) {
        let mut backoff = Backoff::default();
        let mut next = None;
        loop {
            let connection = match next.take() {
                Some(connection) => connection,
                None => match Connection::open(&self.params.rpc).await {
                    Ok(connection) => connection,
                    Err(error) => {
                        self.counts.ended(Ended::ConnectionError);
                        self.pause(backoff.failed(), &error).await;
                        continue;
                    }
                },
            };
            let began = Instant::now();
            match self.converse(connection).await {
                End::Replaced(connection) => {
                    info!("the control plane announced its leave; another stream is open");
                    self.counts.ended(Ended::Reconnect);
                    next = Some(connection);
                }
                End::Closed => {
                    self.counts.ended(Ended::Complete);
                    let pause = backoff.left(began.elapsed(), true);
                    warn!(again_in = ?pause, "the control plane closed the stream");
                    sleep(pause).await;
                }
                End::Failed(error) if is_cut(&error) => {
                    self.counts.ended(Ended::Reconnect);
                    let pause = backoff.left(began.elapsed(), false);
                    info!(error = %Chain(&error), again_in = ?pause, "the stream to the control plane was cut");
                    sleep(pause).await;
                }
                End::Failed(error) => {
                    self.counts.ended(Ended::Error);
                    if self.held.answer_too_large(&error) {
                        warn!(
                            "the control plane takes no list of all that is held; asking for everything"
                        );
                    }
                    self.pause(backoff.failed(), &error).await;
                }
                End::Abandoned => return,
                End::Again(connection) => {
                    debug!("another stream, for names that this one does not answer");
                    next = Some(connection);
                }
            }
        }
    }

    async fn converse(&mut self, connection: Connection) -> End {
        let Self {
            params,
            events,
            counts,
            held,
            interner,
            demands,
            names,
        } = self;
        let session = Session {
            params,
            events,
            counts,
            held,
            interner,
            demands,
            names,
        };
        Box::pin(session.run(connection)).await
    }

    async fn pause(&self, pause: std::time::Duration, error: &rpc::Error) {
        let endpoint = &self.params.rpc.endpoint;
        warn!(
            %endpoint, error = %Chain(error), again_in = ?pause,
            "no stream to the control plane; what is known of the mesh stays in force"
        );
        sleep(pause).await;
    }
}

/// An end that says nothing against trying again at once: the other side went away, or its proxy did.
// PROTOCOL.md#xds-reconnect
fn is_cut(error: &rpc::Error) -> bool {
    match error {
        rpc::Error::Broken(_) => true,
        rpc::Error::Status(status) => match status.code {
            Code::CANCELLED | Code::DEADLINE_EXCEEDED | Code::UNKNOWN => true,
            Code::UNAVAILABLE => {
                let said = &status.message;
                said.contains("transport is closing") || said.contains("GOAWAY")
            }
            _ => false,
        },
        _ => false,
    }
}

/// Events that may wait: while one is applied the next is read, and no more.
const EVENTS: usize = 2;
