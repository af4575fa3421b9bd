//! Writing a machine to two files, both or none.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::PoisonError;

use lepton_devices::dirty::PAGE;
use lepton_snapshot::codec::{self, CodecError};
use lepton_snapshot::{
    CHUNK, Hash, Leaves, ManifestError, Replacement, WriteError, memory_file, replace, state_file,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::config::saved::SavedConfig;
use crate::kvm::{Hypervisor, KvmError};
use crate::machine::Paused;
use crate::machine::state::SaveError;
use crate::memory::pager::PageError;
use crate::memory::present::Pagemap;
use crate::memory::{Origin, Ram};

/// Why a machine was not saved. What was at the paths before is there still.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CreateError {
    #[error("snapshot_path and mem_file_path are both {0}")]
    SamePath(String),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    Encode(#[from] CodecError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("guest memory: {0}")]
    Base(#[source] std::io::Error),
    #[error("a memory of {0} bytes cannot be saved")]
    Size(u64),
}

/// How much of memory is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Full,
    /// What was written since the last snapshot, or, if no record was kept, what was touched at all.
    Diff,
}

/// Saves a machine: its state to `state_path`, its memory to `memory_path`.
///
/// Both files are complete and durable before the first takes its place. That is the state file, and the memory file
/// follows; a process killed in between leaves a memory file that a load finds by the state file's word.
pub fn create(
    paused: &mut Paused,
    config: SavedConfig,
    extent: Extent,
    state_path: &Path,
    memory_path: &Path,
) -> Result<(), CreateError> {
    if state_path == memory_path {
        return Err(CreateError::SamePath(state_path.display().to_string()));
    }
    if let Ok(old) = state_file::open(state_path) {
        memory_file::recover(memory_path, old.memory.bytes(), old.memory.root())?;
    }
    let state = paused.save(&Hypervisor::open()?.saveable()?, config)?;
    let state = codec::encode(&state)?;
    let memory_file = Replacement::new(memory_path)?;
    let state_file = Replacement::new(state_path)?;
    paused.collect_dirty_pages()?;
    let leaves = match extent {
        Extent::Full => write_all(paused.ram(), &memory_file)?,
        Extent::Diff => write_changes(paused.ram(), &memory_file)?,
    };
    let groups = leaves.groups();
    memory_file::write_footer(memory_file.file(), leaves.bytes(), leaves.root(&groups))
        .map_err(|source| memory_file.fail("cannot be written", source))?;
    memory_file.sync()?;
    state_file::write(&state_file, &state, &leaves, &groups)?;
    state_file.sync()?;
    state_file.put_in_place()?;
    // From here on the new state file counts: its memory must not go, whatever happens.
    memory_file.keep();
    let ram = paused.ram_mut();
    if let Some(tracking) = &mut ram.tracking {
        tracking.pending.fill(0);
        ram.last = Some(leaves);
    }
    replace::finish(memory_path)?;
    Ok(())
}

/// One chunk of memory.
struct Place {
    /// Its number, which says where it lies in the file.
    chunk: u64,
    guest: GuestAddress,
    host: usize,
}

impl Place {
    fn in_file(&self) -> u64 {
        self.chunk * CHUNK as u64
    }
}

fn places(ram: &Ram) -> Vec<Place> {
    let mut places = Vec::new();
    for region in ram.memory.iter() {
        for offset in (0..region.len()).step_by(CHUNK) {
            places.push(Place {
                chunk: places.len() as u64,
                guest: GuestAddress(region.start_addr().0 + offset),
                host: region.as_ptr() as usize + offset as usize,
            });
        }
    }
    places
}

fn no_leaves(ram: &Ram) -> Result<Leaves, CreateError> {
    let regions = ram.memory.iter().map(|region| region.len());
    let bytes = regions.sum::<u64>();
    Leaves::new(bytes).ok_or(CreateError::Size(bytes))
}

/// Writes what memory holds, but no zeroes.
fn write_all(ram: &Ram, file: &Replacement) -> Result<Leaves, CreateError> {
    let mut leaves = no_leaves(ram)?;
    let mut touched = Pagemap::new(ram.pagemap.as_ref());
    let mut buffer = vec![0; CHUNK];
    for place in places(ram) {
        let is_touched = touched.is_touched(place.host, CHUNK);
        match &ram.origin {
            Origin::Zeroes if !is_touched => continue,
            // As it was saved: from the file, not through memory, which would fill it.
            Origin::File(source) if !is_touched => {
                let mut source = source.lock().unwrap_or_else(PoisonError::into_inner);
                if !source.read(place.chunk, &mut buffer)? {
                    continue;
                }
            }
            // By the files: reading through memory would fill the holes in them.
            Origin::Shared(file) if !is_touched => file
                .read_exact_at(&mut buffer, place.in_file())
                .map_err(CreateError::Base)?,
            Origin::Base(base) if !is_touched => base
                .read(place.in_file(), &mut buffer)
                .map_err(CreateError::Base)?,
            Origin::Zeroes
            | Origin::File(_)
            | Origin::Elsewhere(_)
            | Origin::Shared(_)
            | Origin::Base(_) => {
                ram.memory.read_slice(&mut buffer, place.guest)?;
            }
        }
        let hash = Hash::of_chunk(&buffer);
        if hash != Hash::ZERO {
            leaves.set(place.chunk, hash)?;
            write_at(file, &buffer, place.in_file())?;
        }
    }
    Ok(leaves)
}

fn write_at(file: &Replacement, bytes: &[u8], at: u64) -> Result<(), CreateError> {
    let written = file.file().write_all_at(bytes, at);
    Ok(written.map_err(|source| file.fail("cannot be written", source))?)
}

/// Writes the pages that were written, zeroes too: laid over the memory file of the snapshot before, they make that of
/// this one. The hashes are those of all memory.
fn write_changes(ram: &Ram, file: &Replacement) -> Result<Leaves, CreateError> {
    let known = match (&ram.tracking, &ram.last, &ram.origin) {
        (Some(_), Some(last), _) => Some(last.clone()),
        (Some(_), None, Origin::File(source)) => {
            let mut source = source.lock().unwrap_or_else(PoisonError::into_inner);
            Some(source.manifest.leaves()?)
        }
        _ => None,
    };
    // Without a record, or with nothing to compare with: all that was touched.
    let (mut leaves, pending) = match (known, &ram.tracking) {
        (Some(leaves), Some(tracking)) => (leaves, Some(tracking.pending.as_slice())),
        _ => match &ram.origin {
            Origin::File(source) => {
                let mut source = source.lock().unwrap_or_else(PoisonError::into_inner);
                (source.manifest.leaves()?, None)
            }
            Origin::Zeroes | Origin::Elsewhere(_) | Origin::Shared(_) | Origin::Base(_) => {
                (no_leaves(ram)?, None)
            }
        },
    };
    const PAGES: usize = CHUNK / PAGE as usize;
    let mut touched = Pagemap::new(ram.pagemap.as_ref());
    let mut buffer = vec![0; CHUNK];
    for place in places(ram) {
        let changed = |page: usize| match pending {
            Some(bits) => {
                let page = place.chunk as usize * PAGES + page;
                bits.get(page / 64)
                    .is_some_and(|word| word >> (page % 64) & 1 == 1)
            }
            None => match ram.origin {
                Origin::Elsewhere(_) | Origin::Shared(_) | Origin::Base(_) => true,
                Origin::Zeroes | Origin::File(_) => {
                    touched.is_touched(place.host + page * PAGE as usize, PAGE as usize)
                }
            },
        };
        let pages: Vec<bool> = (0..PAGES).map(changed).collect();
        if !pages.contains(&true) {
            continue;
        }
        ram.memory.read_slice(&mut buffer, place.guest)?;
        leaves.set(place.chunk, Hash::of_chunk(&buffer))?;
        for (page, bytes) in buffer.chunks_exact(PAGE as usize).enumerate() {
            if pages[page] {
                write_at(file, bytes, place.in_file() + page as u64 * PAGE)?;
            }
        }
    }
    Ok(leaves)
}
