//! A chain and its buffers.

use std::ops::Range;

use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{QueueError, memory_error};
use crate::Memory;

/// One buffer the driver made available: what the device may read, then what it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub(super) head: u16,
    /// Bytes from the driver.
    pub readable: Segments,
    /// Room for bytes to the driver.
    pub writable: Segments,
}

impl Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// A contiguous run of guest-physical bytes inside guest memory, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address of the first byte.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// The buffers of one direction of a chain, as one run of bytes. Small, because chains are moved: most have one or two
/// segments in a direction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments {
    list: SmallVec<[Segment; 2]>,
    len: u64,
}

/// Volatile views on guest memory, in order.
pub type Slices<'m> = SmallVec<[VolatileSlice<'m>; 8]>;

impl Segments {
    /// Total bytes, at most 2^32.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments in order.
    pub fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.list.iter()
    }

    pub(super) fn push(&mut self, addr: GuestAddress, len: u32) {
        if len > 0 {
            self.list.push(Segment { addr, len });
            self.len += u64::from(len);
        }
    }

    /// The parts of the segments that hold bytes `range`, in order.
    pub fn clip(&self, range: Range<u64>) -> Result<impl Iterator<Item = Segment>, QueueError> {
        if range.start > range.end || range.end > self.len {
            return Err(QueueError::Bounds {
                start: range.start,
                end: range.end,
                len: self.len,
            });
        }
        let mut base = 0u64;
        let clipped = self.list.iter().filter_map(move |segment| {
            let start = base;
            base += u64::from(segment.len);
            let from = range.start.max(start);
            let to = range.end.min(base);
            (from < to).then(|| Segment {
                addr: GuestAddress(segment.addr.0 + (from - start)),
                len: u32::try_from(to - from).unwrap_or(segment.len),
            })
        });
        Ok(clipped)
    }

    /// Views on bytes `range` of the buffer.
    pub fn slices<'m>(
        &self,
        memory: &'m Memory,
        range: Range<u64>,
    ) -> Result<Slices<'m>, QueueError> {
        let mut slices = Slices::new();
        self.slices_into(memory, range, &mut slices)?;
        Ok(slices)
    }

    /// The same in the place of what `slices` held.
    pub fn slices_into<'m>(
        &self,
        memory: &'m Memory,
        range: Range<u64>,
        slices: &mut Slices<'m>,
    ) -> Result<(), QueueError> {
        slices.clear();
        for segment in self.clip(range)? {
            // Nearly always a segment lies in one region, which is cheaper to find out than to iterate.
            if let Ok(slice) = memory.get_slice(segment.addr, segment.len as usize) {
                slices.push(slice);
                continue;
            }
            let found = memory
                .get_slices(segment.addr, segment.len as usize)
                .stop_on_error()
                .map_err(memory_error)?;
            slices.extend(found);
        }
        Ok(())
    }

    /// Copies `buf.len()` bytes from `offset` of the buffer into `buf`.
    pub fn read_at(&self, memory: &Memory, offset: u64, buf: &mut [u8]) -> Result<(), QueueError> {
        let end = offset.saturating_add(buf.len() as u64);
        let mut rest = buf;
        for segment in self.clip(offset..end)? {
            let (now, later) = rest.split_at_mut(segment.len as usize);
            match memory.get_slice(segment.addr, now.len()) {
                Ok(slice) => {
                    slice.copy_to(now);
                }
                Err(_) => memory.read_slice(now, segment.addr).map_err(memory_error)?,
            }
            rest = later;
        }
        Ok(())
    }

    /// Copies `buf` to `offset` of the buffer.
    pub fn write_at(&self, memory: &Memory, offset: u64, buf: &[u8]) -> Result<(), QueueError> {
        let end = offset.saturating_add(buf.len() as u64);
        let mut rest = buf;
        for segment in self.clip(offset..end)? {
            let (now, later) = rest.split_at(segment.len as usize);
            match memory.get_slice(segment.addr, now.len()) {
                Ok(slice) => slice.copy_from(now),
                Err(_) => memory
                    .write_slice(now, segment.addr)
                    .map_err(memory_error)?,
            }
            rest = later;
        }
        Ok(())
    }
}
