//! What a clone costs a machine: what it has written since the last one, and not what it has.

use std::time::Instant;

use lepton_tests::metal::Metal;
use lepton_tests::{Api, PATIENCE, Vmm};
use serde_json::json;

use crate::family::{Heir, clone, request};

/// What the guest has written before it is cloned, in MiB.
const WRITTEN: u64 = 200;
/// What it writes beside what it is told to: its stack.
const MORE: u64 = 256 << 10;

/// A machine whose guest writes the first `kib` of its memory again and again.
fn writing(kib: u64) -> (Vmm, Api) {
    let arguments = format!("probe.mode=churn probe.mib={WRITTEN} probe.kib={kib}");
    let machine = Metal::new("LEPTON_PROBE", &arguments).with_api();
    let shape = json!({ "vcpu_count": 1, "mem_size_mib": WRITTEN + 56, "clonable": true });
    let vmm = machine
        .with(|config| config["machine-config"] = shape)
        .start();
    vmm.stdout.wait_for("PROBE {\"mode\":\"churn\"");
    let api = vmm.api();
    (vmm, api)
}

/// Clones, and returns how many bytes were copied. The copy ends at once.
fn copied(api: &mut Api) -> u64 {
    let heir = Heir::called("copy");
    let mut request = request(&[heir.child()]);
    request["resume_children"] = false.into();
    let copied = clone(api, &request)["copied_bytes"].as_u64();
    copied.expect("a number of bytes")
}

fn wait_until_written(api: &mut Api, bytes: u64) {
    let deadline = Instant::now() + PATIENCE;
    while api.get("/vm/divergence")["memory"]["private_bytes"]
        .as_u64()
        .expect("this host has /proc")
        < bytes
    {
        assert!(Instant::now() < deadline, "the guest writes no more");
    }
}

pub fn a_clone_copies_what_was_written_since() {
    for kib in [64, 4096] {
        let (vmm, mut api) = writing(kib);
        let again = kib << 10;
        for number in 1..=10 {
            wait_until_written(&mut api, again);
            let copied = copied(&mut api);
            let since = match number {
                // What was written while memory was let go, if any.
                1 => 0..=again + MORE,
                _ => again..=again + MORE,
            };
            assert!(since.contains(&copied), "clone {number}: {copied} bytes");
        }
        api.reach("Paused");
        copied(&mut api);
        // Nothing was written since.
        assert_eq!(copied(&mut api), 0);
        vmm.terminate();
    }
}

pub fn much_memory_is_let_go_while_the_guest_writes() {
    // Nothing is copied if it is let go when the machine stands still. Otherwise what the guest writes meanwhile is, which may be
    // nothing if it has no processor then.
    let copied = (0..20).map(|_| copied(&mut writing(64).1));
    let copied = copied.into_iter().find(|copied| *copied > 0);
    let copied = copied.expect("something was written meanwhile");
    assert!(copied <= (64 << 10) + MORE, "{copied}");
}
