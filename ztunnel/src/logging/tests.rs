//! Lines in both formats, and filters that are refused.

use std::convert::Infallible;
use std::io::Write;
use std::sync::mpsc::Receiver;
#[expect(clippy::disallowed_types, reason = "a test's own buffer")]
use std::sync::{Arc, LazyLock, Mutex};

use super::*;

/// Runs `f` under a subscriber of this format and filter; gives what it wrote, with `TIME` as time.
pub(crate) fn logged(format: Format, filter: &str, f: impl FnOnce()) -> String {
    keep_another();
    let lines = Lines::default();
    let writer = lines.clone();
    let time: fn(&mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result =
        |w| w.write_str("TIME");
    let subscriber = subscriber(
        format,
        Levels::new(parse(filter).unwrap()),
        time,
        move || writer.clone(),
    );
    tracing::subscriber::with_default(subscriber, || {
        // Another test's thread may just have found that nobody listens.
        tracing::callsite::rebuild_interest_cache();
        f();
    });
    let lines = lines.0.lock().unwrap();
    String::from_utf8(lines.clone()).unwrap()
}

/// Where one subscriber is all there is, a thread that has none and comes to a place in the code first
/// would silence that place for everybody.
fn keep_another() {
    static OTHER: LazyLock<tracing::Dispatch> =
        LazyLock::new(|| tracing::Dispatch::new(tracing_subscriber::registry()));
    LazyLock::force(&OTHER);
}

#[derive(Clone, Default)]
#[expect(clippy::disallowed_types, reason = "a test's own buffer")]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const INJECTION: &str = "a b\"\n2026-01-01T00:00:00Z\tinfo\taccess\tforged=1\\ \u{1b}[31m\u{2028}";

#[test]
fn plain_columns_are_separated_by_tabs_and_text_is_quoted() {
    let lines = logged(Format::Plain, "debug", || {
        let span = tracing::debug_span!("outbound", id = %"0a", more = tracing::field::Empty);
        let _entered = span.enter();
        span.record("more", "text");
        tracing::warn!(target: "room", n = 1, ok = true, shown = %"10.0.0.1:80", text = "t", "said {}", 2);
        tracing::debug!(target: "room", parent: None, "bare");
    });
    assert_eq!(
        lines,
        "TIME\twarn\troom:outbound{id=0a more=\"text\"}\tsaid 2\tn=1 ok=true shown=10.0.0.1:80 \
         text=\"t\"\nTIME\tdebug\troom\tbare\n"
    );
}

#[test]
fn json_is_one_object_with_level_time_scope_fields_then_spans() {
    let lines = logged(Format::Json, "debug", || {
        let span = tracing::debug_span!("outbound", id = %"0a", more = tracing::field::Empty);
        let _entered = span.enter();
        span.record("more", "text");
        tracing::warn!(target: "room", n = 1, ok = true, text = "t", "said {}", 2);
    });
    assert_eq!(
        lines,
        "{\"level\":\"warn\",\"time\":\"TIME\",\"scope\":\"room\",\"message\":\"said 2\",\"n\":1,\
         \"ok\":true,\"text\":\"t\",\"outbound\":{\"id\":\"0a\",\"more\":\"text\"}}\n"
    );
}

#[test]
fn no_value_breaks_out_of_its_line_or_its_quotes() {
    let say = || {
        let span = tracing::info_span!("span", id = %INJECTION);
        let _entered = span.enter();
        tracing::info!(shown = %INJECTION, text = INJECTION, "message {INJECTION}");
    };
    let lines = logged(Format::Plain, "info", say);
    assert_eq!(lines.lines().count(), 1, "{lines}");
    assert_eq!(lines.matches('\t').count(), 4, "{lines}");
    assert!(
        !lines.contains(['\u{1b}', '\u{2028}']),
        "{}",
        lines.escape_debug()
    );
    let quoted = format!("shown={INJECTION:?} text={INJECTION:?}\n");
    assert!(lines.ends_with(&quoted), "{lines}");

    let lines = logged(Format::Json, "info", say);
    assert_eq!(lines.lines().count(), 1, "{lines}");
    let object: serde_json::Value = serde_json::from_str(&lines).unwrap();
    assert_eq!(object["text"], INJECTION);
    assert_eq!(object["shown"], INJECTION);
    assert_eq!(object["message"], format!("message {INJECTION}"));
    assert_eq!(object["span"]["id"], INJECTION);
}

#[test]
fn the_time_is_rfc_3339_with_microseconds() {
    let mut text = String::new();
    SystemTime
        .format_time(&mut tracing_subscriber::fmt::format::Writer::new(&mut text))
        .unwrap();
    let shape: String = text
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
}

#[test]
fn a_filter_that_is_not_understood_names_its_variable() {
    for (filter, part) in [
        ("inof", "inof"),
        ("info,ztunnel", "ztunnel"),
        ("ztunnel=loud", "ztunnel=loud"),
        ("a=b=c", "a=b=c"),
    ] {
        let error = parse(filter).unwrap_err().to_string();
        assert!(
            error.contains("RUST_LOG") && error.contains(part),
            "{filter}: {error}"
        );
    }
    for (filter, level) in [
        ("", LevelFilter::INFO),
        ("  ", LevelFilter::INFO),
        ("WARN", LevelFilter::WARN),
        ("info, ztunnel::tunnel=trace", LevelFilter::TRACE),
        ("off", LevelFilter::OFF),
        ("debug,", LevelFilter::DEBUG),
    ] {
        let parsed = parse(filter).unwrap();
        assert_eq!(levels::highest(&parsed), level, "{filter:?}");
    }
}

// B116, B117.
#[test]
fn a_change_adds_to_the_filter_a_reset_goes_back_and_a_bad_one_changes_nothing() {
    let levels = Levels::new(parse("info,ztunnel::tunnel=trace").unwrap());
    levels.change(Base::Now, "access=debug,warn").unwrap();
    let shown = levels.show();
    for part in ["access=debug", "ztunnel::tunnel=trace", "warn"] {
        assert!(shown.contains(part), "{shown}");
    }
    for bad in ["foo", "access", "access:debug", "info,a=b=c"] {
        assert!(levels.change(Base::Now, bad).is_err(), "{bad}");
        assert_eq!(levels.show(), shown);
    }
    levels.change(Base::Start, "access=off").unwrap();
    let shown = levels.show();
    assert!(
        !shown.contains("warn") && shown.contains("access=off"),
        "{shown}"
    );
    levels.change(Base::Start, "").unwrap();
    assert_eq!(
        levels.show(),
        parse("info,ztunnel::tunnel=trace").unwrap().to_string()
    );
}

#[test]
fn a_changed_filter_counts_for_places_that_have_logged_before() {
    keep_another();
    let lines = Lines::default();
    let writer = lines.clone();
    let levels = Levels::new(parse("info").unwrap());
    let time: fn(&mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result =
        |w| w.write_str("TIME");
    let subscriber = subscriber(Format::Plain, levels.clone(), time, move || writer.clone());
    let say = |text| tracing::debug!(target: "access", text, "said");
    tracing::subscriber::with_default(subscriber, || {
        tracing::callsite::rebuild_interest_cache();
        say("first");
        levels.change(Base::Now, "access=debug").unwrap();
        say("second");
        levels.change(Base::Start, "").unwrap();
        say("third");
    });
    let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(lines.contains("second"), "{lines}");
    assert!(
        !lines.contains("first") && !lines.contains("third"),
        "{lines}"
    );
}

#[test]
fn lines_that_do_not_fit_are_dropped_and_counted() {
    let (sent, unblock) = std::sync::mpsc::channel();
    let lines = lines::Lines::start(Blocked(unblock)).unwrap();
    let mut line = vec![b'x'; 1 << 20];
    line.push(b'\n');
    for _ in 0..12 {
        lines.make_writer().write_all(&line).unwrap();
    }
    let guard = Guard {
        levels: Levels::new(parse("").unwrap()),
        lines,
    };
    let families = guard.source().families();
    drop(sent);
    // Eight mebibytes may wait.
    assert!(families[0].rows[0].value >= 2, "{families:?}");
}

/// A standard output that nobody reads until the other end of the channel is gone.
struct Blocked(Receiver<Infallible>);

impl Write for Blocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.recv() {
            Ok(never) => match never {},
            Err(_) => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn lines_of_libraries_that_know_only_the_older_facade_look_like_ours() {
    use tracing_log::log::{Level, Record};
    let say = || {
        for (level, text) in [(Level::Warn, "by hand"), (Level::Debug, "too low")] {
            let mut record = Record::builder();
            record.level(level).target("library::part");
            tracing_log::format_trace(&record.args(format_args!("{text}")).build()).unwrap();
        }
    };
    let lines = logged(Format::Plain, "library=info", say);
    assert_eq!(lines, "TIME\twarn\tlibrary::part\tby hand\n");
    let lines = logged(Format::Json, "library=info", say);
    let expected = "{\"level\":\"warn\",\"time\":\"TIME\",\"scope\":\"library::part\",\"message\":\"by hand\"}\n";
    assert_eq!(lines, expected);
}
