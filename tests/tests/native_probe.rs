//! The measuring guest: each of its modes does what it says, checked from the host.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use lepton_tests::metal::{Metal, pattern, results};
use lepton_tests::origin::Origin;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{Api, PATIENCE, Vmm, test};
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm, Need::File("LEPTON_PROBE")],
        [
            test!(it_boots_by_both_protocols),
            test!(it_leaves_the_guest_as_often_as_it_is_told).of_every_origin(),
            test!(modes_follow_each_other).of_every_origin(),
            test!(it_touches_all_memory).of_every_origin(),
            test!(what_it_writes_is_on_the_drive).of_every_origin(),
            test!(what_is_on_the_drive_it_reads).of_every_origin(),
            test!(it_finds_devices_by_acpi).of_every_origin(),
            test!(it_flushes).of_every_origin(),
            test!(a_drive_under_load_is_saved_and_goes_on).of_every_origin(),
            test!(a_drive_is_changed_under_load).of_every_origin(),
            test!(a_limit_holds_back_until_it_is_lifted).of_every_origin(),
            test!(an_idle_processor_sleeps).of_every_origin(),
            test!(bad_arguments_are_told),
        ],
    )
}

#[track_caller]
fn probe(arguments: &str) -> Metal {
    Metal::new("LEPTON_PROBE", arguments)
}

/// Runs it, and returns all it tells.
#[track_caller]
fn told(probe: Metal) -> Vec<Value> {
    let ended = probe.run();
    let results = results("PROBE ", &ended.text());
    assert!(!results.is_empty(), "{}", ended.text());
    results
}

/// The only thing it tells, which is not of errors.
#[track_caller]
fn result(probe: Metal) -> Value {
    let mut results = told(probe);
    assert_eq!(results.len(), 1, "{results:?}");
    assert_eq!(results[0]["errors"], 0, "{results:?}");
    results.remove(0)
}

fn it_boots_by_both_protocols() {
    let arguments = "probe.mode=port_write probe.count=3";
    assert_eq!(result(probe(arguments))["ops"], 3);
    assert_eq!(result(probe(arguments).by_linux64())["ops"], 3);
    // Nothing said is a reset.
    assert_eq!(results("PROBE ", &probe("").run().text()), [] as [Value; 0]);
}

fn it_leaves_the_guest_as_often_as_it_is_told() {
    for mode in ["port_write", "port_read", "mmio_write", "mmio_read", "kick"] {
        let mut probe = probe(&format!("probe.mode={mode} probe.count=100"));
        probe.drive("d", "Sync", &[0; 512]);
        let result = result(probe);
        assert_eq!(
            (&result["mode"], &result["ops"]),
            (&json!(mode), &json!(100))
        );
        let number = |name: &str| result[name].as_u64().expect("a number");
        assert!(
            number("min") > 0 && number("min") <= number("p50"),
            "{result}"
        );
        assert!(
            number("p99") <= number("max") && number("max") <= number("ticks"),
            "{result}"
        );
    }
}

fn modes_follow_each_other() {
    let modes = ["port_read", "kick", "port_write"];
    let mut probe = probe(&format!("probe.mode={} probe.count=10", modes.join(",")));
    probe.drive("d", "Sync", &[0; 512]);
    let told = told(probe);
    let told: Vec<_> = told
        .iter()
        .map(|told| (&told["mode"], &told["ops"]))
        .collect();
    let expected = modes.map(|mode| (json!(mode), json!(10)));
    let expected: Vec<_> = expected.iter().map(|(mode, ops)| (mode, ops)).collect();
    assert_eq!(told, expected);
}

