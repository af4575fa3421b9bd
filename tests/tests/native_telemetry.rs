//! What a machine tells of itself: metrics, log, console.

use std::fs;
use std::process::ExitCode;

use lepton_tests::guest::Program;
use lepton_tests::origin::running;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{Api, Vmm, test};
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(metrics_are_flushed_as_a_line_of_json).of_every_origin(),
            test!(requests_are_counted),
            test!(metrics_are_told_in_open_metrics).of_every_origin(),
            test!(the_log_goes_where_it_is_sent),
            test!(the_log_of_a_module_alone),
            test!(the_serial_console_goes_to_a_file).of_every_origin(),
        ],
    )
}

/// What [`Program::tick`] makes grow.
const TICKS: &str = "lepton_vcpu_exit_io_out";

/// The line of metrics that a flush adds to a file.
#[track_caller]
fn flushed(api: &mut Api, path: &str) -> Value {
    api.act("FlushMetrics");
    let text = fs::read_to_string(path).expect("the metrics are there");
    let last = text.lines().last().expect("a line");
    serde_json::from_str(last).expect("a line of JSON")
}

fn metrics_are_flushed_as_a_line_of_json() {
    let (vmm, mut api) = running(&Program::tick(), |folder, config| {
        config["metrics"] = json!({ "metrics_path": folder.join("metrics"), "emit_id": true });
    });
    let path = vmm.path("metrics");
    api.wait_for_more(TICKS, 0);
    let line = flushed(&mut api, &path);
    assert!(
        line["utc_timestamp_ms"].as_u64() > Some(1_700_000_000_000),
        "{line}"
    );
    assert_eq!(line["id"], "anonymous-instance");
    assert!(line["vcpu"]["exit_io_out"].as_u64() > Some(0), "{line}");
    // Growth since the last flush, not the sum.
    let line = flushed(&mut api, &path);
    assert_eq!(line["put_api_requests"]["machine_cfg_count"], 0);
    assert_eq!(line["put_api_requests"]["actions_count"], 1);
    // The end is flushed too.
    let lines = |path: &str| fs::read_to_string(path).map_or(0, |text| text.lines().count());
    let before = lines(&path);
    let ended = vmm.terminate();
    let path = ended.directory.path().join("metrics");
    assert_eq!(lines(path.to_str().expect("a plain path")), before + 1);
}

fn requests_are_counted() {
    let (vmm, mut api, _) = Vmm::with_kernel(&Program::tick());
    let path = vmm.path("metrics");
    let metrics = json!({ "metrics_path": path });
    api.put("/metrics", &metrics);
    api.refused("PUT", "/metrics", &metrics.to_string());
    let bad = json!({ "vcpu_count": 99, "mem_size_mib": 1 }).to_string();
    api.refused("PUT", "/machine-config", &bad);
    api.start();
    let line = flushed(&mut api, &path);
    assert_eq!(line["put_api_requests"]["machine_cfg_count"], 1);
    assert_eq!(line["put_api_requests"]["machine_cfg_fails"], 1);
    assert_eq!(line["put_api_requests"]["metrics_fails"], 1);
    vmm.terminate();
}

