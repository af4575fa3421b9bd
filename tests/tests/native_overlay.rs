//! Drives that share a base image, each with an overlay of its own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime};

use lepton_devices::virtio::block::overlay::{Chain, Overlay};
use lepton_tests::metal::{Metal, pattern, results};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{Api, Vmm, linux, programs, test};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm, Need::File("LEPTON_PROBE")],
        [
            test!(machines_over_one_base_see_only_their_own_writes).of_every_origin(),
            test!(what_was_flushed_is_there_after_sigkill).of_every_origin(),
            test!(what_was_written_without_flushes_is_there_after_sigkill).of_every_origin(),
            test!(it_is_saved_and_goes_on_elsewhere).of_every_origin(),
            test!(a_reset_gives_the_base_back).of_every_origin(),
            test!(what_cannot_be_an_overlay_is_refused),
            test!(overlays_are_worked_on_by_commands),
        ],
    )
}

const SIZE: usize = 4 << 20;
const BASE_SEED: u64 = 7;

/// A folder with a base image.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let place = Place(folder);
        fs::write(place.path("base"), pattern(BASE_SEED, SIZE)).expect("a base");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The drive with this overlay.
    fn drive(&self, overlay: &str, engine: &str, cache: &str) -> Value {
        json!({
            "drive_id": "d", "path_on_host": self.path("base"), "is_root_device": false, "is_read_only": false,
            "io_engine": engine, "cache_type": cache, "overlay": { "path": self.path(overlay) },
        })
    }

    /// The whole disk.
    #[track_caller]
    fn content(&self, overlay: &str) -> Vec<u8> {
        let chain = Chain::open::<&Path>(&self.path("base"), &[]).expect("a base");
        let mut overlay = Overlay::open(chain, &self.path(overlay), true).expect("an overlay");
        let mut bytes = vec![0; SIZE];
        overlay.read_bytes(&mut bytes, 0).expect("a whole disk");
        bytes
    }

    /// Bytes that a file takes on the host.
    fn room(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).expect("a file").blocks() * 512
    }

    fn base_is_as_it_was(&self) {
        let base = fs::read(self.path("base")).expect("a base");
        assert!(base == pattern(BASE_SEED, SIZE), "the base was written");
    }
}

/// Starts the guest, which works with the drive.
#[track_caller]
fn started(arguments: &str, drive: &Value) -> (Vmm, Api) {
    let probe = Metal::new("LEPTON_PROBE", arguments).with_api();
    let vmm = probe
        .with(|config| config["drives"] = json!([drive]))
        .start();
    let api = vmm.api();
    (vmm, api)
}

/// Lets the guest run to its end.
#[track_caller]
fn run(arguments: &str, drive: &Value) {
    let probe = Metal::new("LEPTON_PROBE", arguments);
    let ended = probe.with(|config| config["drives"] = json!([drive])).run();
    let results = results("PROBE ", &ended.text());
    assert_eq!(results.len(), 1, "{}", ended.text());
    assert_eq!(results[0]["errors"], 0, "{arguments}: {results:?}");
}

fn machines_over_one_base_see_only_their_own_writes() {
    for engine in ["Sync", "Async"] {
        let place = Place::new();
        let read = "probe.mode=blk_read probe.verify=1 probe.qd=16 probe.size=65536 probe.count=128 probe.pattern=random";
        // Two that write, in turn and over each other, and one that only reads.
        for (overlay, seed, cache) in [("one", 1, "Writeback"), ("two", 2, "Unsafe")] {
            let write = format!(
                "probe.mode=blk_write probe.verify=1 probe.qd=16 probe.count=256 probe.seed={seed}"
            );
            run(&write, &place.drive(overlay, engine, cache));
        }
        run(
            &format!("{read} probe.seed={BASE_SEED}"),
            &place.drive("three", engine, "Writeback"),
        );
        place.base_is_as_it_was();
        for (overlay, seed) in [("one", 1), ("two", 2)] {
            let mut expected = pattern(BASE_SEED, SIZE);
            expected[..1 << 20].copy_from_slice(&pattern(seed, 1 << 20));
            assert!(place.content(overlay) == expected, "{engine} {overlay}");
            let room = place.room(overlay);
            assert!((1 << 20..(1 << 20) + (64 << 10)).contains(&room), "{room}");
        }
        assert!(place.room("three") <= 16384, "{}", place.room("three"));
        // Sectors, not clusters: each is copied up first. Then read by the guest.
        let write = "probe.mode=blk_write probe.verify=1 probe.size=512 probe.count=8192 probe.qd=16 probe.seed=5";
        run(write, &place.drive("one", engine, "Writeback"));
        run(
            &format!("{read} probe.seed=5"),
            &place.drive("one", engine, "Writeback"),
        );
        place.base_is_as_it_was();
    }
}