fn it_touches_all_memory() {
    // More than fits below the hole for devices, with a page of it in 64 touched.
    let more = probe("probe.mode=touch probe.stride=262144")
        .with(|config| config["machine-config"]["mem_size_mib"] = json!(3200));
    let results = told(more);
    // A copy finds what was written before, and tells only that.
    let modes = match Origin::current() {
        Origin::Booted => &["touch_write", "touch_read"][..],
        Origin::Restored | Origin::Cloned => &["touch_read"],
    };
    assert_eq!(results.len(), modes.len(), "{results:?}");
    for (result, mode) in results.iter().zip(modes) {
        assert_eq!(
            (&result["mode"], &result["errors"]),
            (&json!(mode), &json!(0))
        );
        let bytes = result["bytes"].as_u64().expect("a number");
        assert!(bytes > 3190 << 20 && bytes < 3200 << 20, "{result}");
        let pages = result["ops"].as_u64().expect("a number");
        assert!(pages >= bytes >> 18, "{result}");
    }
}

fn what_it_writes_is_on_the_drive() {
    const SIZE: usize = 4 << 20;
    for (engine, depth, size) in [("Sync", 1, 512), ("Async", 32, 4096), ("Sync", 7, 1 << 20)] {
        let count = SIZE / size;
        let mut probe = probe(&format!(
            "probe.mode=blk_write probe.verify=1 probe.seed=99 probe.qd={depth} probe.size={size} probe.count={count}"
        ));
        let drive = probe.drive("d", engine, &[0; SIZE]);
        let ended = probe.run();
        let results = results("PROBE ", &ended.text());
        assert_eq!(results.len(), 1, "{}", ended.text());
        assert_eq!(results[0]["errors"], 0);
        assert_eq!(results[0]["bytes"], SIZE);
        let written = fs::read(drive).expect("the drive's file");
        assert!(
            written == pattern(99, SIZE),
            "{engine}, {depth} at once, {size} bytes"
        );
    }
}

fn what_is_on_the_drive_it_reads() {
    const SIZE: usize = 4 << 20;
    for (engine, depth, size, order) in [
        ("Sync", 1, 512, "random"),
        ("Sync", 128, 4096, "random"),
        ("Async", 128, 4096, "random"),
        ("Async", 4, 1 << 20, "sequential"),
    ] {
        for plain in ["", "probe.event_idx=0", "probe.interrupts=1"] {
            let arguments = format!(
                "probe.mode=blk_read probe.verify=1 probe.seed=7 probe.pattern={order} probe.qd={depth} \
                 probe.size={size} probe.count=300 {plain}"
            );
            let mut probe = probe(&arguments).with(|config| {
                config["machine-config"]["mem_size_mib"] = json!(256);
            });
            probe.drive("d", engine, &pattern(7, SIZE));
            let result = result(probe);
            assert_eq!(
                (&result["ops"], &result["qd"]),
                (&json!(300), &json!(depth))
            );
        }
    }
    // The check can fail: one byte is different.
    let mut content = pattern(7, 4096);
    content[4000] ^= 1;
    let mut probe = probe("probe.mode=blk_read probe.verify=1 probe.seed=7 probe.count=1");
    probe.drive("d", "Sync", &content);
    assert_eq!(told(probe)[0]["errors"], 1);
}

fn it_finds_devices_by_acpi() {
    for second in [0, 1] {
        let mut probe = probe(&format!(
            "probe.mode=blk_read probe.verify=1 probe.count=1 probe.find=acpi probe.drive={second} probe.seed={second}"
        ));
        for drive in [0, 1] {
            probe.drive(&format!("d{drive}"), "Sync", &pattern(drive, 4096));
        }
        assert_eq!(result(probe)["ops"], 1);
    }
}

fn it_flushes() {
    let mut probe = probe("probe.mode=blk_flush probe.verify=1 probe.count=20");
    let drive = probe.drive("d", "Async", &[0; 40960]);
    let ended = probe.run();
    let results = results("PROBE ", &ended.text());
    assert_eq!(
        (&results[0]["errors"], &results[0]["bytes"]),
        (&json!(0), &json!(40960))
    );
    assert!(fs::read(drive).expect("the drive's file") == pattern(0, 40960));
}

