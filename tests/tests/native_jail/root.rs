//! A jail made by root.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use lepton_tests::guest::{Entry, Program};
use lepton_tests::jail::{GID, Jail, Jailed, UID};
use lepton_tests::reaper;
use rustix::io::FdFlags;
use rustix::process::Signal;
use serde_json::json;

/// A VMM that has answered a request.
#[track_caller]
fn started(jail: Jail) -> Jailed {
    let vmm = jail.spawn();
    assert_eq!(vmm.api().state(), "Not started");
    vmm
}

pub fn a_guest_boots_through_the_api() {
    let jail = Jail::as_another_user();
    jail.file("kernel", &Program::reset().elf(Entry::Linux64));
    let mut vmm = jail.spawn();
    let mut api = vmm.api();
    assert_eq!(api.get("/")["id"], "vm-1");
    api.put("/boot-source", &json!({ "kernel_image_path": "/kernel" }));
    api.start_short_life();
    assert_eq!(vmm.wait(), Some(0));
    assert!(!vmm.socket().exists(), "a socket is left");
}

pub fn arguments_are_passed_on() {
    let jail = Jail::as_another_user().vmm(["--no-api", "--config-file", "/vm.json"]);
    jail.file("kernel", &Program::tick().elf(Entry::Linux64));
    jail.file(
        "vm.json",
        json!({ "boot-source": { "kernel_image_path": "/kernel" } })
            .to_string()
            .as_bytes(),
    );
    let mut vmm = jail.spawn();
    // The guest runs as soon as there is a vCPU's thread.
    while !vmm.descriptors().iter().any(|to| to.contains("kvm-vcpu")) {
        assert!(!vmm.has_ended_within(std::time::Duration::from_millis(1)));
    }
    let line = vmm.proc("cmdline");
    let words: Vec<&str> = line.trim_end_matches('\0').split('\0').collect();
    let names: Vec<&str> = words.iter().copied().step_by(2).skip(1).collect();
    assert_eq!(words[..3], ["/lepton-vmm", "--id", "vm-1"]);
    assert_eq!(
        [words[3], words[5], words[7]],
        [
            "--start-time-us",
            "--start-time-cpu-us",
            "--parent-cpu-time-us"
        ],
        "{names:?}"
    );
    for number in [words[4], words[6], words[8]] {
        number.parse::<u64>().expect("a number of microseconds");
    }
    assert_eq!(words[9], "--proc-fd");
    words[10].parse::<u32>().expect("a number");
    assert_eq!(words[11..], ["--no-api", "--config-file", "/vm.json"]);
    vmm.signal(Signal::TERM);
    assert_eq!(vmm.wait(), Some(143));
}

/// Written down from Firecracker's docs/jailer.md and a run of its jailer: path below the chroot base, type, mode, owner.
pub fn the_folder_is_laid_out_as_documented() {
    let vmm = started(Jail::as_another_user());
    let owner = format!("{UID}:{GID}");
    let mut expected = vec![
        "lepton-vmm d 755 0:0".to_owned(),
        "lepton-vmm/vm-1 d 755 0:0".to_owned(),
        format!("lepton-vmm/vm-1/root d 700 {owner}"),
        format!("lepton-vmm/vm-1/root/dev d 700 {owner}"),
        format!("lepton-vmm/vm-1/root/dev/kvm c 600 {owner}"),
        format!("lepton-vmm/vm-1/root/dev/net d 700 {owner}"),
        format!("lepton-vmm/vm-1/root/dev/net/tun c 600 {owner}"),
        format!("lepton-vmm/vm-1/root/dev/urandom c 600 {owner}"),
        format!("lepton-vmm/vm-1/root/lepton-vmm f 755 {owner}"),
        "lepton-vmm/vm-1/root/lepton-vmm.pid f 644 0:0".to_owned(),
        format!("lepton-vmm/vm-1/root/run d 700 {owner}"),
        format!("lepton-vmm/vm-1/root/run/firecracker.socket s 600 {owner}"),
    ];
    let misc = fs::read_to_string("/proc/misc").unwrap_or_default();
    if misc.lines().any(|line| line.ends_with(" userfaultfd")) {
        expected.push(format!(
            "lepton-vmm/vm-1/root/dev/userfaultfd c 600 {owner}"
        ));
    }
    expected.sort();
    assert_eq!(vmm.jail.listing(), expected);
    for (name, major, minor) in [("kvm", 10, 232), ("net/tun", 10, 200), ("urandom", 1, 9)] {
        let meta = fs::metadata(vmm.jail.root().join("dev").join(name)).expect("a device");
        assert_eq!(meta.rdev(), rustix::fs::makedev(major, minor), "{name}");
    }
    assert_eq!(vmm.jail.written_pid(), vmm.pid);
}

