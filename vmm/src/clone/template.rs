//! A saved machine that is kept to be cloned: its state and its memory are in this process, and nothing of it runs.
//!
//! What copies get is what they get of a machine that runs, by the same words. There is no KVM in it, no tap and no
//! socket: each copy has its own.

use std::io;
use std::path::{Path, PathBuf};

use lepton_api::types::{CloneMachine, Drive};
use lepton_devices::virtio::block::overlay::maintain;
use lepton_devices::virtio::block::overlay::{Chain, Overlay, OverlayError};
use lepton_hostio::file::{DiskOpenError, open_disk};

use super::drives::wanted;
use super::hand_over::{CloneError, HandOver};
use super::heirs::Named;
use crate::config::Configuration;
use crate::config::devices::sharing::{SharedDrive, SharedFiles, beside};
use crate::config::saved::{SavedDrive, SavedOverlay};
use crate::machine::state::MachineState;
use crate::memory::base::Base;
use crate::memory::freeze::Frozen;
use crate::reach::Reach;
use crate::snapshot::{LoadError, Saved};

/// Why a saved machine is no template.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum TemplateError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("drive {id}: {source}")]
    Disk { id: String, source: DiskOpenError },
    #[error("drive {id}: {source}")]
    Overlay { id: String, source: OverlayError },
    #[error("drive {id}: {source}")]
    Host { id: String, source: io::Error },
}

/// A saved machine of which copies are made.
pub struct Template {
    state: MachineState,
    memory: Base,
    drives: Vec<SharedDrive>,
}

impl Template {
    /// Reads a machine from its state file and its memory file, and checks all of it. Opens its drives, but those that
    /// copies cannot have in common; an overlay that is its own becomes a layer, which nobody can write any more. The
    /// configuration is that of a machine like it, without devices.
    pub fn open(state: &Path, memory: &Path) -> Result<(Self, Configuration), TemplateError> {
        let saved = Saved::open(state)?;
        let (mut state, memory, configuration) = saved.keep(memory)?;
        let mut drives = Vec::new();
        for drive in &mut state.config.drives {
            drives.extend(open(drive)?);
        }
        let template = Template {
            state,
            memory,
            drives,
        };
        Ok((template, configuration))
    }

    /// Leaves in `reach` what is to be opened when copies are made.
    pub fn reach(&self, reach: &mut Reach) {
        for drive in &self.drives {
            if let SharedFiles::Below(_, beside) = &drive.files {
                reach.overlay(beside);
            }
        }
    }

    /// Refuses what can be refused. The rest is for a thread of its own.
    pub fn hand_over(&self, request: &CloneMachine) -> Result<HandOver, CloneError> {
        let configured: Vec<Drive> = self.state.config.drives.iter().map(Drive::from).collect();
        let wanted = wanted(request, configured.iter())?;
        let named = Named::of(request)?;
        let links = named.connect()?;
        let heirs = named.with(links);
        let drives = self.drives.iter();
        let drives: io::Result<_> = drives
            .filter(|drive| wanted.contains(&drive.drive_id))
            .map(SharedDrive::try_clone)
            .collect();
        log::info!("template cloned for {} processes", heirs.count());
        Ok(HandOver {
            heirs,
            state: self.state.clone(),
            memory: Frozen {
                base: self.memory.clone(),
                copied: 0,
                leftovers: Vec::new(),
            },
            drives: drives?,
            // Perhaps it has, and perhaps on another processor.
            has_run_here: false,
            track_dirty_pages: false,
        })
    }
}

/// Opens a drive for reading only. None: it is an image that its guest writes, and each copy needs another.
fn open(drive: &mut SavedDrive) -> Result<Option<SharedDrive>, TemplateError> {
    let SavedDrive {
        drive_id,
        path_on_host,
        is_read_only,
        overlay,
        ..
    } = drive;
    let id = || drive_id.clone();
    let of_overlay = |source| TemplateError::Overlay { id: id(), source };
    let base = Path::new(&*path_on_host);
    let files = match overlay {
        None if !*is_read_only => return Ok(None),
        None => {
            let disk = open_disk(base, true);
            let disk = disk.map_err(|source| TemplateError::Disk { id: id(), source })?;
            let file = disk.file().try_clone();
            SharedFiles::Raw(file.map_err(|source| TemplateError::Host { id: id(), source })?)
        }
        Some(SavedOverlay { path, layers }) if *is_read_only => {
            let chain = Chain::open(base, layers).map_err(of_overlay)?;
            let own = Overlay::open(chain, Path::new(path), true).map_err(of_overlay)?;
            let file = own.disk().file().try_clone();
            let file = file.map_err(|source| TemplateError::Host { id: id(), source })?;
            SharedFiles::Overlay(own.below(), file)
        }
        Some(SavedOverlay { path, layers }) => {
            let own = PathBuf::from(&*path);
            let beside = beside(path);
            // From here on it is as if the machine had been cloned before.
            layers.push(std::mem::take(path));
            let chain = match Chain::open(base, layers) {
                Err(OverlayError::NotALayer(path)) if path == own => {
                    maintain::freeze(&own).and_then(|()| Chain::open(base, layers))
                }
                // Templates and copies that are there have it, too.
                opened => opened,
            };
            SharedFiles::Below(chain.map_err(of_overlay)?, beside)
        }
    };
    let drive_id = id();
    Ok(Some(SharedDrive { drive_id, files }))
}
