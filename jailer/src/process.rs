//! Processes: the calls for which there is no safe wrapper.
#![allow(unsafe_code)] // fork, clone, execveat, close_range, unshare and signals

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use lepton_hostio::scheduler::ask_for_short_slices;
use lepton_hostio::streams;
use rustix::fs::{copy_file_range, fchown, sendfile};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::{
    CpuSet, UnshareFlags, sched_getaffinity, sched_getcpu, sched_setaffinity, unshare_unsafe,
};

use crate::folder::Owner;

/// To be called first. There is no `main` of Rust's: its start-up prepares for a message about stack overflows, for which it
/// reads /proc/self/maps and maps a signal stack, and takes longer than all that the jailer does before it makes the jail.
pub fn start() {
    streams::keep();
    // A pipe whose other end is gone is an error like others. The VMM has it so, too.
    // SAFETY: no other thread exists yet, and ignoring a signal runs no code.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // Each of the processes that make a jail waits for another. The VMM asks for them in any case.
    ask_for_short_slices();
}

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
    // SAFETY: the jailer never starts a thread, so the child has all of the state that any code expects. Who copies beside it
    // changes none of it.
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

/// Copies all of the first file to the second, and gives that to `owner`. Nothing but system calls by way of rustix, which
/// keeps nothing in memory but on the stack: see [`share`].
pub fn copy([from, to]: [BorrowedFd<'_>; 2], owner: Owner) -> Result<(), Errno> {
    const MOST: usize = 1 << 30;
    // No room is made ahead, though that would be a fifth faster: what goes before it is written back then never needs any.
    let mut some = false;
    loop {
        match copy_file_range(from, None, to, None, MOST) {
            Ok(0) => break,
            Ok(_) => some = true,
            Err(Errno::INTR) => {}
            Err(error) if some => return Err(error),
            // Not between these two file systems, or not on this kernel.
            Err(_) => break,
        }
    }
    if !some {
        while sendfile(to, from, None, MOST)? > 0 {}
    }
    fchown(to, Some(owner.uid), Some(owner.gid))
}

/// Sends a process, `None` the one that calls, to a processor other than `from`, if it may run on any. Later it may come back: nothing is
/// done but what puts it into another queue now. The kernel starts a process where its parent runs more often than where nobody
/// does, and there it would wait for its parent, or its parent for it. False: there is no other processor.
fn move_off(pid: Option<Pid>, from: usize) -> Result<bool, Errno> {
    let all = sched_getaffinity(pid)?;
    let mut others = all;
    if from < CpuSet::MAX_CPU {
        others.unset(from);
    }
    if others.count() == 0 || others == all {
        return Ok(false);
    }
    sched_setaffinity(pid, &others)?;
    sched_setaffinity(pid, &all)?;
    Ok(true)
}

/// What a process that shares this one's memory begins with.
struct Start<T: 'static> {
    body: fn(&T, bool),
    argument: &'static T,
    gone: &'static AtomicU32,
    aside: bool,
    /// The processor that this process is on.
    other: usize,
    pid: AtomicI32,
    stack: StackTop,
}

/// Where a stack begins, for whom nobody else has it.
#[derive(Clone, Copy)]
struct StackTop(*mut libc::c_void);

// SAFETY: an address, which the kernel alone uses.
unsafe impl Sync for StackTop {}

/// A stack that is there for good: the process that has become the VMM has other memory. What is not used of it takes none.
fn new_stack() -> StackTop {
    const STACK: usize = 64 << 10;
    let stack = Box::<[u128]>::new_uninit_slice(STACK / size_of::<u128>());
    StackTop(Box::leak(stack).as_mut_ptr_range().end.cast())
}

/// Starts a process that shares this one's memory and descriptors, in a fraction of the time of a fork, and if it is to be `aside`
/// on another processor where there is one, which `body` is told of. It is nobody's child, so that the VMM has none that it knows nothing of. When it ends, the
/// kernel writes 0 to `gone`, and wakes who waits there.
///
/// It has this process's thread-local values, too: while both run, `body` makes system calls by way of rustix, which keeps
/// nothing but on the stack, and uses atomic values. Once this process has become another program, or waits for it, it
/// may do anything.
pub fn share<T: Sync + 'static>(
    body: fn(&T, bool),
    argument: &'static T,
    gone: &'static AtomicU32,
    aside: bool,
) -> io::Result<()> {
    const SHARED: libc::c_int = libc::CLONE_VM | libc::CLONE_FILES;
    extern "C" fn begin<T: Sync + 'static>(start: *mut libc::c_void) -> libc::c_int {
        // SAFETY: `share` gives its Start, which is there for good and which nobody changes but by atomic operations.
        let start = unsafe { &*start.cast::<Start<T>>() };
        tell_end(start.gone);
        // Where it is on another one, its parent has the first one for itself.
        let is_elsewhere = start.aside
            && (sched_getcpu() != start.other || move_off(None, start.other).unwrap_or(false));
        (start.body)(start.argument, is_elsewhere);
        0
    }
    extern "C" fn between<T: Sync + 'static>(start: *mut libc::c_void) -> libc::c_int {
        // SAFETY: as above.
        let it = unsafe { &*start.cast::<Start<T>>() };
        let flags = SHARED | libc::SIGCHLD;
        // SAFETY: as below, but that both processes run from here on, by the rules of `share`.
        let pid = unsafe { libc::clone(begin::<T>, it.stack.0, flags, start) };
        it.pid.store(pid, Ordering::Relaxed);
        0
    }
    let start: &'static Start<T> = Box::leak(Box::new(Start {
        body,
        argument,
        gone,
        aside,
        other: sched_getcpu(),
        pid: AtomicI32::new(-1),
        stack: new_stack(),
    }));
    let flags = SHARED | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack is aligned as it has to be and nobody else's, and grows downwards from its end. The new process
    // has this one's memory and its thread pointer, while this one stands still. It ends without Rust's or the C library's
    // knowledge, by the system call that the C library's `clone` makes behind `between`.
    let between = unsafe {
        let argument = ptr::from_ref(start).cast_mut().cast();
        libc::clone(between::<T>, new_stack().0, flags, argument)
    };
    if let Side::Parent(between) = side(between.into())? {
        while let Err(Errno::INTR) = waitpid(Some(between), WaitOptions::empty()) {}
    }
    match side(start.pid.load(Ordering::Relaxed).into()) {
        Ok(Side::Parent(pid)) => {
            if aside {
                let _ = move_off(Some(pid), start.other);
            }
            Ok(())
        }
        _ => Err(io::Error::other("cannot start another process")),
    }
}

/// Has the kernel write 0 to `word`, and wake who waits there, when this process ends or becomes another program, as long as another
/// one shares its memory (set_tid_address(2)).
pub fn tell_end(word: &'static AtomicU32) {
    // SAFETY: the word is there for good, and is changed by atomic operations alone.
    unsafe { libc::syscall(libc::SYS_set_tid_address, word.as_ptr()) };
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