fn drive(path: &Path, engine: &str) -> Value {
    json!({
        "drive_id": "d", "path_on_host": path, "is_root_device": false, "is_read_only": false,
        "io_engine": engine,
    })
}

/// A guest that works with this drive, in a VMM with an API.
fn under_load(arguments: &str, drive: &Value) -> Metal {
    probe(arguments)
        .with_api()
        .with(|config| config["drives"] = json!([drive]))
}

const READS: &str = "lepton_block_read_count";

#[track_caller]
fn wait_for_some(api: &mut Api, counter: &str, more: u64) {
    let before = api.counter(counter);
    api.wait_for_more(counter, before + more);
}

/// PATCH gives the guest another image in the midst of its writes: all of them go to one of both, and from then on to the
/// second.
fn a_drive_is_changed_under_load() {
    const SIZE: usize = 1 << 20;
    const WRITES: &str = "lepton_block_write_count";
    for (from, to) in [("Sync", "Sync"), ("Async", "Async")] {
        let place = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| place.path().join(name);
        for name in ["one", "two"] {
            fs::write(path(name), vec![0; SIZE]).expect("an image");
        }
        let arguments =
            "probe.mode=blk_write probe.verify=1 probe.seed=7 probe.qd=16 probe.seconds=3600";
        let vmm = under_load(arguments, &drive(&path("one"), from)).start();
        let mut api = vmm.api();
        wait_for_some(&mut api, WRITES, 2 * SIZE as u64 / 4096);
        let change = json!({ "drive_id": "d", "path_on_host": path("two") });
        api.patch("/drives/d", &change);
        assert_eq!(
            api.get("/vm/config")["drives"][0]["path_on_host"],
            json!(path("two"))
        );
        let first = fs::read(path("one")).expect("an image");
        assert!(first == pattern(7, SIZE), "{from}: not all was written");
        fs::write(path("one"), vec![0; SIZE]).expect("an image");
        wait_for_some(&mut api, WRITES, 2 * SIZE as u64 / 4096);
        let second = fs::read(path("two")).expect("an image");
        assert!(second == pattern(7, SIZE), "{to}: not all was written");
        let first = fs::read(path("one")).expect("an image");
        assert!(first == vec![0; SIZE], "{from}: it is written still");
        // What cannot be leaves what is.
        let missing = json!({ "drive_id": "d", "path_on_host": path("none") }).to_string();
        let message = api.refused("PATCH", "/drives/d", &missing);
        assert!(message.contains("none"), "{message}");
        wait_for_some(&mut api, WRITES, 100);
        assert_eq!(api.counter("lepton_block_execute_fails"), 0);
        vmm.terminate();
    }
}

fn a_limit_holds_back_until_it_is_lifted() {
    const THROTTLED: &str = "lepton_block_rate_limiter_throttled_events";
    const REFILL_MS: u64 = 100;
    for engine in ["Sync", "Async"] {
        let place = tempfile::tempdir().expect("a temporary directory");
        let image = place.path().join("image");
        fs::write(&image, vec![0; 1 << 20]).expect("an image");
        let arguments = "probe.mode=blk_read probe.pattern=random probe.qd=4 probe.seconds=3600";
        let limit = |buckets: Value| json!({ "drive_id": "d", "rate_limiter": buckets });
        let mut drive = drive(&image, engine);
        drive["rate_limiter"] = json!({ "ops": { "size": 10, "refill_time": REFILL_MS } });
        let vmm = under_load(arguments, &drive).start();
        let mut api = vmm.api();
        // Whatever is in the bucket, 20 more need one refill, and 30 two.
        let paced = |api: &mut Api| {
            let started = Instant::now();
            wait_for_some(api, READS, 30);
            assert!(started.elapsed() >= Duration::from_millis(REFILL_MS));
        };
        paced(&mut api);
        // Lifted, it holds nothing back.
        let free = json!({ "size": 0, "refill_time": 0 });
        api.patch("/drives/d", &limit(json!({ "ops": free })));
        wait_for_some(&mut api, READS, 1000);
        let throttled = api.counter(THROTTLED);
        assert!(throttled > 0);
        wait_for_some(&mut api, READS, 1000);
        assert_eq!(api.counter(THROTTLED), throttled, "{engine}");
        // By bytes: ten reads' worth.
        let bytes = json!({ "size": 10 * 4096, "refill_time": REFILL_MS });
        api.patch("/drives/d", &limit(json!({ "bandwidth": bytes })));
        paced(&mut api);
        api.wait_for_more(THROTTLED, throttled);
        vmm.terminate();
    }
}

