//! A control plane and its CA, which speak delta discovery and certificate requests as the real ones do, and misbehave
//! on command. Takes resources and orders; gives what the clients sent, and certificates; never corrects a client.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use prost::Message as _;
use tokio::{net::TcpListener, sync::broadcast};

use crate::{
    grpc::{self, Answer, Call, Fate},
    netns::Netns,
    proto::{
        citadel::{IstioCertificateRequest, IstioCertificateResponse},
        discovery::{Any, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
        security::Authorization,
        workload::{Address, Service, Workload, address::Type},
    },
    topology::{Pod, Topology},
};

mod authority;
pub use authority::Authority;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Which stream it came on, from 1.
    pub stream: usize,
    pub request: DeltaDiscoveryRequest,
}

/// A certificate request as it came.
#[derive(Clone, Debug)]
pub struct SeenCsr {
    pub identity: String,
    pub seconds: i64,
    pub csr: String,
    pub authorization: String,
    pub clusterid: String,
    /// How many were being answered when it came, this one included.
    pub in_flight: usize,
}

/// How the discovery service behaves.
#[derive(Clone, Debug)]
pub struct Manners {
    /// New streams are refused with this.
    pub refuse: Option<(u16, String)>,
    /// Requests above this are refused.
    pub request_limit: usize,
    /// A stream is closed in order after each response.
    pub close_after_response: bool,
    /// The first response of this type is not given.
    pub withhold: Option<&'static str>,
    /// Names that are asked for one by one get no answer.
    pub mute: bool,
    /// The bearer token that is asked for.
    pub token: Option<String>,
}

/// How the CA behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaManners {
    Sign,
    /// As `Sign`, after a while.
    Slow(Duration),
    /// Never answers.
    Hang,
    Refuse(u16, String),
    Empty,
    NoRoot,
    /// Signs for this identity instead.
    ForAnother(String),
    /// Signs what begins so much later.
    FromTheFuture(Duration),
}

