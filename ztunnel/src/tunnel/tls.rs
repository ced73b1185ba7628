//! TLS under a tunnel. Takes a transport and the keys of a handshake, gives a stream of plaintext
//! that reads many records at once and writes many with one call; never waits to fill a record.
//!
//! HTTP/2 flushes after each frame. Here that only marks the frames: they leave, many in a record
//! and many records in one call, when [`Flush`] is polled, which whoever drives the connection does
//! at the end of its turn.

mod frame; // PROTOCOL.md#tls-records
mod handshake;
mod keys;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use rustls::crypto::cipher::OutboundChunks;
use rustls::{AlertDescription, ContentType};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::frame::{Alert, Message, Violation};
pub(super) use self::handshake::{Greeted, accept, connect};
use self::keys::Keys;
use super::buffer::{Buffer, SLICES, Size};

/// One end of a session after its handshake.
pub(super) struct Session<T> {
    io: T,
    keys: Keys,
    input: Input,
    output: Output,
    /// Reads that brought something.
    reads: Rc<Cell<u64>>,
    /// What ended it; every later call says the same.
    failed: Option<Failed>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Session<T> {
    /// A session that begins with what came together with the end of the handshake.
    fn new(io: T, keys: Keys, sealed: &[u8]) -> io::Result<Self> {
        Ok(Self {
            io,
            keys,
            input: Input::beginning(sealed).ok_or(io::ErrorKind::InvalidData)?,
            output: Output::default(),
            reads: Rc::default(),
            failed: None,
        })
    }

    /// The stream for HTTP/2, and the handle of whoever drives it.
    pub(super) fn split(self) -> (Tls<T>, Flush<T>) {
        let shared = Rc::new(RefCell::new(self));
        (Tls(Rc::clone(&shared)), Flush(shared))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        loop {
            if self.input.hand_out(out) || out.remaining() == 0 {
                if out.remaining() == 0 {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let brought = out.filled().len() > before;
            if self.failed.is_none() && !self.input.closed {
                match self.next_record() {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(failed) => self.fail(failed),
                }
            }
            // What came before the end is delivered before it.
            if brought {
                return Poll::Ready(Ok(()));
            }
            if let Some(failed) = &self.failed {
                return Poll::Ready(Err(failed.error()));
            }
            if self.input.closed {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.fill(cx)) {
                Ok(0) => {
                    // Without a goodbye nobody knows whether this was the end.
                    self.failed = Some(Failed::Io(io::ErrorKind::UnexpectedEof));
                }
                Ok(_) => {}
                Err(e) => self.failed = Some(Failed::Io(e.kind())),
            }
        }
    }

    /// Reads what is there, as far as one turn may.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.input.turn >= TURN_BYTES {
            // What has come must be delivered while it is in the processor's cache.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let filled = self.input.fill(Pin::new(&mut self.io), cx);
        if let Poll::Ready(Ok(bytes @ 1..)) = filled {
            self.input.turn += bytes;
            self.reads.set(self.reads.get().wrapping_add(1));
        }
        filled
    }

    /// Opens the next record and does what it says; `false` when it is not all here.
    fn next_record(&mut self) -> Result<bool, Failed> {
        let Some(len) = frame::record(self.input.sealed())? else {
            return Ok(false);
        };
        let Some(record) = self.input.take(len) else {
            return Ok(false);
        };
        let bytes = self.input.bytes_mut();
        let sealed = bytes.get_mut(record.clone()).unwrap_or_default();
        let (kind, plain) = self.keys.open(sealed)?;
        let plain = record.start + plain.start..record.start + plain.end;
        let inside = bytes.get(plain.clone()).unwrap_or_default();
        match kind {
            ContentType::ApplicationData => {
                if !self.input.messages.is_empty() {
                    return Err(Violation::Unexpected.into());
                }
                if !plain.is_empty() {
                    self.input.restless = 0;
                }
                self.input.plain = plain;
            }
            ContentType::Alert => match frame::alert(inside)? {
                Alert::Close => self.input.closed = true,
                Alert::Ignored => {}
                Alert::Fatal(description) => return Err(Failed::Alert(description)),
            },
            ContentType::Handshake => {
                let inside = inside.to_vec();
                self.input.messages.extend(inside);
                self.messages()?;
            }
            _ => return Err(Violation::Unexpected.into()),
        }
        // Empty records and messages cost the peer little and us a decryption each.
        self.input.restless += 1;
        if self.input.restless > MAX_RESTLESS {
            return Err(Violation::Restless.into());
        }
        Ok(true)
    }

    fn messages(&mut self) -> Result<(), Failed> {
        while let Some(message) = frame::message(&mut self.input.messages)? {
            let Message::KeyUpdate { requested } = message else {
                continue;
            };
            // The next byte is sealed with another key: nothing may follow in this record.
            if !self.input.messages.is_empty() {
                return Err(Violation::Unexpected.into());
            }
            self.keys.renewed()?;
            if requested {
                self.keys.owe();
            }
        }
        Ok(())
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(failed) = &self.failed {
            return Poll::Ready(Err(failed.error()));
        }
        if self.output.bytes >= OUTPUT_BYTES
            && let Poll::Ready(Err(e)) = self.output.write(Pin::new(&mut self.io), cx)
        {
            self.failed = Some(Failed::Io(e.kind()));
            return Poll::Ready(Err(e));
        }
        if self.output.bytes >= OUTPUT_BYTES {
            return Poll::Pending;
        }
        let mut taken = 0;
        for slice in slices {
            let mut rest: &[u8] = slice;
            while !rest.is_empty() {
                if self.output.bytes >= OUTPUT_BYTES {
                    return Poll::Ready(Ok(taken));
                }
                match self.output.push(rest, &mut self.keys) {
                    Ok(bytes) => {
                        taken += bytes;
                        rest = rest.get(bytes..).unwrap_or_default();
                    }
                    Err(e) => {
                        let failed = Failed::Tls(e);
                        let error = failed.error();
                        self.failed = Some(failed);
                        return Poll::Ready(Err(error));
                    }
                }
            }
        }
        Poll::Ready(Ok(taken))
    }

    /// Sends everything.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Err(e) = self.output.seal(&mut self.keys) {
            return Poll::Ready(Err(Failed::Tls(e).error()));
        }
        ready!(self.output.write(Pin::new(&mut self.io), cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.output.closed && self.failed.is_none() {
            self.output.closed = true;
            self.say(&frame::CLOSED);
        }
        ready!(self.poll_flush(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    /// Remembers why this is over, and tells the peer what it did.
    fn fail(&mut self, failed: Failed) {
        if let Failed::Violation(violation) = &failed {
            self.say(&[2, violation.alert()]);
        }
        self.failed = Some(failed);
    }

    /// Puts an alert behind everything that waits to be sent.
    fn say(&mut self, alert: &[u8; 2]) {
        let said = self.output.seal(&mut self.keys).and_then(|()| {
            let alert = OutboundChunks::Single(alert);
            self.keys.seal(ContentType::Alert, alert, &mut self.output)
        });
        if let Err(error) = said {
            tracing::trace!(%error, "no alert");
        }
    }
}

/// The plaintext of a session, as HTTP/2 reads and writes it. Its flush waits for [`Flush`].
pub(super) struct Tls<T>(Rc<RefCell<Session<T>>>);

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tls<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_read(cx, buf)
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tls<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[IoSlice::new(buf)])
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

/// Sends what a session holds back, and says whether its peer lives.
pub(super) struct Flush<T>(Rc<RefCell<Session<T>>>);

impl<T: AsyncRead + AsyncWrite + Unpin> Flush<T> {
    /// Polls `turn` and then sends what it wrote. An error is told to the next read or write.
    pub(super) fn after<R>(
        &self,
        cx: &mut Context<'_>,
        turn: impl FnOnce(&mut Context<'_>) -> R,
    ) -> R {
        let done = turn(cx);
        let mut session = self.0.borrow_mut();
        session.input.turn = 0;
        if let Poll::Ready(Err(e)) = session.poll_flush(cx)
            && session.failed.is_none()
        {
            session.failed = Some(Failed::Io(e.kind()));
            cx.waker().wake_by_ref();
        }
        done
    }

    /// Runs `future` and sends what it writes each time that it has to wait.
    pub(super) async fn run<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        std::future::poll_fn(|cx| self.after(cx, |cx| future.as_mut().poll(cx))).await
    }

    /// Counts the reads that brought something.
    pub(super) fn reads(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.0.borrow().reads)
    }
}

/// Why a session is over.
enum Failed {
    Alert(u8),
    Io(io::ErrorKind),
    Tls(rustls::Error),
    Violation(Violation),
}

impl Failed {
    fn error(&self) -> io::Error {
        let invalid = io::ErrorKind::InvalidData;
        match self {
            Self::Alert(description) => {
                let alert = AlertDescription::from(*description);
                io::Error::new(invalid, rustls::Error::AlertReceived(alert))
            }
            Self::Io(kind) => (*kind).into(),
            Self::Tls(error) => io::Error::new(invalid, error.clone()),
            Self::Violation(violation) => io::Error::new(invalid, *violation),
        }
    }
}

impl From<Violation> for Failed {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl From<rustls::Error> for Failed {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error)
    }
}

/// What has come and was not handed out. Holds a buffer only while there is something in it.
#[derive(Default)]
struct Input {
    buffer: Option<Buffer>,
    /// The part of the buffer that is opened and not handed out.
    plain: Range<usize>,
    /// The part of the buffer that is not opened yet.
    sealed: Range<usize>,
    /// The beginning of a message that is cut by the end of a record.
    messages: Vec<u8>,
    /// Records since there was something for the application.
    restless: u32,
    /// Read since the last turn of this connection.
    turn: usize,
    /// The peer has said goodbye.
    closed: bool,
}

impl Input {
    fn beginning(sealed: &[u8]) -> Option<Self> {
        let mut input = Self::default();
        if !sealed.is_empty() {
            let mut buffer = Buffer::take(Size::Wire);
            let place = buffer.space().get_mut(..sealed.len())?;
            place.copy_from_slice(sealed);
            input.buffer = Some(buffer);
            input.sealed = 0..sealed.len();
        }
        Some(input)
    }

    /// Whether anything could be given.
    fn hand_out(&mut self, out: &mut ReadBuf<'_>) -> bool {
        let bytes = self.plain.len().min(out.remaining());
        let from = self.plain.start..self.plain.start + bytes;
        out.put_slice(self.bytes().get(from).unwrap_or_default());
        self.plain.start += bytes;
        if self.plain.is_empty() && self.sealed.is_empty() {
            self.release();
        }
        bytes > 0
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map(Buffer::whole).unwrap_or_default()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.as_mut().map(Buffer::space).unwrap_or_default()
    }

    fn sealed(&self) -> &[u8] {
        self.bytes().get(self.sealed.clone()).unwrap_or_default()
    }

    /// The first `len` sealed bytes, if they are all here.
    fn take(&mut self, len: usize) -> Option<Range<usize>> {
        if self.sealed.len() < len {
            return None;
        }
        let start = self.sealed.start;
        self.sealed.start += len;
        Some(start..start + len)
    }

    fn release(&mut self) {
        self.buffer = None;
        self.plain = 0..0;
        self.sealed = 0..0;
    }

    fn fill<T: AsyncRead>(
        &mut self,
        io: Pin<&mut T>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut buffer = self
            .buffer
            .take()
            .unwrap_or_else(|| Buffer::take(Size::Wire));
        let space = buffer.space();
        // What is left of the last read is less than a record.
        space.copy_within(self.sealed.clone(), 0);
        let end = self.sealed.len();
        let mut read = ReadBuf::new(space.get_mut(end..).unwrap_or_default());
        let result = io.poll_read(cx, &mut read);
        let bytes = read.filled().len();
        (self.plain, self.sealed) = (0..0, 0..end + bytes);
        if !self.sealed.is_empty() {
            self.buffer = Some(buffer);
        }
        ready!(result)?;
        Poll::Ready(Ok(bytes))
    }
}

/// What is to be sent. Holds memory only while there is something in it.
#[derive(Default)]
struct Output {
    /// Plaintext of a record that is not full.
    open: Vec<u8>,
    records: VecDeque<Vec<u8>>,
    /// How much of the first record was written.
    written: usize,
    /// In `records`, and not written.
    bytes: usize,
    /// We have said goodbye.
    closed: bool,
}

impl Extend<Vec<u8>> for Output {
    fn extend<I: IntoIterator<Item = Vec<u8>>>(&mut self, records: I) {
        for record in records {
            self.bytes += record.len();
            self.records.push_back(record);
        }
    }
}

impl Output {
    /// Takes some of `plain`, at most what fills a record.
    fn push(&mut self, plain: &[u8], keys: &mut Keys) -> Result<usize, rustls::Error> {
        let room = frame::MAX_PLAIN_BYTES - self.open.len();
        let Some(part) = plain.get(..room) else {
            if self.open.is_empty() {
                self.open.reserve_exact(frame::MAX_PLAIN_BYTES);
            }
            self.open.extend_from_slice(plain);
            return Ok(plain.len());
        };
        let open = std::mem::take(&mut self.open);
        let parts = [open.as_slice(), part];
        let payload = if open.is_empty() {
            OutboundChunks::Single(part)
        } else {
            OutboundChunks::new(&parts)
        };
        keys.seal(ContentType::ApplicationData, payload, self)?;
        Ok(room)
    }

    /// Closes the open record.
    fn seal(&mut self, keys: &mut Keys) -> Result<(), rustls::Error> {
        if self.open.is_empty() {
            return Ok(());
        }
        let open = std::mem::take(&mut self.open);
        let payload = OutboundChunks::Single(&open);
        keys.seal(ContentType::ApplicationData, payload, self)
    }

    fn write<T: AsyncWrite>(
        &mut self,
        mut io: Pin<&mut T>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.records.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            for (slice, record) in slices.iter_mut().zip(&self.records) {
                let skip = if count == 0 { self.written } else { 0 };
                *slice = IoSlice::new(record.get(skip..).unwrap_or_default());
                count += 1;
            }
            let slices = slices.get(..count).unwrap_or_default();
            let bytes = ready!(io.as_mut().poll_write_vectored(cx, slices))?;
            if bytes == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(bytes);
        }
        self.records = VecDeque::new();
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.written += bytes;
        while let Some(record) = self.records.front()
            && record.len() <= self.written
        {
            self.written -= record.len();
            self.records.pop_front();
        }
    }
}

/// Sealed bytes that wait for one write: eight full records.
const OUTPUT_BYTES: usize = 128 << 10;
/// What is read before those for whom it is have their turn.
const TURN_BYTES: usize = 256 << 10;
/// Records without application data in a row: a peer sends two tickets, and a new key at times.
const MAX_RESTLESS: u32 = 32;

#[cfg(test)]
mod tests;
