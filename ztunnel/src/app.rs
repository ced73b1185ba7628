//! The wiring: what is started in which order, what the control thread does, and the end. Takes a
//! checked `Config`, gives the process's result; never touches a connection.

mod root;

use std::collections::{BTreeSet, HashSet};
use std::future::poll_fn;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{error, info, warn};

use crate::account::{self, Accounts};
use crate::admin::{self, Operate, PodStatus, Readiness, Sources, Stats};
use crate::authz::{self, plaintext_verdict};
use crate::capture::{
    self, Capture, External, ExternalParams, Means, PlaintextVerdict, PodSettings,
};
use crate::config::{self, CaptureBy, Config};
use crate::context;
use crate::control::{self, Demander, FileSource, PodEntry, World};
use crate::enrol::{
    Agent, Asked, Change, Enrolment, Exclusions, Listed, Listing, Place, Source, Wanted,
};
use crate::identity::{self, Ca, RemoteCa, Revocations, Rules, Store, Versions};
use crate::logging::Levels;
use crate::mesh::{self, Mesh, Reader, Updates};
use crate::model::{Chain, PodUid, SpiffeId};
use crate::worker::{self, Order, Unserved, Worker};
use crate::{dns, drain};
use crate::{stats, tunnel};
use root::FollowedRoot;

