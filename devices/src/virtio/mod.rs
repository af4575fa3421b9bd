//! VIRTIO 1.3 devices.

pub mod device;
pub mod interrupt;
pub mod queue;
pub mod transport;
