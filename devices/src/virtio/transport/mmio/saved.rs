//! The saved form of a register page, and the checks on it. What passes them is a page that a driver can have written.

use super::*;
use crate::virtio::state::{InterruptState, QueueState, RestoreError, TransportState};

/// Statuses in the order in which a driver goes through them (VIRTIO 1.3, 3.1.1).
const STATUSES: [u32; 5] = [
    0,
    ACKNOWLEDGE,
    ACKNOWLEDGE | DRIVER,
    ACKNOWLEDGE | DRIVER | FEATURES_OK,
    ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
];

impl MmioTransport {
    /// The page now, to be saved. The device is at rest.
    pub fn save(&self) -> TransportState {
        let MmioTransport {
            kind: _,
            device,
            memory: _,
            interrupt,
            kicks: _,
            // The device says.
            offered: _,
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
            // The memory's affair.
            dirty: _,
        } = self;
        let queue = |&QueueRegisters {
                         max_size: _,
                         size,
                         ready,
                         desc_table,
                         avail_ring,
                         used_ring,
                     }: &QueueRegisters| QueueState {
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        };
        TransportState {
            status: *status,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            queues: queues.iter().map(queue).collect(),
            // Where a device that broke down is does not matter any more.
            positions: match interrupt.is_broken() {
                true => None,
                false => lock(device).positions(),
            },
            interrupt: interrupt.save(),
        }
    }

    /// Takes what [`MmioTransport::save`] gave into a page in its reset state, whose device has loaded its own state.
    /// Activates the device if the saved one was active. To be followed by a look at all its queues and sources.
    pub fn load(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let TransportState {
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
            positions,
            interrupt,
        } = state;
        let reached = status & !FAILED;
        if !STATUSES.contains(&reached) {
            return Err(RestoreError::Status(*status));
        }
        let lacking = driver_features & !self.offered;
        if reached & FEATURES_OK != 0 && lacking != 0 {
            let taken = *driver_features;
            return Err(RestoreError::Features { taken, lacking });
        }
        if reached & FEATURES_OK != 0 && driver_features & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(RestoreError::Status(*status));
        }
        self.load_queues(queues)?;
        self.status = *status;
        self.device_features_select = *device_features_select;
        self.driver_features_select = *driver_features_select;
        self.driver_features = *driver_features;
        self.queue_select = *queue_select;
        self.interrupt.load(interrupt)?;
        let InterruptState { needs_reset, .. } = interrupt;
        match positions {
            None if reached & DRIVER_OK == 0 || *needs_reset => Ok(()),
            Some(positions) if reached & DRIVER_OK != 0 && !needs_reset => {
                self.check_count(positions.len())?;
                self.try_activate(positions)
                    .map_err(RestoreError::Activation)
            }
            _ => Err(RestoreError::Status(*status)),
        }
    }

    fn check_count(&self, saved: usize) -> Result<(), RestoreError> {
        let present = self.queues.len();
        match saved == present {
            true => Ok(()),
            false => Err(RestoreError::Queues { saved, present }),
        }
    }

    fn load_queues(&mut self, states: &[QueueState]) -> Result<(), RestoreError> {
        self.check_count(states.len())?;
        for (index, (queue, state)) in self.queues.iter_mut().zip(states).enumerate() {
            let QueueState {
                size,
                ready,
                desc_table,
                avail_ring,
                used_ring,
            } = *state;
            if !size.is_power_of_two() || size > queue.max_size {
                let reason = format!("size {size}");
                return Err(RestoreError::Queue { index, reason });
            }
            *queue = QueueRegisters {
                max_size: queue.max_size,
                size,
                ready,
                desc_table,
                avail_ring,
                used_ring,
            };
        }
        Ok(())
    }
}
