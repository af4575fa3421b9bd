//! All fuzzing targets, a minute in all.

use anyhow::Result;

use super::counts::Counts;
use crate::fuzz;
use crate::progress::Progress;

const SECONDS: u64 = 60;

/// Runs each target from its seeds.
pub fn run(progress: &Progress) -> Result<Counts> {
    let targets = fuzz::targets()?;
    let program = fuzz::build(progress)?;
    let step = progress.step("fuzzing");
    let each = SECONDS.div_ceil(targets.len().max(1) as u64);
    let mut counts = Counts::default();
    for target in &targets {
        let result = fuzz::check(&program, target, each);
        counts += Counts::one(result.is_ok());
        match result {
            Ok(text) => step.note(&text),
            Err(error) => eprintln!("{error:#}"),
        }
    }
    match counts.failed {
        0 => step.done(&counts.to_string()),
        _ => step.failed(),
    }
    Ok(counts)
}
