//! What every virtio device is.
//!
//! ```text
//!            driver sets DRIVER_OK            driver writes 0 to Status
//!  inactive ----------------------> active ----------------------------> inactive
//!           activate(Resources)        |    reset(): in-flight I/O is over,
//!                                      |    queues are given up
//!                                      | a malformed ring: DeviceError
//!                                      v
//!                                 NEEDS_RESET: no more calls but reset()
//! ```
//!
//! Activation is followed by one kick of every queue, so that a device finds what is already in its rings and in its
//! backend. The same holds after a restore and after a resume.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::interrupt::Interrupt;
use super::queue::{QueueError, VirtQueue};
use super::state::{DeviceState, QueuePosition, RestoreError};
use crate::Memory;

/// The device types offered, with their device IDs (VIRTIO 1.3, 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network device, 5.1.
    Net = 1,
    /// Block device, 5.2.
    Block = 2,
    /// Socket device, 5.10.
    Vsock = 19,
}

/// What a device is given when the driver sets DRIVER_OK.
pub struct Resources {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// The queues the driver made ready, in the order of the device's queue indices; one per
    /// [`VirtioDevice::queue_sizes`] entry.
    pub queues: Vec<VirtQueue>,
    /// How to reach the driver.
    pub interrupt: Arc<Interrupt>,
    /// The feature bits that driver and device agreed on.
    pub features: u64,
}

/// Whether a bounded piece of work left something over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Nothing is left to do until the next event.
    Done,
    /// The bound was reached: call again after other events had their turn.
    Again,
}

/// Why a device stopped: the driver broke the protocol. The device goes to DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A ring or a descriptor chain is malformed.
    #[error("queue {index}: {source}")]
    Queue {
        /// The queue's index.
        index: usize,
        /// What is wrong with it.
        source: QueueError,
    },
    /// The device's own state does not allow to go on.
    #[error("{0}")]
    Fatal(String),
}

/// A virtio device behind any transport. See the module's diagram for the order of calls.
///
/// No method has a default body: a device that forgets one must not build.
pub trait VirtioDevice: Send {
    /// The device type.
    fn kind(&self) -> DeviceKind;

    /// Largest size of each queue in descriptors, powers of two up to 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific feature bits offered. The transport adds VERSION_1, EVENT_IDX and INDIRECT_DESC.
    fn features(&self) -> u64;

    /// Reads configuration space at `offset` (VIRTIO 1.3, 2.5). Bytes past its end read as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space at `offset`. Read-only and absent fields ignore it.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Takes queues and starts to work. Called from the vCPU thread that set DRIVER_OK.
    fn activate(&mut self, resources: Resources) -> Result<(), DeviceError>;

    /// Gives up everything received on activation. When it returns, no I/O touches guest memory any more.
    fn reset(&mut self);

    /// Descriptors to watch for reading, edge triggered, from the device's making to its end; an event's number in
    /// [`VirtioDevice::process_source`] is the index in this list. Events while inactive must be harmless.
    fn sources(&self) -> Vec<RawFd>;

    /// The driver kicked queue `queue`. Work is bounded.
    fn process_queue(&mut self, queue: usize) -> Result<Progress, DeviceError>;

    /// Source number `source` has an event. Work is bounded.
    fn process_source(&mut self, source: usize) -> Result<Progress, DeviceError>;

    /// Finishes in-flight I/O and puts its completions in the used rings, so that the rings and memory say all
    /// there is to say. Called with the vCPUs stopped, before a pause is reported.
    fn quiesce(&mut self) -> Result<(), DeviceError>;

    /// What it is besides its registers and queues, to be saved. Called after [`VirtioDevice::quiesce`].
    fn save(&self) -> DeviceState;

    /// Where it is in each of its queues, in the order of their indices; none while it is inactive. Called after
    /// [`VirtioDevice::quiesce`].
    fn positions(&self) -> Option<Vec<QueuePosition>>;

    /// Takes what [`VirtioDevice::save`] gave, perhaps on another host. The device is inactive; if the saved one was
    /// active, [`VirtioDevice::activate`] follows with the queues where they were.
    fn load(&mut self, state: &DeviceState) -> Result<(), RestoreError>;
}
