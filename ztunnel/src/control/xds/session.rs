//! One stream. Takes an open connection and what is held, gives changes until the stream ends, and says how it ended;
//! answers every response once, and never applies a resource that it refuses.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use super::Event;
use super::XdsParams;
use super::counts::Counts;
use super::demand::{self, Demand, Names, Next};
use super::held::{Held, Kind};
use crate::control::apply::{self, Change, Interner, Rejected};
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, Status};
use crate::rpc::{self, Connection};

type Stream = rpc::Stream<DeltaDiscoveryResponse>;

/// How a stream ended.
pub(super) enum End {
    /// Nobody wants events any more.
    Abandoned,
    /// A name is answered by another stream only; the connection is good.
    Again(Connection),
    /// The control plane closed it in order.
    Closed,
    /// It broke, or was refused.
    Failed(rpc::Error),
    /// The control plane will close it, and there is another connection.
    Replaced(Connection),
}

/// One stream at work.
pub(super) struct Session<'a> {
    pub(super) params: &'a XdsParams,
    pub(super) events: &'a mpsc::Sender<Event>,
    pub(super) counts: &'a Counts,
    pub(super) held: &'a mut Held,
    pub(super) interner: &'a mut Interner,
    pub(super) demands: &'a mut mpsc::Receiver<Demand>,
    pub(super) names: &'a mut Names,
}

/// What a stream has brought so far.
#[derive(Default)]
struct Progress {
    /// Changes that nobody has been told yet.
    pending: Vec<Change>,
    /// Who waits for a name that is among them, or is not, and the answer.
    asked: Vec<(oneshot::Sender<bool>, bool)>,
    /// Until when they may wait for what belongs to them.
    hold_until: Option<Instant>,
    /// Types that have had a response on this stream.
    answered: Vec<Kind>,
    /// Types whose first response on this stream is everything there is.
    whole: Vec<Kind>,
}