fn metrics_are_told_in_open_metrics() {
    let (vmm, mut api) = running(&Program::tick(), |_, config| {
        let image = config["boot-source"]["kernel_image_path"].clone();
        let drive = |id: &str| json!({ "drive_id": id, "path_on_host": image, "is_root_device": false, "is_read_only": true });
        config["drives"] = json!([drive("a"), drive("b")]);
    });
    let late = json!({ "vcpu_count": 1, "mem_size_mib": 64 }).to_string();
    api.refused("PATCH", "/machine-config", &late);
    let (status, text) = api.request("GET", "/metrics", "");
    assert_eq!(status, 200);
    assert!(text.ends_with("# EOF\n"), "{text}");
    let mut types = std::collections::BTreeMap::new();
    for line in text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (family, kind) = kind.split_once(' ').expect("a name and a type");
            assert!(["counter", "gauge"].contains(&kind), "{line}");
            let before = types.insert(family, kind);
            assert!(before.is_none(), "{family} is there twice");
        } else if let Some(unit) = line.strip_prefix("# UNIT ") {
            let (family, unit) = unit.split_once(' ').expect("a name and a unit");
            assert!(types.contains_key(family), "{line}: its type is missing");
            assert!(family.ends_with(&format!("_{unit}")), "{line}");
        } else if line != "# EOF" {
            let (name, rest) = line.split_once('{').expect("labels");
            let (family, kind) = match name.strip_suffix("_total") {
                Some(family) => (family, "counter"),
                None => (name, "gauge"),
            };
            assert_eq!(types.get(family), Some(&kind), "{line}");
            let (labels, value) = rest.rsplit_once("} ").expect("a value");
            assert!(labels.starts_with("id=\"anonymous-instance\""), "{line}");
            value.parse::<u64>().expect("a value is a number");
        }
    }
    for id in ["a", "b"] {
        assert!(text.contains(&format!("device=\"{id}\"")), "{text}");
    }
    assert_eq!(
        api.counter("lepton_patch_api_requests_machine_cfg_fails"),
        1
    );
    vmm.terminate();
}

fn the_log_goes_where_it_is_sent() {
    let (vmm, mut api) = Vmm::with_api();
    let log = vmm.path("log");
    let body =
        json!({ "log_path": log, "level": "Debug", "show_level": true, "show_log_origin": true });
    api.put("/logger", &body);
    api.refused(
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"/no/such/kernel"}"#,
    );
    let text = fs::read_to_string(&log).expect("the log is there");
    let line = text.lines().find(|line| line.contains("/no/such/kernel"));
    let line = line.unwrap_or_else(|| panic!("the refusal is not in the log:\n{text}"));
    // TIME [ID:THREAD:LEVEL:FILE:LINE] MESSAGE
    let (_, rest) = line.split_once(" [anonymous-instance:").expect("an id");
    let (origin, _) = rest.split_once("] ").expect("a message");
    let parts: Vec<&str> = origin.split(':').collect();
    assert_eq!(parts.len(), 4, "{line}");
    assert!(["WARN", "ERROR"].contains(&parts[1]), "{line}");
    assert!(parts[2].ends_with(".rs"), "{line}");
    // Nothing more is told to nobody.
    api.put("/logger", &json!({ "level": "Off" }));
    let before = fs::metadata(&log).expect("the log is there").len();
    api.refused(
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"/no/such/kernel"}"#,
    );
    assert_eq!(fs::metadata(&log).expect("the log is there").len(), before);
    vmm.terminate();
}

fn the_log_of_a_module_alone() {
    let log = |module: &str| {
        let builder = Vmm::builder();
        let path = builder.directory().join("log");
        let builder = builder.arguments(["--module", module, "--level", "info", "--log-path"]);
        let vmm = builder.arguments([&path]).spawn();
        vmm.api().refused("PUT", "/vsock", "{}");
        let ended = vmm.terminate();
        assert_eq!(ended.text(), "");
        fs::read_to_string(path).unwrap_or_else(|_| {
            fs::read_to_string(ended.directory.path().join("log")).expect("the log is there")
        })
    };
    assert!(log("lepton_api").contains("API request"));
    assert!(!log("lepton_vmm").contains("API request"));
    assert_eq!(log("no_such_module"), "");
}

fn the_serial_console_goes_to_a_file() {
    let program = Program::print_once_typed("said on the console");
    let (vmm, mut api) = running(&program, |folder, config| {
        config["serial"] = json!({ "serial_out_path": folder.join("console") });
    });
    api.type_keys();
    let ended = vmm.wait().expect_code(0);
    let console = fs::read_to_string(ended.directory.path().join("console"));
    assert_eq!(
        console.expect("the console is there"),
        "said on the console"
    );
    assert!(!ended.text().contains("said on the console"));
}
