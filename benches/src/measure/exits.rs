//! What it costs to leave the guest and to come back, beside a bare loop around KVM_RUN.

use super::probe;
use super::weight::sparse_drive;
use super::{Case, Context, Place, Reading};
use crate::guest::Guest;
use crate::machine::Machine;
use crate::process::Failure;
use crate::side::{Means, Side};

/// Figures by the probe's mode.
const MODES: [(&str, &[&str]); 4] = [
    ("port_write", &["exits.port-write"]),
    ("mmio_write", &["exits.mmio-write"]),
    ("mmio_read", &["exits.mmio-read"]),
    ("kick", &["exits.kick"]),
];
const COUNT: u32 = 20_000;

/// One case for each kind of exit and side.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    let mut all = Vec::new();
    for (mode, figures) in MODES {
        let sides = context.sides.iter();
        let sides = sides.filter(|side| !matches!(side.means, Means::Calls));
        all.extend(sides.map(|side| Case {
            side,
            at: None,
            figures,
            run: Box::new(move || exits(context, side, mode, figures)),
        }));
    }
    all
}

fn exits(
    context: &Context,
    side: &Side,
    mode: &str,
    figures: &[&'static str],
) -> Result<Vec<Reading>, Failure> {
    if !side.is_vmm() && mode == "kick" {
        let reason = "the bare loop has no ioeventfd: see the MMIO write".to_owned();
        return Err(Failure::NotOffered(reason));
    }
    let drives = Place::new(Guest::Reset, context.patience)?;
    let arguments = format!("probe.mode={mode} probe.count={COUNT}");
    let with = |machine: &mut Machine| {
        machine.drives.push(sparse_drive(&drives, "drive")?);
        Ok(())
    };
    let run = probe::run(context, side, &arguments, with, |_| Ok(()))?;
    let value = run.median()?;
    Ok(figures
        .iter()
        .map(|figure| Reading { figure, value })
        .collect())
}
