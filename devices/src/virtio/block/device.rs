//! The device: one queue, a disk image, an engine and a rate limiter.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use lepton_hostio::file::Disk;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO};

use super::backend::{Backend, Image};
use super::config;
use super::engine::{AsyncEngine, EngineKind};
use super::metrics::BlockMetrics;
use super::overlay::{self, OverlayError};
use super::request::Rules;
use super::turn::{self, Engine, Turn, engine_failed, give_back};
use crate::Memory;
use crate::rate_limiter::{BucketConfig, RateLimiter, RateLimiterConfig};
use crate::virtio::device::{DeviceError, DeviceKind, Progress, Resources, VirtioDevice};
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{Taken, VirtQueue};
use crate::virtio::state::{DeviceState, QueuePosition, RestoreError};

/// Most requests taken from the queue in one turn.
pub(super) const REQUESTS_PER_TURN: usize = 128;
/// Bytes after which a turn ends. One request may be longer.
const BYTES_PER_TURN: u64 = 16 << 20;

/// Sources of events, in this order.
const SOURCE_TIMER: usize = 0;
const SOURCE_ENGINE: usize = 1;

/// What a flush by the guest means, `cache_type` in the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheType {
    /// Flushing is not offered: what the guest wrote may be lost with the host.
    #[default]
    Unsafe,
    /// A flush puts what was written on stable storage.
    Writeback,
}

/// What a drive is made of.
pub struct BlockConfig {
    /// What is behind it.
    pub image: Image,
    /// What the guest sees as the serial number, padded with zeroes. None: the image's own.
    pub serial: Option<[u8; 20]>,
    /// What a flush means.
    pub cache: CacheType,
    /// How I/O is done.
    pub engine: EngineKind,
    /// Largest queue in descriptors: a power of two from 1 to 1024.
    pub queue_size: u16,
    /// Limits on operations and bytes.
    pub rate_limiter: RateLimiterConfig,
}

/// The file in which an overlay goes on after a freeze. It is empty.
pub struct Successor {
    /// The file.
    pub file: File,
    /// Where it is.
    pub path: PathBuf,
    /// If it has no name any more: the same file, opened for reading only.
    pub reader: Option<File>,
}

/// An overlay that was frozen.
pub struct Frozen {
    /// All that was written.
    pub chain: overlay::Chain,
    /// If the own file has become a layer of it: the path of the next one, if that has a name.
    pub next: Option<Option<PathBuf>>,
}

