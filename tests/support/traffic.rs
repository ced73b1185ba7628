//! Varied constant traffic through a mesh, for as long as somebody wants: the judge of an upgrade, a
//! policy change, a fault, or of time alone. Takes how long and what to disturb; gives a report whose
//! every byte and status was checked, with errors by kind and the memory of both node processes; it
//! counts an error as expected only where the disturbance says beforehand whom it disturbs and when.
//!
//! ```text
//! paths   ── from which pod, to which address      kinds ── what one connection does
//! chaos   ── what is done to the nodes meanwhile   report ── what came of it
//! ```

mod chaos;
mod kinds;
mod paths;
mod report;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;

pub use self::{
    chaos::Chaos,
    report::{Count, Report, Verdict},
};
use self::{
    chaos::Windows,
    kinds::{KINDS, Kind},
    paths::{Path, Site, World},
    report::{Book, Curve, Outcome},
};
use crate::{mesh::Mesh, wait, ztunnel::Settings};

/// How long, and against what.
#[derive(Clone, Debug)]
pub struct Options {
    pub duration: Duration,
    pub chaos: Vec<Chaos>,
    /// Between two disturbances.
    pub every: Duration,
    /// Of the random choices.
    pub seed: u64,
}

/// Builds a mesh, lets traffic run in it, and tears it down. `settings` says which binary; `tell` hears
/// what happens as it happens, a line at a time.
pub fn run(
    options: &Options,
    settings: impl FnOnce(&crate::topology::Topology) -> Result<Settings>,
    tell: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut world = World::build(settings)?;
    let book = Arc::new(Book::default());
    let windows = Arc::new(Windows::default());
    let until = Instant::now() + options.duration;
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = Workers {
        stop: Arc::clone(&stop),
        threads: Vec::new(),
    };
    let mut seed = options.seed;
    let paths = world.paths()?;
    for path in &paths {
        for kind in KINDS.iter().filter(|kind| path.carries(kind)) {
            seed = seed.wrapping_add(1);
            let job = Job {
                kind,
                path: path.clone(),
                site: world.site(path.server)?,
                book: Arc::clone(&book),
                windows: Arc::clone(&windows),
                stop: Arc::clone(&stop),
                until,
                seed,
            };
            workers.threads.push(thread::spawn(move || job.work()));
        }
    }
    tell(&format!(
        "{} workers: {} kinds of traffic on {} paths, for {:?}",
        workers.threads.len(),
        KINDS.len(),
        paths.len(),
        options.duration
    ));
    let mut curve = Curve::begin(options.duration, &world.mesh)?;
    let mut next = Instant::now() + options.every;
    let mut turns = options.chaos.iter().cycle();
    while Instant::now() < until {
        thread::sleep(TICK);
        if let Some(line) = curve.look(&world.mesh, &book)? {
            tell(&line);
        }
        // Not so late that the traffic could not show that it recovered.
        if Instant::now() >= next && Instant::now() + options.every / 2 < until {
            if let Some(chaos) = turns.next() {
                tell(&chaos.apply(&mut world, &windows)?);
                curve.processes(&world.mesh)?;
            }
            next = Instant::now() + options.every;
        }
    }
    workers.finish()?;
    let open = settled(&world.mesh);
    curve.end(&world.mesh)?;
    Ok(Report::of(&book, &curve, open))
}

/// Threads that end when they are told to, or when this is dropped.
struct Workers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Workers {
    fn finish(mut self) -> Result<()> {
        for worker in self.threads.drain(..) {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One kind on one path, again and again.
struct Job {
    kind: &'static Kind,
    path: Path,
    site: Arc<Site>,
    book: Arc<Book>,
    windows: Arc<Windows>,
    stop: Arc<AtomicBool>,
    until: Instant,
    seed: u64,
}

impl Job {
    fn work(self) -> Result<()> {
        let mut random = fastrand::Rng::with_seed(self.seed);
        let mut failures = 0_u32;
        while !self.stop.load(Ordering::Relaxed) && Instant::now() < self.until {
            let began = Instant::now();
            let left = self.until.saturating_duration_since(began);
            let end = (self.kind.run)(&self.path, &self.site, &mut random, left);
            let ended = Instant::now();
            let failed = end.is_err();
            let expected = failed && self.windows.cover(&self.path, began, ended);
            self.book.enter(Outcome {
                kind: self.kind.name,
                path: self.path.name,
                took: ended - began,
                end,
                expected,
            });
            failures = if failed { failures + 1 } else { 0 };
            // Whoever is refused tries again soon, but does not flood.
            let rest = self.kind.rest + Duration::from_millis(random.u64(..20));
            thread::sleep(rest.max(AFTER_FAILURE * failures.min(10)));
        }
        Ok(())
    }
}

/// Connections that the nodes still count as open once all traffic has ended.
fn settled(mesh: &Mesh) -> u64 {
    let mut last = 0.0;
    let none = wait::until("all connections to be closed", SETTLE, || {
        last = [&mesh.a, &mesh.b]
            .iter()
            .filter_map(|node| node.metrics().ok())
            .map(|metrics| metrics.sum("ztunnel_connections_open", &[]))
            .sum();
        (last < 0.5).then_some(())
    });
    if none.is_ok() {
        return 0;
    }
    // A small whole number, kept as a float by the metrics.
    format!("{last:.0}").parse().unwrap_or(u64::MAX)
}

/// Between two looks at the nodes.
const TICK: Duration = Duration::from_millis(250);
const AFTER_FAILURE: Duration = Duration::from_millis(50);
const SETTLE: Duration = Duration::from_secs(60);
