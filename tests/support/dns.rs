//! Resolvers and their clients: a server that answers every question in its own way and remembers it
//! byte for byte, and questions by every kind of socket. Takes a namespace; gives bytes and who
//! sent them; never waits without a deadline.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use domain::{
    base::{Message, MessageBuilder, Name, Rtype, iana::Rcode, message_builder::OptBuilder},
    rdata::{A, AllRecordData},
};

use crate::{netns::Netns, process::output, wait};

/// A resolver in a namespace, on UDP and TCP, until it is dropped.
#[derive(Debug)]
pub struct Resolver {
    seen: Arc<Mutex<Vec<Asked>>>,
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// A question as the resolver saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub bytes: Vec<u8>,
    pub from: IpAddr,
    pub tcp: bool,
}

/// What a resolver says to a question, message by message.
pub type Says = fn(&[u8]) -> Vec<Vec<u8>>;

impl Resolver {
    /// Serves port 53 of these addresses; [`reply`] is what it says.
    pub fn start(netns: &Netns, addresses: &[IpAddr]) -> Result<Self> {
        Self::that_says(netns, addresses, |question| {
            reply(question).into_iter().collect()
        })
    }

    /// The same in words of its own.
    pub fn that_says(netns: &Netns, addresses: &[IpAddr], says: Says) -> Result<Self> {
        let mut resolver = Self {
            seen: Arc::default(),
            ended: Arc::default(),
            threads: Vec::new(),
        };
        for address in addresses {
            let at = SocketAddr::new(*address, PORT);
            // A program that another test is starting holds what was just closed for a moment.
            let socket = wait::until("the address to be free", PATIENCE, || {
                netns.within(|| Ok(UdpSocket::bind(at)?)).ok()
            })?;
            socket.set_read_timeout(Some(PAUSE))?;
            let listener = netns.listen(at)?;
            listener.set_nonblocking(true)?;
            let (seen, ended) = (Arc::clone(&resolver.seen), Arc::clone(&resolver.ended));
            resolver.threads.push(thread::spawn(move || {
                datagrams(&socket, &seen, &ended, says)
            }));
            let (seen, ended) = (Arc::clone(&resolver.seen), Arc::clone(&resolver.ended));
            resolver.threads.push(thread::spawn(move || {
                connections(&listener, &seen, &ended, says)
            }));
        }
        Ok(resolver)
    }

    /// Every question so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Asked> {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Every question since the last call.
    #[must_use]
    pub fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

fn datagrams(socket: &UdpSocket, seen: &Mutex<Vec<Asked>>, ended: &AtomicBool, says: Says) {
    let mut buffer = vec![0; 65_536];
    while !ended.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let question = buffer.get(..length).unwrap_or_default();
        remember(seen, question, from, false);
        for reply in says(question) {
            drop(socket.send_to(&reply, from));
        }
    }
}

fn connections(listener: &TcpListener, seen: &Mutex<Vec<Asked>>, ended: &AtomicBool, says: Says) {
    while !ended.load(Ordering::Relaxed) {
        let Ok((stream, from)) = listener.accept() else {
            thread::sleep(PAUSE);
            continue;
        };
        drop(stream.set_nonblocking(false));
        drop(stream.set_read_timeout(Some(PATIENCE)));
        let mut stream = stream;
        while let Ok(question) = read_frame(&mut stream) {
            remember(seen, &question, from, true);
            let said = says(&question);
            let mut said = said.iter();
            if !said.all(|reply| write_frame(&mut stream, reply).is_ok()) {
                break;
            }
        }
    }
}

fn remember(seen: &Mutex<Vec<Asked>>, question: &[u8], from: SocketAddr, tcp: bool) {
    let asked = Asked {
        bytes: question.to_vec(),
        from: from.ip().to_canonical(),
        tcp,
    };
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    seen.push(asked);
}

/// What a [`Resolver`] says to a question: always [`OUTSIDE`], with an option that nobody else sends.
#[must_use]
pub fn reply(question: &[u8]) -> Option<Vec<u8>> {
    let message = Message::from_octets(question).ok()?;
    let mut builder = MessageBuilder::new_vec()
        .start_answer(&message, Rcode::NOERROR)
        .ok()?;
    builder.header_mut().set_ra(true);
    if let Ok(question) = message.sole_question()
        && question.qtype() == Rtype::A
    {
        builder.push((question.qname(), 77, A::new(OUTSIDE))).ok()?;
    }
    let mut builder = builder.additional();
    let mark = |opt: &mut OptBuilder<'_, Vec<u8>>| {
        opt.set_udp_payload_size(1400);
        opt.push_raw_option(65_001.into(), 2, |target| {
            target.extend_from_slice(b"zt");
            Ok(())
        })
    };
    builder.opt(mark).ok()?;
    Some(builder.finish())
}