/// Why the process cannot start.
#[derive(Debug, Error)]
pub enum Error {
    /// A listener for operators.
    #[error(transparent)]
    Admin(#[from] admin::Error),
    /// The kernel.
    #[error(transparent)]
    Capture(#[from] capture::Error),
    /// Things that capture needs and this machine does not have; nothing was changed.
    #[error("this machine cannot capture pods:{}", lines(.0))]
    Preflight(Vec<capture::Error>),
    /// The state's source.
    #[error(transparent)]
    Mesh(#[from] mesh::OpenError),
    /// The file of revocation lists.
    #[error(transparent)]
    Revocations(#[from] control::Error),
    /// The CA.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// The control thread's own runtime or signals.
    #[error("start the control thread")]
    Runtime(#[from] std::io::Error),
    /// A worker.
    #[error(transparent)]
    Worker(#[from] worker::Error),
    /// A worker ended by itself: a part of all connections would find nobody. What was open
    /// elsewhere was drained.
    #[error("worker {0} has ended by itself; the process must be started again")]
    WorkerLost(usize),
}

/// What logging gives the rest of the process.
#[derive(Debug)]
pub struct Logs {
    /// What it counts of itself.
    pub rows: Box<dyn account::Source>,
    /// Its filter.
    pub levels: Levels,
}

/// Runs until a signal or an operator ends it.
///
/// # Errors
/// When something that it needs is missing; then nothing was changed, or what was is closed.
pub fn run(config: &Config, logs: Logs) -> Result<(), Error> {
    capture::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(Box::pin(serve(config, logs)));
    // A second interrupt leaves workers behind; the process does not wait for them.
    runtime.shutdown_background();
    ended
}

async fn serve(config: &Config, logs: Logs) -> Result<(), Error> {
    let (quit, quits) = mpsc::channel(1);
    let signals = Signals::listen(quits)?;
    let params = capture_params(config);
    // Before anything is changed, also before a CA is created.
    preflight(config, &params)?;
    let (state, updates) = Updates::open(config)?;
    let (ca, root) = ca(config)?;
    let (revocations, _lists) = follow_revocations(config.crl_path.as_deref())?;
    let certificates = certificates(config, revocations.clone());
    let store = Arc::new(Store::new(certificates, Arc::new(wall_clock)));
    let _root = root.map(|root| root.follow(Arc::clone(&store)));
    let accounts = Accounts::new(config.workers);
    accounts.register(logs.rows);
    let readiness = Readiness::default();
    let state_ready = readiness.task("state manager");
    let pods_ready = readiness.task(PODS_TASK);
    if let Some(counts) = updates.counts() {
        accounts.register(stats::control_plane(counts));
    }
    accounts.register(stats::build(&config.istio_version));
    let ports = Ports::bind(config)?;

    let means = means(config, &params, &accounts)?;

    let probes = config.probe_addresses.clone();
    let (mesh, subscribe) = Mesh::new(Arc::clone(&config.network), state, probes);
    let (tell_pods, pods) = watch::channel(Arc::default());
    let (tell_unserved, unserved) = mpsc::channel(UNSERVED);
    let dns = dns::Counts::new(config.workers);
    if config.dns_capture {
        accounts.register(Box::new(dns.clone()));
    }
    let shared = Shared {
        accounts: &accounts,
        dns: &dns,
        store: &store,
        revocations,
        world: subscribe,
        unserved: tell_unserved,
        demander: updates.demander(),
    };
    let operate = shared.operate(config, pods, logs.levels, quit);
    let workers = start_workers(config, &shared)?;
    let (end, drain) = drain::channel();
    let stats = Stats::new(accounts.clone());
    let ready = readiness.clone();
    let servers = async { tokio::join!(ports.serve(stats, ready, operate, drain), store.run(&ca)) };
    let enrolment = Enrolment::new(means);
    accounts.register(stats::enrolment(enrolment.census()));
    let node = Node {
        enrolment,
        store: Arc::clone(&store),
        workers,
        unserved,
        readiness,
        pods_ready: Some(pods_ready),
        accounts: accounts.clone(),
        mesh,
        identities: BTreeSet::new(),
        tell_pods,
        dns: config.dns_capture,
    };
    let run = Run {
        config,
        node,
        updates,
        signals,
        end,
    };
    tokio::select! {
        _ = servers => {
            error!("the servers for operators ended before the process");
            Ok(())
        }
        outcome = run.follow(state_ready) => outcome,
    }
}

/// What this machine lacks for capture.
fn preflight(config: &Config, params: &capture::Params) -> Result<(), Error> {
    match config.capture {
        CaptureBy::Ebpf => capture::preflight(params),
        CaptureBy::External => capture::preflight_external(),
    }
    .map_err(Error::Preflight)
}

/// Who captures.
fn means(
    config: &Config,
    params: &capture::Params,
    accounts: &Accounts,
) -> Result<Means, capture::Error> {
    Ok(match config.capture {
        CaptureBy::Ebpf => {
            let capture = Capture::start(params)?;
            accounts.register(stats::kernel(capture.clone()));
            Means::Ebpf(capture)
        }
        CaptureBy::External => {
            let external = ExternalParams {
                workers: params.workers,
                socks5: params.socks5,
                mark: params.mark,
                reuse_port: config.pod_port_reuse,
                ipv6: config.ipv6,
                dns: config.dns_capture,
            };
            Means::External(External::start(external, &params.pin_dir)?)
        }
    })
}

/// What the control thread goes by.
struct Run<'a> {
    config: &'a Config,
    node: Node,
    updates: Updates,
    signals: Signals,
    end: drain::Trigger,
}

impl Run<'_> {
    /// From the first state, of which `state_ready` tells, to the end.
    async fn follow(mut self, state_ready: admin::Task) -> Result<(), Error> {
        // Until the state is complete nothing is served by half of it; who waits is served then.
        if !self.complete().await {
            return Ok(());
        }
        drop(state_ready);
        match &self.config.enrolment {
            config::Enrolment::Listed => self.serve(Listing::default()).await,
            config::Enrolment::Zds(path) => {
                let agent = Agent::connect(path.clone());
                self.node.accounts.register(stats::agent(agent.tally()));
                Box::pin(self.serve(agent)).await
            }
        }
    }

    /// Follows updates until the first state is there; false if somebody asked for the end before.
    async fn complete(&mut self) -> bool {
        while !self.updates.are_complete() {
            tokio::select! {
                () = self.signals.stop() => return false,
                update = self.updates.next() => self.node.mesh.take(update).await,
            }
        }
        true
    }

    /// Serves the pods of this source until the end.
    async fn serve(mut self, mut pods: impl Source) -> Result<(), Error> {
        pods.listed(listed(self.node.mesh.pods()));
        self.node.begin(&pods).await;
        let outcome = self.control(&mut pods).await;
        // From here nobody is told that a pod is served.
        drop(pods);
        self.node.drain(self.config.termination_deadline).await;
        // Last: who sees readiness gone may rely on the listeners being on their way out.
        self.end.graceful();
        self.node.end(&mut self.updates, &mut self.signals).await;
        outcome
    }

    /// Follows updates until somebody asks for the end, or the node cannot do its job any more.
    async fn control(&mut self, pods: &mut impl Source) -> Result<(), Error> {
        let Self {
            node,
            updates,
            signals,
            ..
        } = self;
        let mut tick = interval(RECONCILE_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sweep = interval(FORGET_EVERY);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = signals.stop() => return Ok(()),
                number = lost(&node.workers) => {
                    error!(worker = number, "a worker has ended by itself; ending the process");
                    return Err(Error::WorkerLost(number));
                }
                Some(unserved) = node.unserved.recv() => node.give_up(&unserved, pods).await,
                update = updates.next() => node.apply(update, pods).await,
                asked = pods.changed() => node.answer(asked, pods).await,
                _ = tick.tick() => node.reconcile(pods).await,
                _ = sweep.tick() => node.forget(),
            }
        }
    }
}

/// What the control thread works on.
struct Node {
    enrolment: Enrolment,
    store: Arc<Store>,
    workers: Vec<Worker>,
    unserved: mpsc::Receiver<Unserved>,
    readiness: Readiness,
    /// Held while pods are not served that should be.
    pods_ready: Option<admin::Task>,
    accounts: Accounts,
    mesh: Mesh,
    /// The identities of the pods that should be served.
    identities: BTreeSet<SpiffeId>,
    tell_pods: watch::Sender<Arc<[PodStatus]>>,
    /// Whether questions to resolvers are captured in any pod.
    dns: bool,
}

impl Node {
    /// Enrols the first pods.
    async fn begin(&mut self, pods: &impl Source) {
        let started = Instant::now();
        self.reconcile(pods).await;
        let world = self.mesh.world();
        info!(
            workloads = world.snapshot.workload_count(),
            services = world.snapshot.service_count(),
            policies = world.policies.iter().count(),
            pods = self.enrolment.enrolled(),
            troubled = self.enrolment.troubled(),
            workers = self.workers.len(),
            took_ms = started.elapsed().as_millis(),
            "ready"
        );
    }

    async fn apply(&mut self, update: mesh::Update, pods: &mut impl Source) {
        let is_file = matches!(update, mesh::Update::File(Ok(_)));
        // Workers first: no pod is captured before its world is there, and open connections are
        // judged again before the kernel refuses new ones.
        self.mesh.take(update).await;
        if is_file {
            pods.listed(listed(self.mesh.pods()));
        }
        self.reconcile(pods).await;
        if is_file {
            info!("state applied");
        }
    }

    /// Does what the source of pods asks for. What it costs is the pods that it names, and no others.
    async fn answer(&mut self, asked: Asked, pods: &impl Source) {
        match asked {
            Asked::Report => self.report(pods, &pods.pods()),
            Asked::Enrol(uid, answer) => {
                let listed = pods.pods();
                let world = self.mesh.world();
                if let Some(pod) = listed.iter().find(|pod| pod.uid == uid) {
                    let wanted = self.wanted(&world, pod);
                    for change in self.enrolment.enrol(&wanted) {
                        self.tell(change).await;
                    }
                    self.prefetch_one(&world, &wanted);
                }
                self.report(pods, &listed);
                let trouble = self.enrolment.trouble(&uid).map(str::to_owned);
                answer.tell(trouble.map_or(Ok(()), Err));
            }
            Asked::Release(uids, answer) => {
                self.release(&uids, pods).await;
                self.report(pods, &pods.pods());
                answer.tell(Ok(()));
            }
            Asked::Settle(uids, answer) => {
                self.release(&uids, pods).await;
                self.reconcile(pods).await;
                answer.tell(Ok(()));
            }
        }
    }

    async fn release(&mut self, uids: &[PodUid], pods: &impl Source) {
        let world = self.mesh.world();
        let listed = pods.pods();
        let listed: Vec<Wanted> = listed.iter().map(|pod| self.wanted(&world, pod)).collect();
        for uid in uids {
            for change in self.enrolment.release(uid, &listed) {
                self.tell(change).await;
            }
            tokio::task::yield_now().await;
        }
    }

    fn wanted(&self, world: &World, listed: &Listed) -> Wanted {
        wanted(world, listed, self.dns)
    }

    /// Brings the kernel to the wanted pods and tells the workers the difference.
    async fn reconcile(&mut self, pods: &impl Source) {
        let world = self.mesh.world();
        let listed = pods.pods();
        let wanted: Vec<Wanted> = listed.iter().map(|pod| self.wanted(&world, pod)).collect();
        loop {
            for change in self.enrolment.reconcile(&wanted, pods.unlisted()) {
                self.tell(change).await;
            }
            if !self.enrolment.is_behind() {
                break;
            }
            // Many pods take a while; probes and scrapes have their turn.
            tokio::task::yield_now().await;
        }
        self.report(pods, &listed);
        self.prefetch(&world, &wanted);
    }

    /// Keeps the metrics page as large as the mesh.
    fn forget(&self) {
        let world = self.mesh.world();
        let known: HashSet<(&str, &str)> = world
            .snapshot
            .workloads()
            .map(|workload| (&*workload.namespace, &*workload.workload_name))
            .collect();
        self.accounts
            .forget(|namespace, name| known.contains(&(namespace, name)));
    }

    /// Has a pod enrolled anew, by the next reconciliation, that a worker cannot serve.
    async fn give_up(&mut self, unserved: &Unserved, pods: &impl Source) {
        if let Some(change) = self.enrolment.give_up(unserved.id, &unserved.error) {
            self.tell(change).await;
            self.report(pods, &pods.pods());
        }
    }

    /// Says which pods are served.
    fn report(&mut self, pods: &impl Source, listed: &[Listed]) {
        self.enrolment.set_unclear(pods.unclear());
        self.readiness.troubled(self.enrolment.census().troubled());
        let up = self.enrolment.up();
        let status = |listed: &Listed| PodStatus {
            up: up.contains(&listed.uid),
            uid: listed.uid.clone(),
            pod: listed.pod.clone(),
        };
        let now: Arc<[PodStatus]> = listed.iter().map(status).collect();
        self.tell_pods.send_if_modified(|told| {
            let changed = **told != *now;
            if changed {
                *told = now;
            }
            changed
        });
        // PROTOCOL.md#zds-ready
        if pods.is_settled(self.enrolment.troubled()) {
            self.pods_ready = None;
        } else if self.pods_ready.is_none() {
            self.pods_ready = Some(self.readiness.task(PODS_TASK));
        }
    }

    async fn tell(&self, change: Change) {
        match change {
            Change::Up {
                id,
                pod,
                listeners,
                dialer,
            } => {
                for (worker, listeners) in self.workers.iter().zip(listeners) {
                    worker
                        .tell(Order::Up {
                            id,
                            pod: pod.clone(),
                            listeners,
                            dialer: dialer.clone(),
                        })
                        .await;
                }
            }
            Change::Down(id) => {
                for worker in &self.workers {
                    worker.tell(Order::Down(id)).await;
                }
            }
        }
    }

    /// Has the pods' certificates made before their first connection asks for them, and lets go of
    /// those that no pod here has any more.
    // PROTOCOL.md#certificate-prefetch
    fn prefetch(&mut self, world: &World, wanted: &[Wanted]) {
        let identity = |wanted: &Wanted| world.snapshot.pod(&wanted.pod)?.identity.clone();
        let now: BTreeSet<SpiffeId> = wanted.iter().filter_map(identity).collect();
        for id in &now {
            self.store.prefetch(id);
        }
        for id in self.identities.difference(&now) {
            self.store.forget(id);
        }
        self.identities = now;
    }

    /// The same for a pod that has just come.
    fn prefetch_one(&mut self, world: &World, wanted: &Wanted) {
        let workload = world.snapshot.pod(&wanted.pod);
        if let Some(id) = workload.and_then(|workload| workload.identity.clone()) {
            self.store.prefetch(&id);
            self.identities.insert(id);
        }
    }

    /// Tells the workers to end.
    async fn drain(&self, deadline: Duration) {
        info!(
            ?deadline,
            "draining: nothing new is accepted, open connections may finish"
        );
        for worker in &self.workers {
            worker.tell(Order::Drain(deadline)).await;
        }
    }

    /// Waits for the workers, whose connections are judged by every new state until they end; a
    /// second interrupt ends the process without them. Pods are left as they are: whoever serves
    /// them next brings them to what is wanted.
    async fn end(self, updates: &mut Updates, signals: &mut Signals) {
        let Self {
            workers, mut mesh, ..
        } = self;
        let mut joined =
            tokio::task::spawn_blocking(move || workers.into_iter().for_each(Worker::join));
        loop {
            tokio::select! {
                ended = &mut joined => {
                    if ended.is_err() {
                        error!("waiting for the workers failed");
                    }
                    break;
                }
                () = signals.interrupted() => {
                    warn!("interrupted again: open connections are cut");
                    break;
                }
                update = updates.next() => mesh.take(update).await,
            }
        }
        info!("ended; enrolled pods stay captured, and so closed, until a process serves them");
    }
}

/// Waits until a worker has ended, and says which. Cancel safe.
async fn lost(workers: &[Worker]) -> usize {
    let mut ends: Vec<_> = workers.iter().map(|w| Box::pin(w.ended())).collect();
    poll_fn(|cx| {
        let ended = ends
            .iter_mut()
            .position(|end| end.as_mut().poll(cx).is_ready());
        ended.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

/// Where certificates come from, and the root to follow if it is ours.
fn ca(config: &Config) -> Result<(Ca, Option<FollowedRoot>), identity::Error> {
    if let Some(params) = &config.ca {
        return Ok((Ca::Remote(Box::new(RemoteCa::new(params.clone()))), None));
    }
    let (ca, root) = FollowedRoot::open(&config.ca_dir, wall_clock)?;
    Ok((ca, Some(root)))
}

/// The pods of a state, as a source lists them. A file names each namespace once, so a pod's names
/// tell it from others.
fn listed(pods: &[PodEntry]) -> Vec<Listed> {
    let listed = |entry: &PodEntry| Listed {
        uid: PodUid(entry.pod.to_string().into()),
        pod: entry.pod.clone(),
        place: Place::Path(entry.netns.clone()),
        exclusions: Exclusions {
            outbound_cidrs: entry.exclude_outbound_cidrs.clone(),
            outbound_ports: entry.exclude_outbound_ports.clone(),
            inbound_ports: entry.exclude_inbound_ports.clone(),
            inbound_cidrs: entry.exclude_inbound_cidrs.clone(),
            dns: !entry.dns_capture,
        },
    };
    pods.iter().map(listed).collect()
}

/// What the kernel has to know of a pod. A pod that the mesh does not know takes no plaintext.
fn wanted(world: &World, entry: &Listed, dns: bool) -> Wanted {
    let workload = world.snapshot.pod(&entry.pod);
    let plaintext = workload.map_or(PlaintextVerdict::Drop, |workload| {
        verdict(plaintext_verdict(&world.policies, workload))
    });
    let probes = workload.map(|workload| world.policies.probes().sources(workload));
    let judged_sources = probes.into_iter().flatten().collect();
    Wanted {
        uid: entry.uid.clone(),
        pod: entry.pod.clone(),
        place: entry.place.clone(),
        settings: PodSettings {
            addresses: workload.map(|w| w.ips.clone()).unwrap_or_default(),
            plaintext,
            excluded_outbound_ports: entry.exclusions.outbound_ports.clone(),
            excluded_outbound_cidrs: entry.exclusions.outbound_cidrs.clone(),
            excluded_inbound_ports: entry.exclusions.inbound_ports.clone(),
            excluded_inbound_cidrs: entry.exclusions.inbound_cidrs.clone(),
            judged_sources,
            dns: dns && !entry.exclusions.dns,
        },
    }
}

const fn verdict(verdict: authz::PlaintextVerdict) -> PlaintextVerdict {
    match verdict {
        authz::PlaintextVerdict::Drop => PlaintextVerdict::Drop,
        authz::PlaintextVerdict::Proxy => PlaintextVerdict::Proxy,
    }
}

/// What every worker is given.
struct Shared<'a> {
    accounts: &'a Accounts,
    store: &'a Arc<Store>,
    revocations: Revocations,
    world: watch::Receiver<World>,
    unserved: mpsc::Sender<Unserved>,
    demander: Option<Demander>,
    dns: &'a dns::Counts,
}

impl Shared<'_> {
    /// What the operator's port answers from.
    fn operate(
        &self,
        config: &Config,
        pods: watch::Receiver<Arc<[PodStatus]>>,
        levels: Levels,
        quit: mpsc::Sender<()>,
    ) -> Operate {
        Operate {
            sources: Sources {
                world: self.world.clone(),
                pods,
                store: Arc::clone(self.store),
                accounts: self.accounts.clone(),
                config: config.shown(),
                istio_version: config.istio_version.clone(),
            },
            levels,
            quit,
            turn: Arc::new(Semaphore::new(1)),
        }
    }
}

fn start_workers(config: &Config, shared: &Shared<'_>) -> Result<Vec<Worker>, Error> {
    let start = |number| {
        let params = worker::Params {
            number,
            book: shared.accounts.book(number),
            store: Arc::clone(shared.store),
            revocations: shared.revocations.clone(),
            tunnel: tunnel_params(config),
            settings: context::Settings {
                original_source: config.original_source,
                response_baggage: config.response_baggage,
                localhost_app_tunnel: config.localhost_app_tunnel,
                policy_info_logging: config.policy_info_logging,
                local_fast_path: config.local_fast_path,
                keepalive: config.keepalive.map(|k| tunnel::TcpKeepalive {
                    time: k.time,
                    interval: k.interval,
                    retries: k.retries,
                    user_timeout: k.user_timeout,
                }),
            },
            names: dns::Params {
                cluster_domain: Arc::clone(&config.cluster_domain),
                ipv6: config.ipv6,
                preferred_namespace: config.preferred_namespace.clone(),
            },
            questions: shared.dns.tally(number),
            world: shared.world.clone(),
            unserved: shared.unserved.clone(),
            demander: shared.demander.clone(),
        };
        Ok(Worker::start(params)?)
    };
    (0..config.workers).map(start).collect()
}

fn capture_params(config: &Config) -> capture::Params {
    capture::Params {
        pin_dir: config.bpf_pin_dir.clone(),
        workers: config.workers,
        socks5: config.socks5,
        mark: config.packet_mark,
        dns: config.dns_capture,
    }
}

fn certificates(config: &Config, revocations: Revocations) -> identity::Params {
    identity::Params {
        ttl: config.secret_ttl,
        rules: Rules {
            versions: if config.tls12 {
                Versions::From12
            } else {
                Versions::Only13
            },
            exchange: config.key_exchange,
            revocations,
        },
        ..identity::Params::default()
    }
}

/// The revocation lists of this file, and who replaces them when it changes. What it says at the
/// start must be sound; what it says later is refused if it is not, and the lists before stay.
// PROTOCOL.md#crl-file
fn follow_revocations(file: Option<&Path>) -> Result<(Revocations, Option<Reader>), Error> {
    let Some(file) = file else {
        return Ok((Revocations::default(), None));
    };
    let (first, mut source) = FileSource::open_revocations(file)?;
    match &first {
        Some(lists) => info!(file = %file.display(), lists = lists.len(), "revocation lists"),
        None => warn!(
            file = %file.display(),
            "no revocation lists: the file is missing, and looked for from now on"
        ),
    }
    let (replace, revocations) = Revocations::followed(first.unwrap_or_default());
    let reader = tokio::spawn(async move {
        loop {
            match source.changed().await {
                Ok(lists) => {
                    let number = lists.len();
                    replace.send_replace(Arc::new(lists));
                    info!(lists = number, "revocation lists replaced");
                }
                Err(error) => warn!(
                    error = %Chain(&error),
                    "revocation lists refused; those before stay"
                ),
            }
        }
    });
    Ok((revocations, Some(Reader(reader))))
}

fn tunnel_params(config: &Config) -> tunnel::Params {
    tunnel::Params {
        pool_streams: usize::from(config.pool_max_streams),
        idle_timeout: config.pool_unused_release,
        stream_window_bytes: config.stream_window_bytes,
        connection_window_bytes: config.connection_window_bytes,
        frame_bytes: config.frame_bytes,
        ..tunnel::Params::default()
    }
}

/// What ends the process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Orders of the operator's port.
    quits: mpsc::Receiver<()>,
}

impl Signals {
    fn listen(quits: mpsc::Receiver<()>) -> Result<Self, std::io::Error> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quits,
        })
    }

