//! The API over a machine's life.

use std::fs;
use std::process::{Command, ExitCode};

use lepton_tests::guest::{Entry, Program};
use lepton_tests::origin::running;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::{Vmm, test};
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(the_states_of_a_machine),
            test!(versions),
            test!(machine_config_is_what_was_put_and_patched),
            test!(vm_config_is_what_was_configured_and_boots_again),
            test!(a_paused_guest_stands_still).of_every_origin(),
            test!(pausing_twice_is_no_error).of_every_origin(),
            test!(every_vcpu_stops_and_goes_on).of_every_origin(),
            test!(what_is_too_early),
            test!(what_is_too_late).of_every_origin(),
            test!(ctrl_alt_del_is_typed_until_the_guest_does_not_read).of_every_origin(),
            test!(rate_limits_are_patched).of_every_origin(),
            test!(a_drive_is_replaced_before_the_start),
            test!(an_interface_and_its_tap)
                .needs(Need::Root)
                .needs(Need::Program("ip")),
            test!(rate_limits_of_an_interface_are_patched)
                .needs(Need::Root)
                .needs(Need::Program("ip"))
                .of_every_origin(),
            test!(curl_drives_a_machine).needs(Need::Program("curl")),
        ],
    )
}

/// What [`Program::tick`] makes grow.
const TICKS: &str = "lepton_vcpu_exit_io_out";

fn the_states_of_a_machine() {
    let builder = Vmm::builder().arguments(["--id", "machine-7"]);
    let vmm = builder.spawn();
    let mut api = vmm.api();
    let kernel = Program::tick().write(vmm.directory(), Entry::Linux64);
    assert_eq!(api.get("/")["id"], "machine-7");
    assert_eq!(api.state(), "Not started");
    api.put("/boot-source", &json!({ "kernel_image_path": kernel }));
    assert_eq!(api.state(), "Not started");
    api.start();
    assert_eq!(api.state(), "Running");
    api.reach("Paused");
    assert_eq!(api.state(), "Paused");
    api.reach("Resumed");
    assert_eq!(api.state(), "Running");
    vmm.terminate();
}

fn versions() {
    let (vmm, mut api) = Vmm::with_api();
    let info = api.get("/");
    assert!(info["vmm_version"].is_string(), "{info}");
    assert!(info["app_name"].is_string(), "{info}");
    let version = api.get("/version");
    let version = version["firecracker_version"].as_str().unwrap_or("");
    assert!(version.starts_with("1.17."), "{version:?}");
    vmm.terminate();
}

fn machine_config_is_what_was_put_and_patched() {
    let (vmm, mut api) = Vmm::with_api();
    let mut expected = json!({
        "vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false, "huge_pages": "None",
    });
    assert_eq!(api.get("/machine-config"), expected);
    let put = json!({ "vcpu_count": 2, "mem_size_mib": 256, "smt": true });
    api.put("/machine-config", &put);
    for (key, value) in put.as_object().expect("an object") {
        expected[key] = value.clone();
    }
    assert_eq!(api.get("/machine-config"), expected);
    api.patch("/machine-config", &json!({ "mem_size_mib": 512 }));
    expected["mem_size_mib"] = 512.into();
    assert_eq!(api.get("/machine-config"), expected);
    // A refused change changes nothing, not even the part that could have been.
    let bad = json!({ "vcpu_count": 4, "mem_size_mib": 0 }).to_string();
    api.refused("PATCH", "/machine-config", &bad);
    assert_eq!(api.get("/machine-config"), expected);
    vmm.terminate();
}

