//! Machines that are saved, and loaded by another process.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use lepton_tests::guest::{Entry, Program};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::{Api, PATIENCE, Vmm, test};
use serde_json::{Value, json};
use tempfile::TempDir;

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(a_guest_goes_on_where_it_was),
            test!(a_guest_goes_on_in_the_process_that_saved_it),
            test!(a_saved_machine_has_its_devices),
            test!(interfaces_get_other_taps).needs(Need::Root),
            test!(devices_can_be_elsewhere),
            test!(what_is_allowed_when),
            test!(files_that_are_not_what_was_saved_are_refused),
            test!(a_mixture_of_two_snapshots_is_refused),
            test!(a_writer_that_was_killed_leaves_the_old_snapshot_or_the_new),
            test!(places_that_cannot_be_written_leave_what_was_there),
            test!(untouched_memory_takes_no_room),
            test!(a_damaged_chunk_is_named_and_never_seen).needs(Need::Root),
            test!(a_damaged_chunk_that_nobody_touches_does_no_harm).needs(Need::Root),
            test!(a_file_that_is_cut_under_a_machine_ends_it).needs(Need::Root),
            test!(differences_make_the_next_snapshot).needs(Need::Root),
            test!(differences_without_a_record_are_all_that_was_touched),
            test!(another_process_serves_memory)
                .needs(Need::Root)
                .needs(Need::Program("python3")),
        ],
    )
}

/// Where a machine is saved.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn state(&self) -> PathBuf {
        self.path("state")
    }

    fn memory(&self) -> PathBuf {
        self.path("memory")
    }

    fn create(&self) -> Value {
        json!({ "snapshot_path": self.state(), "mem_file_path": self.memory() })
    }

    fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state(),
            "mem_backend": { "backend_type": "File", "backend_path": self.memory() },
            "resume_vm": true,
        })
    }
}

/// Changes a byte of a file.
fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.expect("a file to damage");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("so long");
    file.write_all_at(&[byte[0] ^ 1], at).expect("writable");
}

/// A VMM whose log is apart from its console.
fn quiet() -> (Vmm, Api) {
    let builder = Vmm::builder();
    let log = builder.directory().join("log");
    let arguments = ["--log-path".into(), log.into_os_string()];
    let vmm = builder.arguments(arguments).spawn();
    let mut api = vmm.api();
    // Once it has answered, all of it is there.
    assert_eq!(api.state(), "Not started");
    (vmm, api)
}

fn configure(vmm: &Vmm, api: &mut Api, program: &Program, vcpus: u8, mib: u64) {
    let kernel = program.write(vmm.directory(), Entry::Pvh);
    api.configure(&json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": mib },
    }));
}

/// Lets the guest run until it has made some exits.
fn let_run(api: &mut Api) {
    let before = api.counter("lepton_vcpu_exit_io_out");
    api.wait_for_more("lepton_vcpu_exit_io_out", before + 20);
}

/// Loads by a process of its own.
fn load(place: &Place) -> (Vmm, Api) {
    let (vmm, mut api) = quiet();
    api.put("/snapshot/load", &place.load());
    (vmm, api)
}

/// The reason for which a load is refused, after which the process is as before.
#[track_caller]
fn refusal(request: &Value) -> String {
    let (vmm, mut api) = quiet();
    let before = vmm.open_files();
    let message = api.refused("PUT", "/snapshot/load", &request.to_string());
    assert_eq!(api.state(), "Not started");
    assert_eq!(vmm.open_files(), before, "{message}");
    message
}

/// A machine of a guest that ticks, saved and gone.
fn saved(place: &Place) {
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &place.create());
    vmm.terminate();
}

/// Checks that the words are 1, 1, 2, 2 and so on, and returns how far they come.
#[track_caller]
fn check_counts(stream: &[u8]) -> u32 {
    let words = stream.chunks_exact(4);
    let words = words.map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")));
    let mut last = 0;
    for (index, word) in words.enumerate() {
        assert_eq!(word, index as u32 / 2 + 1, "word {index}");
        last = word;
    }
    last
}

