//! Guests that notice by their ACPI tables that they go on as another machine.

use lepton_tests::counting::let_run;
use lepton_tests::guest::{Entry, Program, RECORD};
use lepton_tests::{Api, Vmm};
use serde_json::json;

use crate::family::{Heir, clone, request};

/// Where the tables are, and enough of them.
const TABLES: (u32, u32) = (0xe_0000, 0x2000);
/// The interrupt's bit in what the guest sends.
const PENDING: u32 = 1 << 17;

/// Bytes behind the one place where these stand.
#[track_caller]
fn behind<'a>(area: &'a [u8], bytes: &[u8]) -> &'a [u8] {
    let mut places = (area.windows(bytes.len()).enumerate()).filter(|(_, found)| *found == bytes);
    let (at, _) = places.next().expect("a table has it");
    assert!(places.next().is_none(), "{bytes:?} stands there twice");
    &area[at + bytes.len()..]
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"))
}

/// Where the tables say that the generation ID is, and which interrupt tells of a new one.
fn told_by_tables() -> (u32, u32) {
    let (vmm, mut api) = Vmm::quiet();
    let kernel = Program::dump(&[TABLES]).write(vmm.directory(), Entry::Pvh);
    api.put("/boot-source", &json!({ "kernel_image_path": kernel }));
    api.start_short_life();
    let area = vmm.wait().expect_code(0).stdout;
    // Name (ADDR, Package (2) { DWord, Zero })
    let address = behind(&area, b"ADDR\x12\x08\x02\x0c");
    assert_eq!(address[4], 0, "it is below 4 GiB");
    // The extended interrupt of the device of events: tag, length, flags, count, number.
    let events = behind(&area, b"ACPI0013");
    let interrupt = behind(&events[..64], &[0x89, 6, 0]);
    (word(address), word(&interrupt[2..]))
}

/// The last whole record that a guest has sent: its generation, and whether it was told of a new one.
#[track_caller]
fn last_record(said: &[u8]) -> ([u8; 16], bool) {
    let mut records = said.windows(24).filter(|bytes| bytes.starts_with(RECORD));
    let last = records.next_back().expect("a record");
    let pending = word(&last[20..]);
    assert!([0, PENDING].contains(&pending), "{pending:#x}");
    let id = last[4..20].try_into().expect("16 bytes");
    (id, pending != 0)
}

/// Lets the guest send some whole records.
fn let_say(api: &mut Api) {
    for _ in 0..4 {
        let_run(api);
    }
}

pub fn every_machine_is_a_generation_of_its_own() {
    let (address, interrupt) = told_by_tables();
    let (vmm, mut api) = Vmm::quiet();
    let kernel = Program::watch(address, interrupt).write(vmm.directory(), Entry::Pvh);
    api.configure(&json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128, "clonable": true },
    }));
    api.start();
    let_say(&mut api);
    api.reach("Paused");
    let (state, memory) = (vmm.path("state"), vmm.path("memory"));
    api.put(
        "/snapshot/create",
        &json!({ "snapshot_path": state, "mem_file_path": memory }),
    );
    let mut heirs = [Heir::called("one"), Heir::called("two")];
    let children: Vec<_> = heirs.iter().map(Heir::child).collect();
    clone(&mut api, &request(&children));
    let mut loaded: Vec<(Vmm, Api)> = (0..2).map(|_| Vmm::quiet()).collect();
    for (_, loaded) in &mut loaded {
        loaded.put(
            "/snapshot/load",
            &json!({
                "snapshot_path": state, "resume_vm": true, "track_dirty_pages": true,
                "mem_backend": { "backend_type": "File", "backend_path": memory, "verify": false },
            }),
        );
        let_say(loaded);
    }
    for heir in &mut heirs {
        let_say(&mut heir.api);
    }
    api.reach("Resumed");
    let_say(&mut api);

    let copies = heirs.map(|heir| heir.vmm).into_iter();
    let copies = copies.chain(loaded.into_iter().map(|(vmm, _)| vmm));
    let (own, told) = last_record(&vmm.terminate().stdout);
    assert!(!told, "the machine itself is the one it was");
    let mut seen = vec![[0; 16], own];
    for copy in copies {
        let (id, told) = last_record(&copy.terminate().stdout);
        assert!(told, "a guest was not told");
        assert!(!seen.contains(&id), "{id:x?} in {seen:x?}");
        seen.push(id);
    }
}
