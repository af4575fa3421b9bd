//! A jail made by somebody who is not root.

use std::fs;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;

use lepton_hostio::tap::Tap as HostTap;
use lepton_tests::PATIENCE;
use lepton_tests::guest::{Entry, Program};
use lepton_tests::jail::{GID, Jail, Jailed, UID};
use lepton_tests::linux;
use lepton_tests::tap::Tap;
use rustix::io::FdFlags;
use rustix::process::Signal;
use serde_json::json;

/// A descriptor that programs started from here inherit.
#[track_caller]
fn inheritable(fd: impl Into<OwnedFd>) -> OwnedFd {
    let fd = fd.into();
    rustix::io::fcntl_setfd(&fd, FdFlags::empty()).expect("an open descriptor");
    fd
}

/// /dev/kvm, which may be root's alone: whoever starts a machine without root can be handed it.
#[track_caller]
pub fn kvm() -> OwnedFd {
    let file = fs::File::options().read(true).write(true).open("/dev/kvm");
    inheritable(file.expect("the test needs it"))
}

pub fn with_kvm(fd: &OwnedFd) -> Jail {
    let number = fd.as_raw_fd().to_string();
    Jail::without_root().options(["--kvm-fd", &number])
}

pub fn without_root_a_guest_boots() {
    let kvm = kvm();
    let jail = with_kvm(&kvm);
    jail.file("kernel", &Program::reset().elf(Entry::Linux64));
    let mut vmm = Jailed::of_child(jail);
    let mut api = vmm.api();
    api.put("/boot-source", &json!({ "kernel_image_path": "/kernel" }));
    api.start_short_life();
    assert_eq!(vmm.wait(), Some(0));
    assert!(!vmm.socket().exists(), "a socket is left");
}

