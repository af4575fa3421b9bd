//! A jail without root: a user namespace, in which the user is still the user and nobody else is anybody.

use std::fs;
use std::io;

use rustix::fs::{Gid, Uid};
use rustix::process::{
    Pid, Signal, WaitOptions, kill_process, set_parent_process_death_signal, waitpid,
};

use crate::folder::Owner;
use crate::process::{HeldSignals, Taken};
use crate::report::Reporter;

/// Everything that the VMM has of its own. The mount namespace comes later, with the root.
pub const NAMESPACES: libc::c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// A step into the user namespace that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot map the user into its namespace: {file}: {source}")]
pub struct MapError {
    file: &'static str,
    source: io::Error,
}

/// Maps one user and one group, to themselves. For the first process of a new user namespace.
pub fn map(owner: Owner) -> Result<(), MapError> {
    let Owner { uid, gid } = owner;
    let itself = |id: u32| format!("{id} {id} 1");
    let maps = [
        // Without this the group cannot be mapped (user_namespaces(7)).
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", itself(Uid::as_raw(uid))),
        ("/proc/self/gid_map", itself(Gid::as_raw(gid))),
    ];
    for (file, text) in maps {
        fs::write(file, text).map_err(|source| MapError { file, source })?;
    }
    Ok(())
}

/// Lets this process end with its parent, which reads what is written to `reporter`. Refused if it has ended already.
///
/// The kernel sends the signal only to those who have asked for it by then. Its files a process closes before that, so a pipe
/// tells; the parent's id does not, which is 0 in another PID namespace.
pub fn end_with_parent(reporter: &Reporter) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    match reporter.is_heard()? {
        true => Ok(()),
        false => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// Waits for the VMM's end, hands on what asks for it, and returns the status to end with.
pub fn attend(vmm: Pid, signals: &HeldSignals) -> u8 {
    loop {
        match signals.take() {
            Ok(Taken::ChildEnded) => match waitpid(Some(vmm), WaitOptions::NOHANG) {
                Ok(Some((_, status))) => {
                    // As a shell has it for an end by a signal.
                    let by_signal = status.terminating_signal().map(|signal| 128 + signal);
                    let code = status.exit_status().or(by_signal).unwrap_or(1);
                    return u8::try_from(code).unwrap_or(1);
                }
                Ok(None) => {}
                Err(_) => return 1,
            },
            Ok(Taken::Asked(signal)) => {
                if let Some(signal) = Signal::from_named_raw(signal) {
                    // It may have ended; then the next signal tells so.
                    let _ = kill_process(vmm, signal);
                }
            }
            // The VMM is among those that were asked.
            Ok(Taken::FromTerminal) => {}
            Err(_) => return 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report;

    #[test]
    fn who_has_no_parent_any_more_does_not_go_on() {
        let (reporter, outcome) = report::pair().unwrap();
        end_with_parent(&reporter).unwrap();
        drop(outcome);
        assert!(end_with_parent(&reporter).is_err());
        // This is not the process that is meant.
        set_parent_process_death_signal(None).unwrap();
    }
}
