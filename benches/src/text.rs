//! The results as text, for a terminal or a console.

use std::fmt::Write;

use crate::bars::Outcome;
use crate::number;
use crate::report::ratio_text;
use crate::results::Results;

/// Tables of all figures, then the bars.
pub fn tables(results: &Results) -> String {
    let mut text = String::new();
    // To write to a string does not fail.
    let _ = write(&mut text, results);
    text
}

fn write(to: &mut String, results: &Results) -> std::fmt::Result {
    for figure in &results.figures {
        writeln!(to, "\n{} ({}), {}", figure.title, figure.id, figure.unit)?;
        writeln!(
            to,
            "  {:<18} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9}  ours / this",
            "", "rounds", "min", "p50", "p90", "p99", "max"
        )?;
        for cell in &figure.cells {
            let at = cell
                .at
                .map(|at| format!(" {}", number(at)))
                .unwrap_or_default();
            let name = format!("{}{at}", cell.side);
            if let Some(s) = cell.summary {
                let [min, p50, p90, p99, max] = [s.min, s.p50, s.p90, s.p99, s.max].map(number);
                let ratio = figure.against(&cell.side, cell.at).map(ratio_text);
                writeln!(
                    to,
                    "  {name:<18} {:>6} {min:>9} {p50:>9} {p90:>9} {p99:>9} {max:>9}  {}",
                    s.rounds,
                    ratio.unwrap_or_default()
                )?;
            } else if let Some(reason) = &cell.not_offered {
                writeln!(to, "  {name:<18} not offered: {reason}")?;
            } else if cell.failures.is_empty() {
                writeln!(to, "  {name:<18} not measured")?;
            }
            if let Some(last) = cell.failures.last() {
                let count = cell.failures.len();
                writeln!(
                    to,
                    "  {name:<18} failed {count} times, last: {}",
                    last.reason
                )?;
            }
        }
    }
    for absent in &results.absent {
        writeln!(to, "\n{} was left out: {}", absent.side, absent.reason)?;
    }
    if !results.bars.is_empty() {
        writeln!(to, "\nBars: ours / other")?;
    }
    for bar in &results.bars {
        let outcome = match bar.outcome {
            Outcome::Held => "held",
            Outcome::Missed => "MISSED",
            Outcome::NotMeasured => "not measured",
        };
        let at = bar
            .at
            .map(|at| format!(" at {}", number(at)))
            .unwrap_or_default();
        let measured = bar.measured();
        let figure = format!("{}{at} / {}", bar.figure, bar.against);
        let calls = results
            .figure(&bar.figure)
            .and_then(|figure| figure.calls_against(&bar.against, bar.at))
            .map(|ratio| format!("; the calls alone {}", number(ratio.median)))
            .unwrap_or_default();
        writeln!(
            to,
            "  {figure:<42} bar {:>5}  measured {measured:<26} {outcome}{calls}",
            number(bar.bound)
        )?;
    }
    Ok(())
}
