//! Work in a Linux guest, as a part of what the same program does on its host at the same time.
//!
//! In each round the guest and the host do each kind of work one after the other, the one or the other first as it is drawn. Both
//! are given the same: the image behind the guest's drive, the same server for connections.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use lepton_agent::client::{CallError, Client, Exec, ExitStatus, Output, Process};
use lepton_tests::programs::hardware_kvm;

use super::linux::{self, Announcement};
use super::{Case, Context, Place, Reading, for_each_side};
use crate::catalogue::{FigureKind, higher};
use crate::guest::Guest;
use crate::load::stream::Server;
use crate::machine::{Drive, Engine};
use crate::process::{Failure, Running};
use crate::side::{Driver, Side};
use crate::tap;

const fn part(id: &'static str, title: &'static str) -> FigureKind {
    higher(id, title, "x")
}

/// All figures.
pub const FIGURES: &[FigureKind] = &[
    part(
        "parity.integer",
        "Integer arithmetic in the guest, of the host's",
    ),
    part(
        "parity.float",
        "Floating-point arithmetic in the guest, of the host's",
    ),
    part(
        "parity.memory",
        "Fresh pages touched in the guest, of the host's",
    ),
    part(
        "parity.read-sequential",
        "128 KiB reads of a drive one after the other, of those of its image on the host",
    ),
    part(
        "parity.read-random",
        "4 KiB reads of a drive, anywhere, one at a time, of those of its image on the host",
    ),
    part(
        "parity.write-sequential",
        "128 KiB writes to a drive one after the other, of those to its image on the host",
    ),
    part(
        "parity.write-random",
        "4 KiB writes to a drive, anywhere, one at a time, of those to its image on the host",
    ),
    part(
        "parity.net-send",
        "Bytes sent over TCP by the guest to its host, of those over the host's loopback",
    ),
    part(
        "parity.net-receive",
        "Bytes received over TCP by the guest from its host, of those over the host's loopback",
    ),
    part(
        "parity.vsock-send",
        "Bytes sent over vsock by the guest to its host, of those over a Unix socket on the host",
    ),
    part(
        "parity.vsock-receive",
        "Bytes received over vsock by the guest from its host, of those over a Unix socket on the host",
    ),
];

/// With what each kind of work is done, in the order of the figures.
const WORK: [(&str, With); 11] = [
    ("integer", With::Nothing),
    ("float", With::Nothing),
    ("memory", With::Nothing),
    ("read-sequential", With::Drive),
    ("read-random", With::Drive),
    ("write-sequential", With::Drive),
    ("write-random", With::Drive),
    ("send", With::Network),
    ("receive", With::Network),
    ("send", With::Vsock),
    ("receive", With::Vsock),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum With {
    Nothing,
    Drive,
    Network,
    Vsock,
}

/// Memory of the guest in MiB: room for what is touched.
const MEMORY: u64 = 256;
/// Bytes of the drive.
const DRIVE: usize = 64 << 20;
/// The drive in the guest.
const DEVICE: &str = "/dev/vdb";
/// The host's address and the guest's, of those for a link alone (RFC 3927).
const HOST: &str = "169.254.93.1";
const GUEST: &str = "169.254.93.2";
/// The host's port of vsock.
const PORT: u32 = 5201;
/// Where the program is in the guest.
const PROGRAM: &str = "/tmp/lepton-load";

/// All of it.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    const IDS: [&str; 11] = {
        let mut ids = [""; 11];
        let mut index = 0;
        while index < ids.len() {
            ids[index] = FIGURES[index].id;
            index += 1;
        }
        ids
    };
    for_each_side(context, &IDS, move |side, driver| {
        run(context, side, driver)
    })
}

/// A guest that waits for work, and what it and the host are given.
struct Bench<'a> {
    context: &'a Context,
    running: Running,
    agent: Client,
    drive: PathBuf,
    network: Server,
    vsock: Server,
    _place: Place,
}

fn run(context: &Context, side: &Side, driver: &dyn Driver) -> Result<Vec<Reading>, Failure> {
    let guest_first = fastrand::bool();
    let bench = Bench::boot(context, side, driver)?;
    let mut readings = Vec::new();
    for (figure, (work, with)) in FIGURES.iter().zip(WORK) {
        let (guest, host) = if guest_first {
            let guest = bench.in_guest(work, with)?;
            (guest, bench.on_host(work, with)?)
        } else {
            let host = bench.on_host(work, with)?;
            (bench.in_guest(work, with)?, host)
        };
        readings.push(Reading {
            figure: figure.id,
            value: guest / host,
        });
    }
    Ok(readings)
}

impl<'a> Bench<'a> {
    fn boot(context: &'a Context, side: &Side, driver: &dyn Driver) -> Result<Self, Failure> {
        let (kernel, image, file_system) = context.linux.kernel_and_image(side)?;
        hardware_kvm().map_err(Failure::NotOffered)?;
        let program = std::fs::read(&context.load)
            .map_err(|error| Failure::NotOffered(format!("{}: {error}", context.load.display())))?;
        let place = Place::new(Guest::Idle, context.patience)?;
        let mut taps = context.taps(1)?;
        for tap in &taps {
            tap::set_address(tap, &format!("{HOST}/30"))?;
        }
        let drive = place.folder().join("drive");
        // Of bytes, not of holes: those are read faster.
        File::create(&drive)?.write_all(&vec![0x5a; DRIVE])?;

        let mut machine = place.machine();
        let root =
            format!("{file_system} init=/sbin/init ip={GUEST}::{HOST}:255.255.255.252::eth0:off");
        linux::boots_from(&mut machine, &kernel, &image, &root);
        machine.memory_mib = MEMORY;
        machine.drives.push(Drive {
            path: drive.clone(),
            root: false,
            read_only: false,
            engine: Engine::Sync,
        });
        machine.taps.append(&mut taps);
        let socket = place.folder().join("v.sock");
        machine.vsock = Some(socket.clone());
        let announcement = Announcement::of(&socket)?;
        let mut path = socket.clone().into_os_string();
        path.push(format!("_{PORT}"));
        let (network, vsock) = (Server::tcp()?, Server::unix(path.into())?);

        let running = place.boots(driver, &machine)?;
        announcement.wait(&running, context.patience)?;
        let bench = Self {
            context,
            agent: linux::agent(&socket)?,
            running,
            drive,
            network,
            vsock,
            _place: place,
        };
        let install = format!("cat >{PROGRAM} && chmod +x {PROGRAM}");
        bench.execute(&["sh", "-c", &install], program)?;
        Ok(bench)
    }

