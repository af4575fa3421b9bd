//! Drives that a machine and its copies have in common, and the files in which overlays go on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use lepton_api::types as wire;
use lepton_devices::virtio::block::overlay::{CLUSTER, Chain};
use lepton_devices::virtio::block::{Frozen, Image, Successor};
use lepton_hostio::file::SECTOR_SIZE;

use super::{DeviceConfigError, Devices, lock};

/// What stands for the path of a layer that has none.
const NO_NAME: &str = "(no name)";
/// Names that are tried before all are said to be taken.
const MAX_TRIES: u64 = 1000;

/// What copies need of a drive.
pub struct SharedDrive {
    /// Its id.
    pub drive_id: String,
    /// Its files.
    pub files: SharedFiles,
}

/// The files of a drive, all open for reading only.
pub enum SharedFiles {
    /// An image that nobody writes.
    Raw(File),
    /// An overlay that nobody writes, and what lies below.
    Overlay(Chain, File),
    /// What overlays of the copies' own lie over, and beside which path they are made if they have no name.
    Below(Chain, PathBuf),
}

impl SharedDrive {
    /// The same open files, for others.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(SharedDrive {
            drive_id: self.drive_id.clone(),
            files: match &self.files {
                SharedFiles::Raw(file) => SharedFiles::Raw(file.try_clone()?),
                SharedFiles::Overlay(chain, own) => {
                    SharedFiles::Overlay(chain.clone(), own.try_clone()?)
                }
                SharedFiles::Below(chain, beside) => {
                    SharedFiles::Below(chain.clone(), beside.clone())
                }
            },
        })
    }
}

impl Devices {
    /// Makes a drive something that others can go on from. What was written to an overlay becomes a layer, and the drive
    /// goes on in a new file, which is named after the old one; if that had no name, it has none either, and is made in
    /// `scratch`. The machine stands still.
    pub fn share_drive(
        &mut self,
        id: &str,
        scratch: &Path,
    ) -> Result<SharedDrive, DeviceConfigError> {
        let slot = self.drives.iter_mut().find(|d| d.wire.drive_id == *id);
        let slot = slot.ok_or_else(|| DeviceConfigError::Unknown {
            what: "drive",
            id: id.to_owned(),
        })?;
        let host = |source| DeviceConfigError::Share {
            id: id.to_owned(),
            source,
        };
        let mut device = lock(&slot.device);
        let files = match device.image() {
            Image::Raw(disk) => SharedFiles::Raw(disk.file().try_clone().map_err(host)?),
            Image::Overlay(overlay) if overlay.disk().read_only() => {
                let own = overlay.disk().file().try_clone().map_err(host)?;
                SharedFiles::Overlay(overlay.below(), own)
            }
            Image::Overlay(_) => {
                let overlay = slot.wire.overlay.get_or_insert_default();
                let own = overlay.path.as_deref();
                let unnamed = scratch.join(".lepton-overlay");
                let mut made = None;
                let result = device.freeze(|| {
                    let next = match own {
                        Some(own) => successor(own),
                        None => make_unnamed(&unnamed).map(|(file, reader)| Successor {
                            file,
                            path: unnamed.clone(),
                            reader: Some(reader),
                        }),
                    }?;
                    made = Some(next.path.clone());
                    Ok(next)
                });
                if result.is_err()
                    && let (Some(path), Some(_)) = (&made, own)
                    && device.disk().path() != path
                {
                    // It is nobody's. What cannot be removed is empty.
                    drop(std::fs::remove_file(path));
                }
                let Frozen { chain, next } = result.map_err(|source| DeviceConfigError::Block {
                    id: id.to_owned(),
                    source,
                })?;
                if let Some(next) = next {
                    let next = next.map(|path| path.to_string_lossy().into_owned());
                    let layer = std::mem::replace(&mut overlay.path, next);
                    overlay.layers.push(layer.unwrap_or_else(|| NO_NAME.into()));
                }
                let beside = overlay.path.as_ref().map(|own| beside(own));
                SharedFiles::Below(chain, beside.unwrap_or(unnamed))
            }
        };
        Ok(SharedDrive {
            drive_id: id.to_owned(),
            files,
        })
    }