pub fn the_vmm_has_no_privileges() {
    let vmm = started(Jail::as_another_user());
    vmm.assert_no_privileges();
    assert_eq!(vmm.status("Name"), "lepton-vmm");
    // Root's privileges do not come back with root's number.
    let jail = Jail::as_another_user().without_owner();
    let root = started(jail.options(["--uid", "0", "--gid", "0"]));
    assert_eq!(root.status("Uid"), "0 0 0 0");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(root.status(set), "0".repeat(16), "{set}");
    }
    // Its root is the jail, in a mount namespace where there is nothing else.
    let same = |a: &Path, b: &Path| {
        let [a, b] = [a, b].map(|path| fs::metadata(path).expect("a folder"));
        (a.dev(), a.ino()) == (b.dev(), b.ino())
    };
    let inside = format!("/proc/{}/root", vmm.pid);
    assert!(same(Path::new(&inside), &vmm.jail.root()));
    assert_eq!(vmm.link("cwd"), Path::new("/"));
    assert_eq!(
        vmm.proc("mountinfo").lines().count(),
        1,
        "{}",
        vmm.proc("mountinfo")
    );
    let mounts = fs::read_link("/proc/self/ns/mnt").expect("a namespace");
    assert_ne!(vmm.link("ns/mnt"), mounts);
    // And nothing of it shows outside.
    let here = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(!here.contains("lepton-jail-"), "{here}");
}

pub fn nothing_is_inherited() {
    let file = fs::File::open("/etc/passwd").expect("a file");
    rustix::io::fcntl_setfd(&file, FdFlags::empty()).expect("a descriptor");
    let jail = Jail::as_another_user();
    let child = jail
        .command()
        .env("SECRET", "of the parent")
        .spawn()
        .expect("the jailer starts");
    let vmm = Jailed::of(child, jail);
    assert_eq!(vmm.api().state(), "Not started");
    assert_eq!(vmm.proc("environ"), "");
    for to in vmm.descriptors() {
        // The standard streams are those of this test.
        let own = to.starts_with("anon_inode:") || to.starts_with("socket:");
        let stream = to == "/dev/null" || streams().contains(&to);
        let pagemap = to.ends_with("/pagemap");
        let one = own || stream || pagemap;
        assert!(one, "{to} is open; {} was", file.as_raw_fd());
    }
    vmm.assert_only_its_pagemap();
}

/// Where this process's standard output and error lead.
fn streams() -> Vec<String> {
    ["/proc/self/fd/1", "/proc/self/fd/2"]
        .into_iter()
        .filter_map(|path| fs::read_link(path).ok())
        .map(|path| path.to_string_lossy().into_owned())
        .collect()
}

#[track_caller]
fn limit(vmm: &Jailed, name: &str) -> Vec<String> {
    let text = vmm.proc("limits");
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let line = line.unwrap_or_else(|| panic!("there is no {name} in:\n{text}"));
    line.split_whitespace().map(str::to_owned).collect()
}

