//! Machines that go on elsewhere, with what they had.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use lepton_tests::tap::Tap;
use serde_json::json;

use crate::place::{
    Place, check_counts, configure, let_run, load, paused, refusal, running, saved,
};
use lepton_tests::Vmm;

pub fn a_guest_goes_on_where_it_was() {
    for (vcpus, mib) in [(1, 128), (2, 4096)] {
        let place = Place::new();
        let (vmm, mut api) = paused(vcpus, mib);
        api.put("/snapshot/create", &place.create());
        let mut stream = vmm.terminate().stdout;
        let first = check_counts(&stream);
        assert!(first > 5, "{first}");
        // A snapshot of a snapshot, three times.
        for _ in 0..3 {
            let (vmm, mut api) = load(&place);
            assert_eq!(api.state(), "Running");
            let_run(&mut api);
            api.reach("Paused");
            api.put("/snapshot/create", &place.create());
            stream.extend(vmm.terminate().stdout);
        }
        // Not one tick is lost, and none comes twice.
        assert!(check_counts(&stream) > first + 20);
    }
}

/// What is made ready ahead is a machine of one size with one vCPU: others go on all the same.
pub fn a_guest_goes_on_in_a_process_that_expects_one() {
    for (vcpus, mib) in [(1, 128), (2, 128), (1, 130)] {
        let place = Place::new();
        let (vmm, mut api) = paused(vcpus, mib);
        api.put("/snapshot/create", &place.create());
        let mut stream = vmm.terminate().stdout;
        for verify in [true, false] {
            let builder = Vmm::builder();
            // Not on the guest's console.
            let log = builder.directory().join("log").into_os_string();
            let told = ["--expect-mem-mib", "128", "--log-path"].map(OsString::from);
            let vmm = builder.arguments(told).arguments([log]).spawn();
            let mut api = vmm.api();
            // A load that fails takes nothing of it.
            let mut wrong = place.load();
            wrong["mem_backend"]["backend_path"] = "/no/such/file".into();
            api.refused("PUT", "/snapshot/load", &wrong.to_string());
            let mut request = place.load();
            request["mem_backend"]["verify"] = verify.into();
            api.put("/snapshot/load", &request);
            let_run(&mut api);
            api.reach("Paused");
            api.put("/snapshot/create", &place.create());
            stream.extend(vmm.terminate().stdout);
        }
        assert!(check_counts(&stream) > 20);
    }
}

pub fn a_guest_goes_on_in_the_process_that_saved_it() {
    let place = Place::new();
    let (vmm, mut api) = running(1, 128, |_, _| ());
    for _ in 0..3 {
        let_run(&mut api);
        api.reach("Paused");
        api.put("/snapshot/create", &place.create());
        api.reach("Resumed");
    }
    let_run(&mut api);
    assert!(check_counts(&vmm.terminate().stdout) > 30);
}

pub fn a_saved_machine_has_its_devices() {
    let place = Place::new();
    let (image, socket) = (place.path("image"), place.path("v.sock"));
    fs::write(&image, [7; 4096]).expect("an image");
    let (vmm, mut api) = running(2, 256, |_, config| {
        let drive = |id: &str, root: bool| {
            json!({
                "drive_id": id, "path_on_host": image, "is_root_device": root, "is_read_only": true,
                "rate_limiter": { "ops": { "size": 10, "refill_time": 100 } },
            })
        };
        config["drives"] = json!([drive("data", false), drive("root", true)]);
        config["vsock"] = json!({ "guest_cid": 42, "uds_path": socket });
    });
    let_run(&mut api);
    api.reach("Paused");
    let mut before = api.get("/vm/config");
    api.put("/snapshot/create", &place.create());
    vmm.terminate();
    assert!(!socket.exists());

    let (vmm, mut api) = Vmm::quiet();
    let mut request = place.load();
    request["resume_vm"] = false.into();
    api.put("/snapshot/load", &request);
    assert_eq!(api.state(), "Paused");
    assert!(socket.exists());
    let after = api.get("/vm/config");
    // What is booted is not saved, and an engine that was not named has a name now.
    before["boot-source"] = after["boot-source"].clone();
    for drive in before["drives"].as_array_mut().expect("a list") {
        drive["io_engine"] = "Sync".into();
    }
    assert_eq!(after, before);
    assert_eq!(after["drives"][0]["drive_id"], "root");
    api.patch(
        "/drives/data",
        &json!({ "drive_id": "data", "path_on_host": image }),
    );
    api.reach("Resumed");
    let_run(&mut api);
    vmm.terminate();
    assert!(!socket.exists());
}

