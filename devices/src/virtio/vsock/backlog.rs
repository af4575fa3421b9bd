//! Bytes from the guest that a host socket could not take yet.

use std::collections::VecDeque;
use std::io;

use vm_memory::{VolatileMemoryError, VolatileSlice, WriteVolatile};

/// Bytes are held in chunks of this size.
pub const CHUNK: usize = 64 << 10;

/// Empty chunks kept for the next connection whose host is slow.
const KEEP: usize = 16;

/// Chunks that nobody uses. Memory fresh from the kernel costs more than the copy into it, so what one connection's
/// backlog gives up is the next one's.
#[derive(Debug, Default)]
pub struct Spare(Vec<Vec<u8>>);

impl Spare {
    /// An empty chunk.
    fn take(&mut self) -> Vec<u8> {
        self.0.pop().unwrap_or_else(|| Vec::with_capacity(CHUNK))
    }

    fn give(&mut self, mut chunk: Vec<u8>) {
        if self.0.len() < KEEP {
            chunk.clear();
            self.0.push(chunk);
        }
    }

    /// Gives all memory back.
    pub fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

/// A queue of bytes. Flow control bounds it to the connection's `buf_alloc`, so there are no more chunks than hold so
/// much, and one.
#[derive(Debug, Default)]
pub struct Backlog {
    /// None is empty.
    chunks: VecDeque<Vec<u8>>,
    /// Bytes at the front of the first chunk that are gone already.
    start: usize,
}

impl Backlog {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The oldest bytes, as many as lie together. Some, unless there are none at all.
    pub fn bytes(&self) -> &[u8] {
        let first = self
            .chunks
            .front()
            .and_then(|first| first.get(self.start..));
        first.unwrap_or_default()
    }

    /// Appends `slice`.
    pub fn push(&mut self, slice: &VolatileSlice, spare: &mut Spare) -> io::Result<()> {
        let mut done = 0;
        while done < slice.len() {
            let mut chunk = match self.chunks.pop_back() {
                Some(last) if last.len() < CHUNK => last,
                full => {
                    self.chunks.extend(full);
                    spare.take()
                }
            };
            let here = (slice.len() - done).min(CHUNK - chunk.len());
            let copied = slice
                .subslice(done, here)
                .and_then(|part| chunk.write_all_volatile(&part));
            if !chunk.is_empty() {
                self.chunks.push_back(chunk);
            }
            copied.map_err(|error| match error {
                VolatileMemoryError::IOError(error) => error,
                other => io::Error::other(other),
            })?;
            done += here;
        }
        Ok(())
    }

    /// Drops the `len` oldest bytes.
    pub fn consume(&mut self, len: usize, spare: &mut Spare) {
        let mut left = self.start.saturating_add(len);
        while let Some(first) = self.chunks.pop_front() {
            if left < first.len() {
                self.chunks.push_front(first);
                self.start = left;
                return;
            }
            left -= first.len();
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
            assert!(backlog.bytes().is_empty() == backlog.is_empty());
        }
        let before = spare.0.len();
        assert!(before > 0);
        push(&mut backlog, &mut spare, vec![1; CHUNK]);
        assert!(spare.0.len() < before);
        push(&mut backlog, &mut spare, vec![1; 2 * KEEP * CHUNK]);
        backlog.consume(usize::MAX, &mut spare);
        assert!(backlog.is_empty() && backlog.bytes().is_empty());
        assert_eq!(spare.0.len(), KEEP);
        assert!(spare.0.iter().all(|chunk| chunk.capacity() == CHUNK));
    }

    fn held(backlog: &Backlog) -> Vec<u8> {
        backlog
            .chunks
            .iter()
            .flatten()
            .copied()
            .skip(backlog.start)
            .collect()
    }
}
