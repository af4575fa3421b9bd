//! What is measured: ours, the peers, the bare KVM program, and the system calls of devices alone.
//!
//! Each VMM has a [`Driver`], which speaks its own public command line and API.

mod cloud_hypervisor;
mod firecracker;
mod jailed;
mod qemu;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::ValueEnum;
use lepton_api::Client;

use crate::machine::Machine;
use crate::process::Failure;

pub use cloud_hypervisor::CloudHypervisor;
pub use firecracker::Firecracker;
pub use jailed::Jailed;
pub use qemu::Qemu;

/// The id of our side in results.
pub const OURS: &str = "lepton";
/// The id of the system calls alone.
pub const CALLS: &str = "calls";

/// How a VMM is asked for things.
pub trait Driver {
    /// A command that boots `machine` at once, its console on the standard output. Files it needs go to `folder`.
    fn boots(&self, machine: &Machine, folder: &Path) -> Result<Command, Failure>;

    /// A command that listens on `socket` and waits for requests. `machine` is for VMMs that must know it before.
    fn serves(&self, socket: &Path, machine: &Machine, folder: &Path) -> Result<Command, Failure>;

    /// Whether the process ends when the guest resets the machine.
    fn ends_with_reset(&self) -> bool;

    /// Whether its devices are those of virtio-mmio.
    fn has_mmio_devices(&self) -> bool;

    /// Configures `machine` over a connection to the socket, all but its start.
    fn configure(&self, stream: UnixStream, machine: &Machine) -> Result<Prepared, Failure>;
}

/// A request that starts a machine, ready to be sent.
pub struct Prepared {
    stream: UnixStream,
    request: String,
}

impl Prepared {
    /// Sends it, and returns when. The reply is [`Sent::accepted`].
    pub fn send(mut self) -> Result<(Instant, Sent), Failure> {
        let at = Instant::now();
        self.stream.write_all(self.request.as_bytes())?;
        Ok((at, Sent(Client::from_stream(self.stream))))
    }
}

/// A request without its reply.
pub struct Sent(Client);

impl Sent {
    /// Reads the reply.
    pub fn accepted(mut self) -> Result<(), Failure> {
        check("the start", self.0.reply())
    }
}

/// A reply has to be a success.
fn check(
    what: &str,
    reply: Result<(u16, String), lepton_api::client::ClientError>,
) -> Result<(), Failure> {
    match reply {
        Ok((200..300, _)) => Ok(()),
        Ok((status, body)) => Err(Failure::because(format!("{what}: {status} {body}"))),
        Err(error) => Err(Failure::because(format!("{what}: {error}"))),
    }
}

