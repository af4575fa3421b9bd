//! What a running VMM may have and no more: threads, descriptors, mode of its socket.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, ExitCode};
use std::time::Instant;

use lepton_tests::guest::Program;
use lepton_tests::origin::{Origin, running};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{PATIENCE, Vmm, programs, test};
use serde_json::json;

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(the_threads_are_main_api_and_one_per_vcpu).of_every_origin(),
            test!(the_descriptors_are_known).of_every_origin(),
            test!(the_api_socket_is_its_owners_alone),
            test!(a_closed_standard_stream_is_not_the_next_file),
            test!(cve_2026_24834_a_read_only_drive_is_open_for_reading_only).of_every_origin(),
            test!(guest_memory_is_not_touched_before_the_guest_does).of_every_origin(),
        ],
    )
}

fn started(vcpus: u8, drives: &[(&str, bool)]) -> Vmm {
    let (vmm, _api) = running(&Program::tick(), |folder, config| {
        let drives = drives.iter().map(|(id, read_only)| {
            let path = folder.join(id);
            let image = fs::File::create(&path).expect("a file can be made");
            image.set_len(1 << 20).expect("a file can be sparse");
            json!({ "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": read_only })
        });
        config["drives"] = drives.collect();
        config["machine-config"]["vcpu_count"] = vcpus.into();
        config["vsock"] = json!({ "guest_cid": 3, "uds_path": folder.join("v.sock") });
    });
    vmm
}

fn the_threads_are_main_api_and_one_per_vcpu() {
    let (vmm, _api) = Vmm::with_api();
    // The first thread has the program's name, of which the kernel keeps 15 characters.
    let program = programs::vmm().file_name().expect("a program has a name");
    let main: String = program.to_string_lossy().chars().take(15).collect();
    expect_threads(&vmm, &["api".to_owned(), main.clone()]);
    vmm.terminate();
    for vcpus in [1, 4] {
        let vmm = started(vcpus, &[("d", false)]);
        let mut expected = vec!["api".to_owned(), main.clone()];
        // Where memory is checked when it is touched.
        if Origin::current() == Origin::Restored && rustix::process::geteuid().is_root() {
            expected.push("pager".to_owned());
        }
        expected.extend((0..vcpus).map(|id| format!("vcpu {id}")));
        expect_threads(&vmm, &expected);
        vmm.terminate();
    }
}

/// A new thread names itself, so its name may come a moment after it.
#[track_caller]
fn expect_threads(vmm: &Vmm, expected: &[String]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = vmm.threads();
        if found == expected {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{found:?} instead of {expected:?}"
        );
    }
}

/// What a process's descriptors lead to, with numbers and places taken out.
fn descriptors(vmm: &Vmm) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    let folder = format!("/proc/{}/fd", vmm.pid());
    for entry in fs::read_dir(folder).expect("the VMM runs") {
        // One that was closed meanwhile is not there.
        let Ok(target) = fs::read_link(entry.expect("an entry").path()) else {
            continue;
        };
        let target = target.display().to_string();
        let kind = match target.split_once(":[") {
            Some((kind, _)) => kind.to_owned(),
            None => target.rsplit('/').next().unwrap_or_default().to_owned(),
        };
        *kinds.entry(kind).or_insert(0) += 1;
    }
    kinds
}

fn the_descriptors_are_known() {
    let vmm = started(2, &[("d", false)]);
    let known = [
        "anon_inode",
        "[eventfd]",
        "[eventpoll]",
        "[signalfd]",
        "[timerfd]",
        "[io_uring]",
        "kvm",
        "kvm-vm",
        "pipe",
        "socket",
        "null",
        "d",
        "kernel",
        // Its own, for snapshots: it cannot be opened once files are given up.
        "pagemap",
        // A restored machine's memory and its hashes, which are read when memory is touched; a copy's, which it has in
        // common with others.
        "state (deleted)",
        "memory (deleted)",
        "memfd:guest memory (deleted)",
    ];
    let found = descriptors(&vmm);
    assert_eq!(found.get("anon_inode:kvm-vm"), Some(&1), "{found:?}");
    for (kind, count) in found {
        let plain = kind.strip_prefix("anon_inode:").unwrap_or(&kind);
        let vcpu = plain.starts_with("kvm-vcpu");
        assert!(vcpu || known.contains(&plain), "{kind}: {count}");
        assert!(count <= 28, "{kind}: {count}");
    }
    vmm.terminate();
}

fn the_api_socket_is_its_owners_alone() {
    let (vmm, _api) = Vmm::with_api();
    let metadata = fs::metadata(vmm.socket()).expect("the socket is there");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let second = Command::new(programs::vmm())
        .arg("--api-sock")
        .arg(vmm.socket())
        .output()
        .expect("the VMM starts");
    assert_eq!(second.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&second.stderr),
        format!(
            "lepton-vmm: Failed to open the API socket at: {}. Check that it is not already used.\n",
            vmm.socket().display()
        )
    );
    assert!(vmm.socket().exists(), "the first one's");
    vmm.terminate();
}

fn a_closed_standard_stream_is_not_the_next_file() {
    let (vmm, _api) = Vmm::with_api();
    let log = vmm.path("log");
    // The log would be the first file that is opened, and what goes to the standard error would end up in it.
    let script = format!(
        "exec <&- >&- 2>&-; exec {} --no-api --config-file /nonexistent --log-path {log}",
        programs::vmm().display()
    );
    let status = Command::new("sh").args(["-c", &script]).status();
    assert_eq!(status.expect("a shell").code(), Some(152));
    assert_eq!(fs::read_to_string(&log).expect("a log"), "");
    vmm.terminate();
}

/// The open mode of the descriptor that leads to a file: 0 reading, 1 writing, 2 both.
fn access_mode(vmm: &Vmm, path: &str) -> u32 {
    let wanted = fs::metadata(path).expect("the file is there");
    let folder = format!("/proc/{}/fd", vmm.pid());
    for entry in fs::read_dir(folder).expect("the VMM runs") {
        let entry = entry.expect("an entry");
        let Ok(found) = fs::metadata(entry.path()) else {
            continue;
        };
        if (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()) {
            let number = entry.file_name();
            let info = format!("/proc/{}/fdinfo/{}", vmm.pid(), number.display());
            let info = fs::read_to_string(info).expect("the descriptor is open");
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = flags.expect("flags").trim();
            return u32::from_str_radix(flags, 8).expect("an octal number") & 3;
        }
    }
    panic!("{path} is not open");
}

fn cve_2026_24834_a_read_only_drive_is_open_for_reading_only() {
    let vmm = started(1, &[("ro", true), ("rw", false)]);
    assert_eq!(access_mode(&vmm, &vmm.path("ro")), 0);
    assert_eq!(access_mode(&vmm, &vmm.path("rw")), 2);
    vmm.terminate();
}

fn guest_memory_is_not_touched_before_the_guest_does() {
    let (vmm, _api) = running(&Program::tick(), |_, config| {
        config["machine-config"]["mem_size_mib"] = 2048.into();
    });
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.pid()));
    let status = status.expect("the VMM runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let kib: u64 = kib.and_then(|kib| kib.parse().ok()).expect("a number");
    assert!(
        kib < 64 << 10,
        "{kib} KiB of a guest of 2 GiB that did nothing"
    );
    vmm.terminate();
}