/// Kills the VMM in the midst of the guest's writes, and returns how many of them it had done.
fn killed(mode: &str, counter: &str, drive: &Value) -> u64 {
    let arguments =
        format!("probe.mode={mode} probe.verify=1 probe.seed=9 probe.seconds=60 probe.size=4096");
    let (vmm, mut api) = started(&arguments, drive);
    api.wait_for_more(counter, 100);
    let done = api.counter(counter);
    vmm.signal(Signal::KILL);
    drop(vmm.wait_for_fault());
    done
}

fn check_first(place: &Place, overlay: &str, writes: u64) {
    let done = (writes as usize * 4096).min(SIZE);
    let found = place.content(overlay);
    assert!(found[..done] == pattern(9, done)[..], "a write is lost");
    // What came after is old or new, whole clusters each.
    let (old, new) = (pattern(BASE_SEED, SIZE), pattern(9, SIZE));
    for at in (done..SIZE).step_by(4096) {
        let cluster = &found[at..at + 4096];
        let is_either = cluster == &old[at..at + 4096] || cluster == &new[at..at + 4096];
        assert!(is_either, "something else at {at}");
    }
    place.base_is_as_it_was();
}

fn what_was_flushed_is_there_after_sigkill() {
    for engine in ["Sync", "Async"] {
        let place = Place::new();
        let drive = place.drive("one", engine, "Writeback");
        let flushed = killed("blk_flush", "lepton_block_flush_count", &drive);
        check_first(&place, "one", flushed);
        // It is used on.
        run(
            "probe.mode=blk_write probe.verify=1 probe.count=1024 probe.seed=9",
            &drive,
        );
        check_first(&place, "one", u64::MAX >> 20);
    }
}

/// A guest that is offered no flush expects its writes to outlive the VMM, as they do on a raw image.
fn what_was_written_without_flushes_is_there_after_sigkill() {
    for engine in ["Sync", "Async"] {
        let place = Place::new();
        let drive = place.drive("one", engine, "Unsafe");
        let written = killed("blk_write", "lepton_block_write_count", &drive);
        check_first(&place, "one", written);
    }
}

fn it_is_saved_and_goes_on_elsewhere() {
    const COUNT: u64 = 10_000;
    for (engine, cache) in [("Sync", "Writeback"), ("Async", "Unsafe")] {
        let place = Place::new();
        let arguments = format!(
            "probe.mode=blk_write probe.verify=1 probe.seed=9 probe.qd=16 probe.count={COUNT}"
        );
        let (vmm, mut api) = started(&arguments, &place.drive("one", engine, cache));
        api.wait_for_more("lepton_block_write_count", 100);
        api.reach("Paused");
        let snapshot = json!({
            "snapshot_path": place.path("state"), "mem_file_path": place.path("memory"),
        });
        api.put("/snapshot/create", &snapshot);
        // Saved is all there is: nothing of it is in the process.
        vmm.signal(Signal::KILL);
        assert_eq!(
            vmm.wait_for_fault().text(),
            "",
            "it was done before it was saved"
        );
        fs::rename(place.path("one"), place.path("moved")).expect("a file can be moved");
        let (vmm, mut api) = Vmm::quiet();
        let load = json!({
            "snapshot_path": place.path("state"), "resume_vm": true,
            "mem_backend": { "backend_type": "File", "backend_path": place.path("memory") },
        });
        let lost = api.refused("PUT", "/snapshot/load", &{
            let mut load = load.clone();
            load["drive_overrides"] = json!([
                { "drive_id": "d", "path_on_host": place.path("base"), "overlay": { "path": "/nowhere/at/all" } }
            ]);
            load.to_string()
        });
        assert!(
            lost.contains("drive d: /nowhere/at/all: No such file"),
            "{lost}"
        );
        let mut load = load;
        load["drive_overrides"] = json!([
            { "drive_id": "d", "path_on_host": place.path("base"), "overlay": { "path": place.path("moved") } }
        ]);
        api.put("/snapshot/load", &load);
        drop(api);
        let ended = vmm.wait().expect_code(0);
        let results = results("PROBE ", &ended.text());
        let told = (&results[0]["ops"], &results[0]["errors"]);
        assert_eq!(told, (&json!(COUNT), &json!(0)), "{engine}");
        assert!(place.content("moved") == pattern(9, SIZE), "{engine}");
        assert!(!place.path("one").exists());
        place.base_is_as_it_was();
    }
}