pub fn interfaces_get_other_taps() {
    let place = Place::new();
    let (one, two) = (Tap::new(None), Tap::new(None));
    let (vmm, mut api) = Vmm::quiet();
    configure(&vmm, &mut api, 1, 128);
    api.put(
        "/network-interfaces/eth0",
        &json!({ "iface_id": "eth0", "host_dev_name": one.name(), "mtu": 1400 }),
    );
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &place.create());
    // The first tap is still taken.
    let message = refusal(&place.load());
    assert!(message.contains(one.name()), "{message}");
    let mut request = place.load();
    request["network_overrides"] = json!([{ "iface_id": "eth0", "host_dev_name": two.name() }]);
    let (_vmm, mut api) = Vmm::quiet();
    api.put("/snapshot/load", &request);
    let config = api.get("/vm/config");
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], two.name());
    assert_eq!(config["network-interfaces"][0]["mtu"], 1400);
    let_run(&mut api);
    request["network_overrides"] = json!([{ "iface_id": "eth7", "host_dev_name": two.name() }]);
    let message = refusal(&request);
    assert!(message.contains("no interface eth7"), "{message}");
    drop(vmm);
}

pub fn devices_can_be_elsewhere() {
    let place = Place::new();
    let (vmm, mut api) = Vmm::quiet();
    configure(&vmm, &mut api, 1, 128);
    let image = place.path("image");
    fs::write(&image, [7; 4096]).expect("an image");
    let drive = json!({
        "drive_id": "data", "path_on_host": image, "is_root_device": false, "is_read_only": false,
    });
    api.put("/drives/data", &drive);
    let socket = place.path("v.sock");
    api.put("/vsock", &json!({ "guest_cid": 42, "uds_path": socket }));
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    api.put("/snapshot/create", &place.create());

    // The machine that was saved still has its socket.
    let message = refusal(&place.load());
    assert!(message.contains("v.sock"), "{message}");
    let (moved, smaller) = (place.path("moved"), place.path("smaller"));
    fs::rename(&image, &moved).expect("an image that moves");
    fs::write(&smaller, [7; 512]).expect("an image");
    let with = |drive: &str, path: &Path| {
        let mut request = place.load();
        request["vsock_override"] = json!({ "uds_path": place.path("w.sock") });
        request["drive_overrides"] = json!([{ "drive_id": drive, "path_on_host": path }]);
        request
    };
    for (request, reason) in [
        (
            with("nothing", &moved),
            "drive_overrides: the snapshot has no drive nothing",
        ),
        (with("data", &smaller), "1 sectors, the guest knows 8"),
        (with("data", &image), "image: No such file"),
    ] {
        let message = refusal(&request);
        assert!(message.contains(reason), "{message}");
    }
    assert!(!place.path("w.sock").exists());
    let (_vmm, mut api) = Vmm::quiet();
    api.put("/snapshot/load", &with("data", &moved));
    let config = api.get("/vm/config");
    assert_eq!(config["drives"][0]["path_on_host"], json!(moved));
    assert_eq!(config["vsock"]["uds_path"], json!(place.path("w.sock")));
    let_run(&mut api);
}

pub fn what_is_allowed_when() {
    let place = Place::new();
    saved(&place);
    let (create, load) = (place.create().to_string(), place.load().to_string());
    let (vmm, mut api) = Vmm::quiet();
    let early = "not supported before starting the microVM";
    assert!(
        api.refused("PUT", "/snapshot/create", &create)
            .contains(early)
    );
    configure(&vmm, &mut api, 1, 128);
    let message = api.refused("PUT", "/snapshot/load", &load);
    assert_eq!(
        message,
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
    );
    assert!(
        api.refused("PUT", "/snapshot/create", &create)
            .contains(early)
    );
    api.start();
    let message = api.refused("PUT", "/snapshot/create", &create);
    assert!(message.contains("Paused"), "{message}");
    let late = "not supported after starting the microVM";
    assert!(api.refused("PUT", "/snapshot/load", &load).contains(late));
    api.reach("Paused");
    assert!(api.refused("PUT", "/snapshot/load", &load).contains(late));
    api.put("/snapshot/create", &place.create());
    let same = json!({ "snapshot_path": "/tmp/x", "mem_file_path": "/tmp/x" });
    let message = api.refused("PUT", "/snapshot/create", &same.to_string());
    assert!(message.contains("both /tmp/x"), "{message}");

    // Log, metrics and console are no part of the machine.
    let (vmm, mut api) = Vmm::quiet();
    let metrics = vmm.path("metrics");
    api.put("/metrics", &json!({ "metrics_path": metrics }));
    let console = vmm.path("console");
    api.put("/serial", &json!({ "serial_out_path": console }));
    api.put("/snapshot/load", &place.load());
    let_run(&mut api);
    assert!(api.refused("PUT", "/snapshot/load", &load).contains(late));
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    assert!(api.refused("PUT", "/actions", &start).contains(late));
    assert!(fs::metadata(console).expect("a console").len() > 0);
}
