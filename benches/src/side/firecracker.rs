//! Firecracker, and ours, which has its command line and API.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use lepton_api::Client;
use serde_json::{Value, json};

use super::{Driver, Prepared, check, put};
use crate::machine::{Engine, Machine};
use crate::process::{Failure, VMM_LOG};

/// A VMM with Firecracker's command line.
pub struct Firecracker {
    program: PathBuf,
    options: &'static [&'static str],
}

impl Firecracker {
    /// This program.
    pub fn new(program: &Path) -> Self {
        Self::with(program, &[])
    }

    /// This program with more options.
    pub fn with(program: &Path, options: &'static [&'static str]) -> Self {
        Self {
            program: program.to_owned(),
            options,
        }
    }

    fn command(&self, folder: &Path) -> Result<Command, Failure> {
        // Firecracker wants the file to be there.
        let log = folder.join(VMM_LOG);
        std::fs::write(&log, "")?;
        let mut command = Command::new(&self.program);
        command
            .args(["--level", "Error", "--log-path"])
            .arg(log)
            .args(self.options);
        Ok(command)
    }
}

/// The configuration file, whose keys are also the API's.
pub(super) fn configuration(machine: &Machine) -> Value {
    let drives: Vec<Value> = machine
        .drives
        .iter()
        .enumerate()
        .map(|(index, drive)| {
            json!({
                "drive_id": format!("d{index}"),
                "path_on_host": drive.path,
                "is_root_device": drive.root,
                "is_read_only": drive.read_only,
                // With flushes, as the others have them.
                "cache_type": "Writeback",
                "io_engine": match drive.engine { Engine::Sync => "Sync", Engine::Async => "Async" },
            })
        })
        .collect();
    let interfaces: Vec<Value> = machine
        .taps
        .iter()
        .enumerate()
        .map(|(index, tap)| json!({"iface_id": format!("eth{index}"), "host_dev_name": tap}))
        .collect();
    let mut all = json!({
        "boot-source": {"kernel_image_path": machine.kernel, "boot_args": machine.command_line},
        "machine-config": {"vcpu_count": machine.vcpus, "mem_size_mib": machine.memory_mib},
        "drives": drives,
        "network-interfaces": interfaces,
    });
    if let Some(path) = &machine.vsock {
        all["vsock"] = json!({"guest_cid": 3, "uds_path": path});
    }
    all
}

impl Driver for Firecracker {
    fn boots(&self, machine: &Machine, folder: &Path) -> Result<Command, Failure> {
        let file = folder.join("config.json");
        std::fs::write(&file, configuration(machine).to_string())?;
        let mut command = self.command(folder)?;
        command.arg("--no-api").arg("--config-file").arg(file);
        Ok(command)
    }

    fn serves(&self, socket: &Path, _machine: &Machine, folder: &Path) -> Result<Command, Failure> {
        let mut command = self.command(folder)?;
        command.arg("--api-sock").arg(socket);
        Ok(command)
    }

    fn ends_with_reset(&self) -> bool {
        true
    }

    fn has_mmio_devices(&self) -> bool {
        true
    }

    fn configure(&self, stream: UnixStream, machine: &Machine) -> Result<Prepared, Failure> {
        let mut client = Client::from_stream(stream.try_clone()?);
        let all = configuration(machine);
        let mut ask = |path: &str, body: &Value| check(path, client.put(path, &body.to_string()));
        for key in ["boot-source", "machine-config", "vsock"] {
            if let Some(body) = all.get(key) {
                ask(&format!("/{key}"), body)?;
            }
        }
        for (key, id) in [("drives", "drive_id"), ("network-interfaces", "iface_id")] {
            for body in all[key].as_array().into_iter().flatten() {
                ask(
                    &format!("/{key}/{}", body[id].as_str().unwrap_or_default()),
                    body,
                )?;
            }
        }
        Ok(Prepared {
            stream,
            request: put("/actions", r#"{"action_type":"InstanceStart"}"#),
        })
    }
}
