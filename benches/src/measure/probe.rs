//! The probe guest: started on any side, and what it says.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_ioctls::Kvm;
use rustix::param::clock_ticks_per_second;
use serde::Deserialize;

use super::{Context, Place};
use crate::guest::Guest;
use crate::machine::{Engine, Machine};
use crate::process::{Failure, Running};
use crate::side::{IrqChip, Means, Side};

/// A line of results.
#[derive(Debug, Deserialize)]
pub struct Told {
    /// Operations done.
    pub ops: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// What went wrong.
    pub errors: u64,
    /// Ticks of the time stamp counter, all in all.
    pub ticks: u64,
    /// Ticks of an operation, the median.
    pub p50: u64,
    /// Frames that did not come.
    #[serde(default)]
    pub lost: u64,
}

/// What a run of the probe gave.
pub struct Run {
    /// What it said.
    pub told: Told,
    /// Processor time of the whole process, from its start to its end.
    pub processor: Duration,
    /// That of its first thread, if it is a VMM.
    pub first_thread: Duration,
}

impl Run {
    /// Operations in a second.
    pub fn rate(&self) -> Result<f64, Failure> {
        Ok(self.told.ops as f64 / seconds(self.told.ticks)?)
    }

    /// MiB in a second.
    pub fn mib_per_second(&self) -> Result<f64, Failure> {
        Ok(self.told.bytes as f64 / seconds(self.told.ticks)? / f64::from(1 << 20))
    }

    /// Microseconds of processor time per operation.
    pub fn processor_per_operation(&self) -> f64 {
        self.processor.as_secs_f64() * 1e6 / self.told.ops as f64
    }

    /// Microseconds of processor time of the first thread per operation.
    pub fn first_thread_per_operation(&self) -> f64 {
        self.first_thread.as_secs_f64() * 1e6 / self.told.ops as f64
    }

    /// Microseconds of one operation, the median.
    pub fn median(&self) -> Result<f64, Failure> {
        Ok(seconds(self.told.p50)? * 1e6)
    }
}

/// Ticks of the time stamp counter in a millisecond, as KVM says.
pub fn tsc_khz() -> Result<u32, Failure> {
    static KHZ: OnceLock<Result<u32, String>> = OnceLock::new();
    let ask = || {
        let ask = || Kvm::new()?.create_vm()?.create_vcpu(0)?.get_tsc_khz();
        ask().map_err(|error| format!("KVM_GET_TSC_KHZ: {error}"))
    };
    KHZ.get_or_init(ask).clone().map_err(Failure::NotOffered)
}

fn seconds(ticks: u64) -> Result<f64, Failure> {
    Ok(ticks as f64 / (f64::from(tsc_khz()?) * 1e3))
}

/// Processor time of all children that have ended.
fn children() -> Result<Duration, Failure> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    // After the name, which may have spaces: cutime and cstime are the fields 16 and 17 (proc(5)).
    let fields = text
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace();
    let ticks: u64 = fields
        .skip(13)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Ok(Duration::from_secs_f64(
        ticks as f64 / clock_ticks_per_second() as f64,
    ))
}

/// Runs the probe with these arguments on `side`, in the machine that `with` makes of a bare one. Once it has started,
/// `host` does the host's part.
pub fn run(
    context: &Context,
    side: &Side,
    arguments: &str,
    with: impl FnOnce(&mut Machine) -> Result<(), Failure>,
    host: impl FnOnce(&mut Running) -> Result<(), Failure>,
) -> Result<Run, Failure> {
    let kernel = program(context)?;
    let place = Place::new(Guest::Reset, context.patience)?;
    let line = format!("{arguments} probe.tsc_khz={}", tsc_khz()?);
    let before = children()?;
    let mut running = match &side.means {
        Means::Vmm(driver) => {
            if !driver.has_mmio_devices() {
                let reason =
                    "its devices are on PCI, the probe drives those of virtio-mmio".to_owned();
                return Err(Failure::NotOffered(reason));
            }
            let mut machine = place.machine();
            machine.kernel = kernel;
            machine.command_line = line;
            with(&mut machine)?;
            place.boots(driver.as_ref(), &machine)?
        }
        Means::Calls => {
            let mut machine = place.machine();
            with(&mut machine)?;
            let mut command = Command::new(&side.program);
            command.arg(line).args(device(&machine)?);
            Running::spawn(&mut command, place.folder(), context.patience)?
        }
        Means::Floor(IrqChip::Split) => {
            let mut command = Command::new(&side.program);
            command.arg("probe").arg(kernel).arg(line);
            Running::spawn(&mut command, place.folder(), context.patience)?
        }
        Means::Floor(_) => {
            return Err(Failure::NotOffered(
                "the same as the other floor".to_owned(),
            ));
        }
    };
    host(&mut running)?;
    let console = String::from_utf8_lossy(running.console()?).into_owned();
    running.succeeds()?;
    let processor = children()?.saturating_sub(before);
    let first_thread = running.first_thread()?;
    let lines = console.lines();
    let told = lines
        .filter_map(|line| line.strip_prefix("PROBE "))
        .find(|told| !told.contains("\"ready\":1"));
    let told = told.ok_or_else(|| running.failure("the probe said nothing"))?;
    let parsed: Result<Told, _> = serde_json::from_str(told);
    let told =
        parsed.map_err(|error| running.failure(format!("the probe said {told}: {error}")))?;
    if told.errors > 0 || told.ops == 0 {
        let reason = format!("{} operations, {} of them failed", told.ops, told.errors);
        return Err(running.failure(reason));
    }
    Ok(Run {
        told,
        processor,
        first_thread,
    })
}

/// The one device of `machine`, as the program of the system calls takes it: its name on the host, and the engine.
fn device(machine: &Machine) -> Result<[OsString; 2], Failure> {
    let drive = machine
        .drives
        .first()
        .map(|drive| (drive.path.clone().into(), drive.engine));
    let tap = machine.taps.first().map(|tap| (tap.into(), Engine::Sync));
    let vsock = machine
        .vsock
        .as_ref()
        .map(|socket| (socket.into(), Engine::Sync));
    let (name, engine): (OsString, Engine) = drive
        .or(tap)
        .or(vsock)
        .ok_or_else(|| Failure::because("a machine without devices makes no calls"))?;
    let engine = match engine {
        Engine::Sync => "sync",
        Engine::Async => "async",
    };
    Ok([name, engine.into()])
}

/// The probe guest.
pub fn program(context: &Context) -> Result<PathBuf, Failure> {
    match &context.probe {
        Some(path) => Ok(std::path::absolute(path)?),
        None => Err(Failure::NotOffered(
            "the probe guest is given by --probe".to_owned(),
        )),
    }
}
