//! One data-plane worker: a thread, its runtime and the walks that live on it. Takes pods and
//! worlds from the control thread, gives nothing back but its end; a connection that it accepted
//! never leaves it.

mod seldom;

use std::collections::HashMap;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::{LocalSet, spawn_local};
use tracing::{debug, error, warn};

use crate::account::Book;
use crate::authz::Live;
use crate::capture::{
    Arrival, Asking, Captured, Dialer, Listener, QuestionSocket, Questions, WorkerListeners,
};
use crate::context::{
    Attested, Context, Descriptors, Handshakes, Names, Neighbours, PodDial, Settings, View,
};
use crate::control::{Demander, World};
use crate::drain;
use crate::enrol::PodId;
use crate::identity::{Revocations, Store};
use crate::model::{PodRef, Reason};
use crate::tunnel::{self, Pool};
use crate::{dns, inbound, logging, outbound, passthrough, socks5};
use seldom::Seldom;

/// What the control thread tells a worker.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "one for each pod, and it is moved a few times: not worth an allocation"
)]
pub enum Order {
    /// Serve this pod.
    Up {
        /// This enrolment.
        id: PodId,
        /// Which pod.
        pod: PodRef,
        /// Where its connections arrive.
        listeners: WorkerListeners,
        /// Makes sockets in the pod.
        dialer: Dialer,
    },
    /// End this pod at once.
    Down(PodId),
    /// Accept nothing more, let what is open finish within this time, then end.
    Drain(Duration),
}

/// What a worker starts with.
#[derive(Debug)]
pub struct Params {
    /// Its number, from 0.
    pub number: usize,
    /// Its book.
    pub book: Book,
    /// Certificates.
    pub store: Arc<Store>,
    /// Which certificates are not taken any more.
    pub revocations: Revocations,
    /// HBONE's parameters.
    pub tunnel: tunnel::Params,
    /// Settings of the walks.
    pub settings: Settings,
    /// How names are looked up.
    pub names: dns::Params,
    /// Where questions are counted.
    pub questions: dns::Tally,
    /// The mesh, replaced whole.
    pub world: watch::Receiver<World>,
    /// Asks the control plane for what the mesh lacks.
    pub demander: Option<Demander>,
    /// Where it tells of pods that it cannot serve.
    pub unserved: mpsc::Sender<Unserved>,
}

/// A worker cannot accept for a pod: the pod must be enrolled anew.
#[derive(Debug)]
pub struct Unserved {
    /// Which enrolment.
    pub id: PodId,
    /// Why.
    pub error: io::Error,
}

/// Why a worker did not start.
#[derive(Debug, Error)]
pub enum Error {
    /// Its runtime.
    #[error("start the runtime of worker {number}")]
    Runtime {
        /// The worker.
        number: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its thread.
    #[error("start the thread of worker {number}")]
    Thread {
        /// The worker.
        number: usize,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The control thread's side of a worker.
#[derive(Debug)]
pub struct Worker {
    orders: mpsc::Sender<Order>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the kernel gives no thread or no event queue.
    pub fn start(params: Params) -> Result<Self, Error> {
        let number = params.number;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| Error::Runtime { number, source })?;
        let (orders, inbox) = mpsc::channel(ORDERS);
        let thread = std::thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || LocalSet::new().block_on(&runtime, run(params, inbox)))
            .map_err(|source| Error::Thread { number, source })?;
        Ok(Self { orders, thread })
    }

    /// Tells the worker; waits when it is behind. Cancel safe: the order is sent or not at all.
    pub async fn tell(&self, order: Order) {
        if self.orders.send(order).await.is_err() {
            error!("a worker is gone; the process cannot do its job");
        }
    }

    /// Waits until the worker has ended; it should only when it is told to. Cancel safe.
    pub async fn ended(&self) {
        self.orders.closed().await;
    }

    /// Waits for the worker's end.
    pub fn join(self) {
        drop(self.orders);
        if self.thread.join().is_err() {
            error!("a worker ended by a panic");
        }
    }
}

struct Pod {
    drain: drain::Trigger,
    /// Another process may listen in the pod already.
    shared: bool,
    /// Of what answers its questions, as long as anything of this worker is open.
    questions: drain::Trigger,
    context: Weak<Context>,
}

/// The mesh as this worker is given it, and the permits that depend on it.
struct Mesh {
    number: usize,
    world: watch::Receiver<World>,
    view: Rc<View>,
    live: Live,
    revocations: Revocations,
    neighbours: Neighbours,
}

impl Mesh {
    /// Follows for as long as there is something to follow, and never ends.
    async fn follow_on(&mut self) {
        while self.follow().await {}
        std::future::pending().await
    }

