//! The drives of a machine on their way to a copy: descriptors, open for reading only but for the file that only the copy
//! writes.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use lepton_api::types::{CloneChild, CloneMachine, Drive};
use lepton_devices::virtio::block::Image;
use lepton_devices::virtio::block::overlay::{Chain, MAX_LAYERS, Overlay, OverlayError};
use lepton_hostio::file::{DiskOpenError, disk_of};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::hand_over::CloneError;
use crate::config::devices::sharing::{SharedDrive, SharedFiles, make_unnamed};
use crate::config::saved::HandedImage;
use crate::memory::base;

/// A drive whose files come as descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedDrive {
    /// Its id.
    pub drive_id: String,
    /// What the next descriptors are.
    pub kind: HandedKind,
}

/// The descriptors of a drive, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HandedKind {
    /// A raw image.
    Raw,
    /// An overlay that nobody writes: base, layers from the lowest up, where each cluster is (if there are layers), own file.
    ReadOnly {
        /// Number of layers.
        layers: u8,
    },
    /// As before, but without an own file: the copy makes that at `path`.
    Named {
        /// Number of layers.
        layers: u8,
        /// As the copy sees it.
        path: String,
    },
    /// The own file, empty, and the same for reading only.
    Unnamed {
        /// Number of layers.
        layers: u8,
    },
}

/// Checks what a request says of drives. Returns those that copies get from here.
pub fn wanted<'a>(
    request: &CloneMachine,
    drives: impl Iterator<Item = &'a Drive>,
) -> Result<Vec<String>, CloneError> {
    let drives: Vec<&Drive> = drives.collect();
    let has_own = |drive: &&Drive| drive.overlay.is_some() && drive.is_read_only != Some(true);
    for child in &request.children {
        for place in &child.overlays {
            let id = &place.drive_id;
            if !drives
                .iter()
                .filter(|d| has_own(d))
                .any(|d| d.drive_id == *id)
            {
                return Err(CloneError::NoOverlay(id.clone()));
            }
            if is_elsewhere(child, id) {
                return Err(CloneError::Elsewhere(id.clone()));
            }
        }
    }
    let here = drives.into_iter().filter(|drive| {
        let mut children = request.children.iter();
        !children.all(|child| is_elsewhere(child, &drive.drive_id))
    });
    let here: Vec<&Drive> = here.collect();
    let writable = here
        .iter()
        .find(|drive| drive.overlay.is_none() && drive.is_read_only != Some(true));
    match writable {
        Some(drive) => Err(CloneError::Writable(drive.drive_id.clone())),
        None => Ok(here.iter().map(|drive| drive.drive_id.clone()).collect()),
    }
}

fn is_elsewhere(child: &CloneChild, id: &str) -> bool {
    let mut elsewhere = child.drive_overrides.iter();
    elsewhere.any(|other| other.drive_id == *id)
}

/// Drives that stand still, to be given to copies.
pub struct Drives {
    shared: Vec<(SharedDrive, Option<File>)>,
}

impl Drives {
    /// Finds out where each cluster of overlays is, once for all copies.
    pub fn new(shared: Vec<SharedDrive>) -> Result<Self, CloneError> {
        let with_map = |mut drive: SharedDrive| {
            let map = match &mut drive.files {
                SharedFiles::Overlay(chain, _) | SharedFiles::Below(chain, _)
                    if chain.layers() > 0 =>
                {
                    let map = base::new_file(0)?;
                    chain.write_map(&map)?;
                    base::seal(&map)?;
                    Some(map)
                }
                _ => None,
            };
            Ok((drive, map))
        };
        let shared: io::Result<_> = shared.into_iter().map(with_map).collect();
        Ok(Drives { shared: shared? })
    }

    /// What one copy gets, which wants some overlays at paths of its own, and has drives elsewhere.
    pub fn parcel(&self, wants: &Wants) -> Result<Parcel<'_>, CloneError> {
        let mut parcel = Parcel::default();
        for (drive, map) in &self.shared {
            let id = &drive.drive_id;
            if wants.elsewhere.contains(id) {
                continue;
            }
            let kind = match &drive.files {
                SharedFiles::Raw(file) => {
                    parcel.files.push(Part::Shared(file.as_fd()));
                    HandedKind::Raw
                }
                SharedFiles::Overlay(chain, own) => {
                    let layers = parcel.add_chain(chain, map);
                    parcel.files.push(Part::Shared(own.as_fd()));
                    HandedKind::ReadOnly { layers }
                }
                SharedFiles::Below(chain, beside) => {
                    let layers = parcel.add_chain(chain, map);
                    match wants.overlays.iter().find(|(wanted, _)| wanted == id) {
                        Some((_, path)) => HandedKind::Named {
                            layers,
                            path: path.clone(),
                        },
                        None => {
                            let made = make_unnamed(beside);
                            let (file, reader) = made.map_err(|source| CloneError::NoRoom {
                                drive: id.clone(),
                                source,
                            })?;
                            parcel.files.push(Part::Own(file));
                            parcel.files.push(Part::Own(reader));
                            HandedKind::Unnamed { layers }
                        }
                    }
                }
            };
            parcel.drives.push(HandedDrive {
                drive_id: id.clone(),
                kind,
            });
        }
        Ok(parcel)
    }
}

