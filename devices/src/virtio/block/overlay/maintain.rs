//! What is done to overlays that no machine uses: by people, from the command line.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use lepton_hostio::file::{Disk, SECTOR_SIZE, open_disk};

use super::chain::{Chain, changed, read_bitmap, read_header};
use super::error::OverlayError;
use super::format::{CLUSTER, Header, OverlayId, State};
use super::{Overlay, lock};

/// Bytes moved at once.
const PART: u64 = 1 << 20;

/// Told how much of the work is done, in bytes, and how much there is in all.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// What an overlay file says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Its header.
    pub header: Header,
    /// Clusters in it, discarded ones too.
    pub clusters: u64,
    /// Bytes that the file takes on the host.
    pub room: u64,
}

/// What the overlay at `path` says of itself. It may be in use.
pub fn info(path: &Path) -> Result<Info, OverlayError> {
    use std::os::unix::fs::MetadataExt;
    let disk = open_disk(path, true)?;
    let failed = |source| OverlayError::io(path, source);
    let header = read_header(&disk)?;
    let clusters = match header.state {
        State::Resetting => 0,
        State::Own | State::Layer | State::Committing => {
            let bitmap = read_bitmap(disk.file(), header.geometry);
            bitmap.map_err(failed)?.count()
        }
    };
    let blocks = disk.file().metadata().map_err(failed)?.blocks();
    Ok(Info {
        header,
        clusters,
        room: blocks.saturating_mul(SECTOR_SIZE),
    })
}

/// Makes the overlay at `path`, which is not used, a layer: never to be written again.
pub fn freeze(path: &Path) -> Result<(), OverlayError> {
    let (file, header) = locked(path)?;
    match header.state {
        State::Own => {}
        State::Layer => return Ok(()),
        State::Resetting | State::Committing => return Err(OverlayError::Committing(path.into())),
    }
    let header = Header {
        state: State::Layer,
        ..header
    };
    file.sync_data()
        .and_then(|()| write_header(&file, &header))
        .map_err(|source| OverlayError::io(path, source))
}

/// Checks that all of the overlay at `path` over `chain` can be read, and that every layer has what the map says.
/// Returns how many clusters the overlay has, and the base and each layer below it have.
pub fn check(
    mut chain: Chain,
    path: &Path,
    progress: Progress,
) -> Result<(u64, Vec<u64>), OverlayError> {
    let failed = |source| OverlayError::io(path, source);
    let mut below = Vec::new();
    for layer in 1..=chain.layers() as u8 {
        let disk = chain
            .disk(layer)
            .ok_or(OverlayError::NotALayer(path.into()))?;
        let bitmap = read_bitmap(disk.file(), chain.geometry());
        below.push(bitmap.map_err(|source| OverlayError::io(disk.path(), source))?);
    }
    // What is open here is only read.
    chain.forget_map();
    let mut overlay = Overlay::open(chain, path, true)?;
    let all = overlay.geometry().clusters();
    let mut counts = vec![0u64; below.len() + 1];
    let mut at = 0;
    while at < all {
        let (is_own, end) = overlay.bitmap.run(at, all);
        if is_own {
            at = end;
            continue;
        }
        let (layer, end) = overlay.map.run(at, end).map_err(failed)?;
        let has = match usize::from(layer).checked_sub(1) {
            None => true,
            Some(index) => below.get(index).is_some_and(|has| has.has_all(at..end)),
        };
        if !has {
            return Err(OverlayError::Map {
                path: path.into(),
                cluster: at,
                layer,
            });
        }
        if let Some(count) = counts.get_mut(usize::from(layer)) {
            *count += end - at;
        }
        at = end;
    }
    let size = overlay.geometry().size();
    let mut buffer = vec![0; PART as usize];
    let mut at = 0;
    while at < size {
        let len = PART.min(size - at);
        let part = buffer.get_mut(..len as usize).unwrap_or_default();
        overlay.read_bytes(part, at).map_err(failed)?;
        at += len;
        progress(at, size);
    }
    Ok((overlay.own_clusters(), counts))
}