fn a_guest_goes_on_where_it_was() {
    for (vcpus, mib) in [(1, 128), (2, 4096)] {
        let place = Place::new();
        let (vmm, mut api) = quiet();
        configure(&vmm, &mut api, &Program::count(), vcpus, mib);
        api.start();
        let_run(&mut api);
        api.reach("Paused");
        api.put("/snapshot/create", &place.create());
        let mut stream = vmm.terminate().stdout;
        let first = check_counts(&stream);
        assert!(first > 5, "{first}");
        // A snapshot of a snapshot, three times.
        for _ in 0..3 {
            let (vmm, mut api) = load(&place);
            assert_eq!(api.state(), "Running");
            let_run(&mut api);
            api.reach("Paused");
            api.put("/snapshot/create", &place.create());
            stream.extend(vmm.terminate().stdout);
        }
        // Not one tick is lost, and none comes twice.
        assert!(check_counts(&stream) > first + 20);
    }
}

fn a_guest_goes_on_in_the_process_that_saved_it() {
    let place = Place::new();
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    api.start();
    for _ in 0..3 {
        let_run(&mut api);
        api.reach("Paused");
        api.put("/snapshot/create", &place.create());
        api.reach("Resumed");
    }
    let_run(&mut api);
    assert!(check_counts(&vmm.terminate().stdout) > 30);
}

fn a_saved_machine_has_its_devices() {
    let place = Place::new();
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 2, 256);
    let image = place.path("image");
    fs::write(&image, [7; 4096]).expect("an image");
    for (id, root) in [("data", false), ("root", true)] {
        api.put(
            &format!("/drives/{id}"),
            &json!({
                "drive_id": id, "path_on_host": image, "is_root_device": root, "is_read_only": true,
                "rate_limiter": { "ops": { "size": 10, "refill_time": 100 } },
            }),
        );
    }
    let socket = place.path("v.sock");
    api.put("/vsock", &json!({ "guest_cid": 42, "uds_path": socket }));
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    let mut before = api.get("/vm/config");
    api.put("/snapshot/create", &place.create());
    vmm.terminate();
    assert!(!socket.exists());

    let (vmm, mut api) = quiet();
    let mut request = place.load();
    request["resume_vm"] = false.into();
    api.put("/snapshot/load", &request);
    assert_eq!(api.state(), "Paused");
    assert!(socket.exists());
    let after = api.get("/vm/config");
    // What is booted is not saved, and an engine that was not named has a name now.
    before["boot-source"] = after["boot-source"].clone();
    for drive in before["drives"].as_array_mut().expect("a list") {
        drive["io_engine"] = "Sync".into();
    }
    assert_eq!(after, before);
    assert_eq!(after["drives"][0]["drive_id"], "root");
    api.patch(
        "/drives/data",
        &json!({ "drive_id": "data", "path_on_host": image }),
    );
    api.reach("Resumed");
    let_run(&mut api);
    vmm.terminate();
    assert!(!socket.exists());
}

fn interfaces_get_other_taps() {
    let place = Place::new();
    let (one, two) = (Tap::new(None), Tap::new(None));
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    api.put(
        "/network-interfaces/eth0",
        &json!({ "iface_id": "eth0", "host_dev_name": one.name(), "mtu": 1400 }),
    );
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &place.create());
    // The first tap is still taken.
    let message = refusal(&place.load());
    assert!(message.contains(one.name()), "{message}");
    let mut request = place.load();
    request["network_overrides"] = json!([{ "iface_id": "eth0", "host_dev_name": two.name() }]);
    let (_vmm, mut api) = quiet();
    api.put("/snapshot/load", &request);
    let config = api.get("/vm/config");
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], two.name());
    assert_eq!(config["network-interfaces"][0]["mtu"], 1400);
    let_run(&mut api);
    request["network_overrides"] = json!([{ "iface_id": "eth7", "host_dev_name": two.name() }]);
    let message = refusal(&request);
    assert!(message.contains("no interface eth7"), "{message}");
    drop(vmm);
}

