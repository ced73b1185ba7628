//! The text of a metrics page as values. Takes OpenMetrics text; gives samples by name and labels;
//! refuses a line that it does not understand.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};

/// One line of a metrics page.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// A metrics page.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Vec<Sample>);

impl Metrics {
    pub fn parse(page: &str) -> Result<Self> {
        let lines = page
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines
            .map(|line| sample(line).with_context(|| line.to_owned()))
            .collect::<Result<_>>()
            .map(Self)
    }

    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.0
    }

    /// Samples of this name that carry all of these labels.
    pub fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| {
            sample.name == name
                && labels
                    .iter()
                    .all(|(key, value)| sample.labels.get(*key).is_some_and(|found| found == value))
        })
    }

    /// The sum of [`Metrics::matching`]; zero if there is none, as a counter that never counted.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }
}

fn sample(line: &str) -> Result<Sample> {
    let name_end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at_checked(name_end).context("no value")?;
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = read_labels(inside, &mut labels)?;
    }
    // A timestamp or an exemplar may follow the value.
    let value = rest
        .split_whitespace()
        .next()
        .context("no value")?
        .parse()?;
    Ok(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

fn read_labels<'a>(mut rest: &'a str, labels: &mut BTreeMap<String, String>) -> Result<&'a str> {
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(after) = rest.strip_prefix('}') {
            return Ok(after);
        }
        let (key, after) = rest.split_once("=\"").context("a label without a value")?;
        let mut value = String::new();
        let mut chars = after.chars();
        loop {
            match chars.next() {
                Some('"') => break,
                Some('\\') => match chars.next() {
                    Some('n') => value.push('\n'),
                    Some(escaped) => value.push(escaped),
                    None => bail!("a label that ends in an escape"),
                },
                Some(plain) => value.push(plain),
                None => bail!("a label without an end"),
            }
        }
        labels.insert(key.to_owned(), value);
        rest = chars.as_str();
    }
}
