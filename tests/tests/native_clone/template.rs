//! Copies of a saved machine, of which none runs: templates.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lepton_snapshot::Replacement;
use lepton_snapshot::codec;
use lepton_snapshot::state_file::{self, Opened};
use lepton_tests::counting::{check_counts, let_run};
use lepton_tests::metal::Metal;
use lepton_tests::{Api, Vmm};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::drives::{Writer, check_all, content, write_some};
use crate::family::{Heir, clone, family, parent, request, said};

/// A saved machine.
struct Saved(TempDir);

impl Saved {
    fn new(api: &mut Api) -> Self {
        let saved = Saved(tempfile::tempdir().expect("a temporary directory"));
        api.reach("Paused");
        api.put(
            "/snapshot/create",
            &json!({ "snapshot_path": saved.state(), "mem_file_path": saved.memory() }),
        );
        saved
    }

    /// One of the counting guest, and what the guest had said.
    fn counting(mib: u64) -> (Self, Vec<u8>) {
        let (vmm, mut api) = parent(mib, false);
        let saved = Saved::new(&mut api);
        let before = said(&vmm);
        vmm.terminate();
        (saved, before)
    }

    fn state(&self) -> PathBuf {
        self.0.path().join("state")
    }

    fn memory(&self) -> PathBuf {
        self.0.path().join("memory")
    }

    fn arguments(&self) -> [PathBuf; 4] {
        [
            "--template".into(),
            self.state(),
            "--template-memory".into(),
            self.memory(),
        ]
    }

    fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state(),
            "mem_backend": { "backend_type": "File", "backend_path": self.memory(), "verify": false },
        })
    }

    /// A process that keeps it.
    #[track_caller]
    fn template(&self) -> (Vmm, Api) {
        let vmm = Vmm::builder().arguments(self.arguments()).spawn();
        let mut api = vmm.api();
        let info = api.get("/");
        assert_eq!(info["state"], "Paused");
        assert_eq!(info["template"], true);
        (vmm, api)
    }
}

fn flip(path: &Path, at: u64) {
    let mut file = OpenOptions::new();
    let file = file.read(true).write(true).open(path).expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("it is as long");
    file.write_all_at(&[byte[0] ^ 1], at).expect("it is ours");
}

pub fn a_template_is_cloned_again_and_again() {
    for mib in [16, 4096] {
        let (saved, before) = Saved::counting(mib);
        let (vmm, mut api) = saved.template();
        // It has all of it.
        fs::remove_file(saved.state()).expect("a file");
        fs::remove_file(saved.memory()).expect("a file");
        let mut heirs = family(5);
        for some in heirs.chunks(2) {
            let children: Vec<_> = some.iter().map(Heir::child).collect();
            let answer = clone(&mut api, &request(&children));
            assert_eq!(answer["pause_us"], 0);
            assert_eq!(answer["children"][0]["pid"], json!(some[0].vmm.pid()));
        }
        let mut last = heirs.pop().expect("five");
        for mut heir in heirs {
            let_run(&mut heir.api);
            heir.vmm.signal(Signal::KILL);
        }
        // The template has outlived them, and knows nothing of what they did.
        let mut late = Heir::called("late");
        clone(&mut api, &request(&[late.child()]));
        vmm.terminate();
        // These outlive the template; each goes on where the saved machine was.
        for heir in [&mut last, &mut late] {
            let_run(&mut heir.api);
            heir.api.reach("Paused");
        }
        // And are machines like others.
        let mut child = Heir::called("child");
        clone(&mut late.api, &request(&[child.child()]));
        child.api.reach("Resumed");
        let_run(&mut child.api);
        for heir in [last, late] {
            let mut stream = before.clone();
            stream.extend(heir.vmm.terminate().stdout);
            assert!(check_counts(&stream) > 10);
        }
    }
}