    /// The first signal or operator that asks for the end. Cancel safe.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            Some(()) = self.quits.recv() => info!("an operator asks for the end"),
        }
    }

    /// An interrupt. Cancel safe.
    async fn interrupted(&mut self) {
        self.interrupt.recv().await;
    }
}

/// Each error on a line of its own, with its causes.
fn lines(errors: &[capture::Error]) -> String {
    errors
        .iter()
        .map(|error| format!("\n  {}", Chain(error)))
        .collect()
}

#[expect(
    clippy::disallowed_methods,
    reason = "the process's one clock for certificates"
)]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// The servers for operators and probes.
struct Ports {
    stats: admin::Server,
    readiness: admin::Server,
    operate: admin::Server,
    /// The same on IPv6; a host may have IPv6 and no `::1`.
    operate6: Option<admin::Server>,
}

impl Ports {
    fn bind(config: &Config) -> Result<Self, admin::Error> {
        let admin = config.admin_port;
        Ok(Self {
            stats: admin::Server::bind(any(config.stats_port))?,
            readiness: admin::Server::bind(any(READINESS_PORT))?,
            operate: admin::Server::bind((Ipv4Addr::LOCALHOST, admin).into())?,
            operate6: admin::Server::bind((Ipv6Addr::LOCALHOST, admin).into())
                .inspect_err(|error| info!(error = %Chain(error), "operators ask by IPv4 only"))
                .ok(),
        })
    }

