//! Drivers of virtio-mmio devices (VIRTIO 1.3).

pub mod block;
pub mod buffers;
pub mod find;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod vsock;

/// `VIRTIO_F_INDIRECT_DESC`.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;
