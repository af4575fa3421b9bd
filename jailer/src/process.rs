//! Processes: the calls for which there is no safe wrapper.
#![allow(unsafe_code)] // fork, clone, execveat, close_range, unshare and signals

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::process::Pid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Which of the two processes after a fork this is.
pub enum Side {
    /// The new one.
    Child,
    /// The old one, and the new one's id.
    Parent(Pid),
}

fn side(result: i64) -> io::Result<Side> {
    let raw = i32::try_from(result).unwrap_or(-1);
    match raw {
        ..0 => Err(io::Error::last_os_error()),
        raw => Ok(Pid::from_raw(raw).map_or(Side::Child, Side::Parent)),
    }
}

/// Whether the end of this process would end its session.
///
/// The session's id is 0 where its leader lies outside this process's PID namespace, as in a container; rustix takes
/// every id for one that is not 0.
pub fn leads_session() -> bool {
    // SAFETY: both take no memory.
    unsafe { libc::getsid(0) == libc::getpid() }
}

/// Makes a copy of this process.
pub fn fork() -> io::Result<Side> {
    // SAFETY: the jailer never starts a thread, so the child has all of the state that any code expects.
    side(i64::from(unsafe { libc::fork() }))
}

/// Makes a copy of this process in new namespaces, given as CLONE_NEW* flags.
pub fn fork_into(namespaces: libc::c_int) -> io::Result<Side> {
    let flags = libc::c_long::from(namespaces | libc::SIGCHLD);
    // SAFETY: without CLONE_VM and with no stack given this is a fork, in a process that never starts a thread. What
    // the C library would have done around its own fork concerns locks of other threads and its cached ids, which
    // nothing here uses.
    side(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })
}

/// Gives this process a mount namespace of its own.
pub fn unshare_mounts() -> io::Result<()> {
    // SAFETY: only CLONE_FILES could take descriptors away from somebody.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(io::Error::from)
}

/// Runs the program `file` with these arguments and no environment. Returns only if it cannot.
pub fn run(file: BorrowedFd<'_>, arguments: &[CString]) -> io::Error {
    let mut pointers: Vec<*const c_char> = arguments.iter().map(|text| text.as_ptr()).collect();
    pointers.push(ptr::null());
    let environment = [ptr::null::<c_char>()];
    let empty: &CStr = c"";
    // SAFETY: the descriptor is open, the strings end in NUL and the lists in a null pointer, and all outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            empty.as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

/// Closes all descriptors from `first` on but those of `kept`.
///
/// To be called where every other descriptor is either a stranger's or never used again.
pub fn close_all_but(first: RawFd, kept: impl IntoIterator<Item = RawFd>) -> io::Result<()> {
    let mut kept: Vec<RawFd> = kept.into_iter().filter(|fd| *fd >= first).collect();
    kept.sort_unstable();
    let mut next = first.cast_unsigned();
    let ends = kept.iter().map(|fd| fd.cast_unsigned());
    for end in ends.chain([libc::c_uint::MAX]) {
        let last = if end == libc::c_uint::MAX {
            end
        } else {
            end.saturating_sub(1)
        };
        if next <= last && next < end {
            // SAFETY: by this function's contract nobody uses these descriptors any more.
            if unsafe { libc::syscall(libc::SYS_close_range, next, last, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        next = end.saturating_add(1);
    }
    Ok(())
}

/// Holds all signals back for good, but those that cannot be.
pub fn block_all_signals() -> io::Result<()> {
    // SAFETY: a sigset_t is plain data, which sigfillset writes and sigprocmask reads.
    let result = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &all, ptr::null_mut())
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Signals that ask for an end, and that a child has ended. While this lives they wait to be taken.
pub struct HeldSignals {
    held: libc::sigset_t,
    before: libc::sigset_t,
}

/// A signal that was taken.
pub enum Taken {
    /// A child has ended.
    ChildEnded,
    /// Somebody asks this process to end, by this signal.
    Asked(libc::c_int),
    /// A terminal asks all of its foreground processes to end.
    FromTerminal,
}

impl HeldSignals {
    /// Holds them back from now on.
    pub fn hold() -> io::Result<Self> {
        // SAFETY: sigset_t is plain data, which sigemptyset, sigaddset and sigprocmask write; sigprocmask reads the one
        // that is filled by then.
        unsafe {
            let mut signals = Self {
                held: std::mem::zeroed(),
                before: std::mem::zeroed(),
            };
            libc::sigemptyset(&mut signals.held);
            for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&mut signals.held, signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, &signals.held, &mut signals.before) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(signals)
        }
    }

    /// What tells by poll(2) that one waits.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        // SAFETY: signalfd reads the set, which is filled.
        let fd = unsafe { libc::signalfd(-1, &self.held, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Lets them come as before.
    pub fn release(&self) -> io::Result<()> {
        // SAFETY: sigprocmask reads the set, which an earlier call has filled.
        if unsafe { libc::sigprocmask(libc::SIG_SETMASK, &self.before, ptr::null_mut()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Waits for the next one.
    pub fn take(&self) -> io::Result<Taken> {
        loop {
            // SAFETY: a siginfo_t is plain data, which sigwaitinfo writes; it reads the set.
            let (signal, code) = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                (libc::sigwaitinfo(&self.held, &mut info), info.si_code)
            };
            return match signal {
                ..0 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => continue,
                ..0 => Err(io::Error::last_os_error()),
                libc::SIGCHLD => Ok(Taken::ChildEnded),
                _ if code == libc::SI_KERNEL => Ok(Taken::FromTerminal),
                signal => Ok(Taken::Asked(signal)),
            };
        }
    }
}
