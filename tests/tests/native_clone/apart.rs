//! Copies that have nothing to do with each other.

use lepton_tests::counting::let_run;
use lepton_tests::tap::Tap;
use rustix::process::Signal;
use serde_json::json;

use crate::family::{Heir, clone, family, parent, request};

pub fn whoever_is_killed_the_others_go_on() {
    let (vmm, mut api) = parent(128, true);
    let mut heirs = family(4);
    let children: Vec<_> = heirs.iter().map(Heir::child).collect();
    clone(&mut api, &request(&children));
    let dead = heirs.pop().expect("a copy");
    let_run(&mut heirs[0].api);
    dead.vmm.signal(Signal::KILL);
    dead.vmm.wait_for_fault();
    let_run(&mut api);
    vmm.signal(Signal::KILL);
    vmm.wait_for_fault();
    for heir in &mut heirs {
        let_run(&mut heir.api);
    }
    // And can be cloned in turn.
    let mut next = Heir::called("next");
    clone(&mut heirs[0].api, &request(&[next.child()]));
    let_run(&mut next.api);
}

pub fn devices_of_copies_are_elsewhere() {
    let (one, two) = (Tap::new(None), Tap::new(None));
    let (vmm, mut api) = lepton_tests::Vmm::quiet();
    lepton_tests::counting::configure(&vmm, &mut api, 1, 128);
    let image = vmm.file("image", &[7; 4096]);
    for (id, read_only) in [("fixed", true), ("data", false)] {
        let drive = json!({
            "drive_id": id, "path_on_host": image, "is_root_device": false, "is_read_only": read_only,
        });
        api.put(&format!("/drives/{id}"), &drive);
    }
    let interface = json!({ "iface_id": "eth0", "host_dev_name": one.name() });
    api.put("/network-interfaces/eth0", &interface);
    api.put(
        "/vsock",
        &json!({ "guest_cid": 42, "uds_path": vmm.path("v.sock") }),
    );
    api.start();
    let_run(&mut api);

    let mut heir = Heir::called("copy");
    let mut child = heir.child();
    let message = api.refused("PUT", "/clone", &request(&[child.clone()]).to_string());
    assert!(
        message.contains("drive data can be written to"),
        "{message}"
    );
    let moved = vmm.file("moved", &[7; 4096]);
    child["drive_overrides"] = json!([{ "drive_id": "data", "path_on_host": moved }]);
    let message = api.refused("PUT", "/clone", &request(&[child.clone()]).to_string());
    assert!(message.contains(one.name()), "{message}");
    let tap = json!([{ "iface_id": "eth0", "host_dev_name": two.name() }]);
    child["network_overrides"] = tap;
    let message = api.refused("PUT", "/clone", &request(&[child.clone()]).to_string());
    assert!(message.contains("v.sock"), "{message}");
    child["vsock_override"] = json!({ "uds_path": heir.vmm.path("w.sock") });
    assert_eq!(heir.api.state(), "Not started");
    clone(&mut api, &request(&[child]));
    let config = heir.api.get("/vm/config");
    let drives = config["drives"].as_array().expect("a list");
    let path = |id: &str| {
        let drive = drives.iter().find(|drive| drive["drive_id"] == id);
        drive.expect("the drive")["path_on_host"].clone()
    };
    assert_eq!((path("fixed"), path("data")), (json!(image), json!(moved)));
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], two.name());
    assert_eq!(config["vsock"]["uds_path"], heir.vmm.path("w.sock"));
    let_run(&mut heir.api);
    let_run(&mut api);
    heir.vmm.terminate();
    vmm.terminate();
}
