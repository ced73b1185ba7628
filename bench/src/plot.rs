//! Charts of a run, as SVG and PNG, each with what it was measured on, so that it can stand alone: the ratios to plain
//! TCP with their intervals, and the values by unit with all that was seen. Takes rows; gives the files that it wrote.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::{
        BitMapBackend, Circle, DrawingArea, DrawingBackend, IntoDrawingArea as _, IntoFont as _,
        PathElement, RGBColor, SVGBackend, Text, WHITE,
    },
    style::{FontStyle, ShapeStyle, register_font},
};
use serde_json::Value;

use crate::{
    contenders::Contender,
    report::{self, Row},
    run,
    scenario::{Better, Metric},
};

/// Draws everything that the rows can show.
pub(crate) fn all(rows: &[Row], about: &Value, directory: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let font = fs::read(FONT).with_context(|| format!("read {FONT} (fonts-dejavu-core)"))?;
    // The library wants it for as long as the process lives, which is not long.
    register_font(FAMILY, FontStyle::Normal, font.leak())
        .map_err(|_invalid| anyhow!("{FONT} is not a font"))?;
    let quick = about.get("quick") == Some(&Value::Bool(true));
    let caption = run::describe(about, quick);
    let mut written = Vec::new();
    for chart in charts(rows, &caption) {
        let size = (WIDTH.unsigned_abs(), chart.height().unsigned_abs());
        let svg = directory.join(format!("{}.svg", chart.file));
        chart
            .draw(&SVGBackend::new(&svg, size).into_drawing_area())
            .with_context(|| format!("draw {}", svg.display()))?;
        let png = directory.join(format!("{}.png", chart.file));
        chart
            .draw(&BitMapBackend::new(&png, size).into_drawing_area())
            .with_context(|| format!("draw {}", png.display()))?;
        written.extend([svg, png]);
    }
    Ok(written)
}

/// One picture: groups of points with their reach, on a logarithmic axis.
struct Chart {
    file: &'static str,
    title: String,
    caption: Vec<String>,
    groups: Vec<Group>,
}

struct Group {
    label: String,
    points: Vec<Point>,
}

#[derive(Clone, Copy)]
struct Point {
    contender: Contender,
    value: f64,
    low: f64,
    high: f64,
}

fn charts(rows: &[Row], caption: &str) -> Vec<Chart> {
    let caption = wrap(caption, CAPTION_LETTERS);
    let mut charts = vec![Chart {
        file: "ratio-to-none",
        title: "Against plain TCP: paired ratio, median and 95 % interval (1 = no mesh)".to_owned(),
        caption: caption.clone(),
        groups: groups(rows, |row| {
            let ratio = row.to_none?;
            Some((ratio.median, ratio.low, ratio.high))
        }),
    }];
    for (unit, file, what) in UNITS {
        charts.push(Chart {
            file,
            title: format!("{what}, {unit}: median, and all that was measured"),
            caption: caption.clone(),
            groups: groups(rows, |row| {
                let all = row.summary;
                (row.metric.unit == unit).then_some((all.median, all.min, all.max))
            }),
        });
    }
    charts.retain(|chart| !chart.groups.is_empty());
    charts
}

fn groups(rows: &[Row], pick: impl Fn(&Row) -> Option<(f64, f64, f64)>) -> Vec<Group> {
    let mut groups: Vec<(Metric, Vec<Point>)> = Vec::new();
    for row in rows {
        let Some((value, low, high)) = pick(row).filter(|(value, low, _)| value.min(*low) > 0.0)
        else {
            continue;
        };
        let point = Point {
            contender: row.contender,
            value,
            low,
            high,
        };
        match groups.last_mut() {
            Some((metric, points)) if *metric == row.metric => points.push(point),
            _ => groups.push((row.metric, vec![point])),
        }
    }
    groups
        .into_iter()
        .map(|(metric, points)| Group {
            label: format!(
                "{} {} ({} is better)",
                metric.scenario,
                metric.name,
                match metric.better {
                    Better::Higher => "more",
                    Better::Lower => "less",
                }
            ),
            points,
        })
        .collect()
}

type Area<B> = DrawingArea<B, Shift>;

impl Chart {
    fn height(&self) -> i32 {
        let points: usize = self.groups.iter().map(|group| group.points.len()).sum();
        let lines = points + self.groups.len();
        self.top() + i32::try_from(lines).unwrap_or_default() * LINE + AXIS
    }

