//! What came out: rows of scenario, contender and metric, as a table for a person and as JSON for a program. Takes the
//! samples, repetition by repetition; gives rows; never hides one that failed.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    contenders::Contender,
    scenario::Metric,
    stats::{self, Interval, Summary},
};

/// All samples so far. A repetition that gave nothing is a hole, so that pairs stay pairs.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    /// In the order of first appearance, by scenario.
    metrics: Vec<Metric>,
    values: BTreeMap<(&'static str, &'static str, Contender), Vec<Option<f64>>>,
    failures: Vec<Failure>,
}

/// Why there is no number.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) title: String,
    pub(crate) contender: Contender,
    pub(crate) why: String,
}

/// One line of the result.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) metric: Metric,
    pub(crate) contender: Contender,
    pub(crate) summary: Summary,
    pub(crate) to_none: Option<Interval>,
    pub(crate) to_peer: Option<Interval>,
}

impl Samples {
    /// The values of one repetition; all of them holes for `None`.
    pub(crate) fn add(
        &mut self,
        metrics: &'static [Metric],
        contender: Contender,
        values: Option<&[f64]>,
    ) {
        for (at, metric) in metrics.iter().enumerate() {
            if !self.metrics.contains(metric) {
                // Beside the others of its scenario.
                let beside = self
                    .metrics
                    .iter()
                    .rposition(|other| other.scenario == metric.scenario);
                let place = beside.map_or(self.metrics.len(), |at| at + 1);
                self.metrics.insert(place, *metric);
            }
            let value = values.and_then(|values| values.get(at)).copied();
            self.values
                .entry((metric.scenario, metric.name, contender))
                .or_default()
                .push(value.filter(|value| value.is_finite()));
        }
    }

    /// A contender that gives no number here, and takes back those that it gave.
    pub(crate) fn fail(
        &mut self,
        metrics: &'static [Metric],
        title: &str,
        contender: Contender,
        why: String,
    ) {
        for metric in metrics {
            self.values
                .remove(&(metric.scenario, metric.name, contender));
        }
        self.failures.push(Failure {
            title: title.to_owned(),
            contender,
            why,
        });
    }

    pub(crate) fn failures(&self) -> &[Failure] {
        &self.failures
    }

    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for metric in &self.metrics {
            let of = |contender| self.values.get(&(metric.scenario, metric.name, contender));
            for contender in ORDER {
                let Some(values) = of(contender) else {
                    continue;
                };
                let there: Vec<f64> = values.iter().copied().flatten().collect();
                let Some(summary) = stats::summary(&there) else {
                    continue;
                };
                let ratio = |base: Contender| {
                    let base = of(base).filter(|_| base != contender)?;
                    let pairs: Vec<_> = values
                        .iter()
                        .zip(base)
                        .filter_map(|(value, base)| Some(((*value)?, (*base)?)))
                        .collect();
                    stats::paired_ratio(&pairs)
                };
                rows.push(Row {
                    metric: *metric,
                    contender,
                    summary,
                    to_none: ratio(Contender::None),
                    to_peer: ratio(Contender::Peer),
                });
            }
        }
        rows
    }
}

/// The table that ends a run.
pub(crate) fn table(rows: &[Row], failures: &[Failure]) -> Result<String> {
    let peer = rows.iter().any(|row| row.to_peer.is_some());
    let mut text = String::new();
    write!(
        text,
        "{:<5} {:<22} {:<11} {:>10}  {:<21} {:<13} {:>2}  {:<22}",
        "", "metric", "contender", "median", "min – max", "unit", "n", "ratio to none"
    )?;
    writeln!(text, "{}", if peer { "ratio to peer" } else { "" })?;
    let mut before = "";
    for row in rows {
        let Metric {
            scenario,
            name,
            unit,
            better,
        } = row.metric;
        if scenario != before {
            writeln!(text)?;
        }
        let Summary {
            median,
            min,
            max,
            n,
        } = row.summary;
        write!(
            text,
            "{:<5} {:<22} {:<11} {:>10}  {:<21} {:<13} {:>2}  {:<22}",
            if scenario == before { "" } else { scenario },
            format!("{name} ({})", arrow(better)),
            row.contender,
            short(median),
            format!("{} – {}", short(min), short(max)),
            unit,
            n,
            row.to_none.map(interval).unwrap_or_default(),
        )?;
        writeln!(text, "{}", row.to_peer.map(interval).unwrap_or_default())?;
        before = scenario;
    }
    for failure in failures {
        writeln!(
            text,
            "\nno number: {}, {}: {}",
            failure.title, failure.contender, failure.why
        )?;
    }
    Ok(text)
}

/// A list of one object per row; each says what it was measured on.
pub(crate) fn json(rows: &[Row], machine: &Value) -> Value {
    rows.iter()
        .map(|row| {
            json!({
                "scenario": row.metric.scenario,
                "contender": row.contender.name(),
                "metric": row.metric.name,
                "unit": row.metric.unit,
                "better": row.metric.better.name(),
                "median": row.summary.median,
                "min": row.summary.min,
                "max": row.summary.max,
                "n": row.summary.n,
                "ratio_to_none": row.to_none,
                "ratio_to_peer": row.to_peer,
                "measured_on": machine,
            })
        })
        .collect()
}

fn arrow(better: crate::scenario::Better) -> &'static str {
    match better {
        crate::scenario::Better::Higher => "↑",
        crate::scenario::Better::Lower => "↓",
    }
}

fn interval(ratio: Interval) -> String {
    format!("{:.2} [{:.2}–{:.2}]", ratio.median, ratio.low, ratio.high)
}

/// Three digits that matter.
pub(crate) fn short(value: f64) -> String {
    let size = value.abs();
    if size >= 1000.0 {
        format!("{value:.0}")
    } else if size >= 100.0 {
        format!("{value:.1}")
    } else if size >= 1.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    }
}

/// The yardstick first.
const ORDER: [Contender; 6] = [
    Contender::None,
    Contender::Ours,
    Contender::OursCrypto,
    Contender::Peer,
    Contender::Envoy,
    Contender::Limit,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::SCENARIOS;

    #[test]
    fn a_hole_removes_its_pair_and_nothing_else() {
        let metrics = SCENARIOS.first().unwrap().metrics;
        let mut samples = Samples::default();
        for (none, ours) in [(10.0, Some(5.0)), (20.0, None), (10.0, Some(5.0))] {
            samples.add(metrics, Contender::None, Some(&[none]));
            samples.add(
                metrics,
                Contender::Ours,
                ours.map(|value| vec![value]).as_deref(),
            );
        }
        let rows = samples.rows();
        assert_eq!(rows.len(), 2, "{rows:?}");
        let ours = rows.get(1).unwrap();
        assert_eq!((ours.summary.n, ours.summary.median), (2, 5.0));
        assert_eq!(ours.to_none.unwrap().median, 0.5);
        assert!(ours.to_peer.is_none());
    }

    #[test]
    fn who_fails_a_proof_has_no_number_and_says_why() {
        let metrics = SCENARIOS.first().unwrap().metrics;
        let mut samples = Samples::default();
        samples.add(metrics, Contender::None, Some(&[1.0]));
        samples.add(metrics, Contender::Envoy, Some(&[1.0]));
        samples.fail(metrics, "bulk", Contender::Envoy, "it leaks".to_owned());
        assert_eq!(samples.rows().len(), 1);
        let text = table(&samples.rows(), samples.failures()).unwrap();
        assert!(text.contains("no number: bulk, envoy: it leaks"), "{text}");
    }
}
