//! Writing a machine to two files, both or none.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use lepton_snapshot::codec::{self, CodecError};
use lepton_snapshot::{
    CHUNK, Hash, Leaves, ManifestError, Replacement, WriteError, memory_file, replace, state_file,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::config::saved::SavedConfig;
use crate::kvm::{Hypervisor, KvmError};
use crate::machine::Paused;
use crate::machine::state::SaveError;
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
    Manifest(#[from] ManifestError),
    #[error("a memory of {0} bytes cannot be saved")]
    Size(u64),
}

/// Saves a machine: its state to `state_path`, all of its memory to `memory_path`.
///
/// Both files are complete and durable before the first takes its place. That is the state file, and the memory file
/// follows; a process killed in between leaves a memory file that a load finds by the state file's word.
pub fn create(
    paused: &Paused,
    config: SavedConfig,
    state_path: &Path,
    memory_path: &Path,
) -> Result<(), CreateError> {
    if state_path == memory_path {
        return Err(CreateError::SamePath(state_path.display().to_string()));
    }
    if let Ok(old) = state_file::open(state_path) {
        memory_file::recover(memory_path, old.memory.bytes(), old.memory.root())?;
    }
    let state = paused.save(&Hypervisor::open()?, config)?;
    let state = codec::encode(&state)?;
    let memory_file = Replacement::new(memory_path)?;
    let state_file = Replacement::new(state_path)?;
    let leaves = write_memory(paused.ram(), &memory_file)?;
    let groups = leaves.groups();
    memory_file::write_footer(memory_file.file(), leaves.bytes(), leaves.root(&groups))
        .map_err(|source| memory_file.fail("cannot be written", source))?;
    memory_file.sync()?;
    state_file::write(&state_file, &state, &leaves, &groups)?;
    state_file.sync()?;
    state_file.put_in_place()?;
    // From here on the new state file counts: its memory must not go, whatever happens.
    memory_file.keep();
    replace::finish(memory_path)?;
    Ok(())
}

/// Writes what memory holds, but no zeroes.
fn write_memory(ram: &Ram, file: &Replacement) -> Result<Leaves, CreateError> {
    let regions = ram.memory.iter().map(|region| region.len());
    let bytes = regions.sum::<u64>();
    let mut leaves = Leaves::new(bytes).ok_or(CreateError::Size(bytes))?;
    let failed = |source: io::Error| file.fail("cannot be written", source);
    let mut touched = Pagemap::open();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    for region in ram.memory.iter() {
        let (start, host) = (region.start_addr().0, region.as_ptr() as usize);
        for offset in (0..region.len()).step_by(CHUNK) {
            let place = at + offset;
            let there = match ram.origin {
                Origin::Zeroes => touched.is_touched(host + offset as usize, CHUNK),
                Origin::File => true,
            };
            if !there {
                continue;
            }
            ram.memory
                .read_slice(&mut buffer, GuestAddress(start + offset))?;
            let hash = Hash::of_chunk(&buffer);
            if hash != Hash::ZERO {
                leaves.set(place / CHUNK as u64, hash)?;
                file.file().write_all_at(&buffer, place).map_err(failed)?;
            }
        }
        at += region.len();
    }
    Ok(leaves)
}