pub fn without_root_the_vmm_is_alone() {
    let kvm = kvm();
    let jail = with_kvm(&kvm);
    let vmm = Jailed::of_child(jail);
    assert_eq!(vmm.api().state(), "Not started");
    vmm.assert_no_privileges();
    assert_eq!(vmm.status("NSpid"), format!("{} 1", vmm.pid));
    for namespace in ["user", "mnt", "net", "pid", "ipc", "uts"] {
        let own = fs::read_link(format!("/proc/self/ns/{namespace}")).expect("a namespace");
        assert_ne!(vmm.link(&format!("ns/{namespace}")), own, "{namespace}");
    }
    let map = |file: &str| {
        vmm.proc(file)
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(map("uid_map"), format!("{UID} {UID} 1"));
    assert_eq!(map("gid_map"), format!("{GID} {GID} 1"));
    assert_eq!(vmm.proc("setgroups").trim(), "deny");
    // Its network has nothing but a loopback interface, which is down.
    assert_eq!(
        vmm.proc("net/dev").lines().count(),
        3,
        "{}",
        vmm.proc("net/dev")
    );
    assert_eq!(
        vmm.proc("mountinfo").lines().count(),
        1,
        "{}",
        vmm.proc("mountinfo")
    );
    let kvms = vmm
        .descriptors()
        .iter()
        .filter(|to| *to == "/dev/kvm")
        .count();
    assert!((1..=2).contains(&kvms), "{:?}", vmm.descriptors());
    vmm.assert_only_its_pagemap();
    let owner = format!("{UID}:{GID}");
    assert_eq!(
        vmm.jail.listing(),
        [
            format!("lepton-vmm d 755 {owner}"),
            format!("lepton-vmm/vm-1 d 755 {owner}"),
            format!("lepton-vmm/vm-1/root d 700 {owner}"),
            format!("lepton-vmm/vm-1/root/lepton-vmm f 755 {owner}"),
            format!("lepton-vmm/vm-1/root/lepton-vmm.pid f 644 {owner}"),
            format!("lepton-vmm/vm-1/root/run d 700 {owner}"),
            format!("lepton-vmm/vm-1/root/run/firecracker.socket s 600 {owner}"),
        ]
    );
}

pub fn without_root_the_jailer_passes_on_what_happens() {
    let kvm = kvm();
    // A signal to the jailer reaches the VMM, whose status it ends with.
    let jail = with_kvm(&kvm);
    let mut vmm = Jailed::of_child(jail);
    assert_eq!(vmm.api().state(), "Not started");
    vmm.signal_jailer(Signal::TERM);
    assert_eq!(vmm.wait(), Some(143));
    assert!(!vmm.socket().exists(), "a socket is left");
    // The VMM does not outlive a jailer that is killed.
    let mut vmm = Jailed::of_child(with_kvm(&kvm));
    assert_eq!(vmm.api().state(), "Not started");
    vmm.signal_jailer(Signal::KILL);
    assert!(vmm.has_ended_within(PATIENCE), "the VMM goes on alone");
    assert_eq!(vmm.wait(), None);
    // Detached, it does.
    for options in [&["--new-pid-ns"][..], &["--daemonize"]] {
        let vmm = with_kvm(&kvm).options(options).detach();
        assert_eq!(vmm.api().state(), "Not started");
        assert_eq!(vmm.status("NSpid"), format!("{} 1", vmm.pid));
        vmm.signal(Signal::TERM);
        assert!(vmm.has_ended_within(PATIENCE), "{options:?}");
    }
}

/// The guest sends frames; the host, which is in another network than the VMM, gets them from its tap.
pub fn without_root_a_guest_has_a_network() {
    const COUNT: u64 = 20;
    let host_side = Tap::new(Some("172.30.40.1/24"));
    let tap = HostTap::open(host_side.name()).expect("nobody else has it");
    let tap = inheritable(tap.as_fd().try_clone_to_owned().expect("a descriptor"));
    let kvm = kvm();
    let number = tap.as_raw_fd().to_string();
    let jail = with_kvm(&kvm).options(["--tap-fd", &number]);
    let probe = fs::read(linux::file("LEPTON_PROBE")).expect("an image");
    jail.file("probe", &probe);
    let socket = UdpSocket::bind(("172.30.40.1", 5001)).expect("an address of the tap");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut vmm = Jailed::of_child(jail);
    let mut api = vmm.api();
    api.configure(&json!({
        "boot-source": {
            "kernel_image_path": "/probe",
            "boot_args": format!(
                "probe.mode=net_tx probe.size=200 probe.count={COUNT} probe.ip=172.30.40.2 probe.peer=172.30.40.1"
            ),
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
    }));
    let interface = json!({
        "iface_id": "n", "host_dev_name": host_side.name(), "guest_mac": "06:00:ac:1e:28:02",
    });
    // Twice: what was handed in once can be configured again.
    api.put("/network-interfaces/n", &interface);
    api.put("/network-interfaces/n", &interface);
    let other = json!({ "iface_id": "m", "host_dev_name": "no-such-tap" }).to_string();
    let message = api.refused("PUT", "/network-interfaces/m", &other);
    assert!(message.contains("/dev/net/tun"), "{message}");
    api.start_short_life();
    let mut payload = [0; 2000];
    for number in 0..COUNT {
        let (length, from) = socket.recv_from(&mut payload).expect("a frame");
        assert_eq!(from.to_string(), "172.30.40.2:5000");
        assert_eq!(
            (length, &payload[..8]),
            (200 - 42, &number.to_le_bytes()[..])
        );
    }
    assert_eq!(vmm.wait(), Some(0));
}

pub fn without_root_what_cannot_be_is_told() {
    let kvm = kvm();
    for (options, part) in [
        (&["--uid", "0"][..], "--uid: without root"),
        (&["--gid", "0"], "--gid: without root"),
        (&["--netns", "/proc/self/ns/net"], "--tap NAME"),
        (&["--tap-fd", "777"], "--tap-fd 777"),
        (&["--tap", "no/tap"], "no/tap"),
    ] {
        let jail = with_kvm(&kvm).options(options);
        let message = jail.refused();
        assert!(message.contains(part), "{message}");
        assert_eq!(jail.listing(), [""; 0]);
    }
    // A descriptor of something else is the VMM's to refuse, with its own status for that.
    let null = inheritable(fs::File::open("/dev/null").expect("a file"));
    let number = null.as_raw_fd().to_string();
    let jail = Jail::without_root().options(["--kvm-fd", &number]);
    let output = jail
        .command()
        .stderr(Stdio::piped())
        .output()
        .expect("it starts");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(153), "{message}");
    assert!(
        message.contains("not an open descriptor of /dev/kvm"),
        "{message}"
    );
    // Groups of root's are not for everybody.
    let groups = ["--cgroup", "cpu.shares=10"];
    if Path::new("/sys/fs/cgroup/cpu/tasks").exists() {
        let jail = with_kvm(&kvm).options(groups);
        let message = jail.refused();
        assert!(message.contains("Permission denied"), "{message}");
        assert_eq!(jail.listing(), [""; 0]);
    }
    // Only what the kernel says in the end: the program cannot be run.
    let shell = fs::canonicalize("/bin/sh").expect("there is a shell");
    let jail = with_kvm(&kvm).program(&shell);
    let message = jail.refused();
    assert!(message.contains("crt-static"), "{message}");
    assert_eq!(jail.listing(), [""; 0]);
}