fn devices_can_be_elsewhere() {
    let place = Place::new();
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    let image = place.path("image");
    fs::write(&image, [7; 4096]).expect("an image");
    let drive = json!({
        "drive_id": "data", "path_on_host": image, "is_root_device": false, "is_read_only": false,
    });
    api.put("/drives/data", &drive);
    let socket = place.path("v.sock");
    api.put("/vsock", &json!({ "guest_cid": 42, "uds_path": socket }));
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &place.create());

    // The machine that was saved still has its socket.
    let message = refusal(&place.load());
    assert!(message.contains("v.sock"), "{message}");
    let (moved, smaller) = (place.path("moved"), place.path("smaller"));
    fs::rename(&image, &moved).expect("an image that moves");
    fs::write(&smaller, [7; 512]).expect("an image");
    let with = |drive: &str, path: &Path| {
        let mut request = place.load();
        request["vsock_override"] = json!({ "uds_path": place.path("w.sock") });
        request["drive_overrides"] = json!([{ "drive_id": drive, "path_on_host": path }]);
        request
    };
    for (request, reason) in [
        (
            with("nothing", &moved),
            "drive_overrides: the snapshot has no drive nothing",
        ),
        (with("data", &smaller), "1 sectors, the guest knows 8"),
        (with("data", &image), "image: No such file"),
    ] {
        let message = refusal(&request);
        assert!(message.contains(reason), "{message}");
    }
    assert!(!place.path("w.sock").exists());
    let (_vmm, mut api) = quiet();
    api.put("/snapshot/load", &with("data", &moved));
    let config = api.get("/vm/config");
    assert_eq!(config["drives"][0]["path_on_host"], json!(moved));
    assert_eq!(config["vsock"]["uds_path"], json!(place.path("w.sock")));
    let_run(&mut api);
}

fn what_is_allowed_when() {
    let place = Place::new();
    saved(&place);
    let (create, load) = (place.create().to_string(), place.load().to_string());
    let (vmm, mut api) = quiet();
    let early = "not supported before starting the microVM";
    assert!(
        api.refused("PUT", "/snapshot/create", &create)
            .contains(early)
    );
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    let message = api.refused("PUT", "/snapshot/load", &load);
    assert_eq!(
        message,
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
    );
    assert!(
        api.refused("PUT", "/snapshot/create", &create)
            .contains(early)
    );
    api.start();
    let message = api.refused("PUT", "/snapshot/create", &create);
    assert!(message.contains("Paused"), "{message}");
    let late = "not supported after starting the microVM";
    assert!(api.refused("PUT", "/snapshot/load", &load).contains(late));
    api.reach("Paused");
    assert!(api.refused("PUT", "/snapshot/load", &load).contains(late));
    api.put("/snapshot/create", &place.create());
    let same = json!({ "snapshot_path": "/tmp/x", "mem_file_path": "/tmp/x" });
    let message = api.refused("PUT", "/snapshot/create", &same.to_string());
    assert!(message.contains("both /tmp/x"), "{message}");

    // Log, metrics and console are no part of the machine.
    let (vmm, mut api) = quiet();
    let metrics = vmm.path("metrics");
    api.put("/metrics", &json!({ "metrics_path": metrics }));
    let console = vmm.path("console");
    api.put("/serial", &json!({ "serial_out_path": console }));
    api.put("/snapshot/load", &place.load());
    let_run(&mut api);
    assert!(api.refused("PUT", "/snapshot/load", &load).contains(late));
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    assert!(api.refused("PUT", "/actions", &start).contains(late));
    assert!(fs::metadata(console).expect("a console").len() > 0);
}

