//! The program that makes the system calls of a device under load, and nothing else.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

fn calls(line: &str, device: &Path, engine: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lepton-calls"));
    command.arg(line).arg(device).arg(engine);
    command.output().unwrap()
}

/// What it says of a load, as the probe guest does.
fn told(output: &Output) -> (u64, u64) {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("PROBE "));
    let told: Value = serde_json::from_str(line.unwrap_or_else(|| panic!("{output:?}"))).unwrap();
    assert_eq!(told["errors"], 0);
    // A second, of a counter that makes so many thousand in a millisecond.
    assert!(told["ticks"].as_u64().unwrap() >= 1000 * 1000);
    (
        told["ops"].as_u64().unwrap(),
        told["bytes"].as_u64().unwrap(),
    )
}

#[test]
fn a_drive_is_read_for_a_second() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let line = "probe.mode=blk_read probe.pattern=random probe.size=4096 probe.tsc_khz=1000";
    let (ops, bytes) = told(&calls(line, &image, "sync"));
    assert!(ops > 0);
    assert_eq!(bytes, ops * 4096);
}

#[test]
fn what_it_streams_arrives() {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("v.sock");
    let listener = UnixListener::bind(folder.path().join("v.sock_5000")).unwrap();
    let reader = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut buffer, mut all) = (vec![0; 1 << 16], 0);
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return all,
                count => all += count as u64,
            }
        }
    });
    let line = "probe.mode=vsock_tx probe.size=65536 probe.connections=1 probe.tsc_khz=1000";
    let (_, bytes) = told(&calls(line, &socket, "sync"));
    assert_eq!(reader.join().unwrap(), bytes);
}

#[test]
fn what_it_does_not_know_is_named() {
    let output = calls("probe.mode=blk_fly", Path::new("/dev/null"), "sync");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("blk_fly"), "{said}");
    let output = calls(
        "probe.mode=blk_read probe.size=x",
        Path::new("/dev/null"),
        "sync",
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("probe.size=x"), "{said}");
}
