//! `report.html`: one file for a person, with nothing to load from elsewhere.

mod plot;

use askama::Template;

use crate::bars::{Outcome, Verdict};
use crate::catalogue::Better;
use crate::number;
use crate::results::{Cell, Figure, Results};
use crate::side::OURS;
use crate::stats::Ratio;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A plot could not be drawn.
    #[error("plot of {figure}: {reason}")]
    Plot {
        /// The figure's id.
        figure: String,
        /// Why.
        reason: String,
    },
    /// The page could not be put together.
    #[error("report: {0}")]
    Page(#[from] askama::Error),
}

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    results: &'a Results,
    took: String,
    overview: Option<String>,
    bars: Vec<BarRow>,
    benchmarks: Vec<Section<'a>>,
}

struct BarRow {
    title: String,
    against: String,
    wanted: String,
    measured: String,
    outcome: &'static str,
    class: &'static str,
}

struct Section<'a> {
    name: &'a str,
    about: &'static str,
    figures: Vec<Panel<'a>>,
}

struct Panel<'a> {
    figure: &'a Figure,
    hint: &'static str,
    plot: Option<String>,
    rows: Vec<Row<'a>>,
}

struct Row<'a> {
    cell: &'a Cell,
    at: String,
    numbers: Option<[String; 6]>,
    ratio: String,
}

/// The report of a run.
pub fn html(results: &Results) -> Result<String, ReportError> {
    let mut benchmarks: Vec<Section<'_>> = Vec::new();
    for figure in &results.figures {
        if benchmarks
            .last()
            .is_none_or(|last| last.name != figure.benchmark)
        {
            let known = crate::catalogue::BENCHMARKS.iter();
            let about = known.into_iter().find(|b| b.name == figure.benchmark);
            benchmarks.push(Section {
                name: &figure.benchmark,
                about: about.map_or("", |benchmark| benchmark.about()),
                figures: Vec::new(),
            });
        }
        if let Some(section) = benchmarks.last_mut() {
            section.figures.push(panel(figure)?);
        }
    }
    let page = Page {
        results,
        took: humantime::format_duration(std::time::Duration::from_secs(results.seconds as u64))
            .to_string(),
        overview: plot::overview(&results.figures)?,
        bars: results
            .bars
            .iter()
            .map(|bar| bar_row(results, bar))
            .collect(),
        benchmarks,
    };
    Ok(page.render()?)
}

fn panel(figure: &Figure) -> Result<Panel<'_>, ReportError> {
    let rows = figure.cells.iter().map(|cell| Row {
        cell,
        at: cell.at.map(number).unwrap_or_default(),
        numbers: cell.summary.map(|s| {
            let numbers = [s.min, s.p50, s.p90, s.p99, s.max].map(number);
            let [min, p50, p90, p99, max] = numbers;
            [s.rounds.to_string(), min, p50, p90, p99, max]
        }),
        ratio: match figure.against(&cell.side, cell.at) {
            Some(ratio) => ratio_text(ratio),
            None if cell.side == OURS => "-".to_owned(),
            None => String::new(),
        },
    });
    Ok(Panel {
        figure,
        hint: match figure.better {
            Better::Lower => "less is better",
            Better::Higher => "more is better",
        },
        plot: match figure.axis {
            Some(_) => plot::curve(figure)?,
            None => plot::distribution(figure)?,
        },
        rows: rows.collect(),
    })
}

/// A ratio with its interval.
pub fn ratio_text(ratio: &Ratio) -> String {
    match ratio.interval {
        Some(interval) => format!(
            "{} ({} to {})",
            number(ratio.median),
            number(interval.low),
            number(interval.high)
        ),
        None => format!("{} (n = {})", number(ratio.median), ratio.pairs),
    }
}

fn bar_row(results: &Results, verdict: &Verdict) -> BarRow {
    let (outcome, class) = match verdict.outcome {
        Outcome::Held => ("held", "held"),
        Outcome::Missed => ("missed", "missed"),
        Outcome::NotMeasured => ("not measured", "unmeasured"),
    };
    let sign = match verdict.better {
        Better::Lower => "\u{2264}",
        Better::Higher => "\u{2265}",
    };
    let at = verdict.at.map(|at| format!(" at {}", number(at)));
    let calls = results
        .figure(&verdict.figure)
        .and_then(|figure| figure.calls_against(&verdict.against, verdict.at))
        .map(|ratio| format!("; the calls alone {}", number(ratio.median)));
    BarRow {
        title: verdict.title.clone() + &at.unwrap_or_default(),
        against: verdict.against.clone(),
        wanted: format!("{sign} {}", number(verdict.bound)),
        measured: verdict.measured() + &calls.unwrap_or_default(),
        outcome,
        class,
    }
}

#[cfg(test)]
mod tests;
