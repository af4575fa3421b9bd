//! Memory that is checked when it is touched.

use std::fs::{self, OpenOptions};

use serde_json::json;

use crate::place::{Place, flip, let_run, load, saved};
use lepton_tests::Vmm;

/// Where [`Program::count`] has its counter.
const COUNTER: u64 = 0x600;

pub fn a_damaged_chunk_is_named_and_never_seen() {
    let place = Place::new();
    saved(&place);
    // In the chunk of the counter, and in that of the code.
    for (at, chunk) in [(COUNTER + 8, 0), (0x10_0000 + 0x800, 16)] {
        flip(&place.memory(), at);
        let (vmm, mut api) = Vmm::quiet();
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
        let (_vmm, mut api) = Vmm::quiet();
        api.put("/snapshot/load", &request);
        let_run(&mut api);
        flip(&place.memory(), at);
    }
    let (_vmm, mut api) = load(&place);
    let_run(&mut api);
}

pub fn a_damaged_chunk_that_nobody_touches_does_no_harm() {
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
    assert_eq!(fs::read_dir(other.folder()).expect("a folder").count(), 0);
}

pub fn a_file_that_is_cut_under_a_machine_ends_it() {
    let place = Place::new();
    saved(&place);
    let mut request = place.load();
    request["resume_vm"] = false.into();
    let (vmm, mut api) = Vmm::quiet();
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
