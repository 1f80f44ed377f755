//! A plot of a bench: a bar for each figure's median, with a line to its 99th percentile, as SVG
//! and as PNG. Figures of different units get plots of their own.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use crate::record::{Figure, Record};

const WIDTH: i32 = 900;
/// Where bars start: left of it are names.
const LEFT: i32 = 300;
/// Room right of the longest line, for its number.
const RIGHT: i32 = 170;
const TOP: i32 = 56;
const ROW: i32 = 34;
const BAR: i32 = 20;
const OURS: RGBColor = RGBColor(31, 119, 180);
const THEIRS: RGBColor = RGBColor(170, 170, 170);
const INK: RGBColor = RGBColor(40, 40, 40);

/// Draws `record` into `folder`, and returns the PNG files.
pub(crate) fn draw_all(folder: &Path, bench: &str, record: &Record) -> Result<Vec<PathBuf>> {
    static FONT: Once = Once::new();
    let mut registered = true;
    FONT.call_once(|| {
        let font = dejavu::sans::regular();
        registered = register_font("sans-serif", FontStyle::Normal, font).is_ok();
    });
    anyhow::ensure!(registered, "the typeface for plots cannot be read");
    let mut units: Vec<&str> = record.figures.iter().map(|f| f.unit.as_str()).collect();
    units.dedup();
    units.sort_unstable();
    units.dedup();
    let mut paths = Vec::new();
    for unit in units {
        let figures = record.figures.iter().filter(|figure| figure.unit == unit);
        let figures: Vec<&Figure> = figures.collect();
        let height = TOP + ROW * figures.len() as i32 + 16;
        let size = (WIDTH as u32, height as u32);
        let name = format!("{bench}-{}", unit.replace('/', "-per-"));
        let (svg, png) = (
            folder.join(format!("{name}.svg")),
            folder.join(format!("{name}.png")),
        );
        let title = format!("{bench}, {unit}: median, and a line to the 99th percentile");
        draw(
            SVGBackend::new(&svg, size).into_drawing_area(),
            &title,
            &figures,
        )
        .map_err(told(&svg))?;
        draw(
            BitMapBackend::new(&png, size).into_drawing_area(),
            &title,
            &figures,
        )
        .map_err(told(&png))?;
        paths.push(png);
    }
    Ok(paths)
}

/// The errors of plots do not live long enough to be a source.
fn told<E: Display>(path: &Path) -> impl Fn(E) -> anyhow::Error {
    move |error| anyhow!("cannot draw {}: {error}", path.display())
}

type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

fn draw<B: DrawingBackend>(
    area: DrawingArea<B, Shift>,
    title: &str,
    figures: &[&Figure],
) -> Drawn<B> {
    area.fill(&WHITE)?;
    let style = |size: f64, horizontal| {
        let font = ("sans-serif", size).into_font().color(&INK);
        font.pos(Pos::new(horizontal, VPos::Center))
    };
    area.draw(&Text::new(
        title.to_owned(),
        (20, 26),
        style(17.0, HPos::Left),
    ))?;
    let longest = figures.iter().map(|figure| figure.p99.max(figure.p50));
    let longest = longest.fold(f64::MIN_POSITIVE, f64::max);
    let scale = f64::from(WIDTH - LEFT - RIGHT) / longest;
    let x = |value: f64| LEFT + (value * scale).round() as i32;
    let mut middle = TOP + ROW / 2;
    for figure in figures {
        let ours = figure.name.starts_with("clone");
        let colour = if ours { OURS } else { THEIRS };
        let corners = [(LEFT, middle - BAR / 2), (x(figure.p50), middle + BAR / 2)];
        area.draw(&Rectangle::new(corners, colour.filled()))?;
        let line = vec![(x(figure.p50), middle), (x(figure.p99), middle)];
        area.draw(&PathElement::new(line, INK.stroke_width(2)))?;
        let name = (LEFT - 10, middle);
        area.draw(&Text::new(
            figure.name.clone(),
            name,
            style(14.0, HPos::Right),
        ))?;
        let end = x(figure.p50.max(figure.p99)) + 8;
        let number = format!("{:.2} (p99 {:.2})", figure.p50, figure.p99);
        area.draw(&Text::new(number, (end, middle), style(13.0, HPos::Left)))?;
        middle += ROW;
    }
    area.present()
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
        for path in &paths {
            assert!(std::fs::read(path).unwrap().starts_with(b"\x89PNG"));
        }
        let svg = std::fs::read_to_string(folder.path().join("boot-ms.svg")).unwrap();
        for text in ["clone", "QEMU", "12.50", "25.00", "13.00"] {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
        assert!(!svg.contains("speed"));
    }
}
