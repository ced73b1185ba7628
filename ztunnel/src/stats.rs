//! Rows of other rooms for the metrics page. Takes handles of those rooms, gives families at scrape
//! time; never stores a number.

use std::borrow::Cow;

use tracing::warn;

use crate::account::{Family, Kind, Row, Source};
use crate::capture::{Capture, CountSource};

/// What the kernel programs counted.
#[must_use]
pub fn kernel(capture: Capture) -> Box<dyn Source> {
    Box::new(Kernel(capture))
}

#[derive(Debug)]
struct Kernel(Capture);

impl Source for Kernel {
    fn families(&self) -> Vec<Family> {
        let counts = match self.0.counters() {
            Ok(counts) => counts,
            Err(error) => {
                warn!(%error, "the kernel's counters cannot be read");
                return Vec::new();
            }
        };
        let rows = counts
            .into_iter()
            .map(|count| {
                let netns_cookie = match count.source {
                    CountSource::Node => Cow::Borrowed(""),
                    CountSource::Pod(cookie) => Cow::Owned(cookie.0.to_string()),
                };
                Row {
                    labels: vec![
                        ("verdict", Cow::Borrowed(count.verdict)),
                        ("netns_cookie", netns_cookie),
                    ],
                    value: count.total,
                }
            })
            .collect();
        vec![Family {
            name: "ztunnel_capture_verdicts",
            help: "Verdicts of the kernel programs, by pod where one program serves one pod",
            kind: Kind::Counter,
            rows,
        }]
    }
}
