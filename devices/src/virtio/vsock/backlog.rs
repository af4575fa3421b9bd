//! Bytes from the guest that a host socket could not take yet.

use std::collections::VecDeque;
use std::io;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// Bytes are held in chunks of this size.
pub const CHUNK: usize = 64 << 10;

/// Empty chunks kept for the next connection whose host is slow.
const KEEP: usize = 16;

/// A mapping of its own, not of the heap: that may keep what one load of many slow hosts took for as long as the machine
/// runs.
#[derive(Debug)]
struct Chunk {
    /// Of [`CHUNK`] bytes.
    memory: MmapRegion,
    /// Bytes in use, from its start.
    len: usize,
}

impl Chunk {
    /// Copies what there is room for, and returns how much that was.
    fn push(&mut self, slice: &VolatileSlice) -> io::Result<usize> {
        let room = self.memory.as_volatile_slice();
        let room = room.offset(self.len).map_err(io::Error::other)?;
        slice.copy_to_volatile_slice(room);
        let len = slice.len().min(room.len());
        self.len += len;
        Ok(len)
    }
}

/// Chunks that nobody uses. Memory fresh from the kernel costs more than the copy into it, so what one connection's
/// backlog gives up is the next one's.
#[derive(Debug, Default)]
pub struct Spare(Vec<Chunk>);

impl Spare {
    /// An empty chunk.
    fn take(&mut self) -> io::Result<Chunk> {
        if let Some(chunk) = self.0.pop() {
            return Ok(chunk);
        }
        let memory = MmapRegion::new(CHUNK).map_err(io::Error::other)?;
        Ok(Chunk { memory, len: 0 })
    }

    fn give(&mut self, mut chunk: Chunk) {
        if self.0.len() < KEEP {
            chunk.len = 0;
            self.0.push(chunk);
        }
    }

    /// Gives all memory back to the kernel.
    pub fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

/// A queue of bytes. Flow control bounds it to the connection's `buf_alloc`, so there are no more chunks than hold so
/// much, and one.
#[derive(Debug, Default)]
pub struct Backlog {
    /// None is empty.
    chunks: VecDeque<Chunk>,
    /// Bytes at the front of the first chunk that are gone already.
    start: usize,
}

impl Backlog {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The oldest bytes, as many as lie together; none if there are none at all.
    pub fn first(&self) -> Option<VolatileSlice<'_>> {
        let first = self.chunks.front()?;
        let here = first.len.checked_sub(self.start)?;
        first.memory.get_slice(self.start, here).ok()
    }

    /// Appends `slice`.
    ///
    /// # Errors
    /// The kernel gives no more memory. What went before that is there.
    pub fn push(&mut self, slice: &VolatileSlice, spare: &mut Spare) -> io::Result<()> {
        let mut rest = *slice;
        while !rest.is_empty() {
            if self.chunks.back().is_none_or(|last| last.len == CHUNK) {
                self.chunks.push_back(spare.take()?);
            }
            let Some(last) = self.chunks.back_mut() else {
                break;
            };
            let done = last.push(&rest)?;
            rest = rest.offset(done).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Drops the `len` oldest bytes.
    pub fn consume(&mut self, len: usize, spare: &mut Spare) {
        let mut left = self.start.saturating_add(len);
        while let Some(first) = self.chunks.pop_front() {
            if left < first.len {
                self.chunks.push_front(first);
                self.start = left;
                return;
            }
            left -= first.len;
            spare.give(first);
        }
        self.start = 0;
    }

    /// Drops all.
    pub fn clear(&mut self) {
        *self = Backlog::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(backlog: &mut Backlog, spare: &mut Spare, mut bytes: Vec<u8>) {
        backlog
            .push(&VolatileSlice::from(bytes.as_mut_slice()), spare)
            .unwrap();
    }

    #[test]
    fn bytes_leave_in_order_and_memory_is_used_again() {
        let (mut backlog, mut spare) = (Backlog::default(), Spare::default());
        let mut expected = VecDeque::new();
        for round in 0..100u32 {
            let chunk: Vec<u8> = (0..50_000).map(|i| (i * 7 + round) as u8).collect();
            expected.extend(chunk.iter().copied());
            push(&mut backlog, &mut spare, chunk);
            let gone = 40_000 + round as usize;
            backlog.consume(gone, &mut spare);
            expected.drain(..gone);
            assert!(expected.iter().eq(held(&backlog).iter()));
            assert!(backlog.chunks.len() <= expected.len() / CHUNK + 2);
            assert!(backlog.first().is_none() == backlog.is_empty());
        }
        let before = spare.0.len();
        assert!(before > 0);
        push(&mut backlog, &mut spare, vec![1; CHUNK]);
        assert!(spare.0.len() < before);
        push(&mut backlog, &mut spare, vec![1; 2 * KEEP * CHUNK]);
        backlog.consume(usize::MAX, &mut spare);
        assert!(backlog.is_empty() && backlog.first().is_none());
        assert_eq!(spare.0.len(), KEEP);
        assert!(spare.0.iter().all(|chunk| chunk.len == 0));
    }

    fn held(backlog: &Backlog) -> Vec<u8> {
        let bytes = backlog.chunks.iter().flat_map(|chunk| {
            let mut bytes = vec![0; chunk.len];
            chunk.memory.as_volatile_slice().copy_to(&mut bytes);
            bytes
        });
        bytes.skip(backlog.start).collect()
    }
}
