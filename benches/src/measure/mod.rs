//! What the benchmarks do, one module each.

pub mod blk;
pub mod boot;
pub mod clone;
pub mod confinement;
pub mod density;
pub mod exits;
pub mod growth;
pub mod linux;
pub mod net;
pub mod parity;
mod probe;
pub mod snapshot;
pub mod start;
pub mod unique;
pub mod vsock;
pub mod weight;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::guest::{Guest, MARKER};
use crate::machine::Machine;
use crate::process::{Failure, Running};
use crate::side::{Driver, IrqChip, Means, Side};
use crate::tap::Tap;

/// What all measurements of a run share.
pub struct Context {
    /// Those that are compared.
    pub sides: Vec<Side>,
    /// The longest that one VMM may take for one measurement.
    pub patience: Duration,
    /// The Linux guest.
    pub linux: linux::Linux,
    /// The probe guest.
    pub probe: Option<PathBuf>,
    /// The program that does work in guests and on the host, see [`crate::load`].
    pub load: PathBuf,
    /// The jailer; None: the one beside our VMM.
    pub jailer: Option<PathBuf>,
    /// How many machines are many.
    pub machines: u32,
    /// A folder that lasts as long as the run.
    pub scratch: TempDir,
    /// Taps that last as long, see [`Context::taps`].
    pub taps: RefCell<Vec<Tap>>,
}

impl Context {
    /// The names of as many taps, made if they are not there yet.
    fn taps(&self, count: usize) -> Result<Vec<String>, Failure> {
        let mut taps = self.taps.borrow_mut();
        while taps.len() < count {
            taps.push(Tap::new()?);
        }
        Ok(taps
            .iter()
            .take(count)
            .map(|tap| tap.name().to_owned())
            .collect())
    }
}

/// A value of a figure, in the figure's unit.
pub struct Reading {
    /// The figure's id.
    pub figure: &'static str,
    /// Its value.
    pub value: f64,
}

impl Reading {
    /// A time in milliseconds.
    pub fn milliseconds(figure: &'static str, time: Duration) -> Self {
        Self {
            figure,
            value: time.as_secs_f64() * 1e3,
        }
    }
}

/// One thing that is done once in each round.
pub struct Case<'a> {
    /// Whose values these are.
    pub side: &'a Side,
    /// The place on the figures' axis, if they have one.
    pub at: Option<f64>,
    /// The figures it gives.
    pub figures: &'static [&'static str],
    /// Does it.
    pub run: Box<dyn Fn() -> Result<Vec<Reading>, Failure> + 'a>,
}

/// One case for each load and VMM, and for the system calls alone: what a second and what an operation give.
fn for_each_load<'a, L>(
    context: &'a Context,
    loads: &'a [L],
    figures: fn(&L) -> &'static [&'static str; 2],
    run: fn(&Context, &Side, &L) -> Result<Vec<Reading>, Failure>,
) -> Vec<Case<'a>> {
    let mut all = Vec::new();
    for load in loads {
        let sides = context.sides.iter();
        let sides = sides.filter(|side| !matches!(side.means, Means::Floor(_)));
        all.extend(sides.map(|side| Case {
            side,
            at: None,
            figures: figures(load),
            run: Box::new(move || run(context, side, load)),
        }));
    }
    all
}

/// A guest, a folder for its machine, and how long it may take.
pub struct Place {
    folder: TempDir,
    kernel: PathBuf,
    patience: Duration,
}

impl Place {
    /// A new one.
    pub fn new(guest: Guest, patience: Duration) -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("lepton-bench-").tempdir()?;
        let kernel = guest.write(folder.path())?;
        Ok(Self {
            folder,
            kernel,
            patience,
        })
    }

    /// The folder, gone with this value.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A machine without devices.
    pub fn machine(&self) -> Machine {
        Machine::bare(self.kernel.clone())
    }

    /// Boots `machine` at once.
    pub fn boots(&self, driver: &dyn Driver, machine: &Machine) -> Result<Running, Failure> {
        let mut command = driver.boots(machine, self.folder())?;
        Running::spawn(&mut command, self.folder(), self.patience)
    }

    /// Starts the VMM alone. Its socket is the second value.
    pub fn serves(
        &self,
        driver: &dyn Driver,
        machine: &Machine,
    ) -> Result<(Running, PathBuf), Failure> {
        let socket = self.folder().join("api.sock");
        let mut command = driver.serves(&socket, machine, self.folder())?;
        let running = Running::spawn(&mut command, self.folder(), self.patience)?;
        Ok((running, socket))
    }

    /// Starts the bare program.
    pub fn floor(
        &self,
        side: &Side,
        irqchip: IrqChip,
        memory_mib: u64,
    ) -> Result<Running, Failure> {
        let mut command = std::process::Command::new(&side.program);
        command.arg(match irqchip {
            IrqChip::None => "none",
            IrqChip::Split => "split",
            IrqChip::Full => "full",
        });
        command.arg(memory_mib.to_string());
        Running::spawn(&mut command, self.folder(), self.patience)
    }
}

/// What the guests write when they have come up.
const UP: &[u8] = &[MARKER];
const UP_IN_WORDS: &str = "the guest's first instruction";

/// A case of every VMM.
fn for_each<'a>(
    context: &'a Context,
    figures: &'static [&'static str],
    vmm: impl Fn(&dyn Driver) -> Result<Vec<Reading>, Failure> + Copy + 'a,
) -> Vec<Case<'a>> {
    for_each_side(context, figures, move |_, driver| vmm(driver))
}

/// A case of every VMM, which is told which it is.
fn for_each_side<'a>(
    context: &'a Context,
    figures: &'static [&'static str],
    vmm: impl Fn(&Side, &dyn Driver) -> Result<Vec<Reading>, Failure> + Copy + 'a,
) -> Vec<Case<'a>> {
    let of = |side: &'a Side| match &side.means {
        Means::Vmm(driver) => Some(Case {
            side,
            at: None,
            figures,
            run: Box::new(move || vmm(side, driver.as_ref())),
        }),
        Means::Floor(_) | Means::Calls => None,
    };
    context.sides.iter().filter_map(of).collect()
}

/// A case of every bare program.
fn for_each_floor<'a>(
    context: &'a Context,
    figures: &'static [&'static str],
    floor: impl Fn(&Side, IrqChip) -> Result<Vec<Reading>, Failure> + Copy + 'a,
) -> Vec<Case<'a>> {
    let of = |side: &'a Side| match side.means {
        Means::Floor(irqchip) => Some(Case {
            side,
            at: None,
            figures,
            run: Box::new(move || floor(side, irqchip)),
        }),
        Means::Vmm(_) | Means::Calls => None,
    };
    context.sides.iter().filter_map(of).collect()
}