    /// Waits for the next world, or for other lists of revoked certificates, and judges the open
    /// connections by it. False: there will be no other world. Cancel safe.
    async fn follow(&mut self) -> bool {
        tokio::select! {
            changed = self.world.changed() => if changed.is_err() {
                return false;
            },
            // Tunnels look for themselves.
            () = self.revocations.changed() => {
                self.neighbours.all().iter().for_each(|pod| pod.attested.recheck());
                return true;
            }
        }
        self.view.replace(self.world.borrow_and_update().clone());
        let now = self.view.world();
        let workload = |uid: &_| now.snapshot.workload(uid).cloned();
        let revoked = self.live.judge_again(&now.policies, workload);
        if revoked > 0 {
            let worker = self.number;
            debug!(worker, revoked, "open connections are not allowed any more");
        }
        true
    }
}

/// What the pods of one worker have in common.
struct Shared {
    view: Rc<View>,
    demander: Option<Demander>,
    live: Live,
    book: Book,
    store: Arc<Store>,
    tunnel: Rc<tunnel::Params>,
    settings: Settings,
    neighbours: Neighbours,
    names: Rc<Names>,
}

impl Shared {
    /// Begins to serve a pod.
    fn up(
        &self,
        id: PodId,
        (pod, dialer): (PodRef, Dialer),
        listeners: WorkerListeners,
        by: &Accepting,
    ) -> Pod {
        let (drain, signal) = drain::channel();
        let (questions, until) = drain::channel();
        let context = |pod, dialer, signal| {
            Rc::new(self.context(pod, dialer, by.descriptors.clone(), signal))
        };
        let asked = context(pod.clone(), dialer.clone(), until);
        let context = context(pod, dialer, signal);
        let shared = listeners.shared;
        serve(id, (&context, asked), listeners, by);
        self.neighbours.enter(&context);
        Pod {
            drain,
            shared,
            questions,
            context: Rc::downgrade(&context),
        }
    }

