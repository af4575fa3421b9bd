//! What this process needs before anything else, in place of Rust's own start-up code.
//!
//! That code also prepares for a message about stack overflows: it reads /proc/self/maps for the main thread and maps
//! a signal stack for every other one. Here a fault has a handler of ours in any case, and that preparation would be a
//! twentieth of the time until the API answers.
#![allow(unsafe_code)] // a signal's disposition, and mallopt

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

/// To be called first, before any thread is started.
pub fn start() {
    keep_standard_streams();
    // SAFETY: no other thread exists yet, and ignoring a signal runs no code.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // No core dump, and no other process of the same user attaches to this one or reads its memory and files in /proc.
    // It fails only for a value that the kernel does not know.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    // One heap for all threads. glibc would give each an arena of its own: four system calls and some pages at each
    // thread's start, for threads that hardly allocate.
    // SAFETY: mallopt sets a number; no other thread exists yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Opens /dev/null in the place of a standard stream that is closed: else the next file opened would be it, and what is
/// printed would go there.
fn keep_standard_streams() {
    use rustix::stdio::{stderr, stdin, stdout};
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
