//! What a run gives: `results.json`. Its schema is `benches/results.schema.json`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bars::Verdict;
use crate::catalogue::{Better, FigureKind};
use crate::host::Host;
use crate::side::{CALLS, OURS};
use crate::stats::{Ratio, Summary};

/// The version of this form.
pub const VERSION: u32 = 1;

/// All of a run.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Results {
    /// [`VERSION`].
    pub version: u32,
    /// When it began, RFC 3339.
    pub began: String,
    /// How long it took.
    pub seconds: f64,
    /// The command that gave it.
    pub command: String,
    /// Whether it was ended early by a signal.
    pub interrupted: bool,
    /// The machine.
    pub host: Host,
    /// Those that were compared.
    pub sides: Vec<Program>,
    /// Those that were asked for and left out.
    pub absent: Vec<Absent>,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// The bars, and whether they were held.
    pub bars: Vec<Verdict>,
}

/// A program that took part.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// Its name in [`Cell::side`].
    pub side: String,
    /// Whether it is a VMM; otherwise it is a bare KVM program.
    pub vmm: bool,
    /// Where it lies.
    pub path: String,
    /// What it says of its version.
    pub version: String,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

/// A peer that was left out.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Absent {
    /// Its name.
    pub side: String,
    /// Why.
    pub reason: String,
}

/// One quantity, on all sides.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// Its name.
    pub id: String,
    /// The benchmark it is from.
    pub benchmark: String,
    /// What it is, in words.
    pub title: String,
    /// The unit of all values.
    pub unit: String,
    /// Whether more is better.
    pub better: Better,
    /// What [`Cell::at`] is, if the figure is a curve.
    pub axis: Option<String>,
    /// One for each side and place on the axis.
    pub cells: Vec<Cell>,
    /// Ours against each other side.
    pub comparisons: Vec<Comparison>,
}

/// What one side gave.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// The side.
    pub side: String,
    /// The place on the figure's axis.
    pub at: Option<f64>,
    /// What the values come to; nothing if there are none.
    pub summary: Option<Summary>,
    /// The values.
    pub samples: Vec<Sample>,
    /// Attempts that gave no value.
    pub failures: Vec<Refusal>,
    /// Why nothing was tried, if so.
    pub not_offered: Option<String>,
}

/// One value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// The round; values of one round belong together.
    pub round: u32,
    /// The value, in the figure's unit.
    pub value: f64,
}

/// An attempt without a value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// The round.
    pub round: u32,
    /// One line.
    pub reason: String,
    /// The ends of the logs.
    pub log: String,
}

/// Ours beside another side, round by round.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// The other side.
    pub against: String,
    /// The place on the figure's axis.
    pub at: Option<f64>,
    /// Ours divided by the other's.
    pub ratio: Ratio,
}

impl Cell {
    fn new(side: &str, at: Option<f64>) -> Self {
        Self {
            side: side.to_owned(),
            at,
            summary: None,
            samples: Vec::new(),
            failures: Vec::new(),
            not_offered: None,
        }
    }

    /// The values alone.
    pub fn values(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.value).collect()
    }
}

impl Figure {
    /// An empty one.
    pub fn new(benchmark: &str, kind: &FigureKind) -> Self {
        Self {
            id: kind.id.to_owned(),
            benchmark: benchmark.to_owned(),
            title: kind.title.to_owned(),
            unit: kind.unit.to_owned(),
            better: kind.better,
            axis: kind.axis.map(str::to_owned),
            cells: Vec::new(),
            comparisons: Vec::new(),
        }
    }

    /// The cell of a side, made if it is not there.
    pub fn cell(&mut self, side: &str, at: Option<f64>) -> &mut Cell {
        let found = self
            .cells
            .iter()
            .position(|cell| cell.side == side && cell.at == at);
        let index = found.unwrap_or_else(|| {
            self.cells.push(Cell::new(side, at));
            self.cells.len() - 1
        });
        &mut self.cells[index]
    }

    fn of(&self, side: &str, at: Option<f64>) -> Option<&Cell> {
        let mut cells = self.cells.iter();
        cells.find(|cell| cell.side == side && cell.at == at)
    }

    /// Our cell.
    pub fn ours(&self, at: Option<f64>) -> Option<&Cell> {
        self.of(OURS, at)
    }

    /// What the system calls alone have against a side: what no VMM that makes the same calls can pass.
    pub fn calls_against(&self, side: &str, at: Option<f64>) -> Option<Ratio> {
        Ratio::of(pairs(self.of(CALLS, at)?, self.of(side, at)?))
    }

    /// Computes what follows from the values.
    pub fn conclude(&mut self) {
        for cell in &mut self.cells {
            cell.summary = Summary::of(&cell.values());
        }
        let mut comparisons = Vec::new();
        for ours in self.cells.iter().filter(|cell| cell.side == OURS) {
            let others = self
                .cells
                .iter()
                .filter(|cell| cell.side != OURS && cell.at == ours.at);
            for other in others {
                if let Some(ratio) = Ratio::of(pairs(ours, other)) {
                    comparisons.push(Comparison {
                        against: other.side.clone(),
                        at: ours.at,
                        ratio,
                    });
                }
            }
        }
        self.comparisons = comparisons;
    }

    /// The comparison with a side.
    pub fn against(&self, side: &str, at: Option<f64>) -> Option<&Ratio> {
        let found = self
            .comparisons
            .iter()
            .find(|c| c.against == side && c.at == at);
        found.map(|comparison| &comparison.ratio)
    }
}

fn pairs(ours: &Cell, theirs: &Cell) -> Vec<(f64, f64)> {
    let pair = |sample: &Sample| {
        let other = theirs
            .samples
            .iter()
            .find(|other| other.round == sample.round)?;
        Some((sample.value, other.value))
    };
    ours.samples.iter().filter_map(pair).collect()
}

impl Results {
    /// Whether some attempt failed.
    pub fn has_failures(&self) -> bool {
        let mut cells = self.figures.iter().flat_map(|figure| &figure.cells);
        cells.any(|cell| !cell.failures.is_empty())
    }

    /// The figure of that id.
    pub fn figure(&self, id: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.id == id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::figure;

    #[test]
    fn only_values_of_the_same_round_are_compared() {
        let mut figure = Figure::new("start", figure("start.life").unwrap());
        for (side, values) in [(OURS, [(0, 2.0), (1, 4.0)]), ("qemu", [(1, 8.0), (2, 1.0)])] {
            for (round, value) in values {
                figure
                    .cell(side, None)
                    .samples
                    .push(Sample { round, value });
            }
        }
        figure.conclude();
        let ratio = figure.against("qemu", None).unwrap();
        assert_eq!((ratio.pairs, ratio.median), (1, 0.5));
        assert_eq!(figure.cells.len(), 2);
    }

    /// Whoever reads results.json can rely on the schema: it changes only on purpose, with [`VERSION`].
    #[test]
    fn the_schema_is_the_one_that_is_published() {
        let schema = schemars::schema_for!(Results);
        let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/results.schema.json");
        if std::env::var_os("LEPTON_ACCEPT").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        let published = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            published == text,
            "the form of results.json changed: LEPTON_ACCEPT=1 cargo test -p lepton-benches writes the new schema"
        );
    }
}
