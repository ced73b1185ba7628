//! Counters that other rooms keep. Takes nothing, gives the shape in which a room hands its rows
//! over at scrape time; never stores them.

use std::borrow::Cow;
use std::fmt;

/// Somebody who has rows for the metrics page.
pub trait Source: fmt::Debug + Send + Sync {
    /// The rows as they are now. Called on the control thread for each scrape; may make system
    /// calls, must not wait.
    fn families(&self) -> Vec<Family>;

    /// The rows that are distributions; most have none.
    fn distributions(&self) -> Vec<Distribution> {
        Vec::new()
    }
}

/// How some values are distributed: one row of a histogram.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    /// As of a [`Family`].
    pub name: &'static str,
    /// One line for people.
    pub help: &'static str,
    /// Name and value of each label, from closed sets or the snapshot.
    pub labels: Vec<(&'static str, Cow<'static, str>)>,
    /// The sum of all values, in base units.
    pub sum: f64,
    /// How many there were.
    pub count: u64,
    /// Upper bounds, the last one `f64::INFINITY`, and how many values lay between each and the one before.
    pub buckets: Vec<(f64, u64)>,
}

/// What a value means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows; the page shows it with the suffix `_total`.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// One metric with all of its rows. Families of one name from several sources become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// `ztunnel_<room>_<thing>_<unit>`, without `_total`.
    pub name: &'static str,
    /// One line for people.
    pub help: &'static str,
    /// What the values mean.
    pub kind: Kind,
    /// The rows, each with the same label names.
    pub rows: Vec<Row>,
}

/// One value and its labels. Label values come from closed sets or the snapshot, never from what a
/// peer chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Name and value of each label.
    pub labels: Vec<(&'static str, Cow<'static, str>)>,
    /// The value, in base units.
    pub value: u64,
}

impl Family {
    /// A metric that has one row and no labels.
    #[must_use]
    pub fn single(name: &'static str, help: &'static str, kind: Kind, value: u64) -> Self {
        Self {
            name,
            help,
            kind,
            rows: vec![Row {
                labels: Vec::new(),
                value,
            }],
        }
    }
}