    fn in_guest(&self, work: &str, with: With) -> Result<f64, Failure> {
        let target = match with {
            With::Nothing => None,
            With::Drive => Some(DEVICE.to_owned()),
            With::Network => Some(format!("tcp:{HOST}:{}", self.network.port())),
            With::Vsock => Some(format!("vsock:2:{PORT}")),
        };
        let words = [PROGRAM, work].into_iter().chain(target.as_deref());
        let output = self.execute(&words.collect::<Vec<_>>(), Vec::new())?;
        parse(&output).ok_or_else(|| {
            self.running
                .failure(format!("{work} in the guest: {output:?}"))
        })
    }

    fn on_host(&self, work: &str, with: With) -> Result<f64, Failure> {
        let mut command = Command::new(&self.context.load);
        command.arg(work);
        match with {
            With::Nothing => {}
            With::Drive => drop(command.arg(&self.drive)),
            With::Network => drop(command.arg(self.network.address().to_string())),
            With::Vsock => drop(command.arg(self.vsock.address().to_string())),
        }
        on_host(&mut command)
    }

    /// Executes a program in the guest, which must succeed, and returns its output.
    fn execute(&self, words: &[&str], input: Vec<u8>) -> Result<String, Failure> {
        let exec = Exec {
            argv: words.iter().map(OsString::from).collect(),
            ..Exec::default()
        };
        let line = words.join(" ");
        let started = self.agent.exec(&exec);
        let process = started.map_err(|error| self.running.failure(format!("{line}: {error}")))?;
        let (done, result) = mpsc::channel();
        // On a thread of its own, so that a guest that stands still is a failure and no standstill.
        thread::spawn(move || done.send(talk(&process, &input)));
        match result.recv_timeout(self.context.patience) {
            Ok(Ok((ExitStatus::Exited(0), output, _))) => Ok(output),
            Ok(Ok((status, _, errors))) => Err(self.running.failure(format!(
                "{line} in the guest: {status:?}, {}",
                errors.trim()
            ))),
            Ok(Err(error)) => Err(self.running.failure(format!("{line}: {error}"))),
            Err(_) => Err(self
                .running
                .failure(format!("timeout: {line} in the guest"))),
        }
    }
}

/// Feeds a process and reads what it writes, to its end.
fn talk(process: &Process, input: &[u8]) -> Result<(ExitStatus, String, String), CallError> {
    if process.write_stdin(input)? {
        process.close_stdin()?;
    }
    // It writes a line at most, which fits into a pipe.
    let output = read(process, Output::Stdout)?;
    let errors = read(process, Output::Stderr)?;
    Ok((process.wait()?, output, errors))
}

fn read(process: &Process, stream: Output) -> Result<String, CallError> {
    let mut all = Vec::new();
    loop {
        let more = process.read(stream)?;
        if more.is_empty() {
            return Ok(String::from_utf8_lossy(&all).into_owned());
        }
        all.extend(more);
    }
}

fn on_host(command: &mut Command) -> Result<f64, Failure> {
    let output = command.stdin(Stdio::null()).output()?;
    let rate = parse(&String::from_utf8_lossy(&output.stdout));
    rate.filter(|_| output.status.success()).ok_or_else(|| {
        let errors = String::from_utf8_lossy(&output.stderr);
        Failure::because(format!("on the host: {}, {}", output.status, errors.trim()))
    })
}

/// The rate that the program printed.
fn parse(output: &str) -> Option<f64> {
    let rate: f64 = output.trim().parse().ok()?;
    (rate.is_finite() && rate > 0.0).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;

    #[test]
    fn every_figure_is_of_a_kind_of_work_that_there_is() {
        for (figure, (work, with)) in FIGURES.iter().zip(WORK) {
            let known = load::find(work).unwrap();
            let fits = match with {
                With::Nothing => matches!(known.target, load::Target::Nothing(_)),
                With::Drive => matches!(known.target, load::Target::Drive(_)),
                With::Network | With::Vsock => matches!(known.target, load::Target::Server(_)),
            };
            assert!(fits && figure.id.ends_with(work), "{}", figure.id);
        }
        assert_eq!(FIGURES.len(), WORK.len());
    }

    #[test]
    fn only_a_rate_is_one() {
        assert_eq!(parse("12.5\n"), Some(12.5));
        for wrong in ["", "0", "-1", "inf", "NaN", "1 2"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_program_that_fails_on_the_host_is_told() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo 5; echo reason >&2; exit 3"]);
        let error = on_host(&mut command).unwrap_err().to_string();
        assert!(error.contains("reason") && error.contains('3'), "{error}");
        assert_eq!(on_host(Command::new("echo").arg("5")).ok(), Some(5.0));
    }
}
