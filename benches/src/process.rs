//! A program under measurement: started, watched, ended, with nothing left behind.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use lepton_tests::reaper;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::interrupt;

/// Why there is no value.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// This VMM, or this host, has no such thing; nothing was tried.
    #[error("{0}")]
    NotOffered(String),
    /// The person pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// It was tried and did not work.
    #[error("{reason}")]
    Failed {
        /// One line.
        reason: String,
        /// The ends of its console and of its messages.
        log: String,
    },
}

impl Failure {
    /// A failure without a log.
    pub fn because(reason: impl Into<String>) -> Self {
        Failure::Failed {
            reason: reason.into(),
            log: String::new(),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::because(error.to_string())
    }
}

/// Bytes of the guest's console that are kept.
const CONSOLE: usize = 64 << 10;
/// Bytes of each log that a failure shows.
const TAIL: usize = 2048;

/// A process that does not outlive its measurement.
pub struct Running {
    child: Child,
    pidfd: OwnedFd,
    stdout: Option<ChildStdout>,
    console: Vec<u8>,
    logs: Vec<PathBuf>,
    name: String,
    /// When it was asked for.
    pub started: Instant,
    deadline: Instant,
    first_thread: Option<Duration>,
}

/// The name under which a driver lets a VMM write its log into the folder of a measurement.
pub const VMM_LOG: &str = "vmm.log";

impl Running {
    /// Starts `command`, which may take no longer than `patience` for all that is waited for. Messages go to `folder`.
    ///
    /// The command must name nothing that makes the standard library fork, such as a current folder: a copy of our own
    /// page tables would be counted as the VMM's start.
    pub fn spawn(
        command: &mut Command,
        folder: &Path,
        patience: Duration,
    ) -> Result<Self, Failure> {
        let errors = folder.join("stderr");
        let name = command.get_program().display().to_string();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors)?);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .map_err(|error| Failure::because(format!("cannot start {name}: {error}")))?;
        let stdout = child.stdout.take();
        let pidfd = reaper::watch(&child).inspect_err(|_| end(&mut child))?;
        Ok(Self {
            child,
            pidfd,
            stdout,
            console: Vec::new(),
            logs: vec![errors, folder.join(VMM_LOG)],
            name,
            started,
            deadline: started + patience,
            first_thread: None,
        })
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A failure of this process, with the ends of what it wrote.
    pub fn failure(&self, reason: impl Into<String>) -> Failure {
        let mut log = String::new();
        let mut add = |name: &str, bytes: &[u8]| {
            let tail = bytes
                .get(bytes.len().saturating_sub(TAIL)..)
                .unwrap_or(bytes);
            if !tail.is_empty() {
                let text = String::from_utf8_lossy(tail);
                log.push_str(&format!("--- {name}\n{}\n", text.trim_end()));
            }
        };
        for path in &self.logs {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            add(&name, &std::fs::read(path).unwrap_or_default());
        }
        add("standard output and console", &self.console);
        Failure::Failed {
            reason: reason.into(),
            log,
        }
    }

