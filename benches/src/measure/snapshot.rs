//! Machines that were saved. Ours and Firecracker's: the others' have another form, and no request that does all of it.

use std::cell::OnceCell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lepton_api::Client;
use lepton_hostio::scheduler::First;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Case, Context, Place, Reading, UP, UP_IN_WORDS};
use crate::catalogue::{FigureKind, curve, lower};
use crate::guest::Guest;
use crate::machine::Machine;
use crate::process::{Failure, Running};
use crate::side::{Driver, Kind, Means, OURS};

/// All figures.
pub const FIGURES: &[FigureKind] = &[
    lower(
        "snapshot.load-128m",
        "PUT /snapshot/load with resume_vm to the guest's next instruction, 128 MiB",
        "ms",
    ),
    lower(
        "snapshot.load-4g",
        "PUT /snapshot/load with resume_vm to the guest's next instruction, 4 GiB",
        "ms",
    ),
    lower(
        "snapshot.load-told-128m",
        "The same, 128 MiB, by a process that was told of so much memory when it started (--expect-mem-mib)",
        "ms",
    ),
    lower(
        "snapshot.load-told-4g",
        "The same, 4 GiB, by a process that was told of so much memory when it started (--expect-mem-mib)",
        "ms",
    ),
    curve(
        DIFF,
        "PUT /snapshot/create, Diff, 1 GiB all written before the last snapshot, by what was written since",
        "ms",
        "MiB",
    ),
];

/// MiB, what a process may be told of them, and the figure.
const LOADS: [(u64, &[&str], &[&str]); 4] = [
    (128, &[], &["snapshot.load-128m"]),
    (4096, &[], &["snapshot.load-4g"]),
    (
        128,
        &["--expect-mem-mib", "128"],
        &["snapshot.load-told-128m"],
    ),
    (
        4096,
        &["--expect-mem-mib", "4096"],
        &["snapshot.load-told-4g"],
    ),
];
const DIFF: &str = "snapshot.diff";
/// MiB that are written between two snapshots.
const WRITTEN: [u32; 3] = [1, 10, 100];
/// For how long a guest runs before it is saved.
const RUNS: Duration = Duration::from_millis(50);

/// All of it.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    let mut all = Vec::new();
    for side in &context.sides {
        let Means::Vmm(driver) = &side.means else {
            continue;
        };
        if side.id != OURS && side.id != Kind::Firecracker.id() {
            continue;
        }
        let driver = driver.as_ref();
        for (mib, told, figures) in LOADS {
            if !told.is_empty() && side.id != OURS {
                continue;
            }
            // Once for all rounds: to write 4 GiB takes longer than all else of them.
            let saved = OnceCell::new();
            let run = move || {
                if saved.get().is_none() {
                    drop(saved.set(Saved::new(context, driver, mib)?));
                }
                let saved = saved.get().ok_or_else(|| Failure::because("not saved"))?;
                let took = load(context, driver, saved, told)?;
                Ok(vec![Reading::milliseconds(figures[0], took)])
            };
            all.push(Case {
                side,
                at: None,
                figures,
                run: Box::new(run),
            });
        }
        for mib in WRITTEN {
            all.push(Case {
                side,
                at: Some(f64::from(mib)),
                figures: &[DIFF],
                run: Box::new(move || {
                    let took = difference(context, driver, u64::from(mib))?;
                    Ok(vec![Reading::milliseconds(DIFF, took)])
                }),
            });
        }
    }
    all
}

/// A VMM with Firecracker's API.
struct Vmm {
    running: Running,
    client: Client,
    place: Place,
}

impl Vmm {
    fn start(
        context: &Context,
        driver: &dyn Driver,
        place: Place,
        machine: &Machine,
        options: &[&str],
    ) -> Result<Self, Failure> {
        let socket = place.folder().join("api.sock");
        let mut command = driver.serves(&socket, machine, place.folder())?;
        command.args(options);
        let running = Running::spawn(&mut command, place.folder(), context.patience)?;
        let (stream, _) = running.connect(&socket)?;
        stream.set_read_timeout(Some(context.patience))?;
        let mut vmm = Vmm {
            running,
            client: Client::from_stream(stream),
            place,
        };
        // Once it has answered, all of it is there.
        vmm.ask("GET", "/", "")?;
        Ok(vmm)
    }

    fn ask(&mut self, method: &str, path: &str, body: &str) -> Result<(), Failure> {
        match self.client.request(method, path, body) {
            Ok((200..300, _)) => Ok(()),
            Ok((status, body)) => Err(Failure::because(format!("{path}: {status} {body}"))),
            Err(error) => Err(Failure::because(format!("{path}: {error}"))),
        }
    }

