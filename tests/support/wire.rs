//! What a cable carried: a packet socket on one device, read by a thread. Takes a namespace and a
//! device; gives frames, TCP segments and streams, and searches in them. Bounded; and when it missed
//! a frame it refuses to answer, because "not seen" would prove nothing.

use std::{
    collections::BTreeMap,
    fmt,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv, setsockopt, sockopt},
};

use crate::{netns::Netns, sys};

/// A running capture on one device.
#[derive(Debug)]
pub struct Sniffer {
    capture: Arc<Mutex<Capture>>,
    /// One byte asks the thread to read all that the socket holds; one comes back when it has.
    /// Closing it ends the thread.
    control: UnixStream,
    reader: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Captures from now on. Every frame that crosses the device once this has returned is seen.
    pub fn on(netns: &Netns, device: &str) -> Result<Self> {
        let socket = netns.within(|| Ok(sys::packet_socket(device_index(device)?)?))?;
        // Without it, a burst of full frames overruns the default of some 200 KiB.
        setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES)
            .context("enlarge the capture's buffer")?;
        let capture = Arc::new(Mutex::new(Capture::default()));
        let (control, theirs) = UnixStream::pair()?;
        let reader = thread::spawn({
            let capture = Arc::clone(&capture);
            move || read_frames(&socket, theirs, &capture)
        });
        Ok(Self {
            capture,
            control,
            reader: Some(reader),
        })
    }

    /// Everything captured up to now.
    pub fn seen(&self) -> Result<Capture> {
        let mut control = &self.control;
        control.write_all(&[0]).context("the capture has ended")?;
        control
            .read_exact(&mut [0])
            .context("the capture has ended")?;
        Ok(self
            .capture
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone())
    }

    /// Forgets what was captured up to now.
    pub fn clear(&self) -> Result<()> {
        self.seen()?;
        *self.capture.lock().unwrap_or_else(PoisonError::into_inner) = Capture::default();
        Ok(())
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        // Already closed is as good.
        drop(self.control.shutdown(std::net::Shutdown::Both));
        if let Some(reader) = self.reader.take() {
            drop(reader.join());
        }
    }
}

/// Frames, in the order in which they crossed the device.
#[derive(Clone, Default)]
pub struct Capture {
    frames: Vec<Arc<[u8]>>,
    kept_bytes: usize,
    /// Frames that are not among `frames`: past the limit, cut, or dropped by the kernel.
    missed: u64,
    failure: Option<String>,
}

/// One TCP segment as it was on the wire.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub sequence: u32,
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
    pub payload: &'a [u8],
}

/// TLS records that began a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlsRecords {
    pub handshake: usize,
    pub application_data: usize,
}

impl Capture {
    /// Frames that crossed the device and are held here.
    #[must_use]
    pub fn frames(&self) -> &[Arc<[u8]>] {
        &self.frames
    }

    /// Fails unless every frame is held.
    pub fn complete(&self) -> Result<&Self> {
        if let Some(failure) = &self.failure {
            return Err(anyhow!("the capture ended early: {failure}"));
        }
        ensure!(
            self.missed == 0,
            "the capture missed {} frames",
            self.missed
        );
        Ok(self)
    }

    /// In how many places `needle` was seen: frames that contain it, or, if it never fits into
    /// one, TCP streams that do.
    pub fn count(&self, needle: &[u8]) -> Result<usize> {
        self.complete()?;
        ensure!(!needle.is_empty(), "an empty needle is everywhere");
        let frames = self
            .frames
            .iter()
            .filter(|frame| contains(frame, needle))
            .count();
        if frames > 0 {
            return Ok(frames);
        }
        Ok(self
            .streams()
            .values()
            .filter(|bytes| contains(bytes, needle))
            .count())
    }

    pub fn contains(&self, needle: &[u8]) -> Result<bool> {
        Ok(self.count(needle)? > 0)
    }

    /// Every TCP segment.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        self.frames.iter().filter_map(|frame| parse_tcp(frame))
    }

    /// TCP segments from or to this port.
    pub fn segments_on(&self, port: u16) -> impl Iterator<Item = Segment<'_>> {
        self.segments()
            .filter(move |s| s.src.port() == port || s.dst.port() == port)
    }

    /// What each direction of each TCP connection carried, put in order by sequence number.
    /// Holes are closed up: good for a search, not for a verdict about bytes.
    #[must_use]
    pub fn streams(&self) -> BTreeMap<(SocketAddr, SocketAddr), Vec<u8>> {
        let mut parts: BTreeMap<_, Vec<(u32, &[u8])>> = BTreeMap::new();
        for s in self.segments().filter(|s| !s.payload.is_empty()) {
            parts
                .entry((s.src, s.dst))
                .or_default()
                .push((s.sequence, s.payload));
        }
        let join = |parts: Vec<(u32, &[u8])>| {
            let first = parts.first().map_or(0, |(sequence, _)| *sequence);
            let mut parts: Vec<_> = parts
                .into_iter()
                .map(|(s, bytes)| (s.wrapping_sub(first), bytes))
                .collect();
            parts.sort_by_key(|(offset, bytes)| (*offset, std::cmp::Reverse(bytes.len())));
            parts.dedup_by_key(|(offset, _)| *offset);
            parts
                .into_iter()
                .flat_map(|(_, bytes)| bytes.iter().copied())
                .collect()
        };
        parts
            .into_iter()
            .map(|(key, parts)| (key, join(parts)))
            .collect()
    }

    /// TLS records at the beginning of segments from or to this port.
    #[must_use]
    pub fn tls_records(&self, port: u16) -> TlsRecords {
        let mut records = TlsRecords::default();
        for segment in self.segments_on(port) {
            match segment.payload {
                [0x16, 0x03, ..] => records.handshake += 1,
                [0x17, 0x03, ..] => records.application_data += 1,
                _ => {}
            }
        }
        records
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("frames", &self.frames.len())
            .field("kept_bytes", &self.kept_bytes)
            .field("missed", &self.missed)
            .field("failure", &self.failure)
            .finish()
    }
}

