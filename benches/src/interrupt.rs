//! Ctrl-C: whatever is waited for ends at once, and what was measured so far is written.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::process::Failure;

/// Readable from the first signal on; nobody reads it.
static SIGNALLED: OnceLock<UnixStream> = OnceLock::new();

/// From now on SIGINT, SIGTERM and SIGHUP interrupt waits instead of ending the program.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn install() -> io::Result<()> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    // A second call keeps the first one's pipe, which its handlers still write to.
    let _ = SIGNALLED.set(reader);
    Ok(())
}

/// The descriptor that is readable once interrupted.
pub fn descriptor() -> Option<BorrowedFd<'static>> {
    SIGNALLED.get().map(|stream| stream.as_fd())
}

/// Waits that long, or until a signal comes.
///
/// # Errors
/// [`Failure::Interrupted`] if a signal came.
pub fn sleep(time: Duration) -> Result<(), Failure> {
    let timeout = Timespec::try_from(time).map_err(|_| Failure::because("a wait too long"))?;
    let descriptor = descriptor();
    let mut fds: Vec<PollFd<'_>> = descriptor
        .iter()
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    // A signal that another handler took ends the wait early, which does no harm: it is measured.
    let _ = poll(&mut fds, Some(&timeout));
    match is_pending() {
        true => Err(Failure::Interrupted),
        false => Ok(()),
    }
}

/// Whether a signal has come.
pub fn is_pending() -> bool {
    let Some(descriptor) = descriptor() else {
        return false;
    };
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}
