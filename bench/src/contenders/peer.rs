//! Another node proxy that speaks the in-pod protocol. A node agent of our own, of some hundred lines, tells it of its
//! pods over ZDS with their namespaces, and sets in each pod the iptables rules that such a proxy expects; the mesh it
//! reads from its local file. Takes the binary; gives the processes once they are ready.

use std::{
    fs,
    io::{ErrorKind, IoSlice, Read as _},
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd as _, RawFd},
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use socket2::{Domain, SockAddr, Socket, Type};
use ztunnel_tests::{
    http,
    process::{Running, output},
    topology::{NodeNet, Pod, Topology},
    wait,
};

use super::{OUTSIDE, Setting, ours};

/// The processes, and the agents that they are connected to.
#[derive(Debug)]
pub(crate) struct Peers {
    running: Vec<Running>,
    // Closed after the processes have ended: one that loses its agent complains.
    _agents: Vec<Receiver<Result<Socket>>>,
    _connections: Vec<Socket>,
}

impl Peers {
    pub(super) fn pids(&self) -> Vec<u32> {
        self.running.iter().map(Running::pid).collect()
    }
}

pub(super) fn start(topology: &Topology, setting: &Setting) -> Result<Peers> {
    let binary = setting.peer.as_ref().context("--peer names its binary")?;
    let directory = topology.directory()?;
    let mut peers = Peers {
        running: Vec::new(),
        _agents: Vec::new(),
        _connections: Vec::new(),
    };
    for node in topology.nodes() {
        let pods: Vec<Pod> = topology
            .pods()
            .iter()
            .filter(|pod| pod.node == node.name && pod.name != OUTSIDE)
            .cloned()
            .collect();
        for pod in &pods {
            redirect(pod)?;
        }
        let socket = directory.join(format!("zds-{}", node.name));
        let agent = Agent::listen(&socket, pods)?;
        let file = directory.join(format!("peer-{}.yaml", node.name));
        fs::write(&file, local_file(topology, node))?;
        let mut command = Command::new(binary);
        command
            .args(["proxy", "ztunnel"])
            .current_dir("/")
            .env_clear();
        command.envs([
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            ("XDS_ADDRESS", ""),
            ("ISTIO_META_DNS_CAPTURE", "false"),
            ("NODE_NAME", &node.name),
            ("RUST_LOG", setting.log_filter()),
        ]);
        command
            .env("LOCAL_XDS_PATH", &file)
            .env("INPOD_UDS", &socket)
            .env("ZTUNNEL_WORKER_THREADS", setting.workers.to_string());
        command.envs(
            setting
                .peer_environment
                .iter()
                .map(|(name, value)| (name, value)),
        );
        let log = directory.join(format!("peer-{}.log", node.name));
        let name = format!("peer {}", node.name);
        let running = Running::start_unheard(&name, Some(&node.netns), command, &log)?;
        peers.running.push(running);
        peers._agents.push(agent);
    }
    for agent in &peers._agents {
        let told = agent
            .recv_timeout(PATIENCE)
            .context("the peer did not take its pods in time")?;
        peers._connections.push(told?);
    }
    for (node, running) in topology.nodes().iter().zip(&mut peers.running) {
        wait_ready(node, running)?;
    }
    Ok(peers)
}

fn wait_ready(node: &NodeNet, running: &mut Running) -> Result<()> {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, READINESS));
    let ready = wait::until("the peer to be ready", PATIENCE, || {
        if let Ok(Some(status)) = running.ended() {
            return Some(Err(anyhow!("the peer ended with {status}")));
        }
        let answer = http::get(&node.netns, at, "/healthz/ready").ok()?;
        (answer.status == 200).then_some(Ok(()))
    });
    ready?
}

/// The mesh without the key that only our own node process knows.
fn local_file(topology: &Topology, node: &NodeNet) -> String {
    let mut text = ours::mesh(topology).for_node(&node.name);
    if let Some(end) = text.find("pods:\n") {
        text.truncate(end);
    }
    text
}

