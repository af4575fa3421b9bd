//! Runs benchmarks round by round.
//!
//! In each round every case is done once, in an order drawn anew: what one measurement leaves to the host to clean up
//! (a full interrupt controller's tear-down, for one) must not always be the same other's burden. The draw is seeded by
//! the round, so that a run can be repeated.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::catalogue::Benchmark;
use crate::interrupt;
use crate::measure::{Case, Context};
use crate::process::Failure;
use crate::results::{Figure, Refusal, Sample};

/// After as many failures without a success in between, a case is not tried any more.
const GIVE_UP: u32 = 3;
/// Without a terminal, one line this often tells what is being measured.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// Runs one benchmark, of it what gives figures that are `chosen` by their ids. Whether it was interrupted is the second value.
pub fn run(
    benchmark: &Benchmark,
    context: &Context,
    rounds: u32,
    chosen: &dyn Fn(&str) -> bool,
) -> (Vec<Figure>, bool) {
    let kinds = benchmark.figures.iter().filter(|kind| chosen(kind.id));
    let mut figures: Vec<Figure> = kinds
        .map(|kind| Figure::new(benchmark.name, kind))
        .collect();
    let mut cases = (benchmark.cases)(context);
    cases.retain(|case| case.figures.iter().any(|figure| chosen(figure)));
    for case in &cases {
        // The order of the report is the order of the cases, whatever the draw.
        for_figures(&mut figures, case, |_| {});
    }
    let show = Show::new(benchmark.name, u64::from(rounds) * cases.len() as u64);
    let mut failed = BTreeMap::new();
    let mut interrupted = false;
    'rounds: for round in 0..rounds {
        let mut order: Vec<usize> = (0..cases.len()).collect();
        fastrand::Rng::with_seed(u64::from(round)).shuffle(&mut order);
        for index in order {
            let case = &cases[index];
            show.at(round, rounds, case);
            let failures = failed.entry(index).or_insert(0);
            if *failures >= GIVE_UP {
                continue;
            }
            if interrupt::is_pending() {
                interrupted = true;
                break 'rounds;
            }
            match (case.run)() {
                Ok(readings) => {
                    *failures = 0;
                    for reading in readings {
                        let figure = figures
                            .iter_mut()
                            .find(|figure| figure.id == reading.figure);
                        let Some(figure) = figure else {
                            continue;
                        };
                        figure.cell(case.side.id, case.at).samples.push(Sample {
                            round,
                            value: reading.value,
                        });
                    }
                }
                Err(Failure::Interrupted) => {
                    interrupted = true;
                    break 'rounds;
                }
                Err(Failure::NotOffered(reason)) => {
                    *failures = GIVE_UP;
                    for_figures(&mut figures, case, |cell| {
                        cell.not_offered = Some(reason.clone());
                    });
                }
                Err(Failure::Failed { reason, log }) => {
                    // Ctrl-C reaches the children too, perhaps before us.
                    if interrupt::is_pending() {
                        interrupted = true;
                        break 'rounds;
                    }
                    *failures += 1;
                    show.failed(benchmark, case, &reason);
                    for_figures(&mut figures, case, |cell| {
                        cell.failures.push(Refusal {
                            round,
                            reason: reason.clone(),
                            log: log.clone(),
                        });
                    });
                }
            }
        }
    }
    for figure in &mut figures {
        figure.conclude();
    }
    (figures, interrupted)
}

fn for_figures(
    figures: &mut [Figure],
    case: &Case<'_>,
    change: impl Fn(&mut crate::results::Cell),
) {
    for figure in figures
        .iter_mut()
        .filter(|figure| case.figures.contains(&figure.id.as_str()))
    {
        change(figure.cell(case.side.id, case.at));
    }
}

/// What a person sees meanwhile, on the standard error.
struct Show {
    name: &'static str,
    bar: ProgressBar,
    terminal: bool,
    last: std::cell::Cell<Instant>,
}

impl Show {
    fn new(name: &'static str, steps: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal {
            ProgressDrawTarget::stderr_with_hz(8)
        } else {
            ProgressDrawTarget::hidden()
        };
        let style = ProgressStyle::with_template(
            "{prefix:>8} [{bar:30}] {percent:>3} % {elapsed} (~{eta} left) {wide_msg}",
        );
        let bar = ProgressBar::with_draw_target(Some(steps), target)
            .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            .with_prefix(name);
        if !terminal {
            eprintln!("{name}: {steps} measurements");
        }
        Self {
            name,
            bar,
            terminal,
            last: std::cell::Cell::new(Instant::now()),
        }
    }

    fn at(&self, round: u32, rounds: u32, case: &Case<'_>) {
        self.bar.inc(1);
        if self.terminal {
            let figure = case.figures.first().copied().unwrap_or_default();
            self.bar.set_message(format!("{} {figure}", case.side.id));
        } else if self.last.get().elapsed() >= HEARTBEAT {
            self.last.set(Instant::now());
            eprintln!(
                "{}: round {} of {rounds}, {}",
                self.name,
                round + 1,
                case.side.id
            );
        }
    }

    fn failed(&self, benchmark: &Benchmark, case: &Case<'_>, reason: &str) {
        let figure = case.figures.first().copied().unwrap_or(benchmark.name);
        self.bar
            .suspend(|| eprintln!("{figure}: {}: {reason}", case.side.id));
    }
}

impl Drop for Show {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
