//! How costs grow with what a machine has.

use super::weight::{resident_beyond_guest, sparse_drive};
use super::{Case, Context, Place, Reading, UP, UP_IN_WORDS};
use crate::guest::Guest;
use crate::machine::Machine;
use crate::process::Failure;
use crate::side::{Driver, Means};

type Grow = fn(&Context, &Place, &mut Machine, u32) -> Result<(), Failure>;

/// What grows: time and weight, the steps, and how a machine is given as much.
struct Axis {
    figures: &'static [&'static str; 2],
    steps: &'static [u32],
    grow: Grow,
}

const AXES: [Axis; 4] = [
    Axis {
        figures: &["growth.vcpus-time", "growth.vcpus-weight"],
        steps: &[1, 2, 4, 8],
        grow: |_, _, machine, count| {
            machine.vcpus = count;
            Ok(())
        },
    },
    Axis {
        figures: &["growth.drives-time", "growth.drives-weight"],
        steps: &[1, 2, 4, 8],
        grow: |_, place, machine, count| {
            for number in 0..count {
                machine
                    .drives
                    .push(sparse_drive(place, &format!("drive{number}"))?);
            }
            Ok(())
        },
    },
    Axis {
        figures: &["growth.interfaces-time", "growth.interfaces-weight"],
        steps: &[1, 2, 4, 8],
        grow: |context, _, machine, count| {
            machine.taps = context.taps(count as usize)?;
            Ok(())
        },
    },
    Axis {
        figures: &["growth.memory-time", "growth.memory-weight"],
        steps: &[128, 512, 1024, 2048, 4096, 8192],
        grow: |_, _, machine, mib| {
            machine.memory_mib = u64::from(mib);
            Ok(())
        },
    },
];

/// One case for each axis, step and VMM.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    let mut all = Vec::new();
    for axis in &AXES {
        for step in axis.steps {
            all.extend(context.sides.iter().filter_map(|side| match &side.means {
                Means::Vmm(driver) => Some(Case {
                    side,
                    at: Some(f64::from(*step)),
                    figures: axis.figures,
                    run: Box::new(move || run(context, driver.as_ref(), axis, *step)),
                }),
                Means::Floor(_) | Means::Calls => None,
            }));
        }
    }
    all
}

fn run(
    context: &Context,
    driver: &dyn Driver,
    axis: &Axis,
    step: u32,
) -> Result<Vec<Reading>, Failure> {
    let place = Place::new(Guest::Idle, context.patience)?;
    let mut machine = place.machine();
    (axis.grow)(context, &place, &mut machine, step)?;
    let mut running = place.boots(driver, &machine)?;
    let at = running.says(UP, UP_IN_WORDS)?;
    let [time, weight] = *axis.figures;
    Ok(vec![
        Reading::milliseconds(time, at - running.started),
        Reading {
            figure: weight,
            value: resident_beyond_guest(running.pid())?,
        },
    ])
}
