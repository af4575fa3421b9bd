//! From a request to a VMM that runs in its jail.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::process::exit;

use rustix::fs::{Mode, OFlags};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::cgroup::Group;
use crate::clock::Clock;
use crate::copy::Copy;
use crate::error::JailError;
use crate::folder::Owner;
use crate::keeper::{self, AllMade, Keeper, Pooled};
use crate::plan::{Handed, Maker, PROC, Plan};
use crate::process::{self, HeldSignals, Side};
use crate::report::{self, Reporter};
use crate::tree::{PidFile, Tree};
use crate::{limits, privileges, root, user};

/// A jail that is made but for the copy of the program, and not entered.
struct Jail {
    id: String,
    tree: Tree,
    pid_file: PidFile,
    groups: Vec<Group>,
    plan: Rest,
}

/// What of the plan is needed inside.
struct Rest {
    maker: Maker,
    owner: Owner,
    handed: Vec<Handed>,
    netns: Option<OwnedFd>,
    limits: Vec<limits::Limit>,
    null: Option<File>,
    arguments: Vec<OsString>,
}

/// Which process writes the copy of the program while the VMM's goes into the jail.
enum Writer {
    /// The VMM's parent, if it is still to be written.
    Parent(Option<Copy>),
    /// The keeper.
    Keeper(Keeper),
}

/// Makes the jail and starts the VMM in it: in this process, which is the return only of an error, or in a child.
///
/// `waiting` is told when the VMM runs, if somebody waits elsewhere. Without that, the VMM of a user without root runs in a
/// child, whose exit status comes back.
pub fn start(plan: Plan, clock: Clock, waiting: &mut Option<Reporter>) -> Result<u8, JailError> {
    let mut made = AllMade::default();
    let Plan {
        id,
        base,
        program,
        maker,
        owner,
        handed,
        netns,
        cgroups,
        limits,
        null,
        new_pid_ns,
        arguments,
        fate,
        spare,
    } = plan;
    let keeper = match maker {
        Maker::Root if !new_pid_ns => {
            Some(Keeper::start(spare.is_none()).map_err(JailError::Keeper)?)
        }
        Maker::Root | Maker::User => None,
    };
    let (tree, copy) = Tree::begin(&base, program, spare, &id, owner, &mut made.files)?;
    let writer = match keeper {
        Some(keeper) => {
            if let Some(copy) = copy {
                keeper.write(copy);
            }
            Writer::Keeper(keeper)
        }
        None => Writer::Parent(copy),
    };
    let pid_file = tree.furnish(owner, maker == Maker::Root, &mut made.files)?;
    let groups = cgroups.make(&id, &mut made.groups, &mut made.parents)?;
    let jail = Jail {
        id,
        tree,
        pid_file,
        groups,
        plan: Rest {
            maker,
            owner,
            handed,
            netns,
            limits,
            null,
            arguments,
        },
    };
    let pooled = fate.map(|fate| Pooled {
        fate,
        root: jail.tree.root().clone(),
    });
    match writer {
        Writer::Parent(copy) => start_child(jail, copy, made, pooled, clock, waiting),
        Writer::Keeper(keeper) => become_vmm(jail, keeper, made, pooled, clock, waiting),
    }
}

/// This process becomes the VMM.
fn become_vmm(
    jail: Jail,
    keeper: Keeper,
    made: AllMade,
    pooled: Option<Pooled>,
    clock: Clock,
    waiting: &mut Option<Reporter>,
) -> Result<u8, JailError> {
    jail.pid_file.write(getpid()).map_err(JailError::Pid)?;
    keeper.take_over(made, pooled).map_err(JailError::Keeper)?;
    let written = || keeper.written().map_err(JailError::Folder);
    let error = jail.enter(clock, written, || {
        keeper.ready();
        if let Some(waiting) = waiting {
            waiting.ready();
        }
    });
    keeper.clear();
    Err(error)
}

/// A child becomes the VMM, as the first process of its PID namespace.
fn start_child(
    jail: Jail,
    copy: Option<Copy>,
    mut made: AllMade,
    pooled: Option<Pooled>,
    clock: Clock,
    waiting: &mut Option<Reporter>,
) -> Result<u8, JailError> {
    let (reporter, outcome) = report::pair().map_err(JailError::Pipe)?;
    let (go, gate) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| JailError::Pipe(error.into()))?;
    let in_front = waiting.is_none() && pooled.is_none();
    let signals = HeldSignals::hold().map_err(JailError::Fork)?;
    let (namespaces, refused): (_, fn(io::Error) -> JailError) = match jail.plan.maker {
        Maker::Root => (libc::CLONE_NEWPID, JailError::Fork),
        Maker::User => (user::NAMESPACES, JailError::Namespaces),
    };
    let clock = clock.before_fork();
    match process::fork_into(namespaces).map_err(refused)? {
        Side::Child => {
            // The copy too: it is no program to be run as long as anybody can write to it.
            drop((gate, outcome, waiting.take(), copy));
            live_as_child(&jail, clock, in_front, &signals, reporter, go);
            exit(1)
        }
        Side::Parent(pid) => {
            drop((go, reporter));
            let pidfd = let_go(&jail, copy, pid, gate)?;
            outcome.wait().map_err(JailError::Inside)?;
            if in_front {
                std::mem::take(&mut made.files).keep();
                std::mem::take(&mut made.parents).keep();
                let status = user::attend(pid, &signals);
                keeper::remove_groups_after(&pidfd, made);
                return Ok(status);
            }
            if let Some(mut waiting) = waiting.take() {
                waiting.ready();
            }
            keeper::stay_detached(made, pooled, &pidfd);
            // What was closed here must not be closed again.
            exit(0)
        }
    }
}