fn files_that_are_not_what_was_saved_are_refused() {
    let place = Place::new();
    saved(&place);
    let state = fs::read(place.state()).expect("a state file");
    type Damage = (&'static str, fn(&mut Vec<u8>));
    let damages: [Damage; 6] = [
        ("no state file", |bytes| bytes[0] ^= 1),
        ("format version 65535", |bytes| bytes[8..10].fill(0xff)),
        ("ELF machine 183", |bytes| bytes[10] = 183),
        ("damaged", |bytes| bytes[2000] ^= 1),
        ("cut or changed", |bytes| bytes.truncate(3000)),
        ("no state file", |bytes| bytes.clear()),
    ];
    for (reason, damage) in damages {
        let mut bytes = state.clone();
        damage(&mut bytes);
        fs::write(place.state(), bytes).expect("a state file");
        let message = refusal(&place.load());
        assert!(message.contains(reason), "{reason}: {message}");
        assert!(message.contains("/state"), "{message}");
    }
    fs::write(place.state(), state).expect("a state file");
    let memory = OpenOptions::new().write(true).open(place.memory());
    let memory = memory.expect("a memory file");
    let length = memory.metadata().expect("a length").len();
    for (other, reason) in [
        (0, "it was cut"),
        (length - 1, "it was cut"),
        (length, "no memory file"),
    ] {
        memory.set_len(other).expect("another length");
        let message = refusal(&place.load());
        assert!(message.contains(reason), "{message}");
        assert!(message.contains("/memory"), "{message}");
    }
    let mut request = place.load();
    request["snapshot_path"] = "/no/such/file".into();
    assert!(refusal(&request).contains("/no/such/file"));
    request["snapshot_path"] = json!(place.0.path());
    assert!(refusal(&request).contains("not a regular file"));
}

fn a_mixture_of_two_snapshots_is_refused() {
    let (one, two) = (Place::new(), Place::new());
    saved(&one);
    saved(&two);
    let mut request = one.load();
    request["mem_backend"]["backend_path"] = json!(two.memory());
    let message = refusal(&request);
    assert!(
        message.contains("the memory of another snapshot"),
        "{message}"
    );
}

fn a_writer_that_was_killed_leaves_the_old_snapshot_or_the_new() {
    let place = Place::new();
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &place.create());
    drop((vmm, api));
    // Kills at moments spread over the time that a snapshot takes.
    let mut begun = 0;
    for step in 0..6 {
        let (vmm, mut api) = load(&place);
        let_run(&mut api);
        api.reach("Paused");
        let body = place.create().to_string();
        let writer =
            std::thread::spawn(move || api.try_request("PUT", "/snapshot/create", &body).is_ok());
        // No sleep: the successor's file is what is waited for, then some of its growth.
        let new = place.path("memory.new");
        let started = Instant::now();
        while !new.exists() && !writer.is_finished() {
            assert!(started.elapsed() < PATIENCE);
        }
        for _ in 0..step * 80 {
            drop(fs::metadata(&new));
        }
        vmm.signal(rustix::process::Signal::KILL);
        if !writer.join().expect("a request") {
            begun += 1;
        }
        drop(vmm);
        // Whatever is there is whole.
        let (vmm, mut api) = load(&place);
        let_run(&mut api);
        drop(vmm);
    }
    assert!(begun > 0, "no writer was interrupted");
}

fn places_that_cannot_be_written_leave_what_was_there() {
    let place = Place::new();
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &place.create());
    let before = fs::read(place.state()).expect("a state file");
    for (field, path) in [
        ("mem_file_path", "/no/such/folder/memory"),
        ("snapshot_path", "/no/such/folder/state"),
        ("mem_file_path", "/dev/null"),
        ("snapshot_path", "/proc"),
        // Full as soon as something is written.
        ("snapshot_path", "/dev/full"),
    ] {
        let mut request = place.create();
        request[field] = path.into();
        let message = api.refused("PUT", "/snapshot/create", &request.to_string());
        assert!(message.contains(path), "{message}");
    }
    assert_eq!(fs::read(place.state()).expect("a state file"), before);
    let left = fs::read_dir(place.0.path()).expect("a folder").count();
    assert_eq!(left, 2, "something was left behind");
    api.reach("Resumed");
    let_run(&mut api);
    let (_vmm, mut api) = load(&place);
    let_run(&mut api);
}

