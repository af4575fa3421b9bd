//! Whoever stays behind when the jailer's process becomes the VMM: removes what must not be left.
//!
//! Where the jailer's own process becomes the VMM, it is another one that is there from the start, and that shares its memory and its
//! descriptors until then: no fork, and what was made is known to both. First it writes the program's copy, unless a pool has
//! written one ahead: that takes as long as all the rest.
//!
//! If the VMM cannot be started, that is all that was made, which the process itself cannot remove any more: it has no
//! privileges then. At the VMM's end, whatever that was, it is the VMM's control groups. Of a VMM that waited in a pool and
//! has not become a machine it is the jail as well, once the VMM was killed: nobody misses it.

use std::cell::OnceCell;
use std::ffi::OsStr;
use std::fs::File;
use std::hint::spin_loop;
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{PidfdFlags, Signal, chdir, getpid, pidfd_open, pidfd_send_signal, setsid};
use rustix::thread::futex;

use crate::copy::{self, Copy};
use crate::folder::{Folder, FolderError, Made, Owner};
use crate::privileges;
use crate::process;

/// How long a group may still be in use after its last process has ended: the kernel clears up behind it.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was made: files of the jail, the VMM's control groups, and groups above those.
#[derive(Default)]
pub struct AllMade {
    /// Below the jail's folder.
    pub files: Made,
    /// The VMM's own.
    pub groups: Made,
    /// Which others may use by now.
    pub parents: Made,
}

impl AllMade {
    /// Lets everything stay.
    pub fn keep(self) {
        let Self {
            files,
            groups,
            parents,
        } = self;
        files.keep();
        groups.keep();
        parents.keep();
    }

    fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let all = [&self.files, &self.groups, &self.parents];
        all.into_iter().flat_map(Made::descriptors)
    }
}

/// What tells whether a VMM of a pool has become a machine: the reading end of a pipe.
pub struct Fate(File);

/// Decides on that. Dropped, also by the end of its process, the VMM and its jail go.
pub struct Decision(File);

/// Both ends.
pub fn fate() -> io::Result<(Fate, Decision)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Fate(reader.into()), Decision(writer.into())))
}

impl Decision {
    /// It is a machine, and from now on like any other VMM in a jail.
    pub fn keep(mut self) {
        // A keeper that is gone has seen the VMM's end.
        drop(self.0.write_all(&[0]));
    }
}

/// A VMM of a pool.
pub struct Pooled {
    /// What becomes of it.
    pub fate: Fate,
    /// Its root, in which nobody else makes files before it is a machine.
    pub root: Folder,
}

impl Pooled {
    fn descriptors(&self) -> [RawFd; 2] {
        [self.fate.0.as_raw_fd(), self.root.as_raw_fd()]
    }

    /// Waits until that is decided. If the VMM has not become a machine, it and its files are gone then.
    fn became_machine(mut self, pidfd: &OwnedFd) -> bool {
        if matches!(self.fate.0.read(&mut [0]), Ok(1)) {
            return true;
        }
        // It may have ended by itself.
        let _ = pidfd_send_signal(pidfd, Signal::KILL);
        while let Err(rustix::io::Errno::INTR) =
            poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None)
        {}
        // Its sockets and logs, without which the folders cannot go.
        for folder in [self.root.enter(OsStr::new("run")), Ok(self.root)] {
            drop(folder.map(|folder| folder.remove_files()));
        }
        false
    }
}

/// The keeper of a process that becomes a VMM, seen from there.
pub struct Keeper {
    shared: &'static Shared,
    /// The path of the copy that it was given to write.
    copy: OnceCell<PathBuf>,
}

/// What both processes have before them. Each writes its own word alone; the kernel writes 0 to it at its process's end.
struct Shared {
    /// What the keeper is to do: one of the orders.
    order: AtomicU32,
    /// What it has done: one of the reports.
    report: AtomicU32,
    /// From, to, and whom it is to belong to.
    work: Mutex<Option<([OwnedFd; 2], Owner)>>,
    duties: Mutex<Option<Duties>>,
    /// Whether the VMM is about to run.
    ready: AtomicBool,
}