/// What the child does until it is the VMM. Returns only if it cannot be, which it has reported then.
fn live_as_child(
    jail: &Jail,
    clock: Clock,
    ends_with_parent: bool,
    signals: &HeldSignals,
    mut reporter: Reporter,
    go: OwnedFd,
) {
    let prepared = signals.release().and_then(|()| match ends_with_parent {
        true => user::end_with_parent(&reporter),
        false => Ok(()),
    });
    let error = match prepared {
        Ok(()) => {
            // Without a word the parent has failed, or is gone, and nobody listens.
            let written = || {
                let word = File::from(go).read_exact(&mut [0]);
                word.map_err(JailError::Pipe)
            };
            jail.enter(clock, written, || reporter.ready())
        }
        Err(error) => JailError::Fork(error),
    };
    reporter.failed(&error.to_string());
}

/// Writes the program's copy and the child's process id, then lets the child go on.
fn let_go(jail: &Jail, copy: Option<Copy>, pid: Pid, gate: OwnedFd) -> Result<OwnedFd, JailError> {
    // The child cannot be another one by now: it has not been waited for.
    let pidfd =
        pidfd_open(pid, PidfdFlags::empty()).map_err(|error| JailError::Keeper(error.into()))?;
    jail.pid_file.write(pid).map_err(JailError::Pid)?;
    copy.map(Copy::write).transpose()?;
    File::from(gate).write_all(&[0]).map_err(JailError::Pipe)?;
    Ok(pidfd)
}

impl Jail {
    /// Goes into the jail and runs the VMM there. `written` waits for the copy of the program; `ready` is called right before
    /// that runs. Returns only if something fails.
    fn enter(
        &self,
        clock: Clock,
        written: impl FnOnce() -> Result<(), JailError>,
        ready: impl FnOnce(),
    ) -> JailError {
        let process = match self.confine(written) {
            Ok(process) => process,
            Err(error) => return error,
        };
        let arguments = match self.arguments(process.as_ref(), clock) {
            Ok(arguments) => arguments,
            Err(error) => return error,
        };
        ready();
        let source = process::run(self.tree.program().as_fd(), &arguments);
        let path = self.tree.program_path();
        if source.kind() == io::ErrorKind::NotFound {
            return JailError::Dynamic(path);
        }
        JailError::Exec { path, source }
    }

    /// Returns what the VMM gets because it has no /proc, if there is one here.
    fn confine(
        &self,
        written: impl FnOnce() -> Result<(), JailError>,
    ) -> Result<Option<Handed>, JailError> {
        let owner = match self.plan.maker {
            Maker::Root => Some(self.plan.owner),
            Maker::User => {
                user::map(self.plan.owner)?;
                None
            }
        };
        if let Some(netns) = &self.plan.netns {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|error| JailError::Setns(error.into()))?;
        }
        let process = own_process();
        root::enter(self.tree.root())?;
        if let Some(null) = &self.plan.null {
            for result in [dup2_stdin(null), dup2_stdout(null), dup2_stderr(null)] {
                result.map_err(|error| JailError::Null(error.into()))?;
            }
        }
        umask(Mode::RWXG | Mode::RWXO);
        for group in &self.groups {
            group.join()?;
        }
        limits::set(&self.plan.limits)?;
        privileges::give_up(owner)?;
        for handed in self.plan.handed.iter().chain(&process) {
            fcntl_setfd(&handed.fd, FdFlags::empty())
                .map_err(|error| JailError::Inherited(error.into()))?;
        }
        // As late as can be: it takes as long as all of this.
        written()?;
        Ok(process)
    }

    fn arguments(&self, process: Option<&Handed>, clock: Clock) -> Result<Vec<CString>, JailError> {
        let (start, start_cpu, parent_cpu) = clock.now();
        let mut all = vec![self.tree.program_path()];
        for (name, value) in [
            ("--id", self.id.clone()),
            ("--start-time-us", start.to_string()),
            ("--start-time-cpu-us", start_cpu.to_string()),
            ("--parent-cpu-time-us", parent_cpu.to_string()),
        ] {
            all.extend([OsString::from(name), value.into()]);
        }
        for Handed { option, fd } in self.plan.handed.iter().chain(process) {
            all.extend([OsString::from(option), fd.as_raw_fd().to_string().into()]);
        }
        all.extend(self.plan.arguments.iter().cloned());
        all.into_iter()
            .map(|argument| CString::new(argument.into_vec()).map_err(|_| JailError::Argument))
            .collect()
    }
}

/// This process's folder in /proc, from which the VMM learns which pages of its memory were written. A descriptor of the file
/// itself would tell of the memory that this program has.
fn own_process() -> Option<Handed> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/proc/self", flags, Mode::empty()).ok()?;
    Some(Handed { option: PROC, fd })
}
