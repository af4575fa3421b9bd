//! Who may have a file: many readers, or one who writes it. The locks (flock(2)) go with the open file, so also when
//! the process is killed.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::error::OverlayError;

/// An io_uring gives back its files a moment after its process has ended: as long is waited.
const PATIENCE: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(2);

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
            Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => sleep(STEP),
            Err(TryLockError::WouldBlock) => return Err(OverlayError::InUse(path.to_owned())),
        }
    }
}