/// The process has become the VMM, or has ended.
const GONE: u32 = 0;
const WAIT: u32 = 1;
const WRITE: u32 = 2;
/// The VMM cannot be started.
const CLEAR: u32 = 3;

const NOT_YET: u32 = 1;
const WRITTEN: u32 = 2;
const CLEARED: u32 = 3;
/// The number of an error comes on top.
const ERROR: u32 = 1 << 16;

/// What the keeper is to see to.
struct Duties {
    made: AllMade,
    pooled: Option<Pooled>,
    /// The process that becomes the VMM.
    pidfd: OwnedFd,
}

impl Keeper {
    /// Starts it, for this process, which must not have joined a group yet. With something to do soon it starts on another processor.
    pub fn start(has_work: bool) -> io::Result<Self> {
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            order: AtomicU32::new(WAIT),
            report: AtomicU32::new(NOT_YET),
            work: Mutex::new(None),
            duties: Mutex::new(None),
            ready: AtomicBool::new(false),
        }));
        process::tell_end(&shared.order);
        process::share(keep, shared, &shared.report, has_work)?;
        Ok(Keeper {
            shared,
            copy: OnceCell::new(),
        })
    }

    /// Has it write the program's copy.
    pub fn write(&self, copy: Copy) {
        let (files, owner, path) = copy.into_parts();
        // Only one is written.
        let _ = self.copy.set(path);
        put(&self.shared.work, (files, owner));
        tell(&self.shared.order, WRITE);
    }

    /// Waits until that is written. Then nobody has it open for writing.
    pub fn written(&self) -> Result<(), FolderError> {
        let Some(path) = self.copy.get() else {
            return Ok(());
        };
        let error = match wait_while(&self.shared.report, NOT_YET) {
            WRITTEN => return Ok(()),
            report @ ERROR.. => {
                let number = i32::try_from(report - ERROR).unwrap_or_default();
                io::Error::from_raw_os_error(number)
            }
            _ => io::Error::other("the process that does it was killed"),
        };
        Err(copy::failed(path.clone(), error))
    }

    /// Leaves it what was made.
    pub fn take_over(&self, made: AllMade, pooled: Option<Pooled>) -> io::Result<()> {
        let pidfd = pidfd_open(getpid(), PidfdFlags::empty())?;
        let duties = Duties {
            made,
            pooled,
            pidfd,
        };
        put(&self.shared.duties, duties);
        Ok(())
    }

    /// Says that the VMM is about to run. Whatever ends this process from now on is the VMM's end.
    pub fn ready(&self) {
        self.shared.ready.store(true, Ordering::Release);
    }

    /// Lets it remove what was made. Groups go when this process has ended.
    pub fn clear(self) {
        drop(self.written());
        let before = self.shared.report.load(Ordering::Acquire);
        tell(&self.shared.order, CLEAR);
        if before != GONE {
            wait_while(&self.shared.report, before);
        }
    }
}

fn put<T>(place: &Mutex<Option<T>>, what: T) {
    if let Ok(mut place) = place.lock() {
        *place = Some(what);
    }
}

/// What is there, if nobody holds it who is gone.
fn take<T>(place: &Mutex<Option<T>>) -> Option<T> {
    place.try_lock().ok()?.take()
}

fn tell(word: &AtomicU32, what: u32) {
    word.store(what, Ordering::Release);
    // Nothing is lost if nobody waits.
    let _ = futex::wake(word, futex::Flags::empty(), 1);
}

/// Waits until `word` is something else, and returns that.
fn wait_while(word: &AtomicU32, before: u32) -> u32 {
    loop {
        match word.load(Ordering::Acquire) {
            // Woken, or it has changed, or a signal came: it is looked at again.
            now if now == before => drop(futex::wait(word, futex::Flags::empty(), before, None)),
            now => return now,
        }
    }
}