fn untouched_memory_takes_no_room() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 4096);
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &place.create());
    let memory = fs::metadata(place.memory()).expect("a memory file");
    assert!(memory.len() > 4 << 30);
    assert!(memory.blocks() * 512 < 4 << 20, "{}", memory.blocks());
    flip(&place.memory(), memory.len() - 4096 + 30);
    assert!(refusal(&place.load()).contains("another snapshot"));
}

/// Where [`Program::count`] has its counter.
const COUNTER: u64 = 0x600;

fn a_damaged_chunk_is_named_and_never_seen() {
    let place = Place::new();
    saved(&place);
    // In the chunk of the counter, and in that of the code.
    for (at, chunk) in [(COUNTER + 8, 0), (0x10_0000 + 0x800, 16)] {
        flip(&place.memory(), at);
        let (vmm, mut api) = quiet();
        // The machine ends, before or after the reply.
        let body = place.load().to_string();
        drop(api.try_request("PUT", "/snapshot/load", &body));
        let ended = vmm.wait().expect_code(1);
        let log = fs::read_to_string(ended.directory.path().join("log")).expect("a log");
        assert!(log.contains(&format!("chunk {chunk} ")), "{log}");
        assert!(log.contains("is not what was saved"), "{log}");
        // It may have sent its register before it came to the counter.
        let sent = if chunk == 0 { 4 } else { 0 };
        assert!(
            ended.stdout.len() <= sent,
            "the guest ran on damaged memory"
        );
        // Who does not want to know is not told.
        let mut request = place.load();
        request["mem_backend"]["verify"] = false.into();
        let (_vmm, mut api) = quiet();
        api.put("/snapshot/load", &request);
        let_run(&mut api);
        flip(&place.memory(), at);
    }
    let (_vmm, mut api) = load(&place);
    let_run(&mut api);
}

fn a_damaged_chunk_that_nobody_touches_does_no_harm() {
    let place = Place::new();
    saved(&place);
    // The kernel's tables, which this guest does not look at.
    flip(&place.memory(), 0xe_0000);
    let (_vmm, mut api) = load(&place);
    let_run(&mut api);
    // But it is not handed on as if it were whole.
    api.reach("Paused");
    let other = Place::new();
    let message = api.refused("PUT", "/snapshot/create", &other.create().to_string());
    assert!(message.contains("chunk 14 "), "{message}");
    assert_eq!(fs::read_dir(other.0.path()).expect("a folder").count(), 0);
}

fn a_file_that_is_cut_under_a_machine_ends_it() {
    let place = Place::new();
    saved(&place);
    let mut request = place.load();
    request["resume_vm"] = false.into();
    let (vmm, mut api) = quiet();
    api.put("/snapshot/load", &request);
    let file = OpenOptions::new().write(true).open(place.memory());
    file.expect("a memory file").set_len(4096).expect("cut");
    let body = json!({ "state": "Resumed" }).to_string();
    drop(api.try_request("PATCH", "/vm", &body));
    let ended = vmm.wait().expect_code(1);
    let log = fs::read_to_string(ended.directory.path().join("log")).expect("a log");
    assert!(log.contains("cannot be read"), "{log}");
    assert_eq!(ended.stdout, b"");
}

/// Lays the data of `changes` over `base`, as far as it has some.
fn lay_over(base: &Path, changes: &Path) {
    use rustix::fs::{SeekFrom, seek};
    let from = fs::File::open(changes).expect("changes");
    let to = OpenOptions::new().write(true).open(base).expect("a base");
    let mut at = 0;
    while let Ok(start) = seek(&from, SeekFrom::Data(at)) {
        let end = seek(&from, SeekFrom::Hole(start)).expect("an end");
        let mut bytes = vec![0; (end - start) as usize];
        from.read_exact_at(&mut bytes, start).expect("data");
        to.write_all_at(&bytes, start).expect("room");
        at = end;
    }
}

/// Bytes of a file that are not in a hole.
fn stored(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).expect("a file").blocks() * 512
}

