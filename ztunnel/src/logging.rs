//! Where lines go and how they look. Takes a format and a filter, gives the process its tracing
//! subscriber: one line is one record, whatever a peer puts into a value; never holds a worker up:
//! when standard output is slow, lines are dropped and counted.

mod json;
mod levels;
mod lines;
mod plain;

use std::io;

use thiserror::Error;
use tracing::Subscriber;
use tracing::field::Field;
use tracing::subscriber::SetGlobalDefaultError;
use tracing_log::LogTracer;
use tracing_log::log::SetLoggerError;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::SubscriberExt as _;

use self::lines::Lines;
use crate::account::{Family, Kind, Source};

pub use self::levels::{Base, Levels};
pub use self::lines::hold_lines;

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One JSON object.
    Json,
    /// Columns, separated by tabs.
    #[default]
    Plain,
}

/// Keeps the writer alive. Dropping it writes what is still buffered, waiting a second at most.
#[derive(Debug)]
#[must_use]
pub struct Guard {
    levels: Levels,
    lines: Lines,
}

/// Why logging could not start.
#[derive(Debug, Error)]
pub enum Error {
    /// The process has a logger already.
    #[error("take over the log lines of libraries")]
    Bridge(#[source] SetLoggerError),
    /// A part of the filter is neither a level nor `target=level`. Taken as a target, a misspelled
    /// level would silence everything else.
    #[error(
        "RUST_LOG or level: {0:?} is neither a level (off, error, warn, info, debug, trace) nor target=level"
    )]
    Directive(String),
    /// A part of the filter is not understood.
    #[error("RUST_LOG or level is {filter:?}")]
    Filter {
        /// The whole filter.
        filter: String,
        /// What is wrong.
        source: ParseError,
    },
    /// The process has a subscriber already.
    #[error("start logging")]
    Started(#[source] SetGlobalDefaultError),
    /// No thread to write with.
    #[error("start the thread that writes lines")]
    Thread(#[source] io::Error),
}

/// Sends the lines of this process that pass the filter to standard output. An empty filter means
/// `info`. Called once, at start.
///
/// # Errors
/// When the filter is not understood, or logging was started before.
pub fn init(format: Format, filter: &str) -> Result<Guard, Error> {
    let levels = Levels::new(parse(filter)?);
    let lines = Lines::start(io::stdout()).map_err(Error::Thread)?;
    let subscriber = subscriber(format, levels.clone(), SystemTime, lines.clone());
    tracing::subscriber::set_global_default(subscriber).map_err(Error::Started)?;
    // Libraries that know only the older facade; the filter is for them too.
    LogTracer::init().map_err(Error::Bridge)?;
    Ok(Guard { levels, lines })
}

impl Guard {
    /// The filter, to be changed.
    #[must_use]
    pub fn levels(&self) -> Levels {
        self.levels.clone()
    }

    /// The rows about logging itself.
    #[must_use]
    pub fn source(&self) -> Box<dyn Source> {
        Box::new(Dropped(self.lines.clone()))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.lines.flush();
    }
}

#[derive(Debug)]
struct Dropped(Lines);

impl Source for Dropped {
    fn families(&self) -> Vec<Family> {
        vec![Family::single(
            "ztunnel_log_lines_dropped",
            "Log lines that were dropped because standard output was slower than the lines",
            Kind::Counter,
            self.0.dropped(),
        )]
    }
}

fn subscriber<T, W>(
    format: Format,
    levels: Levels,
    time: T,
    writer: W,
) -> Box<dyn Subscriber + Send + Sync>
where
    T: FormatTime + Send + Sync + 'static,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .log_internal_errors(false)
        .with_writer(writer);
    let registry = tracing_subscriber::registry().with(levels);
    match format {
        Format::Json => Box::new(
            registry.with(
                lines
                    .fmt_fields(json::Fields)
                    .event_format(json::Event(time)),
            ),
        ),
        Format::Plain => Box::new(
            registry.with(
                lines
                    .fmt_fields(plain::Fields)
                    .event_format(plain::Event(time)),
            ),
        ),
    }
}

fn parse(filter: &str) -> Result<Targets, Error> {
    let directives: Vec<_> = filter
        .split(',')
        .map(str::trim)
        .filter(|directive| !directive.is_empty())
        .collect();
    if directives.is_empty() {
        return Ok(Targets::new().with_default(LevelFilter::INFO));
    }
    for directive in &directives {
        if !directive.contains('=') && directive.parse::<LevelFilter>().is_err() {
            return Err(Error::Directive((*directive).to_owned()));
        }
    }
    directives
        .join(",")
        .parse()
        .map_err(|source| Error::Filter {
            filter: filter.to_owned(),
            source,
        })
}

/// Whether a field says what the metadata say already: of lines that came over the older facade.
fn is_origin(field: &Field) -> bool {
    field.name().starts_with("log.")
}

/// Whether a text stands for itself between quotes, in both formats. Nearly every text does, and is
/// copied as it is.
fn needs_no_escape(text: &str) -> bool {
    text.bytes()
        .all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\')
}

/// The level as both formats print it.
fn level(level: &tracing::Level) -> &'static str {
    match *level {
        tracing::Level::ERROR => "error",
        tracing::Level::WARN => "warn",
        tracing::Level::INFO => "info",
        tracing::Level::DEBUG => "debug",
        tracing::Level::TRACE => "trace",
    }
}

/// Stands for the rest of a value that refuses to be formatted.
const UNPRINTABLE: &str = "<unprintable>";

#[cfg(test)]
pub(crate) mod tests;