/// Why a drive could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The queue size is not a power of two from 1 to 1024.
    #[error("queue size {0} is not a power of two from 1 to 1024")]
    QueueSize(u16),
    /// The host has no io_uring to give.
    #[error("io_uring is not available on this host ({0}): use the io_engine Sync")]
    Uring(#[source] io::Error),
    /// The host has no timer to give.
    #[error("cannot make a timer for the rate limiter: {0}")]
    Timer(#[source] io::Error),
    /// A drive cannot change between read-only and writable.
    #[error("the new image is opened {}, the drive is not", if *.0 { "read-only" } else { "writable" })]
    ReadOnly(bool),
    /// The drive is a raw image.
    #[error("the drive has no overlay")]
    NoOverlay,
    /// The host has no file to go on in.
    #[error("what it writes from now on cannot have a file: {0}")]
    Successor(#[source] io::Error),
    /// The overlay cannot be frozen.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// I/O on the old image could not be finished, or the new one not be taken.
    #[error("cannot change the image: {0}")]
    Change(String),
}

/// What the device has between activation and reset.
pub(super) struct Active {
    memory: Arc<Memory>,
    pub(super) queue: VirtQueue,
    interrupt: Arc<Interrupt>,
    rules: Rules,
}

/// A virtio block device.
pub struct Block {
    pub(super) backend: Backend,
    /// The configured serial number, for the next image too.
    pub(super) serial: Option<[u8; 20]>,
    pub(super) engine: Engine,
    pub(super) limiter: RateLimiter,
    pub(super) queue_sizes: [u16; 1],
    pub(super) features: u64,
    pub(super) metrics: Arc<BlockMetrics>,
    pub(super) active: Option<Active>,
}

impl Block {
    /// An inactive drive.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let BlockConfig {
            mut image,
            serial,
            cache,
            engine,
            queue_size,
            rate_limiter,
        } = config;
        if !queue_size.is_power_of_two() || queue_size > 1024 {
            return Err(BlockError::QueueSize(queue_size));
        }
        if let (Image::Overlay(overlay), CacheType::Unsafe) = (&mut image, cache)
            && !overlay.is_unnamed()
        {
            overlay.write_through();
        }
        let engine = match engine {
            EngineKind::Sync => Engine::Sync,
            EngineKind::Async => {
                let engine = AsyncEngine::new(&image, queue_size).map_err(BlockError::Uring)?;
                Engine::Async(Box::new(engine))
            }
        };
        Ok(Block {
            features: config::features(&image, cache),
            backend: Backend::new(image, serial),
            serial,
            engine,
            limiter: RateLimiter::new(rate_limiter).map_err(BlockError::Timer)?,
            queue_sizes: [queue_size],
            metrics: Arc::default(),
            active: None,
        })
    }

    /// The drive's counters.
    pub fn metrics(&self) -> Arc<BlockMetrics> {
        self.metrics.clone()
    }

    /// The file in use: the image, or the overlay's own.
    pub fn disk(&self) -> &Disk {
        self.backend.image.disk()
    }

    /// Puts another image in the place of the present one, whose I/O is finished first, and tells the driver.
    pub fn update_backend(&mut self, image: Image) -> Result<(), BlockError> {
        let result = self.try_update_backend(image);
        match result {
            Ok(()) => self.metrics.update_count.inc(),
            Err(_) => self.metrics.update_fails.inc(),
        }
        result
    }

    fn try_update_backend(&mut self, image: Image) -> Result<(), BlockError> {
        if image.read_only() != self.is_read_only() {
            return Err(BlockError::ReadOnly(image.read_only()));
        }
        self.finish()?;
        if let Engine::Async(engine) = &mut self.engine
            && let Err(error) = engine.set_image(&image)
        {
            // Back to the files of the present one. Should that fail too, all I/O does.
            drop(engine.set_image(&self.backend.image));
            return Err(BlockError::Change(error.to_string()));
        }
        let durable_writes = self.backend.durable_writes;
        self.backend = Backend::new(image, self.serial);
        self.backend.durable_writes = durable_writes;
        if let Some(active) = &mut self.active {
            active.rules.sectors = self.backend.image.sectors();
            active.interrupt.config_changed();
        }
        Ok(())
    }

    /// Sees to it that nothing the guest has written would be lost with this process, as if it had flushed. What is
    /// under way is finished first.
    pub fn write_back(&mut self) -> Result<(), BlockError> {
        self.finish()?;
        match &mut self.backend.image {
            Image::Overlay(overlay) if overlay.is_behind() => overlay
                .flush()
                .map_err(|e| BlockError::Change(e.to_string())),
            Image::Overlay(_) | Image::Raw(_) => Ok(()),
        }
    }

    /// Throws away all that was written to an overlay ([`Overlay::reset`]). The guest is not told: what its caches have
    /// of the disk is wrong from now on.
    pub fn reset_overlay(&mut self) -> Result<(), BlockError> {
        self.finish()?;
        match &mut self.backend.image {
            Image::Raw(_) => Err(BlockError::NoOverlay),
            Image::Overlay(overlay) => overlay
                .reset()
                .map_err(|e| BlockError::Change(e.to_string())),
        }
    }

    /// Freezes what was written to an overlay, if there is something, and goes on in `next` ([`Overlay::freeze`]). What is
    /// returned is what clones go on from: all that the guest has written until now is in it. `next` is asked for only
    /// if a layer is made.
    pub fn freeze(
        &mut self,
        next: impl FnOnce() -> io::Result<Successor>,
    ) -> Result<Frozen, BlockError> {
        self.finish()?;
        let Image::Overlay(overlay) = &mut self.backend.image else {
            return Err(BlockError::NoOverlay);
        };
        if overlay.own_clusters() == 0 {
            let chain = overlay.below();
            return Ok(Frozen { chain, next: None });
        }
        let Successor { file, path, reader } = next().map_err(BlockError::Successor)?;
        let chain = overlay.freeze(file, &path)?;
        let next = match reader {
            None => Some(path),
            Some(reader) => {
                overlay.set_unnamed(reader);
                None
            }
        };
        if let Engine::Async(engine) = &mut self.engine
            && let Err(error) = engine.set_image(&self.backend.image)
        {
            if let Image::Overlay(overlay) = &mut self.backend.image {
                overlay.break_off();
            }
            return Err(BlockError::Change(error.to_string()));
        }
        Ok(Frozen {
            chain,
            next: Some(next),
        })
    }

    /// What is behind the drive.
    pub fn image(&self) -> &Image {
        &self.backend.image
    }

    /// Lets all I/O come to its end.
    fn finish(&mut self) -> Result<(), BlockError> {
        self.quiesce()
            .map_err(|e| BlockError::Change(e.to_string()))
    }

    /// Replaces the limits that are given ([`RateLimiter::update`]).
    pub fn update_rate_limiter(
        &mut self,
        bandwidth: Option<BucketConfig>,
        ops: Option<BucketConfig>,
    ) {
        self.limiter.update(bandwidth, ops);
        self.metrics.update_count.inc();
    }

    fn is_read_only(&self) -> bool {
        self.features & (1 << VIRTIO_BLK_F_RO) != 0
    }

    #[cfg(test)]
    pub(super) fn writes_are_durable(&self) -> bool {
        self.backend.durable_writes
    }

    /// Takes requests from the queue and starts them, and ends what has ended.
    fn run(&mut self) -> Result<Progress, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        if self.limiter.is_blocked() {
            return Ok(Progress::Done);
        }
        let mut turn = Turn {
            memory: &active.memory,
            rules: &active.rules,
            backend: &mut self.backend,
            engine: &mut self.engine,
            limiter: &mut self.limiter,
            metrics: &self.metrics,
            bytes_left: BYTES_PER_TURN,
            taken: 0,
        };
        let queue = &mut active.queue;
        let mut pass = queue.begin(REQUESTS_PER_TURN);
        let ended = loop {
            let taken = queue.take(&mut pass, |queue, chain| turn.take(queue, chain))?;
            // Nobody waits for what the engine has not started, nor while it is at work: it may end at any moment.
            let is_done = turn.end_completed(queue)?;
            if taken != Taken::All || !queue.comes_back(&pass, is_done)? {
                break taken;
            }
        };
        let (out_of_bytes, taken) = (turn.bytes_left == 0, turn.taken);
        if taken == 0 {
            self.metrics.no_avail_buffer.inc();
        }
        if out_of_bytes || ended == Taken::Budget {
            self.metrics.remaining_reqs_count.inc();
            return Ok(Progress::Again);
        }
        Ok(Progress::Done)
    }

    /// Starts what the engine has queued and gives the driver what it has finished.
    fn end_completed(&mut self) -> Result<(), DeviceError> {
        let (Some(active), Engine::Async(engine)) = (&mut self.active, &mut self.engine) else {
            return Ok(());
        };
        let (queue, memory) = (&mut active.queue, &active.memory);
        turn::end_completed(queue, memory, engine, &mut self.backend, &self.metrics)
    }

    fn count_failure<T>(&self, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        if result.is_err() {
            self.metrics.event_fails.inc();
        }
        result
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [queue_size] = self.queue_sizes;
        let config = config::config_space(&self.backend.image, self.features, queue_size);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let tail = config.get(offset..).unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(tail) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.metrics.cfg_fails.inc();
        guest_warn!(
            "virtio-blk: write of {} bytes to configuration at {offset:#x} ignored",
            data.len()
        );
    }

    fn activate(&mut self, resources: Resources) -> Result<(), DeviceError> {
        let Resources {
            memory,
            queues,
            interrupt,
            features,
        } = resources;
        let [queue] = <[VirtQueue; 1]>::try_from(queues).map_err(|queues| {
            self.metrics.activate_fails.inc();
            DeviceError::Fatal(format!("{} queues instead of 1", queues.len()))
        })?;
        // A driver that did not take the feature never flushes (VIRTIO 1.3, 5.2.6.2).
        let flush = 1 << VIRTIO_BLK_F_FLUSH;
        self.backend.durable_writes = self.features & flush != 0 && features & flush == 0;
        self.active = Some(Active {
            memory,
            queue: queue.lingering(),
            interrupt,
            rules: Rules {
                sectors: self.backend.image.sectors(),
                read_only: self.is_read_only(),
                features: features & self.features,
            },
        });
        Ok(())
    }

    fn reset(&mut self) {
        if let (Engine::Async(engine), Some(active)) = (&mut self.engine, &self.active)
            && let Err(error) = engine.abandon(&mut self.backend, &active.memory)
        {
            log::error!("virtio-blk: I/O in flight at a reset cannot be waited for: {error}");
        }
        self.active = None;
    }

    fn sources(&self) -> Vec<RawFd> {
        let mut sources = vec![self.limiter.timer_fd()];
        if let Engine::Async(engine) = &self.engine {
            sources.push(engine.ring().event_fd());
        }
        sources
    }

    fn process_queue(&mut self, _queue: usize) -> Result<Progress, DeviceError> {
        self.metrics.queue_event_count.inc();
        let result = self.run();
        self.count_failure(result)
    }

    fn process_source(&mut self, source: usize) -> Result<Progress, DeviceError> {
        let result = match source {
            SOURCE_TIMER => {
                self.metrics.rate_limiter_event_count.inc();
                // Also if it was a stale event, or the second turn for this one: while the limiter holds back, nothing is
                // done.
                self.limiter.on_timer();
                self.run()
            }
            SOURCE_ENGINE => self.end_completed().map(|()| Progress::Done),
            _ => Ok(Progress::Done),
        };
        self.count_failure(result)
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        let (Some(active), Engine::Async(engine)) = (&mut self.active, &mut self.engine) else {
            return Ok(());
        };
        loop {
            // First: what is over need not be in the ring any more, where it could be waited for.
            give_back(
                &mut active.queue,
                &active.memory,
                engine,
                &mut self.backend,
                &self.metrics,
            )?;
            if engine.ring().in_flight() == 0 {
                return Ok(());
            }
            engine.wait().map_err(engine_failed)?;
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(self.saved())
    }

    fn positions(&self) -> Option<Vec<QueuePosition>> {
        self.queue_positions()
    }

    fn load(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.take(state)
    }
}
