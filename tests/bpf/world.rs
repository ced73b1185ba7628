//! A pod and its peer: two network namespaces joined by a veth link, a pin directory, and what tests
//! do in them. Takes nothing from the machine but the `ip` command; leaves nothing.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{self, Command},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use ztunnel::capture::{
    Capture, CountSource, Netns, NetnsCookie, Params, PodCapture, PodSettings, WorkerListeners,
    release_all,
};

pub(crate) const POD4: &str = "10.99.0.2";
pub(crate) const POD6: &str = "fd99::2";
pub(crate) const PEER4: &str = "10.99.0.1";
pub(crate) const PEER6: &str = "fd99::1";
/// Where the peer's server listens, and where the pod's application does.
pub(crate) const PORT: u16 = 8080;
/// Longer than anything that does happen takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long we watch for something that must not happen: past a first retransmission.
pub(crate) const WATCH: Duration = Duration::from_millis(1300);

pub(crate) struct World {
    name: String,
    pub(crate) pin_dir: PathBuf,
}

impl World {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "ztbpf{}x{}",
            process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let world = Self {
            pin_dir: PathBuf::from("/sys/fs/bpf").join(&name),
            name,
        };
        let (pod, peer) = (world.pod(), world.peer());
        ip(&format!("netns add {pod}"));
        ip(&format!("netns add {peer}"));
        ip(&format!(
            "link add eth0 netns {pod} type veth peer name eth0 netns {peer}"
        ));
        // Addresses of the test's own only: those that the kernel makes come and change at leisure.
        for namespace in [&pod, &peer] {
            ip(&format!("-n {namespace} link set eth0 addrgenmode none"));
        }
        for (namespace, four, six) in [(&pod, POD4, POD6), (&peer, PEER4, PEER6)] {
            ip(&format!("-n {namespace} addr add {four}/24 dev eth0"));
            ip(&format!("-n {namespace} addr add {six}/64 dev eth0 nodad"));
            ip(&format!("-n {namespace} link set eth0 up"));
        }
        ip(&format!("-n {peer} link set lo up"));
        // The kernel takes notice of a carrier in its own time, and then changes routes.
        for namespace in [&pod, &peer] {
            let up = (0..2000).any(|_| {
                let up = ip(&format!("-n {namespace} link show dev eth0")).contains("state UP");
                if !up {
                    thread::park_timeout(Duration::from_millis(5));
                }
                up
            });
            assert!(up, "no carrier in {namespace}");
        }
        world
    }

    pub(crate) fn pod(&self) -> String {
        format!("{}-pod", self.name)
    }

    pub(crate) fn peer(&self) -> String {
        format!("{}-peer", self.name)
    }

    pub(crate) fn pod_path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(self.pod())
    }

    pub(crate) fn netns(&self) -> Arc<Netns> {
        Arc::new(Netns::open(&self.pod_path()).unwrap())
    }

    pub(crate) fn params(&self, workers: usize) -> Params {
        Params {
            pin_dir: self.pin_dir.clone(),
            workers,
            socks5: false,
            mark: None,
            dns: true,
        }
    }

    pub(crate) fn start(&self) -> Capture {
        Capture::start(&self.params(1)).unwrap()
    }

    /// Starts capture and enrols the pod, with one worker.
    pub(crate) fn enrolled(&self, settings: &PodSettings) -> Enrolled {
        Enrolled::new(self.start(), self, settings)
    }

    /// Runs `inside` on its own thread in the pod.
    pub(crate) fn in_pod<T: Send + 'static>(
        &self,
        inside: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        spawn_in(&self.pod(), inside).join().unwrap()
    }

    /// Runs `inside` on its own thread in the peer.
    pub(crate) fn in_peer<T: Send + 'static>(
        &self,
        inside: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        spawn_in(&self.peer(), inside).join().unwrap()
    }

    /// Connects from the pod without waiting for the outcome.
    pub(crate) fn pod_connects(
        &self,
        to: SocketAddr,
    ) -> thread::JoinHandle<std::io::Result<TcpStream>> {
        spawn_in(&self.pod(), move || {
            TcpStream::connect_timeout(&to, PATIENCE)
        })
    }

    /// A server in the peer that says "peer" and counts.
    pub(crate) fn peer_server(&self) -> Server {
        Server::start(
            self.in_peer(|| TcpListener::bind(("::", PORT)).unwrap()),
            "peer",
        )
    }

    /// The pod's application, which says who it sees.
    pub(crate) fn pod_server(&self) -> Server {
        Server::start(
            self.in_pod(|| TcpListener::bind(("::", PORT)).unwrap()),
            "app",
        )
    }

    /// What the pod's namespace shows of rules, routes and sysctl.
    pub(crate) fn configuration(&self) -> String {
        let pod = self.pod();
        let mut shown = [
            format!("-n {pod} rule"),
            format!("-n {pod} -6 rule"),
            format!("-n {pod} route show table all"),
            format!("-n {pod} -6 route show table all"),
            format!("-n {pod} addr show dev eth0"),
        ]
        .map(|arguments| ip(&arguments))
        .concat();
        shown.push_str(
            &self.in_pod(|| {
                std::fs::read_to_string("/proc/sys/net/ipv4/tcp_fwmark_accept").unwrap()
            }),
        );
        shown
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let released = release_all(&self.pin_dir);
        for namespace in [self.pod(), self.peer()] {
            let removed = Command::new("ip")
                .args(["netns", "del", &namespace])
                .output();
            drop(removed);
        }
        assert!(thread::panicking() || released.is_ok(), "{released:?}");
    }
}