fn a_reset_gives_the_base_back() {
    let place = Place::new();
    run(
        "probe.mode=blk_write probe.verify=1 probe.count=256 probe.seed=1",
        &place.drive("one", "Sync", "Writeback"),
    );
    assert!(place.room("one") > 1 << 20);
    let (vmm, mut api) = Vmm::quiet();
    let drive = place.drive("one", "Async", "Writeback");
    api.put("/drives/d", &drive);
    let reset = |api: &mut Api| api.request("PUT", "/drives/d/reset", "");
    assert_eq!(reset(&mut api), (204, String::new()));
    assert!(place.room("one") <= 16384, "{}", place.room("one"));
    vmm.terminate();
    let (vmm, mut api) = started("probe.mode=blk_write probe.seconds=60", &drive);
    api.wait_for_more("lepton_block_write_count", 100);
    let refused = api.refused("PUT", "/drives/d/reset", "");
    assert!(refused.contains("Paused"), "{refused}");
    api.reach("Paused");
    assert!(place.room("one") > 100 * 4096);
    assert_eq!(reset(&mut api), (204, String::new()));
    assert!(place.room("one") <= 16384, "{}", place.room("one"));
    vmm.terminate();
    place.base_is_as_it_was();
    assert!(place.content("one") == pattern(BASE_SEED, SIZE));
}

