//! What the tests of snapshots have in common: a place to save in, and machines to be saved.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub use lepton_tests::counting::{check_counts, configure, let_run, running};
use lepton_tests::{Api, Vmm};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where a machine is saved.
pub struct Place(TempDir);

impl Place {
    /// An empty folder.
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    /// A file in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    /// The state file.
    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// The memory file.
    pub fn memory(&self) -> PathBuf {
        self.path("memory")
    }

    /// A request to save a machine here.
    pub fn create(&self) -> Value {
        json!({ "snapshot_path": self.state(), "mem_file_path": self.memory() })
    }

    /// A request to load the machine that is here, and to let it run.
    pub fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state(),
            "mem_backend": { "backend_type": "File", "backend_path": self.memory() },
            "resume_vm": true,
        })
    }
}

/// Changes a byte of a file.
pub fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.expect("a file to damage");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("so long");
    file.write_all_at(&[byte[0] ^ 1], at).expect("writable");
}

/// A machine of the counting guest that has run for a while and is paused.
pub fn paused(vcpus: u8, mib: u64) -> (Vmm, Api) {
    let (vmm, mut api) = running(vcpus, mib, |_, _| ());
    let_run(&mut api);
    api.reach("Paused");
    (vmm, api)
}

/// Loads by a process of its own.
pub fn load(place: &Place) -> (Vmm, Api) {
    let (vmm, mut api) = Vmm::quiet();
    api.put("/snapshot/load", &place.load());
    (vmm, api)
}

/// The reason for which a load is refused, after which the process is as before.
#[track_caller]
pub fn refusal(request: &Value) -> String {
    let (vmm, mut api) = Vmm::quiet();
    let before = vmm.open_files();
    let message = api.refused("PUT", "/snapshot/load", &request.to_string());
    assert_eq!(api.state(), "Not started");
    assert_eq!(vmm.open_files(), before, "{message}");
    message
}

/// A machine of a guest that ticks, saved and gone.
pub fn saved(place: &Place) {
    let (vmm, mut api) = paused(1, 128);
    api.put("/snapshot/create", &place.create());
    vmm.terminate();
}
