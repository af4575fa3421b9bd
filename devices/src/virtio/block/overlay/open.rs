//! Making an overlay file and opening one.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use lepton_hostio::file::{Disk, disk_of, open_disk};

use super::chain::{Chain, read_bitmap, read_header};
use super::error::OverlayError;
use super::format::{HEADER_SIZE, OverlayId, State};
use super::lock;
use super::map::Map;
use super::store::Store;
use super::{Bitmap, Overlay};

impl Overlay {
    /// Opens the overlay at `path` over `chain`, or makes it there if there is no file or an empty one. A read-only one
    /// must be there.
    pub fn open(chain: Chain, path: &Path, read_only: bool) -> Result<Self, OverlayError> {
        let failed = |source| OverlayError::io(path, source);
        if !read_only {
            let mut new = OpenOptions::new();
            new.read(true).write(true).create_new(true).mode(0o600);
            match new.open(path) {
                Ok(file) => return Self::make(chain, file, path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let is_new = |length| length == 0 || length == HEADER_SIZE as u64;
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() {
            return Err(OverlayError::NotAFile(path.to_owned()));
        }
        if !read_only && is_new(metadata.len()) {
            let file = OpenOptions::new().read(true).write(true).open(path);
            return Self::make(chain, file.map_err(failed)?, path);
        }
        let disk = open_disk(path, read_only)?;
        let holder = lock::holder(disk.file(), path).map_err(failed)?;
        match read_only {
            true => lock::shared(&holder, path)?,
            false => lock::exclusive(&holder, path)?,
        }
        Self::of_disk(chain, disk, holder)
    }

    /// Makes an overlay in `file`, which is empty, or was being made when that was interrupted. `path` is where it is,
    /// or what messages call it.
    pub fn make(chain: Chain, file: File, path: &Path) -> Result<Self, OverlayError> {
        let failed = |source| OverlayError::io(path, source);
        let holder = lock::holder(&file, path).map_err(failed)?;
        lock::exclusive(&holder, path)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.len() > HEADER_SIZE as u64 {
            // Somebody else made it between two looks at it.
            let disk = disk_of(file, path, false)?;
            return Self::of_disk(chain, disk, holder);
        }
        let header = chain.header_above(new_id(&metadata));
        // The length last: a file that has it has all.
        file.write_all_at(&header.to_bytes(), 0).map_err(failed)?;
        file.set_len(chain.geometry().file()).map_err(failed)?;
        let disk = disk_of(file, path, false)?;
        // So that not only what is in it, but also its name survives what the first flush is to survive.
        let folder = File::open(folder_of(path)).ok();
        Ok(Overlay {
            map: chain.map().map_err(failed)?,
            bitmap: Bitmap::new(chain.geometry().clusters()),
            header,
            folder,
            writes_through: false,
            reader: None,
            pending: Vec::new(),
            own: Store::new(disk),
            holder,
            chain,
        })
    }

    /// The overlay that is open as `file`, for reading only. `path` is what messages call it.
    pub fn of_file(chain: Chain, file: File, path: &Path) -> Result<Self, OverlayError> {
        let failed = |source| OverlayError::io(path, source);
        let holder = file.try_clone().map_err(failed)?;
        lock::shared(&holder, path)?;
        Self::of_disk(chain, disk_of(file, path, true)?, holder)
    }

    fn of_disk(chain: Chain, disk: Disk, holder: File) -> Result<Self, OverlayError> {
        let path = disk.path().to_owned();
        let failed = |source| OverlayError::io(&path, source);
        let header = read_header(&disk)?;
        chain.check(&header, &path)?;
        match header.state {
            State::Own | State::Resetting => {}
            // Nobody writes it: then it may be seen by itself.
            State::Layer if disk.read_only() => {}
            State::Layer => return Err(OverlayError::IsALayer(path)),
            State::Committing => return Err(OverlayError::Committing(path)),
        }
        let geometry = header.geometry;
        let map = match header.has_map {
            true => {
                let file = disk.file().try_clone().map_err(failed)?.into();
                Map::in_file(geometry, header.layers, file, geometry.map().start)
            }
            false => chain.map().map_err(failed)?,
        };
        let is_reset = header.state == State::Resetting;
        let mut overlay = Overlay {
            bitmap: match is_reset {
                true => Bitmap::new(geometry.clusters()),
                false => read_bitmap(disk.file(), geometry).map_err(failed)?,
            },
            map,
            header,
            folder: None,
            writes_through: false,
            reader: None,
            pending: Vec::new(),
            own: Store::new(disk),
            holder,
            chain,
        };
        if is_reset && !overlay.disk().read_only() {
            overlay.reset().map_err(failed)?;
        }
        Ok(overlay)
    }
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The time and the file's number: no other overlay has both. It tells files apart and is no secret.
fn new_id(file: &Metadata) -> OverlayId {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanoseconds = since.map_or(0, |since| since.as_nanos()) as u64;
    let number = u128::from(nanoseconds) << 64 | u128::from(file.ino());
    // Zero is no name.
    number.max(1).to_be_bytes()
}