pub fn a_template_that_is_asked_to_end_leaves_nothing() {
    let (saved, _) = Saved::counting(16);
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 156)] {
        let (vmm, _) = saved.template();
        let socket = vmm.socket().to_owned();
        assert!(socket.exists());
        vmm.signal(signal);
        // As long as what it returns is there, so is the folder.
        let _ended = vmm.wait().expect_code(code);
        assert!(!socket.exists(), "{signal:?}");
    }
    // What it was made of is as it was.
    saved.template().0.terminate();
}

/// What a copy's guest says that it was told, behind this word.
#[track_caller]
fn told(heir: &Heir, word: &str) -> String {
    heir.vmm.stdout.wait_for("\nend\n");
    let text = heir.vmm.stdout.text();
    let line = text.lines().find_map(|line| line.strip_prefix(word));
    line.unwrap_or_else(|| panic!("no {word} in {text}"))
        .to_owned()
}

pub fn copies_of_a_template_are_told_who_they_are() {
    let arguments = "probe.mode=vsock_confirm,idle probe.listen=1 probe.port=1026";
    let metal = Metal::new("LEPTON_PROBE", arguments).with_api();
    let socket = metal.path("v.sock");
    let vsock = json!({ "guest_cid": 42, "uds_path": socket });
    let vmm = metal.with(|config| config["vsock"] = vsock).start();
    vmm.stdout.wait_for("\"ready\":1");
    let saved = Saved::new(&mut vmm.api());
    vmm.terminate();
    let (_template, mut api) = saved.template();
    let heirs = ["one", "two"].map(Heir::called);
    let children = heirs.each_ref().map(|heir| {
        let mut child = heir.child();
        child["vsock_override"] = json!({ "uds_path": heir.vmm.path("v.sock") });
        child["identity"] = json!({ "timeout_ms": 60_000, "hostname": "copy" });
        child
    });
    clone(&mut api, &request(&children));
    for heir in &heirs {
        assert_eq!(told(heir, "hostname "), "copy");
    }
    for word in ["seed ", "machine-id "] {
        let [one, two] = heirs.each_ref().map(|heir| told(heir, word));
        assert_ne!(one, two, "{word}");
    }
}

pub fn what_a_template_is_not_asked_for() {
    let (saved, _) = Saved::counting(16);
    let (vmm, mut api) = saved.template();
    assert_eq!(api.get("/machine-config")["mem_size_mib"], 16);
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    let save = json!({ "snapshot_path": "a", "mem_file_path": "b" }).to_string();
    for (method, path, body) in [
        ("PATCH", "/vm", json!({ "state": "Resumed" }).to_string()),
        ("PATCH", "/vm", json!({ "state": "Paused" }).to_string()),
        ("PUT", "/actions", start),
        ("PUT", "/snapshot/create", save),
        ("PUT", "/snapshot/load", saved.load().to_string()),
        ("GET", "/vm/divergence", String::new()),
    ] {
        let message = api.refused(method, path, &body);
        assert!(message.contains("keeps a template"), "{path}: {message}");
        assert!(message.contains("PUT /clone"), "{path}: {message}");
    }
    assert_eq!(api.state(), "Paused");
    assert!(!vmm.threads().iter().any(|name| name.starts_with("vcpu")));
    // Others are none.
    assert_eq!(parent(16, false).1.get("/").get("template"), None);
    // A machine that was loaded says what to do instead.
    let (_loaded, mut api) = Vmm::quiet();
    api.put("/snapshot/load", &saved.load());
    let heir = Heir::called("copy");
    let body = request(&[heir.child()]).to_string();
    let message = api.refused("PUT", "/clone", &body);
    assert!(message.contains("lepton-vmm --template"), "{message}");
}

