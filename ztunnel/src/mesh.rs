//! What becomes known of the mesh, from a file, a control plane or both. Takes their updates in the order in which they
//! come, gives the workers the world that follows; never keeps anybody waiting who only reads.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::authz::Probes;
use crate::config::{Config, Source};
use crate::control::{self, Change, Demander, Event, FileSource, PodEntry, State, World, Xds};
use crate::model::Chain;

/// The mesh as it is known now.
#[derive(Debug)]
pub struct Mesh {
    publish: watch::Sender<World>,
    /// What the file says; empty without one.
    file: State,
    /// The addresses that this node's connections to its pods are given.
    translated: Vec<IpAddr>,
}

/// Something new about the mesh.
#[derive(Debug)]
pub enum Update {
    /// The control plane told it.
    ControlPlane(Event),
    /// The file was changed.
    File(Result<State, control::Error>),
}

/// Updates after the first state. A file is read by a task of its own: reading a large one takes
/// longer than the control loop waits for anything, and must not begin again each time.
#[derive(Debug)]
pub struct Updates {
    read: mpsc::Receiver<Result<State, control::Error>>,
    _reader: Option<Reader>,
    xds: Option<Xds>,
    /// Whether everything that is needed at the start is there.
    complete: bool,
}

/// Ends the reading task when it is dropped.
#[derive(Debug)]
pub(crate) struct Reader(pub(crate) JoinHandle<()>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Mesh {
    /// The mesh that a file describes, and where the workers see it change. `translated`: the addresses
    /// that this node's connections to its pods are given.
    #[must_use]
    pub fn new(
        node_network: Arc<str>,
        file: State,
        translated: Vec<IpAddr>,
    ) -> (Self, watch::Receiver<World>) {
        let empty = World::new(node_network);
        let (publish, subscribe) = watch::channel(empty.clone());
        let mesh = Self {
            publish,
            file,
            translated,
        };
        let changes = mesh.file.changes_since(&State::default());
        if let Some(world) = next(&empty, changes, &mesh.probes()) {
            mesh.publish.send_replace(world);
        }
        (mesh, subscribe)
    }

    /// The world of now.
    #[must_use]
    pub fn world(&self) -> World {
        self.publish.borrow().clone()
    }

    /// The pods that the file lists.
    #[must_use]
    pub fn pods(&self) -> &[PodEntry] {
        &self.file.pods
    }

    /// Takes an update in. The workers see it before this returns.
    pub async fn take(&mut self, update: Update) {
        match update {
            Update::File(Ok(state)) => {
                let started = Instant::now();
                let changes = state.changes_since(&self.file);
                self.file = state;
                self.publish(changes).await;
                let world = self.world();
                info!(
                    generation = world.generation,
                    workloads = world.snapshot.workload_count(),
                    services = world.snapshot.service_count(),
                    policies = world.policies.iter().count(),
                    pods = self.file.pods.len(),
                    took_ms = started.elapsed().as_millis(),
                    "state replaced"
                );
            }
            Update::File(Err(error)) => {
                warn!(error = %Chain(&error), "update refused; the running state stays");
            }
            Update::ControlPlane(Event::Changes(changes)) => self.publish(changes).await,
            Update::ControlPlane(Event::Complete) => {
                info!("the control plane's state is complete");
            }
        }
    }

    /// Gives the workers the world that follows by these changes, unless it is the same one.
    async fn publish(&self, changes: Vec<Change>) {
        let (before, started, count) = (self.world(), Instant::now(), changes.len());
        let probes = self.probes();
        // A large mesh takes longer than anybody should wait for metrics.
        let next = tokio::task::spawn_blocking(move || next(&before, changes, &probes)).await;
        match next {
            Ok(Some(world)) => {
                debug!(
                    generation = world.generation,
                    changes = count,
                    took_us = started.elapsed().as_micros(),
                    "the state changed"
                );
                self.publish.send_replace(world);
            }
            Ok(None) => debug!(changes = count, "nothing of the state changed"),
            Err(error) => error!(%error, "a change of the state was lost"),
        }
    }

    /// From where the pods of this node may be probed.
    fn probes(&self) -> Arc<Probes> {
        let listed = self.file.pods.iter();
        let listed = listed.map(|entry| (&entry.pod, entry.probe_sources.as_slice()));
        Arc::new(Probes::new(listed, self.translated.clone()))
    }
}

/// The world that follows by these changes and these sources of probes; none if it is the same one.
fn next(before: &World, changes: Vec<Change>, probes: &Arc<Probes>) -> Option<World> {
    let changed = before.apply(changes);
    let probed = changed.as_ref().unwrap_or(before).with_probes(probes);
    probed.or(changed)
}

impl Updates {
    /// Reads the file, if there is one, and starts the control plane's stream, if there is one.
    ///
    /// # Errors
    /// When the file is no valid state, or the kernel gives no thread.
    pub fn open(config: &Config) -> Result<(State, Self), OpenError> {
        let (send, read) = mpsc::channel(1);
        let (state, reader) = match &config.source {
            Some(Source::File(path)) => {
                let (state, mut file) = FileSource::open(path)?;
                let reader =
                    tokio::spawn(
                        async move { while send.send(file.changed().await).await.is_ok() {} },
                    );
                (state, Some(Reader(reader)))
            }
            Some(Source::Inline(text)) => (control::parse(Path::new("LOCAL_XDS"), text)?, None),
            None => (State::default(), None),
        };
        let xds = config.xds.clone().map(Xds::start).transpose()?;
        let updates = Self {
            read,
            _reader: reader,
            complete: xds.is_none(),
            xds,
        };
        Ok((state, updates))
    }

    /// Whether everything that is needed at the start is there.
    #[must_use]
    pub const fn are_complete(&self) -> bool {
        self.complete
    }

    /// What the control plane's stream counts, if there is one.
    #[must_use]
    pub fn counts(&self) -> Option<Arc<control::Counts>> {
        self.xds.as_ref().map(Xds::counts)
    }

    /// Asks the control plane for single names, if it tells only what it is asked for.
    #[must_use]
    pub fn demander(&self) -> Option<Demander> {
        self.xds.as_ref().and_then(Xds::demander)
    }

    /// The next update. Cancel safe.
    pub async fn next(&mut self) -> Update {
        let Self {
            read,
            xds,
            complete,
            ..
        } = self;
        let told = async {
            match xds {
                Some(xds) => xds.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(state) = read.recv() => Update::File(state),
            event = told => {
                *complete |= matches!(event, Event::Complete);
                Update::ControlPlane(event)
            }
        }
    }
}

/// Why there is no first state.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file.
    #[error(transparent)]
    File(#[from] control::Error),
    /// The thread of the control plane's stream.
    #[error("start the thread of the control plane's stream")]
    Thread(#[from] std::io::Error),
}
