//! The figures of the page, as SVG that takes its colours from the page's style sheet.
//!
//! The drawing uses each colour of the palette as it is on a light page; [`style`] exchanges them by attribute on a
//! dark one. Bars are drawn with their labels above them, so that they can be read on a phone.

use std::fmt::Write;
use std::ops::Range;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::ReportError;
use super::curves::{Curve, Points, thinned};
use super::units::printable;

/// What the axes of a line chart say.
pub(super) struct Axes {
    pub x: &'static str,
    pub y: &'static str,
    /// Few points, as of rounds, are marked.
    pub marked: bool,
}

/// A line for each participant and a heavy one for their mean.
pub(super) fn lines(curve: &Curve, axes: &Axes) -> Result<String, ReportError> {
    let drawn: Vec<Points> =
        curve.by_participant.values().take(LINES_MAX).map(|points| thinned(points, POINTS_MAX)).collect();
    let mean = thinned(&curve.mean, POINTS_MAX);
    let (x, y) = ranges(drawn.iter().flatten().chain(&mean));
    let mut svg = String::new();
    draw_lines(&mut svg, (&drawn, &mean), (x, y), axes).map_err(|error| ReportError::Figure(error.to_string()))?;
    Ok(svg)
}

/// Lines of participants that are drawn, the mean being that of all.
pub(super) const LINES_MAX: usize = 40;
/// Points of one line: about as many as a screen has columns for.
const POINTS_MAX: usize = 240;
const WIDTH: u32 = 430;
const LINES_HEIGHT: u32 = 290;

type Problem = DrawingAreaErrorKind<std::io::Error>;

fn draw_lines(
    svg: &mut String,
    (drawn, mean): (&[Points], &[(u32, f64)]),
    (x, y): (Range<u32>, Range<f64>),
    axes: &Axes,
) -> Result<(), Problem> {
    let area = SVGBackend::with_string(svg, (WIDTH, LINES_HEIGHT)).into_drawing_area();
    let mut builder = ChartBuilder::on(&area);
    builder.margin(6).margin_right(16).x_label_area_size(46).y_label_area_size(64);
    let mut chart = builder.build_cartesian_2d(x, y)?;
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK.color());
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.color())
        .axis_style(GRID.color())
        .label_style(text(17))
        .axis_desc_style(text(17))
        .x_labels(5)
        .y_labels(6)
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .x_desc(axes.x)
        .y_desc(axes.y)
        .draw()?;
    let many = drawn.len() > SERIES.len();
    for (index, points) in drawn.iter().enumerate() {
        let color = if many { CROWD.color() } else { SERIES[index].color() };
        let width = if axes.marked && !many { 2 } else { 1 };
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(width)))?;
        if axes.marked && !many {
            chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, color.filled())))?;
        }
    }
    chart.draw_series(LineSeries::new(mean.iter().copied(), INK.color().stroke_width(3)))?;
    if axes.marked {
        chart.draw_series(mean.iter().map(|point| Circle::new(*point, 4, INK.color().filled())))?;
    }
    area.present()
}

/// Ranges that hold all points with some air, and are never empty.
fn ranges<'a>(points: impl Iterator<Item = &'a (u32, f64)>) -> (Range<u32>, Range<f64>) {
    let whole = (u32::MAX, 0, f64::INFINITY, f64::NEG_INFINITY);
    let (x_min, x_max, y_min, y_max) = points.fold(whole, |(x_min, x_max, y_min, y_max), (x, y)| {
        (x_min.min(*x), x_max.max(*x), y_min.min(*y), y_max.max(*y))
    });
    let x = if x_min < x_max { x_min..x_max } else { x_max.saturating_sub(1)..x_max.saturating_add(1) };
    let air = ((y_max - y_min) * 0.06).max(y_max.abs() * 1e-3).max(1e-6);
    // Points that are not there leave infinities, and losses near the largest float overflow.
    let y = y_min - air..y_max + air;
    if (y.end - y.start).is_finite() { (x, y) } else { (x, 0.0..1.0) }
}

/// One bar of two parts, and the text above it.
pub(super) struct Bar {
    pub label: String,
    pub value: String,
    pub parts: [f64; 2],
}

/// Horizontal bars on one scale.
pub(super) fn bars(bars: &[Bar]) -> Result<String, ReportError> {
    let mut svg = String::new();
    draw_bars(&mut svg, bars).map_err(|error| ReportError::Figure(error.to_string()))?;
    Ok(svg)
}

const BAR_ROW: i32 = 42;
const BAR_HEIGHT: i32 = 14;
/// Characters of a label that fit beside its value.
const LABEL_CHARS_MAX: usize = 22;

