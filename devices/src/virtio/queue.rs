//! A split virtqueue (VIRTIO 1.3, 2.7) that checks what the driver put in it, once for all devices.
//!
//! A popped [`Chain`] is valid: every segment lies in guest memory, readable ones come before writable ones, the
//! chain ends, its length fits 32 bits, and its head is not in flight already. Whatever is not so is a
//! [`QueueError`], after which the device needs a reset.

mod drain;
mod linger;
mod rings;
mod segments;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

pub use self::drain::{Flow, Pass, Taken};
use self::linger::Linger;
use self::rings::{Rings, Table};
pub use self::segments::{Chain, Segment, Segments, Slices};
use super::device::DeviceError;
use super::interrupt::Interrupt;
use super::state::QueuePosition;
use crate::Memory;
use crate::dirty::DirtyPages;

/// Most descriptors in a chain. A driver must not make one longer than the queue, in an indirect table neither (VIRTIO
/// 1.3, 2.7.5.3.1), but those with short queues do; twice what fits in one call of the host's kernel is beyond them all.
/// A table of 65535 would cost a mebibyte for each request in flight.
const MAX_CHAIN: u16 = 2048;

/// What the driver did wrong with a queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring itself is out of bounds or inconsistent.
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
    /// A part of the ring lies in two regions of memory.
    #[error("a ring lies across the border of two regions of memory")]
    Split,
    /// A chain has no end, no descriptor, a bad next or indirect table, more than 2^32 bytes, or more than
    /// [`MAX_CHAIN`] descriptors.
    #[error("descriptor chain {head} is malformed")]
    Malformed {
        /// The chain's head.
        head: u16,
    },
    /// A readable descriptor follows a writable one (VIRTIO 1.3, 2.7.4.2).
    #[error("descriptor chain {head} has a readable buffer behind a writable one")]
    Order {
        /// The chain's head.
        head: u16,
    },
    /// A descriptor points outside guest memory.
    #[error("descriptor chain {head} points outside memory: {len} bytes at {addr:#x}")]
    OutsideMemory {
        /// The chain's head.
        head: u16,
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The same head was made available twice without having been used in between.
    #[error("descriptor {0} was made available while in flight")]
    InFlight(u16),
    /// A range asked for lies past the end of a chain.
    #[error("bytes {start}..{end} of a buffer of {len}")]
    Bounds {
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
        /// Bytes there are.
        len: u64,
    },
    /// Guest memory refused an access that was checked before.
    #[error("guest memory: {0}")]
    Memory(String),
}

/// Whether all of `len` bytes at `addr` lie in guest memory, in one region or in several without a hole between them.
fn is_in_memory(memory: &Memory, addr: GuestAddress, len: u32) -> bool {
    // An end past 2^64 has no place anywhere. Nearly always one region holds the range, which is cheap to find out.
    addr.0.checked_add(u64::from(len)).is_some()
        && (memory.get_slice(addr, len as usize).is_ok() || memory.check_range(addr, len as usize))
}

fn memory_error(error: vm_memory::GuestMemoryError) -> QueueError {
    QueueError::Memory(error.to_string())
}

/// Chains that the driver may see used together, at most, see [`VirtQueue::complete_soon`].
const TOGETHER: u16 = 16;

/// A queue the driver made ready.
pub struct VirtQueue {
    queue: Queue,
    index: usize,
    rings: Rings,
    memory: Arc<Memory>,
    interrupt: Arc<Interrupt>,
    /// The available ring's index when it was last looked at. There is no need to look again before it is reached.
    seen: u16,
    /// One bit per descriptor: popped as a head and not yet completed.
    in_flight: Vec<u64>,
    /// The used index when the driver was last considered for an interrupt.
    signalled: u16,
    /// The used index that the driver sees.
    published: u16,
    /// None: the driver always kicks.
    linger: Option<Linger>,
    /// Where what the device writes is noted. All it writes goes into chains popped here and into the used ring.
    dirty: Option<Arc<DirtyPages>>,
}

