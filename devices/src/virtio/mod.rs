//! VIRTIO 1.3 devices.

pub mod block;
pub mod device;
pub mod interrupt;
pub mod net;
pub mod queue;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod vsock;
