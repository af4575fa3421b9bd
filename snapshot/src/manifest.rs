//! The hashes of a memory: all of them while it is saved, those that are needed while it is loaded.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::hash::{CHUNK, Hash};
use crate::{MAX_MEMORY, VERSION};

/// Chunks under one group hash: 64 MiB of memory, 32 KiB of hashes.
pub const GROUP: usize = 1024;
const HASH: usize = 32;

/// Why a chunk is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A chunk that this memory does not have.
    #[error("there is no chunk {0} in the saved memory")]
    NoChunk(u64),
    /// The hashes of a group are not those that were written.
    #[error("state file: the hashes of chunks {first} to {last} are damaged")]
    Group {
        /// First chunk of the group.
        first: u64,
        /// Last chunk of the group.
        last: u64,
    },
    /// The hashes cannot be read.
    #[error("state file: the hashes of chunk {chunk} cannot be read: {source}")]
    Read {
        /// The chunk.
        chunk: u64,
        /// The host's reason.
        source: io::Error,
    },
    /// The bytes are not those that were written.
    #[error(
        "memory file: chunk {chunk} (bytes {:#x} to {:#x}) is not what was saved",
        chunk * CHUNK as u64,
        chunk * CHUNK as u64 + CHUNK as u64 - 1
    )]
    Chunk {
        /// The chunk.
        chunk: u64,
    },
}

/// Number of chunks of a memory; none if it is empty, too large or no whole number of chunks.
pub(crate) fn chunks_of(bytes: u64) -> Option<usize> {
    let fits = bytes > 0 && bytes <= MAX_MEMORY && bytes.is_multiple_of(CHUNK as u64);
    fits.then(|| usize::try_from(bytes / CHUNK as u64).ok())?
}

/// The root of a memory with these group hashes.
pub(crate) fn root_of(bytes: u64, groups: &[Hash]) -> Hash {
    let mut hasher = blake3::Hasher::new_derive_key("lepton snapshot memory root");
    hasher.update(&VERSION.to_le_bytes());
    hasher.update(&bytes.to_le_bytes());
    for group in groups {
        hasher.update(&group.0);
    }
    Hash(*hasher.finalize().as_bytes())
}

fn group_of(leaves: &[Hash]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for leaf in leaves {
        hasher.update(&leaf.0);
    }
    Hash(*hasher.finalize().as_bytes())
}

/// One hash per chunk, while a memory is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaves {
    bytes: u64,
    leaves: Vec<Hash>,
}

impl Leaves {
    /// Those of `bytes` bytes of zeroes; none if a memory cannot have that size.
    pub fn new(bytes: u64) -> Option<Self> {
        let leaves = vec![Hash::ZERO; chunks_of(bytes)?];
        Some(Leaves { bytes, leaves })
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sets the hash of a chunk, which must exist.
    pub fn set(&mut self, chunk: u64, hash: Hash) -> Result<(), ManifestError> {
        let leaf = usize::try_from(chunk)
            .ok()
            .and_then(|index| self.leaves.get_mut(index));
        *leaf.ok_or(ManifestError::NoChunk(chunk))? = hash;
        Ok(())
    }

    /// Hashes of the groups, in order.
    pub fn groups(&self) -> Vec<Hash> {
        self.leaves.chunks(GROUP).map(group_of).collect()
    }

    /// The root with these groups, which are [`Leaves::groups`].
    pub fn root(&self, groups: &[Hash]) -> Hash {
        root_of(self.bytes, groups)
    }

    /// The hashes as they lie in a file, group by group. Groups of untouched memory are left out.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u64, Vec<u8>)> {
        let groups = self.leaves.chunks(GROUP).enumerate();
        groups.filter_map(|(index, leaves)| {
            let touched = leaves.iter().any(|leaf| *leaf != Hash::ZERO);
            let bytes = || leaves.iter().flat_map(|leaf| leaf.0).collect();
            touched.then(|| ((index * GROUP * HASH) as u64, bytes()))
        })
    }
}

/// The hashes of a saved memory. Those of chunks are read and checked a group at a time, when one is asked for.
#[derive(Debug)]
pub struct Manifest {
    bytes: u64,
    root: Hash,
    groups: Vec<Hash>,
    file: File,
    /// Where the hashes of chunks begin in the file.
    at: u64,
    loaded: Vec<Option<Box<[Hash]>>>,
}

impl Manifest {
    pub(crate) fn new(bytes: u64, root: Hash, groups: Vec<Hash>, file: File, at: u64) -> Self {
        Manifest {
            loaded: groups.iter().map(|_| None).collect(),
            bytes,
            root,
            groups,
            file,
            at,
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What names the memory file.
    pub fn root(&self) -> Hash {
        self.root
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.bytes / CHUNK as u64
    }

    /// The hash of a chunk.
    pub fn leaf(&mut self, chunk: u64) -> Result<Hash, ManifestError> {
        if chunk >= self.chunks() {
            return Err(ManifestError::NoChunk(chunk));
        }
        let (group, index) = (chunk / GROUP as u64, (chunk % GROUP as u64) as usize);
        let slot = usize::try_from(group).unwrap_or(usize::MAX);
        if let Some(None) = self.loaded.get(slot) {
            let leaves = self.load(group, slot, chunk)?;
            self.loaded[slot] = Some(leaves);
        }
        let loaded = self.loaded.get(slot).and_then(Option::as_deref);
        let leaf = loaded.and_then(|leaves| leaves.get(index));
        leaf.copied().ok_or(ManifestError::NoChunk(chunk))
    }

    fn load(&self, group: u64, slot: usize, chunk: u64) -> Result<Box<[Hash]>, ManifestError> {
        let first = group * GROUP as u64;
        let count = (self.chunks() - first).min(GROUP as u64) as usize;
        let mut bytes = vec![0; count * HASH];
        self.file
            .read_exact_at(&mut bytes, self.at + first * HASH as u64)
            .map_err(|source| ManifestError::Read { chunk, source })?;
        let leaves: Box<[Hash]> = bytes
            .as_chunks::<HASH>()
            .0
            .iter()
            .map(|b| Hash(*b))
            .collect();
        match self.groups.get(slot) {
            Some(hash) if *hash == group_of(&leaves) => Ok(leaves),
            _ => Err(ManifestError::Group {
                first,
                last: first + count as u64 - 1,
            }),
        }
    }

    /// Whether `bytes` are the chunk that was saved.
    pub fn check(&mut self, chunk: u64, bytes: &[u8]) -> Result<(), ManifestError> {
        match self.leaf(chunk)? == Hash::of_chunk(bytes) {
            true => Ok(()),
            false => Err(ManifestError::Chunk { chunk }),
        }
    }

    /// All hashes, to be the base of another snapshot.
    pub fn leaves(&mut self) -> Result<Leaves, ManifestError> {
        let mut leaves = Vec::with_capacity(self.groups.len() * GROUP);
        for group in 0..self.groups.len() {
            self.leaf((group * GROUP) as u64)?;
            leaves.extend(self.loaded[group].iter().flatten());
        }
        Ok(Leaves {
            bytes: self.bytes,
            leaves,
        })
    }

    /// The same hashes, for another reader.
    pub fn try_clone(&self) -> io::Result<Self> {
        let file = self.file.try_clone()?;
        Ok(Manifest::new(
            self.bytes,
            self.root,
            self.groups.clone(),
            file,
            self.at,
        ))
    }
}
