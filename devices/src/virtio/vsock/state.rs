//! The saved form of the socket device.

use serde::{Deserialize, Serialize};

use super::Cid;
use super::device::{Active, Vsock};
use crate::virtio::device::DeviceKind;
use crate::virtio::state::{DeviceState, QueuePosition, RestoreError};

/// The socket device. Its connections are not saved: the hosts at their other ends are not where it is loaded, and the
/// guest is told so (VIRTIO 1.3, 5.10.6.7).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context ID.
    pub cid: u64,
}

impl Vsock {
    pub(super) fn saved(&self) -> VsockState {
        let Vsock {
            cid,
            // The same for every device.
            queue_sizes: _,
            // Connections end with the process.
            muxer: _,
            // Counted by each process for itself.
            metrics: _,
            // The transport's part: queues.
            active: _,
            // Set on a load.
            restored: _,
            // The same for every device.
            reset_patience: _,
        } = self;
        VsockState { cid: cid.get() }
    }

    pub(super) fn queue_positions(&self) -> Option<Vec<QueuePosition>> {
        let Active { rx, tx, event, .. } = self.active.as_ref()?;
        Some([rx, tx, event].map(|queue| queue.position()).to_vec())
    }

    /// Takes the state of a socket device. When its driver is there, it is told that all connections are gone.
    pub(super) fn take(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(VsockState { cid }) = state else {
            return Err(state.mismatch(DeviceKind::Vsock));
        };
        let saved = Cid::try_from(*cid).map_err(|invalid| RestoreError::Value {
            what: "guest CID",
            value: invalid.0,
        })?;
        if saved != self.cid {
            return Err(RestoreError::Value {
                what: "guest CID, another than the configured one,",
                value: *cid,
            });
        }
        self.restored = true;
        self.muxer.scatter_ports();
        Ok(())
    }
}