/// Runs `lepton-vmm overlay ...` in the place; its exit status, its output and its errors.
fn command(place: &Place, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(programs::vmm())
        .arg("overlay")
        .args(arguments)
        .current_dir(place.0.path())
        .output()
        .expect("the VMM can be run");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[track_caller]
fn does(place: &Place, arguments: &[&str]) -> String {
    let (code, output, errors) = command(place, arguments);
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{arguments:?}");
    output
}

#[track_caller]
fn fails(place: &Place, arguments: &[&str]) -> String {
    let (code, _, errors) = command(place, arguments);
    assert_eq!(code, Some(1), "{arguments:?}: {errors}");
    errors
}

fn overlays_are_worked_on_by_commands() {
    const BASE: [&str; 2] = ["--base", "base"];
    let place = Place::new();
    let write = |overlay: &Value, seed: u64| {
        let arguments =
            format!("probe.mode=blk_write probe.verify=1 probe.count=64 probe.seed={seed}");
        run(&arguments, overlay);
    };
    let content = |seed| {
        let mut all = pattern(BASE_SEED, SIZE);
        all[..256 << 10].copy_from_slice(&pattern(seed, 256 << 10));
        all
    };
    let with_base =
        |command: &'static str, path: &'static str| [&[command, path][..], &BASE].concat();
    does(&place, &with_base("create", "one"));
    let again = fails(&place, &with_base("create", "one"));
    assert!(again.contains("one is there already"), "{again}");
    write(&place.drive("one", "Sync", "Writeback"), 1);
    let info = does(&place, &["info", "one"]);
    assert!(
        info.contains("clusters: 64 of 4096 bytes") && info.contains("layers below: 0"),
        "{info}"
    );
    let check = does(&place, &with_base("check", "one"));
    assert_eq!(check, "own clusters: 64\nclusters of the base: 960\n");

    // A layer, and over it another machine's overlay.
    does(&place, &["freeze", "one"]);
    let mut above = place.drive("two", "Async", "Writeback");
    let frozen = fails(&place, &with_base("commit", "one"));
    assert!(frozen.contains("one is a layer"), "{frozen}");
    above["overlay"]["layers"] = json!([place.path("one")]);
    write(&above, 2);
    write(&above, 1);
    let over_layer = [&with_base("check", "two")[..], &["--layer", "one"]].concat();
    assert_eq!(
        does(&place, &over_layer),
        "own clusters: 64\nclusters of layer 1: 0\nclusters of the base: 960\n"
    );
    assert!(fails(&place, &with_base("check", "two")).contains("lies over 1 layers; 0 are given"));
    assert!(fails(&place, &with_base("commit", "two")).contains("two lies over layers"));

    // Over another image, which has something else in its last cluster.
    let mut other = pattern(BASE_SEED, SIZE);
    other[SIZE - 1] ^= 1;
    fs::write(place.path("other"), other).expect("an image");
    let rebase = [
        &with_base("rebase", "two")[..],
        &["--layer", "one", "--onto", "other"],
    ]
    .concat();
    assert_eq!(does(&place, &rebase), "4096 bytes copied up\n");
    // And into it.
    assert_eq!(
        does(&place, &["commit", "two", "--base", "other"]),
        "266240 bytes written\n"
    );
    assert!(fs::read(place.path("other")).expect("an image") == content(1));
    let info = does(&place, &["info", "two"]);
    assert!(
        info.contains("clusters: 0 ") && info.contains("a machine's own"),
        "{info}"
    );
    place.base_is_as_it_was();

    // A base that was copied without its time.
    does(&place, &with_base("create", "three"));
    let base = fs::File::options().write(true).open(place.path("base"));
    let later = SystemTime::now() + Duration::from_secs(1);
    base.and_then(|base| base.set_modified(later))
        .expect("a base");
    let changed = fails(&place, &with_base("check", "three"));
    assert!(changed.contains("rebase --same-content"), "{changed}");
    does(
        &place,
        &[&with_base("rebase", "three")[..], &["--same-content"]].concat(),
    );
    does(&place, &with_base("check", "three"));

    let (code, _, errors) = command(&place, &["dance"]);
    assert_eq!(code, Some(153), "{errors}");
    assert!(errors.contains("Usage: lepton-vmm overlay"), "{errors}");
    let (code, help, _) = command(&place, &["--help"]);
    assert!(code == Some(0) && help.contains("rebase"), "{help}");
}

fn what_cannot_be_an_overlay_is_refused() {
    let place = Place::new();
    let (vmm, mut api) = Vmm::quiet();
    let put = |api: &mut Api, change: &dyn Fn(&mut Value)| {
        let mut drive = place.drive("one", "Sync", "Unsafe");
        change(&mut drive);
        api.refused("PUT", "/drives/d", &drive.to_string())
    };
    fs::write(place.path("text"), [b'x'; 4096]).expect("a file");
    let overlay = |path: PathBuf| json!({ "path": path });
    let message = put(&mut api, &|drive| {
        drive["overlay"] = overlay(place.path("text"))
    });
    assert!(message.ends_with("text: it is not an overlay"), "{message}");
    let message = put(&mut api, &|drive| {
        drive["overlay"] = overlay(place.path("."))
    });
    assert!(message.ends_with("is not a regular file"), "{message}");
    let message = put(&mut api, &|drive| {
        drive["overlay"]["layers"] = json!([place.path("text")])
    });
    assert!(message.ends_with("text: it is not an overlay"), "{message}");
    // A read-only one is not made.
    let message = put(&mut api, &|drive| drive["is_read_only"] = json!(true));
    assert!(message.contains("No such file"), "{message}");
    assert!(!place.path("one").exists());

    api.put("/drives/d", &place.drive("one", "Sync", "Unsafe"));
    let mode = fs::metadata(place.path("one")).expect("made").mode();
    assert_eq!(mode & 0o777, 0o600);
    let (other, mut second) = Vmm::quiet();
    let drive = place.drive("one", "Sync", "Unsafe").to_string();
    let message = second.refused("PUT", "/drives/d", &drive);
    assert!(
        message.ends_with("one is in use by another process"),
        "{message}"
    );
    other.terminate();
    // An image under an overlay stays, and a raw drive has nothing to reset.
    api.put(
        "/boot-source",
        &json!({ "kernel_image_path": linux::file("LEPTON_PROBE") }),
    );
    let raw = json!({ "drive_id": "r", "path_on_host": place.path("text"), "is_root_device": false, "is_read_only": true });
    api.put("/drives/r", &raw);
    let message = api.refused("PUT", "/drives/r/reset", "");
    assert!(message.ends_with("the drive has no overlay"), "{message}");
    let message = api.refused("PUT", "/drives/x/reset", "");
    assert!(message.ends_with("there is no drive x"), "{message}");
    vmm.terminate();

    // A base that was written to means nothing under an overlay.
    fs::write(place.path("base"), pattern(BASE_SEED, SIZE)).expect("a base");
    let (vmm, mut api) = Vmm::quiet();
    let message = api.refused("PUT", "/drives/d", &drive);
    assert!(message.contains("base was written since"), "{message}");
    vmm.terminate();
}
