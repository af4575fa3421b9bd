//! Control groups of jailed VMMs, on whatever hierarchies a host has.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::jail::{Jail, Jailed, wait_until_gone};

/// A hierarchy, and what is asked for in it.
struct Hierarchy {
    root: PathBuf,
    /// Its name in /proc/PID/cgroup.
    name: &'static str,
    /// Files and values.
    settings: Vec<(&'static str, &'static str)>,
}

/// The groups have the values asked for and nobody but the VMM in them, and go when it ends, in each way it can be
/// started.
fn have_their_values_and_go(version: &str, hierarchies: &[Hierarchy]) {
    let parent = format!("lepton-test-{}-groups/nested", std::process::id());
    for (options, signal) in [
        (&[][..], Signal::KILL),
        (&[], Signal::TERM),
        (&["--daemonize"], Signal::KILL),
        (&["--new-pid-ns"], Signal::KILL),
    ] {
        let settings = hierarchies.iter().flat_map(|h| &h.settings);
        let settings: Vec<String> = settings
            .map(|(file, value)| format!("{file}={value}"))
            .collect();
        let jail = Jail::as_another_user()
            .options(["--parent-cgroup", &parent, "--cgroup-version", version])
            .options(options)
            .options(settings.iter().flat_map(|text| ["--cgroup", text]));
        let vmm = match options {
            [] => jail.spawn(),
            _ => jail.detach(),
        };
        assert_eq!(vmm.api().state(), "Not started");
        for hierarchy in hierarchies {
            let group = hierarchy.root.join(&parent).join("vm-1");
            for (file, value) in &hierarchy.settings {
                let found = fs::read_to_string(group.join(file)).expect("the group has the file");
                assert_eq!(found.trim(), *value, "{file}");
            }
            assert_member(&vmm, hierarchy.name, &format!("/{parent}/vm-1"));
            let members = fs::read_to_string(group.join("cgroup.procs")).expect("the group's");
            assert_eq!(members.trim(), vmm.pid.to_string(), "only the VMM is in it");
        }
        vmm.signal(signal);
        for hierarchy in hierarchies {
            wait_until_gone(&hierarchy.root.join(&parent).join("vm-1"));
        }
    }
    for hierarchy in hierarchies {
        let nested = hierarchy.root.join(&parent);
        fs::remove_dir(&nested).expect("the group above is left, and empty");
        fs::remove_dir(nested.parent().expect("it is nested")).expect("it is empty");
    }
}

/// Checks a line of /proc/PID/cgroup: number, hierarchy, group.
#[track_caller]
fn assert_member(vmm: &Jailed, hierarchy: &str, group: &str) {
    let membership = vmm.proc("cgroup");
    let wanted = format!("{hierarchy}:{group}");
    let mut lines = membership.lines().filter_map(|line| line.split_once(':'));
    assert!(
        lines.any(|(_, line)| line == wanted),
        "no {wanted} in\n{membership}"
    );
}

/// Of version 1, where each controller has a hierarchy.
pub fn groups_of_version_1_have_their_values_and_go_with_the_vmm() {
    let root = Path::new("/sys/fs/cgroup");
    if !root.join("cpu/tasks").exists() || !root.join("memory/tasks").exists() {
        eprintln!(
            "SKIPPED: groups_of_version_1_have_their_values_and_go_with_the_vmm: no cgroup v1 here"
        );
        return;
    }
    let hierarchy = |name: &'static str, file, value| Hierarchy {
        root: root.join(name),
        name,
        settings: vec![(file, value)],
    };
    have_their_values_and_go(
        "1",
        &[
            hierarchy("cpu", "cpu.shares", "20"),
            hierarchy("memory", "memory.limit_in_bytes", "268435456"),
            hierarchy("cpuset", "cpuset.cpus", "0"),
        ],
    );
}

/// What version 2 can be asked for, by controller.
const VERSION_2: [(&str, &str, &str); 5] = [
    ("cpu", "cpu.weight", "20"),
    ("memory", "memory.max", "268435456"),
    ("pids", "pids.max", "64"),
    ("cpuset", "cpuset.cpus", "0"),
    ("hugetlb", "hugetlb.2MB.max", "4194304"),
];

/// Where version 2 is mounted.
fn unified() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mut mounts = mounts.lines().map(|line| line.split(' '));
    mounts.find_map(|mut fields| {
        let (path, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| path.into())
    })
}

/// The controllers that a group passes on. Those that this test added are taken away again: they are the host's affair.
struct PassedOn {
    file: PathBuf,
    before: String,
}

impl PassedOn {
    fn of(group: &Path) -> Self {
        let file = group.join("cgroup.subtree_control");
        Self {
            before: fs::read_to_string(&file).expect("a file of every group"),
            file,
        }
    }
}

impl Drop for PassedOn {
    fn drop(&mut self) {
        let now = fs::read_to_string(&self.file).unwrap_or_default();
        for name in now.split_whitespace() {
            if !self.before.split_whitespace().any(|was| was == name) {
                // Somebody else may need it by now.
                let _ = fs::write(&self.file, format!("-{name}"));
            }
        }
    }
}

/// Of version 2, with the controllers that this host has there.
pub fn groups_of_version_2_have_their_values_and_go_with_the_vmm() {
    let skipped = |reason: &str| {
        eprintln!("SKIPPED: groups_of_version_2_have_their_values_and_go_with_the_vmm: {reason}");
    };
    let Some(root) = unified() else {
        return skipped("no cgroup v2 here");
    };
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).expect("its controllers");
    let passed_on = PassedOn::of(&root);
    // What looks like the root may be a group, and a group that has processes passes nothing on.
    let is_root = !root.join("cgroup.type").exists();
    let usable = match is_root {
        true => &controllers,
        false => &passed_on.before,
    };
    let is_there = |name: &str| usable.split_whitespace().any(|found| found == name);
    let settings: Vec<_> = (VERSION_2.iter())
        .filter(|(controller, ..)| is_there(controller))
        .map(|(_, file, value)| (*file, *value))
        .collect();
    if settings.is_empty() {
        return skipped(&format!("its controllers are {usable:?}"));
    }
    have_their_values_and_go(
        "2",
        &[Hierarchy {
            root,
            name: "",
            settings,
        }],
    );
    drop(passed_on);
}

/// Without anything to set, the VMM goes to the group above, if that is there.
pub fn a_group_of_version_2_is_joined() {
    let Some(root) = unified() else {
        eprintln!("SKIPPED: a_group_of_version_2_is_joined: no cgroup v2 here");
        return;
    };
    let parent = format!("lepton-test-{}-joined", std::process::id());
    let options = ["--parent-cgroup", &parent, "--cgroup-version", "2"];
    let vmm = Jail::as_another_user().options(options).spawn();
    let own = fs::read_to_string("/proc/self/cgroup").expect("of this process");
    let own = own.lines().find_map(|line| line.strip_prefix("0::"));
    assert_eq!(vmm.api().state(), "Not started");
    assert_member(&vmm, "", own.expect("a group of version 2"));
    drop(vmm);
    fs::create_dir(root.join(&parent)).expect("a group");
    let vmm = Jail::as_another_user().options(options).spawn();
    assert_eq!(vmm.api().state(), "Not started");
    assert_member(&vmm, "", &format!("/{parent}"));
    drop(vmm);
    fs::remove_dir(root.join(&parent)).expect("it is left, and empty");
}