impl VirtQueue {
    /// Takes a queue whose addresses and size the driver has set. `index` is its number in the device.
    pub fn new(
        queue: Queue,
        index: usize,
        memory: Arc<Memory>,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, QueueError> {
        if !queue.is_valid(memory.as_ref()) {
            return Err(QueueError::Ring(virtio_queue::Error::QueueNotReady));
        }
        let rings = Rings::find(&memory, &queue).ok_or(QueueError::Split)?;
        let in_flight = vec![0; usize::from(queue.size()).div_ceil(64)];
        let signalled = queue.next_used();
        let seen = queue.next_avail();
        Ok(VirtQueue {
            queue,
            index,
            rings,
            memory,
            interrupt,
            seen,
            in_flight,
            signalled,
            published: signalled,
            linger: None,
            dirty: None,
        })
    }

    /// Lets what the device writes be noted in `dirty`.
    #[must_use]
    pub fn tracked(mut self, dirty: Option<Arc<DirtyPages>>) -> Self {
        self.dirty = dirty;
        self
    }

    /// Lets [`VirtQueue::drain`] wait a moment for drivers that come back quickly. For devices whose work on a chain is
    /// done when they have been handed it.
    #[must_use]
    pub fn lingering(mut self) -> Self {
        self.linger = Some(Linger::default());
        self
    }

    /// The used ring, with the fields before and behind its elements (VIRTIO 1.3, 2.7.8), is about to be written.
    fn mark_used_ring(&self) {
        if let Some(dirty) = &self.dirty {
            dirty.mark(self.queue.used_ring(), 6 + 8 * u64::from(self.queue.size()));
        }
    }

    /// The queue's number in the device.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Guest memory the queue lives in.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// How far the device has come, to be saved. No chain is in flight then.
    pub fn position(&self) -> QueuePosition {
        let VirtQueue {
            queue,
            index: _,
            rings: _,
            memory: _,
            interrupt: _,
            // Looked at anew.
            seen: _,
            // A device at rest has completed or put back what it took.
            in_flight: _,
            // Every pass ends with a signal.
            signalled: _,
            published: _,
            // How fast the driver was says nothing of how fast it will be.
            linger: _,
            // The memory's affair.
            dirty: _,
        } = self;
        QueuePosition {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// Wraps an error with this queue's number.
    pub fn fail(&self, source: QueueError) -> DeviceError {
        DeviceError::Queue {
            index: self.index,
            source,
        }
    }

    /// Takes the next available chain, if there is one.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let next = self.queue.next_avail();
        if next == self.seen {
            self.seen = self.rings.avail_index()?;
            // The driver cannot have made more available than there is room for (VIRTIO 1.3, 2.7.13.1).
            if self.seen.wrapping_sub(next) > self.queue.size() {
                self.seen = next;
                return Err(virtio_queue::Error::InvalidAvailRingIndex.into());
            }
            if next == self.seen {
                return Ok(None);
            }
        }
        let head = self.rings.avail_head(next)?;
        self.queue.set_next_avail(next.wrapping_add(1));
        let mut chain = Chain {
            head,
            readable: Segments::default(),
            writable: Segments::default(),
        };
        self.walk(&mut chain)?;
        self.mark_in_flight(head)?;
        if let Some(dirty) = &self.dirty {
            let writable = chain.writable.iter();
            writable.for_each(|segment| dirty.mark(segment.addr.0, u64::from(segment.len)));
        }
        Ok(Some(chain))
    }

    /// Follows a chain from its first descriptor to its last, and checks each.
    fn walk(&self, chain: &mut Chain) -> Result<(), QueueError> {
        let memory = self.memory.as_ref();
        let head = chain.head;
        let mut table = self.rings.table()?;
        let mut index = head;
        let mut is_indirect = false;
        let mut bytes = 0u32;
        // A chain that goes round in a circle ends by this, too.
        let mut left = MAX_CHAIN;
        loop {
            let descriptor = table.get(index).ok_or(QueueError::Malformed { head })?;
            let (addr, len) = (descriptor.addr, descriptor.len);
            if descriptor.is_indirect() {
                // No table in a table (VIRTIO 1.3, 2.7.5.3.1), and none with more than can be counted.
                if is_indirect || len % 16 != 0 || len / 16 > u32::from(u16::MAX) {
                    return Err(QueueError::Malformed { head });
                }
                table = Table::indirect(memory, addr, len).ok_or(QueueError::OutsideMemory {
                    head,
                    addr: addr.0,
                    len,
                })?;
                is_indirect = true;
                index = 0;
                continue;
            }
            left = left.checked_sub(1).ok_or(QueueError::Malformed { head })?;
            if len > 0 && !self.rings.is_at_home(addr, len) && !is_in_memory(memory, addr, len) {
                return Err(QueueError::OutsideMemory {
                    head,
                    addr: addr.0,
                    len,
                });
            }
            bytes = bytes
                .checked_add(len)
                .ok_or(QueueError::Malformed { head })?;
            if descriptor.is_writable() {
                chain.writable.push(addr, len);
            } else if chain.writable.is_empty() {
                chain.readable.push(addr, len);
            } else {
                return Err(QueueError::Order { head });
            }
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// Makes the chain popped last available again, as if it had not been popped.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.clear_in_flight(chain.head);
        let previous = self.queue.next_avail().wrapping_sub(1);
        self.queue.set_next_avail(previous);
    }

    /// Puts `chain` in the used ring with `written` bytes of its writable part filled.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.complete_together(&[(head, written)])
    }

    /// Like [`VirtQueue::complete`], but the driver sees it only with a chain that is completed at once, or by
    /// [`VirtQueue::signal`].
    pub fn complete_later(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.put_used(&[(head, written)])
    }

    /// Like [`VirtQueue::complete_together`], but the driver may see it no earlier than the 15 chains that follow, or
    /// [`VirtQueue::signal`]: each look of the driver at the index takes it from this processor's cache.
    pub fn complete_soon(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        self.put_used(used)?;
        match self.queue.next_used().wrapping_sub(self.published) < TOGETHER {
            true => Ok(()),
            false => self.publish(),
        }
    }

    /// Puts several chains, each a head and its bytes written, in the used ring so that the driver sees either none
    /// or all of them, as it must for a frame in several buffers (VIRTIO 1.3, 5.1.6.4.1).
    pub fn complete_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        self.put_used(used)?;
        self.publish()
    }

    fn put_used(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        self.mark_used_ring();
        let mut next = self.queue.next_used();
        for &(head, written) in used {
            self.clear_in_flight(head);
            self.rings.set_used(next, head, written)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Shows the driver all that is in the used ring.
    fn publish(&mut self) -> Result<(), QueueError> {
        self.published = self.queue.next_used();
        self.rings.set_used_index(self.published)
    }

    /// Interrupts the driver if it wants to know of what was completed since the last call.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let (old, new) = (self.signalled, self.queue.next_used());
        if self.published != new {
            self.publish()?;
        }
        if old != new {
            self.signalled = new;
            if self.wants_interrupt(old, new)? {
                self.interrupt.used_buffer();
            }
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for used elements `old..new` (VIRTIO 1.3, 2.7.7 and 2.7.10).
    fn wants_interrupt(&self, old: u16, new: u16) -> Result<bool, QueueError> {
        // The driver writes its wish, then looks at the used index: here it must be the other way round.
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            let event = self.rings.used_event()?;
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(u32::from(self.rings.avail_flags()?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to kick: the device is looking at the ring anyway.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        // With an event index it is enough not to set a new one: the last was passed by the kick.
        if self.queue.event_idx_enabled() {
            return Ok(());
        }
        self.mark_used_ring();
        self.rings.set_used_flags(VRING_USED_F_NO_NOTIFY as u16)
    }

    /// Asks the driver to kick again. True: chains came in meanwhile, look once more.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.mark_used_ring();
        let next = self.queue.next_avail();
        match self.queue.event_idx_enabled() {
            true => self.rings.set_avail_event(next)?,
            false => self.rings.set_used_flags(0)?,
        }
        // The driver makes a chain available, then looks whether to kick: here it must be the other way round.
        fence(Ordering::SeqCst);
        Ok(self.rings.avail_index()? != next)
    }

    /// Asks the driver to kick when it makes one more chain available than there are now, whether or not they were
    /// taken. Returns what [`VirtQueue::made_available`] is until then.
    pub fn enable_kicks_for_more(&mut self) -> Result<u16, QueueError> {
        let made = self.rings.avail_index()?;
        self.mark_used_ring();
        match self.queue.event_idx_enabled() {
            true => self.rings.set_avail_event(made)?,
            false => self.rings.set_used_flags(0)?,
        }
        Ok(made)
    }

    /// How many chains the driver has made available in all. Wraps.
    pub fn made_available(&self) -> Result<u16, QueueError> {
        self.rings.avail_index()
    }

    fn mark_in_flight(&mut self, head: u16) -> Result<(), QueueError> {
        let (word, bit) = (usize::from(head) / 64, 1u64 << (head % 64));
        // A head past the queue's end has no descriptor, and was refused as malformed before.
        let slot = self
            .in_flight
            .get_mut(word)
            .ok_or(QueueError::Malformed { head })?;
        if *slot & bit != 0 {
            return Err(QueueError::InFlight(head));
        }
        *slot |= bit;
        Ok(())
    }

    fn clear_in_flight(&mut self, head: u16) {
        if let Some(slot) = self.in_flight.get_mut(usize::from(head) / 64) {
            *slot &= !(1u64 << (head % 64));
        }
    }
}

#[cfg(test)]
mod tests;