pub fn limits_are_set() {
    let vmm = started(Jail::as_another_user());
    assert_eq!(limit(&vmm, "Max open files")[..2], ["2048", "2048"]);
    let options = ["no-file=900", "fsize=250000000", "no-file=1024"];
    let options = options
        .into_iter()
        .flat_map(|limit| ["--resource-limit", limit]);
    let vmm = started(Jail::as_another_user().options(options));
    assert_eq!(limit(&vmm, "Max open files")[..2], ["1024", "1024"]);
    assert_eq!(
        limit(&vmm, "Max file size")[..2],
        ["250000000", "250000000"]
    );
}

pub fn a_daemon_has_no_terminal() {
    let vmm = Jail::as_another_user().options(["--daemonize"]).detach();
    assert_eq!(vmm.api().state(), "Not started");
    for stream in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(vmm.link(stream), Path::new("/dev/null"), "{stream}");
    }
    let own = fs::read_to_string("/proc/self/stat").expect("this process has a status");
    let found = field_of_stat(&vmm.proc("stat"), SESSION);
    assert_ne!(found, field_of_stat(&own, SESSION));
    // Not the session's leader either, so no terminal can become its own.
    assert_ne!(found, vmm.pid.to_string());
    assert_eq!(vmm.jail.written_pid(), vmm.pid);
    assert_eq!(vmm.status("NSpid"), vmm.pid.to_string());
}

/// The session's id, by its place in /proc/PID/stat; 0 where its leader is in no PID namespace of the reader's.
const SESSION: usize = 3;

/// A field of /proc/PID/stat after the name, counted from 0.
fn field_of_stat(stat: &str, number: usize) -> String {
    let (_, rest) = stat.rsplit_once(')').expect("a name in parentheses");
    let field = rest.split_whitespace().nth(number);
    field.expect("enough fields").to_owned()
}

pub fn a_killed_test_leaves_no_daemon() {
    reaper::check("a_killed_test_leaves_no_daemon", || {
        let vmm = Jail::as_another_user().options(["--daemonize"]).detach();
        (vmm.pid, vmm)
    });
}

pub fn a_pid_namespace_of_its_own() {
    let vmm = Jail::as_another_user().options(["--new-pid-ns"]).detach();
    assert_eq!(vmm.api().state(), "Not started");
    assert_eq!(vmm.status("NSpid"), format!("{} 1", vmm.pid));
    assert_eq!(vmm.status("CapBnd"), "0".repeat(16));
    assert_eq!(vmm.status("NoNewPrivs"), "1");
    vmm.signal(Signal::TERM);
    assert!(
        vmm.has_ended_within(lepton_tests::PATIENCE),
        "as init it has to hear SIGTERM"
    );
    assert!(!vmm.socket().exists(), "a socket is left");
}

pub fn a_daemon_with_both() {
    let options = ["--daemonize", "--new-pid-ns"];
    let vmm = Jail::as_another_user().options(options).detach();
    assert_eq!(vmm.api().state(), "Not started");
    assert_eq!(vmm.status("NSpid"), format!("{} 1", vmm.pid));
    assert_eq!(vmm.link("fd/1"), Path::new("/dev/null"));
}

pub fn a_given_network() {
    let name = format!("lepton-test-{}", std::process::id());
    let ip = |arguments: &[&str]| {
        let status = Command::new("ip").args(arguments).status();
        status.is_ok_and(|status| status.success())
    };
    assert!(ip(&["netns", "add", &name]));
    let path = format!("/run/netns/{name}");
    let vmm = started(Jail::as_another_user().options(["--netns", &path]));
    let found = fs::metadata(format!("/proc/{}/ns/net", vmm.pid)).expect("a namespace");
    let wanted = fs::metadata(&path).expect("a namespace");
    let own = fs::metadata("/proc/self/ns/net").expect("a namespace");
    assert!(ip(&["netns", "del", &name]));
    assert_eq!(found.ino(), wanted.ino());
    assert_ne!(found.ino(), own.ino());
}
