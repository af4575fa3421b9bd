//! Machines and those who become their copies.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use lepton_tests::counting::{configure, let_run};
use lepton_tests::{Api, PATIENCE, Vmm};
use serde_json::{Value, json};

/// A machine of the counting guest that runs.
#[track_caller]
pub fn parent(mib: u64, clonable: bool) -> (Vmm, Api) {
    let (vmm, mut api) = Vmm::quiet();
    configure(&vmm, &mut api, 1, mib);
    api.patch("/machine-config", &json!({ "clonable": clonable }));
    api.put(
        "/serial",
        &json!({ "serial_out_path": vmm.path("console") }),
    );
    api.start();
    let_run(&mut api);
    (vmm, api)
}

/// All that the guest has said by now.
pub fn said(vmm: &Vmm) -> Vec<u8> {
    std::fs::read(vmm.path("console")).expect("a console")
}

/// A process that waits for a machine.
pub struct Heir {
    pub vmm: Vmm,
    pub api: Api,
    pub socket: PathBuf,
}

impl Heir {
    /// One with an id, that is ready.
    #[track_caller]
    pub fn called(id: &str) -> Self {
        Self::start(id, &[])
    }

    /// One that may make files in that folder only.
    #[track_caller]
    pub fn within(id: &str, folder: &Path) -> Self {
        Self::start(id, &["--allow-path".as_ref(), folder.as_os_str()])
    }

    /// One that has made itself ready for a machine of `mib` MiB.
    #[track_caller]
    pub fn expecting(id: &str, mib: u64) -> Self {
        Self::start(id, &["--expect-mem-mib".as_ref(), mib.to_string().as_ref()])
    }

    #[track_caller]
    fn start(id: &str, more: &[&OsStr]) -> Self {
        let builder = Vmm::builder();
        let log = builder.directory().join("log");
        let socket = builder.directory().join("adopt.sock");
        let arguments = ["--log-path".into(), log.into_os_string()];
        let vmm = builder
            .arguments(arguments)
            .arguments(["--id", id, "--adopt"])
            .arguments([socket.clone().into_os_string()])
            .arguments(more)
            .spawn();
        let mut api = vmm.api();
        assert_eq!(api.state(), "Not started");
        Heir { vmm, api, socket }
    }

    /// What a request to clone says of it.
    pub fn child(&self) -> Value {
        json!({ "adopt_socket": self.socket })
    }
}

/// A request for these children, which may take their time: the host may be busy.
pub fn request(children: &[Value]) -> Value {
    json!({ "children": children, "timeout_ms": (PATIENCE / 2).as_millis() as u64 })
}

/// Clones, and returns the answer.
#[track_caller]
pub fn clone(api: &mut Api, request: &Value) -> Value {
    let (status, reply) = api.request("PUT", "/clone", &request.to_string());
    assert_eq!(status, 200, "{reply}");
    serde_json::from_str(&reply).expect("a reply in JSON")
}

/// Processes called copy-0, copy-1 and so on. Every second one expects a machine of 128 MiB.
#[track_caller]
pub fn family(size: usize) -> Vec<Heir> {
    let called = |number: usize| {
        let id = format!("copy-{number}");
        match number.is_multiple_of(2) {
            true => Heir::expecting(&id, 128),
            false => Heir::called(&id),
        }
    };
    (0..size).map(called).collect()
}
