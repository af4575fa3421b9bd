//! The speed that is wanted, and whether it was held.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalogue::{self, Better};
use crate::results::Figure;
use crate::stats::Ratio;

/// A wanted ratio of ours to another side.
struct Bar {
    figure: &'static str,
    at: Option<f64>,
    against: &'static str,
    bound: f64,
}

const fn bar(figure: &'static str, against: &'static str, bound: f64) -> Bar {
    Bar {
        figure,
        at: None,
        against,
        bound,
    }
}

const BARS: &[Bar] = &[
    bar("start.socket", "firecracker", 0.8),
    bar("start.api-128m", "floor-split", 1.5),
    bar("start.api-4g", "floor-split", 1.5),
    bar("start.first-instruction", "firecracker", 0.25),
    bar("start.life", "floor-split", 1.15),
    bar("start.life", "firecracker", 0.55),
    bar("weight.devices", "firecracker", 0.6),
];

/// How a bar was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The median of the ratios is on the right side.
    Held,
    /// It is not.
    Missed,
    /// One of the two sides has no values.
    NotMeasured,
}

/// A bar and what was measured.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// The figure's id.
    pub figure: String,
    /// What it is, in words.
    pub title: String,
    /// The other side.
    pub against: String,
    /// The place on the figure's axis.
    pub at: Option<f64>,
    /// Whether the ratio has to be at most or at least [`Verdict::bound`].
    pub better: Better,
    /// The wanted ratio of ours to the other side's.
    pub bound: f64,
    /// What was measured.
    pub ratio: Option<Ratio>,
    /// How the bar was met.
    pub outcome: Outcome,
}

/// Judges the figures of the benchmarks that were run.
pub fn judge(figures: &[Figure]) -> Vec<Verdict> {
    let verdict = |bar: &Bar| {
        let kind = catalogue::figure(bar.figure)?;
        let figure = figures.iter().find(|figure| figure.id == bar.figure)?;
        let ratio = figure.against(bar.against, bar.at).copied();
        let outcome = match (ratio, kind.better) {
            (None, _) => Outcome::NotMeasured,
            (Some(ratio), Better::Lower) if ratio.median <= bar.bound => Outcome::Held,
            (Some(ratio), Better::Higher) if ratio.median >= bar.bound => Outcome::Held,
            (Some(_), _) => Outcome::Missed,
        };
        Some(Verdict {
            figure: bar.figure.to_owned(),
            title: kind.title.to_owned(),
            against: bar.against.to_owned(),
            at: bar.at,
            better: kind.better,
            bound: bar.bound,
            ratio,
            outcome,
        })
    };
    BARS.iter().filter_map(verdict).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Sample;

    #[test]
    fn bars_are_of_figures_that_exist() {
        for bar in BARS {
            assert!(catalogue::figure(bar.figure).is_some(), "{}", bar.figure);
        }
    }

    #[test]
    fn held_missed_and_not_measured() {
        let kind = catalogue::figure("start.socket").unwrap();
        let outcome = |ours: f64, theirs: Option<f64>| {
            let mut figure = Figure::new("start", kind);
            let cells = [("lepton", Some(ours)), ("firecracker", theirs)];
            for (side, value) in cells {
                if let Some(value) = value {
                    figure
                        .cell(side, None)
                        .samples
                        .push(Sample { round: 0, value });
                }
            }
            figure.conclude();
            let verdicts = judge(&[figure]);
            assert_eq!(verdicts.len(), 1);
            verdicts[0].outcome
        };
        assert_eq!(outcome(0.8, Some(1.0)), Outcome::Held);
        assert_eq!(outcome(0.81, Some(1.0)), Outcome::Missed);
        assert_eq!(outcome(0.81, None), Outcome::NotMeasured);
    }
}