/// What a node agent of an ambient mesh sets in a pod: all that leaves goes to 15001, all that comes in plaintext to
/// 15006, except the proxy's own, which carries a mark.
fn redirect(pod: &Pod) -> Result<()> {
    let netns = Some(&pod.netns);
    if output(netns, "iptables-save", &[], "")?.contains("ISTIO_PRERT") {
        // The processes are started anew, the pod is the same.
        return Ok(());
    }
    for args in [
        "route add local 0.0.0.0/0 dev lo table 100",
        "rule add fwmark 0x111/0xfff pref 32764 lookup 100",
    ] {
        output(netns, "ip", &args.split(' ').collect::<Vec<_>>(), "")?;
    }
    output(netns, "iptables-restore", &["--noflush"], REDIRECTION)?;
    Ok(())
}

struct Agent;

impl Agent {
    /// Listens; a thread serves the first that connects and hands over the connection once all pods are taken.
    fn listen(path: &Path, pods: Vec<Pod>) -> Result<Receiver<Result<Socket>>> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
        let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        listener
            .bind(&SockAddr::unix(path)?)
            .with_context(|| format!("bind {}", path.display()))?;
        listener.listen(1)?;
        let (sender, receiver) = mpsc::channel();
        let path = PathBuf::from(path);
        thread::spawn(move || {
            let told = Self::serve(&listener, &pods)
                .with_context(|| format!("tell of pods on {}", path.display()));
            // Whoever waited may have given up.
            drop(sender.send(told));
        });
        Ok(receiver)
    }

    fn serve(listener: &Socket, pods: &[Pod]) -> Result<Socket> {
        let (mut connection, _) = listener.accept()?;
        connection.set_read_timeout(Some(PATIENCE))?;
        let mut packet = [0; PACKET_BYTES];
        let length = connection.read(&mut packet)?;
        ensure!(length > 0, "it closed instead of greeting");
        for pod in pods {
            let netns = pod.netns.open()?;
            Self::tell(&mut connection, &add(pod), Some(netns.as_raw_fd()))
                .with_context(|| format!("add {}", pod.name))?;
        }
        Self::tell(&mut connection, &field(3, &[]), None).context("end the snapshot")?;
        Ok(connection)
    }

    fn tell(connection: &mut Socket, message: &[u8], descriptor: Option<RawFd>) -> Result<()> {
        let descriptors: Vec<RawFd> = descriptor.into_iter().collect();
        let mut control = Vec::new();
        if !descriptors.is_empty() {
            control.push(ControlMessage::ScmRights(&descriptors));
        }
        sendmsg::<()>(
            connection.as_raw_fd(),
            &[IoSlice::new(message)],
            &control,
            MsgFlags::empty(),
            None,
        )?;
        let mut answer = [0; PACKET_BYTES];
        let length = connection.read(&mut answer)?;
        let answer = answer.get(..length).unwrap_or_default();
        // An acknowledgement without an error is field 1 of length 0.
        ensure!(
            answer == [0x0a, 0x00],
            "refused: {}",
            String::from_utf8_lossy(answer)
        );
        Ok(())
    }
}

/// `WorkloadRequest { add: AddWorkload { uid, workload_info } }`.
fn add(pod: &Pod) -> Vec<u8> {
    let info = [
        field(1, pod.name.as_bytes()),
        field(2, pod.namespace.as_bytes()),
        field(3, pod.service_account.as_bytes()),
    ]
    .concat();
    let uid = format!("demo//Pod/{}/{}", pod.namespace, pod.name);
    field(1, &[field(1, uid.as_bytes()), field(2, &info)].concat())
}

/// A length-delimited field of protobuf; every one of ours is shorter than 16 KB and has a number below 16.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut encoded = vec![number << 3 | 2];
    if bytes.len() < 0x80 {
        encoded.push(low);
    } else {
        encoded.extend([low | 0x80, high << 1 | low >> 7]);
    }
    encoded.extend(bytes);
    encoded
}

const PACKET_BYTES: usize = 1024;
const READINESS: u16 = 15021;
const PATIENCE: Duration = Duration::from_secs(20);

/// For IPv4, which is what the benchmark speaks.
const REDIRECTION: &str = "\
*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -s 169.254.7.127/32 -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d 127.0.0.1/32 -p tcp -m tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT -d 169.254.7.127/32 -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_says_its_number_its_length_and_its_bytes() {
        assert_eq!(field(1, b"ab"), [0x0a, 2, b'a', b'b']);
        assert_eq!(field(3, &[]), [0x1a, 0]);
        let long = field(2, &[7; 300]);
        assert_eq!(long.get(..3), Some(&[0x12, 0xac, 0x02][..]));
        assert_eq!(long.len(), 303);
    }
}
