//! The plain format. Takes an event, gives `time ⇥ level ⇥ target ⇥ message ⇥ key=value …` and one
//! newline; text is quoted, and no value can bring a tab or a newline of its own.

use std::fmt::{self, Write as _};

use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing_log::NormalizeEvent as _;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Fields of a span: `key=value key=value`.
#[derive(Debug)]
pub(super) struct Fields;

/// Whole lines.
#[derive(Debug)]
pub(super) struct Event<T>(pub(super) T);

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: R,
    ) -> fmt::Result {
        let mut pairs = Pairs::default();
        fields.record(&mut pairs);
        writer.write_str(&pairs.fields)
    }
}

impl<S, T> FormatEvent<S, Fields> for Event<T>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    T: FormatTime,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, Fields>,
        mut line: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        let mut pairs = Pairs::default();
        event.record(&mut pairs);
        let library = event.normalized_metadata();
        let metadata = library.as_ref().unwrap_or_else(|| event.metadata());
        self.0.format_time(&mut line)?;
        let level = super::level(metadata.level());
        write!(line, "\t{level}\t{}", metadata.target())?;
        for span in context
            .event_scope()
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            write!(line, ":{}", span.name())?;
            if let Some(fields) = span.extensions().get::<FormattedFields<Fields>>()
                && !fields.is_empty()
            {
                write!(line, "{{{fields}}}")?;
            }
        }
        write!(line, "\t{}", pairs.message)?;
        if !pairs.fields.is_empty() {
            write!(line, "\t{}", pairs.fields)?;
        }
        line.write_char('\n')
    }
}

/// An event's or a span's fields, and the message apart from them.
#[derive(Default)]
struct Pairs {
    message: String,
    fields: String,
    scratch: String,
}

impl Pairs {
    fn quoted(&mut self, field: &Field, text: &str) {
        if super::needs_no_escape(text) {
            self.pair(field, &["\"", text, "\""]);
        } else {
            self.pair(field, &[&format!("{text:?}")]);
        }
    }

    fn pair(&mut self, field: &Field, value: &[&str]) {
        if super::is_origin(field) {
            return;
        }
        if !self.fields.is_empty() {
            self.fields.push(' ');
        }
        let name = field.name();
        let name = name.strip_prefix("r#").unwrap_or(name);
        self.fields.extend([name, "="]);
        self.fields.extend(value.iter().copied());
    }
}

impl Visit for Pairs {
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.pair(field, &[&value.to_string()]);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.pair(field, &[&value.to_string()]);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.pair(field, &[&value.to_string()]);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            one_line(&mut self.message, value);
        } else {
            self.quoted(field, value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = std::mem::take(&mut self.scratch);
        text.clear();
        if write!(text, "{value:?}").is_err() {
            text.push_str(super::UNPRINTABLE);
        }
        if field.name() == "message" {
            one_line(&mut self.message, &text);
        } else if is_plain(&text) {
            self.pair(field, &[&text]);
        } else {
            self.quoted(field, &text);
        }
        self.scratch = text;
    }
}

/// Whether a value needs no quotes to be told from what stands around it.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && !text.contains(' ') && super::needs_no_escape(text)
}

/// Appends a message; what is not printable, such as a newline, is written as its escape.
fn one_line(message: &mut String, text: &str) {
    if super::needs_no_escape(text) {
        message.push_str(text);
        return;
    }
    for c in text.chars() {
        match c {
            ' '..='~' => message.push(c),
            _ => message.extend(c.escape_debug()),
        }
    }
}
