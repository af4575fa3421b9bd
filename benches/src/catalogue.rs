//! The list of all benchmarks and of the figures they give.

use crate::measure::{self, Case, Context};

/// Whether more is better.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Less is better.
    Lower,
    /// More is better.
    Higher,
}

/// A quantity that is measured on every side.
#[derive(Debug, Clone, Copy)]
pub struct FigureKind {
    /// Its name in results: the benchmark's, a dot, its own.
    pub id: &'static str,
    /// What it is, in words.
    pub title: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Whether more is better.
    pub better: Better,
    /// What grows along the plot, if the figure is a curve.
    pub axis: Option<&'static str>,
}

pub(crate) const fn lower(id: &'static str, title: &'static str, unit: &'static str) -> FigureKind {
    FigureKind {
        id,
        title,
        unit,
        better: Better::Lower,
        axis: None,
    }
}

pub(crate) const fn higher(
    id: &'static str,
    title: &'static str,
    unit: &'static str,
) -> FigureKind {
    FigureKind {
        better: Better::Higher,
        ..lower(id, title, unit)
    }
}

pub(crate) const fn curve(
    id: &'static str,
    title: &'static str,
    unit: &'static str,
    axis: &'static str,
) -> FigureKind {
    FigureKind {
        axis: Some(axis),
        ..lower(id, title, unit)
    }
}

/// A benchmark: what is run together, round by round.
#[derive(Clone, Copy)]
pub struct Benchmark {
    /// Its name on the command line.
    pub name: &'static str,
    /// Rounds unless asked otherwise.
    pub rounds: u32,
    /// Its figures.
    pub figures: &'static [FigureKind],
    /// What is done in each round.
    pub cases: for<'a> fn(&'a Context) -> Vec<Case<'a>>,
}

