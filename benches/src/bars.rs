//! The speed that is wanted, and whether it was held.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalogue::{self, Better};
use crate::number;
use crate::report::ratio_text;
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

/// In the place of another side: the bound is of our value, not of a ratio.
const ITSELF: &str = "itself";

const BARS: &[Bar] = &[
    bar("start.socket", "firecracker", 0.8),
    bar("start.api-128m", "floor-split", 1.5),
    bar("start.api-4g", "floor-split", 1.5),
    bar("start.first-instruction", "firecracker", 0.25),
    bar("start.life", "floor-split", 1.15),
    bar("start.life", "firecracker", 0.55),
    bar("weight.devices", "firecracker", 0.6),
    bar("weight.after-io", "firecracker", 0.6),
    bar("density.rate", "firecracker", 2.0),
    bar("density.idle-cpu", ITSELF, 1.0),
    bar("clone.first-instruction", ITSELF, 1.0),
    bar("clone.idle", ITSELF, 1.0),
    bar("clone.pool-warm", ITSELF, 1.0),
    bar("clone.pool-cold", ITSELF, 5.0),
    bar("clone.idle-pool-warm", ITSELF, 1.0),
    bar("clone.idle-pool-cold", ITSELF, 5.0),
    bar("clone.pause-128m", ITSELF, 1.0),
    bar("clone.pause-1g", ITSELF, 5.0),
    bar("clone.hundred", ITSELF, 150.0),
    bar("clone.thousand", ITSELF, 2000.0),
    bar("clone.thousand-own", ITSELF, 300.0),
    bar("snapshot.load-told-128m", ITSELF, 1.0),
    bar("snapshot.load-told-4g", ITSELF, 1.2),
    bar("confinement.added", ITSELF, 2.0),
    bar("confinement.reads-kept", ITSELF, 0.97),
    bar("unique.share", ITSELF, 0.15),
    bar("exits.port-write", "floor-split", 1.05),
    bar("exits.mmio-write", "floor-split", 1.05),
    bar("exits.mmio-read", "floor-split", 1.05),
    bar("blk.read-1-sync", "firecracker", 1.3),
    bar("blk.read-1-async", "firecracker", 1.3),
    bar("blk.read-32-sync", "firecracker", 1.3),
    bar("blk.read-32-async", "firecracker", 1.3),
    bar("blk.large-sync", "firecracker", 1.3),
    bar("blk.large-async", "firecracker", 1.3),
    bar("blk.read-32-sync-cpu", "firecracker", 1.0),
    bar("blk.read-32-async-cpu", "firecracker", 1.0),
    bar("net.send-64", "firecracker", 1.3),
    bar("net.send-64-cpu", "firecracker", 1.0),
    bar("net.send-1514", "firecracker", 1.3),
    bar("net.send-1514-cpu", "firecracker", 1.0),
    bar("net.send-64k", "firecracker", 1.3),
    bar("net.receive-64", "firecracker", 1.3),
    bar("net.receive-64-cpu", "firecracker", 1.0),
    bar("net.receive-1514", "firecracker", 1.3),
    bar("net.receive-1514-cpu", "firecracker", 1.0),
    bar("net.receive-64k", "firecracker", 1.3),
    bar("net.send-64k-cpu", "firecracker", 1.0),
    bar("net.receive-64k-cpu", "firecracker", 1.0),
    bar("vsock.send-1", "firecracker", 1.5),
    bar("vsock.send-32", "firecracker", 1.5),
    bar("vsock.receive-1", "firecracker", 1.5),
    bar("vsock.receive-32", "firecracker", 1.5),
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
    /// The wanted ratio of ours to the other side's; where that is `itself`, the wanted value.
    pub bound: f64,
    /// The measured ratio.
    pub ratio: Option<Ratio>,
    /// The measured median of ours, where that has the bound.
    pub value: Option<f64>,
    /// How the bar was met.
    pub outcome: Outcome,
}

impl Verdict {
    /// What was measured, as text; empty if nothing was.
    pub fn measured(&self) -> String {
        let ratio = self.ratio.as_ref().map(ratio_text);
        ratio.or(self.value.map(number)).unwrap_or_default()
    }
}

/// Judges the figures of the benchmarks that were run.
pub fn judge(figures: &[Figure]) -> Vec<Verdict> {
    let verdict = |bar: &Bar| {
        let kind = catalogue::figure(bar.figure)?;
        let figure = figures.iter().find(|figure| figure.id == bar.figure)?;
        let ratio = figure.against(bar.against, bar.at).copied();
        let value = match bar.against {
            ITSELF => figure
                .ours(bar.at)
                .and_then(|cell| cell.summary)
                .map(|summary| summary.p50),
            _ => None,
        };
        let outcome = match (ratio.map(|ratio| ratio.median).or(value), kind.better) {
            (None, _) => Outcome::NotMeasured,
            (Some(median), Better::Lower) if median <= bar.bound => Outcome::Held,
            (Some(median), Better::Higher) if median >= bar.bound => Outcome::Held,
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
            value,
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

    #[test]
    fn a_bound_can_be_of_the_value_itself() {
        let mut figure = Figure::new("density", catalogue::figure("density.idle-cpu").unwrap());
        let sample = Sample {
            round: 0,
            value: 1.5,
        };
        figure.cell("lepton", None).samples.push(sample);
        figure.conclude();
        let verdict = judge(&[figure]).remove(0);
        assert_eq!(verdict.outcome, Outcome::Missed);
        assert_eq!(verdict.measured(), "1.5");
    }
}
