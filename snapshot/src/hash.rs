//! Hashes of chunks.

use std::fmt;

/// Bytes of memory under one hash.
pub const CHUNK: usize = 64 << 10;

/// A BLAKE3 hash of 256 bits. Of a chunk of zeroes it is [`Hash::ZERO`] instead, so that memory nobody touched needs
/// neither hashing nor room in a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Stands for a chunk of zeroes.
    pub const ZERO: Hash = Hash([0; 32]);

    /// The hash of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Hash(*blake3::hash(bytes).as_bytes())
    }

    /// The hash of a chunk.
    pub fn of_chunk(bytes: &[u8]) -> Self {
        match is_zero(bytes) {
            true => Hash::ZERO,
            false => Hash::of(bytes),
        }
    }
}

impl fmt::Display for Hash {
    /// The first 8 bytes: enough to tell two snapshots apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(8).try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether all bytes are 0.
pub fn is_zero(bytes: &[u8]) -> bool {
    // By blocks, which the compiler turns into wide instructions.
    let blocks = bytes.chunks_exact(64);
    blocks.remainder().iter().all(|b| *b == 0)
        && blocks
            .clone()
            .all(|block| block.iter().fold(0, |all, b| all | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_makes_a_difference_anywhere() {
        let mut chunk = vec![0; CHUNK];
        assert_eq!(Hash::of_chunk(&chunk), Hash::ZERO);
        assert!(is_zero(&chunk[..77]));
        for at in [0, 63, 64, 4096, CHUNK - 1] {
            chunk[at] = 1;
            assert_ne!(Hash::of_chunk(&chunk), Hash::ZERO);
            assert_eq!(Hash::of_chunk(&chunk), Hash::of(&chunk));
            chunk[at] = 0;
        }
        assert!(!is_zero(&[0, 0, 1]));
    }
}
