//! A plot of a bench as SVG: a bar for each figure's median, with a line to its 99th percentile.
//! Figures of different units get plots of their own.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::record::{Figure, Record};

const WIDTH: u32 = 900;
/// Where bars start; the names of the figures are left of it.
const LEFT: u32 = 300;
/// Room right of the longest line, for its number.
const RIGHT: u32 = 170;
const TOP: u32 = 56;
const ROW: u32 = 34;
const BAR: u32 = 20;
const OURS: &str = "#1f77b4";
const THEIRS: &str = "#aaaaaa";
const INK: &str = "#282828";

/// Draws `record` into `folder`, and returns the files, one for each unit.
pub(crate) fn draw_all(folder: &Path, bench: &str, record: &Record) -> Result<Vec<PathBuf>> {
    let mut units: Vec<&str> = record.figures.iter().map(|f| f.unit.as_str()).collect();
    units.sort_unstable();
    units.dedup();
    let mut paths = Vec::new();
    for unit in units {
        let figures = record.figures.iter().filter(|figure| figure.unit == unit);
        let figures: Vec<&Figure> = figures.collect();
        let title = format!("{bench}, {unit}: median, and a line to the 99th percentile");
        let path = folder.join(format!("{bench}-{}.svg", unit.replace('/', "-per-")));
        fs::write(&path, draw(&title, &figures))
            .with_context(|| format!("cannot write {}", path.display()))?;
        paths.push(path);
    }
    Ok(paths)
}

/// The text of one plot.
fn draw(title: &str, figures: &[&Figure]) -> String {
    let height = TOP + ROW * figures.len() as u32 + 16;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"14\" fill=\"{INK}\" dominant-baseline=\"central\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"20\" y=\"26\" font-size=\"17\">{}</text>\n",
        escaped(title)
    );
    let longest = figures.iter().map(|figure| figure.p99.max(figure.p50));
    let longest = longest.fold(f64::MIN_POSITIVE, f64::max);
    let scale = f64::from(WIDTH - LEFT - RIGHT) / longest;
    for (row, figure) in (0..).zip(figures) {
        add_row(&mut svg, TOP + ROW * row + ROW / 2, scale, figure);
    }
    svg + "</svg>\n"
}

/// Adds a figure's name, bar, line and number around the height `middle`.
fn add_row(svg: &mut String, middle: u32, scale: f64, figure: &Figure) {
    let colour = match figure.name.starts_with("clone") {
        true => OURS,
        false => THEIRS,
    };
    let (median, tail) = (figure.p50 * scale, figure.p99 * scale);
    let x = |length: f64| f64::from(LEFT) + length;
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{}</text>\n\
         <rect x=\"{LEFT}\" y=\"{}\" width=\"{median:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
         <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"{INK}\" stroke-width=\"2\"/>\n\
         <text x=\"{:.1}\" y=\"{middle}\" font-size=\"13\">{:.2} (p99 {:.2})</text>",
        LEFT - 10,
        escaped(&figure.name),
        middle - BAR / 2,
        x(median),
        x(tail),
        x(median.max(tail)) + 8.0,
        figure.p50,
        figure.p99,
    );
}

/// Text as XML holds it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_shows_each_figures_name_and_number() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = Record::default();
        record.add(Figure::new("clone", "ms", vec![12.5, 13.0, 12.0]));
        record.add(Figure::new("QEMU", "ms", vec![25.0]));
        record.add(Figure::new("clone, speed", "MiB/s", vec![100.0]));
        let paths = draw_all(folder.path(), "boot", &record).unwrap();
        assert_eq!(paths.len(), 2);
        let svg = std::fs::read_to_string(folder.path().join("boot-ms.svg")).unwrap();
        for text in ["clone", "QEMU", "12.50", "25.00", "13.00"] {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
        assert!(!svg.contains("speed"));
    }

    #[test]
    fn a_bar_is_as_long_as_its_median_and_names_are_escaped() {
        let ours = Figure::new("clone <a&b>", "ms", vec![1.0]);
        let theirs = Figure::new("QEMU", "ms", vec![2.0]);
        let svg = draw("t", &[&ours, &theirs]);
        let whole = f64::from(WIDTH - LEFT - RIGHT);
        for (width, colour) in [(whole / 2.0, OURS), (whole, THEIRS)] {
            let bar = format!("width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"");
            assert!(svg.contains(&bar), "{bar} is not in {svg}");
        }
        assert!(svg.contains("clone &lt;a&amp;b>"), "{svg}");
    }
}