impl Session<'_> {
    pub(super) async fn run(mut self, connection: Connection) -> End {
        let mut progress = Progress::default();
        let end = match self.open(&connection, &mut progress).await {
            Ok(stream) => {
                let end = self.follow(stream, &connection, &mut progress).await;
                self.counts.connected(false);
                end
            }
            Err(error) => End::Failed(error),
        };
        // What was taken in will not be sent again.
        match self.tell(&mut progress).await {
            Ok(()) => end,
            Err(Unwanted) => End::Abandoned,
        }
    }

    // PROTOCOL.md#xds-stream
    async fn open(
        &mut self,
        connection: &Connection,
        progress: &mut Progress,
    ) -> Result<Stream, rpc::Error> {
        let mut stream = connection.stream(METHOD, RESPONSE_BYTES).await?;
        for kind in Kind::ALL {
            let node = self.params.node.to_node();
            let (mut request, whole) = self.held.ask(kind, node, self.params.on_demand);
            if kind == Kind::Address {
                let open = self.names.open(Instant::now());
                let unversioned = open.iter().map(|name| (name.to_string(), String::new()));
                request.initial_resource_versions.extend(unversioned);
            }
            if whole {
                progress.whole.push(kind);
            }
            stream.send(&request).await?;
        }
        Ok(stream)
    }

    async fn follow(
        &mut self,
        mut stream: Stream,
        connection: &Connection,
        progress: &mut Progress,
    ) -> End {
        let mut replacement = pin!(replacement(connection, &self.params.rpc));
        loop {
            tokio::select! {
                biased;
                message = stream.next() => {
                    let response = match message {
                        Ok(Some(response)) => response,
                        Ok(None) => return End::Closed,
                        Err(error) => return End::Failed(error),
                    };
                    if progress.answered.is_empty() {
                        // Before, it may still refuse us.
                        info!(endpoint = %self.params.rpc.endpoint, "connected to the control plane");
                        self.counts.connected(true);
                    }
                    let reply = self.take(response, progress);
                    if let Err(error) = stream.send(&reply).await {
                        return End::Failed(error);
                    }
                    self.hold(progress);
                }
                () = at(progress.hold_until) => progress.hold_until = None,
                Some(demand) = self.demands.recv() => {
                    match self.names.want(demand, Instant::now()) {
                        Next::Nothing => {}
                        Next::Restart => return End::Again(connection.clone()),
                        Next::Ask(name) => {
                            let request = DeltaDiscoveryRequest {
                                type_url: ADDRESS.to_owned(),
                                resource_names_subscribe: vec![name.to_string()],
                                ..DeltaDiscoveryRequest::default()
                            };
                            if let Err(error) = stream.send(&request).await {
                                return End::Failed(error);
                            }
                        }
                    }
                }
                () = at(self.names.overdue()) => return End::Again(connection.clone()),
                connection = &mut replacement => return End::Replaced(connection),
            }
            if progress.hold_until.is_none() && self.tell(progress).await.is_err() {
                return End::Abandoned;
            }
        }
    }

    /// Takes a response in, and gives the answer to it.
    // PROTOCOL.md#xds-answer
    fn take(
        &mut self,
        response: DeltaDiscoveryResponse,
        progress: &mut Progress,
    ) -> DeltaDiscoveryRequest {
        let mut reply = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        let Some(kind) = Kind::of(&response.type_url) else {
            warn!(
                type_url = response.type_url,
                "the control plane sent what nobody asked for"
            );
            return reply;
        };
        debug!(
            type_url = kind.url(),
            resources = response.resources.len(),
            removed = response.removed_resources.len(),
            version = response.system_version_info,
            "response"
        );
        let bytes = payload_bytes(&response);
        let first = !progress.answered.contains(&kind);
        if first {
            progress.answered.push(kind);
        }
        if kind == Kind::Address {
            let answers = self.names.answered(&response, Instant::now());
            progress.asked.extend(answers);
        }
        if first && progress.whole.contains(&kind) {
            self.sweep(kind, &response, progress);
        }
        for name in response.removed_resources {
            self.remove(kind, name.into(), progress);
        }
        let mut refused = Vec::new();
        for resource in response.resources {
            let name = resource.name.clone();
            match self.resource(kind, resource) {
                Ok(change) => progress.pending.push(change),
                Err(why) => refused.push(format!("{name}: {why}")),
            }
        }
        let counts = match kind {
            Kind::Address => self.counts.addresses(),
            Kind::Authorization => self.counts.authorizations(),
        };
        counts.response(bytes, refused.len());
        if refused.is_empty() {
            self.held.accept(kind);
        } else {
            let message = list(&refused);
            warn!(
                type_url = kind.url(),
                refused = refused.len(),
                reasons = message,
                "resources refused; what was held under their names stays, everything else is applied"
            );
            reply.error_detail = Some(Status { code: 0, message });
        }
        reply
    }

    fn resource(&mut self, kind: Kind, resource: Resource) -> Result<Change, Rejected> {
        let value = resource.resource.map(|any| any.value);
        let change = match kind {
            Kind::Address => apply::address(self.interner, value)?,
            Kind::Authorization => apply::authorization(self.interner, value)?,
        };
        let mut name: Arc<str> = resource.name.into();
        match &change {
            // Nearly always the same text: held once.
            Change::Workload(workload) if workload.uid.0 == name => {
                name = Arc::clone(&workload.uid.0);
            }
            Change::Policy(policy) => self.held.policy(policy.key.clone()),
            Change::AddressGone(_)
            | Change::PolicyGone(_)
            | Change::Service(_)
            | Change::Workload(_) => {}
        }
        self.held.hold(kind, name, resource.version);
        Ok(change)
    }

    fn remove(&mut self, kind: Kind, name: Arc<str>, progress: &mut Progress) {
        self.held.drop(kind, &name);
        progress.pending.push(match kind {
            Kind::Address => Change::AddressGone(name),
            Kind::Authorization => {
                self.held.no_policy(&name);
                Change::PolicyGone(name)
            }
        });
    }

    /// A response that is everything there is: what it lacks is gone.
    fn sweep(&mut self, kind: Kind, response: &DeltaDiscoveryResponse, progress: &mut Progress) {
        let present: HashSet<&str> = response.resources.iter().map(|r| &*r.name).collect();
        let gone = self.held.others(kind, &present);
        info!(
            type_url = kind.url(),
            gone = gone.len(),
            "full state instead of changes"
        );
        for name in gone {
            self.remove(kind, name, progress);
        }
    }

    /// Keeps changes back while something that belongs to them is on its way: a workload comes before a policy that
    /// it names, and until then its connections would be refused.
    // PROTOCOL.md#xds-order
    fn hold(&self, progress: &mut Progress) {
        let patience = if progress.answered.len() < Kind::ALL.len() {
            FIRST_RESPONSES
        } else if progress.pending.iter().any(|change| match change {
            Change::Workload(workload) => self.held.lacks_policy_of(workload),
            _ => false,
        }) {
            NAMED_POLICY
        } else {
            progress.hold_until = None;
            return;
        };
        progress
            .hold_until
            .get_or_insert_with(|| Instant::now() + patience);
    }

    async fn tell(&mut self, progress: &mut Progress) -> Result<(), Unwanted> {
        if !progress.pending.is_empty() {
            let changes = std::mem::take(&mut progress.pending);
            self.send(Event::Changes(changes)).await?;
        }
        for (asked, known) in progress.asked.drain(..) {
            demand::tell(asked, known);
        }
        if self.held.became_complete() {
            self.send(Event::Complete).await?;
        }
        Ok(())
    }

    async fn send(&self, event: Event) -> Result<(), Unwanted> {
        self.events.send(event).await.map_err(|_closed| Unwanted)
    }
}

/// Nobody takes events any more.
struct Unwanted;

/// Another connection, once this one is about to be closed; meanwhile it goes on.
// PROTOCOL.md#xds-goaway
async fn replacement(old: &Connection, params: &rpc::Params) -> Connection {
    old.leaving().await;
    loop {
        match Connection::open(params).await {
            Ok(connection) => return connection,
            Err(error) => {
                debug!(%error, "no second connection yet");
                sleep(REPLACEMENT_PAUSE).await;
            }
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

fn payload_bytes(response: &DeltaDiscoveryResponse) -> usize {
    let payloads = response
        .resources
        .iter()
        .filter_map(|r| r.resource.as_ref());
    payloads.map(|any| any.value.len()).sum()
}

/// The reasons as one text that a request can carry.
// PROTOCOL.md#xds-answer
fn list(refused: &[String]) -> String {
    let mut text = refused
        .iter()
        .take(REASONS)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join("; ");
    if refused.len() > REASONS {
        text.push_str(&format!("; and {} more", refused.len() - REASONS));
    }
    text
}

pub(super) const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
pub(super) const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
const METHOD: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// The largest response that is taken.
// PROTOCOL.md#xds-response-limit
const RESPONSE_BYTES: usize = 200 << 20;
/// How long changes of the first response wait for that of the other type.
const FIRST_RESPONSES: Duration = Duration::from_secs(1);
/// How long workloads wait for a policy that they name; the control plane sends it milliseconds later.
const NAMED_POLICY: Duration = Duration::from_millis(250);
/// Between two attempts to replace a connection that will be closed.
const REPLACEMENT_PAUSE: Duration = Duration::from_millis(500);
/// How many reasons a refusal lists.
const REASONS: usize = 50;
