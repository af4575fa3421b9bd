//! Beginnings and ends of the process: its command line, its signals, what it leaves behind.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, ExitCode};

use lepton_tests::guest::Program;
use lepton_tests::origin::running;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{PATIENCE, Vmm, programs, reaper, test};
use rustix::process::Signal;
use serde_json::json;

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[],
        [
            test!(version_and_help),
            test!(what_the_command_line_cannot_mean),
            test!(signals_end_it_in_order)
                .needs(Need::Kvm)
                .of_every_origin(),
            test!(a_killed_test_leaves_no_machine).needs(Need::Kvm),
            test!(a_signal_before_the_start),
            test!(a_machine_that_cannot_start_leaves_no_socket).needs(Need::Kvm),
            test!(a_socket_in_use_is_refused_and_left_alone),
            test!(a_file_in_the_sockets_place_is_left_alone),
            test!(a_socket_in_a_place_that_is_not_there),
            test!(two_vmms_one_socket),
            test!(a_vsock_socket_in_use_is_refused_and_left_alone),
            test!(a_replaced_vsock_leaves_no_socket),
            test!(clients_that_leave_in_the_middle),
            test!(many_clients_at_once),
            test!(a_client_that_sends_byte_by_byte_is_served_and_holds_nobody_up),
            test!(a_socket_removed_by_others_is_no_failure),
            test!(a_new_file_in_the_sockets_place_survives_the_end),
        ],
    )
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(programs::vmm())
        .args(arguments)
        .output()
        .expect("the VMM starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

fn version_and_help() {
    let (code, out, err) = run(&["--version"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(out.starts_with("lepton-vmm "), "{out}");
    let (code, out, err) = run(&["--help"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    for option in [
        "--api-sock",
        "--id",
        "--config-file",
        "--no-api",
        "--boot-timer",
        "--log-path",
        "--level",
        "--show-level",
        "--show-log-origin",
        "--module",
        "--metrics-path",
        "--seccomp-filter",
        "--no-seccomp",
        "--http-api-max-payload-size",
        "--template",
        "--template-memory",
        "--start-time-us",
        "--start-time-cpu-us",
        "--parent-cpu-time-us",
        "--version",
    ] {
        assert!(out.contains(option), "{option} is not in the help");
    }
}

fn what_the_command_line_cannot_mean() {
    for arguments in [
        &["--no-such-option"][..],
        &["--id", "a/b"],
        &["--id", ""],
        &["--no-api"],
        &["--level", "loud"],
        &["--http-api-max-payload-size", "many"],
        &["--seccomp-filter", "x", "--no-seccomp"],
        &["unasked"],
    ] {
        let (code, out, err) = run(arguments);
        assert_eq!(code, Some(153), "{arguments:?}: {err}");
        assert_eq!(out, "", "{arguments:?}");
        let value = arguments.iter().rfind(|word| !word.is_empty());
        let value = value.map_or("", |word| word);
        assert!(err.contains(value), "{arguments:?}: {err}");
    }
    // What is missing, or too much, is said.
    let template = ["--template", "s", "--template-memory", "m"];
    for (arguments, wanted) in [
        (&template[..2], "--template-memory <PATH>"),
        (&template[2..], "--template <PATH>"),
        (
            &[&template[..], &["--adopt", "a"]].concat(),
            "'--adopt <PATH>'",
        ),
        (
            &[&template[..], &["--config-file", "c"]].concat(),
            "'--config-file <PATH>'",
        ),
        (
            &[&template[..], &["--no-api"]].concat(),
            "cannot be used with '--no-api'",
        ),
    ] {
        let (code, _, err) = run(arguments);
        assert_eq!(code, Some(153), "{arguments:?}: {err}");
        assert!(err.contains(wanted), "{arguments:?}: {err}");
    }
}

fn signals_end_it_in_order() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 156)] {
        let (vmm, _api) = running(&Program::spin(), |folder, config| {
            config["machine-config"]["vcpu_count"] = 2.into();
            config["vsock"] = json!({ "guest_cid": 3, "uds_path": folder.join("v.sock") });
        });
        assert!(fs::exists(vmm.path("v.sock")).unwrap_or(false));
        vmm.signal(signal);
        // That both sockets are gone is checked for every end.
        let ended = vmm.wait().expect_code(code);
        let status = format!("exit status {code}");
        assert!(ended.text().contains(&status), "{}", ended.text());
    }
}

fn a_killed_test_leaves_no_machine() {
    reaper::check("a_killed_test_leaves_no_machine", || {
        let (vmm, mut api, _) = Vmm::with_kernel(&Program::spin());
        api.start();
        (vmm.pid(), vmm)
    });
}

fn a_signal_before_the_start() {
    let (vmm, mut api) = Vmm::with_api();
    api.put(
        "/vsock",
        &json!({ "guest_cid": 3, "uds_path": vmm.path("v.sock") }),
    );
    vmm.terminate();
}

fn a_machine_that_cannot_start_leaves_no_socket() {
    let builder = Vmm::builder();
    let path = |name: &str| builder.directory().join(name);
    fs::write(path("kernel"), "no kernel at all").expect("a file can be written");
    fs::write(path("disk"), [0; 4096]).expect("a file can be written");
    let config = json!({
        "boot-source": { "kernel_image_path": path("kernel") },
        "drives": [{ "drive_id": "d", "path_on_host": path("disk"), "is_root_device": false }],
        "vsock": { "guest_cid": 3, "uds_path": path("v.sock") },
    });
    let ended = builder.config(&config).spawn().wait().expect_code(152);
    assert!(ended.stderr.contains("/kernel"), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
}

fn a_socket_in_use_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = folder.path().join("taken.sock");
    let path_text = path.to_str().expect("a plain path");
    let listener = UnixListener::bind(&path).expect("a socket can be bound");
    let (code, _, err) = run(&["--api-sock", path_text]);
    assert_eq!(code, Some(1), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.contains(path_text), "{err}");
    // Whoever had it has it still.
    UnixStream::connect(&path).expect("the socket is there");
    listener.accept().expect("the listener is there");
}

fn a_file_in_the_sockets_place_is_left_alone() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = folder.path().join("file");
    fs::write(&path, "content").expect("a file can be written");
    let (code, _, err) = run(&["--api-sock", path.to_str().expect("a plain path")]);
    assert_eq!(code, Some(1), "{err}");
    assert_eq!(
        fs::read_to_string(&path).expect("the file is there"),
        "content"
    );
}

fn a_socket_in_a_place_that_is_not_there() {
    let long = format!("/tmp/{}", "x".repeat(200));
    for path in ["/no/such/folder/api.sock", &long, ""] {
        let (code, _, err) = run(&["--api-sock", path]);
        assert!(matches!(code, Some(1 | 153)), "{path:?}: {code:?} {err}");
        assert!(err.contains(path), "{err}");
        assert!(!err.contains("panicked"), "{err}");
    }
}

fn two_vmms_one_socket() {
    let (vmm, mut api) = Vmm::with_api();
    let path = vmm.socket().to_str().expect("a plain path").to_owned();
    let (code, _, err) = run(&["--api-sock", &path]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains(&path), "{err}");
    assert_eq!(api.state(), "Not started");
    assert_eq!(
        vmm.api().state(),
        "Not started",
        "the socket is still its own"
    );
    vmm.terminate();
}

fn a_vsock_socket_in_use_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let taken = folder.path().join("taken.sock");
    let listener = UnixListener::bind(&taken).expect("a socket can be bound");
    let (vmm, mut api) = Vmm::with_api();
    let open_files = vmm.open_files();
    let body = json!({ "guest_cid": 3, "uds_path": taken });
    let message = api.refused("PUT", "/vsock", &body.to_string());
    assert!(message.contains("taken.sock"), "{message}");
    assert_eq!(vmm.open_files(), open_files);
    UnixStream::connect(&taken).expect("the socket is there");
    listener.accept().expect("the listener is there");
    vmm.terminate();
    assert!(taken.exists());
}

