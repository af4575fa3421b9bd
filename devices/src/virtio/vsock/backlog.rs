//! Bytes from the guest that a host socket could not take yet.

use std::io;

use vm_memory::{VolatileMemoryError, VolatileSlice, WriteVolatile};

/// An empty backlog keeps at most this much memory.
const KEEP: usize = 64 << 10;

/// A queue of bytes. Flow control bounds it to the connection's `buf_alloc`.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    /// Bytes at the front that are gone already.
    start: usize,
}

impl Backlog {
    /// Bytes held.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, oldest first.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// Appends `slice`.
    pub fn push(&mut self, slice: &VolatileSlice) -> io::Result<()> {
        // Each byte is moved only after as many have left, so moving costs no more than the copy here.
        if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes
            .write_all_volatile(slice)
            .map_err(|error| match error {
                VolatileMemoryError::IOError(error) => error,
                other => io::Error::other(other),
            })
    }

    /// Drops the `len` oldest bytes.
    pub fn consume(&mut self, len: usize) {
        self.start = self.start.saturating_add(len).min(self.bytes.len());
        if self.is_empty() {
            self.clear();
        }
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(KEEP);
        self.start = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(backlog: &mut Backlog, mut bytes: Vec<u8>) {
        backlog
            .push(&VolatileSlice::from(bytes.as_mut_slice()))
            .unwrap();
    }

    #[test]
    fn bytes_leave_in_order_and_memory_is_given_back() {
        let mut backlog = Backlog::default();
        let mut expected = std::collections::VecDeque::new();
        for round in 0..100u32 {
            let chunk: Vec<u8> = (0..5000).map(|i| (i * 7 + round) as u8).collect();
            expected.extend(chunk.iter().copied());
            push(&mut backlog, chunk);
            let gone = 4000 + round as usize;
            backlog.consume(gone);
            expected.drain(..gone);
            assert!(expected.iter().eq(backlog.bytes()));
        }
        assert!(backlog.bytes.len() <= 2 * backlog.len() + 5000);
        push(&mut backlog, vec![1; 4 * KEEP]);
        backlog.consume(usize::MAX);
        assert!(backlog.is_empty() && backlog.bytes.capacity() <= KEEP);
    }
}
