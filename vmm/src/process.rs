//! What this process needs before anything else, in place of Rust's own start-up code.
//!
//! That code also prepares for a message about stack overflows: it reads /proc/self/maps for the main thread and maps
//! a signal stack for every other one. Here a fault has a handler of ours in any case, and that preparation would be a
//! twentieth of the time until the API answers.
#![allow(unsafe_code)] // a signal's disposition, mallopt, and madvise on the program's own mapping

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

/// Gives back the memory of the program's code and constants, once a machine runs. Nearly all of it was needed to get
/// there, once: what reads a command line, a configuration, a kernel. The kernel maps again what is used again, from the
/// file in its cache; the rest would count as this process's for as long as it lives.
pub fn let_go_of_code() {
    // SAFETY: the function is called with a description that is valid until it returns, and stops at the first.
    unsafe { libc::dl_iterate_phdr(Some(let_go_of), std::ptr::null_mut()) };
}

/// Does so for an object that is loaded. 1: no more objects are wanted, the program itself is the first.
unsafe extern "C" fn let_go_of(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut libc::c_void,
) -> libc::c_int {
    const PAGE: u64 = 4096;
    // SAFETY: the caller's description, with as many headers as it says.
    let (base, headers) = unsafe {
        let info = &*info;
        let count = usize::from(info.dlpi_phnum);
        (
            info.dlpi_addr,
            std::slice::from_raw_parts(info.dlpi_phdr, count),
        )
    };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = base.wrapping_add(header.p_vaddr);
        let end = start.wrapping_add(header.p_memsz) & !(PAGE - 1);
        let start = start & !(PAGE - 1);
        let length = end.saturating_sub(start) as usize;
        // SAFETY: whole pages of a private mapping of the program's file that nobody can write: they hold the same when
        // they are mapped again. Refused, they stay.
        unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    }
    1
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
