//! Who may have a file: many readers, or one who writes it. The locks (flock(2)) go with the open file, so also when
//! the process is killed.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, poll};
use rustix::fs::OFlags;

use super::error::OverlayError;

/// Files that an io_uring has are given back a moment after its process has ended: as long is waited.
const PATIENCE: Duration = Duration::from_secs(1);
const STEP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};

/// A descriptor of `file` to hold its lock by, which no io_uring is given: with one, the lock would outlive the process,
/// by seconds on a busy host. Where `path` does not lead to the file it is a copy, and that cannot be had.
pub(super) fn holder(file: &File, path: &Path) -> io::Result<File> {
    // Never waits, should the path lead to something else.
    let other = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(path);
    let mine = file.metadata()?;
    if let Ok(other) = other
        && let Ok(its) = other.metadata()
        && (its.dev(), its.ino()) == (mine.dev(), mine.ino())
    {
        return Ok(other);
    }
    file.try_clone()
}

/// Lets many read `file`; who would write it has to wait until none does.
pub(super) fn shared(file: &File, path: &Path) -> Result<(), OverlayError> {
    patiently(path, || file.try_lock_shared())
}

/// Lets nobody else have `file`.
pub(super) fn exclusive(file: &File, path: &Path) -> Result<(), OverlayError> {
    patiently(path, || file.try_lock())
}

fn patiently(path: &Path, lock: impl Fn() -> Result<(), TryLockError>) -> Result<(), OverlayError> {
    let start = Instant::now();
    loop {
        match lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(source)) => return Err(OverlayError::io(path, source)),
            Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                // The event loop waits by no other call. Woken early it looks again.
                let _ = poll(&mut [], Some(&STEP));
            }
            Err(TryLockError::WouldBlock) => return Err(OverlayError::InUse(path.to_owned())),
        }
    }
}
