//! The three parts of a split virtqueue, where they are in this process.
//!
//! They are looked up once, when the driver has made the queue ready: to find a guest address again for each field of a
//! chain takes several times what the rest of the work on it takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory, VolatileSlice,
};

use super::QueueError;
use crate::Memory;

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// Bytes of `flags` and `idx`, in front of the elements of either ring (VIRTIO 1.3, 2.7.6 and 2.7.8).
const HEADER: usize = 4;
/// Where `idx` is.
const INDEX: usize = 2;
/// Bytes of an element of the used ring.
const USED_ELEMENT: usize = 8;

/// A descriptor as the driver wrote it (VIRTIO 1.3, 2.7.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) addr: GuestAddress,
    pub(super) len: u32,
    flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    fn has(self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }

    pub(super) fn has_next(self) -> bool {
        self.has(VRING_DESC_F_NEXT)
    }

    pub(super) fn is_writable(self) -> bool {
        self.has(VRING_DESC_F_WRITE)
    }

    pub(super) fn is_indirect(self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }
}

/// Descriptors, direct or indirect.
pub(super) struct Table<'m>(VolatileSlice<'m>);

impl<'m> Table<'m> {
    /// An indirect one. `None` unless all of it lies in one region of memory.
    pub(super) fn indirect(memory: &'m Memory, addr: GuestAddress, len: u32) -> Option<Self> {
        memory.get_slice(addr, len as usize).ok().map(Self)
    }

    /// The descriptor at `index`. `None`: there are not as many.
    pub(super) fn get(&self, index: u16) -> Option<Descriptor> {
        let at = usize::from(index) * DESCRIPTOR;
        let words = (
            self.0.get_atomic_ref::<AtomicU64>(at),
            self.0.get_atomic_ref::<AtomicU64>(at + 8),
        );
        let (addr, rest) = match words {
            (Ok(addr), Ok(rest)) => (addr.load(Ordering::Relaxed), rest.load(Ordering::Relaxed)),
            // An indirect table may lie anywhere.
            _ => {
                let mut words = [[0; 8]; 2];
                let [addr, rest] = &mut words;
                self.0.subslice(at, 8).ok()?.copy_to(addr);
                self.0.subslice(at + 8, 8).ok()?.copy_to(rest);
                let [addr, rest] = words.map(u64::from_ne_bytes);
                (addr, rest)
            }
        };
        let rest = u64::from_le(rest);
        Some(Descriptor {
            addr: GuestAddress(u64::from_le(addr)),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }
}

/// A run of guest memory in one region.
struct Part {
    region: Arc<MmapRegion>,
    start: usize,
    len: usize,
}

impl Part {
    fn find(memory: &Memory, addr: u64, len: usize) -> Option<Self> {
        let addr = GuestAddress(addr);
        memory.get_slice(addr, len).ok()?;
        let (region, start) = memory.to_region_addr(addr)?;
        Some(Part {
            region: region.get_mmap(),
            start: usize::try_from(start.0).ok()?,
            len,
        })
    }

    fn outside(&self, offset: usize) -> QueueError {
        QueueError::Bounds {
            start: offset as u64,
            end: offset as u64,
            len: self.len as u64,
        }
    }

    fn u16(&self, offset: usize) -> Result<&AtomicU16, QueueError> {
        let found = self.region.get_atomic_ref(self.start + offset);
        found.map_err(|_| self.outside(offset))
    }

    fn u32(&self, offset: usize) -> Result<&AtomicU32, QueueError> {
        let found = self.region.get_atomic_ref(self.start + offset);
        found.map_err(|_| self.outside(offset))
    }
}

/// The parts of one queue.
pub(super) struct Rings {
    table: Part,
    avail: Part,
    used: Part,
    size: u16,
    /// Guest-physical addresses of the region that the table is in, where buffers nearly always are too.
    home: std::ops::Range<u64>,
}

impl Rings {
    /// The parts of a queue that the driver made ready. `None` unless each lies in one region of memory.
    pub(super) fn find(memory: &Memory, queue: &Queue) -> Option<Self> {
        let size = usize::from(queue.size());
        let region = memory.find_region(GuestAddress(queue.desc_table()))?;
        let start = region.start_addr().0;
        Some(Rings {
            table: Part::find(memory, queue.desc_table(), DESCRIPTOR * size)?,
            // Behind the elements are `used_event` and `avail_event`.
            avail: Part::find(memory, queue.avail_ring(), HEADER + 2 * size + 2)?,
            used: Part::find(memory, queue.used_ring(), HEADER + USED_ELEMENT * size + 2)?,
            size: queue.size(),
            home: start..start.checked_add(region.len())?,
        })
    }

    /// Whether these bytes lie in the region that the table is in.
    pub(super) fn is_at_home(&self, addr: GuestAddress, len: u32) -> bool {
        let end = addr.0.checked_add(u64::from(len));
        self.home.start <= addr.0 && end.is_some_and(|end| end <= self.home.end)
    }

    /// The table of descriptors.
    pub(super) fn table(&self) -> Result<Table<'_>, QueueError> {
        let slice = self
            .table
            .region
            .get_slice(self.table.start, self.table.len);
        slice.map(Table).map_err(|_| self.table.outside(0))
    }

    /// `idx` of the available ring. What the driver wrote before it is seen after this.
    pub(super) fn avail_index(&self) -> Result<u16, QueueError> {
        Ok(u16::from_le(self.avail.u16(INDEX)?.load(Ordering::Acquire)))
    }

    /// The head at place `index` of the available ring.
    pub(super) fn avail_head(&self, index: u16) -> Result<u16, QueueError> {
        let at = HEADER + 2 * usize::from(index % self.size);
        Ok(u16::from_le(self.avail.u16(at)?.load(Ordering::Relaxed)))
    }

    /// `flags` of the available ring.
    pub(super) fn avail_flags(&self) -> Result<u16, QueueError> {
        Ok(u16::from_le(self.avail.u16(0)?.load(Ordering::Relaxed)))
    }

    /// `used_event`, behind the available ring's elements.
    pub(super) fn used_event(&self) -> Result<u16, QueueError> {
        let at = HEADER + 2 * usize::from(self.size);
        Ok(u16::from_le(self.avail.u16(at)?.load(Ordering::Relaxed)))
    }

    /// Writes the element at place `index` of the used ring.
    pub(super) fn set_used(&self, index: u16, head: u16, len: u32) -> Result<(), QueueError> {
        let at = HEADER + USED_ELEMENT * usize::from(index % self.size);
        let head = u32::from(head).to_le();
        self.used.u32(at)?.store(head, Ordering::Relaxed);
        self.used.u32(at + 4)?.store(len.to_le(), Ordering::Relaxed);
        Ok(())
    }

    /// Writes `idx` of the used ring. Whoever sees it sees all that was written before.
    pub(super) fn set_used_index(&self, index: u16) -> Result<(), QueueError> {
        self.used
            .u16(INDEX)?
            .store(index.to_le(), Ordering::Release);
        Ok(())
    }

    /// Writes `flags` of the used ring.
    pub(super) fn set_used_flags(&self, flags: u16) -> Result<(), QueueError> {
        self.used.u16(0)?.store(flags.to_le(), Ordering::Relaxed);
        Ok(())
    }

    /// Writes `avail_event`, behind the used ring's elements.
    pub(super) fn set_avail_event(&self, index: u16) -> Result<(), QueueError> {
        let at = HEADER + USED_ELEMENT * usize::from(self.size);
        self.used.u16(at)?.store(index.to_le(), Ordering::Relaxed);
        Ok(())
    }
}
