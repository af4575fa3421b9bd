//! `lepton run` and `lepton exec`, against a stand-in for the VMM.

mod fake_vmm;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use fake_vmm::FakeVmm;
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// `lepton run` on the stand-in, with a temporary directory of its own.
fn lepton_run(vmm: &FakeVmm, options: &[&str], command: &[&str]) -> Command {
    let temporary = vmm.file("tmp");
    std::fs::create_dir_all(&temporary).unwrap();
    let mut lepton = Command::new(env!("CARGO_BIN_EXE_lepton"));
    lepton
        .arg("run")
        .arg("--force")
        .arg("--vmm")
        .arg(vmm.file("vmm"))
        .arg("--kernel")
        .arg(vmm.file("kernel"))
        .arg("--image")
        .arg(vmm.file("image"))
        .args(options)
        .arg("--")
        .args(command)
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null());
    lepton
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Nothing is left: neither the VMM nor a file.
fn assert_clean(vmm: &FakeVmm) {
    let left: Vec<_> = std::fs::read_dir(vmm.file("tmp")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    if let Ok(pid) = std::fs::read_to_string(vmm.file("pid")) {
        assert!(!Path::new("/proc").join(&pid).exists(), "VMM {pid} runs");
    }
}

fn run(behaviour: &str, options: &[&str], command: &[&str]) -> (Output, FakeVmm) {
    let vmm = FakeVmm::new(behaviour);
    let output = lepton_run(&vmm, options, command).output().unwrap();
    assert_clean(&vmm);
    (output, vmm)
}

#[test]
fn output_and_status_are_the_commands() {
    let (output, vmm) = run(
        "boots",
        &["--env", "WHO=guest"],
        &["sh", "-c", "echo out $WHO; echo err >&2; exit 42"],
    );
    assert_eq!(text(&output.stdout), "out guest\n");
    let errors = text(&output.stderr);
    let (boot, error) = errors.split_once('\n').unwrap();
    assert!(boot.starts_with("booted in "), "{errors}");
    assert!(boot.ends_with(" ms (InstanceStart to agent ready)"));
    assert_eq!(error, "err\n");
    assert_eq!(output.status.code(), Some(42));

    let actions = vmm.actions();
    for part in [
        "PutBootSource",
        "root=/dev/vda ro rootfstype=erofs",
        " quiet",
        "rootfs",
        "mem_size_mib: 256",
        "huge_pages: Transparent",
        "guest_cid: 3",
    ] {
        assert!(actions.contains(part), "no {part} in {actions}");
    }
    assert!(actions.ends_with("InstanceStart\n"));
}

#[test]
fn quiet_is_quiet() {
    let (output, _) = run("boots", &["--quiet"], &["true"]);
    assert_eq!(text(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn options_reach_the_vmm() {
    let options = [
        "--memory",
        "512",
        "--vcpus",
        "2",
        "--tap",
        "tap7",
        "--ip",
        "10.1.0.2/24",
        "--gateway",
        "10.1.0.1",
        "--dns",
        "9.9.9.9",
        "--boot-args",
        "extra=1",
    ];
    let (_, vmm) = run("boots", &options, &["true"]);
    let actions = vmm.actions();
    for part in [
        "mem_size_mib: 512",
        "vcpu_count: 2",
        "tap7",
        "ip=10.1.0.2::10.1.0.1:255.255.255.0::eth0:off:9.9.9.9 extra=1",
    ] {
        assert!(actions.contains(part), "no {part} in {actions}");
    }
}

#[test]
fn standard_input_goes_through() {
    let vmm = FakeVmm::new("boots");
    let mut lepton = lepton_run(&vmm, &[], &["wc", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = lepton.stdin.take().unwrap();
    stdin.write_all(&vec![b'x'; 3_000_000]).unwrap();
    drop(stdin);
    let output = lepton.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout).trim(), "3000000");
    assert_clean(&vmm);
}

#[test]
fn a_command_nobody_listens_to_ends() {
    let vmm = FakeVmm::new("boots");
    let mut lepton = lepton_run(&vmm, &["--quiet"], &["yes"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = lepton.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 2]).unwrap();
    drop(stdout);
    // 128 and SIGPIPE.
    assert_eq!(lepton.wait().unwrap().code(), Some(141));
    assert_clean(&vmm);
}

#[test]
fn statuses_for_what_does_not_run() {
    for (program, status) in [("no-such-program", 127), ("/etc/passwd", 126)] {
        let (output, _) = run("boots", &["--quiet"], &[program]);
        assert_eq!(output.status.code(), Some(status));
        assert!(text(&output.stderr).contains(program));
    }
    let (output, _) = run("boots", &["--quiet"], &["sh", "-c", "kill -9 $$"]);
    assert_eq!(output.status.code(), Some(137));
}

#[test]
fn a_signal_goes_to_the_command() {
    let vmm = FakeVmm::new("boots");
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.01; done";
    let mut lepton = lepton_run(&vmm, &["--quiet"], &["sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = lepton.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 6]).unwrap();
    kill_process(Pid::from_child(&lepton), Signal::TERM).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "caught\n");
    assert_eq!(lepton.wait().unwrap().code(), Some(5));
    assert_clean(&vmm);
}

#[test]
fn a_guest_may_end_before_its_command() {
    // The command's parent is the stand-in itself.
    let script = "kill -KILL $PPID; exec cat";
    let (output, _) = run("boots", &["--quiet"], &["sh", "-c", script]);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125));
    assert!(errors.contains("signal: 9"), "{errors}");
    assert!(errors.contains("ended before the command did"), "{errors}");
}

#[test]
fn failures_say_what_and_leave_nothing() {
    for (behaviour, parts) in [
        ("fails to start", &["153", "the VMM's last words"][..]),
        (
            "refuses",
            &["/machine-config", "mem_size_mib 256 is too odd"],
        ),
        (
            "panics",
            &["console: Kernel panic - not syncing", "the VMM ended"],
        ),
        ("babbles", &["ready line", "256"]),
        ("future", &["9.0.0", "99"]),
    ] {
        let (output, _) = run(behaviour, &[], &["true"]);
        assert_eq!(output.status.code(), Some(125), "{behaviour}");
        let errors = text(&output.stderr);
        for part in parts {
            assert!(
                errors.contains(part),
                "{behaviour}: no {part:?} in {errors}"
            );
        }
        assert!(!errors.contains('\x1b'), "{errors:?}");
    }
}

#[test]
fn a_guest_that_is_never_ready_is_given_up() {
    let (output, _) = run("never ready", &["--timeout", "1"], &["true"]);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125));
    for part in [
        "1 seconds",
        "--timeout",
        "console: guest kernel [31mspeaking",
    ] {
        assert!(errors.contains(part), "no {part:?} in {errors}");
    }
}

#[test]
fn the_console_can_be_kept() {
    let vmm = FakeVmm::new("boots");
    let log = vmm.file("console.log");
    let options = ["--console-log", log.to_str().unwrap()];
    assert!(
        lepton_run(&vmm, &options, &["true"])
            .status()
            .unwrap()
            .success()
    );
    let console = std::fs::read_to_string(&log).unwrap();
    assert!(console.contains("guest kernel"), "{console}");
}

#[test]
fn an_interrupt_while_booting_ends_it_all() {
    for behaviour in ["hides", "never ready"] {
        let vmm = FakeVmm::new(behaviour);
        let lepton = lepton_run(&vmm, &[], &["true"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The stand-in's first act, long after the signals were taken.
        while !vmm.file("pid").exists() {
            std::thread::yield_now();
        }
        kill_process(Pid::from_child(&lepton), Signal::INT).unwrap();
        let output = lepton.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{behaviour}");
        assert!(text(&output.stderr).contains("signal 2"), "{behaviour}");
        assert_clean(&vmm);
    }
}

#[test]
fn a_terminal_is_raw_while_the_command_runs_and_as_before_afterwards() {
    let vmm = FakeVmm::new("boots");
    let (near, far) = open_terminal();
    let script = "stty size; trap 'stty size; exit 9' WINCH; trap 'echo int' INT; echo ready; \
                  while :; do read line; done";
    let mut lepton = lepton_run(&vmm, &["--quiet"], &["sh", "-c", script]);
    lepton
        .stdin(far.try_clone().unwrap())
        .stdout(far.try_clone().unwrap())
        .stderr(far.try_clone().unwrap())
        .process_group(0);
    let mut lepton = lepton.spawn().unwrap();

    let mut near = std::fs::File::from(near);
    read_until(&mut near, "ready");
    let local = |fd: &OwnedFd| tcgetattr(fd).unwrap().local_modes;
    assert!(!local(&far).intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
    // Ctrl-C is a byte here and a signal there.
    near.write_all(b"\x03").unwrap();
    read_until(&mut near, "int");
    // The kernel tells only the terminal's foreground group, which this test has none of.
    tcsetwinsize(&near, size(10, 60)).unwrap();
    kill_process(Pid::from_child(&lepton), Signal::WINCH).unwrap();
    read_until(&mut near, "\n");
    near.write_all(b"\n").unwrap();
    read_until(&mut near, "10 60");
    assert_eq!(lepton.wait().unwrap().code(), Some(9));
    assert!(local(&far).contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
    assert_clean(&vmm);
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn open_terminal() -> (OwnedFd, OwnedFd) {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let near = openpt(flags).unwrap();
    grantpt(&near).unwrap();
    unlockpt(&near).unwrap();
    let far = ioctl_tiocgptpeer(&near, flags).unwrap();
    tcsetwinsize(&near, size(33, 101)).unwrap();
    (near, far)
}

fn read_until(terminal: &mut std::fs::File, wanted: &str) {
    let mut seen = String::new();
    let mut byte = [0];
    while !seen.ends_with(wanted) {
        terminal.read_exact(&mut byte).unwrap();
        seen.push(char::from(byte[0]));
    }
}

#[test]
fn bad_arguments_name_the_value() {
    let vmm = FakeVmm::new("boots");
    let fails = |option: &str, value: &Path| {
        let mut words = lepton_run(&vmm, &[], &[]);
        // clap refuses an option given twice, so each is given once, the bad one last.
        words = rebuild(&words, option, value);
        let output = words.output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        text(&output.stderr)
    };
    let missing = vmm.file("missing");
    for option in ["--vmm", "--kernel", "--image"] {
        let errors = fails(option, &missing);
        assert!(
            errors.contains(option) && errors.contains("missing"),
            "{errors}"
        );
        let errors = fails(option, vmm.file("tmp").as_path());
        assert!(errors.contains("is a directory"), "{errors}");
    }
    let errors = fails("--vmm", &vmm.file("kernel"));
    assert!(errors.contains("without execute permission"), "{errors}");
}

/// The same command with another value for `option`.
fn rebuild(command: &Command, option: &str, value: &Path) -> Command {
    let mut arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let index = arguments.iter().position(|word| word == option).unwrap();
    arguments[index + 1] = value.into();
    let mut rebuilt = Command::new(command.get_program());
    rebuilt.args(arguments).stdin(Stdio::null());
    rebuilt
}

#[test]
fn exec_needs_a_vsock() {
    let output = Command::new(env!("CARGO_BIN_EXE_lepton"))
        .args(["exec", "--vsock", "/nowhere/v.sock", "--", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("/nowhere/v.sock"));
}

#[test]
fn exec_joins_a_running_guest() {
    let vmm = FakeVmm::new("boots");
    let mut lepton = lepton_run(&vmm, &["--quiet"], &["cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (lepton.stdin.take().unwrap(), lepton.stdout.take().unwrap());
    stdin.write_all(b"up\n").unwrap();
    stdout.read_exact(&mut [0; 3]).unwrap();
    let private = std::fs::read_dir(vmm.file("tmp")).unwrap().next().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_lepton"))
        .args(["exec", "--vsock"])
        .arg(private.unwrap().path().join("v.sock"))
        .args(["--workdir", "/usr", "--", "sh", "-c", "pwd; exit 3"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "/usr\n");
    assert_eq!(output.status.code(), Some(3));
    drop(stdin);
    assert!(lepton.wait().unwrap().success());
    assert_clean(&vmm);
}