    fn put(&mut self, path: &str, body: &Value) -> Result<(), Failure> {
        self.ask("PUT", path, &body.to_string())
    }

    fn reach(&mut self, state: &str) -> Result<(), Failure> {
        self.ask("PATCH", "/vm", &json!({ "state": state }).to_string())
    }

    fn boot(&mut self, kernel: &PathBuf, arguments: &str, config: &Value) -> Result<(), Failure> {
        let boot = json!({ "kernel_image_path": kernel, "boot_args": arguments });
        self.put("/boot-source", &boot)?;
        self.put("/machine-config", config)?;
        self.put("/actions", &json!({ "action_type": "InstanceStart" }))
    }
}

/// A machine that was saved.
struct Saved {
    folder: TempDir,
}

impl Saved {
    fn new(context: &Context, driver: &dyn Driver, mib: u64) -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("lepton-bench-").tempdir()?;
        let saved = Saved { folder };
        let place = Place::new(Guest::Beat, context.patience)?;
        let machine = place.machine();
        let mut vmm = Vmm::start(context, driver, place, &machine, &[])?;
        let config = json!({ "vcpu_count": 1, "mem_size_mib": mib });
        vmm.boot(&machine.kernel, "", &config)?;
        vmm.running.says(UP, UP_IN_WORDS)?;
        std::thread::sleep(RUNS);
        vmm.reach("Paused")?;
        let files = json!({ "snapshot_path": saved.state(), "mem_file_path": saved.memory() });
        vmm.put("/snapshot/create", &files)?;
        Ok(saved)
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn memory(&self) -> PathBuf {
        self.folder.path().join("memory")
    }
}

/// Loads it in a process that waits for requests, and returns how long that took until the guest wrote to the console.
fn load(
    context: &Context,
    driver: &dyn Driver,
    saved: &Saved,
    options: &[&str],
) -> Result<Duration, Failure> {
    let place = Place::new(Guest::Beat, context.patience)?;
    let machine = place.machine();
    let mut vmm = Vmm::start(context, driver, place, &machine, options)?;
    std::thread::sleep(RUNS);
    let body = json!({
        "snapshot_path": saved.state(),
        "mem_backend": { "backend_type": "File", "backend_path": saved.memory() },
        "resume_vm": true,
    });
    // What is measured is when the guest ran, not when this thread was let in.
    let first = First::go();
    let asked = Instant::now();
    let sent = vmm.client.send("PUT", "/snapshot/load", &body.to_string());
    sent.map_err(|error| Failure::because(format!("/snapshot/load: {error}")))?;
    let ran = vmm.running.says(UP, UP_IN_WORDS);
    drop(first);
    match ran {
        Ok(at) => Ok(at - asked),
        Err(failure @ Failure::Interrupted) => Err(failure),
        Err(failure) => match vmm.client.reply() {
            Ok((200..300, _)) | Err(_) => Err(failure),
            // A refused load says why.
            Ok((status, body)) => Err(Failure::because(format!("/snapshot/load: {status} {body}"))),
        },
    }
}

/// How long it takes to save what a guest has written since it was saved before: `mib` MiB.
fn difference(context: &Context, driver: &dyn Driver, mib: u64) -> Result<Duration, Failure> {
    const MEMORY: u64 = 1024;
    let probe = context.probe.as_ref();
    let probe = probe.ok_or_else(|| Failure::NotOffered("there is no probe guest".into()))?;
    let place = Place::new(Guest::Idle, context.patience)?;
    let machine = place.machine();
    let mut vmm = Vmm::start(context, driver, place, &machine, &[])?;
    let arguments = format!(
        "probe.mode=churn probe.mib={} probe.kib={}",
        MEMORY - MEMORY / 16,
        mib << 10
    );
    let config = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY, "track_dirty_pages": true });
    vmm.boot(probe, &arguments, &config)?;
    let written = b"PROBE {\"mode\":\"churn\"";
    vmm.running.says(written, "memory being written")?;
    let folder = vmm.place.folder().to_owned();
    let mut took = Duration::ZERO;
    for (number, kind) in ["Full", "Diff"].into_iter().enumerate() {
        // Enough to write all that is written again and again.
        std::thread::sleep(RUNS * 4);
        vmm.reach("Paused")?;
        let body = json!({
            "snapshot_type": kind,
            "snapshot_path": folder.join(format!("state-{number}")),
            "mem_file_path": folder.join(format!("memory-{number}")),
        });
        let asked = Instant::now();
        vmm.put("/snapshot/create", &body)?;
        took = asked.elapsed();
        vmm.reach("Resumed")?;
    }
    Ok(took)
}
