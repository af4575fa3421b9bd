//! Host errors under copies.

use std::fs::{self, File};
use std::path::Path;

use lepton_tests::Api;
use lepton_tests::metal::Metal;
use lepton_tests::small::SmallFileSystem;
use serde_json::json;

use crate::family::{Heir, clone, request};

const MIB: u64 = 1 << 20;
const READS: &str = "lepton_block_read_count";
const WRITES: &str = "lepton_block_write_count";
const FAILS: &str = "lepton_block_execute_fails";

/// A guest that works on a drive of 4 MiB for ever, in requests of 64 KiB to anywhere: an overlay over `base`.
fn machine(mode: &str, engine: &str) -> Metal {
    let arguments = format!(
        "probe.mode={mode} probe.pattern=random probe.size=65536 probe.qd=4 probe.seconds=3600"
    );
    let metal = Metal::new("LEPTON_PROBE", &arguments).with_api();
    let (base, own) = (metal.path("base"), metal.path("own"));
    fs::write(&base, vec![7; 4 * MIB as usize]).expect("a base");
    metal.with(|config| {
        config["machine-config"]["mem_size_mib"] = 32.into();
        config["drives"] = json!([{
            "drive_id": "d", "path_on_host": base, "is_root_device": false, "is_read_only": false,
            "cache_type": "Writeback", "io_engine": engine, "overlay": { "path": own },
        }]);
    })
}

#[track_caller]
fn wait_for_some(api: &mut Api, counter: &str, more: u64) {
    let before = api.counter(counter);
    api.wait_for_more(counter, before + more);
}

pub fn a_copys_full_disk_is_an_error_to_it_alone() {
    for engine in ["Sync", "Async"] {
        let small = SmallFileSystem::of_mib(1);
        let vmm = machine("blk_write", engine).start();
        let mut api = vmm.api();
        wait_for_some(&mut api, WRITES, 10);
        let mut heirs = ["small", "large"].map(Heir::called);
        let mut children = heirs.each_ref().map(Heir::child);
        children[0]["overlays"] = json!([{ "drive_id": "d", "path": small.path("own") }]);
        clone(&mut api, &request(&children));
        let [small, large] = &mut heirs;
        wait_for_some(&mut small.api, FAILS, 20);
        // What has a place already can be written again.
        wait_for_some(&mut small.api, WRITES, 20);
        assert_eq!(small.api.state(), "Running", "{engine}");
        for api in [&mut api, &mut large.api] {
            wait_for_some(api, WRITES, 100);
            assert_eq!(api.counter(FAILS), 0, "{engine}");
        }
        vmm.terminate();
    }
}

pub fn an_image_that_is_cut_is_an_error_to_all_copies() {
    for engine in ["Sync", "Async"] {
        let vmm = machine("blk_read", engine).start();
        let mut api = vmm.api();
        let mut heir = Heir::called("copy");
        clone(&mut api, &request(&[heir.child()]));
        let base = vmm.path("base");
        let image = File::options().write(true).open(Path::new(&base));
        let image = image.expect("an image");
        image.set_len(MIB).expect("an image can be cut");
        for api in [&mut api, &mut heir.api] {
            wait_for_some(api, FAILS, 100);
            assert_eq!(api.state(), "Running", "{engine}");
        }
        image.set_len(4 * MIB).expect("an image can grow");
        for api in [&mut api, &mut heir.api] {
            // What was under way has ended by the time that others have.
            wait_for_some(api, READS, 100);
            let failed = api.counter(FAILS);
            wait_for_some(api, READS, 1000);
            assert_eq!(api.counter(FAILS), failed, "{engine}");
        }
        vmm.terminate();
    }
}