    fn top(&self) -> i32 {
        TITLE + i32::try_from(self.caption.len()).unwrap_or_default() * LINE + LINE
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()> {
        area.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
        text(area, &self.title, (MARGIN, 10), 20, INK)?;
        for (line, number) in self.caption.iter().zip(0..) {
            text(area, line, (MARGIN, TITLE + number * LINE), 12, GREY)?;
        }
        let axis = Axis::over(
            self.groups
                .iter()
                .flat_map(|group| group.points.iter().copied()),
        );
        let bottom = self.height() - AXIS;
        for tick in axis.ticks() {
            let x = axis.place(tick);
            let color = if (tick - 1.0).abs() < 1e-9 {
                GREY
            } else {
                PALE
            };
            line(area, [(x, self.top()), (x, bottom)], color, 1)?;
            text(area, &label(tick), (x - 8, bottom + 8), 12, GREY)?;
        }
        let mut y = self.top();
        for group in &self.groups {
            text(area, &group.label, (MARGIN, y + 2), 13, INK)?;
            y += LINE;
            for point in &group.points {
                point.draw(area, &axis, y)?;
                y += LINE;
            }
        }
        area.present().map_err(|error| anyhow!("{error}"))
    }
}

impl Point {
    fn draw<B: DrawingBackend>(self, area: &Area<B>, axis: &Axis, y: i32) -> Result<()> {
        let color = color(self.contender);
        let middle = y + LINE / 2;
        text(area, self.contender.name(), (MARGIN + 24, y + 1), 13, color)?;
        let (low, high) = (axis.place(self.low), axis.place(self.high));
        line(area, [(low, middle), (high, middle)], color, 2)?;
        for end in [low, high] {
            line(area, [(end, middle - 4), (end, middle + 4)], color, 2)?;
        }
        let style = ShapeStyle::from(&color).filled();
        let dot = Circle::new((axis.place(self.value), middle), 4, style);
        area.draw(&dot).map_err(|error| anyhow!("{error}"))?;
        let value = report::short(self.value);
        text(area, &value, (WIDTH - VALUE, y + 1), 13, color)
    }
}

/// A logarithmic axis over the width that labels and values leave.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn over(points: impl Iterator<Item = Point>) -> Self {
        let (mut low, mut high) = (f64::MAX, f64::MIN_POSITIVE);
        for point in points {
            low = low.min(point.low);
            high = high.max(point.high);
        }
        Self {
            low: low / 1.15,
            high: high * 1.15,
        }
    }

    #[expect(
        clippy::as_conversions,
        clippy::cast_possible_truncation,
        reason = "a place on a picture: any float gives a pixel, and the casts saturate"
    )]
    fn place(&self, value: f64) -> i32 {
        let share = (value / self.low).ln() / (self.high / self.low).ln();
        let width = f64::from(WIDTH - LABELS - VALUE - MARGIN);
        LABELS + (share.clamp(0.0, 1.0) * width) as i32
    }

    /// 1, 2 and 5 of every decade that is in sight.
    fn ticks(&self) -> Vec<f64> {
        (-6..=9)
            .flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)))
            .filter(|tick| (self.low..=self.high).contains(tick))
            .collect()
    }
}

fn text<B: DrawingBackend>(
    area: &Area<B>,
    text: &str,
    at: (i32, i32),
    size: i32,
    color: RGBColor,
) -> Result<()> {
    let style = (FAMILY, size).into_font().color(&color);
    area.draw(&Text::new(text.to_owned(), at, style))
        .map_err(|error| anyhow!("{error}"))
}

fn line<B: DrawingBackend>(
    area: &Area<B>,
    ends: [(i32, i32); 2],
    color: RGBColor,
    width: u32,
) -> Result<()> {
    let style = ShapeStyle::from(&color).stroke_width(width);
    area.draw(&PathElement::new(ends.to_vec(), style))
        .map_err(|error| anyhow!("{error}"))
}

fn label(tick: f64) -> String {
    if tick >= 1e6 {
        format!("{}M", tick / 1e6)
    } else if tick >= 1e3 {
        format!("{}k", tick / 1e3)
    } else {
        // As short as it can be without showing the binary fraction.
        format!("{tick:.6}")
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned()
    }
}

fn wrap(text: &str, letters: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        if let Some(line) = lines.last_mut()
            && line.len() + word.len() < letters
        {
            line.push_str(word);
            line.push(' ');
        } else {
            lines.push(format!("{word} "));
        }
    }
    lines
}

fn color(contender: Contender) -> RGBColor {
    match contender {
        Contender::None => RGBColor(110, 110, 110),
        Contender::Ours => RGBColor(0, 114, 178),
        Contender::OursCrypto => RGBColor(86, 180, 233),
        Contender::Envoy => RGBColor(213, 94, 0),
        Contender::Limit => RGBColor(0, 158, 115),
        Contender::Peer => RGBColor(204, 121, 167),
    }
}

/// Unit, file, and what it is about.
const UNITS: [(&str, &str, &str); 9] = [
    ("Gb/s", "throughput", "Throughput"),
    ("1/s", "rates", "Requests and connections"),
    ("µs", "latency", "Latency"),
    ("ms", "latency-under-load", "Latency under full load"),
    ("ns/B", "cpu-per-byte", "CPU per byte"),
    ("µs/request", "cpu-per-request", "CPU per request"),
    ("µs/connection", "cpu-per-connection", "CPU per connection"),
    ("MB", "memory", "Resident memory of the larger process"),
    ("×", "beside-unread", "Beside a stream that nobody reads"),
];

const FONT: &str = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf";
const FAMILY: &str = "sans-serif";
const INK: RGBColor = RGBColor(30, 30, 30);
const GREY: RGBColor = RGBColor(120, 120, 120);
const PALE: RGBColor = RGBColor(225, 225, 225);
// Pixels.
const WIDTH: i32 = 1000;
const MARGIN: i32 = 16;
const TITLE: i32 = 40;
const LINE: i32 = 18;
const AXIS: i32 = 36;
const LABELS: i32 = 150;
const VALUE: i32 = 70;
const CAPTION_LETTERS: usize = 150;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_stay_in_sight_and_are_told_shortly() {
        let axis = Axis {
            low: 0.15,
            high: 30.0,
        };
        let labels: Vec<_> = axis.ticks().into_iter().map(label).collect();
        assert_eq!(labels, ["0.2", "0.5", "1", "2", "5", "10", "20"]);
        assert_eq!(label(20_000.0), "20k");
        assert!(axis.place(0.15) < axis.place(1.0));
        assert!(axis.place(1e9) < WIDTH);
    }

    #[test]
    fn a_caption_is_wrapped_between_words() {
        assert_eq!(wrap("aa bb cc", 6), ["aa bb ", "cc "]);
    }
}