/// A pod that one worker serves.
pub(crate) struct Enrolled {
    pub(crate) capture: Capture,
    pub(crate) pod: PodCapture,
    pub(crate) listeners: WorkerListeners,
}

impl Enrolled {
    pub(crate) fn new(capture: Capture, world: &World, settings: &PodSettings) -> Self {
        let (pod, mut listeners) = capture.enrol(&world.netns(), settings).unwrap();
        assert_eq!(listeners.len(), 1);
        Self {
            capture,
            pod,
            listeners: listeners.remove(0),
        }
    }

    /// How often `connect` gave a verdict.
    pub(crate) fn connects(&self, verdict: &str) -> u64 {
        total(&self.capture, CountSource::Node, verdict)
    }

    /// How often the pod's `sk_lookup` gave a verdict.
    pub(crate) fn lookups(&self, verdict: &str) -> u64 {
        total(&self.capture, CountSource::Pod(self.pod.cookie()), verdict)
    }
}

pub(crate) fn total(capture: &Capture, source: CountSource, verdict: &str) -> u64 {
    capture
        .counters()
        .unwrap()
        .into_iter()
        .find(|count| count.source == source && count.verdict == verdict)
        .unwrap()
        .total
}

/// Settings with the pod's addresses.
pub(crate) fn settings() -> PodSettings {
    PodSettings {
        addresses: vec![address(POD4), address(POD6)],
        ..PodSettings::default()
    }
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn at(text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address(text), port)
}

/// A server that answers each connection with its name and the peer's address, and counts.
pub(crate) struct Server {
    served: Arc<AtomicUsize>,
}

impl Server {
    fn start(listener: TcpListener, name: &'static str) -> Self {
        let served = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&served);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                counter.fetch_add(1, Ordering::SeqCst);
                let seen = stream.peer_addr().map(|peer| peer.ip().to_canonical());
                if let Ok(seen) = seen {
                    drop(write!(stream, "{name} {seen}"));
                }
            }
        });
        Self { served }
    }

    pub(crate) fn served(&self) -> usize {
        self.served.load(Ordering::SeqCst)
    }
}

/// Everything that the other side says.
pub(crate) fn said(mut stream: TcpStream) -> String {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The next connection that a listener of ours gets.
pub(crate) fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(false).unwrap();
    SockRef::from(listener)
        .set_read_timeout(Some(PATIENCE))
        .unwrap();
    listener.accept().unwrap().0
}

/// Whether nothing waits on a listener.
pub(crate) fn idle(listener: &TcpListener) -> bool {
    listener.set_nonblocking(true).unwrap();
    matches!(listener.accept(), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

/// Sees every packet that arrives on a namespace's `eth0`, or leaves it.
pub(crate) struct Sniffer(Socket);

impl Sniffer {
    pub(crate) fn on_peer(world: &World) -> Self {
        let every_protocol = Protocol::from(i32::from(3u16.to_be())); // ETH_P_ALL
        let socket = world
            .in_peer(move || Socket::new(Domain::PACKET, Type::RAW, Some(every_protocol)).unwrap());
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    /// TCP packets to or from this port, of those seen since the last call: addresses, ports and
    /// flags as bytes, for who must find out what leaked.
    pub(crate) fn tcp(&mut self, port: u16) -> Vec<String> {
        let mut packet = [0; 256];
        let mut seen = Vec::new();
        while let Ok(length) = self.0.read(&mut packet) {
            let frame = packet.get(..length).unwrap();
            let (addresses, tcp) = match (frame.get(12..14), frame.get(23), frame.get(20)) {
                (Some([0x08, 0x00]), Some(6), _) => (frame.get(26..34), frame.get(34..48)),
                (Some([0x86, 0xdd]), _, Some(6)) => (frame.get(22..54), frame.get(54..68)),
                _ => continue,
            };
            let tcp = tcp.unwrap();
            if tcp
                .chunks(2)
                .take(2)
                .any(|bytes| bytes == port.to_be_bytes())
            {
                seen.push(format!("{addresses:x?} {tcp:x?}"));
            }
        }
        seen
    }
}

/// Starts a thread in a named namespace.
pub(crate) fn spawn_in<T: Send + 'static>(
    namespace: &str,
    inside: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let path = format!("/run/netns/{namespace}");
    thread::spawn(move || {
        setns(std::fs::File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        inside()
    })
}

/// Runs `ip` with arguments separated by blanks.
pub(crate) fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {} (these tests need root)",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The only pod of a capture.
pub(crate) fn only(capture: &Capture) -> NetnsCookie {
    let mut enrolled = capture.enrolled().unwrap();
    assert_eq!(enrolled.len(), 1, "{enrolled:?}");
    enrolled.remove(0)
}