/// A running control plane. Dropping it ends it as a crash does.
pub struct ControlPlane {
    at: SocketAddr,
    listen: (Netns, SocketAddr),
    directory: PathBuf,
    shared: Arc<Shared>,
    fate: broadcast::Sender<Fate>,
    thread: Option<(tokio::sync::oneshot::Sender<()>, JoinHandle<()>)>,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane")
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

struct Shared {
    state: Mutex<State>,
    bell: Condvar,
    orders: broadcast::Sender<Order>,
}

struct State {
    resources: BTreeMap<(&'static str, String), Held>,
    manners: Manners,
    ca: CaManners,
    authority: Authority,
    requests: Vec<Seen>,
    heads: Vec<http::HeaderMap>,
    csrs: Vec<SeenCsr>,
    in_flight: usize,
    nonce: u64,
    ttl: Option<Duration>,
}

#[derive(Clone)]
struct Held {
    version: String,
    bytes: Bytes,
}

#[derive(Clone, Debug)]
enum Order {
    /// Resources changed.
    Changed,
    /// Send this as it is.
    Raw(Bytes),
    /// End every stream with this status.
    End(u16, String),
}

impl ControlPlane {
    /// Serves in a node's namespace, on the node's address on the cable, for both nodes.
    pub fn start(topology: &Topology, node: &str) -> Result<Self> {
        let net = topology.node(node)?;
        let listen = (net.netns.clone(), SocketAddr::from((net.v4, PORT)));
        let directory = topology.directory()?;
        let (fate, _) = broadcast::channel(16);
        let (orders, _) = broadcast::channel(1024);
        let authority = Authority::new("cluster.local")?;
        let server_root = Authority::new("control plane")?;
        fs::write(directory.join(ROOT), server_root.pem())?;
        fs::write(directory.join(TOKEN), "first-token\n")?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                resources: BTreeMap::new(),
                manners: Manners {
                    refuse: None,
                    request_limit: 4 << 20,
                    close_after_response: false,
                    withhold: None,
                    mute: false,
                    token: None,
                },
                ca: CaManners::Sign,
                authority,
                requests: Vec::new(),
                heads: Vec::new(),
                csrs: Vec::new(),
                in_flight: 0,
                nonce: 0,
                ttl: None,
            }),
            bell: Condvar::new(),
            orders,
        });
        let mut plane = Self {
            at: listen.1,
            listen,
            directory,
            shared,
            fate,
            thread: None,
        };
        plane.serve(&server_root)?;
        Ok(plane)
    }

    /// Serves again after [`Self::stop`], with a certificate of this root.
    pub fn serve(&mut self, server_root: &Authority) -> Result<()> {
        ensure!(self.thread.is_none(), "it runs");
        let (netns, at) = &self.listen;
        let listener = netns.listen(*at)?;
        listener.set_nonblocking(true)?;
        let tls = server_root.server(&at.ip().to_string())?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (shared, fate) = (Arc::clone(&self.shared), self.fate.clone());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::spawn(move || {
            let work = async move {
                let Ok(listener) = TcpListener::from_std(listener) else {
                    return;
                };
                let serve = move |call| serve(call, Arc::clone(&shared));
                grpc::accept(listener, tls.into(), fate, serve).await;
            };
            runtime.block_on(async {
                tokio::select! {
                    () = work => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        self.thread = Some((stop, thread));
        Ok(())
    }

    /// Ends it as a crash does: the port is closed and every connection cut.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            drop(thread.join());
        }
    }

    /// What a node process is told about it.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let path = |name: &str| self.directory.join(name).display().to_string();
        [
            ("XDS_ADDRESS", format!("https://{}", self.at)),
            ("CA_ADDRESS", format!("https://{}", self.at)),
            ("XDS_ROOT_CA", path(ROOT)),
            ("CA_ROOT_CA", path(ROOT)),
            ("AUTH_TOKEN", path(TOKEN)),
            ("CLUSTER_ID", "demo".to_owned()),
            ("POD_NAME", "ztunnel-test".to_owned()),
            ("POD_NAMESPACE", "istio-system".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// The file that holds the token.
    #[must_use]
    pub fn token_file(&self) -> PathBuf {
        self.directory.join(TOKEN)
    }

    /// The file that holds the root of the server's certificate.
    #[must_use]
    pub fn root_file(&self) -> PathBuf {
        self.directory.join(ROOT)
    }

    /// Changes how the discovery service behaves.
    pub fn manners(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.shared.lock().manners);
    }

    /// Changes how the CA behaves.
    pub fn ca(&self, manners: CaManners) {
        self.shared.lock().ca = manners;
    }

    /// Certificates live for so long, whatever is asked.
    pub fn certificates_live(&self, ttl: Duration) {
        self.shared.lock().ttl = Some(ttl);
    }

    /// The root of the workloads' certificates; a change of it is a rotation.
    pub fn authority(&self, change: impl FnOnce(&mut Authority)) {
        change(&mut self.shared.lock().authority);
    }

    /// Holds a workload, and tells the clients.
    pub fn workload(&self, workload: Workload) {
        let name = workload.uid.clone();
        let address = Address {
            r#type: Some(Type::Workload(workload)),
        };
        self.put(ADDRESS, &name, address.encode_to_vec());
    }

    /// Holds a service, and tells the clients.
    pub fn service(&self, service: Service) {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let address = Address {
            r#type: Some(Type::Service(service)),
        };
        self.put(ADDRESS, &name, address.encode_to_vec());
    }

    /// Holds a workload, and tells nobody yet.
    pub fn hold_workload(&self, workload: Workload) {
        let name = workload.uid.clone();
        let address = Address {
            r#type: Some(Type::Workload(workload)),
        };
        self.hold(ADDRESS, &name, address.encode_to_vec());
    }

    /// Holds a service, and tells nobody yet.
    pub fn hold_service(&self, service: Service) {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let address = Address {
            r#type: Some(Type::Service(service)),
        };
        self.hold(ADDRESS, &name, address.encode_to_vec());
    }

    /// Holds a policy, and tells the clients.
    pub fn policy(&self, policy: &Authorization) {
        self.hold_policy(policy);
        self.announce();
    }

    /// Holds a policy, and tells nobody yet.
    pub fn hold_policy(&self, policy: &Authorization) {
        let name = format!("{}/{}", policy.namespace, policy.name);
        self.hold(AUTHORIZATION, &name, policy.encode_to_vec());
    }

    /// Holds any bytes under a name, and tells the clients.
    pub fn put(&self, kind: &'static str, name: &str, bytes: Vec<u8>) {
        self.hold(kind, name, bytes);
        self.announce();
    }

    /// Holds any bytes under a name, and tells nobody yet.
    pub fn hold(&self, kind: &'static str, name: &str, bytes: Vec<u8>) {
        let version = if kind == AUTHORIZATION {
            String::new()
        } else {
            hash(&bytes)
        };
        let held = Held {
            version,
            bytes: bytes.into(),
        };
        self.shared
            .lock()
            .resources
            .insert((kind, name.to_owned()), held);
    }

    /// Tells the clients what changed.
    pub fn announce(&self) {
        drop(self.shared.orders.send(Order::Changed));
    }

    /// Forgets a resource, and tells the clients.
    pub fn remove(&self, kind: &'static str, name: &str) {
        self.shared
            .lock()
            .resources
            .remove(&(kind, name.to_owned()));
        self.announce();
    }

    /// Sends a response that nothing stands behind.
    pub fn respond(&self, response: &DeltaDiscoveryResponse) {
        let mut frame = vec![0];
        let bytes = response.encode_to_vec();
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        frame.extend(length.to_be_bytes());
        frame.extend(bytes);
        self.raw(frame);
    }

    /// Sends any bytes on every stream.
    pub fn raw(&self, bytes: Vec<u8>) {
        drop(self.shared.orders.send(Order::Raw(bytes.into())));
    }

    /// Ends every stream with this status; 0 is an end in order.
    pub fn end_streams(&self, code: u16, message: &str) {
        drop(
            self.shared
                .orders
                .send(Order::End(code, message.to_owned())),
        );
    }

    /// Closes every connection without a word.
    pub fn cut(&self) {
        drop(self.fate.send(Fate::Cut));
    }

    /// Announces the end of every connection, and cuts it after a while.
    pub fn leave(&self, after: Duration) {
        drop(self.fate.send(Fate::Leave(after)));
    }

    /// All requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.lock().requests.clone()
    }

    /// The headers of each stream so far.
    #[must_use]
    pub fn heads(&self) -> Vec<http::HeaderMap> {
        self.shared.lock().heads.clone()
    }

    /// All certificate requests so far.
    #[must_use]
    pub fn csrs(&self) -> Vec<SeenCsr> {
        self.shared.lock().csrs.clone()
    }

    /// Waits for a request, from the `skip`th on.
    pub fn wait_request(
        &self,
        what: &str,
        skip: usize,
        wanted: impl Fn(&Seen) -> bool,
    ) -> Result<Seen> {
        let found = |state: &State| {
            state
                .requests
                .iter()
                .skip(skip)
                .find(|r| wanted(r))
                .cloned()
        };
        self.wait(what, found)
            .with_context(|| format!("{:?}", self.requests()))
    }

    /// Waits until so many streams were opened since the start.
    pub fn wait_streams(&self, count: usize) -> Result<()> {
        self.wait("streams", |state| {
            (state.heads.len() >= count).then_some(())
        })
    }

    /// Waits until so many certificates were asked for since the start.
    pub fn wait_csrs(&self, count: usize) -> Result<Vec<SeenCsr>> {
        self.wait("certificate requests", |state| {
            (state.csrs.len() >= count).then(|| state.csrs.clone())
        })
    }

    fn wait<T>(&self, what: &str, find: impl Fn(&State) -> Option<T>) -> Result<T> {
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .bell
            .wait_timeout_while(state, PATIENCE, |state| find(state).is_none())
            .unwrap_or_else(PoisonError::into_inner);
        find(&state).with_context(|| format!("waited {PATIENCE:?} for {what}"))
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note<T>(&self, note: impl FnOnce(&mut State) -> T) -> T {
        let noted = note(&mut self.lock());
        self.bell.notify_all();
        noted
    }
}

async fn serve(call: Call, shared: Arc<Shared>) -> Result<()> {
    if call.head.uri.path() == CSR_METHOD {
        certificate(call, &shared).await
    } else {
        discovery(call, &shared).await
    }
}

fn header(head: &http::HeaderMap, name: &str) -> String {
    let value = head.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

async fn certificate(mut call: Call, shared: &Shared) -> Result<()> {
    let message = call.next().await?.context("no request")?;
    let request = IstioCertificateRequest::decode(message)?;
    let identity = impersonated(&request).unwrap_or_default();
    let manners = shared.note(|state| {
        state.in_flight += 1;
        state.csrs.push(SeenCsr {
            identity: identity.clone(),
            seconds: request.validity_duration,
            csr: request.csr.clone(),
            authorization: header(&call.head.headers, "authorization"),
            clusterid: header(&call.head.headers, "clusterid"),
            in_flight: state.in_flight,
        });
        state.ca.clone()
    });
    let answered = sign(&mut call, shared, &request, &identity, manners).await;
    shared.note(|state| state.in_flight -= 1);
    answered
}

async fn sign(
    call: &mut Call,
    shared: &Shared,
    request: &IstioCertificateRequest,
    identity: &str,
    manners: CaManners,
) -> Result<()> {
    let (mut subject, mut delay, mut later) = (identity.to_owned(), Duration::ZERO, Duration::ZERO);
    match &manners {
        CaManners::Refuse(code, message) => return call.refuse(*code, message),
        CaManners::Hang => std::future::pending().await,
        CaManners::Slow(after) => delay = *after,
        CaManners::ForAnother(other) => subject.clone_from(other),
        CaManners::FromTheFuture(by) => later = *by,
        CaManners::Sign | CaManners::Empty | CaManners::NoRoot => {}
    }
    // A signature takes a CA a while, too: what overlaps is seen to.
    tokio::time::sleep(delay.max(Duration::from_millis(20))).await;
    let mut chain = {
        let state = shared.lock();
        let seconds = u64::try_from(request.validity_duration).unwrap_or(0);
        let ttl = state.ttl.unwrap_or_else(|| Duration::from_secs(seconds));
        state.authority.sign(&request.csr, &subject, ttl, later)?
    };
    match manners {
        CaManners::Empty => chain.clear(),
        CaManners::NoRoot => chain.truncate(1),
        _ => {}
    }
    let mut answer = call.begin()?;
    answer
        .send(&IstioCertificateResponse { cert_chain: chain })
        .await?;
    answer.end(0, "")
}

fn impersonated(request: &IstioCertificateRequest) -> Option<String> {
    use prost_types::value::Kind;
    let value = request
        .metadata
        .as_ref()?
        .fields
        .get("ImpersonatedIdentity")?;
    match value.kind.as_ref()? {
        Kind::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

/// One stream as the server keeps it.
#[derive(Default)]
struct Subscriber {
    number: usize,
    /// Types that were asked for, and whether as a whole.
    types: BTreeMap<&'static str, bool>,
    /// What the client has, by type and name.
    sent: BTreeMap<(&'static str, String), Held>,
    /// Names that were asked for one by one.
    names: BTreeSet<String>,
    /// The node that the client runs on: its workloads come unasked.
    node: String,
}

async fn discovery(mut call: Call, shared: &Shared) -> Result<()> {
    let mut orders = shared.orders.subscribe();
    let head = call.head.headers.clone();
    let authorization = header(&head, "authorization");
    let (number, refusal) = shared.note(|state| {
        state.heads.push(head);
        let manners = &state.manners;
        let expected = manners
            .token
            .as_ref()
            .map(|token| format!("Bearer {token}"));
        let refusal = match expected {
            Some(expected) if expected != authorization => {
                Some((16, "authentication failure".to_owned()))
            }
            _ => manners.refuse.clone(),
        };
        (state.heads.len(), refusal)
    });
    if let Some((code, message)) = refusal {
        return call.refuse(code, &message);
    }
    let mut answer = call.begin()?;
    let mut subscriber = Subscriber {
        number,
        ..Subscriber::default()
    };
    loop {
        tokio::select! {
            message = call.next() => {
                let Some(message) = message? else {
                    return answer.end(0, "");
                };
                let (bytes, limit) = (message.len(), shared.lock().manners.request_limit);
                if bytes > limit {
                    let text = format!("grpc: received message larger than max ({bytes} vs. {limit})");
                    return answer.end(8, &text);
                }
                let request = DeltaDiscoveryRequest::decode(message)?;
                subscriber.take(&mut answer, shared, request).await?;
            }
            order = orders.recv() => match order? {
                Order::Changed => subscriber.push(&mut answer, shared).await?,
                Order::Raw(bytes) => answer.raw(bytes).await?,
                Order::End(code, message) => return answer.end(code, &message),
            },
        }
        if shared.lock().manners.close_after_response && !subscriber.sent.is_empty() {
            return answer.end(0, "");
        }
    }
}

impl Subscriber {
    async fn take(
        &mut self,
        answer: &mut Answer,
        shared: &Shared,
        request: DeltaDiscoveryRequest,
    ) -> Result<()> {
        shared.note(|state| {
            state.requests.push(Seen {
                stream: self.number,
                request: request.clone(),
            });
        });
        let Some(kind) = [ADDRESS, AUTHORIZATION]
            .into_iter()
            .find(|kind| *kind == request.type_url)
        else {
            return Ok(());
        };
        if !request.response_nonce.is_empty() {
            return Ok(());
        }
        if self.types.contains_key(kind) {
            return self.look_up(answer, shared, &request).await;
        }
        let whole = request.resource_names_subscribe.is_empty();
        self.types.insert(kind, whole);
        self.node = node_name(&request).unwrap_or_default();
        let unversioned = request.initial_resource_versions.iter();
        let open: Vec<String> = unversioned
            .filter(|(_, version)| version.is_empty() && kind == ADDRESS)
            .map(|(name, _)| name.clone())
            .collect();
        for (name, version) in request.initial_resource_versions {
            if open.contains(&name) {
                continue;
            }
            let held = Held {
                version,
                bytes: Bytes::new(),
            };
            self.sent.insert((kind, name), held);
        }
        if shared.lock().manners.withhold == Some(kind) {
            return Ok(());
        }
        self.update(answer, shared, kind, true).await?;
        if open.is_empty() {
            return Ok(());
        }
        let open = DeltaDiscoveryRequest {
            resource_names_subscribe: open,
            ..DeltaDiscoveryRequest::default()
        };
        self.look_up(answer, shared, &open).await
    }

    async fn push(&mut self, answer: &mut Answer, shared: &Shared) -> Result<()> {
        // The order of a real push.
        for kind in [ADDRESS, AUTHORIZATION] {
            if self.types.contains_key(kind) {
                self.update(answer, shared, kind, false).await?;
            }
        }
        Ok(())
    }

    /// Sends what is different from what the client has; at the start also if nothing is.
    async fn update(
        &mut self,
        answer: &mut Answer,
        shared: &Shared,
        kind: &'static str,
        start: bool,
    ) -> Result<()> {
        let whole = self.types.get(kind).copied().unwrap_or(true);
        let now: BTreeMap<(&'static str, String), Held> = shared
            .lock()
            .resources
            .iter()
            .filter(|((of, _), _)| *of == kind)
            .filter(|(key, held)| {
                whole || self.sent.contains_key(*key) || runs_on(held, &self.node)
            })
            .map(|(key, held)| (key.clone(), held.clone()))
            .collect();
        let changed: Vec<Resource> = now
            .iter()
            .filter(|(key, held)| {
                self.sent.get(*key).is_none_or(|sent| {
                    if start || held.version.is_empty() {
                        sent.version != held.version
                            || sent.bytes != held.bytes && held.version.is_empty()
                    } else {
                        sent.version != held.version
                    }
                })
            })
            .map(|((_, name), held)| resource(kind, name, held))
            .collect();
        let removed: Vec<String> = self
            .sent
            .keys()
            .filter(|key| key.0 == kind && !now.contains_key(*key))
            .map(|(_, name)| name.clone())
            .collect();
        self.sent.retain(|(of, _), _| *of != kind);
        self.sent.extend(now);
        if start || !changed.is_empty() || !removed.is_empty() {
            answer
                .send(&response(shared, kind, changed, removed))
                .await?;
        }
        Ok(())
    }

    /// Names one by one, as istiod answers them: a name that was asked for already gets no answer at all.
    async fn look_up(
        &mut self,
        answer: &mut Answer,
        shared: &Shared,
        request: &DeltaDiscoveryRequest,
    ) -> Result<()> {
        if shared.lock().manners.mute {
            return Ok(());
        }
        for name in &request.resource_names_subscribe {
            if !self.names.insert(name.clone()) {
                continue;
            }
            let found: BTreeMap<(&'static str, String), Held> = shared
                .lock()
                .resources
                .iter()
                .filter(|((of, key), held)| {
                    *of == ADDRESS && (key == name || aliases(held).contains(name))
                })
                .map(|(key, held)| (key.clone(), held.clone()))
                .collect();
            let removed = if found.is_empty() {
                vec![name.clone()]
            } else {
                Vec::new()
            };
            let resources = found
                .iter()
                .map(|((kind, key), held)| resource(kind, key, held))
                .collect();
            self.sent.extend(found);
            answer
                .send(&response(shared, ADDRESS, resources, removed))
                .await?;
        }
        Ok(())
    }
}

fn node_name(request: &DeltaDiscoveryRequest) -> Option<String> {
    use prost_types::value::Kind;
    let metadata = request.node.as_ref()?.metadata.as_ref()?;
    match metadata.fields.get("NODE_NAME")?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

fn runs_on(held: &Held, node: &str) -> bool {
    let address = Address::decode(held.bytes.clone()).ok();
    match address.and_then(|address| address.r#type) {
        Some(Type::Workload(workload)) => workload.node == node,
        Some(Type::Service(_)) | None => false,
    }
}

fn response(
    shared: &Shared,
    kind: &str,
    resources: Vec<Resource>,
    removed: Vec<String>,
) -> DeltaDiscoveryResponse {
    let nonce = shared.note(|state| {
        state.nonce += 1;
        state.nonce
    });
    DeltaDiscoveryResponse {
        system_version_info: format!("push/{nonce}"),
        type_url: kind.to_owned(),
        nonce: format!("nonce-{nonce}"),
        resources,
        removed_resources: removed,
    }
}

fn resource(kind: &str, name: &str, held: &Held) -> Resource {
    Resource {
        version: held.version.clone(),
        resource: Some(Any {
            type_url: kind.to_owned(),
            value: held.bytes.clone(),
        }),
        name: name.to_owned(),
        aliases: aliases(held),
    }
}

/// `network/ip` for every address.
fn aliases(held: &Held) -> Vec<String> {
    let ip = |bytes: &[u8]| match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).map(|b| std::net::IpAddr::from(b).to_string()),
        _ => <[u8; 16]>::try_from(bytes).map(|b| std::net::IpAddr::from(b).to_string()),
    };
    match Address::decode(held.bytes.clone())
        .ok()
        .and_then(|a| a.r#type)
    {
        Some(Type::Workload(workload)) => {
            let ips = workload.addresses.iter().filter_map(|bytes| ip(bytes).ok());
            ips.map(|ip| format!("{}/{ip}", workload.network)).collect()
        }
        Some(Type::Service(service)) => service
            .addresses
            .iter()
            .filter_map(|at| {
                ip(&at.address)
                    .ok()
                    .map(|ip| format!("{}/{ip}", at.network))
            })
            .collect(),
        None => Vec::new(),
    }
}

/// Equal for equal content, as the real one's versions are.
fn hash(bytes: &[u8]) -> String {
    use std::hash::{Hash as _, Hasher as _};
    let mut hasher = std::hash::DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{:x}", hasher.finish())
}

/// A pod of the mesh as a control plane describes it.
#[must_use]
pub fn workload_of(pod: &Pod) -> Workload {
    Workload {
        uid: format!("demo//Pod/{}/{}", pod.namespace, pod.name),
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        addresses: vec![
            Bytes::copy_from_slice(&pod.v4.octets()),
            Bytes::copy_from_slice(&pod.v6.octets()),
        ],
        tunnel_protocol: 1,
        service_account: pod.service_account.clone(),
        node: pod.node.clone(),
        canonical_name: pod.name.clone(),
        canonical_revision: "v1".to_owned(),
        workload_type: 2,
        workload_name: pod.name.clone(),
        cluster_id: "demo".to_owned(),
        ..Workload::default()
    }
}

/// Where the discovery service's types stand.
pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
const CSR_METHOD: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const PORT: u16 = 15012;
const ROOT: &str = "control-plane-root.pem";
const TOKEN: &str = "control-plane-token";
const PATIENCE: Duration = Duration::from_secs(120);