fn vm_config_is_what_was_configured_and_boots_again() {
    let (vmm, mut api, kernel) = Vmm::with_kernel(&Program::power_off());
    let disk = vmm.sparse_file("disk", 1 << 20);
    let config = json!({
        "boot-source": { "kernel_image_path": kernel, "boot_args": "quiet" },
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 64 },
        "drives": [
            { "drive_id": "data", "path_on_host": disk, "is_root_device": false, "io_engine": "Async",
              "rate_limiter": { "ops": { "size": 5, "refill_time": 100 } } },
            { "drive_id": "root", "path_on_host": kernel, "is_root_device": true, "is_read_only": true },
        ],
        "vsock": { "guest_cid": 3, "uds_path": vmm.path("v.sock") },
    });
    api.configure(&config);
    let mut told = api.get("/vm/config");
    // The root device comes first: it is the guest's first drive.
    assert_eq!(told["drives"][0]["drive_id"], "root");
    assert_eq!(told["drives"][1]["rate_limiter"]["ops"]["size"], 5);
    assert_eq!(told["machine-config"], api.get("/machine-config"));
    assert_eq!(told["vsock"]["guest_cid"], 3);
    assert_eq!(told["boot-source"]["boot_args"], "quiet");
    drop(api);
    vmm.terminate();

    // The first VMM's directory is gone: the same machine elsewhere.
    let builder = Vmm::builder();
    let kernel = Program::power_off().write(builder.directory(), Entry::Linux64);
    let disk = builder.directory().join("disk");
    fs::write(&disk, [0; 4096]).expect("a file can be written");
    told["boot-source"]["kernel_image_path"] = json!(kernel);
    told["drives"][0]["path_on_host"] = json!(kernel);
    told["drives"][1]["path_on_host"] = json!(disk);
    told["vsock"]["uds_path"] = json!(builder.directory().join("v.sock"));
    let vmm = builder.config(&told).without_api().spawn();
    vmm.wait().expect_code(160);
}

fn a_paused_guest_stands_still() {
    let (vmm, mut api) = running(&Program::tick(), |_, _| ());
    api.wait_for_more(TICKS, 0);
    for _ in 0..10 {
        api.reach("Paused");
        let still = api.counter(TICKS);
        // Many requests long, each of which gives a running guest the time for an exit.
        for _ in 0..100 {
            assert_eq!(api.counter(TICKS), still);
        }
        api.reach("Resumed");
        api.wait_for_more(TICKS, still);
    }
    vmm.terminate();
}

fn pausing_twice_is_no_error() {
    // A guest that never leaves by itself, and one that sleeps: both are stopped and let go.
    for program in [Program::spin(), Program::halt()] {
        let (vmm, mut api) = running(&program, |_, _| ());
        for _ in 0..3 {
            api.reach("Resumed");
            api.reach("Paused");
            api.reach("Paused");
            assert_eq!(api.state(), "Paused");
            api.reach("Resumed");
        }
        assert_eq!(api.state(), "Running");
        api.reach("Paused");
        // A paused machine ends on a signal as any other.
        vmm.terminate();
    }
}

fn every_vcpu_stops_and_goes_on() {
    let (vmm, mut api) = running(&Program::tick(), |_, config| {
        config["machine-config"] = json!({ "vcpu_count": 32, "mem_size_mib": 64 });
    });
    for _ in 0..20 {
        api.wait_for_more(TICKS, 0);
        api.reach("Paused");
        api.reach("Resumed");
    }
    vmm.terminate();
}

const TOO_EARLY: &str = "not supported before starting the microVM";
const TOO_LATE: &str = "not supported after starting the microVM";

fn what_is_too_early() {
    let (vmm, mut api, _) = Vmm::with_kernel(&Program::tick());
    let disk = vmm.sparse_file("disk", 1 << 20);
    let drive = json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false });
    api.put("/drives/d", &drive);
    for (method, path, body) in [
        ("PUT", "/actions", action("SendCtrlAltDel")),
        ("PUT", "/actions", action("FlushMetrics")),
        ("PATCH", "/vm", json!({ "state": "Paused" })),
        ("PATCH", "/vm", json!({ "state": "Resumed" })),
        (
            "PATCH",
            "/drives/d",
            json!({ "drive_id": "d", "path_on_host": disk }),
        ),
        ("PATCH", "/network-interfaces/n", json!({ "iface_id": "n" })),
    ] {
        let message = api.refused(method, path, &body.to_string());
        assert!(message.contains(TOO_EARLY), "{method} {path}: {message}");
    }
    vmm.terminate();
}

fn action(name: &str) -> Value {
    json!({ "action_type": name })
}

