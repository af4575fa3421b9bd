//! The driver's side of a split virtqueue (VIRTIO 1.3, 2.7), polled.

use core::sync::atomic::{Ordering, fence};

use super::mmio::{Mmio, register};
use crate::arguments;
use crate::memory::Region;

/// The buffer goes on with another descriptor.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The descriptor is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// `VRING_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;
/// `VRING_USED_F_NO_NOTIFY`.
const NO_NOTIFY: u16 = 1;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next descriptor.
    pub next: u16,
}

impl Descriptor {
    /// Bytes of one.
    pub const SIZE: u64 = 16;

    /// One for all of a region.
    pub fn of(region: Region, flags: u16) -> Self {
        Self {
            address: region.address(),
            len: region.len() as u32,
            flags,
            next: 0,
        }
    }

    /// Followed by another.
    pub fn then(self, next: u16) -> Self {
        Self {
            flags: self.flags | NEXT,
            next,
            ..self
        }
    }

    /// Writes it into place `index` of a table.
    pub fn store(self, table: Region, index: u16) {
        let at = u64::from(index) * Self::SIZE;
        table.put(at, self.address);
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        table.put(at + 8, rest);
    }
}

/// A queue.
pub struct Queue {
    device: Mmio,
    index: u16,
    size: u16,
    table: Region,
    avail: Region,
    used: Region,
    event_idx: bool,
    interrupts: bool,
    /// Buffers offered, published or not.
    offered: u16,
    /// Buffers published.
    published: u16,
    /// Buffers taken back.
    taken: u16,
}

impl Queue {
    /// A queue in memory of its own. The device does not know of it.
    pub(super) fn new(device: Mmio, index: u16, size: u16, event_idx: bool) -> Self {
        let entries = u64::from(size);
        let queue = Self {
            device,
            index,
            size,
            table: Region::take(entries * Descriptor::SIZE, 4096),
            avail: Region::take(6 + entries * 2, 4096),
            used: Region::take(6 + entries * 8, 4096),
            event_idx,
            interrupts: arguments::number("interrupts", 0) == 1,
            offered: 0,
            published: 0,
            taken: 0,
        };
        for region in [queue.table, queue.avail, queue.used] {
            region.fill(0);
        }
        if !queue.interrupts {
            queue.avail.put(0, NO_INTERRUPT);
            // An event that lies behind is reached once in 65536 buffers.
            queue.set_used_event(u16::MAX);
        }
        queue
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where its three parts lie.
    pub fn addresses(&self) -> [u64; 3] {
        [self.table, self.avail, self.used].map(Region::address)
    }

    /// Its table of descriptors.
    pub fn table(&self) -> Region {
        self.table
    }

    /// Its ring of what is available.
    pub fn avail(&self) -> Region {
        self.avail
    }

    /// Its ring of what is used.
    pub fn used(&self) -> Region {
        self.used
    }

    fn set_used_event(&self, event: u16) {
        self.avail.put(4 + u64::from(self.size) * 2, event);
    }

    /// Makes a chain available, from the next [`Queue::publish`] on.
    pub fn offer(&mut self, head: u16) {
        let place = u64::from(self.offered % self.size);
        self.avail.put(4 + place * 2, head);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Lets the device see what was offered, and kicks it if it wants to be.
    pub fn publish(&mut self) {
        let (old, new) = (self.published, self.offered);
        if old == new {
            return;
        }
        fence(Ordering::Release);
        self.avail.put(2, new);
        self.published = new;
        fence(Ordering::SeqCst);
        let wants = if self.event_idx {
            let event: u16 = self.used.get(4 + u64::from(self.size) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used.get::<u16>(0) & NO_NOTIFY == 0
        };
        if wants {
            self.kick();
        }
    }

    /// Kicks the device, whatever it wants.
    pub fn kick(&self) {
        self.device
            .write(register::QUEUE_NOTIFY, u32::from(self.index));
    }

    /// Takes a chain back: its head, and the bytes that the device wrote.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.used.get(2);
        if index == self.taken {
            return None;
        }
        fence(Ordering::Acquire);
        let at = 4 + u64::from(self.taken % self.size) * 8;
        let (head, len): (u32, u32) = (self.used.get(at), self.used.get(at + 4));
        self.taken = self.taken.wrapping_add(1);
        if self.interrupts {
            self.set_used_event(self.taken);
        }
        Some((head as u16, len))
    }
}
