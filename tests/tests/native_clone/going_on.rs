//! Copies that go on where the machine was, and the machine itself.

use std::os::unix::fs::MetadataExt;

use lepton_tests::Vmm;
use lepton_tests::counting::{check_counts, check_tail, configure, let_run};
use serde_json::json;
use tempfile::TempDir;

use crate::family::{Heir, clone, family, parent, request, said};

pub fn a_copy_goes_on_where_the_machine_was() {
    for (mib, clonable) in [(128, true), (128, false), (4096, true)] {
        let (vmm, mut api) = parent(mib, clonable);
        api.reach("Paused");
        let mut heir = Heir::called("copy-1");
        let answer = clone(&mut api, &request(&[heir.child()]));
        assert_eq!(answer["children"][0]["id"], "copy-1");
        assert_eq!(answer["children"][0]["pid"], json!(heir.vmm.pid()));
        assert_eq!(api.state(), "Paused");
        assert_eq!(heir.api.state(), "Running");
        let before = said(&vmm);
        // The copy goes on, and nothing of that shows in the machine, nor the other way.
        let_run(&mut heir.api);
        api.reach("Resumed");
        let_run(&mut api);
        let_run(&mut heir.api);
        let mut stream = before.clone();
        stream.extend(heir.vmm.terminate().stdout);
        assert!(check_counts(&stream) > 10);
        assert!(check_counts(&said(&vmm)) > 10);
    }
}

/// 4096 MiB are in two parts, with a hole between them.
pub fn who_expects_a_size_takes_any() {
    for mib in [128, 4096] {
        let (vmm, mut api) = parent(mib, true);
        api.reach("Paused");
        let before = said(&vmm);
        let expected = [mib, mib / 2, mib * 2];
        for other in expected {
            let mut heir = Heir::expecting("copy", other);
            clone(&mut api, &request(&[heir.child()]));
            let_run(&mut heir.api);
            let config = heir.api.get("/vm/config");
            assert_eq!(config["machine-config"]["mem_size_mib"], mib);
            let slow = std::fs::read_to_string(heir.vmm.path("log")).expect("a log");
            let slow = slow.contains("another machine was made ready for");
            assert_eq!(slow, other != mib);
            let mut stream = before.clone();
            stream.extend(heir.vmm.terminate().stdout);
            assert!(check_counts(&stream) > 10);
        }
    }
}

/// It has made itself ready for a copy, and boots a machine itself.
pub fn who_expects_a_copy_may_boot() {
    for mib in [128, 64] {
        let mut heir = Heir::expecting("boots", 128);
        configure(&heir.vmm, &mut heir.api, 2, mib);
        heir.api.start();
        let_run(&mut heir.api);
        assert!(check_counts(&heir.vmm.terminate().stdout) > 10);
    }
}

pub fn twenty_copies_of_a_machine_that_runs() {
    let (vmm, mut api) = parent(128, true);
    let mut heirs = family(20);
    let children: Vec<_> = heirs.iter().map(Heir::child).collect();
    let answer = clone(&mut api, &request(&children));
    let ids = answer["children"].as_array().expect("a list");
    assert_eq!(ids.len(), 20);
    for (number, child) in ids.iter().enumerate() {
        assert_eq!(child["id"], format!("copy-{number}"));
    }
    assert_eq!(api.state(), "Running");
    for heir in &mut heirs {
        assert_eq!(heir.api.state(), "Running");
        let_run(&mut heir.api);
        heir.api.reach("Paused");
    }
    let_run(&mut api);
    for heir in heirs {
        check_tail(&heir.vmm.terminate().stdout);
    }
    check_counts(&said(&vmm));
}

pub fn a_machine_is_cloned_again_and_again() {
    for clonable in [true, false] {
        let (vmm, mut api) = parent(128, clonable);
        for heir in &mut family(10) {
            clone(&mut api, &request(&[heir.child()]));
            let_run(&mut api);
            let_run(&mut heir.api);
            heir.api.reach("Paused");
        }
        assert!(check_counts(&said(&vmm)) > 100);
    }
}

pub fn copies_of_copies() {
    let (_vmm, mut api) = parent(128, true);
    // More than a base has files.
    let mut line = family(40);
    let mut streams = Vec::new();
    for heir in &mut line {
        clone(&mut api, &request(&[heir.child()]));
        let_run(&mut heir.api);
        api.reach("Paused");
        api = heir.vmm.api();
    }
    for heir in line {
        streams.push(heir.vmm.terminate().stdout);
    }
    // Each begins where the one before it was cloned: no earlier than that one began.
    let mut first = 0;
    for stream in &streams {
        let begins = check_tail(stream);
        assert!(begins >= first, "{begins} {first}");
        first = begins;
    }
}

pub fn copies_wait_if_they_are_to() {
    let (_vmm, mut api) = parent(128, true);
    let mut heir = Heir::called("copy");
    let mut request = request(&[heir.child()]);
    request["resume_children"] = false.into();
    clone(&mut api, &request);
    assert_eq!(heir.api.state(), "Paused");
    assert_eq!(
        heir.api.get("/vm/config")["machine-config"]["mem_size_mib"],
        128
    );
    heir.api.reach("Resumed");
    let_run(&mut heir.api);
    check_tail(&heir.vmm.terminate().stdout);
}

pub fn a_copy_can_be_saved() {
    let place = TempDir::new().expect("a temporary directory");
    let (state, memory) = (place.path().join("state"), place.path().join("memory"));
    let (vmm, mut api) = parent(128, true);
    let mut heir = Heir::called("copy");
    clone(&mut api, &request(&[heir.child()]));
    let_run(&mut heir.api);
    let_run(&mut api);
    // The copy and the machine itself: both are on a base now.
    for (api, console) in [(&mut heir.api, None), (&mut api, Some(&vmm))] {
        api.reach("Paused");
        api.put(
            "/snapshot/create",
            &json!({ "snapshot_path": state, "mem_file_path": memory }),
        );
        let size = memory.metadata().expect("a file").blocks() * 512;
        assert!(size < 8 << 20, "holes are gone: {size}");
        let (loaded, mut loaded_api) = Vmm::quiet();
        loaded_api.put(
            "/snapshot/load",
            &json!({
                "snapshot_path": state, "resume_vm": true,
                "mem_backend": { "backend_type": "File", "backend_path": memory, "verify": false },
            }),
        );
        let_run(&mut loaded_api);
        let stream = loaded.terminate().stdout;
        check_tail(&stream);
        if let Some(vmm) = console {
            check_counts(&[said(vmm), stream].concat());
        }
        api.reach("Resumed");
        let_run(api);
    }
}