/// All of them, in the order in which they run.
pub const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "start",
        rounds: 100,
        figures: &[
            lower("start.socket", "Process start to API socket", "ms"),
            lower(
                "start.first-instruction",
                "Process start to first guest instruction, configured by file, 128 MiB",
                "ms",
            ),
            lower(
                "start.api-128m",
                "Start request over the API to first guest instruction, 128 MiB",
                "ms",
            ),
            lower(
                "start.api-4g",
                "Start request over the API to first guest instruction, 4 GiB",
                "ms",
            ),
            lower(
                "start.life",
                "Process start to its end, of a guest that resets at once",
                "ms",
            ),
        ],
        cases: measure::start::cases,
    },
    Benchmark {
        name: "weight",
        rounds: 11,
        figures: &[
            lower(
                "weight.bare",
                "Resident beyond guest memory, no devices",
                "KiB",
            ),
            lower(
                "weight.drive",
                "Resident beyond guest memory, one drive",
                "KiB",
            ),
            lower(
                "weight.devices",
                "Resident beyond guest memory, a drive, an interface and vsock",
                "KiB",
            ),
            lower(
                "weight.after-io",
                "Resident beyond guest memory, a drive, an interface and vsock, each after seconds of load",
                "KiB",
            ),
            lower("weight.program", "Size of the program's file", "KiB"),
        ],
        cases: measure::weight::cases,
    },
    Benchmark {
        name: "growth",
        rounds: 11,
        figures: &[
            curve(
                "growth.vcpus-time",
                "Process start to first guest instruction, by vCPUs",
                "ms",
                "vCPUs",
            ),
            curve(
                "growth.vcpus-weight",
                "Resident beyond guest memory, by vCPUs",
                "KiB",
                "vCPUs",
            ),
            curve(
                "growth.drives-time",
                "Process start to first guest instruction, by drives",
                "ms",
                "drives",
            ),
            curve(
                "growth.drives-weight",
                "Resident beyond guest memory, by drives",
                "KiB",
                "drives",
            ),
            curve(
                "growth.interfaces-time",
                "Process start to first guest instruction, by interfaces",
                "ms",
                "interfaces",
            ),
            curve(
                "growth.interfaces-weight",
                "Resident beyond guest memory, by interfaces",
                "KiB",
                "interfaces",
            ),
            curve(
                "growth.memory-time",
                "Process start to first guest instruction, by memory",
                "ms",
                "MiB",
            ),
            curve(
                "growth.memory-weight",
                "Resident beyond guest memory, by memory",
                "KiB",
                "MiB",
            ),
        ],
        cases: measure::growth::cases,
    },
    Benchmark {
        name: "density",
        rounds: 2,
        figures: &[
            higher(
                "density.rate",
                "Machines started in a second, one after the other, all kept",
                "1/s",
            ),
            lower(
                "density.idle-cpu",
                "Processor time of all of them together, idle",
                "% of one core",
            ),
            lower(
                "density.memory",
                "Memory that the host has less, for each machine",
                "KiB",
            ),
        ],
        cases: measure::density::cases,
    },
    Benchmark {
        name: "clone",
        rounds: 21,
        figures: measure::clone::FIGURES,
        cases: measure::clone::cases,
    },
    Benchmark {
        name: "snapshot",
        rounds: 11,
        figures: measure::snapshot::FIGURES,
        cases: measure::snapshot::cases,
    },
    Benchmark {
        name: "confinement",
        rounds: 51,
        figures: measure::confinement::FIGURES,
        cases: measure::confinement::cases,
    },
    Benchmark {
        name: "exits",
        rounds: 21,
        figures: &[
            lower(
                "exits.port-write",
                "Leaving the guest by a port write and coming back",
                "us",
            ),
            lower(
                "exits.mmio-write",
                "Leaving the guest by an MMIO write and coming back",
                "us",
            ),
            lower(
                "exits.mmio-read",
                "Leaving the guest by an MMIO read and coming back",
                "us",
            ),
            lower(
                "exits.kick",
                "An MMIO write caught by an ioeventfd: a queue's kick",
                "us",
            ),
        ],
        cases: measure::exits::cases,
    },
    Benchmark {
        name: "blk",
        rounds: 7,
        figures: &[
            higher(
                "blk.read-1-sync",
                "4 KiB random reads, one at a time, Sync",
                "ops/s",
            ),
            lower(
                "blk.read-1-sync-cpu",
                "4 KiB random reads, one at a time, Sync: processor time of the VMM and its guest for each",
                "us",
            ),
            higher(
                "blk.read-1-async",
                "4 KiB random reads, one at a time, Async",
                "ops/s",
            ),
            lower(
                "blk.read-1-async-cpu",
                "4 KiB random reads, one at a time, Async: processor time of the VMM and its guest for each",
                "us",
            ),
            higher(
                "blk.read-32-sync",
                "4 KiB random reads, 32 at a time, Sync",
                "ops/s",
            ),
            lower(
                "blk.read-32-sync-cpu",
                "4 KiB random reads, 32 at a time, Sync: processor time of the VMM and its guest for each",
                "us",
            ),
            higher(
                "blk.read-32-async",
                "4 KiB random reads, 32 at a time, Async",
                "ops/s",
            ),
            lower(
                "blk.read-32-async-cpu",
                "4 KiB random reads, 32 at a time, Async: processor time of the VMM and its guest for each",
                "us",
            ),
            higher(
                "blk.write-32-sync",
                "4 KiB random writes, 32 at a time, Sync",
                "ops/s",
            ),
            lower(
                "blk.write-32-sync-cpu",
                "4 KiB random writes, 32 at a time, Sync: processor time of the VMM and its guest for each",
                "us",
            ),
            higher(
                "blk.write-32-async",
                "4 KiB random writes, 32 at a time, Async",
                "ops/s",
            ),
            lower(
                "blk.write-32-async-cpu",
                "4 KiB random writes, 32 at a time, Async: processor time of the VMM and its guest for each",
                "us",
            ),
            higher(
                "blk.large-sync",
                "1 MiB sequential reads, 4 at a time, Sync",
                "MiB/s",
            ),
            lower(
                "blk.large-sync-cpu",
                "1 MiB sequential reads, 4 at a time, Sync: processor time of the VMM and its guest for each",
                "us",
            ),
            higher(
                "blk.large-async",
                "1 MiB sequential reads, 4 at a time, Async",
                "MiB/s",
            ),
            lower(
                "blk.large-async-cpu",
                "1 MiB sequential reads, 4 at a time, Async: processor time of the VMM and its guest for each",
                "us",
            ),
            higher(
                "blk.flush-sync",
                "4 KiB writes, each followed by a flush, Sync",
                "ops/s",
            ),
            lower(
                "blk.flush-sync-cpu",
                "4 KiB writes, each followed by a flush, Sync: processor time of the VMM and its guest for each",
                "us",
            ),
        ],
        cases: measure::blk::cases,
    },
    Benchmark {
        name: "net",
        rounds: 7,
        figures: measure::net::FIGURES,
        cases: measure::net::cases,
    },
    Benchmark {
        name: "vsock",
        rounds: 7,
        figures: measure::vsock::FIGURES,
        cases: measure::vsock::cases,
    },
    Benchmark {
        name: "boot",
        rounds: 11,
        figures: &[
            lower(
                "boot.first-instruction",
                "Process start to the first instruction of a Linux guest's init",
                "ms",
            ),
            lower(
                "boot.init",
                "Process start to the output of /bin/echo as a Linux guest's init",
                "ms",
            ),
            lower(
                "boot.end",
                "Process start to its end, of a Linux guest whose init ends",
                "ms",
            ),
        ],
        cases: measure::boot::cases,
    },
    Benchmark {
        name: "unique",
        rounds: 11,
        figures: measure::unique::FIGURES,
        cases: measure::unique::cases,
    },
    Benchmark {
        name: "parity",
        rounds: 5,
        figures: measure::parity::FIGURES,
        cases: measure::parity::cases,
    },
];

