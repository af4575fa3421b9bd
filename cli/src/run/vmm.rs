//! A VMM process of ours and its API.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use lepton_api::client::{Client, ClientError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;

use super::console::Console;
use crate::host_signals::HostSignals;

/// How long the VMM may take to open its API socket and to answer a request.
const PATIENCE: Duration = Duration::from_secs(20);

/// Nothing tells when a socket starts to listen, so it is asked this often.
const RETRY: Duration = Duration::from_millis(1);

/// How long a process may take from the closing of its sockets to its end.
const LAST_MOMENT: Duration = Duration::from_secs(1);

/// Why a VMM does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    #[error("cannot start --vmm {program:?}: {source}")]
    Start { program: PathBuf, source: io::Error },
    #[error("--vmm {program:?} ended ({status}) before its API was up{tail}")]
    Ended {
        program: PathBuf,
        status: String,
        tail: String,
    },
    #[error("--vmm {program:?} did not open its API socket within {} seconds{tail}", PATIENCE.as_secs())]
    NoApi { program: PathBuf, tail: String },
    #[error("interrupted by signal {0}")]
    Interrupted(u8),
    #[error("no answer to PUT {path}: {source}")]
    Call {
        path: &'static str,
        source: ClientError,
    },
    #[error("the VMM refused PUT {path}: {message}")]
    Refused { path: &'static str, message: String },
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// Somebody connects to the listener.
    Ready,
    /// The VMM has ended.
    Ended,
    /// A signal came.
    Signal,
    Timeout,
}

/// A running VMM. Dropping it kills it.
pub struct Vmm {
    process: Process,
    api: Client,
}

/// The child, with a descriptor that is readable when it has ended.
struct Process {
    child: Child,
    ended: OwnedFd,
    status: Option<ExitStatus>,
}

impl Vmm {
    /// Starts `program` with its files in `directory` and waits until its API is up.
    pub fn start(
        program: &Path,
        directory: &Path,
        console: &Console,
        signals: &HostSignals,
    ) -> Result<Self, VmmError> {
        let socket = directory.join("api.sock");
        let mut process =
            Process::start(program, &socket, console).map_err(|source| VmmError::Start {
                program: program.to_owned(),
                source,
            })?;
        let deadline = Instant::now() + PATIENCE;
        let failed = |source| VmmError::Start {
            program: program.to_owned(),
            source,
        };
        loop {
            match Client::connect(&socket) {
                Ok(api) => {
                    api.set_timeout(Some(PATIENCE)).map_err(failed)?;
                    return Ok(Self { process, api });
                }
                Err(e) if not_yet(&e) => {}
                Err(e) => return Err(failed(e)),
            }
            let retry = deadline.min(Instant::now() + RETRY);
            match process.wait(None, Some(signals), retry).map_err(failed)? {
                Woken::Ended => {
                    return Err(VmmError::Ended {
                        program: program.to_owned(),
                        status: process.status(),
                        tail: console.tail(),
                    });
                }
                Woken::Signal => {
                    signals.resized();
                    if let Some(signal) = signals.ending() {
                        return Err(VmmError::Interrupted(signal));
                    }
                }
                Woken::Ready | Woken::Timeout if Instant::now() < deadline => {}
                Woken::Ready | Woken::Timeout => {
                    process.kill();
                    return Err(VmmError::NoApi {
                        program: program.to_owned(),
                        tail: console.tail(),
                    });
                }
            }
        }
    }

    /// Sends a PUT request, and takes anything but success for a refusal.
    pub fn put(&mut self, path: &'static str, body: &Value) -> Result<(), VmmError> {
        let (status, reply) = self
            .api
            .put(path, &body.to_string())
            .map_err(|source| VmmError::Call { path, source })?;
        if status == 204 || status == 200 {
            return Ok(());
        }
        let message = serde_json::from_str::<Value>(&reply)
            .ok()
            .and_then(|reply| Some(reply.get("fault_message")?.as_str()?.to_owned()))
            .unwrap_or_else(|| format!("status {status} {reply}"));
        Err(VmmError::Refused { path, message })
    }

    /// Readable when the VMM has ended.
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.process.ended.as_fd()
    }

    /// Waits for the VMM's end, a connection to `listener`, a signal, or `deadline`.
    pub fn wait(
        &mut self,
        listener: Option<&UnixListener>,
        signals: Option<&HostSignals>,
        deadline: Instant,
    ) -> io::Result<Woken> {
        self.process.wait(listener, signals, deadline)
    }

    /// Whether it ends by itself, now or in the moment that a connection it broke suggests.
    pub fn has_ended(&mut self) -> bool {
        let deadline = Instant::now() + LAST_MOMENT;
        matches!(self.wait(None, None, deadline), Ok(Woken::Ended))
    }

    /// Kills the VMM, unless it has ended, and waits for its end.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// How it ended, in words.
    pub fn status(&self) -> String {
        self.process.status()
    }

    /// Whether it ended as it does when the guest has shut down.
    pub fn succeeded(&self) -> bool {
        self.process.status.is_some_and(|status| status.success())
    }
}

/// The socket is not there, or nobody listens on it.
fn not_yet(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

impl Process {
    fn start(program: &Path, socket: &Path, console: &Console) -> io::Result<Self> {
        let (stdout, stderr) = console.streams()?;
        let child = Command::new(program)
            .arg("--api-sock")
            .arg(socket)
            .args(["--id", "lepton-run"])
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            // Ctrl-C at the terminal is for us to act on, not for the VMM.
            .process_group(0)
            .spawn()?;
        let pid = Pid::from_child(&child);
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(ended) => Ok(Self {
                child,
                ended,
                status: None,
            }),
            Err(error) => {
                let mut child = child;
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }

    fn wait(
        &mut self,
        listener: Option<&UnixListener>,
        signals: Option<&HostSignals>,
        deadline: Instant,
    ) -> io::Result<Woken> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = vec![PollFd::new(&self.ended, PollFlags::IN)];
            fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
            fds.extend(signals.iter().flat_map(|signals| signals.poll_fds()));
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Ok(Woken::Timeout),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let first = fds.iter().position(|fd| !fd.revents().is_empty());
            return match (first, listener) {
                (Some(0), _) => {
                    self.status = Some(self.child.wait()?);
                    Ok(Woken::Ended)
                }
                (Some(1), Some(_)) => Ok(Woken::Ready),
                _ => Ok(Woken::Signal),
            };
        }
    }

    fn kill(&mut self) {
        if self.status.is_none() {
            // Fails only when it has ended, and then the status is there to be taken.
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }

    fn status(&self) -> String {
        match self.status {
            Some(status) => status.to_string(),
            None => "still running".to_owned(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