/// A PUT with a body of JSON, as bytes.
fn put(path: &str, body: &str) -> String {
    format!(
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Interrupt controllers a machine can have; each has its price, mostly at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IrqChip {
    /// None.
    None,
    /// Local APICs in the kernel, the rest in the VMM: what ours has.
    Split,
    /// All of a PC's in the kernel: what Firecracker has.
    Full,
}

/// How a side comes to its values.
pub enum Means {
    /// A VMM.
    Vmm(Box<dyn Driver>),
    /// The bare KVM program.
    Floor(IrqChip),
    /// The system calls of a device under load, without a machine.
    Calls,
}

/// One of those that are compared.
pub struct Side {
    /// Its name in results.
    pub id: &'static str,
    /// Its program.
    pub program: PathBuf,
    /// How it is measured.
    pub means: Means,
}

impl Side {
    /// Our VMM.
    pub fn ours(program: PathBuf) -> Self {
        Self {
            id: OURS,
            means: Means::Vmm(Box::new(Firecracker::new(&program))),
            program,
        }
    }

    /// Our VMM without seccomp and Landlock.
    pub fn unconfined(program: &Path) -> Self {
        const OPTIONS: &[&str] = &["--no-seccomp", "--no-landlock"];
        Self {
            id: "lepton-unconfined",
            means: Means::Vmm(Box::new(Firecracker::with(program, OPTIONS))),
            program: program.to_owned(),
        }
    }

    /// Our VMM in a jail.
    pub fn jailed(program: &Path, jailer: &Path) -> Self {
        Self {
            id: "lepton-jailed",
            means: Means::Vmm(Box::new(Jailed::new(program, jailer))),
            program: program.to_owned(),
        }
    }

    /// The bare KVM program with this interrupt controller.
    pub fn floor(program: PathBuf, irqchip: IrqChip) -> Self {
        let id = match irqchip {
            IrqChip::None => "floor-none",
            IrqChip::Split => "floor-split",
            IrqChip::Full => "floor-full",
        };
        Self {
            id,
            program,
            means: Means::Floor(irqchip),
        }
    }

    /// The system calls alone.
    pub fn calls(program: PathBuf) -> Self {
        Self {
            id: CALLS,
            program,
            means: Means::Calls,
        }
    }

    /// A peer; an error, one line, if its program does not run.
    pub fn peer(peer: &Peer) -> Result<Self, String> {
        let program = in_path(&peer.program)?;
        version(&program)?;
        let driver: Box<dyn Driver> = match peer.kind {
            Kind::Firecracker => Box::new(Firecracker::new(&program)),
            Kind::CloudHypervisor => Box::new(CloudHypervisor::new(&program)),
            Kind::Qemu => Box::new(Qemu::new(&program)),
        };
        Ok(Self {
            id: peer.kind.id(),
            program,
            means: Means::Vmm(driver),
        })
    }

    /// Whether it is a VMM, and no program of the harness's own.
    pub fn is_vmm(&self) -> bool {
        matches!(self.means, Means::Vmm(_))
    }
}

/// The program itself, if it is named without a folder.
fn in_path(program: &Path) -> Result<PathBuf, String> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(program.to_owned())
        .chain(std::env::split_paths(&folders).map(|folder| folder.join(program)))
        .find(|path| path.is_file())
        .ok_or_else(|| format!("there is no program {}", program.display()))
}

/// The first line of what a program says of its version.
pub fn version(program: &Path) -> Result<String, String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.trim().to_owned()),
        _ => Err(format!(
            "{} --version says nothing ({}): {}",
            program.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

/// Peers that can be driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Firecracker.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// QEMU's microvm machine.
    Qemu,
}

impl Kind {
    /// Its name in results and on the command line.
    pub fn id(self) -> &'static str {
        match self {
            Kind::Firecracker => "firecracker",
            Kind::CloudHypervisor => "cloud-hypervisor",
            Kind::Qemu => "qemu",
        }
    }
}

/// A peer as named on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Which.
    pub kind: Kind,
    /// Its program.
    pub program: PathBuf,
}

/// The names a peer can have.
pub fn peer_names() -> String {
    let names: Vec<&str> = Kind::value_variants()
        .iter()
        .map(|kind| kind.id())
        .collect();
    names.join(", ")
}

/// `NAME=PATH`, or `qemu` alone for the one in the PATH.
pub fn parse_peer(text: &str) -> Result<Peer, String> {
    let (name, path) = match text.split_once('=') {
        Some((name, path)) => (name, Some(path)),
        None => (text, None),
    };
    let kind = Kind::from_str(name, false)
        .map_err(|_| format!("there is no peer {name:?}; peers are {}", peer_names()))?;
    let program = match (path, kind) {
        (Some(""), _) => return Err(format!("{name}= needs the path of its program")),
        // Measurements run in folders of their own.
        (Some(path), _) => std::path::absolute(path).map_err(|e: io::Error| e.to_string())?,
        (None, Kind::Qemu) => PathBuf::from("qemu-system-x86_64"),
        (None, _) => return Err(format!("where is it? type --peer {name}=PATH")),
    };
    Ok(Peer { kind, program })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_named_with_their_programs() {
        let peer = parse_peer("firecracker=/bin/fc").unwrap();
        assert_eq!(
            peer,
            Peer {
                kind: Kind::Firecracker,
                program: "/bin/fc".into()
            }
        );
        assert_eq!(parse_peer("qemu").unwrap().kind, Kind::Qemu);
        assert_eq!(
            parse_peer("cloud-hypervisor=x").unwrap().kind,
            Kind::CloudHypervisor
        );
    }

    #[test]
    fn a_wrong_name_is_answered_with_all_names() {
        let error = parse_peer("crosvm=/bin/x").unwrap_err();
        assert!(
            error.contains("firecracker, cloud-hypervisor, qemu"),
            "{error}"
        );
        assert!(
            parse_peer("firecracker")
                .unwrap_err()
                .contains("--peer firecracker=PATH")
        );
        assert!(parse_peer("firecracker=").is_err());
    }

    #[test]
    fn a_program_that_is_not_there_is_told() {
        let peer = parse_peer("firecracker=/nonexistent/fc").unwrap();
        let error = Side::peer(&peer).err().unwrap();
        assert!(error.contains("/nonexistent/fc"), "{error}");
    }
}
