//! Lines on their way to standard output. Takes whole lines from any thread, gives them to one that
//! does nothing but write; never waits for it: lines that do not fit are dropped and counted.
//!
//! A worker holds its lines for some milliseconds, so that a busy one hands over many at once: what
//! all threads share is touched, and the writing thread woken, once for all of them.

use std::cell::RefCell;
use std::io::{self, Write};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;
use tracing_subscriber::fmt::MakeWriter;

/// Where every line of the process goes. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Lines {
    chunks: Sender<Chunk>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Bytes that were handed over and are not written.
    waiting: AtomicUsize,
    dropped: AtomicU64,
}

#[derive(Debug)]
enum Chunk {
    Lines(Vec<u8>),
    /// Everything before it is written when this is answered.
    End(Sender<()>),
}

/// What a worker's thread holds. Dropped, with its thread at the latest, it hands over.
struct Held {
    to: Option<Lines>,
    bytes: Vec<u8>,
    lines: u64,
    written: Rc<Notify>,
}

thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

impl Lines {
    /// Starts the writing thread.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        let (chunks, taken) = mpsc::channel();
        let counts = Arc::<Counts>::default();
        thread::Builder::new().name("log".to_owned()).spawn({
            let counts = Arc::clone(&counts);
            move || write(out, &taken, &counts)
        })?;
        Ok(Self { chunks, counts })
    }

    /// Lines that were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.counts.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything that was handed over before is written, a second at most.
    pub(super) fn flush(&self) {
        let (tell, told) = mpsc::channel();
        let asked = self.chunks.send(Chunk::End(tell));
        if asked.is_err() || told.recv_timeout(PATIENCE).is_err() {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn hand_over(&self, bytes: Vec<u8>, lines: u64) {
        let length = bytes.len();
        let waiting = self.counts.waiting.fetch_add(length, Ordering::Relaxed);
        if waiting + length > WAITING_BYTES || self.chunks.send(Chunk::Lines(bytes)).is_err() {
            self.counts.waiting.fetch_sub(length, Ordering::Relaxed);
            self.counts.dropped.fetch_add(lines, Ordering::Relaxed);
        }
    }
}

/// Holds the lines of this thread for a moment, while it is driven.
pub async fn hold_lines() {
    let written = Rc::<Notify>::default();
    HELD.set(Some(Held {
        to: None,
        bytes: Vec::new(),
        lines: 0,
        written: Rc::clone(&written),
    }));
    let _end = Release;
    loop {
        written.notified().await;
        sleep(HELD_FOR).await;
        HELD.with_borrow_mut(|held| held.iter_mut().for_each(Held::hand_over));
    }
}

/// Lines go straight to the writing thread again.
struct Release;

impl Drop for Release {
    fn drop(&mut self) {
        drop(HELD.take());
    }
}

impl Held {
    fn add(&mut self, to: &Lines, line: &[u8]) {
        self.to.get_or_insert_with(|| to.clone());
        if self.bytes.is_empty() {
            self.written.notify_one();
        }
        self.bytes.extend_from_slice(line);
        self.lines += 1;
        if self.bytes.len() >= CHUNK_BYTES {
            self.hand_over();
        }
    }

    fn hand_over(&mut self) {
        if let Some(to) = &self.to
            && !self.bytes.is_empty()
        {
            to.hand_over(
                std::mem::take(&mut self.bytes),
                std::mem::take(&mut self.lines),
            );
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.hand_over();
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// Takes one line with one call.
#[derive(Debug)]
pub(super) struct Line<'a>(&'a Lines);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let held = HELD.try_with(|held| {
            let mut held = held.borrow_mut();
            let held = held.as_mut()?;
            held.add(self.0, line);
            Some(())
        });
        if held != Ok(Some(())) {
            self.0.hand_over(line.to_vec(), 1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write(mut out: impl Write, taken: &Receiver<Chunk>, counts: &Counts) {
    while let Ok(chunk) = taken.recv() {
        match chunk {
            Chunk::Lines(bytes) => {
                let written = out.write_all(&bytes).and_then(|()| out.flush());
                counts.waiting.fetch_sub(bytes.len(), Ordering::Relaxed);
                if written.is_err() {
                    // Where should that be said?
                    let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
                    let lines = u64::try_from(lines).unwrap_or(u64::MAX);
                    counts.dropped.fetch_add(lines, Ordering::Relaxed);
                }
            }
            Chunk::End(tell) => drop(tell.send(())),
        }
    }
}

/// What may wait for standard output: some 15,000 access lines.
const WAITING_BYTES: usize = 8 << 20;

/// How long a line may be held: an operator does not notice, and a busy worker writes many.
const HELD_FOR: Duration = Duration::from_millis(5);

/// So many are handed over at once.
const CHUNK_BYTES: usize = 32 << 10;

/// For what is still to be written at the end of the process.
const PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use tokio::task::{LocalSet, spawn_local, yield_now};

    use super::*;

    /// Takes what is written, a piece for each permission.
    struct Slow(Receiver<()>, Sender<Vec<u8>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(io::Error::other)?;
            self.1.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Lines, mpsc::SyncSender<()>, Receiver<Vec<u8>>) {
        let (permit, permits) = sync_channel(1 << 20);
        let (tell, told) = mpsc::channel();
        let lines = Lines::start(Slow(permits, tell)).unwrap();
        (lines, permit, told)
    }

    #[test]
    fn what_standard_output_does_not_take_is_dropped_and_counted_and_nobody_waits() {
        let (lines, permit, told) = slow();
        let line = [b'x'; 1023];
        let line = [&line[..], b"\n"].concat();
        let written = (WAITING_BYTES / line.len()) + 100;
        for _ in 0..written {
            lines.make_writer().write_all(&line).unwrap();
        }
        let dropped = usize::try_from(lines.dropped()).unwrap();
        assert!((99..=101).contains(&dropped), "{dropped}");
        for _ in 0..written {
            permit.send(()).unwrap();
        }
        lines.flush();
        assert_eq!(
            told.try_iter().count(),
            written - dropped,
            "each line or its count"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_hands_lines_over_together_and_loses_none_at_its_end() {
        let (lines, permit, told) = slow();
        (0..10).for_each(|_| permit.send(()).unwrap());
        let local = LocalSet::new();
        let test = local.run_until(async {
            let holding = spawn_local(hold_lines());
            yield_now().await;
            let write = |line: &'static str| {
                let lines = lines.clone();
                spawn_local(async move { lines.make_writer().write_all(line.as_bytes()).unwrap() })
            };
            let (first, second) = (write("one\n"), write("two\n"));
            first.await.unwrap();
            second.await.unwrap();
            sleep(2 * HELD_FOR).await;
            let piece = told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(String::from_utf8(piece).unwrap(), "one\ntwo\n");
            lines.make_writer().write_all(b"three\n").unwrap();
            holding.abort();
            assert!(holding.await.is_err());
            let piece = told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(String::from_utf8(piece).unwrap(), "three\n");
        });
        test.await;
    }
}
