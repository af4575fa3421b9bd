//! Saving a machine and loading it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{DriveOverlay, HugePages, Identity};

/// Body of `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// All of memory, or what was written since the last snapshot.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// File for the state.
    pub snapshot_path: PathBuf,
    /// File for the memory.
    pub mem_file_path: PathBuf,
}

/// How much of memory a snapshot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// What was written since the last snapshot.
    Diff,
    /// All of it.
    #[default]
    Full,
}

/// Body of `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// File with the state.
    pub snapshot_path: PathBuf,
    /// Deprecated: the file with the memory. `mem_backend` says the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    /// Where memory comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemoryBackend>,
    /// Deprecated name of `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Keep a record of written pages, for differential snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Let the machine run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other taps.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Other images. An addition.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// Advance the guest's clock by the time that has passed.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Pages behind memory.
    #[serde(default)]
    pub huge_pages: LoadHugePages,
    /// Who the machine is from now on: its guest is held until it has taken this on. An addition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
}

/// Where the memory of a loaded machine comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// The memory file, or the socket of the process that serves page faults.
    pub backend_path: PathBuf,
    /// Which of both.
    pub backend_type: MemoryBackendType,
    /// Check each part of a memory file against the hash that the state file has for it, when it is first touched.
    /// An addition. Checked unless this says otherwise.
    #[serde(default = "yes")]
    pub verify: bool,
}

fn yes() -> bool {
    true
}

/// Who serves memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// A file.
    File,
    /// A process that handles page faults.
    Uffd,
}

/// Another tap for an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// Name of the tap.
    pub host_dev_name: String,
}

/// Another socket for vsock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// Unix socket on the host that stands for the guest.
    pub uds_path: String,
}

/// Another image for a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The drive.
    pub drive_id: String,
    /// File or block device, of the size that the guest knows.
    pub path_on_host: String,
    /// For a drive that has an overlay: another one. Absent: the one it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<DriveOverlay>,
}

/// Page size behind the memory of a loaded machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoadHugePages {
    /// As it was saved.
    #[default]
    Snapshot,
    /// Ordinary 4 KiB pages.
    None,
    /// Ordinary pages that the host kernel may merge into huge ones.
    Transparent,
    /// hugetlbfs pages of 2 MiB.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

impl LoadHugePages {
    /// What it means for a machine that was saved with `saved`.
    pub fn resolve(self, saved: HugePages) -> HugePages {
        match self {
            Self::Snapshot => saved,
            Self::None => HugePages::None,
            Self::Transparent => HugePages::Transparent,
            Self::Hugetlbfs2M => HugePages::Hugetlbfs2M,
        }
    }
}
