//! Large transfers whose every byte is checked: both ends make the same pseudo-random stream from a
//! seed, and each compares a checksum. Takes a connected socket; gives bytes, sums and speed; holds
//! one buffer per direction whatever the size.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    panic::resume_unwind,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{apps, netns::Netns};

/// A transfer in both directions at once that arrived whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    pub bytes_each_way: u64,
    /// Of what we sent, and of what the server says it received: they are equal.
    pub sum_up: u64,
    /// Of what we received, and of what the server says it sent: they are equal.
    pub sum_down: u64,
    pub took: Duration,
}

impl Exchange {
    /// Both directions together.
    #[must_use]
    pub fn bytes_per_second(&self) -> u64 {
        let micros = u64::try_from(self.took.as_micros())
            .unwrap_or(u64::MAX)
            .max(1);
        self.bytes_each_way
            .saturating_mul(2)
            .saturating_mul(1_000_000)
            / micros
    }
}

/// The server's part: `Server::start(netns, port, bulk::serve)`.
///
/// It reads a length and a seed (8 bytes each, big endian), then receives that many bytes and
/// sends as many at the same time; once the client has ended its direction it sends the checksums of
/// what it received and of what it sent.
pub fn serve(mut stream: TcpStream) -> io::Result<()> {
    let (bytes, seed) = (read_u64(&mut stream)?, read_u64(&mut stream)?);
    let (sent, received) = both_ways(&mut stream, bytes, !seed)?;
    let (received, sent) = (received?, sent?);
    if stream.read(&mut [0])? != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    stream.write_all(&received.to_be_bytes())?;
    stream.write_all(&sent.to_be_bytes())?;
    stream.shutdown(Shutdown::Write)
}

/// The client's part: sends and receives `bytes` at the same time, and checks both.
pub fn exchange(netns: &Netns, to: SocketAddr, bytes: u64, seed: u64) -> Result<Exchange> {
    let mut stream = apps::dial(netns, to)?;
    let started = Instant::now();
    stream.write_all(&bytes.to_be_bytes())?;
    stream.write_all(&seed.to_be_bytes())?;
    let (sent, received) = both_ways(&mut stream, bytes, seed)?;
    let sum_up = sent.with_context(|| format!("send {bytes} bytes to {to}"))?;
    let sum_down = received.with_context(|| format!("receive {bytes} bytes from {to}"))?;
    stream.shutdown(Shutdown::Write)?;
    let theirs = read_u64(&mut stream).and_then(|up| Ok((up, read_u64(&mut stream)?)));
    let theirs = theirs.context("receive the server's checksums")?;
    let took = started.elapsed();
    ensure!(stream.read(&mut [0])? == 0, "bytes after the checksums");
    ensure!(theirs.0 == sum_up, "{to} received other bytes than we sent");
    ensure!(
        theirs.1 == sum_down,
        "we received other bytes than {to} sent"
    );
    Ok(Exchange {
        bytes_each_way: bytes,
        sum_up,
        sum_down,
        took,
    })
}

type Sum = io::Result<u64>;

/// Sends and receives at the same time; gives the checksums of both.
fn both_ways(stream: &mut TcpStream, bytes: u64, seed: u64) -> io::Result<(Sum, Sum)> {
    let incoming = stream.try_clone()?;
    Ok(thread::scope(|scope| {
        let receiving = scope.spawn(move || receive(incoming, bytes));
        let sent = send(stream, bytes, seed);
        if sent.is_err() {
            // The other half would wait for a peer that is gone.
            drop(stream.shutdown(Shutdown::Both));
        }
        let received = receiving.join();
        (sent, received.unwrap_or_else(|panic| resume_unwind(panic)))
    }))
}

/// Writes the stream of this seed; gives its checksum.
pub fn send(to: &mut impl Write, bytes: u64, seed: u64) -> io::Result<u64> {
    let (mut source, mut sum) = (Source(seed), Checksum::default());
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let block = next_block(&mut buffer, left);
        source.fill(block);
        sum.add(block);
        to.write_all(block)?;
        left -= length_of(block);
    }
    Ok(sum.0)
}

/// Reads that many bytes; gives their checksum.
pub fn receive(mut from: impl Read, bytes: u64) -> io::Result<u64> {
    let mut sum = Checksum::default();
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let block = next_block(&mut buffer, left);
        from.read_exact(block)?;
        sum.add(block);
        left -= length_of(block);
    }
    Ok(sum.0)
}

/// The part of the buffer that the next block uses: blocks begin at the same offsets on both
/// ends, which is what the checksum needs.
fn next_block(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let length = usize::try_from(left)
        .unwrap_or(usize::MAX)
        .min(buffer.len());
    buffer.split_at_mut(length).0
}

fn length_of(block: &[u8]) -> u64 {
    u64::try_from(block.len()).unwrap_or(u64::MAX)
}

fn read_u64(stream: &mut TcpStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

/// SplitMix64: every position of the stream differs, so a lost or moved block shows.
struct Source(u64);

impl Source {
    fn fill(&mut self, block: &mut [u8]) {
        let (words, rest) = block.as_chunks_mut::<8>();
        for word in words {
            *word = self.next();
        }
        if !rest.is_empty() {
            for (to, from) in rest.iter_mut().zip(self.next()) {
                *to = from;
            }
        }
    }

    #[inline]
    fn next(&mut self) -> [u8; 8] {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    }
}

/// FNV-1a over words of eight bytes: order matters, and it keeps up with the network.
struct Checksum(u64);

impl Default for Checksum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Checksum {
    fn add(&mut self, block: &[u8]) {
        let (words, rest) = block.as_chunks::<8>();
        for word in words {
            self.0 = (self.0 ^ u64::from_le_bytes(*word)).wrapping_mul(0x0100_0000_01b3);
        }
        for byte in rest {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// A multiple of eight.
const BLOCK_BYTES: usize = 64 * 1024;