fn draw_bars(svg: &mut String, bars: &[Bar]) -> Result<(), Problem> {
    let height = BAR_ROW * bars.len() as i32 + 4;
    let area = SVGBackend::with_string(svg, (WIDTH, height as u32)).into_drawing_area();
    let parts = |bar: &Bar| bar.parts.map(|part| if part.is_finite() { part.max(0.0) } else { 0.0 });
    let longest = bars.iter().map(|bar| parts(bar).iter().sum::<f64>()).fold(0.0, f64::max);
    let pixels = |value: f64| if longest > 0.0 { (value / longest * f64::from(WIDTH)).round() as i32 } else { 0 };
    let text = |h_pos| ("sans-serif", 17).into_font().color(&INK.color()).pos(Pos::new(h_pos, VPos::Bottom));
    for (index, bar) in bars.iter().enumerate() {
        let top = BAR_ROW * index as i32 + 24;
        let [first, second] = parts(bar);
        let (middle, end) = (pixels(first), pixels(first + second));
        area.draw(&Text::new(shortened(&bar.label), (0, top - 2), text(HPos::Left)))?;
        area.draw(&Text::new(bar.value.clone(), (WIDTH as i32, top - 2), text(HPos::Right)))?;
        let bottom = top + BAR_HEIGHT;
        area.draw(&Rectangle::new([(0, top), (WIDTH as i32, bottom)], TRACK.color().filled()))?;
        area.draw(&Rectangle::new([(0, top), (middle, bottom)], SERIES[0].color().filled()))?;
        area.draw(&Rectangle::new([(middle, top), (end, bottom)], SERIES[1].color().filled()))?;
    }
    area.present()
}

fn shortened(label: &str) -> String {
    let label = printable(label);
    if label.chars().count() <= LABEL_CHARS_MAX {
        return label;
    }
    label.chars().take(LABEL_CHARS_MAX - 1).chain(['…']).collect()
}

/// A colour on a light page and on a dark one.
struct Shade {
    light: (u8, u8, u8),
    dark: &'static str,
}

impl Shade {
    const fn new(light: (u8, u8, u8), dark: &'static str) -> Self {
        Self { light, dark }
    }

    fn color(&self) -> RGBColor {
        let (red, green, blue) = self.light;
        RGBColor(red, green, blue)
    }
}

const INK: Shade = Shade::new((0x1C, 0x1D, 0x21), "#ECECF1");
const GRID: Shade = Shade::new((0xD6, 0xD8, 0xDE), "#3A3D46");
const TRACK: Shade = Shade::new((0xEC, 0xED, 0xF1), "#2A2C34");
/// Participants too many to be told apart.
const CROWD: Shade = Shade::new((0x9A, 0xB0, 0xCC), "#4F6685");
/// Told apart also by those who do not see red and green as different (after Okabe and Ito).
const SERIES: [Shade; 8] = [
    Shade::new((0x00, 0x6F, 0xB2), "#56A8E8"),
    Shade::new((0xE0, 0x96, 0x00), "#F0B23C"),
    Shade::new((0x00, 0x95, 0x6C), "#2FC79A"),
    Shade::new((0xC4, 0x4E, 0x00), "#F07A3A"),
    Shade::new((0xB8, 0x5F, 0x94), "#DE8FBD"),
    Shade::new((0x3D, 0xA5, 0xDC), "#8CCBF2"),
    Shade::new((0x8A, 0x80, 0x00), "#D6CC45"),
    Shade::new((0x6B, 0x6E, 0x7A), "#A3A7B5"),
];

/// Style rules for the figures and for the legends' `.key0`, `.key1`, …, `.crowd` and `.mean`.
pub(super) fn style() -> String {
    let mut light = String::new();
    let mut dark = String::new();
    let keys = (0..SERIES.len()).map(|index| format!("key{index}"));
    let named = SERIES.iter().zip(keys).chain([(&CROWD, "crowd".to_owned()), (&INK, "mean".to_owned())]);
    // Writing into a string cannot fail.
    for (shade, key) in named {
        let (red, green, blue) = shade.light;
        let _ = writeln!(light, ".{key}{{background:#{red:02X}{green:02X}{blue:02X}}}");
        let _ = writeln!(dark, ".{key}{{background:{}}}", shade.dark);
    }
    for Shade { light: (red, green, blue), dark: shade } in SERIES.iter().chain([&INK, &GRID, &TRACK, &CROWD]) {
        let hex = format!("#{red:02X}{green:02X}{blue:02X}");
        let _ = writeln!(dark, "svg [fill=\"{hex}\"]{{fill:{shade}}}svg [stroke=\"{hex}\"]{{stroke:{shade}}}");
    }
    format!("{light}@media (prefers-color-scheme:dark){{\n{dark}}}\n")
}

/// The key of the line at `index` among `count` lines, as [`lines`] colours it.
pub(super) fn key(index: usize, count: usize) -> String {
    if count > SERIES.len() { String::from("crowd") } else { format!("key{index}") }
}
