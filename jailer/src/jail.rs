//! From a request to a VMM that runs in its jail.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::process::exit;

use rustix::fs::Mode;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::cgroup::Group;
use crate::clock::Clock;
use crate::error::JailError;
use crate::folder::Owner;
use crate::keeper::{self, AllMade, Keeper};
use crate::plan::Plan;
use crate::process::{self, Side};
use crate::report::{self, Reporter};
use crate::tree::Tree;
use crate::{limits, privileges, root};

/// A jail that is made and not entered.
struct Jail {
    id: String,
    tree: Tree,
    groups: Vec<Group>,
    plan: Rest,
}

/// What of the plan is needed inside.
struct Rest {
    owner: Owner,
    netns: Option<OwnedFd>,
    limits: Vec<limits::Limit>,
    null: Option<File>,
    arguments: Vec<OsString>,
}

/// Makes the jail and starts the VMM in it: in this process, which is the return only of an error, or in a child.
///
/// `waiting` is told when the VMM runs, if somebody waits elsewhere.
pub fn start(plan: Plan, clock: Clock, waiting: &mut Option<Reporter>) -> Result<(), JailError> {
    let mut made = AllMade::default();
    let Plan {
        id,
        base,
        program,
        owner,
        netns,
        cgroups,
        limits,
        null,
        new_pid_ns,
        arguments,
    } = plan;
    let tree = Tree::make(&base, &program, &id, owner, true, &mut made.files)?;
    let groups = cgroups.make(&id, &mut made.groups, &mut made.parents)?;
    let jail = Jail {
        id,
        tree,
        groups,
        plan: Rest {
            owner,
            netns,
            limits,
            null,
            arguments,
        },
    };
    if new_pid_ns {
        start_child(jail, made, clock, waiting)
    } else {
        become_vmm(jail, made, clock, waiting)
    }
}

/// This process becomes the VMM.
fn become_vmm(
    jail: Jail,
    made: AllMade,
    clock: Clock,
    waiting: &mut Option<Reporter>,
) -> Result<(), JailError> {
    jail.tree.write_pid(getpid()).map_err(JailError::Pid)?;
    let mut keeper = Keeper::leave(made).map_err(JailError::Keeper)?;
    let error = jail.enter(clock, || {
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
    mut made: AllMade,
    clock: Clock,
    waiting: &mut Option<Reporter>,
) -> Result<(), JailError> {
    let (mut reporter, outcome) = report::pair().map_err(JailError::Pipe)?;
    let (go, gate) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| JailError::Pipe(error.into()))?;
    let clock = clock.before_fork();
    match process::fork_into(libc::CLONE_NEWPID).map_err(JailError::Fork)? {
        Side::Child => {
            drop((gate, outcome, waiting.take()));
            // Without a word the parent has failed, or is gone.
            if matches!(File::from(go).read(&mut [0]), Ok(1)) {
                let error = jail.enter(clock, || reporter.ready());
                reporter.failed(&error.to_string());
            }
            exit(1)
        }
        Side::Parent(pid) => {
            drop((go, reporter));
            let pidfd = let_go(&jail, pid, gate)?;
            outcome.wait().map_err(JailError::Inside)?;
            if let Some(mut waiting) = waiting.take() {
                waiting.ready();
            }
            std::mem::take(&mut made.files).keep();
            std::mem::take(&mut made.parents).keep();
            let kept: Vec<i32> = made
                .groups
                .descriptors()
                .chain([pidfd.as_raw_fd()])
                .collect();
            drop(keeper::detach(kept.into_iter()));
            keeper::remove_groups_after(&pidfd, made);
            // What was closed here must not be closed again.
            exit(0)
        }
    }
}

/// Writes the child's process id down, then lets it go on.
fn let_go(jail: &Jail, pid: Pid, gate: OwnedFd) -> Result<OwnedFd, JailError> {
    // The child cannot be another one by now: it has not been waited for.
    let pidfd =
        pidfd_open(pid, PidfdFlags::empty()).map_err(|error| JailError::Keeper(error.into()))?;
    jail.tree.write_pid(pid).map_err(JailError::Pid)?;
    File::from(gate).write_all(&[0]).map_err(JailError::Pipe)?;
    Ok(pidfd)
}

impl Jail {
    /// Goes into the jail and runs the VMM there. `ready` is called right before. Returns only if something fails.
    fn enter(&self, clock: Clock, ready: impl FnOnce()) -> JailError {
        match self.confine() {
            Ok(()) => {}
            Err(error) => return error,
        }
        let arguments = match self.arguments(clock) {
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

    fn confine(&self) -> Result<(), JailError> {
        for group in &self.groups {
            group.join()?;
        }
        if let Some(netns) = &self.plan.netns {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|error| JailError::Setns(error.into()))?;
        }
        root::enter(self.tree.root())?;
        if let Some(null) = &self.plan.null {
            for result in [dup2_stdin(null), dup2_stdout(null), dup2_stderr(null)] {
                result.map_err(|error| JailError::Null(error.into()))?;
            }
        }
        umask(Mode::RWXG | Mode::RWXO);
        limits::set(&self.plan.limits)?;
        privileges::give_up(Some(self.plan.owner))?;
        Ok(())
    }

    fn arguments(&self, clock: Clock) -> Result<Vec<CString>, JailError> {
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
        all.extend(self.plan.arguments.iter().cloned());
        all.into_iter()
            .map(|argument| CString::new(argument.into_vec()).map_err(|_| JailError::Argument))
            .collect()
    }
}
