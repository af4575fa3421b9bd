//! The host's side of the protocol. All that comes from the guest is bounded here: see the crate's
//! own documentation.

mod calls;
mod connect;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub use connect::{ConnectError, connect_vsock};

use crate::protocol::{self as proto, exec_response, wait_response};
use calls::Calls;

/// How long a call that does not block may take: a guest that is slower is stuck.
const BOUNDED: Option<Duration> = Some(Duration::from_secs(30));

/// For calls that block until the guest has what they wait for, or the connection ends.
const UNBOUNDED: Option<Duration> = None;

/// The longest text taken from a guest, in characters.
const MAX_TEXT: usize = 256;

/// The most bytes to hand to one [`Process::write_stdin`]: well below ttrpc's limit of 4 MiB.
const MAX_WRITE: usize = 256 * 1024;

/// Why a call to the agent has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection or the guest is gone.
    #[error("the connection to the guest's agent is gone: {0}")]
    Connection(String),
    /// The agent refused.
    #[error("the guest's agent refused: {0}")]
    Refused(String),
    /// The answer makes no sense.
    #[error("the guest's agent sent a malformed answer: {0}")]
    Malformed(&'static str),
}

/// Why a process did not start.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is no such program; a shell's status for it is 127.
    #[error("{0}")]
    NotFound(String),
    /// The program cannot be executed, as this user or in this directory; a shell says 126.
    #[error("{0}")]
    NotExecutable(String),
    /// The call itself failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// What the agent says of itself and its guest. Texts are printable and bounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The agent's version.
    pub agent_version: String,
    /// The guest kernel's release, as `uname -r` prints it.
    pub kernel_release: String,
    /// The guest's host name.
    pub hostname: String,
    /// Microseconds since the guest's kernel started.
    pub uptime_us: u64,
    /// The same, when the agent started.
    pub start_us: u64,
    /// The same, when the agent could be connected to.
    pub ready_us: u64,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

impl From<TerminalSize> for proto::TerminalSize {
    fn from(size: TerminalSize) -> Self {
        Self {
            rows: size.rows.into(),
            columns: size.columns.into(),
            ..Default::default()
        }
    }
}

/// A process to start.
#[derive(Debug, Clone, Default)]
pub struct Exec {
    /// The program, looked up in the guest's `PATH`, and its arguments.
    pub argv: Vec<OsString>,
    /// Added to the default environment (`PATH`, `HOME`).
    pub environment: Vec<(OsString, OsString)>,
    /// `/` when `None`.
    pub working_directory: Option<OsString>,
    /// `USER[:GROUP]`, names or numbers; root when `None`.
    pub user: Option<String>,
    /// With a terminal of this size; then all output comes on [`Output::Stdout`].
    pub terminal: Option<TerminalSize>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It exited with this code.
    Exited(u8),
    /// It was killed by this signal.
    Killed(u8),
}

impl ExitStatus {
    /// The status as a shell gives it: the code, or 128 and the signal.
    pub fn shell_status(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => signal.saturating_add(128),
        }
    }
}

/// An output stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Standard output, or all of a terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A connection with the agent. Clones share it. Processes live no longer than it does.
#[derive(Clone)]
pub struct Client {
    rpc: Calls,
}