/// Writes what the overlay at `path` has into its base and empties the overlay. Nobody else may use either. Other
/// overlays over the base mean nothing after that. If it is interrupted, it has to be done again before either is used.
pub fn commit(base: &Path, path: &Path, progress: Progress) -> Result<u64, OverlayError> {
    let (file, header) = locked(path)?;
    if header.layers > 0 {
        return Err(OverlayError::HasLayers(path.into()));
    }
    let failed = |source| OverlayError::io(path, source);
    let to_base = |source| OverlayError::io(base, source);
    match header.state {
        State::Own => {}
        // Begun before: the base has changed since then, by that.
        State::Committing => {}
        State::Resetting => return Err(OverlayError::Committing(path.into())),
        State::Layer => return Err(OverlayError::IsALayer(path.into())),
    }
    let target = open_disk(base, true)?;
    let base_file = OpenOptions::new().write(true).open(base).map_err(to_base)?;
    lock::exclusive(&base_file, base)?;
    let as_it_was = Header {
        state: State::Committing,
        ..header
    };
    check_base(&header, &target, path)?;
    let geometry = header.geometry;
    let bitmap = read_bitmap(&file, geometry).map_err(failed)?;
    file.sync_data()
        .and_then(|()| write_header(&file, &as_it_was))
        .map_err(failed)?;
    let all = bitmap.count() * CLUSTER;
    let mut done = 0;
    let mut buffer = vec![0; PART as usize];
    for run in bitmap.runs() {
        let mut at = run.start * CLUSTER;
        let end = (run.end * CLUSTER).min(geometry.size());
        while at < end {
            let len = PART.min(end - at);
            let part = buffer.get_mut(..len as usize).unwrap_or_default();
            file.read_exact_at(part, geometry.data() + at)
                .map_err(failed)?;
            base_file.write_all_at(part, at).map_err(to_base)?;
            at += len;
            done += len;
            progress(done.min(all), all);
        }
    }
    base_file.sync_all().map_err(to_base)?;
    // From here on the overlay is an empty one over the new base; that is finished when it is next opened.
    let emptied = Header {
        state: State::Resetting,
        base_changed: changed(&target).map_err(to_base)?,
        ..header
    };
    write_header(&file, &emptied).map_err(failed)?;
    // Closed, so that they can be had anew.
    drop((file, base_file));
    Overlay::open(Chain::open::<&Path>(base, &[])?, path, false)?;
    Ok(bitmap.count())
}

/// Lays the overlay at `path` over the image `onto` instead of over `chain`: what is different there is copied up, so
/// that the disk stays what it was. Returns how many clusters that are. If it is interrupted, the overlay lies over the
/// old chain as before.
pub fn rebase(
    chain: Chain,
    path: &Path,
    onto: &Path,
    progress: Progress,
) -> Result<u64, OverlayError> {
    let below = Chain::open::<&Path>(onto, &[])?;
    if below.geometry() != chain.geometry() {
        return Err(OverlayError::Size {
            path: path.into(),
            bytes: chain.geometry().size(),
            base: below.geometry().size(),
        });
    }
    let mut overlay = Overlay::open(chain, path, false)?;
    let failed = |source| OverlayError::io(path, source);
    let size = overlay.geometry().size();
    let (mut here, mut there) = (vec![0; CLUSTER as usize], vec![0; CLUSTER as usize]);
    let mut copied = 0;
    for cluster in 0..overlay.geometry().clusters() {
        let range = overlay.geometry().cluster(cluster);
        if overlay.bitmap.has(cluster) {
            continue;
        }
        let len = (range.end - range.start) as usize;
        let (Some(here), Some(there)) = (here.get_mut(..len), there.get_mut(..len)) else {
            break;
        };
        overlay.read_bytes(here, range.start).map_err(failed)?;
        below
            .base()
            .file()
            .read_exact_at(there, range.start)
            .map_err(|source| OverlayError::io(onto, source))?;
        if here != there {
            overlay.write_bytes(here, range.start).map_err(failed)?;
            copied += 1;
        }
        progress(range.end, size);
    }
    overlay.flush().map_err(failed)?;
    let header = below.header_above(overlay.header.id);
    write_header(overlay.disk().file(), &header).map_err(failed)?;
    Ok(copied)
}

/// Lets the overlay at `path` lie over `base`, of which somebody says that it has the content that it had when the
/// overlay was made: a copy, or one whose time of last change was lost.
pub fn same_content(base: &Path, path: &Path) -> Result<(), OverlayError> {
    let (file, header) = locked(path)?;
    let disk = open_disk(base, true)?;
    lock::shared(disk.file(), base)?;
    let header = Header {
        base_changed: changed(&disk).map_err(|source| OverlayError::io(base, source))?,
        ..header
    };
    check_base(&header, &disk, path)?;
    write_header(&file, &header).map_err(|source| OverlayError::io(path, source))
}

/// Opens an overlay that nobody uses.
fn locked(path: &Path) -> Result<(File, Header), OverlayError> {
    let header = read_header(&open_disk(path, true)?)?;
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).open(path);
    let file = file.map_err(|source| OverlayError::io(path, source))?;
    lock::exclusive(&file, path)?;
    Ok((file, header))
}

fn check_base(header: &Header, base: &Disk, path: &Path) -> Result<(), OverlayError> {
    let found = base.sectors() * SECTOR_SIZE;
    if found != header.geometry.size() {
        return Err(OverlayError::Size {
            path: path.into(),
            bytes: header.geometry.size(),
            base: found,
        });
    }
    let time = changed(base).map_err(|source| OverlayError::io(base.path(), source))?;
    if header.state != State::Committing && time != header.base_changed {
        return Err(OverlayError::BaseChanged {
            path: path.into(),
            base: base.path().to_owned(),
        });
    }
    Ok(())
}

fn write_header(file: &File, header: &Header) -> std::io::Result<()> {
    file.write_all_at(&header.to_bytes(), 0)?;
    file.sync_data()
}

/// An overlay's name as people see it.
pub fn name(id: &OverlayId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}
