//! What lies below an overlay: the base and the layers. Nothing of it is ever written here, so any number of machines
//! share it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lepton_hostio::file::{Disk, SECTOR_SIZE, disk_of, open_disk};

use super::bitmap::Bitmap;
use super::error::OverlayError;
use super::format::{
    CLUSTERS_PER_BITMAP_PAGE, Changed, Geometry, HEADER_SIZE, Header, MAX_LAYERS, OverlayId, PAGE,
    State,
};
use super::lock;
use super::map::Map;

/// A base and the layers over it, open for reading. A copy of it costs little and shares the open files.
#[derive(Clone)]
pub struct Chain {
    geometry: Geometry,
    base_changed: Changed,
    base: Lower,
    layers: Vec<Layer>,
    /// Where a cluster is, once that was asked for.
    map: Option<Map>,
}

#[derive(Clone)]
struct Layer {
    file: Lower,
    header: Header,
}

/// A file below.
#[derive(Clone)]
struct Lower {
    disk: Arc<Disk>,
    /// Whether all that was written to it is known to be on stable storage.
    is_synced: Arc<AtomicBool>,
}

impl Lower {
    fn new(disk: Disk, is_synced: bool) -> Self {
        Lower {
            disk: Arc::new(disk),
            is_synced: Arc::new(AtomicBool::new(is_synced)),
        }
    }
}

impl Chain {
    /// Opens a base and the layers over it, the lowest first. Each layer must be one, and be the next over the one
    /// before it.
    pub fn open<P: AsRef<Path>>(base: &Path, layers: &[P]) -> Result<Self, OverlayError> {
        let base = open_disk(base, true)?;
        let layers: Result<_, _> = layers
            .iter()
            .map(|path| open_disk(path.as_ref(), true))
            .collect();
        Self::of(base, layers?, None)
    }

    /// As [`Chain::open`], of files that were opened elsewhere, as [`Chain::files`] gives them. `map`: what
    /// [`Chain::write_map`] has written, without which the layers are asked for where a cluster is.
    pub fn of_files(
        base: File,
        layers: Vec<File>,
        map: Option<File>,
    ) -> Result<Self, OverlayError> {
        let handed = |what: &str, file| disk_of(file, Path::new(what), true);
        let layers: Result<_, _> = layers
            .into_iter()
            .enumerate()
            .map(|(n, file)| handed(&format!("layer {}", n + 1), file))
            .collect();
        Self::of(handed("base", base)?, layers?, map)
    }

    fn of(base: Disk, layers: Vec<Disk>, map: Option<File>) -> Result<Self, OverlayError> {
        let path = base.path().to_owned();
        let geometry = Geometry::new(base.sectors() * SECTOR_SIZE)
            .ok_or(OverlayError::BaseSize(path.clone()))?;
        if layers.len() > MAX_LAYERS {
            return Err(OverlayError::TooManyLayers(layers.len()));
        }
        lock::shared(base.file(), &path)?;
        let mut chain = Chain {
            geometry,
            base_changed: changed(&base).map_err(|e| OverlayError::io(&path, e))?,
            // What is in it before a guest uses it is its maker's business.
            base: Lower::new(base, true),
            layers: Vec::new(),
            map: None,
        };
        for disk in layers {
            let header = read_header(&disk)?;
            let path = disk.path().to_owned();
            if header.state != State::Layer {
                return Err(OverlayError::NotALayer(path));
            }
            lock::shared(disk.file(), &path)?;
            chain.check(&header, &path)?;
            let file = Lower::new(disk, false);
            chain.layers.push(Layer { file, header });
        }
        chain.map = map.map(|file| {
            let count = chain.layers.len() as u8;
            Map::in_file(geometry, count, Arc::new(file), 0)
        });
        Ok(chain)
    }

    /// Whether an overlay with this header belongs right above.
    pub(super) fn check(&self, header: &Header, path: &Path) -> Result<(), OverlayError> {
        let path = path.to_owned();
        if header.geometry != self.geometry {
            return Err(OverlayError::Size {
                path,
                bytes: header.geometry.size(),
                base: self.geometry.size(),
            });
        }
        if usize::from(header.layers) != self.layers.len() {
            return Err(OverlayError::LayerCount {
                path,
                wanted: header.layers,
                given: self.layers.len(),
            });
        }
        if header.below != self.top_id() {
            return Err(OverlayError::OtherLayer(path));
        }
        if header.base_changed != self.base_changed && header.state != State::Committing {
            return Err(OverlayError::BaseChanged {
                path,
                base: self.base.disk.path().to_owned(),
            });
        }
        Ok(())
    }

    fn top_id(&self) -> OverlayId {
        self.layers
            .last()
            .map_or(OverlayId::default(), |layer| layer.header.id)
    }

    /// The header of a new overlay right above.
    pub(super) fn header_above(&self, id: OverlayId) -> Header {
        Header {
            state: State::Own,
            geometry: self.geometry,
            id,
            layers: self.layers.len() as u8,
            below: self.top_id(),
            base_changed: self.base_changed,
            has_map: false,
        }
    }