impl Client {
    /// Connects through the VMM's vsock socket.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(uds_path: &Path) -> Result<Self, ConnectError> {
        Self::from_stream(connect_vsock(uds_path, crate::AGENT_PORT)?)
    }

    /// Speaks over `stream`, at whose other end the agent is.
    ///
    /// # Errors
    /// [`ConnectError::Setup`] when the host lacks the resources.
    pub fn from_stream(stream: UnixStream) -> Result<Self, ConnectError> {
        let rpc = Calls::over(stream)?;
        Ok(Self { rpc })
    }

    /// Asks the agent about itself and its guest, and checks that it speaks our protocol.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn info(&self) -> Result<Info, CallError> {
        let request = proto::GetInfoRequest::default();
        let info: proto::GetInfoResponse = self.rpc.call("GetInfo", BOUNDED, &request)?;
        if info.protocol_version != crate::PROTOCOL_VERSION {
            return Err(CallError::Malformed("another version of the protocol"));
        }
        Ok(Info {
            agent_version: printable(&info.agent_version),
            kernel_release: printable(&info.kernel_release),
            hostname: printable(&info.hostname),
            uptime_us: info.uptime_us,
            start_us: info.start_us,
            ready_us: info.ready_us,
        })
    }

    /// Starts a process.
    ///
    /// # Errors
    /// See [`ExecError`].
    pub fn exec(&self, exec: &Exec) -> Result<Process, ExecError> {
        let bytes = |text: &OsStr| text.as_bytes().to_vec();
        let request = proto::ExecRequest {
            argv: exec.argv.iter().map(|word| bytes(word)).collect(),
            env: exec
                .environment
                .iter()
                .map(|(key, value)| [key.as_bytes(), b"=", value.as_bytes()].concat())
                .collect(),
            working_directory: exec
                .working_directory
                .as_deref()
                .map(bytes)
                .unwrap_or_default(),
            user: exec.user.clone().unwrap_or_default(),
            terminal: exec.terminal.map(proto::TerminalSize::from).into(),
            ..Default::default()
        };
        let response: proto::ExecResponse = self.rpc.call("Exec", BOUNDED, &request)?;
        match response.outcome {
            Some(exec_response::Outcome::Process(id)) => Ok(Process {
                rpc: self.rpc.clone(),
                id,
            }),
            Some(exec_response::Outcome::Failure(failure)) => {
                let message = printable(&failure.message);
                Err(match failure.reason.enum_value_or_default() {
                    proto::ExecFailureReason::EXEC_FAILURE_REASON_NOT_FOUND => {
                        ExecError::NotFound(message)
                    }
                    _ => ExecError::NotExecutable(message),
                })
            }
            _ => Err(CallError::Malformed("neither a process nor a failure").into()),
        }
    }

    /// Asks the guest to shut down. It may do so faster than it can answer, so a connection that
    /// ends instead of an answer is one; the VMM's end shows that the guest did.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn shutdown(&self) -> Result<(), CallError> {
        let request = proto::ShutdownRequest::default();
        match self.rpc.call("Shutdown", BOUNDED, &request) {
            Ok(proto::ShutdownResponse { .. }) | Err(CallError::Connection(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A process in the guest. All methods may be called at once from several threads, but only one
/// [`write_stdin`](Self::write_stdin) at a time.
#[derive(Clone)]
pub struct Process {
    rpc: Calls,
    id: u64,
}

impl Process {
    /// Writes all of `data` to standard input, blocking while the process does not read. False:
    /// the process will read no more, and what is left of `data` was dropped.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn write_stdin(&self, data: &[u8]) -> Result<bool, CallError> {
        for chunk in data.chunks(MAX_WRITE) {
            let request = proto::WriteStdinRequest {
                process: self.id,
                data: chunk.to_vec(),
                ..Default::default()
            };
            let response: proto::WriteStdinResponse =
                self.rpc.call("WriteStdin", UNBOUNDED, &request)?;
            if response.closed {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Closes standard input. On a terminal this types the end-of-file character.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn close_stdin(&self) -> Result<(), CallError> {
        let request = proto::CloseStdinRequest {
            process: self.id,
            ..Default::default()
        };
        let _: proto::CloseStdinResponse = self.rpc.call("CloseStdin", UNBOUNDED, &request)?;
        Ok(())
    }

    /// The next bytes of an output stream, blocking until there are some; empty at its end. A
    /// stream is at its end when all its writers are gone, or the process has ended and all that
    /// had been written was read.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn read(&self, output: Output) -> Result<Vec<u8>, CallError> {
        let stream = match output {
            Output::Stdout => proto::OutputStream::OUTPUT_STREAM_STDOUT,
            Output::Stderr => proto::OutputStream::OUTPUT_STREAM_STDERR,
        };
        let request = proto::ReadRequest {
            process: self.id,
            stream: stream.into(),
            ..Default::default()
        };
        let response: proto::ReadResponse = self.rpc.call("Read", UNBOUNDED, &request)?;
        Ok(response.data)
    }

    /// Tells the process's terminal its new size.
    ///
    /// # Errors
    /// [`CallError::Refused`] when the process has no terminal, or as for all calls.
    pub fn resize(&self, size: TerminalSize) -> Result<(), CallError> {
        let request = proto::ResizeRequest {
            process: self.id,
            size: Some(size.into()).into(),
            ..Default::default()
        };
        let _: proto::ResizeResponse = self.rpc.call("Resize", BOUNDED, &request)?;
        Ok(())
    }

    /// Sends a signal, by Linux's number, to the process's group. False: it has ended already.
    ///
    /// # Errors
    /// [`CallError::Refused`] for a number that is no signal, or as for all calls.
    pub fn signal(&self, signal: u8) -> Result<bool, CallError> {
        let request = proto::SignalRequest {
            process: self.id,
            signal: signal.into(),
            ..Default::default()
        };
        let response: proto::SignalResponse = self.rpc.call("Signal", BOUNDED, &request)?;
        Ok(!response.ended)
    }

    /// Waits for the process to end. The agent forgets a process that was waited for and whose
    /// output was read to its end; calls for it are then refused.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn wait(&self) -> Result<ExitStatus, CallError> {
        let request = proto::WaitRequest {
            process: self.id,
            ..Default::default()
        };
        let response: proto::WaitResponse = self.rpc.call("Wait", UNBOUNDED, &request)?;
        let byte = |value: u32| {
            u8::try_from(value).map_err(|_| CallError::Malformed("an exit status beyond 255"))
        };
        match response.status {
            Some(wait_response::Status::ExitCode(code)) => Ok(ExitStatus::Exited(byte(code)?)),
            Some(wait_response::Status::Signal(signal)) => Ok(ExitStatus::Killed(byte(signal)?)),
            _ => Err(CallError::Malformed("no exit status")),
        }
    }
}

/// A guest's text, safe to show on a person's terminal.
fn printable(text: &str) -> String {
    text.chars()
        .take(MAX_TEXT)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Shutdown;
    use std::sync::mpsc;

    /// A peer that has ended only its own half takes requests still, and nobody answers them.
    #[test]
    fn what_is_asked_after_the_end_fails() {
        let (host, guest) = UnixStream::pair().unwrap();
        let client = Client::from_stream(host).unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        let process = Process {
            rpc: client.rpc.clone(),
            id: 1,
        };
        // The end is known at the latest when the first call has failed.
        for call in 1..=2 {
            let (done, answer) = mpsc::channel();
            let process = process.clone();
            std::thread::spawn(move || done.send(process.wait()));
            let answer = answer.recv_timeout(Duration::from_secs(30));
            assert!(
                matches!(answer, Ok(Err(CallError::Connection(_)))),
                "call {call}: {answer:?}"
            );
        }
    }

    #[test]
    fn a_guests_text_is_bounded_and_printable() {
        assert_eq!(printable("ok \x1b[2J\n"), "ok ?[2J?");
        assert_eq!(printable(&"é".repeat(5000)).chars().count(), MAX_TEXT);
    }

    #[test]
    fn a_shells_status() {
        assert_eq!(ExitStatus::Exited(3).shell_status(), 3);
        assert_eq!(ExitStatus::Killed(9).shell_status(), 137);
        assert_eq!(ExitStatus::Killed(255).shell_status(), 255);
    }
}