    /// Adds a drive whose files another process has opened.
    pub fn put_handed_drive(
        &mut self,
        wire: wire::Drive,
        image: Image,
    ) -> Result<(), DeviceConfigError> {
        self.add_drive(wire, Some(image))
    }

    /// What of each drive is this machine's alone.
    pub fn divergence(&self) -> Vec<wire::DriveDivergence> {
        let of = |drive: &super::DriveSlot| {
            let device = lock(&drive.device);
            let image = device.image();
            let all = image.sectors().saturating_mul(SECTOR_SIZE);
            let private = match image {
                Image::Raw(disk) if disk.read_only() => 0,
                Image::Raw(_) => all,
                // The last cluster may be shorter than the others.
                Image::Overlay(overlay) => overlay.own_clusters().saturating_mul(CLUSTER).min(all),
            };
            wire::DriveDivergence {
                drive_id: drive.wire.drive_id.clone(),
                shares: wire::Shares {
                    private_bytes: private,
                    shared_bytes: all - private,
                },
            }
        };
        self.drives.iter().map(of).collect()
    }

    /// A drive with an overlay that goes with this process: nothing of what is written to it can be kept.
    pub fn fleeting_drive(&self) -> Option<&str> {
        let is_fleeting = |drive: &&super::DriveSlot| match lock(&drive.device).image() {
            Image::Raw(_) => false,
            Image::Overlay(overlay) => overlay.is_unnamed(),
        };
        let found = self.drives.iter().find(is_fleeting);
        found.map(|drive| drive.wire.drive_id.as_str())
    }
}

/// Where the overlays without a name are made that belong to copies of the machine that writes `own`.
pub fn beside(own: &str) -> PathBuf {
    format!("{own}.copy").into()
}

/// The file in which goes on what was written to `own`: the same name with the next number behind it.
fn successor(own: &str) -> io::Result<Successor> {
    let number = |text: &str| text.parse::<u64>().ok().filter(|n| n.to_string() == text);
    let (stem, last) = match own.rsplit_once('.') {
        Some((stem, text)) if !stem.is_empty() => match number(text) {
            Some(number) => (stem, number),
            None => (own, 0),
        },
        _ => (own, 0),
    };
    for next in 1..=MAX_TRIES {
        let path = PathBuf::from(format!("{stem}.{}", last.saturating_add(next)));
        match new_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(named(&path, error)),
            Ok(file) => {
                return Ok(Successor {
                    file,
                    path,
                    reader: None,
                });
            }
        }
    }
    Err(io::Error::other(format!(
        "the {MAX_TRIES} names after {own} are taken"
    )))
}

/// A file without a name where `path` is: open for writing, and for reading only. While it is made it has that name, which
/// nobody else uses: a file that is there was left by a process that was killed meanwhile.
pub fn make_unnamed(path: &Path) -> io::Result<(File, File)> {
    let failed = |error| named(path, error);
    let file = match new_file(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            std::fs::remove_file(path).map_err(failed)?;
            new_file(path)
        }
        result => result,
    };
    let file = file.map_err(failed)?;
    let reader = File::open(path);
    std::fs::remove_file(path).map_err(failed)?;
    let reader = reader.map_err(failed)?;
    let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
    match identity(&file)? == identity(&reader)? {
        true => Ok((file, reader)),
        false => Err(named(
            path,
            io::Error::other("somebody else uses that name"),
        )),
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path)
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn successors_count_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let next = |name: &str| {
            let next = successor(path(name).to_str().unwrap()).unwrap();
            next.path.file_name().unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!(next("vm.overlay"), "vm.overlay.1");
        assert_eq!(next("vm.overlay.1"), "vm.overlay.2");
        // A name that is taken is nobody's to take.
        assert_eq!(next("vm.overlay"), "vm.overlay.3");
        assert_eq!(next("vm.007"), "vm.007.1");
        assert_eq!(next("9"), "9.1");
        assert!(successor("/no/such/folder/x").is_err());
    }

    #[test]
    fn a_file_without_a_name_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.copy");
        std::fs::write(&path, "left behind").unwrap();
        let (file, reader) = make_unnamed(&path).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        assert_eq!(reader.metadata().unwrap().len(), 0);
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        io::Write::write_all(&mut &file, b"x").unwrap();
        assert!(io::Write::write_all(&mut &reader, b"x").is_err());
    }
}