    /// Waits until `descriptor` is readable, as long as the process may take.
    pub fn readable(&self, descriptor: BorrowedFd<'_>, what: &str) -> Result<(), Failure> {
        let mut fds = vec![PollFd::new(&descriptor, PollFlags::IN)];
        let interrupted = interrupt::descriptor();
        fds.extend(
            interrupted
                .as_ref()
                .map(|fd| PollFd::new(fd, PollFlags::IN)),
        );
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let timeout =
                Timespec::try_from(left).map_err(|_| Failure::because("a wait too long"))?;
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => {
                    let waited = self.started.elapsed().as_secs_f64();
                    let reason = format!("timeout: {what} not seen {waited:.1} s after its start");
                    return Err(self.failure(reason));
                }
                Ok(_) if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) => {
                    return Err(Failure::Interrupted);
                }
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }

    /// Reads what the console has, at least one byte. `None` at its end.
    fn read(&mut self, what: &str) -> Result<Option<usize>, Failure> {
        let Some(stdout) = &self.stdout else {
            return Ok(None);
        };
        self.readable(stdout.as_fd(), what)?;
        let mut chunk = [0; 4096];
        let count = match &mut self.stdout {
            Some(stdout) => stdout.read(&mut chunk)?,
            None => 0,
        };
        if count == 0 {
            self.stdout = None;
            return Ok(None);
        }
        self.console
            .extend_from_slice(chunk.get(..count).unwrap_or_default());
        let excess = self.console.len().saturating_sub(CONSOLE);
        self.console.drain(..excess);
        Ok(Some(count))
    }

    /// Waits for `text` on the console, and returns when it came.
    pub fn says(&mut self, text: &[u8], what: &str) -> Result<Instant, Failure> {
        loop {
            let read = self.read(what)?;
            let now = Instant::now();
            let Some(count) = read else {
                let status = self.ended_status()?;
                return Err(self.failure(format!("{} ended ({status}) before {what}", self.name)));
            };
            let from = self.console.len().saturating_sub(count + text.len());
            let new = self.console.get(from..).unwrap_or_default();
            if new.windows(text.len()).any(|window| window == text) {
                return Ok(now);
            }
        }
    }

    /// The console to its end, when the process has closed it.
    pub fn console(&mut self) -> Result<&[u8], Failure> {
        while self.read("the end of its output")?.is_some() {}
        Ok(&self.console)
    }

    /// Connects to a socket, as soon as it listens.
    pub fn connect(&self, socket: &Path) -> Result<(UnixStream, Instant), Failure> {
        self.wait_for("its API socket", || UnixStream::connect(socket).ok())
            .map(|stream| (stream, Instant::now()))
    }

    /// Asks again and again until there is something: being told by the kernel would be slower than what is measured.
    pub fn wait_for<T>(
        &self,
        what: &str,
        mut ask: impl FnMut() -> Option<T>,
    ) -> Result<T, Failure> {
        loop {
            if let Some(found) = ask() {
                return Ok(found);
            }
            if interrupt::is_pending() {
                return Err(Failure::Interrupted);
            }
            if Instant::now() > self.deadline {
                return Err(self.failure(format!("timeout: {what} is not there")));
            }
            if self.has_ended()? {
                return Err(self.failure(format!("{} ended before {what} was there", self.name)));
            }
            std::thread::yield_now();
        }
    }

    fn has_ended(&self) -> Result<bool, Failure> {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let ready = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now));
        Ok(ready.map_err(io::Error::from)? > 0)
    }

    fn ended_status(&mut self) -> Result<ExitStatus, Failure> {
        self.readable(self.pidfd.as_fd(), "its end")?;
        // Of a process that has ended and was not waited for yet, the first thread is still there.
        self.first_thread = self.first_thread.or_else(|| {
            let text = std::fs::read_to_string(format!("/proc/{}/schedstat", self.pid())).ok()?;
            let nanoseconds = text.split_whitespace().next()?.parse().ok()?;
            Some(Duration::from_nanos(nanoseconds))
        });
        Ok(self.child.wait()?)
    }

    /// Processor time of its first thread in all its life, once it has ended: to the nanosecond, which that of all
    /// threads is not. In the VMMs here it serves the network and vsock.
    pub fn first_thread(&self) -> Result<Duration, Failure> {
        self.first_thread
            .ok_or_else(|| Failure::NotOffered("the host's kernel keeps no schedstat".to_owned()))
    }

    /// Waits for its end, and returns how it ended and when it was reaped.
    pub fn ends(&mut self) -> Result<(ExitStatus, Instant), Failure> {
        let status = self.ended_status()?;
        Ok((status, Instant::now()))
    }

    /// The same; a failure unless it ended with success.
    pub fn succeeds(&mut self) -> Result<Instant, Failure> {
        let (status, at) = self.ends()?;
        if !status.success() {
            self.console()?;
            return Err(self.failure(format!("{} ended with {status}", self.name)));
        }
        Ok(at)
    }
}

fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}
