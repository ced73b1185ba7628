//! Which lines are written, and how that is changed while the process runs. Takes directives, gives
//! tracing its answer once for each place that logs; never asks again until something changes.

use std::sync::{Arc, PoisonError, RwLock};

use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer};

use super::{Error, parse};

/// The process's filter of log lines. Clones share it.
#[derive(Clone, Debug)]
pub struct Levels(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    at_start: Targets,
    /// Read when a place that logs is met for the first time, and when something changes.
    now: RwLock<Targets>,
}

impl Levels {
    pub(crate) fn new(filter: Targets) -> Self {
        Self(Arc::new(Shared {
            at_start: filter.clone(),
            now: RwLock::new(filter),
        }))
    }

    /// The filter as text: `target=level` and a level for all other targets.
    #[must_use]
    pub fn show(&self) -> String {
        self.now(ToString::to_string)
    }

    /// Adds directives to the filter, or to the one of the start; what they do not name stays.
    ///
    /// # Errors
    /// When a directive is not understood; then nothing changes.
    pub fn change(&self, base: Base, directives: &str) -> Result<(), Error> {
        let added = match directives.trim() {
            "" => Targets::new(),
            directives => parse(directives)?,
        };
        let mut next = match base {
            Base::Now => self.now(Clone::clone),
            Base::Start => self.0.at_start.clone(),
        };
        for (target, level) in added.iter() {
            next = next.with_target(target, level);
        }
        if let Some(level) = added.default_level() {
            next = next.with_default(level);
        }
        *self.0.now.write().unwrap_or_else(PoisonError::into_inner) = next;
        tracing::callsite::rebuild_interest_cache();
        Ok(())
    }

    fn now<T>(&self, look: impl FnOnce(&Targets) -> T) -> T {
        look(&self.0.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn lets(&self, metadata: &Metadata<'_>) -> bool {
        self.now(|filter| filter.would_enable(metadata.target(), metadata.level()))
    }
}

/// What directives are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// The filter as it is.
    Now,
    /// The filter that the process began with.
    Start,
}

impl<S: Subscriber> Layer<S> for Levels {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.lets(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _context: Context<'_, S>) -> bool {
        self.lets(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.now(highest))
    }
}

/// The loudest level that a filter lets pass anywhere.
pub(super) fn highest(filter: &Targets) -> LevelFilter {
    let named = filter.iter().map(|(_, level)| level);
    let all = named.chain(filter.default_level());
    all.max().unwrap_or(LevelFilter::OFF)
}