    /// The disk's size and what follows from it.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The base, then the layers from the lowest up: the files that a process needs which goes on from here.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        self.lowers().map(|lower| lower.disk.file())
    }

    fn lowers(&self) -> impl Iterator<Item = &Lower> {
        std::iter::once(&self.base).chain(self.layers.iter().map(|layer| &layer.file))
    }

    /// Puts on stable storage what machines wrote to layers before they were layers.
    pub(super) fn sync(&self) -> io::Result<()> {
        for lower in self.lowers() {
            if !lower.is_synced.load(Ordering::Relaxed) {
                lower.disk.file().sync_data()?;
                lower.is_synced.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    pub(super) fn base(&self) -> &Disk {
        &self.base.disk
    }

    /// The file of layer `number`, the lowest is 1, or of the base, which is 0.
    pub(super) fn disk(&self, number: u8) -> Option<&Disk> {
        match usize::from(number).checked_sub(1) {
            None => Some(self.base()),
            Some(index) => self.layers.get(index).map(|layer| layer.file.disk.as_ref()),
        }
    }

    /// Writes where each cluster is to `map`, an empty file such as a memfd, for [`Chain::of_files`]. The time it takes
    /// grows with the parts of the disk that layers have.
    pub fn write_map(&mut self, map: &File) -> io::Result<()> {
        let mut here = self.map()?;
        map.set_len(self.geometry.map_pages() * PAGE)?;
        here.each_page(|offset, page| map.write_all_at(page, offset))?;
        self.map = Some(here);
        Ok(())
    }

    /// Where each cluster is: from the highest layer that has a map, and the bitmaps of those from it up.
    pub(super) fn map(&self) -> io::Result<Map> {
        if let Some(map) = &self.map {
            return Ok(map.clone());
        }
        let first = self.layers.iter().rposition(|layer| layer.header.has_map);
        let mut map = match first.and_then(|n| Some((n, self.layers.get(n)?))) {
            None => Map::of_base(),
            Some((n, layer)) => {
                let file = Arc::new(layer.file.disk.file().try_clone()?);
                Map::in_file(self.geometry, n as u8, file, self.geometry.map().start)
            }
        };
        for layer in self.layers.iter().skip(first.unwrap_or(0)) {
            let has = read_bitmap(layer.file.disk.file(), self.geometry)?;
            map = map.with_layer(self.geometry, &has)?;
        }
        Ok(map)
    }

    /// All that was written to the topmost layer is on stable storage.
    pub(super) fn top_is_synced(&self) {
        if let Some(layer) = self.layers.last() {
            layer.file.is_synced.store(true, Ordering::Relaxed);
        }
    }

    /// Lets the topmost layer be read by many and written by none.
    pub(super) fn lock_top(&self) -> Result<(), OverlayError> {
        match self.layers.last() {
            Some(layer) => lock::shared(layer.file.disk.file(), layer.file.disk.path()),
            None => Ok(()),
        }
    }

    /// Where each cluster is, has to be found out anew.
    pub(super) fn forget_map(&mut self) {
        self.map = None;
    }

    /// Where each cluster is, if somebody knows.
    pub(super) fn set_map(&mut self, map: Map) {
        self.map = Some(map);
    }

    /// The chain with `disk` on it, whose clusters are those of `has`.
    pub(super) fn with_layer(
        mut self,
        disk: Disk,
        header: Header,
        map: Map,
        has: &Bitmap,
    ) -> io::Result<Self> {
        self.map = Some(map.with_layer(self.geometry, has)?);
        let file = Lower::new(disk, false);
        self.layers.push(Layer { file, header });
        Ok(self)
    }
}

/// When `disk` was last changed.
pub(super) fn changed(disk: &Disk) -> io::Result<Changed> {
    let metadata = disk.file().metadata()?;
    match metadata.is_file() {
        true => Ok(metadata.modified()?.into()),
        false => Ok(Changed::default()),
    }
}

/// The header of an overlay file that is whole.
pub(super) fn read_header(disk: &Disk) -> Result<Header, OverlayError> {
    let mut bytes = [0; HEADER_SIZE];
    disk.file()
        .read_exact_at(&mut bytes, 0)
        .map_err(|e| OverlayError::io(disk.path(), e))?;
    let header = Header::try_from(&bytes).map_err(|source| OverlayError::Header {
        path: disk.path().to_owned(),
        source,
    })?;
    let wanted = header.geometry.file();
    match disk.sectors() * SECTOR_SIZE {
        found if found == wanted => Ok(header),
        found => Err(OverlayError::Length {
            path: disk.path().to_owned(),
            found,
            wanted,
        }),
    }
}

/// The clusters that an overlay file says it has.
pub(super) fn read_bitmap(file: &File, geometry: Geometry) -> io::Result<Bitmap> {
    let clusters = geometry.clusters();
    let mut bitmap = Bitmap::new(clusters);
    for page in 0..clusters.div_ceil(CLUSTERS_PER_BITMAP_PAGE) {
        let mut bytes = [0; PAGE as usize];
        file.read_exact_at(&mut bytes, geometry.bitmap().start + page * PAGE)?;
        bitmap.set_page(page, &bytes, clusters);
    }
    Ok(bitmap)
}