impl fmt::Debug for Segment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = [
            (self.syn, 'S'),
            (self.ack, '.'),
            (self.fin, 'F'),
            (self.rst, 'R'),
        ];
        let flags: String = flags
            .iter()
            .filter_map(|(set, c)| set.then_some(c))
            .collect();
        write!(
            f,
            "{} > {} [{flags}] {} bytes",
            self.src,
            self.dst,
            self.payload.len()
        )
    }
}

fn read_frames(socket: &OwnedFd, mut control: UnixStream, capture: &Mutex<Capture>) {
    let mut buffer = vec![0; FRAME_BYTES];
    loop {
        let mut watched = [
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
        ];
        let polled = match poll(&mut watched, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            polled => polled,
        };
        let asked = watched.last().and_then(PollFd::any).unwrap_or(true);
        let mut held = capture.lock().unwrap_or_else(PoisonError::into_inner);
        let drained = polled
            .map_err(std::io::Error::from)
            .and_then(|_| held.drain(socket, &mut buffer));
        if let Err(error) = &drained {
            held.failure = Some(error.to_string());
        }
        drop(held);
        if asked && (control.read_exact(&mut [0]).is_err() || control.write_all(&[0]).is_err()) {
            return;
        }
        if drained.is_err() && !asked {
            // Answer whoever asks from now on: the failure is in the capture.
            while control.read_exact(&mut [0]).is_ok() && control.write_all(&[0]).is_ok() {}
            return;
        }
    }
}

impl Capture {
    fn drain(&mut self, socket: &OwnedFd, buffer: &mut [u8]) -> std::io::Result<()> {
        loop {
            match recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_TRUNC) {
                Ok(length) => match buffer.get(..length) {
                    Some(frame) if self.kept_bytes + length <= KEPT_BYTES => {
                        self.kept_bytes += length;
                        self.frames.push(Arc::from(frame));
                    }
                    _ => self.missed += 1,
                },
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(other) => return Err(other.into()),
            }
        }
        self.missed += sys::packet_drops(socket)?;
        Ok(())
    }
}

fn device_index(device: &str) -> Result<u32> {
    let interfaces = nix::net::if_::if_nameindex().context("list the devices")?;
    let found = interfaces
        .iter()
        .find(|i| i.name().to_str().is_ok_and(|name| name == device));
    Ok(found
        .with_context(|| format!("no device {device}"))?
        .index())
}

fn parse_tcp(frame: &[u8]) -> Option<Segment<'_>> {
    let (src, dst, tcp) = match be16(frame, 12)? {
        0x0800 => {
            let packet = frame.get(14..)?;
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let total = usize::from(be16(packet, 2)?);
            if *packet.get(9)? != TCP {
                return None;
            }
            let src = Ipv4Addr::from(*packet.get(12..)?.first_chunk::<4>()?);
            let dst = Ipv4Addr::from(*packet.get(16..)?.first_chunk::<4>()?);
            // Short frames are padded, so the header's length counts, where there is one.
            let end = if total == 0 {
                packet.len()
            } else {
                total.min(packet.len())
            };
            (IpAddr::V4(src), IpAddr::V4(dst), packet.get(header..end)?)
        }
        0x86dd => {
            let packet = frame.get(14..)?;
            let payload = usize::from(be16(packet, 4)?);
            if *packet.get(6)? != TCP {
                return None;
            }
            let src = Ipv6Addr::from(*packet.get(8..)?.first_chunk::<16>()?);
            let dst = Ipv6Addr::from(*packet.get(24..)?.first_chunk::<16>()?);
            let end = if payload == 0 {
                packet.len()
            } else {
                (40 + payload).min(packet.len())
            };
            (IpAddr::V6(src), IpAddr::V6(dst), packet.get(40..end)?)
        }
        _ => return None,
    };
    let flags = *tcp.get(13)?;
    Some(Segment {
        src: SocketAddr::new(src, be16(tcp, 0)?),
        dst: SocketAddr::new(dst, be16(tcp, 2)?),
        sequence: u32::from_be_bytes(*tcp.get(4..)?.first_chunk::<4>()?),
        fin: flags & 0x01 != 0,
        syn: flags & 0x02 != 0,
        rst: flags & 0x04 != 0,
        ack: flags & 0x10 != 0,
        payload: tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?,
    })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk::<2>()?))
}

fn contains(hay: &[u8], needle: &[u8]) -> bool {
    hay.windows(needle.len()).any(|window| window == needle)
}

const TCP: u8 = 6;
/// Segmentation offload hands over frames of up to 64 KiB, and headers.
const FRAME_BYTES: usize = 128 * 1024;
/// What one capture keeps in memory at most.
const KEPT_BYTES: usize = 256 * 1024 * 1024;
const SOCKET_BUFFER_BYTES: usize = 64 * 1024 * 1024;
