//! What it costs to be confined: our VMM without seccomp and Landlock, as it is shipped, and in a jail, in each round one
//! after the other and back again.

use std::path::Path;
use std::time::Duration;

use super::{Case, Context, Place, Reading, UP, UP_IN_WORDS, blk};
use crate::catalogue::{FigureKind, higher, lower};
use crate::guest::Guest;
use crate::process::Failure;
use crate::side::{Means, OURS, Side};

const OPEN: &str = "confinement.open";
const SHIPPED: &str = "confinement.shipped";
const JAILED: &str = "confinement.jailed";
const ADDED: &str = "confinement.added";
const READS: [&str; 3] = [
    "confinement.reads-open",
    "confinement.reads-jailed",
    "confinement.reads-kept",
];

/// All of them.
pub const FIGURES: &[FigureKind] = &[
    lower(
        OPEN,
        "Process start to first guest instruction, without seccomp and Landlock",
        "ms",
    ),
    lower(
        SHIPPED,
        "The same with both, as the program is shipped",
        "ms",
    ),
    lower(JAILED, "The same in a jail, from the jailer's start", "ms"),
    lower(
        ADDED,
        "What jail, seccomp and Landlock add, round by round",
        "ms",
    ),
    higher(
        READS[0],
        "4 KiB random reads, one at a time, Sync, without seccomp and Landlock",
        "ops/s",
    ),
    higher(READS[1], "The same with both, in a jail", "ops/s"),
    higher(
        READS[2],
        "Reads with all of them for each without any, round by round",
        "ratio",
    ),
];

/// The start, and reads of a drive.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    let Some(ours) = context.sides.iter().find(|side| side.id == OURS) else {
        return Vec::new();
    };
    let case = |figures, run| Case {
        side: ours,
        at: None,
        figures,
        run,
    };
    vec![
        case(
            &[OPEN, SHIPPED, JAILED, ADDED],
            Box::new(move || start(context, &ours.program)),
        ),
        case(&READS, Box::new(move || reads(context, &ours.program))),
    ]
}

/// Without confinement, as shipped, in a jail.
fn sides(context: &Context, vmm: &Path) -> Result<[Side; 3], Failure> {
    let jailer = match &context.jailer {
        Some(path) => std::path::absolute(path)?,
        None => vmm.with_file_name("lepton-jailer"),
    };
    if !jailer.is_file() {
        let reason = format!("there is no program {}", jailer.display());
        return Err(Failure::NotOffered(reason));
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::NotOffered("such a jail needs root".to_owned()));
    }
    Ok([
        Side::unconfined(vmm),
        Side::ours(vmm.to_owned()),
        Side::jailed(vmm, &jailer),
    ])
}

fn first_instruction(context: &Context, side: &Side) -> Result<Duration, Failure> {
    let Means::Vmm(driver) = &side.means else {
        return Err(Failure::because("not a VMM"));
    };
    let place = Place::new(Guest::Mark, context.patience)?;
    let mut running = place.boots(driver.as_ref(), &place.machine())?;
    let at = running.says(UP, UP_IN_WORDS)?;
    Ok(at - running.started)
}

/// The mean of each of two values: there and back.
fn there_and_back<const N: usize>(
    sides: &[Side; N],
    mut measure: impl FnMut(&Side) -> Result<f64, Failure>,
) -> Result<[f64; N], Failure> {
    let mut values = [0.0; N];
    let order = (0..N).chain((0..N).rev());
    for index in order {
        values[index] += measure(&sides[index])? / 2.0;
    }
    Ok(values)
}

fn start(context: &Context, vmm: &Path) -> Result<Vec<Reading>, Failure> {
    let sides = sides(context, vmm)?;
    let [open, shipped, jailed] = there_and_back(&sides, |side| {
        Ok(first_instruction(context, side)?.as_secs_f64() * 1e3)
    })?;
    Ok(vec![
        Reading {
            figure: OPEN,
            value: open,
        },
        Reading {
            figure: SHIPPED,
            value: shipped,
        },
        Reading {
            figure: JAILED,
            value: jailed,
        },
        Reading {
            figure: ADDED,
            value: jailed - open,
        },
    ])
}

fn reads(context: &Context, vmm: &Path) -> Result<Vec<Reading>, Failure> {
    let [open, _, jailed] = sides(context, vmm)?;
    let [open, jailed] = there_and_back(&[open, jailed], |side| blk::reads(context, side))?;
    let values = [open, jailed, jailed / open];
    let readings = READS.into_iter().zip(values);
    let readings = readings.map(|(figure, value)| Reading { figure, value });
    Ok(readings.collect())
}
