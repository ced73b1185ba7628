//! The JSON format. Takes an event, gives one object per line: level, time, scope, the event's
//! fields in their order, and one object per span; never two records in a line or two lines for one.

use std::fmt::{self, Write as _};

use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing::span::Record;
use tracing_log::NormalizeEvent as _;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Fields of a span: members of an object, without its braces.
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
        let mut members = Members::default();
        fields.record(&mut members);
        writer.write_str(&members.0)
    }

    fn add_fields(
        &self,
        current: &'writer mut FormattedFields<Self>,
        fields: &Record<'_>,
    ) -> fmt::Result {
        let mut members = Members(std::mem::take(&mut current.fields));
        fields.record(&mut members);
        current.fields = members.0;
        Ok(())
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
        let mut members = Members::default();
        event.record(&mut members);
        let library = event.normalized_metadata();
        let metadata = library.as_ref().unwrap_or_else(|| event.metadata());
        write!(
            line,
            r#"{{"level":"{}","time":""#,
            super::level(metadata.level())
        )?;
        self.0.format_time(&mut line)?;
        write!(line, r#"","scope":{}"#, text(metadata.target()))?;
        if !members.0.is_empty() {
            write!(line, ",{}", members.0)?;
        }
        for span in context
            .event_scope()
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            write!(line, ",{}:{{", text(span.name()))?;
            if let Some(fields) = span.extensions().get::<FormattedFields<Fields>>() {
                line.write_str(fields)?;
            }
            line.write_char('}')?;
        }
        line.write_str("}\n")
    }
}

/// Members of an object, without its braces.
#[derive(Default)]
struct Members(String);

impl Members {
    fn member(&mut self, field: &Field, value: &str) {
        if super::is_origin(field) {
            return;
        }
        if !self.0.is_empty() {
            self.0.push(',');
        }
        let name = field.name();
        let name = text(name.strip_prefix("r#").unwrap_or(name));
        self.0.extend([&name, ":", value]);
    }
}

impl Visit for Members {
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.member(field, &value.to_string());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.member(field, &value.to_string());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.member(field, &value.to_string());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.member(field, &text(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        if write!(text, "{value:?}").is_err() {
            text.push_str(super::UNPRINTABLE);
        }
        self.record_str(field, &text);
    }
}

/// A text as JSON writes it, with its quotes.
fn text(text: &str) -> String {
    if super::needs_no_escape(text) {
        ["\"", text, "\""].concat()
    } else {
        serde_json::Value::from(text).to_string()
    }
}
