//! What this process needs before anything else, in place of Rust's own start-up code.
//!
//! That code also prepares for a message about stack overflows: it reads /proc/self/maps for the main thread and maps
//! a signal stack for every other one. Here a fault has a handler of ours in any case, and that preparation would be a
//! twentieth of the time until the API answers.
#![allow(unsafe_code)] // a signal's disposition, and madvise on the program's own mapping

use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use lepton_devices::dirty::PAGE;
use lepton_hostio::scheduler::ask_for_short_slices;
use lepton_hostio::streams;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_name;

/// To be called first, before any thread is started. `program` is the path by which it was run.
pub fn start(program: Option<&OsString>) {
    streams::keep();
    // SAFETY: no other thread exists yet, and ignoring a signal runs no code.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if let Some(program) = program {
        name_after(Path::new(program));
    }
    // A guest or a client waits for whatever any thread does, but a vCPU's.
    ask_for_short_slices();
}

/// No core dump, and no other process of the same user attaches to this one or reads its memory and files in /proc. Nor does
/// this one, unless it is root's.
pub fn close_to_others() {
    // It fails only for a value that the kernel does not know.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Gives the first thread, and with it the process, the name of the program. A jailer runs it by a descriptor, and kernels
/// before 6.14 then call it by that descriptor's number.
fn name_after(program: &Path) {
    let name = program.file_name();
    if let Some(Ok(name)) = name.map(|name| CString::new(name.as_bytes())) {
        // The kernel keeps 15 bytes of it. Under another name it works as well.
        let _ = set_name(&name);
    }
}

/// Gives back the memory of the program's code and constants, once a machine runs. Nearly all of it was needed to get
/// there, once: what reads a command line, a configuration, a kernel. The kernel maps again what is used again, from the
/// file in its cache; the rest would count as this process's for as long as it lives.
pub fn let_go_of_code() {
    // SAFETY: the function is called with a description that is valid until it returns, and stops at the first.
    unsafe { libc::dl_iterate_phdr(Some(let_go_of), std::ptr::null_mut()) };
}

/// Does so for an object that is loaded. 1: no more objects are wanted, the program itself is the first.
///
/// # Safety
/// `info` describes an object that stays loaded, as dl_iterate_phdr(3) has it.
unsafe extern "C" fn let_go_of(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut libc::c_void,
) -> libc::c_int {
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
