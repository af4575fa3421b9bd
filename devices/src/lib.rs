//! The devices a guest sees: virtio-net, virtio-blk, vsock, and the two legacy ones a PC kernel expects.
//!
//! A device is handed memory, queues, an interrupt and a backend, and nothing else: it knows neither KVM nor the
//! event loop. Everything it reads from guest memory or a register is hostile (see [`virtio::device`]).
#![forbid(unsafe_code)]

#[macro_use]
pub mod metrics;
#[macro_use]
pub mod guest_log;
pub mod dirty;
pub mod legacy;
pub mod rate_limiter;
pub mod virtio;

use vm_memory::GuestMemoryMmap;

/// Guest memory as every device sees it. One alias, so that dirty tracking can be added in one place.
pub type Memory = GuestMemoryMmap<()>;
