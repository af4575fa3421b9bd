//! A host's file system that is full, and images that are cut.

use std::fs::File;
use std::process::Command;

use lepton_tests::metal::{Metal, pattern, results};
use lepton_tests::small::SmallFileSystem;
use lepton_tests::{Api, programs};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// A guest writes four times as much as there is room for: what does not fit is an error of those requests, and of no
/// others. A request of 64 KiB that fits in part is a short write to the VMM.
pub fn a_full_file_system_is_an_error_to_the_guest_and_no_more() {
    for (engine, has_overlay) in [
        ("Sync", false),
        ("Async", false),
        ("Sync", true),
        ("Async", true),
    ] {
        let small = SmallFileSystem::of_mib(1);
        let image = small.image("disk", 4 * MIB);
        let overlay = small.path("overlay");
        let arguments = "probe.mode=blk_write,blk_read probe.size=65536 probe.count=64 probe.qd=4";
        let metal = Metal::new("LEPTON_PROBE", arguments).with(|config| {
            config["machine-config"]["mem_size_mib"] = 32.into();
            config["drives"] = json!([{
                "drive_id": "d", "path_on_host": image, "is_root_device": false,
                "is_read_only": false, "cache_type": "Writeback", "io_engine": engine,
            }]);
            if has_overlay {
                config["drives"][0]["overlay"] = json!({ "path": overlay });
            }
        });
        let text = metal.run().text();
        let told = results("PROBE ", &text);
        assert_eq!(told.len(), 2, "{text}");
        let number = |at: usize, name: &str| told[at][name].as_u64().expect("a number");
        // A MiB has room for 16, less what the overlay itself needs.
        assert_eq!((number(0, "ops"), number(1, "ops")), (64, 64), "{text}");
        assert!(
            (48..64).contains(&number(0, "errors")),
            "{engine}, {has_overlay}: {text}"
        );
        assert_eq!(
            number(1, "errors"),
            0,
            "what cannot be written can be read: {text}"
        );
        if has_overlay {
            let checked = Command::new(programs::vmm())
                .args(["overlay", "check"])
                .arg(&overlay)
                .arg("--base")
                .arg(&image)
                .output()
                .expect("the VMM can be run");
            assert!(checked.status.success(), "{checked:?}");
        }
    }
}

#[track_caller]
fn wait_for_some(api: &mut Api, counter: &str, more: u64) {
    let before = api.counter(counter);
    api.wait_for_more(counter, before + more);
}

/// Somebody cuts an image under a running machine: what lies behind its end is an error to the guest while it is missing.
pub fn an_image_that_is_cut_is_an_error_to_the_guest_and_no_more() {
    const READS: &str = "lepton_block_read_count";
    const FAILS: &str = "lepton_block_execute_fails";
    for engine in ["Sync", "Async"] {
        let arguments = "probe.mode=blk_read probe.pattern=random probe.qd=4 probe.seconds=3600";
        let mut metal = Metal::new("LEPTON_PROBE", arguments).with_api();
        let image = metal.drive("d", engine, &pattern(1, 4 * MIB as usize));
        let vmm = metal.start();
        let mut api = vmm.api();
        let file = File::options().write(true).open(&image).expect("an image");
        for _ in 0..3 {
            wait_for_some(&mut api, READS, 100);
            file.set_len(MIB).expect("an image can be cut");
            wait_for_some(&mut api, FAILS, 100);
            assert_eq!(api.state(), "Running", "{engine}");
            file.set_len(4 * MIB).expect("an image can grow");
            // What was under way has ended by the time that others have.
            wait_for_some(&mut api, READS, 100);
            let failed = api.counter(FAILS);
            wait_for_some(&mut api, READS, 1000);
            assert_eq!(api.counter(FAILS), failed, "{engine}");
        }
        vmm.terminate();
    }
}
