//! The memory file: guest memory as it is, and behind it one page that says which memory it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::hash::Hash;
use crate::replace::successor;
use crate::{ARCHITECTURE, MAX_MEMORY, VERSION};

/// Bytes behind guest memory: a page, so that tools which copy page by page keep it whole.
pub const FOOTER: u64 = 4096;
const MAGIC: [u8; 8] = *b"LEPTNMEM";
const FIELDS: usize = 56;

/// Why a memory file is not the one that a state file names.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct MemoryFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// The page behind a memory of `bytes` bytes with this root.
fn footer(bytes: u64, root: Hash) -> [u8; FIELDS] {
    let mut page = [0; FIELDS];
    page[..8].copy_from_slice(&MAGIC);
    page[8..10].copy_from_slice(&VERSION.to_le_bytes());
    page[10..12].copy_from_slice(&ARCHITECTURE.to_le_bytes());
    page[16..24].copy_from_slice(&bytes.to_le_bytes());
    page[24..].copy_from_slice(&root.0);
    page
}

/// Ends a file whose first `bytes` bytes are memory with this root.
pub fn write_footer(file: &File, bytes: u64, root: Hash) -> io::Result<()> {
    file.set_len(bytes + FOOTER)?;
    file.write_all_at(&footer(bytes, root), bytes)
}

/// Opens the memory file at `path` and checks that it is the one of `bytes` bytes with this root. If it is not, its
/// successor may be: then its writer was killed between the renames of the state file and this one.
pub fn open(path: &Path, bytes: u64, root: Hash) -> Result<File, MemoryFileError> {
    let first = match open_one(path, bytes, root) {
        Ok(file) => return Ok(file),
        Err(error) => error,
    };
    open_one(&successor(path), bytes, root).map_err(|_| first)
}

fn open_one(path: &Path, bytes: u64, root: Hash) -> Result<File, MemoryFileError> {
    let fail = |reason: String| MemoryFileError {
        path: path.to_owned(),
        reason,
    };
    let file = crate::state_file::open_regular(path).map_err(|e| fail(e.to_string()))?;
    let length = file.metadata().map_err(|e| fail(e.to_string()))?.len();
    if bytes > MAX_MEMORY || length != bytes + FOOTER {
        return Err(fail(format!(
            "{length} bytes, not the {} of a saved memory of {bytes}: it was cut or is another machine's",
            bytes.saturating_add(FOOTER)
        )));
    }
    let mut found = [0; FIELDS];
    file.read_exact_at(&mut found, bytes)
        .map_err(|e| fail(e.to_string()))?;
    if found[..8] != MAGIC {
        return Err(fail("no memory file of a snapshot".into()));
    }
    let version = u16::from_le_bytes([found[8], found[9]]);
    if version != VERSION {
        return Err(fail(format!(
            "format version {version}; this program reads {VERSION}"
        )));
    }
    if found != footer(bytes, root) {
        let mut theirs = [0; 32];
        theirs.copy_from_slice(&found[24..]);
        return Err(fail(format!(
            "the memory of another snapshot: its root is {}, the state file names {root}",
            Hash(theirs)
        )));
    }
    Ok(file)
}

/// Finishes what a killed writer left: the state file at `state` is new, its memory still beside its place.
pub fn recover(path: &Path, bytes: u64, root: Hash) -> Result<(), crate::WriteError> {
    if open_one(path, bytes, root).is_err() && open_one(&successor(path), bytes, root).is_ok() {
        crate::replace::finish(path)?;
    }
    Ok(())
}