fn what_is_too_late() {
    let (vmm, mut api) = running(&Program::tick(), |_, _| ());
    let source = json!({ "kernel_image_path": vmm.path("kernel") });
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 64 });
    let drive =
        json!({ "drive_id": "d", "path_on_host": vmm.path("kernel"), "is_root_device": false });
    let interface = json!({ "iface_id": "n", "host_dev_name": "no-such-tap" });
    let vsock = json!({ "guest_cid": 3, "uds_path": vmm.path("v.sock") });
    let load = json!({
        "snapshot_path": "s", "mem_backend": { "backend_type": "File", "backend_path": "m" },
    });
    let after = [
        ("PUT", "/actions", action("InstanceStart")),
        ("PUT", "/boot-source", source),
        ("PUT", "/machine-config", machine.clone()),
        ("PATCH", "/machine-config", machine),
        ("PUT", "/cpu-config", json!({})),
        ("PUT", "/drives/d", drive),
        ("PUT", "/network-interfaces/n", interface),
        ("PUT", "/vsock", vsock),
        ("PUT", "/serial", json!({})),
        ("PUT", "/logger", json!({})),
        ("PUT", "/metrics", json!({ "metrics_path": vmm.path("m") })),
        ("PUT", "/snapshot/load", load),
    ];
    for state in ["Resumed", "Paused"] {
        api.reach(state);
        for (method, path, body) in &after {
            let message = api.refused(method, path, &body.to_string());
            assert!(message.contains(TOO_LATE), "{method} {path}: {message}");
        }
    }
    assert!(!fs::exists(vmm.path("v.sock")).unwrap_or(true));
    vmm.terminate();
}

fn ctrl_alt_del_is_typed_until_the_guest_does_not_read() {
    let (vmm, mut api) = running(&Program::spin(), |_, _| ());
    // This guest never reads its keyboard, whose buffer has room for a few keys.
    let body = json!({ "action_type": "SendCtrlAltDel" }).to_string();
    let mut replies = Vec::new();
    for _ in 0..8 {
        replies.push(api.request("PUT", "/actions", &body));
    }
    assert_eq!(replies[0].0, 204, "{replies:?}");
    let (status, message) = &replies[7];
    assert_eq!(*status, 400, "{message}");
    assert!(message.contains("SendCtrlAltDel"), "{message}");
    assert_eq!(api.state(), "Running");
    vmm.terminate();
}

fn rate_limits_are_patched() {
    let (vmm, mut api) = running(&Program::tick(), |_, config| {
        let image = config["boot-source"]["kernel_image_path"].clone();
        config["drives"] = json!([{
            "drive_id": "d", "path_on_host": image, "is_root_device": false, "is_read_only": true,
            "rate_limiter": { "bandwidth": { "size": 1000, "refill_time": 10 }, "ops": { "size": 7, "refill_time": 10 } },
        }]);
    });
    let patch = json!({ "drive_id": "d", "rate_limiter": { "bandwidth": { "size": 2000, "refill_time": 20 } } });
    api.patch("/drives/d", &patch);
    let config = api.get("/vm/config");
    let limiter = &config["drives"][0]["rate_limiter"];
    assert_eq!(limiter["bandwidth"]["size"], 2000);
    assert_eq!(
        limiter["ops"]["size"], 7,
        "a bucket that is not named stays"
    );
    let unknown = json!({ "drive_id": "other", "path_on_host": vmm.path("kernel") }).to_string();
    let message = api.refused("PATCH", "/drives/other", &unknown);
    assert!(message.contains("other"), "{message}");
    vmm.terminate();
}

fn a_drive_is_replaced_before_the_start() {
    let (vmm, mut api, _) = Vmm::with_kernel(&Program::power_off());
    let open_files = vmm.open_files();
    for round in 0..10 {
        let disk = vmm.sparse_file(&format!("disk{round}"), 1 << 20);
        let drive = json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": true });
        api.put("/drives/d", &drive);
        let config = api.get("/vm/config");
        assert_eq!(config["drives"].as_array().map(Vec::len), Some(1));
        assert_eq!(config["drives"][0]["path_on_host"], json!(disk));
    }
    let with_one = vmm.open_files();
    assert!(with_one > open_files, "the drive is open");
    let disk = vmm.sparse_file("last", 1 << 20);
    let drive = json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": true });
    api.put("/drives/d", &drive);
    assert_eq!(vmm.open_files(), with_one, "replaced drives are closed");
    // A replacement that cannot be leaves the old one.
    let bad = json!({ "drive_id": "d", "path_on_host": "/no/such/disk", "is_root_device": true });
    api.refused("PUT", "/drives/d", &bad.to_string());
    assert_eq!(
        api.get("/vm/config")["drives"][0]["path_on_host"],
        json!(disk)
    );
    api.start_short_life();
    vmm.wait().expect_code(160);
}