fn differences_make_the_next_snapshot() {
    let (full, changes) = (Place::new(), Place::new());
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    api.patch("/machine-config", &json!({ "track_dirty_pages": true }));
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &full.create());
    let mut request = changes.create();
    request["snapshot_type"] = "Diff".into();
    let mut stream = Vec::new();
    let mut machine = (vmm, api);
    for round in 0..4 {
        let (vmm, mut api) = machine;
        api.reach("Resumed");
        let_run(&mut api);
        api.reach("Paused");
        api.put("/snapshot/create", &request);
        // The counter's page, and what says which memory it is.
        assert!(stored(&changes.memory()) <= 64 << 10, "round {round}");
        lay_over(&full.memory(), &changes.memory());
        fs::copy(changes.state(), full.state()).expect("a state file");
        if round % 2 == 0 {
            machine = (vmm, api);
            continue;
        }
        stream.extend(vmm.terminate().stdout);
        let mut load = full.load();
        load["track_dirty_pages"] = true.into();
        load["resume_vm"] = false.into();
        let (vmm, mut api) = quiet();
        api.put("/snapshot/load", &load);
        machine = (vmm, api);
    }
    let (vmm, mut api) = machine;
    api.reach("Resumed");
    let_run(&mut api);
    stream.extend(vmm.terminate().stdout);
    assert!(check_counts(&stream) > 30);
    // Changes alone are no memory.
    let (vmm, mut api) = quiet();
    drop(api.try_request("PUT", "/snapshot/load", &changes.load().to_string()));
    vmm.wait().expect_code(1);
}

fn differences_without_a_record_are_all_that_was_touched() {
    let place = Place::new();
    let (vmm, mut api) = quiet();
    configure(&vmm, &mut api, &Program::count(), 1, 128);
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    let mut request = place.create();
    request["snapshot_type"] = "Diff".into();
    api.put("/snapshot/create", &request);
    let mut stream = vmm.terminate().stdout;
    let (vmm, mut api) = load(&place);
    let_run(&mut api);
    stream.extend(vmm.terminate().stdout);
    check_counts(&stream);
}

/// Serves page faults from a memory file by Firecracker's protocol.
const HANDLER: &str = r#"
import ctypes, fcntl, json, os, socket, struct, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
stream, _ = listener.accept()
message, fds, _, _ = socket.recv_fds(stream, 65536, 1)
mappings = json.loads(message)
memory = open(sys.argv[2], "rb")
assert sum(m["size"] for m in mappings) == 128 << 20, mappings
assert all(m["page_size"] == 4096 for m in mappings), mappings
os.set_blocking(fds[0], True)
served = 0
while True:
    event = os.read(fds[0], 32)
    address = struct.unpack_from("<Q", event, 16)[0] & ~4095
    for m in mappings:
        base = m["base_host_virt_addr"]
        if base <= address < base + m["size"]:
            memory.seek(m["offset"] + address - base)
            page = ctypes.create_string_buffer(memory.read(4096), 4096)
            copy = bytearray(struct.pack("<QQQQq", address, ctypes.addressof(page), 4096, 0, 0))
            fcntl.ioctl(fds[0], 0xc028aa03, copy)
            served += 1
            print("served", served, flush=True)
"#;

fn another_process_serves_memory() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let place = Place::new();
    saved(&place);
    let socket = place.path("handler.sock");
    let mut request = place.load();
    request["mem_backend"] = json!({ "backend_type": "Uffd", "backend_path": socket });
    let message = refusal(&request);
    assert!(message.contains("handler.sock"), "{message}");
    let mut handler = Command::new("python3")
        .args(["-c", HANDLER])
        .args([&socket, &place.memory()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    let lines = BufReader::new(handler.stdout.take().expect("a pipe")).lines();
    let mut lines = lines.map_while(Result::ok);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    let (vmm, mut api) = quiet();
    api.put("/snapshot/load", &request);
    let_run(&mut api);
    assert_eq!(lines.next().as_deref(), Some("served 1"));
    vmm.terminate();
    handler.kill().expect("a child");
    handler.wait().expect("a child");
}