/// What a copy says of drives.
pub struct Wants {
    /// Drives that it opens itself.
    pub elsewhere: Vec<String>,
    /// Drives and where it keeps what it writes to them.
    pub overlays: Vec<(String, String)>,
}

impl From<&CloneChild> for Wants {
    fn from(child: &CloneChild) -> Self {
        let elsewhere = child.drive_overrides.iter();
        let overlays = child.overlays.iter();
        Wants {
            elsewhere: elsewhere.map(|drive| drive.drive_id.clone()).collect(),
            overlays: overlays
                .map(|place| (place.drive_id.clone(), place.path.clone()))
                .collect(),
        }
    }
}

enum Part<'a> {
    Shared(BorrowedFd<'a>),
    Own(File),
}

/// Drives and their descriptors.
#[derive(Default)]
pub struct Parcel<'a> {
    /// What they are.
    pub drives: Vec<HandedDrive>,
    files: Vec<Part<'a>>,
}

impl<'a> Parcel<'a> {
    fn add_chain(&mut self, chain: &'a Chain, map: &'a Option<File>) -> u8 {
        let files = chain.files().chain(map);
        self.files
            .extend(files.map(|file| Part::Shared(file.as_fd())));
        chain.layers() as u8
    }

    /// The descriptors.
    pub fn files(&self) -> Vec<BorrowedFd<'_>> {
        let files = self.files.iter().map(|part| match part {
            Part::Shared(file) => *file,
            Part::Own(file) => file.as_fd(),
        });
        files.collect()
    }
}

/// Why what came is no drive.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum HandedError {
    #[error("a descriptor is missing")]
    Missing,
    #[error("{0} layers are more than {MAX_LAYERS}")]
    Layers(u8),
    #[error("what many share can be written to")]
    Writable,
    #[error(transparent)]
    Disk(#[from] DiskOpenError),
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

/// Files that were made, and are removed again unless they are kept.
#[derive(Default)]
pub struct NewFiles(Vec<PathBuf>);

impl NewFiles {
    /// They stay.
    pub fn keep(&mut self) {
        self.0.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = std::fs::remove_file(path) {
                log::warn!("{} cannot be removed: {error}", path.display());
            }
        }
    }
}

impl HandedDrive {
    /// Takes its descriptors off the front of `files`. `new` learns of a file that is made.
    pub fn take(
        self,
        files: &mut impl Iterator<Item = OwnedFd>,
        new: &mut NewFiles,
    ) -> Result<HandedImage, HandedError> {
        let mut files = Files(files);
        let mut path = None;
        let image = match self.kind {
            HandedKind::Raw => disk_of(files.shared()?, Path::new("its image"), true)?.into(),
            HandedKind::ReadOnly { layers } => {
                let chain = files.chain(layers)?;
                Overlay::of_file(chain, files.shared()?, Path::new("its overlay"))?.into()
            }
            HandedKind::Named { layers, path: own } => {
                let chain = files.chain(layers)?;
                let overlay = open_new(chain, Path::new(&own), new)?;
                path = Some(own);
                overlay.into()
            }
            HandedKind::Unnamed { layers } => {
                let chain = files.chain(layers)?;
                let own = files.next()?;
                let reader = files.shared()?;
                let mut overlay = Overlay::make(chain, own, Path::new("its overlay"))?;
                overlay.set_unnamed(reader);
                Image::from(overlay)
            }
        };
        Ok(HandedImage {
            drive_id: self.drive_id,
            image,
            path,
        })
    }
}

/// An overlay that has nothing yet. One that is there was left by a copy that there was not to be.
fn open_new(chain: Chain, path: &Path, new: &mut NewFiles) -> Result<Overlay, OverlayError> {
    let is_there = path.exists();
    let overlay = Overlay::open(chain, path, false)?;
    if overlay.own_clusters() > 0 {
        return Err(OverlayError::Exists(path.to_owned()));
    }
    if !is_there {
        new.0.push(path.to_owned());
    }
    Ok(overlay)
}

struct Files<'a, I>(&'a mut I);

impl<I: Iterator<Item = OwnedFd>> Files<'_, I> {
    fn next(&mut self) -> Result<File, HandedError> {
        self.0.next().map(File::from).ok_or(HandedError::Missing)
    }

    /// A file that others have too.
    fn shared(&mut self) -> Result<File, HandedError> {
        let file = self.next()?;
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
        match flags & OFlags::ACCMODE == OFlags::RDONLY {
            true => Ok(file),
            false => Err(HandedError::Writable),
        }
    }

    fn chain(&mut self, layers: u8) -> Result<Chain, HandedError> {
        if usize::from(layers) > MAX_LAYERS {
            return Err(HandedError::Layers(layers));
        }
        let base = self.shared()?;
        let above: Result<_, _> = (0..layers).map(|_| self.shared()).collect();
        let above = above?;
        let map = match layers {
            0 => None,
            _ => Some(self.next()?),
        };
        Ok(Chain::of_files(base, above, map)?)
    }
}
