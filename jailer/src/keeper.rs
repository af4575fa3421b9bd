//! Whoever stays behind when the jailer's process becomes the VMM: removes what must not be left.
//!
//! If the VMM cannot be started, that is all that was made, which the process itself cannot remove any more: it has no
//! privileges then. At the VMM's end, whatever that was, it is the VMM's control groups. Of a VMM that waited in a pool and
//! has not become a machine it is the jail as well, once the VMM was killed: nobody misses it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::exit;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, chdir, getpid, pidfd_open, pidfd_send_signal, setsid,
    waitpid,
};

use crate::folder::{Folder, Made};
use crate::privileges;
use crate::process::{self, Side};
use crate::report::{self, Outcome, Reporter};

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

/// The way from the process that becomes the VMM to its keeper.
pub struct Keeper {
    reporter: Reporter,
    files_gone: File,
}

/// A keeper that is about to be there.
pub struct Coming {
    /// Who makes it, until that has ended.
    maker: Option<Pid>,
    made: AllMade,
}

impl Coming {
    /// Waits until there is a keeper. If there is none, what was made is gone.
    pub fn settle(mut self) -> io::Result<()> {
        self.wait()
    }

    fn wait(&mut self) -> io::Result<()> {
        if let Some(maker) = self.maker.take() {
            if wait_for(maker)? != 0 {
                return Err(io::Error::other("cannot fork"));
            }
            std::mem::take(&mut self.made).keep();
        }
        Ok(())
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        // What is not in a keeper's hands goes with this.
        drop(self.wait());
    }
}

impl Keeper {
    /// Leaves a keeper behind for this process, which must not have joined a group yet. It makes itself while this process
    /// goes on.
    pub fn leave(made: AllMade, pooled: Option<Pooled>) -> io::Result<(Self, Coming)> {
        let (reporter, outcome) = report::pair()?;
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let pidfd = pidfd_open(getpid(), PidfdFlags::empty())?;
        match process::fork()? {
            Side::Child => {
                let needed = [outcome.as_raw_fd(), writer.as_raw_fd(), pidfd.as_raw_fd()];
                let of_pool = pooled.iter().flat_map(Pooled::descriptors);
                // Here, since the VMM's process waits for this one's end: its files are not to be open anywhere else when it runs.
                let result = detach(needed.into_iter().chain(of_pool).chain(made.descriptors()));
                if result.is_err() {
                    exit(1);
                }
                // Once more, so that the VMM has no child that it knows nothing of.
                let status = match process::fork() {
                    Ok(Side::Child) => keep(made, pooled, outcome, writer, &pidfd),
                    Ok(Side::Parent(_)) => 0,
                    Err(_) => 1,
                };
                exit(status)
            }
            Side::Parent(maker) => {
                let keeper = Self {
                    reporter,
                    files_gone: reader.into(),
                };
                let maker = Some(maker);
                Ok((keeper, Coming { maker, made }))
            }
        }
    }

    /// Says that the VMM is about to run. Whatever ends this process from now on is the VMM's end.
    pub fn ready(&mut self) {
        self.reporter.ready();
    }

    /// Lets the keeper remove what was made. Groups go when this process has ended.
    pub fn clear(mut self) {
        self.reporter.failed("not started");
        // The keeper's end of the pipe closes when the files are gone.
        drop(self.files_gone.read(&mut [0]));
    }
}

fn wait_for(child: Pid) -> io::Result<i32> {
    loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => return Ok(status.exit_status().unwrap_or(1)),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The keeper's life. Returns its exit status.
fn keep(
    mut made: AllMade,
    pooled: Option<Pooled>,
    outcome: Outcome,
    files_gone: OwnedFd,
    pidfd: &OwnedFd,
) -> i32 {
    match outcome.wait() {
        Ok(()) => {
            drop(files_gone);
            stay(made, pooled, pidfd);
        }
        Err(_) => {
            drop(std::mem::take(&mut made.files));
            drop(files_gone);
            remove_groups_after(pidfd, made);
        }
    }
    0
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
    let files = std::mem::take(&mut made.files);
    if pooled.is_none_or(|pooled| pooled.became_machine(pidfd)) {
        files.keep();
        std::mem::take(&mut made.parents).keep();
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
