//! The saved form of a drive.

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_blk::*;

use super::device::Block;
use crate::rate_limiter::RateLimiterState;
use crate::virtio::device::{DeviceKind, VirtioDevice};
use crate::virtio::state::{DeviceState, QueuePosition, RestoreError};

/// Every feature a drive may ever have offered.
const KNOWN: u64 = 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    | 1 << VIRTIO_BLK_F_DISCARD;

/// A drive between two requests: none is in flight when it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Features offered, without the transport's.
    pub features: u64,
    /// Size that the guest knows, in sectors of 512 bytes.
    pub sectors: u64,
    /// What GET_ID answers.
    pub serial: [u8; 20],
    /// Its limits.
    pub limiter: RateLimiterState,
}

impl Block {
    pub(super) fn saved(&self) -> BlockState {
        let Block {
            backend,
            // Follows from `backend`, whose number is saved.
            serial: _,
            // Nothing is in flight in it.
            engine: _,
            limiter,
            // The same for every drive.
            queue_sizes: _,
            features,
            // Counted by each process for itself.
            metrics: _,
            // The transport's part: queues, negotiated features.
            active: _,
        } = self;
        BlockState {
            features: *features,
            sectors: backend.image.sectors(),
            serial: backend.serial,
            limiter: limiter.save(),
        }
    }

    pub(super) fn queue_positions(&self) -> Option<Vec<QueuePosition>> {
        let active = self.active.as_ref()?;
        Some(vec![active.queue.position()])
    }

    /// Takes the state of a drive whose image this drive has.
    pub(super) fn take(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(state) = state else {
            return Err(state.mismatch(DeviceKind::Block));
        };
        let BlockState {
            features,
            sectors,
            serial,
            limiter,
        } = state;
        let lacking = features & !KNOWN;
        if lacking != 0 {
            let taken = *features;
            return Err(RestoreError::Features { taken, lacking });
        }
        let was_read_only = features & (1 << VIRTIO_BLK_F_RO) != 0;
        if was_read_only != (self.features() & (1 << VIRTIO_BLK_F_RO) != 0) {
            return Err(RestoreError::ReadOnly(was_read_only));
        }
        // A file system on a disk that is suddenly smaller, or larger, than it knows loses data.
        let (saved, present) = (*sectors, self.backend.image.sectors());
        if saved != present {
            return Err(RestoreError::Sectors { saved, present });
        }
        self.limiter.load(limiter)?;
        // What this host cannot do is answered as unsupported, request by request.
        self.features = *features;
        self.serial = Some(*serial);
        self.backend.serial = *serial;
        Ok(())
    }
}
