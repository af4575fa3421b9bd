//! What the harness does with VMMs that fail, hang or are not there, and with Ctrl-C.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lepton_benches::results::{Cell, Results};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A program that says its version like a VMM, and otherwise does `body`.
fn vmm(folder: &Path, name: &str, body: &str) -> PathBuf {
    let path = folder.join(name);
    let script =
        format!("#!/bin/sh\n[ \"$1\" = --version ] && {{ echo {name} 1.0; exit; }}\n{body}\n");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Shows a first instruction and ends.
const GOOD: &str = "printf '\\001'";
const FAILS: &str = "echo no such luck >&2; exit 3";
const HANGS: &str = "exec sleep 1000";

fn harness(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lepton-bench"));
    command
        .args(["start", "--rounds", "2", "--vmm"])
        .arg(folder.join("good"))
        .arg("--out")
        .arg(folder)
        .args(arguments)
        .stdin(Stdio::null());
    command
}

fn results(folder: &Path) -> Results {
    let page = fs::read_to_string(folder.join("report.html")).unwrap();
    assert!(page.contains("</html>"));
    let bytes = fs::read(folder.join("results.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn cell<'a>(results: &'a Results, figure: &str, side: &str) -> &'a Cell {
    let figure = results.figure(figure).unwrap();
    figure.cells.iter().find(|cell| cell.side == side).unwrap()
}

fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}\n{err}")
}

#[test]
fn a_peer_that_fails_or_hangs_does_not_stop_the_others() {
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    vmm(path, "good", GOOD);
    let fails = vmm(path, "fails", FAILS);
    let hangs = vmm(path, "hangs", HANGS);
    let peers = [
        format!("--peer=firecracker={}", fails.display()),
        format!("--peer=qemu={}", hangs.display()),
        "--peer=cloud-hypervisor=/nonexistent/ch".to_owned(),
        "--patience=1".to_owned(),
    ];
    let output = harness(path, &peers.each_ref().map(String::as_str))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let results = results(path);
    assert!(!results.interrupted && results.has_failures());

    let first = "start.first-instruction";
    assert_eq!(cell(&results, first, "lepton").samples.len(), 2);
    let failed = &cell(&results, first, "firecracker").failures;
    assert_eq!(failed.len(), 2);
    assert!(failed[0].reason.contains("exit status: 3"), "{failed:?}");
    assert!(failed[0].log.contains("no such luck"), "{failed:?}");
    let hung = &cell(&results, "start.life", "qemu").failures;
    assert!(hung[0].reason.contains("timeout"), "{hung:?}");
    let absent = &results.absent;
    assert!(
        absent
            .iter()
            .any(|a| a.side == "cloud-hypervisor" && a.reason.contains("/nonexistent/ch"))
    );
}

#[test]
fn strict_makes_failures_count() {
    let folder = TempDir::new().unwrap();
    vmm(folder.path(), "good", GOOD);
    let fails = vmm(folder.path(), "fails", FAILS);
    let peer = format!("--peer=firecracker={}", fails.display());
    let output = harness(folder.path(), &[&peer, "--strict"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    // Nothing is lost by it.
    assert!(results(folder.path()).has_failures());
}

#[test]
fn wrong_names_are_answered_with_the_right_ones() {
    let folder = TempDir::new().unwrap();
    vmm(folder.path(), "good", GOOD);
    for (argument, wanted) in [
        ("strat", "start, weight"),
        ("--peer=crosvm=/x", "firecracker, cloud-hypervisor, qemu"),
    ] {
        let output = harness(folder.path(), &[argument]).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output).contains(wanted), "{}", text(&output));
    }
    assert!(!folder.path().join("results.json").exists());
}

fn wait_for(what: &str, mut is_there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_there() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

fn is_running(pid: &str) -> bool {
    Path::new("/proc").join(pid.trim()).exists()
}

/// Ends the harness if a test fails.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_interrupted_run_leaves_no_process_and_writes_what_it_has() {
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    vmm(path, "good", GOOD);
    // Written whole, then renamed: whoever sees it sees the number.
    let pid = path.join("pid");
    let note = format!("echo $$ >{0}.new; mv {0}.new {0}; {HANGS}", pid.display());
    let hangs = vmm(path, "hangs", &note);
    let peer = format!("--peer=firecracker={}", hangs.display());
    let mut command = harness(path, &[&peer]);
    let mut started = Started(command.stdout(Stdio::null()).spawn().unwrap());
    wait_for("the peer is not started", || pid.exists());
    let child = fs::read_to_string(&pid).unwrap();
    let id = rustix::process::Pid::from_child(&started.0);
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    let status = started.0.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(!is_running(&child), "{child} still runs");
    assert!(results(path).interrupted);
}