/// The same, at first busily: a processor that has gone to sleep takes 0.1 to 0.2 ms to wake up where it is a virtual one.
fn wait_busily_while(word: &AtomicU32, before: u32) -> u32 {
    const TURNS: u32 = 20_000;
    for _ in 0..TURNS {
        if word.load(Ordering::Acquire) != before {
            break;
        }
        spin_loop();
    }
    wait_while(word, before)
}

/// The keeper's life. Until the other process is gone, or waits, it does nothing but what [`process::share`] allows.
fn keep(shared: &Shared, is_elsewhere: bool) {
    // A terminal that ends the jailer does not end what it has left behind.
    let _ = process::block_all_signals();
    let _ = setsid();
    let _ = chdir("/");
    let mut order = match is_elsewhere {
        true => wait_busily_while(&shared.order, WAIT),
        false => wait_while(&shared.order, WAIT),
    };
    if order == WRITE
        && let Some((files, owner)) = take(&shared.work)
    {
        let report = match process::copy(files.each_ref().map(AsFd::as_fd), owner) {
            Ok(()) => WRITTEN,
            Err(error) => ERROR + error.raw_os_error().cast_unsigned(),
        };
        // Of both processes. No program can be run as long as it is open for writing.
        drop(files);
        tell(&shared.report, report);
        order = wait_while(&shared.order, WRITE);
    }
    let Some(mut duties) = take(&shared.duties) else {
        return;
    };
    let runs = order == GONE && shared.ready.load(Ordering::Acquire);
    if !runs {
        drop(mem::take(&mut duties.made.files));
    }
    if order == CLEAR {
        tell(&shared.report, CLEARED);
        wait_while(&shared.order, CLEAR);
    }
    let Duties {
        made,
        pooled,
        pidfd,
    } = duties;
    // From here on memory and descriptors are its own.
    let of_pool = pooled.iter().flat_map(Pooled::descriptors);
    let needed = [pidfd.as_raw_fd()].into_iter().chain(of_pool);
    drop(process::close_all_but(0, needed.chain(made.descriptors())));
    match runs {
        true => stay(made, pooled, &pidfd),
        false => remove_groups_after(&pidfd, made),
    }
}

/// The same, for a process that is the VMM's parent, and has seen it start.
pub fn stay_detached(made: AllMade, pooled: Option<Pooled>, pidfd: &OwnedFd) {
    let of_pool = pooled.iter().flat_map(Pooled::descriptors);
    let needed = [pidfd.as_raw_fd()].into_iter().chain(of_pool);
    drop(detach(needed.chain(made.descriptors())));
    stay(made, pooled, pidfd);
}

/// Removes what must not be left of a VMM that runs.
fn stay(mut made: AllMade, pooled: Option<Pooled>, pidfd: &OwnedFd) {
    let files = mem::take(&mut made.files);
    if pooled.is_none_or(|pooled| pooled.became_machine(pidfd)) {
        files.keep();
        mem::take(&mut made.parents).keep();
    } else {
        drop(files);
    }
    remove_groups_after(pidfd, made);
}

/// Waits for the end of a process, then removes its groups.
pub fn remove_groups_after(pidfd: &OwnedFd, mut made: AllMade) {
    if made.groups.is_empty() {
        return;
    }
    // Who has not even that, as a user without root, needs no privilege for groups of its own.
    drop(privileges::keep_removal_of_groups());
    loop {
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return made.keep(),
        }
    }
    made.groups.remove(PATIENCE);
    made.parents.remove(PATIENCE);
}

/// Lets go of everything that the jailer was started with: signals, session, folder, descriptors.
pub fn detach(kept: impl Iterator<Item = i32>) -> io::Result<()> {
    process::block_all_signals()?;
    // Fails if this process leads a session, which then is its own.
    let _ = setsid();
    chdir("/")?;
    process::close_all_but(0, kept)
}
