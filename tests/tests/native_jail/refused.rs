//! What the jailer refuses: each refusal names the value at fault, and leaves nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use lepton_tests::jail::{Jail, wait_until_gone};
use lepton_tests::programs;
use lepton_tests::small::SmallFileSystem;

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(programs::jailer())
        .args(arguments)
        .output()
        .expect("the jailer starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

pub fn version_and_help() {
    let (code, out, _) = run(&["--version"]);
    assert_eq!(code, Some(0));
    assert!(out.starts_with("lepton-jailer "), "{out}");
    let (code, out, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for option in [
        "--id",
        "--exec-file",
        "--uid",
        "--gid",
        "--chroot-base-dir",
        "--netns",
        "--daemonize",
        "--new-pid-ns",
        "--cgroup",
        "--resource-limit",
        "--cgroup-version",
        "--parent-cgroup",
        "--version",
    ] {
        assert!(out.contains(option), "{option} is not in the help");
    }
}

pub fn what_the_command_line_cannot_mean() {
    let long = "a".repeat(65);
    for (option, value) in [
        ("--id", "../x"),
        ("--id", "a/b"),
        ("--id", ".."),
        ("--id", "a_b"),
        ("--id", long.as_str()),
        ("--uid", "root"),
        ("--uid", "4294967295"),
        ("--gid", "4294967296"),
        ("--cgroup", "cpu.shares"),
        ("--cgroup", "cpu.shares="),
        ("--cgroup", "shares=1"),
        ("--cgroup", "../cpu.shares=1"),
        ("--cgroup-version", "3"),
        ("--parent-cgroup", "/up"),
        ("--parent-cgroup", "a/../b"),
        ("--resource-limit", "no-file"),
        ("--resource-limit", "cores=1"),
        ("--resource-limit", "fsize=much"),
        ("--new-user-ns", "yes"),
    ] {
        let mut arguments = vec!["--exec-file", "/bin/true", "--uid", "1", "--gid", "1"];
        if option == "--uid" || option == "--gid" {
            arguments.truncate(2);
        }
        if option != "--id" {
            arguments.extend(["--id", "a"]);
        }
        arguments.extend([option, value]);
        let (code, out, err) = run(&arguments);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{arguments:?}: {err}");
        let named = if option == "--new-user-ns" {
            option
        } else {
            value
        };
        assert!(err.contains(named), "{arguments:?}: {err}");
    }
    for missing in ["--id", "--exec-file"] {
        let (code, _, err) = run(match missing {
            "--id" => &["--exec-file", "x"],
            _ => &["--id", "x"],
        });
        assert_eq!(code, Some(1));
        assert!(err.contains(missing), "{err}");
    }
}

pub fn what_is_not_there() {
    let jail = Jail::as_another_user();
    let message = Jail::as_another_user().without_owner().refused();
    assert!(message.contains("--uid"), "{message}");
    for (program, part) in [
        ("/no/such/program", "/no/such/program: No such file"),
        ("/etc", "/etc: not a regular file"),
        ("/dev/null", "/dev/null: not a regular file"),
        ("/etc/passwd", "/etc/passwd: not executable"),
    ] {
        let jail = Jail::as_another_user().program(Path::new(program));
        let message = jail.refused();
        assert!(message.contains(part), "{message}");
        assert_eq!(jail.listing(), [""; 0]);
    }
    let netns = |path: &str| {
        let jail = Jail::as_another_user().options(["--netns", path]);
        let message = jail.refused();
        assert_eq!(jail.listing(), [""; 0]);
        message
    };
    let message = netns("/run/netns/no-such-one");
    assert!(message.contains("/run/netns/no-such-one"), "{message}");
    assert!(message.contains("ip netns add"), "{message}");
    let message = netns("/etc/passwd");
    assert!(
        message.contains("/etc/passwd: not a namespace"),
        "{message}"
    );
    // A namespace, but not of a network.
    let message = netns("/proc/self/ns/uts");
    assert!(message.contains("setns"), "{message}");
    let none = jail.base().join("none");
    let (code, _, err) = run(&[
        "--id=a",
        "--exec-file=/bin/true",
        "--uid=1",
        "--gid=1",
        "--chroot-base-dir",
        none.to_str().expect("a plain path"),
    ]);
    assert_eq!(code, Some(1));
    assert!(err.contains("mkdir -p") && err.contains("/none"), "{err}");
}

pub fn a_jail_that_is_there_already() {
    let first = Jail::as_another_user().options(["--daemonize"]).detach();
    drop(first.api());
    let listing = first.jail.listing();
    let output = first.jail.run();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("/dev/net/tun exists already"), "{message}");
    assert!(message.contains("--id"), "{message}");
    // The first one has all it had; but for the copy of the program, which is in use, if that was replaced.
    let left: Vec<String> = listing
        .into_iter()
        .filter(|line| !line.starts_with("lepton-vmm/vm-1/root/lepton-vmm f"))
        .collect();
    let now: Vec<String> = first
        .jail
        .listing()
        .into_iter()
        .filter(|line| !line.starts_with("lepton-vmm/vm-1/root/lepton-vmm f"))
        .collect();
    assert_eq!(now, left);
    assert_eq!(first.api().state(), "Not started");
}

/// Whoever writes the copy of the program: the keeper, or the parent of the VMM.
pub fn a_full_disk_leaves_nothing() {
    for more in [&[][..], &["--new-pid-ns"]] {
        let small = SmallFileSystem::of_mib(1);
        let base = small.path("");
        let mut command = Command::new(programs::jailer());
        command
            .args(["--id=a", "--uid=1", "--gid=1", "--exec-file"])
            .arg(programs::vmm())
            .arg("--chroot-base-dir")
            .arg(&base)
            .args(more)
            .arg("--");
        let message = Jail::refusal_of(command);
        assert!(
            message.contains("/root/lepton-vmm: copy: No space left"),
            "{message}"
        );
        let left: Vec<_> = fs::read_dir(base).expect("a folder").collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A program that is a script without an interpreter, or that needs a dynamic linker, is only refused by execve, when
/// the jailer has no privileges any more.
pub fn a_program_that_cannot_be_run_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let no_program = folder.path().join("no-program");
    fs::write(&no_program, "no program").expect("a file can be written");
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&no_program, mode).expect("the file is ours");
    let dynamic = fs::canonicalize("/bin/sh").expect("there is a shell");
    for (program, part) in [(no_program, "cannot be run"), (dynamic, "crt-static")] {
        for options in [
            &[][..],
            &["--new-pid-ns"],
            &["--daemonize"],
            &["--daemonize", "--new-pid-ns"],
        ] {
            let jail = Jail::as_another_user().program(&program).options(options);
            let message = jail.refused();
            assert!(message.contains(part), "{options:?}: {message}");
            assert_eq!(message.lines().count(), 1, "{message}");
            assert_eq!(jail.listing(), [""; 0], "{options:?}");
        }
    }
}

/// In a container the leader of the jailer's session is often outside its PID namespace, and the session's id is 0.
pub fn a_session_from_outside_is_no_surprise() {
    let shell = fs::canonicalize("/bin/sh").expect("there is a shell");
    for options in [&["--new-pid-ns"][..], &["--daemonize"]] {
        let jail = Jail::as_another_user().program(&shell).options(options);
        let command = jail.command();
        let mut contained = Command::new("unshare");
        contained
            .args(["--pid", "--fork"])
            .arg(command.get_program())
            .args(command.get_args());
        let message = Jail::refusal_of(contained);
        assert!(message.contains("crt-static"), "{options:?}: {message}");
    }
}

pub fn a_group_that_cannot_be_leaves_nothing() {
    let cpu = Path::new("/sys/fs/cgroup/cpu");
    if !cpu.join("tasks").exists() {
        eprintln!("SKIPPED: a_group_that_cannot_be_leaves_nothing: no cgroup v1 hierarchy {cpu:?}");
        return;
    }
    let parent = format!("lepton-test-{}", std::process::id());
    for (setting, part) in [
        ("cpu.shares=many", "cpu.shares=many"),
        ("cpu.no_such_file=1", "cpu.no_such_file"),
        ("nosuch.shares=1", "no controller nosuch"),
    ] {
        let jail =
            Jail::as_another_user().options(["--cgroup", setting, "--parent-cgroup", &parent]);
        let message = jail.refused();
        assert!(message.contains(part), "{message}");
        assert_eq!(jail.listing(), [""; 0]);
        assert!(!cpu.join(&parent).exists(), "{setting}");
    }
    // Refused by execve, when the process is in the group already.
    let shell = fs::canonicalize("/bin/sh").expect("there is a shell");
    let jail = Jail::as_another_user().program(&shell).options([
        "--cgroup",
        "cpu.shares=10",
        "--parent-cgroup",
        &parent,
    ]);
    let message = jail.refused();
    assert!(message.contains("crt-static"), "{message}");
    assert_eq!(jail.listing(), [""; 0]);
    wait_until_gone(&cpu.join(&parent));
}
