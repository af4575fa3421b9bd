//! virtio-blk (VIRTIO 1.3, 5.2): a raw disk image as a block device.

mod config;
mod device;
mod engine;
mod metrics;
mod request;
mod state;
mod turn;

pub use device::{Block, BlockConfig, BlockError, CacheType};
pub use engine::EngineKind;
pub use metrics::BlockMetrics;
pub use state::BlockState;

#[cfg(test)]
mod tests;
