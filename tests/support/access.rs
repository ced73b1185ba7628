//! Log lines as values: the plain format (tab separated) and JSON. Takes one line; gives time,
//! level, target, message and fields; a line in neither format gives nothing.

use std::collections::BTreeMap;

use serde_json::Value;

/// One line of a node's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub time: String,
    /// Lower case.
    pub level: String,
    pub target: String,
    pub message: String,
    pub fields: BTreeMap<String, String>,
}

impl Line {
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        if line.starts_with('{') {
            Self::json(line)
        } else {
            Self::plain(line)
        }
    }

    /// The line, if it tells about a connection.
    #[must_use]
    pub fn access(line: &str) -> Option<Self> {
        Self::parse(line).filter(|line| line.target == "access")
    }

    /// The value of a field, or nothing.
    #[must_use]
    pub fn get(&self, field: &str) -> Option<&str> {
        self.fields.get(field).map(String::as_str)
    }

    /// Whether all of these fields have these values.
    #[must_use]
    pub fn has(&self, fields: &[(&str, &str)]) -> bool {
        fields
            .iter()
            .all(|(key, value)| self.get(key) == Some(*value))
    }

    /// `time \t level \t target \t message \t key=value key="value"…`
    fn plain(line: &str) -> Option<Self> {
        let mut parts = line.splitn(5, '\t');
        let (time, level, target) = (parts.next()?, parts.next()?, parts.next()?);
        let message = parts.next().unwrap_or_default();
        let fields = parts.next().map(plain_fields).unwrap_or_default();
        Some(Self {
            time: time.to_owned(),
            level: level.trim().to_ascii_lowercase(),
            target: target.to_owned(),
            message: message.to_owned(),
            fields,
        })
    }

    /// `level`, `time`, `scope`, `message`, and every other key a field.
    fn json(line: &str) -> Option<Self> {
        let Value::Object(object) = serde_json::from_str(line).ok()? else {
            return None;
        };
        let mut fields: BTreeMap<_, _> = object
            .into_iter()
            .map(|(key, value)| (key, shown(value)))
            .collect();
        Some(Self {
            time: fields.remove("time")?,
            level: fields.remove("level")?.to_ascii_lowercase(),
            target: fields.remove("scope")?,
            message: fields.remove("message").unwrap_or_default(),
            fields,
        })
    }
}

fn plain_fields(mut rest: &str) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    while let Some((key, after)) = rest.trim_start().split_once('=') {
        let (value, after) = if let Some(quoted) = after.strip_prefix('"') {
            unquote(quoted)
        } else if key == "error" {
            // The last field, and its text may hold anything.
            (after.to_owned(), "")
        } else {
            let (value, after) = after.split_once(' ').unwrap_or((after, ""));
            (value.to_owned(), after)
        };
        fields.insert(key.to_owned(), value);
        rest = after;
    }
    fields
}

/// The text up to the closing quote, and what follows it.
fn unquote(quoted: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = quoted.chars();
    while let Some(char) = chars.next() {
        match char {
            '"' => break,
            '\\' => value.extend(chars.next()),
            plain => value.push(plain),
        }
    }
    (value, chars.as_str())
}

fn shown(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}
