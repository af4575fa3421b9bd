//! The two files: complete, belonging together, as large as they must be.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use lepton_tests::PATIENCE;
use serde_json::json;

use crate::place::{Place, flip, let_run, load, paused, refusal, saved};

pub fn files_that_are_not_what_was_saved_are_refused() {
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
    request["snapshot_path"] = json!(place.folder());
    assert!(refusal(&request).contains("not a regular file"));
}

pub fn a_mixture_of_two_snapshots_is_refused() {
    let (one, two) = (Place::new(), Place::new());
    saved(&one);
    // Not the same machine: two that happen to stop at the same count have the same memory, and no mixture is possible.
    let (vmm, mut api) = paused(2, 128);
    api.put("/snapshot/create", &two.create());
    vmm.terminate();
    let mut request = one.load();
    request["mem_backend"]["backend_path"] = json!(two.memory());
    let message = refusal(&request);
    assert!(
        message.contains("the memory of another snapshot"),
        "{message}"
    );
}

pub fn a_writer_that_was_killed_leaves_the_old_snapshot_or_the_new() {
    let place = Place::new();
    let (vmm, mut api) = paused(1, 128);
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

pub fn places_that_cannot_be_written_leave_what_was_there() {
    let place = Place::new();
    let (_vmm, mut api) = paused(1, 128);
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
    let left = fs::read_dir(place.folder()).expect("a folder").count();
    assert_eq!(left, 2, "something was left behind");
    api.reach("Resumed");
    let_run(&mut api);
    let (_vmm, mut api) = load(&place);
    let_run(&mut api);
}

pub fn untouched_memory_takes_no_room() {
    let place = Place::new();
    let (_vmm, mut api) = paused(1, 4096);
    api.put("/snapshot/create", &place.create());
    let memory = fs::metadata(place.memory()).expect("a memory file");
    assert!(memory.len() > 4 << 30);
    assert!(memory.blocks() * 512 < 4 << 20, "{}", memory.blocks());
    flip(&place.memory(), memory.len() - 4096 + 30);
    assert!(refusal(&place.load()).contains("another snapshot"));
}
