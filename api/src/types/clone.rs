//! Copies of a running machine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{DriveOverride, Identity, NetworkOverride, VsockOverride};

/// Body of `PUT /clone`. An addition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneMachine {
    /// Who becomes a copy: all of them, or none.
    pub children: Vec<CloneChild>,
    /// Socket of a pool (`lepton-jailer --pool`), which gives a process for each of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PathBuf>,
    /// Let the copies run at once.
    #[serde(default = "yes")]
    pub resume_children: bool,
    /// Milliseconds that a pool may take to give them, and that each of them may take to have its copy, beside the time
    /// that its guest may take.
    #[serde(default = "patience")]
    pub timeout_ms: u64,
}

fn yes() -> bool {
    true
}

fn patience() -> u64 {
    5000
}

/// A process that waits for a machine, and what is different in its copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneChild {
    /// Socket of a VMM that was started with `--adopt`. Absent with a pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopt_socket: Option<PathBuf>,
    /// Other taps.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Other images.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// Where what the copy writes to drives with an overlay is kept. For others it goes with the copy.
    #[serde(default)]
    pub overlays: Vec<CloneOverlay>,
    /// Who it is: its guest is held until it has taken this on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
}

/// A file for what a copy writes to a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneOverlay {
    /// The drive, which has an overlay.
    pub drive_id: String,
    /// The copy's overlay file, as the copy sees it. It is made, and must not be in use.
    pub path: String,
}

/// Reply to `PUT /clone`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cloned {
    /// Microseconds for which the machine stood still.
    pub pause_us: u64,
    /// Bytes of memory that were copied meanwhile: what it had written since its last clone.
    pub copied_bytes: u64,
    /// The copies, in the order of the request.
    pub children: Vec<ClonedChild>,
}

/// A copy of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClonedChild {
    /// The id of its process, as given by `--id`.
    pub id: String,
    /// Its process id, as it sees it itself.
    pub pid: u32,
    /// Microseconds from the end of the pause until it said that it has the machine.
    pub ready_us: u64,
}

/// Reply to `GET /vm/divergence`. An addition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Divergence {
    /// Of memory. Absent where the host does not tell, for want of /proc.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Shares>,
    /// Of each drive.
    pub drives: Vec<DriveDivergence>,
}

/// What a machine has of a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveDivergence {
    /// The drive.
    pub drive_id: String,
    /// Its parts, in clusters of 4096 bytes.
    #[serde(flatten)]
    pub shares: Shares,
}

/// What is one machine's alone, and what it has in common with others or could have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    /// Bytes that only this machine has.
    pub private_bytes: u64,
    /// Bytes of what it was made from, or cloned to, and has not changed.
    pub shared_bytes: u64,
}
