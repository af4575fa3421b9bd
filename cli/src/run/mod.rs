//! The life of a microVM for one command: start the VMM, configure it, boot, run the command, shut
//! down. Whatever happens on the way, the VMM is gone and the private directory removed afterwards.

mod configuration;
mod console;
mod host;
mod vmm;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lepton_agent::client::{Client, ConnectError};
use lepton_agent::ready::{Ready, ReadyError};
use lepton_agent::{PROTOCOL_VERSION, READY_PORT};

use crate::arguments::Run;
use crate::host_signals::HostSignals;
use crate::session::{Session, SessionError};
use console::Console;
use vmm::{Vmm, VmmError, Woken};

/// How long a guest may take to shut down; then the VMM is killed. Longer than the agent gives the
/// guest's programs to end.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(15);

/// How long the agent's line may take once the agent has connected.
const LINE_PATIENCE: Duration = Duration::from_secs(5);

/// Why a microVM did not run its command.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Host(#[from] host::HostError),
    #[error("cannot {what}: {source}")]
    Setup {
        what: &'static str,
        source: io::Error,
    },
    #[error("--console-log {path:?}: {source}")]
    ConsoleLog { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error("the guest did not boot: {0}{1}")]
    Boot(BootError, String),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Why a guest did not boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("its agent was not up after {0} seconds; allow more with --timeout SECONDS")]
    Timeout(u64),
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error("the VMM ended ({0}) before the agent was up")]
    VmmEnded(String),
    #[error("interrupted by signal {0}")]
    Interrupted(u8),
    #[error(transparent)]
    Ready(#[from] ReadyError),
    #[error("its agent {version} speaks protocol {protocol}, this program {PROTOCOL_VERSION}")]
    Protocol { version: String, protocol: u32 },
    #[error("cannot wait for it: {0}")]
    Wait(#[from] io::Error),
}

fn setup(what: &'static str) -> impl Fn(io::Error) -> RunError {
    move |source| RunError::Setup { what, source }
}

/// Boots a microVM, runs the command in it and returns the command's exit status.
///
/// # Errors
/// See [`RunError`].
pub fn run(arguments: &Run) -> Result<u8, RunError> {
    host::check(arguments)?;
    let signals = HostSignals::take().map_err(setup("take the signals"))?;
    let directory = tempfile::Builder::new()
        .prefix("lepton-")
        .tempdir()
        .map_err(setup("make a private directory"))?;
    let console = Console::new(arguments, directory.path())?;

    let vsock = directory.path().join("v.sock");
    let mut ready_path = vsock.clone().into_os_string();
    ready_path.push(format!("_{READY_PORT}"));
    let ready = UnixListener::bind(&ready_path).map_err(setup("listen for the guest's agent"))?;

    let mut vmm = Vmm::start(&arguments.vmm, directory.path(), &console, &signals)?;
    for (path, body) in configuration::requests(arguments, &vsock) {
        vmm.put(path, &body)?;
    }
    let took = match boot(&mut vmm, &ready, &signals, arguments.timeout) {
        Ok(took) => took,
        Err(error) => {
            // The console's last words are there once the VMM is gone.
            vmm.kill();
            return Err(RunError::Boot(error, console.tail()));
        }
    };
    drop(ready);
    if !arguments.quiet {
        eprintln!(
            "booted in {:.1} ms (InstanceStart to agent ready)",
            took.as_secs_f64() * 1000.0
        );
    }

    let client = Client::connect(&vsock)?;
    let session = Session {
        client: &client,
        signals: &signals,
        vmm: Some(vmm.ended_fd()),
    };
    let result = session.run(&arguments.command);
    let gone = result.as_ref().is_err_and(SessionError::guest_is_gone);
    if !gone || !vmm.has_ended() {
        shut_down(&client, &mut vmm, &console);
        return Ok(result?);
    }
    // A guest may well end by itself. If it was not by itself, its last words are of interest.
    if !vmm.succeeded() {
        eprintln!("lepton: the VMM ended ({}){}", vmm.status(), console.tail());
    }
    Err(SessionError::VmmEnded.into())
}

/// Starts the machine and waits for its agent. Returns how long that took.
fn boot(
    vmm: &mut Vmm,
    ready: &UnixListener,
    signals: &HostSignals,
    seconds: u64,
) -> Result<Duration, BootError> {
    let start = Instant::now();
    match vmm.put("/actions", &configuration::instance_start()) {
        // It may have gone down before its answer was out; its end says more then.
        Err(VmmError::Call { .. }) if vmm.has_ended() => {}
        result => result?,
    }
    let deadline = start + Duration::from_secs(seconds);
    loop {
        match vmm.wait(Some(ready), Some(signals), deadline)? {
            Woken::Ready => break,
            Woken::Ended => return Err(BootError::VmmEnded(vmm.status())),
            Woken::Timeout => return Err(BootError::Timeout(seconds)),
            Woken::Signal => {
                if let Some(signal) = signals.ending() {
                    return Err(BootError::Interrupted(signal));
                }
                // The terminal changed its size: nothing to do yet.
                signals.resized();
            }
        }
    }
    let took = start.elapsed();
    let (stream, _) = ready.accept()?;
    stream.set_read_timeout(Some(LINE_PATIENCE))?;
    let Ready {
        version, protocol, ..
    } = Ready::read_from(stream)?;
    if protocol != PROTOCOL_VERSION {
        return Err(BootError::Protocol { version, protocol });
    }
    Ok(took)
}

/// Shuts the guest down, or failing that the VMM. The command's status is known by now, so what
/// goes wrong here is only told.
fn shut_down(client: &Client, vmm: &mut Vmm, console: &Console) {
    if let Err(error) = client.shutdown() {
        eprintln!("lepton: cannot shut the guest down: {error}");
        vmm.kill();
        return;
    }
    let deadline = Instant::now() + SHUTDOWN_PATIENCE;
    match vmm.wait(None, None, deadline) {
        Ok(Woken::Ended) if vmm.succeeded() => {}
        Ok(Woken::Ended) => eprintln!(
            "lepton: the guest shut down, but its VMM ended with {}{}",
            vmm.status(),
            console.tail()
        ),
        _ => {
            eprintln!(
                "lepton: the guest did not shut down within {} seconds and was killed",
                SHUTDOWN_PATIENCE.as_secs()
            );
            vmm.kill();
        }
    }
}
