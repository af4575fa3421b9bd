//! The signals of PID 1, taken one by one in the main thread.
//!
//! They are handled, not blocked: a blocked signal stays blocked in every program that is started,
//! a handled one goes back to its default.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use lepton_agent::service::Table;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::low_level::pipe;

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Children ended: one or more.
    Child,
    /// The machine is to shut down. SIGINT is Ctrl-Alt-Del; SIGTERM, SIGUSR1 and SIGUSR2 are what
    /// busybox's `reboot`, `halt` and `poweroff` send to PID 1. All mean the same here: a microVM
    /// has no power to switch off, it ends by a reset.
    Shutdown,
}

/// The signals, each readable as a byte.
pub struct Signals {
    children: UnixStream,
    shutdown: UnixStream,
}

impl Signals {
    /// Takes the signals over from the kernel's defaults.
    pub fn take() -> io::Result<Self> {
        Ok(Self {
            children: readable(&[SIGCHLD])?,
            shutdown: readable(&[SIGINT, SIGTERM, SIGUSR1, SIGUSR2])?,
        })
    }

    /// The next event, a shutdown first; `None` when `deadline` has passed without one.
    pub fn next(&self, deadline: Option<Instant>) -> Option<Event> {
        loop {
            if taken(&self.shutdown) {
                return Some(Event::Shutdown);
            }
            if taken(&self.children) {
                return Some(Event::Child);
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return None;
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [&self.shutdown, &self.children].map(|fd| PollFd::new(fd, PollFlags::IN));
            // An interrupted or failed poll only leads to another look at the signals.
            let _ = poll(&mut fds, left.as_ref());
        }
    }
}

fn readable(signals: &[i32]) -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    for &signal in signals {
        pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

/// Takes all that has come so far, as one.
fn taken(mut signals: &UnixStream) -> bool {
    let mut any = false;
    let mut bytes = [0; 64];
    while let Ok(1..) = signals.read(&mut bytes) {
        any = true;
    }
    any
}

/// Reaps children until a shutdown is asked for.
pub fn reap_until_shutdown(signals: &Signals, table: &Table) {
    while let Some(Event::Child) = signals.next(None) {
        // One event may stand for many children: all that have ended are taken.
        table.reap();
    }
}
