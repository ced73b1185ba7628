//! A flame graph: takes what `perf script` prints, gives an SVG in which a frame is as wide as its share of the samples,
//! with its name and share as a tooltip. Pure.

use std::collections::BTreeMap;

/// A frame, how often it was seen, and what it called.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Frame {
    samples: u32,
    calls: BTreeMap<String, Self>,
}

/// Puts the samples together, outermost frame first.
pub(super) fn fold(script: &str) -> Frame {
    let mut root = Frame::default();
    let mut stack: Vec<&str> = Vec::new();
    let mut command = "";
    for line in script.lines().chain([""]) {
        if line.trim().is_empty() {
            if !command.is_empty() {
                root.add(std::iter::once(command).chain(stack.drain(..).rev()));
            }
            (command, stack) = ("", Vec::new());
        } else if line.starts_with(char::is_whitespace) {
            let name = line.trim().split_once(' ').map_or("[unknown]", |(_, n)| n);
            stack.push(name);
        } else {
            command = line.trim();
        }
    }
    root
}

/// The picture.
pub(super) fn svg(root: &Frame, title: &str) -> String {
    let height = (root.depth() + 3) * LINE;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"monospace\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"16\" font-size=\"14\">{} ({} samples)</text>\n",
        escape(title),
        root.samples,
    );
    root.draw(&mut text, root.samples.max(1), (0, height - LINE));
    text.push_str("</svg>\n");
    text
}

impl Frame {
    fn add(&mut self, stack: impl IntoIterator<Item = impl Into<String>>) {
        self.samples += 1;
        let mut at = self;
        for name in stack {
            at = at.calls.entry(name.into()).or_default();
            at.samples += 1;
        }
    }

    fn depth(&self) -> u32 {
        self.calls
            .values()
            .map(|frame| frame.depth() + 1)
            .max()
            .unwrap_or_default()
    }

    /// What this frame called, from `left` samples on, upwards from `bottom`.
    fn draw(&self, text: &mut String, all: u32, (left, bottom): (u32, u32)) {
        let mut left = left;
        for (name, frame) in &self.calls {
            let scale = f64::from(WIDTH) / f64::from(all);
            let (x, width) = (f64::from(left) * scale, f64::from(frame.samples) * scale);
            if width >= NARROWEST {
                let percent = f64::from(frame.samples) * 100.0 / f64::from(all);
                let name = escape(name);
                let color = color(&name);
                text.push_str(&format!(
                    "<g><title>{name} {percent:.1} %</title>\
                     <rect x=\"{x:.1}\" y=\"{bottom}\" width=\"{width:.1}\" height=\"{}\" \
                     fill=\"{color}\" stroke=\"white\"/>{}</g>\n",
                    LINE - 1,
                    caption(&name, x, bottom, width),
                ));
                frame.draw(text, all, (left, bottom.saturating_sub(LINE)));
            }
            left += frame.samples;
        }
    }
}

fn caption(name: &str, x: f64, y: u32, width: f64) -> String {
    let letters = (width / LETTER).floor();
    let fitting: String = name
        .chars()
        .zip(1_u32..)
        .take_while(|(_, number)| f64::from(*number) <= letters - 1.0)
        .map(|(letter, _)| letter)
        .collect();
    // A cut entity would break the file.
    if fitting.chars().count() < 3 || (fitting != name && fitting.contains('&')) {
        return String::new();
    }
    let (x, y) = (x + 2.0, y + LINE - 5);
    format!("<text x=\"{x:.1}\" y=\"{y}\">{fitting}</text>")
}

/// The same name always has the same one.
fn color(name: &str) -> String {
    let hash = name.bytes().fold(7_u32, |hash, byte| {
        hash.wrapping_mul(31).wrapping_add(byte.into())
    });
    format!("hsl({}, 70%, {}%)", hash % 50, 62 + hash / 50 % 14)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

// Pixels.
const WIDTH: u32 = 1600;
const LINE: u32 = 17;
const LETTER: f64 = 6.7;
const NARROWEST: f64 = 0.4;

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str =
        "worker-0 \n\tffff inner\n\tfff0 outer<T>\n\nworker-0 \n\tffff other\n\tfff0 outer<T>\n";

    #[test]
    fn samples_are_put_together_from_the_outermost_frame() {
        let root = fold(SCRIPT);
        assert_eq!((root.samples, root.depth()), (2, 3));
        let outer = &root.calls["worker-0"].calls["outer<T>"];
        assert_eq!(outer.samples, 2);
        assert_eq!(outer.calls.keys().collect::<Vec<_>>(), ["inner", "other"]);
    }

    #[test]
    fn names_do_not_break_the_picture() {
        let picture = svg(&fold(SCRIPT), "a & b");
        assert!(picture.contains("outer&lt;T&gt; 100.0 %"), "{picture}");
        assert!(picture.contains("a &amp; b (2 samples)"), "{picture}");
        assert_eq!(
            picture.matches("<g>").count(),
            picture.matches("</g>").count()
        );
    }
}
