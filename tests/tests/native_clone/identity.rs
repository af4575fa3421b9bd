//! Copies that are to be others, of a guest that cannot be told.

use lepton_tests::counting::{configure, let_run};
use lepton_tests::{Api, Vmm};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::family::{Heir, request};

/// A machine that runs, with a vsock of which its guest knows nothing.
fn deaf() -> (Vmm, Api) {
    let (vmm, mut api) = Vmm::quiet();
    configure(&vmm, &mut api, 1, 128);
    api.put(
        "/vsock",
        &json!({ "guest_cid": 42, "uds_path": vmm.path("v.sock") }),
    );
    api.start();
    let_run(&mut api);
    (vmm, api)
}

fn child(heir: &Heir, identity: Value) -> Value {
    let mut child = heir.child();
    child["vsock_override"] = json!({ "uds_path": heir.vmm.path("v.sock") });
    child["identity"] = identity;
    child
}

pub fn a_guest_that_does_not_confirm_is_no_copy() {
    let (vmm, mut api) = deaf();
    let heirs = [Heir::called("one"), Heir::called("two")];
    let identity = json!({ "timeout_ms": 300 });
    // One would be a copy as it is; it is none either.
    let mut plain = heirs[0].child();
    plain["vsock_override"] = json!({ "uds_path": heirs[0].vmm.path("v.sock") });
    let children = request(&[plain, child(&heirs[1], identity)]);
    let message = api.refused("PUT", "/clone", &children.to_string());
    assert!(
        message.contains("did not answer on vsock port 1026 within 300ms"),
        "{message}"
    );
    assert!(message.contains("adopt.sock"), "{message}");
    for heir in heirs {
        drop(heir.api);
        heir.vmm.wait().expect_code(1);
    }
    let_run(&mut api);
    vmm.terminate();
}

pub fn identities_that_are_none_are_named() {
    let (_vmm, mut api) = deaf();
    let mut heir = Heir::called("copy");
    for (identity, reason) in [
        (json!({ "hostname": "a b" }), "hostname"),
        (json!({ "machine_id": "12" }), "machine_id"),
        (json!({ "timeout_ms": 0 }), "timeout_ms 0"),
        (json!({ "timeout_ms": 600_001 }), "timeout_ms 600001"),
        (
            json!({ "interfaces": [{ "iface_id": "eth7" }] }),
            "no interface eth7",
        ),
        (
            json!({ "interfaces": [{ "iface_id": "e", "address": "10.0.0.1" }] }),
            "address",
        ),
        (
            json!({ "interfaces": [{ "iface_id": "e", "gateway": "10.0.0.1" }] }),
            "gateway",
        ),
    ] {
        let body = request(&[child(&heir, identity)]).to_string();
        let message = api.refused("PUT", "/clone", &body);
        assert!(message.contains(reason), "{reason}: {message}");
        // It waits for another.
        assert_eq!(heir.api.state(), "Not started");
    }
}

pub fn a_machine_is_not_loaded_as_another_unless_its_guest_confirms() {
    let place = TempDir::new().expect("a temporary directory");
    let (state, memory) = (place.path().join("state"), place.path().join("memory"));
    let (vmm, mut api) = deaf();
    api.reach("Paused");
    api.put(
        "/snapshot/create",
        &json!({ "snapshot_path": state, "mem_file_path": memory }),
    );
    let (loaded, mut loaded_api) = Vmm::quiet();
    let load = json!({
        "snapshot_path": state, "resume_vm": true, "identity": { "timeout_ms": 300 },
        "vsock_override": { "uds_path": loaded.path("v.sock") }, "enable_diff_snapshots": true,
        "mem_backend": { "backend_type": "File", "backend_path": memory, "verify": false },
    });
    let message = loaded_api.refused("PUT", "/snapshot/load", &load.to_string());
    assert!(message.contains("within 300ms"), "{message}");
    // As of any request, what is deprecated in it is counted.
    let (_, metrics) = loaded_api.request("GET", "/metrics", "");
    let counter = "lepton_deprecated_api_deprecated_http_api_calls_total";
    assert!(
        metrics
            .lines()
            .any(|line| line.starts_with(counter) && line.ends_with(" 1")),
        "{metrics}"
    );
    // It has run, and is nobody now: it stands still.
    assert_eq!(loaded_api.state(), "Paused");
    let resume = json!({ "state": "Resumed" }).to_string();
    let message = loaded_api.refused("PATCH", "/vm", &resume);
    assert!(message.contains("held"), "{message}");
    loaded.terminate();
    vmm.terminate();
}
