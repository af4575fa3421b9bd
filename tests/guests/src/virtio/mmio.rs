//! The registers of a device (VIRTIO 1.3, 4.2.2).

use core::arch::asm;

use super::queue::Queue;
use super::{EVENT_IDX, VERSION_1};
use crate::{arguments, copied};

/// Offsets of registers.
pub mod register {
    #![allow(missing_docs)]
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the status register.
pub mod status {
    #![allow(missing_docs)]
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// `virt`, little-endian.
pub const MAGIC: u32 = 0x7472_6976;

/// The register page of one device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mmio(u64);

impl Mmio {
    /// The page at `address`.
    pub fn new(address: u64) -> Self {
        Self(address)
    }

    /// Its address.
    pub fn address(self) -> u64 {
        self.0
    }

    /// Reads 32 bits.
    pub fn read(self, offset: u64) -> u32 {
        let value;
        // One plain move, which every instruction emulator knows.
        // SAFETY: a device's register; no memory lies there.
        unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) self.0 + offset, options(nostack)) }
        value
    }

    /// Writes 32 bits.
    pub fn write(self, offset: u64, value: u32) {
        // SAFETY: as in `read`; what a device does to memory is what its driver tells it to.
        unsafe { asm!("mov [{}], {:e}", in(reg) self.0 + offset, in(reg) value, options(nostack)) }
    }

    /// Reads 8 bits.
    pub fn read8(self, offset: u64) -> u8 {
        let value;
        // SAFETY: as in `read`.
        unsafe {
            asm!("mov {}, [{}]", out(reg_byte) value, in(reg) self.0 + offset, options(nostack))
        }
        value
    }

    /// Reads 16 bits.
    pub fn read16(self, offset: u64) -> u16 {
        let value;
        // SAFETY: as in `read`.
        unsafe { asm!("mov {:x}, [{}]", out(reg) value, in(reg) self.0 + offset, options(nostack)) }
        value
    }

    /// Reads 64 bits.
    pub fn read64(self, offset: u64) -> u64 {
        let value;
        // SAFETY: as in `read`.
        unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) self.0 + offset, options(nostack)) }
        value
    }

    /// Writes 8 bits.
    pub fn write8(self, offset: u64, value: u8) {
        // SAFETY: as in `write`.
        unsafe {
            asm!("mov [{}], {}", in(reg) self.0 + offset, in(reg_byte) value, options(nostack))
        }
    }

    /// Writes 16 bits.
    pub fn write16(self, offset: u64, value: u16) {
        // SAFETY: as in `write`.
        unsafe { asm!("mov [{}], {:x}", in(reg) self.0 + offset, in(reg) value, options(nostack)) }
    }

    /// Writes 64 bits.
    pub fn write64(self, offset: u64, value: u64) {
        // SAFETY: as in `write`.
        unsafe { asm!("mov [{}], {}", in(reg) self.0 + offset, in(reg) value, options(nostack)) }
    }

    /// Reads 64 bits of the configuration, in two halves.
    pub fn config64(self, offset: u64) -> u64 {
        let low = self.read(register::CONFIG + offset);
        let high = self.read(register::CONFIG + offset + 4);
        u64::from(high) << 32 | u64::from(low)
    }

    /// The status.
    pub fn status(self) -> u32 {
        self.read(register::STATUS)
    }

    /// Resets the device, and waits until it says that it is.
    pub fn reset(self) {
        self.write(register::STATUS, 0);
        while self.status() != 0 {}
    }

    /// All features it offers.
    pub fn offered(self) -> u64 {
        self.write(register::DEVICE_FEATURES_SEL, 0);
        let low = self.read(register::DEVICE_FEATURES);
        self.write(register::DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(register::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Resets the device and agrees on the features of `wanted` that it has; they come back.
    ///
    /// # Panics
    /// If the device does not agree.
    pub fn negotiate(self, wanted: u64) -> u64 {
        use status::*;
        self.reset();
        self.write(register::STATUS, ACKNOWLEDGE);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        let mut wanted = wanted | VERSION_1;
        if arguments::number("event_idx", 1) == 1 {
            wanted |= EVENT_IDX;
        }
        let features = self.offered() & wanted;
        self.write(register::DRIVER_FEATURES_SEL, 0);
        self.write(register::DRIVER_FEATURES, features as u32);
        self.write(register::DRIVER_FEATURES_SEL, 1);
        self.write(register::DRIVER_FEATURES, (features >> 32) as u32);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let found = self.status();
        assert!(
            found & FEATURES_OK != 0,
            "features {features:#x} refused: status {found:#x}"
        );
        features
    }

    /// Makes queue `index`, of its largest size but no more than `most`.
    pub fn queue(self, index: u16, most: u16, features: u64) -> Queue {
        self.write(register::QUEUE_SEL, u32::from(index));
        let max = self.read(register::QUEUE_NUM_MAX);
        assert!(max > 0, "there is no queue {index}");
        let size = max.min(u32::from(most)) as u16;
        let queue = Queue::new(self, index, size, features & EVENT_IDX != 0);
        self.set_queue(&queue);
        queue
    }

    fn set_queue(self, queue: &Queue) {
        self.write(register::QUEUE_NUM, u32::from(queue.size()));
        let [desc, avail, used] = queue.addresses();
        for (place, address) in [
            (register::QUEUE_DESC, desc),
            (register::QUEUE_DRIVER, avail),
            (register::QUEUE_DEVICE, used),
        ] {
            self.write(place, address as u32);
            self.write(place + 4, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
    }

    /// Starts the device. A machine that is to be copied is, then.
    pub fn start(self) {
        let status = self.status();
        self.write(register::STATUS, status | status::DRIVER_OK);
        copied::wait();
    }
}