fn a_drive_under_load_is_saved_and_goes_on() {
    const SIZE: usize = 4 << 20;
    // A tenth of a second or more, on any host: it must not be done before it is saved.
    const COUNT: u64 = 100_000;
    for (mode, engine, counter) in [
        ("blk_read", "Sync", READS),
        ("blk_read", "Async", READS),
        ("blk_write", "Async", "lepton_block_write_count"),
    ] {
        let place = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| place.path().join(name);
        fs::write(path("drive"), pattern(7, SIZE)).expect("a drive");
        let snapshot = json!({ "snapshot_path": path("state"), "mem_file_path": path("memory") });
        let load = json!({
            "snapshot_path": path("state"),
            "mem_backend": { "backend_type": "File", "backend_path": path("memory") },
            "resume_vm": true,
        });
        let arguments = format!(
            "probe.mode={mode} probe.verify=1 probe.seed=7 probe.qd=16 probe.count={COUNT}"
        );
        let drive = drive(&path("drive"), engine);
        let mut vmm = under_load(&arguments, &drive).start();
        let mut api = vmm.api();
        // Saved in the midst of its work, and again after the first restore.
        for _ in 0..2 {
            let before = api.counter(counter);
            api.wait_for_more(counter, before + 100);
            api.reach("Paused");
            api.put("/snapshot/create", &snapshot);
            assert_eq!(
                vmm.terminate().text(),
                "",
                "it was done before it was saved"
            );
            (vmm, api) = Vmm::quiet();
            api.put("/snapshot/load", &load);
        }
        drop(api);
        let ended = vmm.wait().expect_code(0);
        let results = results("PROBE ", &ended.text());
        assert_eq!(results.len(), 1, "{}", ended.text());
        let told = (&results[0]["ops"], &results[0]["errors"]);
        assert_eq!(told, (&json!(COUNT), &json!(0)), "{mode} {engine}");
        let found = fs::read(path("drive")).expect("a drive");
        assert!(
            found == pattern(7, SIZE),
            "{mode} {engine}: the drive changed"
        );
    }
}

fn an_idle_processor_sleeps() {
    let vmm = probe("probe.mode=idle").start();
    vmm.stdout.wait_for("PROBE {\"mode\":\"idle\"}");
    let deadline = Instant::now() + PATIENCE;
    while vmm.thread_state("vcpu 0") != 'S' {
        assert!(Instant::now() < deadline, "the processor does not sleep");
    }
    vmm.terminate();
}

fn bad_arguments_are_told() {
    for (arguments, error) in [
        ("probe.mode=dance", "there is no such mode"),
        ("probe.mode=blk_read", "there is no such drive"),
        ("probe.mode=mmio_read", "the machine has no device"),
        (
            "probe.mode=touch probe.mib=1000",
            "the machine has not as much memory",
        ),
    ] {
        let results = told(probe(arguments));
        assert_eq!(
            results.last().expect("a result")["error"],
            error,
            "{arguments}"
        );
    }
    let text = probe("probe.mode=port_write probe.count=many").run().text();
    assert!(text.contains("PANIC count: many is not a number"), "{text}");
}