fn a_replaced_vsock_leaves_no_socket() {
    let (vmm, mut api) = Vmm::with_api();
    let put = |api: &mut lepton_tests::Api, name: &str| {
        let body = json!({ "guest_cid": 3, "uds_path": vmm.path(name) });
        api.put("/vsock", &body);
    };
    put(&mut api, "one.sock");
    put(&mut api, "two.sock");
    assert!(!fs::exists(vmm.path("one.sock")).unwrap_or(true));
    put(&mut api, "two.sock");
    assert!(fs::exists(vmm.path("two.sock")).unwrap_or(false));
    // A replacement that cannot be leaves the old one.
    let bad = json!({ "guest_cid": 2, "uds_path": vmm.path("three.sock") });
    api.refused("PUT", "/vsock", &bad.to_string());
    let bad = json!({ "guest_cid": 3, "uds_path": "/no/such/folder/v.sock" });
    api.refused("PUT", "/vsock", &bad.to_string());
    assert!(fs::exists(vmm.path("two.sock")).unwrap_or(false));
    assert_eq!(
        api.get("/vm/config")["vsock"]["uds_path"],
        json!(vmm.path("two.sock"))
    );
    vmm.terminate();
}

fn clients_that_leave_in_the_middle() {
    let (vmm, mut api) = Vmm::with_api();
    api.state();
    let open_files = vmm.open_files();
    let whole = "PUT /machine-config HTTP/1.1\r\nContent-Length: 38\r\n\r\n{\"vcpu_count\": 1, \"mem_size_mib\": 128}";
    for length in (0..whole.len()).step_by(7) {
        let mut stream = UnixStream::connect(vmm.socket()).expect("the API listens");
        stream
            .write_all(&whole.as_bytes()[..length])
            .expect("a write");
        drop(stream);
        assert_eq!(api.state(), "Not started");
    }
    // One that does not read its reply.
    let mut stream = UnixStream::connect(vmm.socket()).expect("the API listens");
    for _ in 0..50 {
        stream
            .write_all(b"GET /vm/config HTTP/1.1\r\n\r\n")
            .expect("a write");
    }
    drop(stream);
    let closed = vmm.open_files_fall_to(open_files, &mut api);
    assert!(closed, "connections are left open");
    vmm.terminate();
}

