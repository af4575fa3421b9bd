//! One process and its standard streams.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::termios::{Winsize, tcsetwinsize};

/// The most bytes one read gives: what a pipe holds by default.
pub const MAX_READ: usize = 64 * 1024;

/// The end-of-file character (Ctrl-D) that closes a terminal's input.
const END_OF_FILE: u8 = 0x04;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    Exited(u32),
    Killed(u32),
}

/// The near ends of a process's standard streams, all in non-blocking mode.
pub enum Streams {
    Pipes {
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    Terminal(OwnedFd),
}

enum Input {
    Pipe(OwnedFd),
    Terminal(Arc<OwnedFd>),
    Closed,
}

/// One output stream. The lock makes readers take turns, so that one that saw data gets it.
pub struct Output {
    source: Mutex<Option<Arc<OwnedFd>>>,
    ended: AtomicBool,
}

impl Output {
    fn new(source: Option<Arc<OwnedFd>>) -> Self {
        Self {
            ended: AtomicBool::new(source.is_none()),
            source: Mutex::new(source),
        }
    }
}

/// A process that was started, running or not.
pub struct Process {
    pub pid: Pid,
    /// The number of the connection it belongs to.
    pub owner: u64,
    stdin: Mutex<Input>,
    stdout: Output,
    stderr: Output,
    terminal: Option<Arc<OwnedFd>>,
    status: OnceLock<ExitStatus>,
    /// An eventfd, readable for ever once `status` is set. All that block wait for it too, so
    /// nothing outlasts the process.
    exited: OwnedFd,
    waited: AtomicBool,
}

/// A lock whose holder panicked protects plain descriptors; they are as good as before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the process's end is announced by: made before the process, as it can fail.
pub fn exit_event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

impl Process {
    pub fn new(pid: Pid, owner: u64, streams: Streams, exited: OwnedFd) -> Self {
        let (stdin, stdout, stderr, terminal) = match streams {
            Streams::Pipes {
                stdin,
                stdout,
                stderr,
            } => (
                Input::Pipe(stdin),
                Some(Arc::new(stdout)),
                Some(Arc::new(stderr)),
                None,
            ),
            Streams::Terminal(near) => {
                let near = Arc::new(near);
                let input = Input::Terminal(Arc::clone(&near));
                (input, Some(Arc::clone(&near)), None, Some(near))
            }
        };
        Self {
            pid,
            owner,
            stdin: Mutex::new(stdin),
            stdout: Output::new(stdout),
            stderr: Output::new(stderr),
            terminal,
            status: OnceLock::new(),
            exited,
            waited: AtomicBool::new(false),
        }
    }

    pub fn stdout(&self) -> &Output {
        &self.stdout
    }

    pub fn stderr(&self) -> &Output {
        &self.stderr
    }

    /// Records how the process ended and wakes all that wait for it.
    pub fn end(&self, status: ExitStatus) {
        let _ = self.status.set(status);
        // Fails only when the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.exited, &1u64.to_ne_bytes());
    }

    /// Waits for the process's end.
    pub fn wait(&self) -> io::Result<ExitStatus> {
        loop {
            if let Some(&status) = self.status.get() {
                self.waited.store(true, Ordering::Relaxed);
                return Ok(status);
            }
            wait_for(&mut [PollFd::new(&self.exited, PollFlags::IN)])?;
        }
    }

    /// Everything there is to know has been asked for.
    pub fn finished(&self) -> bool {
        self.waited.load(Ordering::Relaxed)
            && self.stdout.ended.load(Ordering::Relaxed)
            && self.stderr.ended.load(Ordering::Relaxed)
    }

    /// Writes all of `data`, blocking while the process does not read. False when the process
    /// cannot or will not read it.
    pub fn write_stdin(&self, data: &[u8]) -> io::Result<bool> {
        let mut input = lock(&self.stdin);
        let target: &OwnedFd = match &*input {
            Input::Pipe(pipe) => pipe,
            Input::Terminal(terminal) => terminal,
            Input::Closed => return Ok(false),
        };
        let written = self.write_all(target.as_fd(), data)?;
        if !written {
            *input = Input::Closed;
        }
        Ok(written)
    }

    fn write_all(&self, target: BorrowedFd<'_>, mut data: &[u8]) -> io::Result<bool> {
        while !data.is_empty() {
            match rustix::io::write(target, data) {
                Ok(count) => data = data.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::IO) => return Ok(false),
                Err(Errno::AGAIN) => {
                    let mut fds = [
                        PollFd::from_borrowed_fd(target, PollFlags::OUT),
                        PollFd::new(&self.exited, PollFlags::IN),
                    ];
                    wait_for(&mut fds)?;
                    if !fds[1].revents().is_empty() {
                        return Ok(false);
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Closes standard input; on a terminal, types the end-of-file character.
    pub fn close_stdin(&self) -> io::Result<()> {
        let mut input = lock(&self.stdin);
        if let Input::Terminal(terminal) = &*input {
            self.write_all(terminal.as_fd(), &[END_OF_FILE])?;
        } else {
            *input = Input::Closed;
        }
        Ok(())
    }

    /// Sets the terminal's size. False when there is no terminal.
    pub fn resize(&self, size: Winsize) -> io::Result<bool> {
        match &self.terminal {
            None => Ok(false),
            Some(terminal) => {
                tcsetwinsize(terminal, size)?;
                Ok(true)
            }
        }
    }

    /// Up to `limit` bytes, blocking until there are some; none at the stream's end. The stream
    /// also ends when the process has, so that a child it left behind holds nobody up.
    pub fn read(&self, output: &Output, limit: usize) -> io::Result<Vec<u8>> {
        let mut source = lock(&output.source);
        let Some(fd) = source.as_ref() else {
            return Ok(Vec::new());
        };
        let data = self.read_some(fd.as_fd(), limit)?;
        if data.is_empty() {
            *source = None;
            output.ended.store(true, Ordering::Relaxed);
        }
        Ok(data)
    }

    fn read_some(&self, fd: BorrowedFd<'_>, limit: usize) -> io::Result<Vec<u8>> {
        let mut data = Vec::with_capacity(limit);
        let mut last_look = false;
        loop {
            match rustix::io::read(fd, rustix::buffer::spare_capacity(&mut data)) {
                // A terminal whose far end is closed says EIO.
                Ok(_) | Err(Errno::IO) => return Ok(data),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) if last_look => return Ok(data),
                Err(Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
            let mut fds = [
                PollFd::from_borrowed_fd(fd, PollFlags::IN),
                PollFd::new(&self.exited, PollFlags::IN),
            ];
            wait_for(&mut fds)?;
            // Written before the exit, seen after it: one more look takes what there is.
            last_look = !fds[1].revents().is_empty();
        }
    }
}

/// Waits, without a limit, for one of `fds`.
fn wait_for(fds: &mut [PollFd<'_>]) -> io::Result<()> {
    loop {
        match poll(fds, None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
