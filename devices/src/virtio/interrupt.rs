//! How a device tells the driver that something happened (VIRTIO 1.3, 2.3 and 4.2.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::state::{InterruptState, RestoreError};

/// InterruptStatus bit 0: a used buffer was added.
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration changed.
pub const CONFIG_CHANGE: u32 = 2;

/// One interrupt line into the guest, edge triggered.
pub trait IrqLine: Send + Sync {
    /// Raises one edge. Must not block.
    fn raise(&self);
}

/// The part of a device's registers that the device itself may change, shared by the device and its transport.
pub struct Interrupt {
    status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
    line: Arc<dyn IrqLine>,
}

impl Interrupt {
    /// An interrupt with nothing pending.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Interrupt {
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            line,
        }
    }

    /// Tells the driver that a queue has used buffers.
    pub fn used_buffer(&self) {
        self.set_and_raise(USED_BUFFER);
    }

    /// Tells the driver that the device's configuration changed (VIRTIO 1.3, 2.5.1).
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.set_and_raise(CONFIG_CHANGE);
    }

    /// Puts the device in DEVICE_NEEDS_RESET (VIRTIO 1.3, 2.1.2): it does nothing more until the driver resets it.
    pub fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config_changed();
    }

    /// Whether [`Interrupt::needs_reset`] was called since the last reset.
    pub fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// InterruptStatus as the driver reads it.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// ConfigGeneration as the driver reads it; wraps.
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// InterruptACK: clears `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Raises the line again if something is pending. After a restore an edge may have been lost.
    pub fn replay(&self) {
        if self.status() != 0 {
            self.line.raise();
        }
    }

    /// What is pending, to be saved.
    pub fn save(&self) -> InterruptState {
        let Interrupt {
            status,
            config_generation,
            needs_reset,
            line: _,
        } = self;
        InterruptState {
            status: status.load(Ordering::SeqCst),
            config_generation: config_generation.load(Ordering::SeqCst),
            needs_reset: needs_reset.load(Ordering::SeqCst),
        }
    }

    /// Takes what [`Interrupt::save`] gave. Raises nothing: see [`Interrupt::replay`].
    pub fn load(&self, state: &InterruptState) -> Result<(), RestoreError> {
        let InterruptState {
            status,
            config_generation,
            needs_reset,
        } = *state;
        if status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            return Err(RestoreError::Value {
                what: "interrupt status",
                value: u64::from(status),
            });
        }
        self.status.store(status, Ordering::SeqCst);
        self.config_generation
            .store(config_generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        Ok(())
    }

    /// Device reset: nothing is pending, nothing is broken.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    fn set_and_raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.raise();
    }
}