/// Name and one line about each benchmark: what `cargo xtask bench` knows of them before it has built this.
const LINES: &str = include_str!("../benchmarks.txt");

impl Benchmark {
    /// One line about it.
    pub fn about(&self) -> &'static str {
        let mut lines = LINES.lines().filter_map(|line| line.split_once(": "));
        lines
            .find(|(name, _)| *name == self.name)
            .map_or("", |(_, about)| about)
    }
}

/// The names of all benchmarks.
pub fn names() -> Vec<&'static str> {
    BENCHMARKS.iter().map(|benchmark| benchmark.name).collect()
}

/// The benchmark of that name, or the figure of that id; an error that lists the names, or the ids of the benchmark's figures.
pub fn parse_name(text: &str) -> Result<&'static str, String> {
    if let Some(name) = names().into_iter().find(|name| *name == text) {
        return Ok(name);
    }
    if let Some(figure) = figure(text) {
        return Ok(figure.id);
    }
    let benchmark = text
        .split_once('.')
        .and_then(|(name, _)| BENCHMARKS.iter().find(|benchmark| benchmark.name == name));
    Err(match benchmark {
        Some(benchmark) => {
            let ids = benchmark.figures.iter().map(|figure| figure.id);
            let ids: Vec<&str> = ids.collect();
            format!(
                "there is no figure {text:?}; figures are {}",
                ids.join(", ")
            )
        }
        None => {
            let names = names().join(", ");
            format!("there is no benchmark {text:?}; benchmarks are {names}")
        }
    })
}

/// The figure of that id.
pub fn figure(id: &str) -> Option<&'static FigureKind> {
    let mut all = BENCHMARKS.iter().flat_map(|benchmark| benchmark.figures);
    all.find(|figure| figure.id == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_named_after_their_benchmarks() {
        let mut seen = std::collections::BTreeSet::new();
        for benchmark in BENCHMARKS {
            for figure in benchmark.figures {
                let rest = figure.id.strip_prefix(benchmark.name);
                assert!(
                    rest.is_some_and(|rest| rest.starts_with('.')),
                    "{}",
                    figure.id
                );
                assert!(seen.insert(figure.id), "{} twice", figure.id);
            }
        }
    }

    #[test]
    fn the_lines_are_about_the_benchmarks() {
        let lines = LINES.lines().filter_map(|line| line.split_once(": "));
        assert_eq!(lines.map(|(name, _)| name).collect::<Vec<_>>(), names());
    }

    #[test]
    fn a_wrong_name_is_answered_with_all_names() {
        assert_eq!(parse_name("start"), Ok("start"));
        let error = parse_name("strat").unwrap_err();
        assert!(
            error.contains("strat") && error.contains("start, weight"),
            "{error}"
        );
        assert_eq!(parse_name("clone.pause-1g"), Ok("clone.pause-1g"));
        let error = parse_name("clone.pause").unwrap_err();
        assert!(
            error.contains("clone.pause-128m, clone.pause-1g"),
            "{error}"
        );
    }
}
