//! The saved form of virtio devices. It is never the form at work: what comes back from a file is bytes that anybody
//! may have written, and each device checks them before it believes them.

use serde::{Deserialize, Serialize};

use super::block::BlockState;
use super::device::DeviceKind;
use super::net::NetState;
use super::vsock::VsockState;

/// What a device is besides its registers and queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A drive.
    Block(BlockState),
    /// A network interface.
    Net(NetState),
    /// The socket device.
    Vsock(VsockState),
}

impl DeviceState {
    /// Whose state it is.
    pub fn kind(&self) -> DeviceKind {
        match self {
            DeviceState::Block(_) => DeviceKind::Block,
            DeviceState::Net(_) => DeviceKind::Net,
            DeviceState::Vsock(_) => DeviceKind::Vsock,
        }
    }

    /// The error of a device of `kind` that was given this.
    pub fn mismatch(&self, kind: DeviceKind) -> RestoreError {
        RestoreError::Kind {
            saved: self.kind(),
            present: kind,
        }
    }
}

/// How far a device has come in a queue. Both numbers wrap at 2^16 (VIRTIO 1.3, 2.7.6 and 2.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// The entry of the available ring that is taken next.
    pub next_avail: u16,
    /// The entry of the used ring that is written next.
    pub next_used: u16,
}

/// A queue as the driver set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Descriptors.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
}

/// What a device has told the driver and the driver has not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptState {
    /// InterruptStatus.
    pub status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
}

/// A page of registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Status, without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// DriverFeatures, all of them.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_select: u32,
    /// The queues.
    pub queues: Vec<QueueState>,
    /// Where the device is in each queue, if it is active.
    pub positions: Option<Vec<QueuePosition>>,
    /// Its interrupt.
    pub interrupt: InterruptState,
}

/// Why a saved device is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Another device.
    #[error("the state is of a {saved:?} device, this is {present:?}")]
    Kind {
        /// Whose state it is.
        saved: DeviceKind,
        /// What it was given to.
        present: DeviceKind,
    },
    /// Another number of queues.
    #[error("the state has {saved} queues, the device {present}")]
    Queues {
        /// In the state.
        saved: usize,
        /// Of the device.
        present: usize,
    },
    /// A queue that no driver can set up so.
    #[error("queue {index}: {reason}")]
    Queue {
        /// The queue.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A status that no driver can reach.
    #[error("status {0:#x} cannot be reached")]
    Status(u32),
    /// The driver took what is not offered here.
    #[error("the driver took features {taken:#x}, of which this host lacks {lacking:#x}")]
    Features {
        /// All it took.
        taken: u64,
        /// Those that are not offered.
        lacking: u64,
    },
    /// A number that cannot be.
    #[error("{what} {value} cannot be")]
    Value {
        /// Which.
        what: &'static str,
        /// As saved.
        value: u64,
    },
    /// The image is not of the size that the guest knows.
    #[error("the image has {present} sectors, the guest knows {saved}")]
    Sectors {
        /// When it was saved.
        saved: u64,
        /// Now.
        present: u64,
    },
    /// The image's mode is another one.
    #[error("the drive was saved {}, the image is opened the other way", if *.0 { "read-only" } else { "writable" })]
    ReadOnly(bool),
    /// The device does not start with it.
    #[error("{0}")]
    Activation(String),
}

#[cfg(test)]
mod tests;
