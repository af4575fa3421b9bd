//! How the machine of a test comes to be: by a boot, from a snapshot, or as a copy of one that runs. A test of what a machine
//! does need not know: [`Metal`](crate::metal::Metal) makes it in the way that the suite asks for.

use std::cell::Cell;
use std::path::Path;

use lepton_api::client::ClientError;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::Api;
use crate::guest::{Entry, Program};
use crate::tap::Tap;
use crate::vmm::{Builder, Vmm};

/// A way for a machine to come to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It boots, and is the one that booted.
    Booted,
    /// It was saved in the midst of its life and is loaded by another process.
    Restored,
    /// It was cloned in the midst of its life, and the other one is gone.
    Cloned,
}

impl Origin {
    /// All of them.
    pub const ALL: [Origin; 3] = [Origin::Booted, Origin::Restored, Origin::Cloned];

    /// What is put behind the name of a test.
    pub fn suffix(self) -> &'static str {
        match self {
            Origin::Booted => "",
            Origin::Restored => "_restored",
            Origin::Cloned => "_cloned",
        }
    }

    /// The way that the test of this thread asks for.
    pub fn current() -> Self {
        CURRENT.get()
    }

    /// Says it for the test of this thread.
    pub(crate) fn set(self) {
        CURRENT.set(self);
    }

    /// Makes a machine of `config` in this way, in the process that `builder` starts. Where it comes of another one, that has
    /// come to be `ready` before.
    #[track_caller]
    pub(crate) fn machine(self, builder: Builder, config: &Value, ready: fn(&Vmm)) -> Vmm {
        match self {
            Origin::Booted => builder.config(config).spawn(),
            Origin::Restored => restored(builder, config, ready),
            Origin::Cloned => cloned(builder, config, ready),
        }
    }
}

/// A machine that runs, and its API: of `program`, which never ends, entered in 64-bit mode, with more of a configuration that
/// `more` makes. In the way that the suite asks for.
#[track_caller]
pub fn running(program: &Program, more: impl FnOnce(&Path, &mut Value)) -> (Vmm, Api) {
    let builder = Vmm::builder();
    let kernel = program.write(builder.directory(), Entry::Linux64);
    let mut config = json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": [],
    });
    more(builder.directory(), &mut config);
    let origin = Origin::current();
    if origin == Origin::Booted {
        let vmm = builder.spawn();
        let mut api = vmm.api();
        api.configure(&config);
        api.start();
        return (vmm, api);
    }
    let vmm = origin.machine(builder, &config, |_| ());
    let api = vmm.api();
    (vmm, api)
}

thread_local! {
    static CURRENT: Cell<Origin> = const { Cell::new(Origin::Booted) };
}

#[track_caller]
fn ancestor(config: &Value, ready: fn(&Vmm)) -> (Vmm, Api) {
    let (vmm, mut api) = Vmm::quiet();
    api.configure(config);
    api.start();
    ready(&vmm);
    (vmm, api)
}

#[track_caller]
fn restored(builder: Builder, config: &Value, ready: fn(&Vmm)) -> Vmm {
    let place = TempDir::new().expect("a temporary directory");
    let (state, memory) = (place.path().join("state"), place.path().join("memory"));
    let (ancestor, mut api) = ancestor(config, ready);
    api.reach("Paused");
    api.put(
        "/snapshot/create",
        &json!({ "snapshot_path": state, "mem_file_path": memory }),
    );
    ancestor.terminate();
    let vmm = builder.with_api().spawn();
    // Checked memory is not for everybody.
    let verify = rustix::process::geteuid().is_root();
    let load = json!({
        "snapshot_path": state, "resume_vm": true,
        "mem_backend": { "backend_type": "File", "backend_path": memory, "verify": verify },
    });
    match vmm
        .api()
        .try_request("PUT", "/snapshot/load", &load.to_string())
    {
        // The guest's life may be over before the reply is read.
        Ok((204, _)) | Err(ClientError::Closed | ClientError::Io(_)) => {}
        other => panic!("{load}: {other:?}"),
    }
    vmm
}

#[track_caller]
fn cloned(builder: Builder, config: &Value, ready: fn(&Vmm)) -> Vmm {
    let place = TempDir::new().expect("a temporary directory");
    let adopt = place.path().join("adopt.sock");
    let mut child = json!({
        "adopt_socket": adopt, "network_overrides": [], "drive_overrides": [],
    });
    // What the test has a hand in is the copy's. The ancestor has others of the same kind.
    let mut config = config.clone();
    config["machine-config"]["clonable"] = true.into();
    let mut taps = Vec::new();
    for interface in list(&mut config, "network-interfaces") {
        let tap = Tap::new(None);
        push(
            &mut child,
            "network_overrides",
            interface,
            &["iface_id", "host_dev_name"],
        );
        interface["host_dev_name"] = tap.name().into();
        taps.push(tap);
    }
    for drive in list(&mut config, "drives") {
        push(
            &mut child,
            "drive_overrides",
            drive,
            &["drive_id", "path_on_host", "overlay"],
        );
        if drive.get("overlay").is_some() {
            let id = drive["drive_id"].as_str().expect("a drive has a name");
            drive["overlay"]["path"] = json!(place.path().join(id));
        }
    }
    if let Some(vsock) = config.get_mut("vsock") {
        child["vsock_override"] = json!({ "uds_path": vsock["uds_path"] });
        vsock["uds_path"] = json!(place.path().join("v.sock"));
    }
    let heir = builder
        .with_api()
        .arguments(["--adopt".into(), adopt.into_os_string()]);
    let heir = heir.spawn();
    // Once it has answered, all of it is there.
    assert_eq!(heir.api().state(), "Not started");
    let (_ancestor, mut api) = ancestor(&config, ready);
    let request = json!({ "children": [child] }).to_string();
    let (status, reply) = api.request("PUT", "/clone", &request);
    assert_eq!(status, 200, "{reply}");
    heir
}

fn list<'a>(config: &'a mut Value, name: &str) -> impl Iterator<Item = &'a mut Value> {
    let found = config.get_mut(name).and_then(Value::as_array_mut);
    found.into_iter().flatten()
}

/// Adds to a list of the child's what of `from` has these names.
fn push(child: &mut Value, name: &str, from: &Value, fields: &[&str]) {
    let fields = fields
        .iter()
        .filter_map(|field| Some((*field, from.get(*field)?)));
    let object: Value = fields
        .map(|(field, value)| (field.to_owned(), value.clone()))
        .collect();
    child[name].as_array_mut().expect("a list").push(object);
}
