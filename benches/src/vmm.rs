//! Starting a VMM and watching it come and go.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Sides;
use crate::guest::{MARKER, Program};
use crate::stats::Series;

/// Longest wait for anything a VMM does.
const PATIENCE: Duration = Duration::from_secs(60);

/// A child that does not outlive its measurement.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A configuration of a machine without devices.
pub fn configuration(kernel: &Path, memory: u64) -> Value {
    json!({
        "boot-source": {"kernel_image_path": kernel, "boot_args": "quiet"},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": memory},
    })
}

/// A command that runs the machine of a configuration file, silently but for the guest's console.
pub fn from_file(vmm: &Path, folder: &Path, config: &Value) -> io::Result<Command> {
    let file = folder.join("config.json");
    std::fs::write(&file, config.to_string())?;
    let mut command = Command::new(vmm);
    command
        .args(["--no-api", "--level", "Error", "--log-path", "/dev/null"])
        .arg("--config-file")
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    Ok(command)
}

/// Time from spawning to a connection to the API's socket.
fn to_socket(vmm: &Path) -> io::Result<Duration> {
    let folder = TempDir::new()?;
    let socket = folder.path().join("api.sock");
    let mut command = Command::new(vmm);
    command
        .arg("--api-sock")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let started = Instant::now();
    let _running = Running(command.spawn()?);
    while UnixStream::connect(&socket).is_err() {
        if started.elapsed() > PATIENCE {
            return Err(io::Error::other("no API socket"));
        }
        std::thread::yield_now();
    }
    Ok(started.elapsed())
}

/// Time from spawning to the first byte of the guest's that is [`MARKER`].
fn to_first_instruction(vmm: &Path, memory: u64) -> io::Result<Duration> {
    let folder = TempDir::new()?;
    let kernel = Program::Mark.write(folder.path())?;
    let config = configuration(&kernel, memory);
    let mut command = from_file(vmm, folder.path(), &config)?;
    let started = Instant::now();
    let mut running = Running(command.spawn()?);
    let mut out = running.0.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut byte = [0];
    while byte[0] != MARKER {
        out.read_exact(&mut byte)?;
    }
    Ok(started.elapsed())
}

/// Time from spawning to the reaping of a VMM whose guest resets at once.
fn whole_life(vmm: &Path, memory: u64) -> io::Result<Duration> {
    let folder = TempDir::new()?;
    let kernel = Program::Reset.write(folder.path())?;
    let config = configuration(&kernel, memory);
    let mut command = from_file(vmm, folder.path(), &config)?;
    let started = Instant::now();
    let mut running = Running(command.stdout(Stdio::null()).spawn()?);
    let status = running.0.wait()?;
    let took = started.elapsed();
    if !status.success() {
        return Err(io::Error::other(format!("{}: {status}", vmm.display())));
    }
    Ok(took)
}

/// Time from spawning to the reaping of the bare KVM program.
fn floor(irqchip: &str) -> io::Result<Duration> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["floor", "--irqchip", irqchip]);
    let started = Instant::now();
    let status = command.spawn()?.wait()?;
    let took = started.elapsed();
    if !status.success() {
        return Err(io::Error::other(format!("bare KVM program: {status}")));
    }
    Ok(took)
}

type Measurement = (String, Box<dyn Fn() -> io::Result<Duration>>, Series);

fn measurements(sides: &Sides) -> Vec<Measurement> {
    let mut all: Vec<Measurement> = Vec::new();
    let mut add = |name: String, run: Box<dyn Fn() -> io::Result<Duration>>| {
        all.push((name, run, Series::default()));
    };
    let memory = sides.memory;
    let list: Vec<(&str, PathBuf)> = sides.list();
    for (side, vmm) in &list {
        let vmm = vmm.clone();
        add(
            format!("{side}: start to API socket"),
            Box::new(move || to_socket(&vmm)),
        );
    }
    for (side, vmm) in &list {
        let vmm = vmm.clone();
        add(
            format!("{side}: start to first instruction"),
            Box::new(move || to_first_instruction(&vmm, memory)),
        );
    }
    for (side, vmm) in &list {
        let vmm = vmm.clone();
        add(
            format!("{side}: whole life"),
            Box::new(move || whole_life(&vmm, memory)),
        );
    }
    for irqchip in ["none", "split", "full"] {
        add(
            format!("bare KVM program, irqchip {irqchip}"),
            Box::new(move || floor(irqchip)),
        );
    }
    all
}

/// Measures all of it, round by round.
pub fn start(sides: &Sides) -> Result<(), String> {
    let mut all = measurements(sides);
    let count = all.len();
    for round in 0..sides.rounds as usize {
        // Each round starts elsewhere: what one measurement leaves to the host to clean up is not always the same
        // other's burden.
        for turn in 0..count {
            let (name, run, series) = &mut all[(round * 5 + turn * 7) % count];
            series.push(run().map_err(|e| format!("{name}: {e}"))?);
        }
    }
    println!("{}", Series::header());
    for (name, _, series) in &all {
        println!("{}", series.line(name));
    }
    let p50 = |wanted: &str| {
        all.iter()
            .find(|(name, ..)| name == wanted)
            .map_or(f64::NAN, |(_, _, series)| series.percentile(50))
    };
    let life = p50("lepton: whole life");
    let ratio = |what: &str, a: f64, b: f64| println!("{what:<58} {:>6.3}", a / b);
    ratio(
        "whole life / bare KVM program with the same irqchip, p50",
        life,
        p50("bare KVM program, irqchip split"),
    );
    if sides.peer.is_some() {
        for what in [
            "start to API socket",
            "start to first instruction",
            "whole life",
        ] {
            let (ours, theirs) = (format!("lepton: {what}"), format!("peer: {what}"));
            ratio(
                &format!("{what}: ours / peer's, p50"),
                p50(&ours),
                p50(&theirs),
            );
        }
    }
    Ok(())
}