fn an_interface_and_its_tap() {
    let tap = Tap::new(None);
    let interface = |id: &str, mac: &str| json!({ "iface_id": id, "host_dev_name": tap.name(), "guest_mac": mac });
    let (vmm, mut api, _) = Vmm::with_kernel(&Program::tick());
    api.put(
        "/network-interfaces/n",
        &interface("n", "06:00:00:00:00:01"),
    );
    // The same interface again: its own tap is not in its way.
    api.put(
        "/network-interfaces/n",
        &interface("n", "06:00:00:00:00:02"),
    );
    let config = api.get("/vm/config");
    assert_eq!(
        config["network-interfaces"][0]["guest_mac"],
        "06:00:00:00:00:02"
    );
    let second = interface("m", "06:00:00:00:00:03").to_string();
    let message = api.refused("PUT", "/network-interfaces/m", &second);
    assert!(message.contains(tap.name()), "{message}");
    // Another process cannot have it either, and says so.
    let (other, mut other_api) = Vmm::with_api();
    let open_files = other.open_files();
    let message = other_api.refused("PUT", "/network-interfaces/m", &second);
    assert!(message.contains(tap.name()), "{message}");
    assert_eq!(other.open_files(), open_files);
    other.terminate();
    api.start();
    vmm.terminate();
}

fn rate_limits_of_an_interface_are_patched() {
    let tap = Tap::new(None);
    let (vmm, mut api) = running(&Program::tick(), |_, config| {
        config["network-interfaces"] = json!([{
            "iface_id": "n", "host_dev_name": tap.name(), "mtu": 1400,
            "tx_rate_limiter": { "bandwidth": { "size": 1000, "refill_time": 10 } },
        }]);
    });
    let patch =
        json!({ "iface_id": "n", "rx_rate_limiter": { "ops": { "size": 9, "refill_time": 10 } } });
    api.patch("/network-interfaces/n", &patch);
    let config = api.get("/vm/config");
    let interface = &config["network-interfaces"][0];
    assert_eq!(interface["rx_rate_limiter"]["ops"]["size"], 9);
    assert_eq!(
        interface["tx_rate_limiter"]["bandwidth"]["size"], 1000,
        "a limiter that is not named stays"
    );
    assert_eq!(interface["host_dev_name"], tap.name());
    assert_eq!(interface["mtu"], 1400);
    let unknown = json!({ "iface_id": "other" }).to_string();
    let message = api.refused("PATCH", "/network-interfaces/other", &unknown);
    assert!(message.contains("other"), "{message}");
    vmm.terminate();
}

fn curl_drives_a_machine() {
    let vmm = Vmm::builder().spawn();
    drop(vmm.api());
    let kernel = Program::tick().write(vmm.directory(), Entry::Linux64);
    let curl = |arguments: &[&str]| {
        let output = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--max-time",
                "60",
                "--unix-socket",
            ])
            .arg(vmm.socket())
            .args(["--write-out", "%{http_code}"])
            .args(arguments)
            .output()
            .expect("curl starts");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let source = json!({ "kernel_image_path": kernel }).to_string();
    let json = "Content-Type: application/json";
    assert_eq!(
        curl(&[
            "-X",
            "PUT",
            "http://localhost/boot-source",
            "-H",
            json,
            "-d",
            &source
        ]),
        "204"
    );
    let start = r#"{"action_type":"InstanceStart"}"#;
    assert_eq!(
        curl(&["-X", "PUT", "http://localhost/actions", "-d", start]),
        "204"
    );
    let info = curl(&["http://localhost/"]);
    assert!(
        info.contains(r#""state":"Running""#) && info.ends_with("200"),
        "{info}"
    );
    let fault = curl(&["-X", "PUT", "http://localhost/actions", "-d", start]);
    assert!(
        fault.contains("fault_message") && fault.ends_with("400"),
        "{fault}"
    );
    vmm.terminate();
}