pub fn a_damaged_memory_is_no_template() {
    let (saved, _) = Saved::counting(16);
    // Where the guest's code is.
    let at = 0x10_0000 + 0x800;
    flip(&saved.memory(), at);
    let builder = Vmm::builder().arguments(saved.arguments());
    let ended = builder.spawn().wait().expect_code(1);
    for text in ["--template: ", "chunk 16 ", "is not what was saved"] {
        assert!(ended.stderr.contains(text), "{}", ended.stderr);
    }
    flip(&saved.memory(), at);
    let (vmm, _) = saved.template();
    vmm.terminate();
    fs::write(saved.state(), "no state").expect("a file");
    let builder = Vmm::builder().arguments(saved.arguments());
    let ended = builder.spawn().wait().expect_code(1);
    assert!(ended.stderr.contains("state"), "{}", ended.stderr);
}

pub fn a_machine_of_another_processor_does_not_run() {
    let (saved, _) = Saved::counting(16);
    to_another_vendor(&saved.state());
    let said = "the machine was saved on a processor of ";
    let (_vmm, mut api) = Vmm::quiet();
    let message = api.refused("PUT", "/snapshot/load", &saved.load().to_string());
    assert!(message.contains(said), "{message}");
    // Who keeps it has no KVM to ask. Who gets a copy has.
    let (_keeper, mut api) = saved.template();
    let heir = Heir::called("copy");
    let body = request(&[heir.child()]).to_string();
    let message = api.refused("PUT", "/clone", &body);
    assert!(message.contains(said), "{message}");
}

/// Changes the name of the processor's maker that a state file has.
fn to_another_vendor(path: &Path) {
    let Opened {
        mut state,
        mut memory,
    } = state_file::open(path).expect("a state file");
    // The first letters of the name, as CPUID has them in EBX, and as they are saved.
    let names = [*b"Genu", *b"Auth"].map(|name| codec::encode(&u32::from_le_bytes(name)));
    let names = names.map(|bytes| bytes.expect("a number"));
    let mut places = 0..state.len();
    let at = places.find(|at| names.iter().any(|name| state[*at..].starts_with(name)));
    state[at.expect("a maker that KVM runs on")] ^= 1;
    let memory = memory.leaves().expect("its hashes");
    let file = Replacement::new(path).expect("a file beside it");
    state_file::write(&file, &state, &memory, &memory.groups()).expect("room");
    file.put_in_place().expect("it is ours");
}

pub fn copies_of_a_template_have_drives_of_their_own() {
    let mut writer = Writer::new("Async", "Writeback");
    writer.api.reach("Paused");
    let saved = Saved::new(&mut writer.api);
    let (base, own) = (writer.path("base"), writer.path("own"));
    // As long as the machine has its overlay, nobody else can.
    let builder = Vmm::builder().arguments(saved.arguments());
    let ended = builder.spawn().wait().expect_code(1);
    assert!(ended.stderr.contains("drive d: "), "{}", ended.stderr);
    writer.vmm.terminate();
    let before = content(&base, &[], &own);
    let (vmm, mut api) = saved.template();
    let mut heirs = family(3);
    for (number, heir) in heirs.iter().enumerate() {
        let mut child = heir.child();
        if number == 0 {
            let kept = writer.folder.path().join("kept");
            child["overlays"] = json!([{ "drive_id": "d", "path": kept }]);
        }
        clone(&mut api, &request(&[child]));
    }
    vmm.terminate();
    for heir in &mut heirs {
        check_all(&mut heir.api);
        write_some(&mut heir.api);
    }
    // As a template, it can be used again, meanwhile too.
    let (second, mut api) = saved.template();
    let mut heir = Heir::called("again");
    clone(&mut api, &request(&[heir.child()]));
    check_all(&mut heir.api);
    second.terminate();
    heir.vmm.terminate();
    // Those who have a layer keep others from it.
    drop(heirs);
    // What the machine had written is what it was, and cannot be written any more.
    assert!(content(&base, &[], &own) == before);
    let (_vmm, mut api) = Vmm::quiet();
    let message = api.refused("PUT", "/snapshot/load", &saved.load().to_string());
    assert!(message.contains("own is a layer"), "{message}");
}
