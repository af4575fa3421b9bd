//! QEMU's microvm machine, with everything off that it can do without.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Driver, Prepared};
use crate::machine::{Engine, Machine};
use crate::process::Failure;

/// QEMU.
pub struct Qemu(PathBuf);

impl Qemu {
    /// This program.
    pub fn new(program: &Path) -> Self {
        Self(program.to_owned())
    }
}

/// QEMU's options are lists with commas; a comma in a value is written twice.
fn quoted(path: &Path) -> OsString {
    path.to_string_lossy().replace(',', ",,").into()
}

fn option(start: &str, path: &Path, end: &str) -> OsString {
    let mut text = OsString::from(start);
    text.push(quoted(path));
    text.push(end);
    text
}

impl Driver for Qemu {
    fn boots(&self, machine: &Machine, _folder: &Path) -> Result<Command, Failure> {
        if machine.vsock.is_some() {
            return Err(Failure::NotOffered(
                "QEMU's vsock needs vhost-vsock in the host's kernel".to_owned(),
            ));
        }
        let mut command = Command::new(&self.0);
        command.args([
            "-machine",
            "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off",
            "-cpu",
            "host",
            // Devices of VIRTIO 1, as everywhere else.
            "-global",
            "virtio-mmio.force-legacy=false",
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-no-reboot",
            // The others have it too: it resets the machine.
            "-device",
            "i8042",
            "-chardev",
            "stdio,id=console,signal=off",
            "-serial",
            "chardev:console",
        ]);
        command.args(["-m", &machine.memory_mib.to_string()]);
        command.args(["-smp", &machine.vcpus.to_string()]);
        command.arg("-kernel").arg(&machine.kernel);
        command.args(["-append", &machine.command_line_with_root()]);
        for (index, drive) in machine.drives.iter().enumerate() {
            let read_only = if drive.read_only { "on" } else { "off" };
            let engine = match drive.engine {
                Engine::Sync => "threads",
                Engine::Async => "io_uring",
            };
            let end = format!(
                ",id=d{index},format=raw,if=none,cache=writeback,aio={engine},read-only={read_only}"
            );
            command
                .arg("-drive")
                .arg(option("file=", &drive.path, &end));
            command.args(["-device", &format!("virtio-blk-device,drive=d{index}")]);
        }
        for (index, tap) in machine.taps.iter().enumerate() {
            let network = format!("tap,id=n{index},ifname={tap},script=no,downscript=no");
            command.args(["-netdev", &network]);
            command.args(["-device", &format!("virtio-net-device,netdev=n{index}")]);
        }
        Ok(command)
    }

    fn serves(&self, socket: &Path, machine: &Machine, folder: &Path) -> Result<Command, Failure> {
        let mut command = self.boots(machine, folder)?;
        command.arg("-S");
        command
            .arg("-qmp")
            .arg(option("unix:", socket, ",server=on,wait=off"));
        Ok(command)
    }

    fn ends_with_reset(&self) -> bool {
        true
    }

    fn has_mmio_devices(&self) -> bool {
        true
    }

    fn configure(&self, _stream: UnixStream, _machine: &Machine) -> Result<Prepared, Failure> {
        Err(Failure::NotOffered(
            "QEMU makes the machine before it listens; what is left of a start is no start"
                .to_owned(),
        ))
    }
}