fn many_clients_at_once() {
    let (vmm, mut api) = Vmm::with_api();
    let slow: Vec<UnixStream> = (0..8)
        .map(|_| {
            let mut stream = UnixStream::connect(vmm.socket()).expect("the API listens");
            stream.write_all(b"GET / HTTP/1.1\r\n").expect("a write");
            stream
        })
        .collect();
    // Half a request holds nobody else up.
    assert_eq!(api.state(), "Not started");
    for mut stream in slow {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream
            .write_all(b"Connection: close\r\n\r\n")
            .expect("a write");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("a reply");
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
    vmm.terminate();
}

/// One byte at a time, as slow as others can be served in between. How slow in seconds makes no difference: nothing in the
/// server knows the time.
fn a_client_that_sends_byte_by_byte_is_served_and_holds_nobody_up() {
    let (vmm, mut api) = Vmm::with_api();
    let mut slow = UnixStream::connect(vmm.socket()).expect("the API listens");
    slow.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let request = "PUT /machine-config HTTP/1.1\r\nContent-Length: 38\r\nConnection: close\r\n\r\n\
                   {\"vcpu_count\": 3, \"mem_size_mib\": 128}";
    let (last, rest) = request.as_bytes().split_last().expect("some bytes");
    for byte in rest {
        slow.write_all(&[*byte]).expect("the server reads");
        assert_eq!(api.state(), "Not started");
    }
    // Nothing of it is done before it is whole.
    assert_eq!(api.get("/machine-config")["vcpu_count"], 1);
    slow.write_all(&[*last]).expect("the server reads");
    let mut reply = String::new();
    slow.read_to_string(&mut reply).expect("a reply");
    assert!(reply.starts_with("HTTP/1.1 204"), "{reply}");
    assert_eq!(api.get("/machine-config")["vcpu_count"], 3);
    vmm.terminate();
}

fn a_socket_removed_by_others_is_no_failure() {
    let (vmm, _api) = Vmm::with_api();
    fs::remove_file(vmm.socket()).expect("the socket is there");
    vmm.terminate();
}

fn a_new_file_in_the_sockets_place_survives_the_end() {
    let (vmm, _api) = Vmm::with_api();
    fs::remove_file(vmm.socket()).expect("the socket is there");
    fs::write(vmm.socket(), "another's").expect("a file can be written");
    let name = vmm.socket().file_name().expect("a name").to_owned();
    let ended = vmm.terminate();
    let file = fs::read_to_string(ended.directory.path().join(name));
    assert_eq!(file.expect("the file is there"), "another's");
}
