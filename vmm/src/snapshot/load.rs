//! Reading a machine from two files.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lepton_api::types::{HugePages, MemoryBackendType, SnapshotLoad};
use lepton_snapshot::codec::{self, CodecError};
use lepton_snapshot::{CHUNK, Manifest, MemoryFileError, StateFileError, memory_file, state_file};

use crate::config::saved::{Overrides, SavedConfig, SavedConfigError};
use crate::config::{Configuration, Shape};
use crate::identity::IdentityError;
use crate::machine::restore::RestoreMachineError;
use crate::machine::state::MachineState;
use crate::memory::base::Base;
use crate::memory::image::{self, ImageError};
use crate::memory::pager::{PageError, Source};
use crate::memory::place::Place;
use crate::memory::{Ram, allocate};
use crate::reach::ReachError;

/// How often the log is told how far it is.
const TELL: Duration = Duration::from_secs(2);

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
    Identity(#[from] IdentityError),
    #[error(transparent)]
    MemoryFile(#[from] MemoryFileError),
    #[error(
        "the state file names a memory of {saved} bytes, its configuration one of {configured}"
    )]
    MemorySize { saved: u64, configured: u64 },
    #[error("exactly one of mem_backend and mem_file_path says where memory is")]
    Backend,
    #[error("huge_pages 2M: a memory file cannot be mapped with huge pages; use the Uffd backend")]
    HugePages,
    #[error("huge_pages 2M: a memory in huge pages cannot be shared by copies")]
    Shared,
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Restore(#[from] RestoreMachineError),
    #[error(transparent)]
    Files(#[from] ReachError),
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
        let configuration = config.build(overrides, Vec::new())?;
        let (saved, configured) = (self.manifest.bytes(), configuration.shape().memory.bytes());
        match saved == configured {
            true => Ok(configuration),
            false => Err(LoadError::MemorySize { saved, configured }),
        }
    }

    /// Reads and checks all of the memory in `path`, to be given to others. The configuration is that of a machine like
    /// this one, without devices. It takes a time that grows with the memory, of which the log is told.
    pub fn keep(self, path: &Path) -> Result<(MachineState, Base, Configuration), LoadError> {
        let Saved { state, manifest } = self;
        let configuration = state
            .config
            .without_devices()
            .build(&Overrides::default(), Vec::new())?;
        let (saved, configured) = (manifest.bytes(), configuration.shape().memory.bytes());
        if saved != configured {
            return Err(LoadError::MemorySize { saved, configured });
        }
        if configuration.shape().huge_pages == HugePages::Hugetlbfs2M {
            return Err(LoadError::Shared);
        }
        let source = Source {
            file: memory_file::open(path, manifest.bytes(), manifest.root())?,
            manifest,
        };
        let started = Instant::now();
        let mut told = started;
        let mib = |bytes: u64| bytes >> 20;
        let base = image::copy_verified(source, |chunk| {
            if told.elapsed() > TELL {
                told = Instant::now();
                let done = mib(chunk * CHUNK as u64);
                log::info!("{done} of {} MiB read and checked", mib(saved));
            }
        })?;
        log::info!(
            "{} MiB read and checked in {:?}",
            mib(saved),
            started.elapsed()
        );
        Ok((state, base, configuration))
    }

    /// Gets the memory, in `place` if that is as large. `failed` is told of the first chunk that is not what was saved.
    pub fn map(
        self,
        backend: &Backend,
        configuration: &Configuration,
        place: Option<Place>,
        failed: impl FnOnce(PageError) + Send + 'static,
    ) -> Result<(MachineState, Ram), LoadError> {
        let Saved { state, manifest } = self;
        let Shape {
            memory,
            huge_pages,
            track_dirty_pages,
            ..
        } = configuration.shape();
        let source = |path: &Path| -> Result<Source, LoadError> {
            if huge_pages == HugePages::Hugetlbfs2M {
                return Err(LoadError::HugePages);
            }
            let file = memory_file::open(path, manifest.bytes(), manifest.root())?;
            Ok(Source { file, manifest })
        };
        let empty = || match place.filter(|place| place.suits(memory, huge_pages)) {
            Some(place) => place.clear().map_err(ImageError::from),
            None => allocate(memory, huge_pages).map_err(ImageError::from),
        };
        let ram = match backend {
            Backend::Checked(path) => image::map_verified(source(path)?, empty()?, failed)?,
            Backend::Unchecked(path) => image::map_unverified(source(path)?, empty()?)?,
            Backend::Elsewhere(path) => image::map_elsewhere(path, empty()?, huge_pages)?,
        };
        Ok((state, ram.tracked(track_dirty_pages)))
    }
}

/// Where memory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// From this file, each chunk checked when it is touched.
    Checked(PathBuf),
    /// From this file, as it is.
    Unchecked(PathBuf),
    /// From the process that listens at this socket.
    Elsewhere(PathBuf),
}

impl TryFrom<&SnapshotLoad> for Backend {
    type Error = LoadError;

    fn try_from(load: &SnapshotLoad) -> Result<Self, LoadError> {
        match (&load.mem_backend, &load.mem_file_path) {
            (Some(backend), None) => {
                let path = backend.backend_path.clone();
                Ok(match backend.backend_type {
                    MemoryBackendType::File if backend.verify => Backend::Checked(path),
                    MemoryBackendType::File => Backend::Unchecked(path),
                    MemoryBackendType::Uffd => Backend::Elsewhere(path),
                })
            }
            (None, Some(path)) => Ok(Backend::Checked(path.clone())),
            _ => Err(LoadError::Backend),
        }
    }
}
