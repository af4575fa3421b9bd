//! Reading a machine from two files.

use std::path::{Path, PathBuf};

use lepton_snapshot::codec::{self, CodecError};
use lepton_snapshot::{Manifest, MemoryFileError, StateFileError, memory_file, state_file};

use crate::config::Configuration;
use crate::config::saved::{Overrides, SavedConfig, SavedConfigError};
use crate::machine::restore::RestoreMachineError;
use crate::machine::state::MachineState;
use crate::memory::{MemoryError, Ram, image};

/// Why a saved machine is not loaded.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LoadError {
    #[error(transparent)]
    StateFile(#[from] StateFileError),
    #[error("{}: {source}", path.display())]
    Decode { path: PathBuf, source: CodecError },
    #[error(transparent)]
    Config(#[from] SavedConfigError),
    #[error(transparent)]
    MemoryFile(#[from] MemoryFileError),
    #[error(
        "the state file names a memory of {saved} bytes, its configuration one of {configured}"
    )]
    MemorySize { saved: u64, configured: u64 },
    #[error("huge_pages 2M: a memory file cannot be mapped with huge pages; use the Uffd backend")]
    HugePages,
    #[error("mem_backend Uffd: not part of this version")]
    Uffd,
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Restore(#[from] RestoreMachineError),
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
    #[error("host: {0}")]
    Host(#[from] std::io::Error),
}

/// A state file that was read and checked.
pub struct Saved {
    /// The machine.
    pub state: MachineState,
    /// The hashes of its memory.
    pub manifest: Manifest,
}

impl Saved {
    /// Reads the state file at `path`.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let opened = state_file::open(path)?;
        let state = codec::decode(&opened.state).map_err(|source| LoadError::Decode {
            path: path.to_owned(),
            source,
        })?;
        Ok(Saved {
            state,
            manifest: opened.memory,
        })
    }

    /// Opens and binds what the machine needs of the host.
    pub fn configure(&mut self, overrides: &Overrides) -> Result<Configuration, LoadError> {
        let config: &mut SavedConfig = &mut self.state.config;
        config.apply(overrides)?;
        let configuration = config.build(overrides)?;
        let (saved, configured) = (self.manifest.bytes(), configuration.shape().memory.bytes());
        match saved == configured {
            true => Ok(configuration),
            false => Err(LoadError::MemorySize { saved, configured }),
        }
    }

    /// Maps the memory file at `path`.
    pub fn map(&self, path: &Path, configuration: &Configuration) -> Result<Ram, LoadError> {
        let shape = configuration.shape();
        if shape.huge_pages == lepton_api::types::HugePages::Hugetlbfs2M {
            return Err(LoadError::HugePages);
        }
        let file = memory_file::open(path, self.manifest.bytes(), self.manifest.root())?;
        Ok(image::map_unverified(
            &file,
            shape.memory,
            shape.huge_pages,
        )?)
    }
}