    async fn serve(
        self,
        stats: Stats,
        readiness: Readiness,
        operate: Operate,
        drain: drain::Signal,
    ) {
        let operate6 = async {
            if let Some(server) = self.operate6 {
                server.serve(operate.clone(), drain.clone()).await;
            }
        };
        tokio::join!(
            self.stats.serve(stats, drain.clone()),
            self.readiness.serve(readiness, drain.clone()),
            self.operate.serve(operate.clone(), drain.clone()),
            operate6,
        );
    }
}

/// All addresses of the node, both families where the kernel has both.
fn any(port: u16) -> SocketAddr {
    let v6 = Path::new("/proc/net/if_inet6").exists();
    let ip = if v6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    SocketAddr::new(ip, port)
}

/// Where readiness is asked for.
// PROTOCOL.md#ports
const READINESS_PORT: u16 = 15021;

/// Whether every pod that should be served is.
// PROTOCOL.md#readiness
const PODS_TASK: &str = "workload proxy manager";

/// How often the pods' namespaces are looked at when nothing else happens.
const RECONCILE_EVERY: Duration = Duration::from_secs(1);

/// Reports of the workers that may wait.
const UNSERVED: usize = 64;

/// How often label sets of workloads that are gone are looked for; forgotten after fifteen times.
const FORGET_EVERY: Duration = Duration::from_mins(1);
