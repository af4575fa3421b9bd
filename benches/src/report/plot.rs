//! Plots as SVG, drawn by `plotters`.
//!
//! The colours written here are those of the light page; the page's style sheet replaces them in the dark.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::ReportError;
use crate::number;
use crate::results::{Cell, Figure};
use crate::side::OURS;

const SIZE: (u32, u32) = (640, 300);
/// The colours of Okabe and Ito, told apart by nearly every eye.
const COLOURS: [(&str, RGBColor); 7] = [
    (OURS, RGBColor(0x00, 0x72, 0xb2)),
    ("firecracker", RGBColor(0xd5, 0x5e, 0x00)),
    ("qemu", RGBColor(0x00, 0x9e, 0x73)),
    ("cloud-hypervisor", RGBColor(0xcc, 0x79, 0xa7)),
    ("floor-split", RGBColor(0x50, 0x50, 0x50)),
    ("floor-full", RGBColor(0x80, 0x80, 0x80)),
    ("floor-none", RGBColor(0xa0, 0xa0, 0xa0)),
];
const INK: RGBColor = RGBColor(0x11, 0x11, 0x11);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
/// An axis over more than this is logarithmic.
const WIDE: f64 = 10.0;

fn colour(side: &str) -> RGBColor {
    let found = COLOURS.iter().find(|(id, _)| *id == side);
    found.map_or(INK, |(_, colour)| *colour)
}

