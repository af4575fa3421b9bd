//! Processes: the calls for which there is no safe wrapper.
#![allow(unsafe_code)] // fork, clone, execveat, close_range, unshare and signals

use std::ffi::{CStr, CString, c_char};
use std::hint::spin_loop;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use lepton_hostio::scheduler::ask_for_short_slices;
use lepton_hostio::streams;
use rustix::fs::{FallocateFlags, copy_file_range, fallocate, fchown, fstat, sendfile};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, set_parent_process_death_signal, waitpid};
use rustix::thread::{
    CpuSet, UnshareFlags, futex, sched_getaffinity, sched_getcpu, sched_setaffinity, unshare_unsafe,
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
/// keeps nothing in memory but on the stack: see [`Beside`].
pub fn copy([from, to]: [BorrowedFd<'_>; 2], owner: Owner) -> Result<(), Errno> {
    const MOST: usize = 1 << 30;
    // Where the file system can, a fifth faster than to find room for each page.
    if let Ok(length) = u64::try_from(fstat(from)?.st_size) {
        match fallocate(to, FallocateFlags::empty(), 0, length) {
            Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
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

/// Sends a process, 0 the one that calls, to a processor other than `from`, if it may run on any. Later it may come back: nothing is
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

/// A process beside this one, to copy a file: it shares this one's memory and descriptors, so it is started in a fraction of the
/// time of a fork. It is killed if this process ends.
pub struct Beside {
    /// Until it has ended.
    pid: Option<Pid>,
    shared: &'static Shared,
    /// Open until it has done its work.
    files: Option<[OwnedFd; 2]>,
}

/// What both processes have before them.
struct Shared {
    /// The processor that the other process was on.
    other: usize,
    work: OnceLock<Option<Work>>,
    /// Whether there is something in `work`.
    given: AtomicU32,
}

struct Work {
    files: [RawFd; 2],
    owner: Owner,
}

impl Shared {
    /// The work, once there is some. At first busily: a processor that has gone to sleep takes 0.1 to 0.2 ms to wake up where it
    /// is a virtual one.
    fn wait(&self, busily: bool) -> Option<&Work> {
        const TURNS: u32 = 100_000;
        let mut turns = if busily { TURNS } else { 0 };
        loop {
            if let Some(work) = self.work.get() {
                return work.as_ref();
            }
            if turns > 0 {
                turns -= 1;
                spin_loop();
            } else {
                // Woken, or there is something already, or a signal came: it is looked at again.
                let _ = futex::wait(&self.given, futex::Flags::PRIVATE, 0, None);
            }
        }
    }
}

impl Beside {
    /// Starts it. By the time that there is work for it, it should be on a processor.
    pub fn start() -> io::Result<Self> {
        const STACK: usize = 16 << 10;
        extern "C" fn begin(shared: *mut libc::c_void) -> libc::c_int {
            // SAFETY: `start` gives its Shared, which is there for good and which both change by atomic operations alone.
            let shared = unsafe { &*shared.cast::<Shared>() };
            let result = set_parent_process_death_signal(Some(Signal::KILL)).and_then(|()| {
                // Where it is on another one, its parent has the first one for itself.
                let is_elsewhere =
                    sched_getcpu() != shared.other || move_off(None, shared.other).unwrap_or(false);
                let Some(work) = shared.wait(is_elsewhere) else {
                    return Ok(());
                };
                // SAFETY: the other process, whose descriptors these are, keeps them open until this one has ended.
                let files = work
                    .files
                    .map(|file| unsafe { BorrowedFd::borrow_raw(file) });
                copy(files, work.owner)
            });
            result.err().map_or(0, Errno::raw_os_error)
        }
        // For good: the process that has become the VMM has other memory.
        let stack: &'static mut [u128] = Box::leak(vec![0; STACK / size_of::<u128>()].into());
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            other: sched_getcpu(),
            work: OnceLock::new(),
            given: AtomicU32::new(0),
        }));
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: the stack is aligned as it has to be and nobody else's, and grows downwards from its end. The new process
        // has this one's memory and its thread pointer, by which it changes nothing: it does what `begin` does, and ends without
        // Rust's or the C library's knowledge, by the system call that the C library's `clone` makes behind `begin`.
        let pid = unsafe {
            let top = stack.as_mut_ptr_range().end.cast();
            let argument = ptr::from_ref(shared).cast_mut().cast();
            libc::clone(begin, top, flags, argument)
        };
        match side(pid.into())? {
            Side::Parent(pid) => {
                let _ = move_off(Some(pid), shared.other);
                Ok(Beside {
                    pid: Some(pid),
                    shared,
                    files: None,
                })
            }
            Side::Child => Err(io::Error::other("clone has returned in the new process")),
        }
    }

    /// Has it do what [`copy`] does.
    pub fn copy(&mut self, files: [OwnedFd; 2], owner: Owner) {
        self.give(Some(Work {
            files: files.each_ref().map(AsRawFd::as_raw_fd),
            owner,
        }));
        self.files = Some(files);
    }

    fn give(&self, work: Option<Work>) {
        // What was given first counts.
        let _ = self.shared.work.set(work);
        self.shared.given.store(1, Ordering::Release);
        // Nothing is lost if it does not wait.
        let _ = futex::wake(&self.shared.given, futex::Flags::PRIVATE, 1);
    }

    /// Waits for its end, and says how it went.
    pub fn finish(mut self) -> io::Result<()> {
        self.wait()
    }

    fn wait(&mut self) -> io::Result<()> {
        let Some(pid) = self.pid.take() else {
            return Ok(());
        };
        self.give(None);
        let result = loop {
            break match waitpid(Some(pid), WaitOptions::empty()) {
                Err(Errno::INTR) | Ok(None) => continue,
                Err(error) => Err(error.into()),
                Ok(Some((_, status))) => match status.exit_status() {
                    Some(0) => Ok(()),
                    Some(error) => Err(io::Error::from_raw_os_error(error)),
                    None => Err(io::Error::other("the process that does it was killed")),
                },
            };
        };
        // No program can be run as long as it is open for writing.
        self.files = None;
        result
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        drop(self.wait());
    }
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
