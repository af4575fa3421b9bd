//! The state file: header, state, hashes.
//!
//! | version | reader |
//! |---|---|
//! | 1 | [`open`] |

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::hash::Hash;
use crate::manifest::{GROUP, Leaves, Manifest, chunks_of, root_of};
use crate::replace::{Replacement, WriteError};
use crate::{ARCHITECTURE, MAX_STATE, VERSION};

const MAGIC: [u8; 8] = *b"LEPTNVMS";
const HEADER: usize = 96;
/// The header without its hash.
const HASHED: usize = 64;
const HASH: usize = 32;
const PAGE: u64 = 4096;

/// Why a state file cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", path.display())]
pub struct StateFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub kind: StateFileErrorKind,
}

/// What is wrong with a state file.
#[derive(Debug, thiserror::Error)]
pub enum StateFileErrorKind {
    /// The host refused.
    #[error("{0}")]
    Host(#[from] io::Error),
    /// Another kind of file.
    #[error("no state file of a snapshot")]
    Magic,
    /// A version this program does not know.
    #[error("format version {0}; this program reads {VERSION}")]
    Version(u16),
    /// Another processor's.
    #[error("saved on another architecture (ELF machine {0}, this is {ARCHITECTURE})")]
    Architecture(u16),
    /// A length that cannot be.
    #[error("its header says {what} {found}, which cannot be")]
    Length {
        /// Which length.
        what: &'static str,
        /// As it stands there.
        found: u64,
    },
    /// It was cut, or something was added.
    #[error("{found} bytes instead of {wanted}: it was cut or changed")]
    Size {
        /// Its size.
        found: u64,
        /// What its header says.
        wanted: u64,
    },
    /// The bytes are not those that were written.
    #[error("damaged: its hash is not the one that was written")]
    Hash,
}

/// A state file that was read.
#[derive(Debug)]
pub struct Opened {
    /// The encoded state.
    pub state: Vec<u8>,
    /// The hashes of memory.
    pub memory: Manifest,
}

struct Layout {
    state: usize,
    groups: usize,
    chunks: usize,
}

impl Layout {
    fn leaves_at(&self) -> u64 {
        let head = HEADER + self.state + self.groups * HASH;
        (head as u64).next_multiple_of(PAGE)
    }

    fn size(&self) -> u64 {
        self.leaves_at() + (self.chunks * HASH) as u64
    }
}

fn field<const N: usize>(header: &[u8; HEADER], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    // The places are constants inside the header.
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}

fn head_hash(header: &[u8], rest: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new_derive_key("lepton snapshot state");
    hasher.update(header);
    hasher.update(rest);
    Hash(*hasher.finalize().as_bytes())
}

/// Writes a state file: the encoded state, and the hashes of memory, whose groups are `groups`.
pub fn write(
    file: &Replacement,
    state: &[u8],
    memory: &Leaves,
    groups: &[Hash],
) -> Result<(), WriteError> {
    let layout = Layout {
        state: state.len(),
        groups: groups.len(),
        chunks: chunks_of(memory.bytes()).unwrap_or(0),
    };
    let mut head = Vec::with_capacity(HEADER + state.len() + groups.len() * HASH);
    head.extend(MAGIC);
    head.extend(VERSION.to_le_bytes());
    head.extend(ARCHITECTURE.to_le_bytes());
    head.extend([0; 4]);
    head.extend((state.len() as u64).to_le_bytes());
    head.extend(memory.bytes().to_le_bytes());
    head.extend(memory.root(groups).0);
    let mut rest = state.to_vec();
    rest.extend(groups.iter().flat_map(|group| group.0));
    let hash = head_hash(&head, &rest);
    head.extend(hash.0);
    head.extend(rest);
    let put = |bytes: &[u8], at| {
        let written = file.file().write_all_at(bytes, at);
        written.map_err(|source| file.fail("cannot be written", source))
    };
    put(&head, 0)?;
    for (at, block) in memory.blocks() {
        put(&block, layout.leaves_at() + at)?;
    }
    let sized = file.file().set_len(layout.size());
    sized.map_err(|source| file.fail("cannot be written", source))
}

pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        // A named pipe must be refused, not waited for.
        .custom_flags((OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32)
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("not a regular file")),
    }
}

/// Reads a state file, all but the hashes of chunks, and checks what it read.
pub fn open(path: &Path) -> Result<Opened, StateFileError> {
    read(path).map_err(|kind| StateFileError {
        path: path.to_owned(),
        kind,
    })
}

/// The format version of a state file, whatever else is in it.
pub fn version(path: &Path) -> Result<u16, StateFileError> {
    let found = || {
        let file = open_regular(path)?;
        let header = header(&file, file.metadata()?.len())?;
        Ok(u16::from_le_bytes(field(&header, 8)))
    };
    found().map_err(|kind| StateFileError {
        path: path.to_owned(),
        kind,
    })
}

fn header(file: &File, size: u64) -> Result<[u8; HEADER], StateFileErrorKind> {
    let mut header = [0; HEADER];
    if size < HEADER as u64 {
        return Err(StateFileErrorKind::Magic);
    }
    file.read_exact_at(&mut header, 0)?;
    if field(&header, 0) != MAGIC {
        return Err(StateFileErrorKind::Magic);
    }
    Ok(header)
}

fn read(path: &Path) -> Result<Opened, StateFileErrorKind> {
    let file = open_regular(path)?;
    let found = file.metadata()?.len();
    let header = header(&file, found)?;
    match u16::from_le_bytes(field(&header, 8)) {
        VERSION => {}
        version => return Err(StateFileErrorKind::Version(version)),
    }
    match u16::from_le_bytes(field(&header, 10)) {
        ARCHITECTURE => {}
        other => return Err(StateFileErrorKind::Architecture(other)),
    }
    let length = |what, found| StateFileErrorKind::Length { what, found };
    let state = u64::from_le_bytes(field(&header, 16));
    let bytes = u64::from_le_bytes(field(&header, 24));
    let root = Hash(field(&header, 32));
    let chunks = chunks_of(bytes).ok_or(length("memory bytes", bytes))?;
    let layout = Layout {
        state: usize::try_from(state)
            .ok()
            .filter(|state| *state <= MAX_STATE)
            .ok_or(length("state bytes", state))?,
        groups: chunks.div_ceil(GROUP),
        chunks,
    };
    if found != layout.size() {
        let wanted = layout.size();
        return Err(StateFileErrorKind::Size { found, wanted });
    }
    let mut rest = vec![0; layout.state + layout.groups * HASH];
    file.read_exact_at(&mut rest, HEADER as u64)?;
    if head_hash(&header[..HASHED], &rest) != Hash(field(&header, HASHED)) {
        return Err(StateFileErrorKind::Hash);
    }
    let groups = rest.split_off(layout.state);
    let groups: Vec<_> = groups
        .as_chunks::<HASH>()
        .0
        .iter()
        .map(|b| Hash(*b))
        .collect();
    if root_of(bytes, &groups) != root {
        return Err(StateFileErrorKind::Hash);
    }
    Ok(Opened {
        state: rest,
        memory: Manifest::new(bytes, root, groups, file, layout.leaves_at()),
    })
}

#[cfg(test)]
mod tests;
