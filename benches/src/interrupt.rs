//! Ctrl-C: whatever is waited for ends at once, and what was measured so far is written.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

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
