//! How the machine of a test comes to be: by a boot, from a snapshot, or as a copy of one that runs. A test of what a machine
//! does need not know: [`Metal`](crate::metal::Metal), [`running`] and [`Linux`](crate::linux::Linux) make it in the way that
//! the suite asks for.
//!
//! All that a running machine does, has, is asked for and ends by is tested in every way. In one way are tested:
//! - what a machine never gets from another one: kernels and initrds and how they are entered, tables, the command line, the
//!   boot timer, what is asked for before the start, sockets and configuration files that cannot be used;
//! - snapshots and clones themselves, whose tests say where each machine comes from, and moments of a whole life
//!   (`killed_at_any_moment...`), of which the beginning is one;
//! - jails, which know nothing of the machine: those of copies have tests of their own;
//! - clients of the API, which is served by a thread that knows no machine.

use std::cell::Cell;
use std::path::Path;

use lepton_api::client::ClientError;
use serde_json::{Map, Value, json};
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
    /// come to be `ready` before, in its own process and with its own configuration.
    #[track_caller]
    pub(crate) fn machine(self, builder: Builder, config: &Value, ready: Ready) -> Vmm {
        match self {
            Origin::Booted => builder.config(config).spawn(),
            Origin::Restored => restored(builder, config, ready),
            Origin::Cloned => cloned(builder, config, ready),
        }
    }
}

/// Waits until a machine has come to where another one may come of it.
pub type Ready = fn(&Vmm, &Value);

/// What a process has of its own, whatever machine is in it.
const OF_THE_PROCESS: [&str; 3] = ["serial", "logger", "metrics"];

/// A machine that runs, and its API: of `program`, which does not end by itself, entered in 64-bit mode, with more of a
/// configuration that `more` makes. In the way that the suite asks for.
#[track_caller]
pub fn running(program: &Program, more: impl FnOnce(&Path, &mut Value)) -> (Vmm, Api) {
    running_in(Vmm::builder(), program, Entry::Linux64, more)
}

/// The same, in the process that `builder` starts.
#[track_caller]
pub fn running_in(
    builder: Builder,
    program: &Program,
    entry: Entry,
    more: impl FnOnce(&Path, &mut Value),
) -> (Vmm, Api) {
    let kernel = program.write(builder.directory(), entry);
    let mut config = json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": [],
    });
    more(builder.directory(), &mut config);
    of_config(builder, &config, |_, _| ())
}

/// A machine of `config` in the process that `builder` starts, once it has come to be `ready`, and its API. In the way that the
/// suite asks for.
#[track_caller]
pub fn of_config(builder: Builder, config: &Value, ready: Ready) -> (Vmm, Api) {
    let origin = Origin::current();
    if origin == Origin::Booted {
        let vmm = builder.spawn();
        let mut api = vmm.api();
        api.configure(config);
        api.start();
        ready(&vmm, config);
        return (vmm, api);
    }
    let vmm = origin.machine(builder, config, ready);
    let api = vmm.api();
    (vmm, api)
}

thread_local! {
    static CURRENT: Cell<Origin> = const { Cell::new(Origin::Booted) };
}

#[track_caller]
fn ancestor(config: &Value, ready: Ready) -> (Vmm, Api) {
    let (vmm, mut api) = Vmm::quiet();
    api.configure(config);
    api.start();
    ready(&vmm, config);
    (vmm, api)
}

/// Takes out of `config` what is the process's.
fn taken(config: &mut Value) -> Value {
    let config = config.as_object_mut().expect("an object");
    let parts = OF_THE_PROCESS.iter();
    let parts: Map<String, Value> = parts
        .filter_map(|name| config.remove_entry(*name))
        .collect();
    parts.into()
}

/// A process without a machine, which has answered: so all of it is there.
#[track_caller]
fn heir(builder: Builder, own: &Value) -> Vmm {
    let vmm = builder.with_api().spawn();
    let mut api = vmm.api();
    assert_eq!(api.state(), "Not started");
    api.configure(own);
    vmm
}

#[track_caller]
fn restored(builder: Builder, config: &Value, ready: Ready) -> Vmm {
    let place = TempDir::new().expect("a temporary directory");
    let (state, memory) = (place.path().join("state"), place.path().join("memory"));
    let mut config = config.clone();
    let own = taken(&mut config);
    let (ancestor, mut api) = ancestor(&config, ready);
    api.reach("Paused");
    api.put(
        "/snapshot/create",
        &json!({ "snapshot_path": state, "mem_file_path": memory }),
    );
    ancestor.terminate();
    let vmm = heir(builder, &own);
    // Checked memory is not for everybody.
    let verify = rustix::process::geteuid().is_root();
    let tracks = &config["machine-config"]["track_dirty_pages"];
    let load = json!({
        "snapshot_path": state, "resume_vm": true, "track_dirty_pages": tracks == &json!(true),
        "mem_backend": { "backend_type": "File", "backend_path": memory, "verify": verify },
    });
    answered_at_last(&vmm, "PUT", "/snapshot/load", &load);
    vmm
}

/// Sends a request that lets the guest run, whose life may be over before the reply is read.
#[track_caller]
fn answered_at_last(vmm: &Vmm, method: &str, path: &str, body: &Value) {
    match vmm.api().try_request(method, path, &body.to_string()) {
        Ok((204, _)) | Err(ClientError::Closed | ClientError::Io(_)) => {}
        other => panic!("{body}: {other:?}"),
    }
}

#[track_caller]
fn cloned(builder: Builder, config: &Value, ready: Ready) -> Vmm {
    let place = TempDir::new().expect("a temporary directory");
    let adopt = place.path().join("adopt.sock");
    let mut child = json!({
        "adopt_socket": adopt, "network_overrides": [], "drive_overrides": [],
    });
    // What the test has a hand in is the copy's. The ancestor has others of the same kind.
    let mut config = config.clone();
    let own = taken(&mut config);
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
    let builder = builder.arguments(["--adopt".into(), adopt.into_os_string()]);
    let heir = heir(builder, &own);
    let (ancestor, mut api) = ancestor(&config, ready);
    // It goes on when the other one is gone, which takes a while on a busy host.
    let request = json!({ "children": [child], "resume_children": false }).to_string();
    let (status, reply) = api.request("PUT", "/clone", &request);
    assert_eq!(status, 200, "{reply}");
    drop(ancestor);
    let resume = json!({ "state": "Resumed" });
    answered_at_last(&heir, "PATCH", "/vm", &resume);
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
