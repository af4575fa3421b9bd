//! The saved form of an interface.

use serde::{Deserialize, Serialize};

use super::backend::Backend;
use super::device::{Active, MIN_MTU, Net};
use super::mac::Mac;
use crate::rate_limiter::RateLimiterState;
use crate::virtio::device::DeviceKind;
use crate::virtio::state::{DeviceState, QueuePosition, RestoreError};

/// An interface between two frames: none waits when it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The guest's address.
    pub mac: Mac,
    /// The MTU that the guest is told.
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    pub rx_limiter: RateLimiterState,
    /// Limits on what the guest sends.
    pub tx_limiter: RateLimiterState,
}

impl<B: Backend> Net<B> {
    pub(super) fn saved(&self) -> NetState {
        let Net {
            // Another tap, perhaps, when it is loaded.
            backend: _,
            mac,
            mtu,
            // The same for every interface.
            queue_sizes: _,
            rx_limiter,
            tx_limiter,
            // Counted by each process for itself.
            metrics: _,
            // The transport's part: queues, negotiated features.
            active: _,
            // For those who load it to say.
            held: _,
        } = self;
        NetState {
            mac: *mac,
            mtu: *mtu,
            rx_limiter: rx_limiter.save(),
            tx_limiter: tx_limiter.save(),
        }
    }

    pub(super) fn queue_positions(&self) -> Option<Vec<QueuePosition>> {
        let Active { rx, tx } = self.active.as_ref()?;
        Some(vec![rx.position(), tx.position()])
    }

    /// Takes the state of an interface. Whether this tap can do what its driver was promised, the transport finds.
    pub(super) fn take(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net(state) = state else {
            return Err(state.mismatch(DeviceKind::Net));
        };
        let NetState {
            mac,
            mtu,
            rx_limiter,
            tx_limiter,
        } = state;
        if let Some(small) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(RestoreError::Value {
                what: "MTU",
                value: u64::from(small),
            });
        }
        self.rx_limiter.load(rx_limiter)?;
        self.tx_limiter.load(tx_limiter)?;
        self.mac = *mac;
        self.mtu = *mtu;
        Ok(())
    }
}
