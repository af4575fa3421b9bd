//! virtio-blk (VIRTIO 1.3, 5.2): a raw disk image, or an overlay over one, as a block device.

mod backend;
mod config;
mod device;
mod engine;
mod metrics;
pub mod overlay;
mod request;
mod state;
mod turn;

pub use backend::Image;
pub use device::{Block, BlockConfig, BlockError, CacheType, Frozen, Successor};
pub use engine::EngineKind;
pub use metrics::BlockMetrics;
pub use state::BlockState;

#[cfg(test)]
mod tests;
