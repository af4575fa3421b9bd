//! One command in a guest, joined to our own standard streams.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use lepton_agent::client::{CallError, Client, Exec, ExecError, ExitStatus, Output, Process};
use rustix::event::{PollFd, PollFlags, poll};

use crate::OWN_FAILURE;
use crate::arguments::Command;
use crate::host_signals::HostSignals;
use crate::terminal::{self, RawMode};

/// SIGPIPE: what a program gets whose output nobody reads.
const SIGPIPE: u8 = 13;

/// Why there is no exit status of the command.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("cannot {what}: {source}")]
    Host {
        what: &'static str,
        source: io::Error,
    },
    #[error("the microVM ended before the command did")]
    VmmEnded,
    #[error("given up at the second signal {0}")]
    GivenUp(u8),
}

impl SessionError {
    /// Whether the guest seems to have ended: nobody is there to be talked to.
    pub fn guest_is_gone(&self) -> bool {
        match self {
            Self::VmmEnded => true,
            Self::Call(error) | Self::Exec(ExecError::Call(error)) => {
                matches!(error, CallError::Connection(_))
            }
            _ => false,
        }
    }

    /// Our exit status for it: 127 and 126 as a shell has them.
    pub fn status(&self) -> u8 {
        match self {
            Self::Exec(ExecError::NotFound(_)) => 127,
            Self::Exec(ExecError::NotExecutable(_)) => 126,
            Self::GivenUp(signal) => signal.saturating_add(128),
            _ => OWN_FAILURE,
        }
    }
}

fn host(what: &'static str) -> impl Fn(io::Error) -> SessionError {
    move |source| SessionError::Host { what, source }
}

/// Where a command is to run.
pub struct Session<'a> {
    pub client: &'a Client,
    pub signals: &'a HostSignals,
    /// Readable when the VMM has ended, if it is ours to watch.
    pub vmm: Option<BorrowedFd<'a>>,
}

impl Session<'_> {
    /// Runs `command` and returns its exit status as a shell would.
    ///
    /// # Errors
    /// See [`SessionError`]. The terminal is as before, whatever happens.
    pub fn run(&self, command: &Command) -> Result<u8, SessionError> {
        let interactive = terminal::is_interactive();
        let process = self.client.exec(&request(command, interactive))?;
        // Before the threads that move bytes, and for as long as they do.
        let raw = interactive
            .then(RawMode::enter)
            .transpose()
            .map_err(host("make the terminal raw"))?;
        let status = self.accompany(&process, interactive);
        drop(raw);
        Ok(status?.shell_status())
    }

    /// Moves bytes and passes signals on until the process has ended and its output is written.
    fn accompany(&self, process: &Process, interactive: bool) -> Result<ExitStatus, SessionError> {
        let (done, ended) = UnixStream::pair().map_err(host("make a socket pair"))?;
        let (sender, receiver) = mpsc::channel();
        // Never joined: it may wait for a person to type something.
        let input = process.clone();
        spawn(move || pump_input(&input))?;
        let process_to_wait_for = process.clone();
        spawn(move || {
            let _ = sender.send(finish(&process_to_wait_for, interactive));
            drop(done);
        })?;
        self.pass_signals(process, interactive, &ended)?;
        receiver
            .recv()
            .map_err(|e| host("wait for the command")(io::Error::other(e)))?
    }

    /// Returns when `ended` is closed.
    fn pass_signals(
        &self,
        process: &Process,
        interactive: bool,
        ended: &UnixStream,
    ) -> Result<(), SessionError> {
        let mut last = None;
        loop {
            let mut fds = vec![PollFd::new(ended, PollFlags::IN)];
            fds.extend(
                self.vmm
                    .map(|vmm| PollFd::from_borrowed_fd(vmm, PollFlags::IN)),
            );
            fds.extend(self.signals.poll_fds());
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(host("wait for events")(e.into())),
            }
            let has_news = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            if has_news(0) {
                return Ok(());
            }
            if self.vmm.is_some() && has_news(1) {
                return Err(SessionError::VmmEnded);
            }
            if self.signals.resized() && interactive {
                process.resize(terminal::size())?;
            }
            if let Some(signal) = self.signals.ending() {
                if last.replace(signal) == Some(signal) {
                    return Err(SessionError::GivenUp(signal));
                }
                process.signal(signal)?;
            }
        }
    }
}

fn request(command: &Command, interactive: bool) -> Exec {
    let mut environment = command.environment.clone();
    if interactive && let Some(terminal) = std::env::var_os("TERM") {
        environment.insert(0, ("TERM".into(), terminal));
    }
    let argv = match command.argv.as_slice() {
        [] => vec!["/bin/sh".into(), "-l".into()],
        argv => argv.to_vec(),
    };
    Exec {
        argv,
        environment,
        working_directory: command.workdir.clone(),
        user: command.user.clone(),
        terminal: interactive.then(terminal::size),
    }
}

fn spawn(task: impl FnOnce() + Send + 'static) -> Result<(), SessionError> {
    thread::Builder::new()
        .spawn(task)
        .map(drop)
        .map_err(host("start a thread"))
}

/// Our standard input to the process, until either has no more of it.
fn pump_input(process: &Process) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match io::stdin().lock().read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => match process.write_stdin(buffer.get(..count).unwrap_or_default()) {
                Ok(true) => {}
                // The process has closed its input, or is gone.
                Ok(false) | Err(_) => return,
            },
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _ = process.close_stdin();
}

/// The process's output to ours, and then its status.
fn finish(process: &Process, interactive: bool) -> Result<ExitStatus, SessionError> {
    thread::scope(|scope| {
        let errors = scope.spawn(|| match interactive {
            // On a terminal everything comes on standard output.
            true => Ok(()),
            false => pump_output(process, Output::Stderr, io::stderr().lock()),
        });
        pump_output(process, Output::Stdout, io::stdout().lock())?;
        match errors.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        Ok(process.wait()?)
    })
}

/// One output stream. When nobody reads ours, the process learns it as it would here, by SIGPIPE,
/// and what it still writes is dropped.
fn pump_output(process: &Process, output: Output, mut to: impl Write) -> Result<(), CallError> {
    let mut open = true;
    loop {
        let data = process.read(output)?;
        if data.is_empty() {
            return Ok(());
        }
        if open && to.write_all(&data).and_then(|()| to.flush()).is_err() {
            open = false;
            process.signal(SIGPIPE)?;
        }
    }
}