    /// What the walks of one pod work with.
    fn context(
        &self,
        pod: PodRef,
        dialer: Dialer,
        descriptors: Descriptors,
        drain: drain::Signal,
    ) -> Context {
        let dial = PodDial::new(Rc::new(dialer), descriptors, self.settings.keepalive);
        Context {
            pod,
            view: Rc::clone(&self.view),
            demander: self.demander.clone(),
            live: self.live.clone(),
            book: self.book.clone(),
            pool: Pool::new(
                Rc::clone(&self.tunnel),
                dial.clone(),
                Arc::clone(&self.store),
                drain.clone(),
            ),
            dial,
            handshakes: Handshakes::default(),
            names: Rc::clone(&self.names),
            store: Arc::clone(&self.store),
            tunnel: Rc::clone(&self.tunnel),
            settings: self.settings,
            drain,
            neighbours: self.neighbours.clone(),
            attested: Attested::default(),
        }
    }
}

async fn run(params: Params, mut inbox: mpsc::Receiver<Order>) {
    let Params {
        number,
        book,
        store,
        revocations,
        tunnel,
        settings,
        names,
        questions,
        mut world,
        unserved,
        demander,
    } = params;
    let view = View::new(world.borrow_and_update().clone());
    let live = Live::default();
    let neighbours = Neighbours::default();
    let mut mesh = Mesh {
        number,
        world,
        view: Rc::clone(&view),
        live: live.clone(),
        revocations,
        neighbours: neighbours.clone(),
    };
    let shared = Shared {
        view,
        demander,
        live,
        book,
        store,
        tunnel: Rc::new(tunnel),
        settings,
        neighbours,
        names: Rc::default(),
    };
    let accepting = Accepting {
        descriptors: Descriptors::default(),
        warned: Rc::default(),
        unserved,
        dns: dns::Server::new(names, questions),
    };
    let mut pods: HashMap<PodId, Pod> = HashMap::new();
    let lines = spawn_local(logging::hold_lines());
    debug!(worker = number, "worker started");
    loop {
        tokio::select! {
            order = inbox.recv() => match order {
                Some(Order::Up { id, pod, listeners, dialer }) => {
                    pods.insert(id, shared.up(id, (pod, dialer), listeners, &accepting));
                }
                Some(Order::Down(id)) => {
                    if let Some(pod) = pods.remove(&id) {
                        shared.neighbours.leave(&pod.context);
                        pod.drain.force(Reason::PodRemoved);
                        pod.questions.force(Reason::PodRemoved);
                    }
                }
                Some(Order::Drain(deadline)) => {
                    // What policy stops to admit ends also now.
                    tokio::select! {
                        () = drain(pods, deadline) => {}
                        () = mesh.follow_on() => {}
                    }
                    break;
                }
                None => break,
            },
            more = mesh.follow() => if !more {
                break;
            },
        }
    }
    debug!(worker = number, "worker ended");
    lines.abort();
}

/// Ends all pods: gracefully until the deadline, then at once. A question has an answer for as long as
/// anybody is there: until the next process has the pod's questions, nobody else has one. Where that
/// cannot have the ports before they are free, they are free at once.
async fn drain(pods: HashMap<PodId, Pod>, deadline: Duration) {
    for pod in pods.values().filter(|pod| !pod.shared) {
        pod.questions.force(Reason::Drained);
    }
    drain_connections(&pods, deadline).await;
    for pod in pods.values() {
        pod.questions.force(Reason::Drained);
    }
}

async fn drain_connections(pods: &HashMap<PodId, Pod>, deadline: Duration) {
    for pod in pods.values() {
        pod.drain.graceful();
    }
    let all = async {
        for pod in pods.values() {
            pod.drain.finished().await;
        }
    };
    if tokio::time::timeout(deadline, all).await.is_ok() {
        return;
    }
    for pod in pods.values() {
        pod.drain.force(Reason::Drained);
    }
    let all = async {
        for pod in pods.values() {
            pod.drain.finished().await;
        }
    };
    if tokio::time::timeout(FORCED_END, all).await.is_err() {
        warn!("connections are still open after they were told to end");
    }
}

/// What all listeners of a worker share. Clones share it.
#[derive(Clone)]
struct Accepting {
    descriptors: Descriptors,
    warned: Rc<Seldom>,
    unserved: mpsc::Sender<Unserved>,
    dns: Rc<dns::Server>,
}

/// Accepts on the pod's listeners until the pod drains, and answers its questions, which have a context
/// of their own, until that is forced to end.
fn serve(
    id: PodId,
    (context, asked): (&Rc<Context>, Rc<Context>),
    listeners: WorkerListeners,
    by: &Accepting,
) {
    let WorkerListeners {
        outbound,
        hbone,
        plaintext,
        socks5,
        dns: questions,
        dns_connections,
        arrival,
        shared: _,
    } = listeners;
    let on = |listener, arrival| (id, (listener, arrival), by.clone());
    // What rules of others bring to 15001 they mean for us to carry.
    let asking = match arrival {
        Arrival::Steered => questions.first().map(QuestionSocket::asking),
        Arrival::Dialled | Arrival::Redirected => None,
    };
    let connections = dns::Pod::new(Rc::clone(context), Rc::clone(&by.dns));
    for listener in dns_connections {
        let names = Rc::clone(&connections);
        spawn_local(accept(
            on(listener, arrival),
            Rc::clone(context),
            async move |conn, cx| {
                spawn_local(ask(Rc::clone(&names), Box::new(conn), cx));
            },
        ));
    }
    spawn_local(accept(
        on(outbound, arrival),
        Rc::clone(context),
        async move |conn, cx| {
            let conn = Box::new(conn);
            let captured = asking.as_ref().is_some_and(Asking::is_captured);
            if captured && conn.original.port() == dns::PORT {
                spawn_local(ask(Rc::clone(&connections), conn, cx));
            } else {
                spawn_local(async move { outbound::serve(conn, &cx).await });
            }
        },
    ));
    let names = dns::Pod::new(asked, Rc::clone(&by.dns));
    for socket in questions {
        spawn_local(answer((id, socket, by.clone()), Rc::clone(&names)));
    }
    spawn_local(accept(
        on(hbone, Arrival::Dialled),
        Rc::clone(context),
        async |conn, cx| {
            let place = cx.handshakes.enter().await;
            spawn_local(inbound::serve(conn, place, cx));
        },
    ));
    spawn_local(accept(
        on(plaintext, arrival),
        Rc::clone(context),
        async |conn, cx| {
            let conn = Box::new(conn);
            spawn_local(async move { passthrough::serve(conn, &cx).await });
        },
    ));
    if let Some(socks5) = socks5 {
        spawn_local(accept(
            on(socks5, Arrival::Dialled),
            Rc::clone(context),
            async |conn, cx| {
                spawn_local(async move { socks5::serve(conn, &cx).await });
            },
        ));
    }
}

/// Answers questions in a connection to a resolver. What the mesh carries it carries, whatever is said
/// in it.
async fn ask(names: Rc<dns::Pod>, conn: Box<Captured>, cx: Rc<Context>) {
    if let Some(conn) = dns::serve_connection(&names, conn).await {
        outbound::serve(conn, &cx).await;
    }
}

/// Answers the pod's questions until that is forced to end.
async fn answer((id, socket, by): (PodId, QuestionSocket, Accepting), pod: Rc<dns::Pod>) {
    match Questions::new(socket) {
        Ok(questions) => dns::serve(pod, questions).await,
        Err(error) => by.cannot_serve(id, error, pod.context()).await,
    }
}

async fn accept(
    (id, (listener, arrival), by): (PodId, (std::net::TcpListener, Arrival), Accepting),
    context: Rc<Context>,
    serve: impl AsyncFn(Captured, Rc<Context>),
) {
    let listener = match Listener::new(listener, arrival) {
        Ok(listener) => listener,
        Err(error) => {
            by.cannot_serve(id, error, &context).await;
            return;
        }
    };
    // What it accepts has its options: one call here for one call a connection.
    context.tune(&listener);
    let mut drain = context.drain.clone();
    loop {
        let accepted = tokio::select! {
            accepted = by.accept(&listener) => accepted,
            () = drain.graceful() => break,
        };
        match accepted {
            Ok(conn) => serve(conn, Rc::clone(&context)).await,
            Err(error) => {
                // Out of descriptors or memory: the connection stays in the backlog, so that it
                // waits instead of failing; trying at once would only spin.
                if let Some(untold) = by.warned.tell() {
                    warn!(pod = %context.pod, %error, untold, "cannot accept; trying again");
                }
                tokio::select! {
                    () = tokio::time::sleep(ACCEPT_BACKOFF) => {}
                    () = drain.graceful() => break,
                }
            }
        }
    }
    // What the kernel has accepted already would be reset with the listener.
    while let Some(conn) = listener.waiting() {
        serve(conn, Rc::clone(&context)).await;
    }
}

impl Accepting {
    /// Whoever arrives there would wait for ever: others must know.
    async fn cannot_serve(&self, id: PodId, error: io::Error, context: &Context) {
        if self.unserved.send(Unserved { id, error }).await.is_err() {
            error!(pod = %context.pod, "cannot serve a listener of the pod");
        }
    }

    /// The next connection, for which there is a second descriptor. Cancel safe.
    async fn accept(&self, listener: &Listener) -> io::Result<Captured> {
        self.descriptors.keep_spare()?;
        listener.accept().await
    }
}

/// Orders that may wait for a worker.
const ORDERS: usize = 256;

/// How long forced connections have to write their line.
const FORCED_END: Duration = Duration::from_secs(2);

/// How long a worker without descriptors waits before it accepts again.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests;
