//! Copies of machines whose guests write drives.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lepton_devices::virtio::block::overlay::{Chain, HEADER_SIZE, Overlay};
use lepton_tests::metal::pattern;
use lepton_tests::{Api, Vmm, linux, programs};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::family::{Heir, clone, family, request};

const SIZE: usize = 512 << 10;
/// Requests of the guest until it has written, or read, all of the drive.
const ROUND: u64 = SIZE as u64 / 4096;
const READS: &str = "lepton_block_read_count";
const WRITES: &str = "lepton_block_write_count";

/// A folder with a base image, and a machine whose guest writes all of an overlay over it, reads and checks it, and so on
/// with other data, until it finds a difference.
pub struct Writer {
    pub folder: TempDir,
    pub vmm: Vmm,
    pub api: Api,
}

impl Writer {
    #[track_caller]
    pub fn new(engine: &str, cache: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory");
        fs::write(folder.path().join("base"), vec![7; SIZE]).expect("a base");
        let drive = json!({
            "drive_id": "d", "path_on_host": folder.path().join("base"), "is_root_device": false,
            "is_read_only": false, "io_engine": engine, "cache_type": cache,
            "overlay": { "path": folder.path().join("own") },
        });
        let (vmm, mut api) = start(&[drive]);
        api.wait_for_more(READS, 1);
        Writer { folder, vmm, api }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What is in the folder.
    fn names(&self) -> Vec<String> {
        names(self.folder.path())
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = folder.read_dir().expect("a folder");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("a name"))
        .collect();
    names.sort();
    names
}

#[track_caller]
fn start(drives: &[Value]) -> (Vmm, Api) {
    let (vmm, mut api) = Vmm::quiet();
    api.configure(&json!({
        "boot-source": {
            "kernel_image_path": linux::file("LEPTON_PROBE"),
            "boot_args": "probe.mode=blk_check probe.qd=8 probe.seconds=600",
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": drives,
    }));
    api.start();
    (vmm, api)
}

/// Waits until the guest has read all that was on the drive when it was cloned, and found it right.
pub fn check_all(api: &mut Api) {
    let read = api.counter(READS);
    api.wait_for_more(READS, read + ROUND + 8);
}

pub fn write_some(api: &mut Api) {
    let written = api.counter(WRITES);
    api.wait_for_more(WRITES, written + 20);
}

/// The drive as GET /vm/config tells it.
fn drive(api: &mut Api) -> Value {
    api.get("/vm/config")["drives"][0].clone()
}

fn layers(drive: &Value) -> Vec<PathBuf> {
    let layers = drive["overlay"]["layers"].as_array();
    let paths = layers.into_iter().flatten();
    paths
        .map(|path| path.as_str().expect("a path").into())
        .collect()
}

/// All of a drive that nobody writes.
#[track_caller]
pub fn content(base: &Path, layers: &[PathBuf], own: &Path) -> Vec<u8> {
    let chain = Chain::open(base, layers).expect("a chain");
    let mut overlay = Overlay::open(chain, own, true).expect("an overlay");
    let mut bytes = vec![0; SIZE];
    overlay.read_bytes(&mut bytes, 0).expect("a whole disk");
    bytes
}

#[track_caller]
fn overlay(arguments: &[&str], folder: &Path) -> String {
    let mut command = Command::new(programs::vmm());
    let command = command.arg("overlay").args(arguments).current_dir(folder);
    let output = command.output().expect("the VMM can be run");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

pub fn a_copy_has_the_drive_as_it_was() {
    for (engine, cache) in [("Sync", "Writeback"), ("Async", "Unsafe")] {
        let mut writer = Writer::new(engine, cache);
        writer.api.reach("Paused");
        let mut kept = Heir::called("kept");
        let mut lost = Heir::called("lost");
        let mut named = kept.child();
        let own = writer.path("kept");
        named["overlays"] = json!([{ "drive_id": "d", "path": own }]);
        let mut both = request(&[named, lost.child()]);
        both["resume_children"] = false.into();
        clone(&mut writer.api, &both);
        // What was written is a layer now, and each goes on in a file of its own.
        assert_eq!(writer.names(), ["base", "kept", "own", "own.1"]);
        let here = drive(&mut writer.api);
        assert_eq!(here["overlay"]["path"], json!(writer.path("own.1")));
        assert_eq!(layers(&here), [writer.path("own")]);
        let there = drive(&mut kept.api)["overlay"].clone();
        assert_eq!(there["path"], json!(own));
        let fleeting = drive(&mut lost.api)["overlay"].clone();
        assert_eq!(fleeting["path"], Value::Null);
        let (base, layer) = (writer.path("base"), writer.path("own"));
        let at_the_clone = content(&base, &[], &layer);
        assert!(at_the_clone != vec![7; SIZE]);
        // Nobody sees what another writes: each guest checks all that it reads.
        for api in [&mut writer.api, &mut kept.api, &mut lost.api] {
            api.reach("Resumed");
        }
        for api in [&mut lost.api, &mut kept.api, &mut writer.api] {
            check_all(api);
            write_some(api);
            api.reach("Paused");
        }
        assert!(content(&base, &[], &layer) == at_the_clone, "{engine}");

        // What goes with the process cannot be saved, and can be thrown away.
        let save = json!({
            "snapshot_path": writer.path("state"), "mem_file_path": writer.path("memory"),
        });
        let refused = lost
            .api
            .refused("PUT", "/snapshot/create", &save.to_string());
        assert!(refused.contains("drive d: what was written to it has no name"));
        kept.api.put("/snapshot/create", &save);
        for api in [&mut lost.api, &mut kept.api] {
            assert_eq!(
                api.request("PUT", "/drives/d/reset", ""),
                (204, String::new())
            );
        }
        kept.vmm.terminate();
        lost.vmm.terminate();
        let layers = [layer.clone()];
        assert!(content(&base, &layers, &own) == at_the_clone);

        // The machine's own files, used on as any overlay.
        let next = writer.path("own.1");
        writer.vmm.terminate();
        let folder = writer.folder.path();
        assert!(overlay(&["info", "own"], folder).contains("a layer, never written again"));
        assert!(overlay(&["info", "own.1"], folder).contains("layers below: 1"));
        let chain = ["check", "own.1", "--base", "base", "--layer", "own"];
        overlay(&chain, folder);
        let (vmm, mut api) = start(&[here]);
        check_all(&mut api);
        vmm.terminate();
        let last = content(&base, &layers, &next);
        let first = |seed: u64| last[..4096] == pattern(seed, 4096)[..];
        assert!((0..1000).any(first), "the guest's writes are not there");
    }
}

pub fn twenty_copies_of_a_guest_that_writes() {
    let mut writer = Writer::new("Async", "Unsafe");
    let mut heirs = family(16);
    for (number, heir) in heirs.iter_mut().enumerate() {
        clone(&mut writer.api, &request(&[heir.child()]));
        assert_eq!(layers(&drive(&mut writer.api)).len(), number + 1);
        check_all(&mut heir.api);
        // It keeps no processor from the others.
        heir.api.reach("Paused");
        write_some(&mut writer.api);
    }
    check_all(&mut writer.api);
    // And some at once.
    let mut heirs = family(4);
    let children: Vec<_> = heirs.iter().map(Heir::child).collect();
    clone(&mut writer.api, &request(&children));
    for heir in &mut heirs {
        check_all(&mut heir.api);
    }
    check_all(&mut writer.api);
    // Files of copies have no names.
    assert_eq!(writer.names().len(), 1 + 18, "{:?}", writer.names());
    for heir in heirs {
        assert_eq!(heir.vmm.terminate().text(), "");
    }
    assert_eq!(writer.vmm.terminate().text(), "");
}

pub fn drives_of_those_who_are_left_go_on() {
    let mut writer = Writer::new("Async", "Unsafe");
    let mut heirs = family(3);
    let children: Vec<_> = heirs.iter().map(Heir::child).collect();
    clone(&mut writer.api, &request(&children));
    let dead = heirs.pop().expect("a copy");
    write_some(&mut heirs[0].api);
    dead.vmm.signal(Signal::KILL);
    dead.vmm.wait_for_fault();
    check_all(&mut writer.api);
    let here = drive(&mut writer.api);
    writer.vmm.signal(Signal::KILL);
    writer.vmm.wait_for_fault();
    for heir in &mut heirs {
        check_all(&mut heir.api);
    }
    // Whatever it was doing, its drive is whole.
    let folder = writer.folder.path();
    overlay(
        &["check", "own.1", "--base", "base", "--layer", "own"],
        folder,
    );
    assert_eq!(names(folder), ["base", "own", "own.1"]);
    let (vmm, mut api) = start(&[here]);
    check_all(&mut api);
    vmm.terminate();
}

pub fn drives_of_copies_of_copies() {
    let mut writer = Writer::new("Sync", "Writeback");
    let place = tempfile::tempdir().expect("a temporary directory");
    let mut line: Vec<Heir> = Vec::new();
    for number in 0..50 {
        // A copy whose overlay has no name has no folder either.
        let heir = Heir::within(&format!("copy-{number}"), place.path());
        let api = match line.last_mut() {
            Some(before) => &mut before.api,
            None => &mut writer.api,
        };
        clone(api, &request(&[heir.child()]));
        write_some(api);
        api.reach("Paused");
        line.push(heir);
        let last = line.last_mut().expect("one");
        write_some(&mut last.api);
        // Who is further above is not needed.
        if line.len() > 2 {
            drop(line.remove(0));
        }
    }
    let last = &mut line.last_mut().expect("one").api;
    check_all(last);
    let depth = layers(&drive(last)).len();
    assert_eq!(depth, 50);
    assert_eq!(names(place.path()), [""; 0]);
}

/// More files than one message has room for.
pub fn drives_of_many_layers_are_cloned() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = |name: String| folder.path().join(name);
    let base = path("base".into());
    fs::write(&base, vec![7; SIZE]).expect("a base");
    let mut drives = Vec::new();
    for id in ["d", "e", "f"] {
        let chain = Chain::open::<&Path>(&base, &[]).expect("a base");
        let mut overlay = Overlay::open(chain, &path(format!("{id}-0")), false).expect("new");
        let mut layers = Vec::new();
        for number in 1..=120 {
            overlay
                .write_bytes(&[number; 4096], u64::from(number) << 12)
                .expect("room");
            let next = path(format!("{id}-{number}"));
            let file = fs::File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&next);
            overlay.freeze(file.expect("new"), &next).expect("a layer");
            layers.push(path(format!("{id}-{}", number - 1)));
        }
        overlay.flush().expect("room");
        drives.push(json!({
            "drive_id": id, "path_on_host": base, "is_root_device": false, "is_read_only": id == "f",
            "overlay": { "path": path(format!("{id}-120")), "layers": layers },
        }));
    }
    let raw = json!({
        "drive_id": "r", "path_on_host": base, "is_root_device": false, "is_read_only": true,
    });
    drives.push(raw);
    let (vmm, mut api) = start(&drives);
    api.wait_for_more(READS, 1);
    let mut heir = Heir::called("copy");
    clone(&mut api, &request(&[heir.child()]));
    for api in [&mut api, &mut heir.api] {
        check_all(api);
    }
    let all = heir.api.get("/vm/config")["drives"].clone();
    let deep = |drive: &Value| layers(drive).len();
    let depths: Vec<_> = all.as_array().expect("a list").iter().map(deep).collect();
    assert_eq!(depths, [121, 120, 120, 0]);
    vmm.terminate();
}

pub fn clones_that_fail_leave_no_files() {
    let mut writer = Writer::new("Async", "Writeback");
    let mut taken = Heir::called("taken");
    clone(&mut writer.api, &request(&[taken.child()]));
    let named = |heir: &Heir, path: &Path| {
        let mut child = heir.child();
        child["overlays"] = json!([{ "drive_id": "d", "path": path }]);
        child
    };
    // One of them has a machine already: the file of the other goes with it.
    let good = Heir::called("good");
    let own = good.vmm.path("own");
    let both = request(&[named(&good, Path::new(&own)), taken.child()]);
    let message = writer.api.refused("PUT", "/clone", &both.to_string());
    assert!(message.contains("has a machine already"), "{message}");
    // It makes nothing ready for another one. What it does after an answer is done before the next.
    taken.api.state();
    let threads = taken.vmm.threads();
    let vcpus = threads.iter().filter(|name| *name == "vcpu 0");
    assert_eq!(vcpus.count(), 1, "{threads:?}");
    assert_eq!(good.vmm.wait().status.code(), Some(1));
    assert!(!Path::new(&own).exists());
    // One that cannot make its file says so, and can still be had.
    let mut good = Heir::called("good");
    let nowhere = named(&good, Path::new("/no/such/folder/own"));
    let message = writer
        .api
        .refused("PUT", "/clone", &request(&[nowhere]).to_string());
    assert!(
        message.contains("drive d: /no/such/folder/own"),
        "{message}"
    );
    // What is in use, or was used, is nobody's to take.
    let used = named(&good, &writer.path("own"));
    let message = writer
        .api
        .refused("PUT", "/clone", &request(&[used]).to_string());
    assert!(message.contains("drive d: "), "{message}");
    assert!(writer.path("own").exists());
    let mut other = named(&good, &writer.path("x"));
    other["overlays"][0]["drive_id"] = "e".into();
    let message = writer
        .api
        .refused("PUT", "/clone", &request(&[other]).to_string());
    assert!(message.contains("there is no drive e"), "{message}");
    assert_eq!(good.api.state(), "Not started");
    // The machine has a layer for each attempt that came so far, and goes on.
    check_all(&mut writer.api);
    let here = drive(&mut writer.api);
    let own = PathBuf::from(here["overlay"]["path"].as_str().expect("a path"));
    let mut files = layers(&here);
    files.extend([writer.path("base"), own]);
    files.sort();
    let found: Vec<_> = writer
        .names()
        .iter()
        .map(|name| writer.path(name))
        .collect();
    assert_eq!(found, files);
    // A file that a killed copy has left is as good as none.
    let left = good.vmm.path("own");
    fs::write(&left, [0; HEADER_SIZE]).expect("a file");
    clone(&mut writer.api, &request(&[named(&good, Path::new(&left))]));
    check_all(&mut good.api);
    check_all(&mut taken.api);
    check_all(&mut writer.api);
}

/// What GET /vm/divergence says of memory and of the drive: what is private, and what is shared.
fn shares(api: &mut Api) -> [(u64, u64); 2] {
    let told = api.get("/vm/divergence");
    let of = |shares: &Value| {
        let bytes = |name: &str| shares[name].as_u64().expect("a number");
        (bytes("private_bytes"), bytes("shared_bytes"))
    };
    [of(&told["memory"]), of(&told["drives"][0])]
}

pub fn what_is_whose_is_told() {
    let mut writer = Writer::new("Sync", "Unsafe");
    writer.api.reach("Paused");
    let [memory, drive] = shares(&mut writer.api);
    assert!(memory.0 > 0 && memory.1 == 0, "{memory:?}");
    assert_eq!(drive.0 + drive.1, SIZE as u64);
    assert!(drive.0 > 0, "{drive:?}");
    let mut heir = Heir::called("copy");
    let mut request = request(&[heir.child()]);
    request["resume_children"] = false.into();
    clone(&mut writer.api, &request);
    // All is in common; in the copy, but for what its devices have written to its memory.
    let before = memory;
    let [memory, drive] = shares(&mut writer.api);
    assert_eq!((memory, drive), ((0, before.0), (0, SIZE as u64)));
    let [memory, drive] = shares(&mut heir.api);
    assert!(memory.0 <= 64 << 10 && memory.0 + memory.1 >= before.0);
    assert_eq!(drive, (0, SIZE as u64));
    heir.api.reach("Resumed");
    write_some(&mut heir.api);
    heir.api.reach("Paused");
    let [memory, drive] = shares(&mut heir.api);
    assert!(memory.0 > 0 && memory.1 < before.0, "{memory:?} {before:?}");
    assert!(memory.0 + memory.1 >= before.0, "{memory:?} {before:?}");
    assert!(drive.0 > 0 && drive.0 + drive.1 == SIZE as u64, "{drive:?}");
    // The machine has none of it, and may run when it is asked.
    let [memory, drive] = shares(&mut writer.api);
    assert_eq!((memory.0, drive.0), (0, 0));
    writer.api.reach("Resumed");
    write_some(&mut writer.api);
    let [memory, drive] = shares(&mut writer.api);
    assert!(memory.0 > 0 && drive.0 > 0);
    let (status, metrics) = heir.api.request("GET", "/metrics", "");
    assert_eq!(status, 200);
    let told = shares(&mut heir.api);
    for (name, value) in [
        ("lepton_memory_private_bytes{id=\"copy\"}", told[0].0),
        ("lepton_memory_shared_bytes{id=\"copy\"}", told[0].1),
        (
            "lepton_block_private_bytes{id=\"copy\",device=\"d\"}",
            told[1].0,
        ),
        (
            "lepton_block_shared_bytes{id=\"copy\",device=\"d\"}",
            told[1].1,
        ),
    ] {
        assert!(
            metrics.contains(&format!("\n{name} {value}\n")),
            "{metrics}"
        );
    }
    // Before there is a machine, nothing can be said.
    let message = Heir::called("empty")
        .api
        .refused("GET", "/vm/divergence", "");
    assert!(message.contains("before starting"), "{message}");
}
