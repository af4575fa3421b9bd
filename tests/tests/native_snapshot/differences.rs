//! Snapshots of what has changed.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::place::{Place, check_counts, let_run, load, paused, running};
use lepton_tests::Vmm;
use lepton_tests::metal::Metal;
use lepton_tests::sparse::lay_over;

/// Bytes of a file that are not in a hole.
fn stored(path: &Path) -> u64 {
    fs::metadata(path).expect("a file").blocks() * 512
}

pub fn differences_make_the_next_snapshot() {
    let (full, changes) = (Place::new(), Place::new());
    let (vmm, mut api) = running(1, 128, |_, config| {
        config["machine-config"]["track_dirty_pages"] = true.into();
    });
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
        let (vmm, mut api) = Vmm::quiet();
        api.put("/snapshot/load", &load);
        machine = (vmm, api);
    }
    let (vmm, mut api) = machine;
    api.reach("Resumed");
    let_run(&mut api);
    stream.extend(vmm.terminate().stdout);
    assert!(check_counts(&stream) > 30);
    // Changes alone are no memory.
    let (vmm, mut api) = Vmm::quiet();
    drop(api.try_request("PUT", "/snapshot/load", &changes.load().to_string()));
    vmm.wait().expect_code(1);
}

pub fn differences_without_a_record_are_all_that_was_touched() {
    let place = Place::new();
    let (vmm, mut api) = paused(1, 128);
    let mut request = place.create();
    request["snapshot_type"] = "Diff".into();
    api.put("/snapshot/create", &request);
    let mut stream = vmm.terminate().stdout;
    let (vmm, mut api) = load(&place);
    let_run(&mut api);
    stream.extend(vmm.terminate().stdout);
    check_counts(&stream);
}

/// Changes on both sides of the hole for devices, with much that is clean at the end of the first part of memory: what follows
/// is in its place all the same (Firecracker's pull request 5705 mended files in which it was not).
pub fn differences_behind_the_hole_are_in_their_place() {
    const GIB: u64 = 1 << 30;
    const STRIDE: u64 = 64 << 20;
    let arguments = format!("probe.mode=touch probe.stride={STRIDE} metal.copied=1");
    let (full, changes) = (Place::new(), Place::new());
    let vmm = Metal::new("LEPTON_PROBE", &arguments)
        .with_api()
        .with(|config| {
            let machine = &mut config["machine-config"];
            machine["mem_size_mib"] = 3200.into();
            machine["track_dirty_pages"] = true.into();
        })
        .start();
    vmm.stdout.wait_for("WAITS\n");
    let mut api = vmm.api();
    api.reach("Paused");
    let mut request = changes.create();
    request["snapshot_type"] = "Diff".into();
    api.put("/snapshot/create", &request);
    api.put("/snapshot/create", &full.create());
    vmm.terminate();
    let bytes = stored(&changes.memory());
    assert!(bytes < 64 << 20, "{bytes} bytes");
    let open = |place: &Place| fs::File::open(place.memory()).expect("a memory file");
    let [full, changed] = [open(&full), open(&changes)];
    let word = |file: &fs::File, at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("so long");
        u64::from_le_bytes(bytes)
    };
    // The guest has put each word's address there. The file has no hole: what lies at 4 GiB follows the third.
    for offset in (0..128 << 20).step_by(STRIDE as usize) {
        for file in [&full, &changed] {
            assert_eq!(word(file, 3 * GIB + offset), 4 * GIB + offset);
        }
    }
    assert_eq!(word(&changed, 3 * GIB - 8), 0);
}
