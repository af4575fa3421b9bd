//! Cloud Hypervisor.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use lepton_api::Client;
use serde_json::{Value, json};

use super::{Driver, Prepared, check, put};
use crate::machine::{Engine, Machine};
use crate::process::{Failure, VMM_LOG};

/// Cloud Hypervisor.
pub struct CloudHypervisor(PathBuf);

impl CloudHypervisor {
    /// This program.
    pub fn new(program: &Path) -> Self {
        Self(program.to_owned())
    }

    fn command(&self, folder: &Path) -> Command {
        let mut command = Command::new(&self.0);
        command.arg("--log-file").arg(folder.join(VMM_LOG));
        command
    }
}

fn on(yes: bool) -> &'static str {
    if yes { "on" } else { "off" }
}

/// The engine that its own choice would be, and none if that is switched off.
fn is_async(engine: Engine) -> bool {
    engine == Engine::Async
}

impl Driver for CloudHypervisor {
    fn boots(&self, machine: &Machine, folder: &Path) -> Result<Command, Failure> {
        let mut command = self.command(folder);
        command.arg("--kernel").arg(&machine.kernel);
        command.args(["--cmdline", &machine.command_line_with_root()]);
        command.args(["--cpus", &format!("boot={}", machine.vcpus)]);
        command.args(["--memory", &format!("size={}M", machine.memory_mib)]);
        command.args(["--serial", "tty", "--console", "off"]);
        if !machine.drives.is_empty() {
            command.arg("--disk");
        }
        for drive in &machine.drives {
            command.arg(format!(
                "path={},image_type=raw,readonly={},_disable_io_uring={}",
                drive.path.display(),
                on(drive.read_only),
                on(!is_async(drive.engine)),
            ));
        }
        if !machine.taps.is_empty() {
            command.arg("--net");
        }
        command.args(machine.taps.iter().map(|tap| format!("tap={tap}")));
        if let Some(path) = &machine.vsock {
            command.args(["--vsock", &format!("cid=3,socket={}", path.display())]);
        }
        Ok(command)
    }

    fn serves(&self, socket: &Path, _machine: &Machine, folder: &Path) -> Result<Command, Failure> {
        let mut command = self.command(folder);
        command.arg("--api-socket").arg(socket);
        Ok(command)
    }

    fn ends_with_reset(&self) -> bool {
        false
    }

    fn has_mmio_devices(&self) -> bool {
        false
    }

    fn configure(&self, stream: UnixStream, machine: &Machine) -> Result<Prepared, Failure> {
        let disks: Vec<Value> = machine
            .drives
            .iter()
            .map(|drive| {
                json!({"path": drive.path, "readonly": drive.read_only, "image_type": "Raw",
                    "disable_io_uring": !is_async(drive.engine)})
            })
            .collect();
        let nets: Vec<Value> = machine.taps.iter().map(|tap| json!({"tap": tap})).collect();
        let mut body = json!({
            "payload": {"kernel": machine.kernel, "cmdline": machine.command_line_with_root()},
            "cpus": {"boot_vcpus": machine.vcpus, "max_vcpus": machine.vcpus},
            "memory": {"size": machine.memory_mib << 20},
            "serial": {"mode": "Tty"},
            "console": {"mode": "Off"},
            "disks": disks,
            "net": nets,
        });
        if let Some(path) = &machine.vsock {
            body["vsock"] = json!({"cid": 3, "socket": path});
        }
        let mut client = Client::from_stream(stream.try_clone()?);
        let path = "/api/v1/vm.create";
        check(path, client.put(path, &body.to_string()))?;
        Ok(Prepared {
            stream,
            request: put("/api/v1/vm.boot", ""),
        })
    }
}