/// Ours is drawn last, over the others.
fn drawn_last(side: &str) -> bool {
    side == OURS
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Points = Vec<(f64, f64)>;
type Drawn = Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

fn svg(
    id: &str,
    size: (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> Drawn,
) -> Result<String, ReportError> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let drawn = draw(&area).and_then(|()| area.present());
        drawn.map_err(|error| ReportError::Plot {
            figure: id.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(text)
}

/// Draws lines over a mesh.
fn lines<X>(
    area: &Area<'_>,
    x: X,
    y: std::ops::Range<f64>,
    labels: [&str; 2],
    all: &[(String, Points)],
) -> Drawn
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(38)
        .y_label_area_size(56)
        .build_cartesian_2d(x, y)?;
    let [x_label, y_label] = labels;
    chart
        .configure_mesh()
        .axis_style(INK)
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .label_style(("sans-serif", 12).into_font().color(&INK))
        .x_labels(8)
        .y_labels(6)
        .x_label_formatter(&|value| number(*value))
        .y_label_formatter(&|value| number(*value))
        .x_desc(x_label)
        .y_desc(y_label)
        .draw()?;
    let mut order: Vec<&(String, Points)> = all.iter().collect();
    order.sort_by_key(|(side, _)| drawn_last(side));
    for (side, points) in order {
        let colour = colour(side);
        let width = if drawn_last(side) { 3 } else { 2 };
        let style = colour.stroke_width(width);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(side)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .label_font(("sans-serif", 12).into_font().color(&INK))
        .border_style(TRANSPARENT)
        .draw()?;
    Ok(())
}

fn bounds(values: impl Iterator<Item = f64> + Clone) -> Option<(f64, f64)> {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    (low.is_finite() && high.is_finite()).then_some((low, high))
}

/// Each side's distribution: the share of rounds (vertical) that took no more than a value (horizontal).
pub fn distribution(figure: &Figure) -> Result<Option<String>, ReportError> {
    let sides: Vec<(String, Points)> = figure
        .cells
        .iter()
        .filter(|cell| !cell.samples.is_empty())
        .map(|cell| (cell.side.clone(), steps(cell)))
        .collect();
    let values = sides
        .iter()
        .flat_map(|(_, points)| points)
        .map(|(value, _)| *value);
    let Some((low, high)) = bounds(values) else {
        return Ok(None);
    };
    let labels = [figure.unit.as_str(), "share of rounds"];
    svg(&figure.id, SIZE, |area| {
        if low > 0.0 && high / low > WIDE {
            lines(
                area,
                (low / 1.1..high * 1.1).log_scale(),
                0.0..1.0,
                labels,
                &sides,
            )
        } else {
            let margin = ((high - low) * 0.05).max(high.abs() * 0.01).max(1e-9);
            lines(area, low - margin..high + margin, 0.0..1.0, labels, &sides)
        }
    })
    .map(Some)
}

/// The empirical distribution function as a line of steps.
fn steps(cell: &Cell) -> Points {
    let mut values = cell.values();
    values.sort_by(f64::total_cmp);
    let share = |count: usize| count as f64 / values.len() as f64;
    let corners =
        |(index, value): (usize, &f64)| [(*value, share(index)), (*value, share(index + 1))];
    values.iter().enumerate().flat_map(corners).collect()
}

/// Each side's median along the axis.
pub fn curve(figure: &Figure) -> Result<Option<String>, ReportError> {
    let mut sides: Vec<(String, Points)> = Vec::new();
    for cell in &figure.cells {
        let (Some(at), Some(summary)) = (cell.at, cell.summary) else {
            continue;
        };
        let point = (at, summary.p50);
        match sides.iter_mut().find(|(side, _)| *side == cell.side) {
            Some((_, points)) => points.push(point),
            None => sides.push((cell.side.clone(), vec![point])),
        }
    }
    let points = sides.iter().flat_map(|(_, points)| points);
    let along = bounds(points.clone().map(|(at, _)| *at));
    let (Some((from, to)), Some((_, high))) = (along, bounds(points.map(|(_, value)| *value)))
    else {
        return Ok(None);
    };
    let axis = figure.axis.as_deref().unwrap_or_default();
    let y = 0.0..(high * 1.05).max(1e-9);
    svg(&figure.id, SIZE, |area| {
        let margin = ((to - from) * 0.02).max(1e-9);
        lines(
            area,
            from - margin..to + margin,
            y,
            [axis, &figure.unit],
            &sides,
        )
    })
    .map(Some)
}

/// All ratios of ours to the others' on one logarithmic axis, with their intervals: left of one is less than theirs.
pub fn overview(figures: &[Figure]) -> Result<Option<String>, ReportError> {
    let rows: Vec<(&Figure, &crate::results::Comparison)> = figures
        .iter()
        .flat_map(|figure| figure.comparisons.iter().map(move |c| (figure, c)))
        .filter(|(figure, _)| figure.axis.is_none())
        .collect();
    let ends = rows.iter().flat_map(|(_, comparison)| {
        let ratio = comparison.ratio;
        let interval = ratio
            .interval
            .map_or([ratio.median; 2], |i| [i.low, i.high]);
        interval.into_iter().chain([ratio.median])
    });
    let Some((low, high)) = bounds(ends.filter(|ratio| *ratio > 0.0)) else {
        return Ok(None);
    };
    let x = (low.min(0.8) / 1.2..high.max(1.25) * 1.2).log_scale();
    let count = rows.len();
    let height = 60 + 18 * u32::try_from(count).unwrap_or(100).min(400);
    svg("overview", (760, height), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .x_label_area_size(38)
            .y_label_area_size(260)
            .build_cartesian_2d(x, 0.0..count as f64)?;
        let name = |at: &f64| {
            // Rows from the top down.
            let index = (count as f64 - at) as usize;
            let row = rows.get(index.min(count.saturating_sub(1)));
            row.map_or_else(String::new, |(figure, c)| {
                format!("{} / {}", figure.id, c.against)
            })
        };
        chart
            .configure_mesh()
            .axis_style(INK)
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .disable_y_mesh()
            .y_labels(0)
            .label_style(("sans-serif", 12).into_font().color(&INK))
            .x_label_formatter(&|value| number(*value))
            .x_desc("ours divided by the other's")
            .draw()?;
        chart.draw_series([PathElement::new([(1.0, 0.0), (1.0, count as f64)], INK)])?;
        for (index, (_, comparison)) in rows.iter().enumerate() {
            let y = count as f64 - index as f64 - 0.5;
            let ratio = comparison.ratio;
            if ratio.median <= 0.0 {
                continue;
            }
            let style = colour(&comparison.against).stroke_width(2);
            if let Some(interval) = ratio.interval.filter(|interval| interval.low > 0.0) {
                let line = PathElement::new([(interval.low, y), (interval.high, y)], style);
                chart.draw_series([line])?;
            }
            chart.draw_series([Circle::new((ratio.median, y), 4, style.filled())])?;
            let at = chart.backend_coord(&(low.min(0.8) / 1.2, y));
            let text = name(&(y + 0.5));
            let position = plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Right,
                plotters::style::text_anchor::VPos::Center,
            );
            let style = ("sans-serif", 12).into_font().color(&INK).pos(position);
            area.draw_text(&text, &style, (at.0 - 6, at.1))?;
        }
        Ok(())
    })
    .map(Some)
}