/// A question, recursion desired; with `edns`, of a validator that takes 1232 bytes.
#[must_use]
pub fn question(id: u16, name: &str, rtype: Rtype, edns: bool) -> Vec<u8> {
    let build = || {
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(id);
        builder.header_mut().set_rd(true);
        let mut builder = builder.question();
        let name: Name<Vec<u8>> = name.parse().ok()?;
        builder.push((name, rtype)).ok()?;
        let mut builder = builder.additional();
        if edns {
            builder
                .opt(|opt| {
                    opt.set_udp_payload_size(1232);
                    opt.set_dnssec_ok(true);
                    Ok(())
                })
                .ok()?;
        }
        Some(builder.finish())
    };
    build().unwrap_or_default()
}

/// An answer in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub rcode: Rcode,
    pub authoritative: bool,
    pub truncated: bool,
    /// `owner ttl data`, sorted.
    pub records: Vec<String>,
}

impl Answer {
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let message = Message::from_octets(bytes).context("no message")?;
        let header = message.header();
        let mut records = Vec::new();
        for record in message.answer()?.limit_to::<AllRecordData<_, _>>() {
            let record = record?;
            let ttl = record.ttl().as_secs();
            records.push(format!("{} {ttl} {}", record.owner(), record.data()));
        }
        records.sort();
        Ok(Self {
            rcode: header.rcode(),
            authoritative: header.aa(),
            truncated: header.tc(),
            records,
        })
    }
}

/// How a client asks over UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// `connect`, `send`, `recv`.
    Connected,
    /// `sendto`, `recvfrom`, and answers of strangers are not taken.
    Unconnected,
    /// The same with a socket for both families, which is given an IPv4 address in its mapped form.
    UnconnectedMapped,
}

/// A client's socket of this kind, for resolvers of the family of `to`.
pub fn socket(netns: &Netns, kind: Socket, to: SocketAddr) -> Result<UdpSocket> {
    let any = match to {
        SocketAddr::V4(_) if kind != Socket::UnconnectedMapped => {
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
        }
        _ => SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, 0)),
    };
    netns.within(|| Ok(UdpSocket::bind(any)?))
}

/// Asks once and waits for the answer, whose sender must be who was asked.
pub fn ask(netns: &Netns, kind: Socket, to: SocketAddr, question: &[u8]) -> Result<Vec<u8>> {
    ask_within(netns, kind, to, question, PATIENCE)
}

/// The same with a deadline of its own.
pub fn ask_within(
    netns: &Netns,
    kind: Socket,
    to: SocketAddr,
    question: &[u8],
    patience: Duration,
) -> Result<Vec<u8>> {
    let mapped = kind == Socket::UnconnectedMapped;
    let socket = socket(netns, kind, to)?;
    let to = if mapped { crate::mesh::mapped(to) } else { to };
    socket.set_read_timeout(Some(patience))?;
    if kind == Socket::Connected {
        socket.connect(to).context("connect")?;
        ensure!(socket.peer_addr()? == to, "{:?}", socket.peer_addr());
        socket.send(question).context("send")?;
    } else {
        socket.send_to(question, to).context("send")?;
    }
    let mut buffer = vec![0; 65_536];
    let (length, from) = socket
        .recv_from(&mut buffer)
        .with_context(|| format!("no answer of {to}, {kind:?}"))?;
    ensure!(from == to, "asked {to}, answered by {from}, {kind:?}");
    buffer.truncate(length);
    Ok(buffer)
}

/// Asks all of them in one connection, one behind the other, and gives as many answers.
pub fn ask_tcp(netns: &Netns, to: SocketAddr, questions: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
    let mut stream = netns.dial(to, PATIENCE)?;
    ensure!(stream.peer_addr()? == to, "{:?}", stream.peer_addr());
    stream.set_read_timeout(Some(PATIENCE))?;
    for question in questions {
        write_frame(&mut stream, question)?;
    }
    questions.iter().map(|_| read_frame(&mut stream)).collect()
}

/// What the C library makes of a name: `getent ahosts`, with this resolver and search list.
pub fn getent(netns: &Netns, directory: &Path, resolver: IpAddr, name: &str) -> Result<String> {
    let conf = directory.join("resolv.conf");
    let text = format!(
        "nameserver {resolver}\nsearch demo.svc.cluster.local svc.cluster.local cluster.local\n\
         options ndots:5\n"
    );
    std::fs::write(&conf, text)?;
    let script = format!(
        "mount --bind {} /etc/resolv.conf && exec getent ahosts {name}",
        conf.display()
    );
    output(
        Some(netns),
        "unshare",
        &["--mount", "sh", "-c", &script],
        "",
    )
}

fn write_frame(stream: &mut TcpStream, message: &[u8]) -> Result<()> {
    let mut frame = u16::try_from(message.len())?.to_be_bytes().to_vec();
    frame.extend(message);
    Ok(stream.write_all(&frame)?)
}

fn read_frame(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).context("no length")?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).context("no message")?;
    Ok(message)
}

/// What a [`Resolver`] gives as the address of everything.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
/// Where resolvers are asked.
pub const PORT: u16 = 53;
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);
