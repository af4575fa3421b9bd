//! Ours in a jail of `lepton-jailer`, made anew for each machine.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::firecracker::configuration;
use super::{Driver, Firecracker, Prepared};
use crate::machine::Machine;
use crate::process::Failure;

const ID: &str = "vm";
/// Nobody, on any system.
const OWNER: u32 = 65534;
const KERNEL: &str = "kernel";
const SOCKET: &str = "run/firecracker.socket";

/// Our VMM, and the jailer that starts it.
pub struct Jailed {
    vmm: PathBuf,
    jailer: PathBuf,
}

impl Jailed {
    /// These programs.
    pub fn new(vmm: &Path, jailer: &Path) -> Self {
        Self {
            vmm: vmm.to_owned(),
            jailer: jailer.to_owned(),
        }
    }

    /// The VMM's root in the jail below `folder`.
    fn root(&self, folder: &Path) -> PathBuf {
        let name = self.vmm.file_name().unwrap_or(OsStr::new("vmm"));
        folder.join(name).join(ID).join("root")
    }

    /// Puts the machine's files into the jail and says what it is there.
    fn furnish(&self, machine: &Machine, folder: &Path) -> Result<Machine, Failure> {
        if !machine.taps.is_empty() || machine.vsock.is_some() {
            let reason = "in a jail only drives are measured".to_owned();
            return Err(Failure::NotOffered(reason));
        }
        let root = self.root(folder);
        fs::create_dir_all(&root)?;
        let place = |from: &Path, name: &str| -> io::Result<PathBuf> {
            fs::hard_link(from, root.join(name))?;
            chown(root.join(name), Some(OWNER), Some(OWNER))?;
            Ok(Path::new("/").join(name))
        };
        let mut inside = machine.clone();
        inside.kernel = place(&machine.kernel, KERNEL)?;
        for (number, drive) in inside.drives.iter_mut().enumerate() {
            drive.path = place(&drive.path, &format!("drive{number}"))?;
        }
        Ok(inside)
    }

    fn command(&self, folder: &Path) -> Command {
        let owner = OWNER.to_string();
        let mut command = Command::new(&self.jailer);
        command
            .args(["--id", ID, "--uid", &owner, "--gid", &owner])
            .arg("--exec-file")
            .arg(&self.vmm)
            .arg("--chroot-base-dir")
            .arg(folder)
            .args(["--", "--level", "Error"]);
        command
    }
}

impl Driver for Jailed {
    fn boots(&self, machine: &Machine, folder: &Path) -> Result<Command, Failure> {
        let inside = self.furnish(machine, folder)?;
        let file = self.root(folder).join("config.json");
        fs::write(&file, configuration(&inside).to_string())?;
        let mut command = self.command(folder);
        command.args(["--no-api", "--config-file", "/config.json"]);
        Ok(command)
    }

    fn serves(&self, socket: &Path, machine: &Machine, folder: &Path) -> Result<Command, Failure> {
        self.furnish(machine, folder)?;
        symlink(self.root(folder).join(SOCKET), socket)?;
        Ok(self.command(folder))
    }

    fn ends_with_reset(&self) -> bool {
        true
    }

    fn has_mmio_devices(&self) -> bool {
        true
    }

    fn configure(&self, stream: UnixStream, machine: &Machine) -> Result<Prepared, Failure> {
        let mut inside = machine.clone();
        inside.kernel = Path::new("/").join(KERNEL);
        for (number, drive) in inside.drives.iter_mut().enumerate() {
            drive.path = format!("/drive{number}").into();
        }
        Firecracker::new(&self.vmm).configure(stream, &inside)
    }
}
