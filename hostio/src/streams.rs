//! The standard streams of a process that starts without Rust's own start-up code.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdin, stdout};

/// Opens /dev/null in the place of a standard stream that is closed: else the next file opened would be it, and what is
/// printed would go there. To be called before any file is opened.
pub fn keep() {
    for stream in [stdin(), stdout(), stderr()] {
        if rustix::io::fcntl_getfd(stream) == Err(Errno::BADF) {
            match rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
                // The lowest free descriptor, which is the missing one.
                Ok(null) => std::mem::forget(null),
                Err(_) => std::process::abort(),
            }
        }
    }
}
