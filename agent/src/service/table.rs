//! All processes that hosts started, and the reaping of every child.
//!
//! One lock orders three things that must not overlap: starting a process (between its start and
//! its entry here its exit status would be lost), reaping (which frees the process's number for
//! re-use), and signalling by that number.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{Signal, killpg};
use rustix::fs::{Gid, OFlags, Uid, fchown, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};

use super::process::{ExitStatus, Process, Streams, exit_event};
use super::request::{Exec, ExecError};
use super::terminal::{self, Terminal};

/// Whether a reaped agent has children left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Children {
    Some,
    None,
}

/// The processes.
#[derive(Default)]
pub struct Table {
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    last_id: u64,
    by_id: HashMap<u64, Arc<Process>>,
    /// Those not reaped yet: a number in here belongs to our process.
    unreaped: HashMap<Pid, Arc<Process>>,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, id: u64) -> Option<Arc<Process>> {
        self.lock().by_id.get(&id).cloned()
    }

    /// Starts a process for the connection `owner` and returns its id.
    pub(super) fn spawn(&self, exec: Exec, owner: u64) -> Result<u64, ExecError> {
        let exited = exit_event().map_err(ExecError::Channel)?;
        let mut entries = self.lock();
        let (child, streams) = match exec.terminal {
            None => start_on_pipes(&exec)?,
            Some(size) => start_on_terminal(&exec, size)?,
        };
        let pid = Pid::from_child(&child);
        let process = Arc::new(Process::new(pid, owner, streams, exited));
        entries.last_id += 1;
        let id = entries.last_id;
        entries.by_id.insert(id, Arc::clone(&process));
        entries.unreaped.insert(pid, process);
        Ok(id)
    }

    /// Reaps every child that has ended, ours or inherited, without waiting.
    pub fn reap(&self) -> Children {
        let mut entries = self.lock();
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(process) = entries.unreaped.remove(&pid) {
                        process.end(exit_status(status));
                    }
                }
                Ok(None) => return Children::Some,
                Err(Errno::INTR) => {}
                Err(_) => return Children::None,
            }
        }
    }

    /// Signals the process's group. False when the process has ended.
    pub(super) fn signal(&self, process: &Process, signal: Signal) -> io::Result<bool> {
        let entries = self.lock();
        if !entries.unreaped.contains_key(&process.pid) {
            return Ok(false);
        }
        match killpg(group(process.pid), signal) {
            Ok(()) => Ok(true),
            Err(nix::errno::Errno::ESRCH) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Kills what runs for the connection `owner` and forgets what has ended.
    pub fn kill_owned_by(&self, owner: u64) {
        let mut entries = self.lock();
        for process in entries.unreaped.values() {
            if process.owner == owner {
                // It may be dead and not yet reaped; that is as good.
                let _ = killpg(group(process.pid), Signal::SIGKILL);
            }
        }
        entries.by_id.retain(|_, process| process.owner != owner);
    }

    /// Frees the entry when nothing more can be asked of it.
    pub(super) fn forget_if_finished(&self, id: u64) {
        let mut entries = self.lock();
        if entries.by_id.get(&id).is_some_and(|p| p.finished()) {
            entries.by_id.remove(&id);
        }
    }
}

/// Every process leads a group of its own: see the two `start_on` functions.
fn group(pid: Pid) -> nix::unistd::Pid {
    nix::unistd::Pid::from_raw(pid.as_raw_nonzero().get())
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Exited(code.unsigned_abs()),
        (None, signal) => ExitStatus::Killed(signal.unwrap_or_default().unsigned_abs()),
    }
}

fn start_on_pipes(exec: &Exec) -> Result<(Child, Streams), ExecError> {
    let mut command = exec.command()?;
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| exec.failure(e))?;
    let missing = || ExecError::Channel(io::ErrorKind::NotFound.into());
    let stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let stderr = child.stderr.take().ok_or_else(missing)?;
    let streams = Streams::Pipes {
        stdin: non_blocking(stdin.into())?,
        stdout: non_blocking(stdout.into())?,
        stderr: non_blocking(stderr.into())?,
    };
    Ok((child, streams))
}

fn start_on_terminal(
    exec: &Exec,
    size: rustix::termios::Winsize,
) -> Result<(Child, Streams), ExecError> {
    let mut command = exec.command()?;
    let Terminal { near, far } = Terminal::open(size).map_err(ExecError::Channel)?;
    if let Some((uid, gid)) = exec.owner() {
        fchown(&far, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(|e| ExecError::Channel(e.into()))?;
    }
    let copy = |far: &OwnedFd| far.try_clone().map_err(ExecError::Channel);
    command.stdin(copy(&far)?).stdout(copy(&far)?).stderr(far);
    terminal::lead_session(&mut command);
    let near = non_blocking(near)?;
    let child = command.spawn().map_err(|e| exec.failure(e))?;
    Ok((child, Streams::Terminal(near)))
}

fn non_blocking(fd: OwnedFd) -> Result<OwnedFd, ExecError> {
    fcntl_getfl(&fd)
        .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
        .map_err(|e| ExecError::Channel(e.into()))?;
    Ok(fd)
}
