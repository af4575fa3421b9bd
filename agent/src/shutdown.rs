//! The way down.

use std::time::{Duration, Instant};

use lepton_agent::service::{Children, Table};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::{RebootCommand, reboot};

use crate::report;
use crate::signals::Signals;

/// How long programs may take to end by themselves, and then to be killed.
const GRACE: Duration = Duration::from_secs(2);
const KILLED: Duration = Duration::from_secs(1);

/// Ends all programs, writes everything out and resets the machine: the VMM takes a reset for the
/// guest's end. A power-off would not do, as a kernel without ACPI halts instead.
pub fn run(signals: Option<&Signals>, table: &Table) -> ! {
    // Shells ignore SIGTERM, but take SIGHUP for the end of their terminal.
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCONT] {
        signal_all(signal);
    }
    if !all_ended(signals, table, GRACE) {
        signal_all(Signal::SIGKILL);
        all_ended(signals, table, KILLED);
    }
    rustix::fs::sync();
    release_drives();
    report("reboot", reboot(RebootCommand::Restart));
    // Only if the kernel refuses to reboot. Exiting panics it, which ends the guest as well.
    std::process::exit(1)
}

/// Signals every process but ourselves.
fn signal_all(signal: Signal) {
    // Never useful to know: kernel threads count, so this says nothing about programs.
    let _ = kill(Pid::from_raw(-1), signal);
}

/// Waits until no process is left: each is our child, or becomes it when its parent ends.
fn all_ended(signals: Option<&Signals>, table: &Table, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while table.reap() == Children::Some {
        let Some(signals) = signals else { return false };
        if signals.next(Some(deadline)).is_none() {
            return false;
        }
    }
    true
}

/// Unmounts file systems that are on drives, or at least makes them read-only.
fn release_drives() {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    for target in on_drives(&mounts) {
        if target != "/" && unmount(&target, UnmountFlags::empty()).is_ok() {
            continue;
        }
        report(&target, mount_remount(&target, MountFlags::RDONLY, ""));
    }
    rustix::fs::sync();
}

/// Where drives are mounted, the latest mount first.
fn on_drives(mounts: &str) -> Vec<String> {
    let mut targets: Vec<String> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (source, target) = (fields.next()?, fields.next()?);
            source.starts_with("/dev/").then(|| unescape(target))
        })
        .collect();
    targets.reverse();
    targets
}

/// Undoes the kernel's escapes in /proc/mounts.
fn unescape(field: &str) -> String {
    field
        .replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_drives_latest_first() {
        let mounts = "overlay / overlay rw,lowerdir=/ 0 0\n\
                      proc /proc proc rw 0 0\n\
                      /dev/vdb /data ext4 rw 0 0\n\
                      broken\n\
                      /dev/vdc /data/in\\040side ext4 rw 0 0\n";
        assert_eq!(on_drives(mounts), ["/data/in side", "/data"]);
    }
}
