//! Memory for bytes on their way. Takes nothing, gives buffers that return to their worker when
//! the bytes have left, and the queue of one direction; an idle connection holds none of it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf as _, Bytes, BytesMut};

/// How much is read at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Size {
    /// For everything that does not fill it.
    #[default]
    Small,
    /// For transfers that fill the small one again and again.
    Large,
    /// For the records of a tunnel, many at once.
    Wire,
}

impl Size {
    const fn bytes(self) -> usize {
        match self {
            Self::Small => SMALL_BYTES,
            Self::Large => LARGE_BYTES,
            Self::Wire => WIRE_BYTES,
        }
    }

    /// How many a worker keeps that nobody uses: at most 0.5, 2 and 0.6 MiB of them.
    const fn kept(self) -> usize {
        match self {
            Self::Small => 32,
            Self::Large | Self::Wire => 8,
        }
    }
}

/// A buffer of this worker. Dropping it, on whatever thread, gives it to that thread.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    filled: usize,
    size: Size,
}

impl Buffer {
    pub(super) fn take(size: Size) -> Self {
        let free = FREE.try_with(|free| free.borrow_mut().list(size).pop());
        let bytes = free
            .ok()
            .flatten()
            .unwrap_or_else(|| vec![0; size.bytes()].into_boxed_slice());
        Self {
            bytes,
            filled: 0,
            size,
        }
    }

    /// All of it, whatever was put there.
    pub(super) fn whole(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The first `len` bytes. A few are copied, so that they do not keep a whole buffer busy.
    pub(super) fn filled(mut self, len: usize) -> Bytes {
        self.filled = len.min(self.bytes.len());
        if self.filled <= COPY_BYTES {
            return Bytes::copy_from_slice(self.as_ref());
        }
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get(..self.filled).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let kept = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            let list = free.list(self.size);
            if list.len() < self.size.kept() {
                list.push(bytes);
            }
        });
        if kept.is_err() {
            tracing::trace!("the thread ends: its buffers are freed");
        }
    }
}

/// Bytes of one direction, taken from one side and not yet given to the other.
#[derive(Debug, Default)]
pub struct Queue {
    chunks: VecDeque<Bytes>,
    /// Small chunks that came behind the others, put together.
    tail: BytesMut,
    /// What the next read should take.
    pub(super) size: Size,
    full_reads: u8,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.tail.is_empty()
    }

    /// Adds a chunk at the end. Small ones behind another are put together: a thousand frames of a
    /// few bytes must cost neither a thousand pieces of memory nor a thousand writes.
    pub(super) fn push(&mut self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        if self.is_empty() || chunk.len() > COPY_BYTES {
            if !self.tail.is_empty() {
                self.chunks.push_back(self.tail.split().freeze());
            }
            self.chunks.push_back(chunk);
        } else {
            self.tail.extend_from_slice(&chunk);
        }
    }

    /// Adapts the next read to what the last one found.
    pub(super) fn learn(&mut self, read: usize) {
        if read >= self.size.bytes() {
            self.full_reads = self.full_reads.saturating_add(1);
            if self.full_reads >= FULL_READS {
                self.size = Size::Large;
            }
        } else {
            self.full_reads = 0;
            if read < SMALL_BYTES {
                self.size = Size::Small;
            }
        }
    }

    /// The front as slices for one write, up to the number that fits.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES]) -> usize {
        let chunks = self.chunks.iter().map(Bytes::as_ref);
        let tail = std::iter::once(self.tail.as_ref()).filter(|tail| !tail.is_empty());
        let mut count = 0;
        for (slice, bytes) in slices.iter_mut().zip(chunks.chain(tail)) {
            *slice = IoSlice::new(bytes);
            count += 1;
        }
        count
    }

    /// Removes `bytes` from the front.
    pub(super) fn advance(&mut self, mut bytes: usize) {
        while let Some(front) = self.chunks.front_mut() {
            if bytes < front.len() {
                front.advance(bytes);
                return;
            }
            bytes -= front.len();
            self.chunks.pop_front();
        }
        self.tail.advance(bytes.min(self.tail.len()));
        if self.tail.is_empty() {
            self.clear();
        }
    }

    /// The first chunk, to be given away whole or in part.
    pub(super) fn front(&mut self) -> Option<&mut Bytes> {
        if self.chunks.is_empty() && !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
        while self.chunks.front().is_some_and(Bytes::is_empty) {
            self.chunks.pop_front();
        }
        self.chunks.front_mut()
    }

    /// Forgets all of it, and the memory.
    pub(super) fn clear(&mut self) {
        self.chunks = VecDeque::new();
        self.tail = BytesMut::new();
    }
}

/// Buffers of one worker that nobody uses.
#[derive(Default)]
struct Free {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
    wire: Vec<Box<[u8]>>,
}

impl Free {
    const fn list(&mut self, size: Size) -> &mut Vec<Box<[u8]>> {
        match size {
            Size::Small => &mut self.small,
            Size::Large => &mut self.large,
            Size::Wire => &mut self.wire,
        }
    }
}

thread_local! {
    static FREE: RefCell<Free> = RefCell::default();
}

/// Slices in one write.
pub(super) const SLICES: usize = 16;
/// One DATA frame of this size and its header fill one TLS record of 16 KiB.
const SMALL_BYTES: usize = 16_320;
/// Sixteen records, less the frame's header and some room.
const LARGE_BYTES: usize = 262_080;
/// Four records with their headers and tags, and the beginning of a fifth.
const WIRE_BYTES: usize = 80 << 10;
/// Chunks up to this are copied rather than carried.
const COPY_BYTES: usize = 1024;
/// Reads that fill their buffer before the next one is larger.
const FULL_READS: u8 = 4;
