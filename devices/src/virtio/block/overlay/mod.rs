//! A disk that is shared by many machines and written by one: a base image that nobody writes, and this machine's own
//! sparse file with what it wrote, the overlay. Between them may lie layers: overlays that were frozen, and are shared
//! like the base.
//!
//! ```text
//!   own file (read and written)  >  layers (frozen overlays)  >  base image
//! ```
//!
//! - **Where a cluster is** tells the bitmap (in the own file?), and if not there, the map (in which layer?): at once,
//!   at any depth.
//! - **A write** goes to the own file, at the cluster's own place. A cluster that is written in part is first copied up
//!   from below. Only then its bit is set.
//! - **A discard** makes a hole in the own file and sets the bits: the clusters read as zeroes, not as the base.
//! - **A flush** puts the data on stable storage, then the bits that are set, then those on stable storage. So a bit is
//!   never on disk without its data, and what a flush has acknowledged survives SIGKILL and a power cut. With
//!   [`Overlay::write_through`], for guests that do not flush, bits are in the host's page cache as soon as data is:
//!   then all survives SIGKILL, and a power cut may lose or mix what was written.
//! - **A freeze** makes the own file a layer and goes on in another.

mod bitmap;
mod chain;
mod error;
mod flush;
mod format;
mod lock;
pub mod maintain;
mod map;
mod open;
mod store;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use lepton_hostio::file::{self, Allocation, Disk};
use lepton_hostio::uring::FileNumber;
use vm_memory::VolatileSlice;

use self::bitmap::Bitmap;
pub(super) use self::bitmap::Sectors as Bits;
pub use self::chain::Chain;
pub use self::error::OverlayError;
pub(super) use self::format::clusters_of;
pub use self::format::{CLUSTER, Geometry, HEADER_SIZE, Header, HeaderError, MAX_LAYERS, State};
use self::map::Map;
use self::store::Store;

/// See the module.
pub struct Overlay {
    own: Store,
    /// Has the lock on it.
    holder: File,
    header: Header,
    chain: Chain,
    map: Map,
    bitmap: Bitmap,
    /// Bits are written as soon as they are set, in no order with the data on disk.
    writes_through: bool,
    /// The own file open for reading only, where its path does not lead to it.
    reader: Option<File>,
    /// A folder whose entry for the own file is not on stable storage.
    folder: Option<File>,
    /// The own files of before freezes since the last flush, and what is missing in their bitmaps.
    pending: Vec<(Store, Bits)>,
}

/// A run of bytes of the disk in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which file, as [`Overlay::files`] counts.
    pub file: FileNumber,
    /// Where in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Overlay {
    /// The own file. Its size is not the disk's.
    pub fn disk(&self) -> &Disk {
        self.own.disk()
    }

    /// What lies below.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The disk's size and what follows from it.
    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// Clusters in the own file, discarded ones too.
    pub fn own_clusters(&self) -> u64 {
        self.bitmap.count()
    }

    /// The own file has no name: it goes with who has it open. `reader` is the same file, opened for reading only, which
    /// [`Overlay::freeze`] needs.
    pub fn set_unnamed(&mut self, reader: File) {
        self.reader = Some(reader);
        self.folder = None;
    }

    /// Whether the own file has no name.
    pub fn is_unnamed(&self) -> bool {
        self.reader.is_some()
    }

    /// From now on, bits are written as soon as they are set.
    pub fn write_through(&mut self) {
        self.writes_through = true;
    }

    /// All files in the order of their numbers: the own one, the base, the layers from the lowest up.
    pub(super) fn files(&self) -> Vec<&File> {
        std::iter::once(self.own.file())
            .chain(self.chain.files())
            .collect()
    }

    /// The file of that number.
    fn file(&self, number: FileNumber) -> io::Result<&File> {
        match number.0.checked_sub(1) {
            None => Ok(self.own.file()),
            Some(layer) => match self.chain.disk(layer) {
                Some(disk) => Ok(disk.file()),
                None => Err(io::ErrorKind::InvalidData.into()),
            },
        }
    }

    /// The first bytes of `range` that are in one file.
    pub(super) fn piece(&mut self, range: Range<u64>) -> io::Result<Piece> {
        let clusters = clusters_of(range.start, range.end.saturating_sub(range.start));
        let (is_own, end) = self.bitmap.run(clusters.start, clusters.end);
        let (file, offset, end) = match is_own {
            true => (0, self.geometry().data(), end),
            false => match self.map.run(clusters.start, end)? {
                (0, end) => (1, 0, end),
                (layer, end) => (layer.saturating_add(1), self.geometry().data(), end),
            },
        };
        let end = end.saturating_mul(CLUSTER).min(range.end);
        Ok(Piece {
            file: FileNumber(file),
            offset: offset.saturating_add(range.start),
            len: end.saturating_sub(range.start),
        })
    }

    /// Where byte `offset` of the disk is in the own file, once [`Overlay::prepare`] was called.
    pub(super) fn own_offset(&self, offset: u64) -> u64 {
        self.geometry().data().saturating_add(offset)
    }

    /// Reads bytes of the disk into `slices`, as many as they have room for, and returns their number: less only where
    /// a file ends too early.
    pub(super) fn read(&mut self, slices: &[VolatileSlice], offset: u64) -> io::Result<u64> {
        let len: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        let end = offset.saturating_add(len);
        let mut at = offset;
        let mut room = Room { slices, skip: 0 };
        while at < end {
            let piece = self.piece(at..end)?;
            let file = self.file(piece.file)?;
            let part = room.take(piece.len);
            let done = file::read_vectored_at(file, &part, piece.offset)? as u64;
            at = at.saturating_add(done);
            if done < piece.len {
                break;
            }
        }
        Ok(at - offset)
    }

    /// Reads bytes of the disk. It has as many.
    pub fn read_bytes(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            let piece = self.piece(at..at.saturating_add(rest.len() as u64))?;
            let (now, later) = std::mem::take(&mut rest).split_at_mut(piece.len as usize);
            self.file(piece.file)?.read_exact_at(now, piece.offset)?;
            at = at.saturating_add(piece.len);
            rest = later;
        }
        Ok(())
    }

    /// Writes bytes of the disk. It has as many.
    pub fn write_bytes(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let len = bytes.len() as u64;
        self.prepare(offset, len)?;
        self.own.write_all(bytes, self.own_offset(offset))?;
        self.written(offset, len)
    }

    /// Gets ready for a write of `len` bytes at `offset`: copies up the clusters at both ends that are not in the own
    /// file and are written in part. Until [`Overlay::written`] nothing of the write can be seen.
    pub(super) fn prepare(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.check_usable()?;
        let end = offset.saturating_add(len);
        let clusters = clusters_of(offset, len);
        let last = clusters.end.saturating_sub(1);
        self.copy_up(clusters.start, offset..end)?;
        if last != clusters.start {
            self.copy_up(last, offset..end)?;
        }
        Ok(())
    }

    /// Copies cluster `cluster` to its place in the own file, unless it is there or all of it is in `written`.
    fn copy_up(&mut self, cluster: u64, written: Range<u64>) -> io::Result<()> {
        let range = self.geometry().cluster(cluster);
        let is_whole = written.start <= range.start && range.end <= written.end;
        if is_whole || self.bitmap.has(cluster) {
            return Ok(());
        }
        let mut buffer = [0; CLUSTER as usize];
        let len = (range.end - range.start) as usize;
        let bytes = buffer.get_mut(..len).unwrap_or_default();
        self.read_bytes(bytes, range.start)?;
        self.own.write_all(bytes, self.own_offset(range.start))
    }

    /// `len` bytes at `offset` are in the own file now.
    pub(super) fn written(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.bitmap.insert(clusters_of(offset, len));
        if self.writes_through {
            self.write_bits_through()?;
        }
        Ok(())
    }

    /// Whether a write there makes clusters the own file's.
    pub(super) fn would_add(&self, offset: u64, len: u64) -> bool {
        !self.bitmap.has_all(clusters_of(offset, len))
    }

    /// Writes `slices` at `offset` of the disk, all of them.
    pub(super) fn write(&mut self, slices: &[VolatileSlice], offset: u64) -> io::Result<u64> {
        let len: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        self.prepare(offset, len)?;
        let done = self.own.write_vectored(slices, self.own_offset(offset))? as u64;
        if done == len {
            self.written(offset, len)?;
        }
        Ok(done)
    }

    /// Makes `len` bytes at `offset` read as zeroes, and gives their room on the host back.
    pub(super) fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.prepare(offset, len)?;
        self.own.deallocate(self.own_offset(offset), len)?;
        self.written(offset, len)
    }

    /// Makes `len` bytes at `offset` zeroes, that way.
    pub(super) fn zero_by(&mut self, what: Allocation, offset: u64, len: u64) -> io::Result<()> {
        if what == Allocation::Deallocate {
            return self.discard(offset, len);
        }
        self.prepare(offset, len)?;
        self.own.zero_range(self.own_offset(offset), len)?;
        self.written(offset, len)
    }

    /// Makes `len` bytes at `offset` zeroes, the way any file can.
    pub(super) fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.prepare(offset, len)?;
        self.own.write_zeroes(self.own_offset(offset), len)?;
        self.written(offset, len)
    }
}

/// Takes slices off the front of others.
struct Room<'a, 'm> {
    slices: &'a [VolatileSlice<'m>],
    /// Bytes of the first that are taken.
    skip: usize,
}

impl<'m> Room<'_, 'm> {
    fn take(&mut self, len: u64) -> smallvec::SmallVec<[VolatileSlice<'m>; 8]> {
        let mut taken = smallvec::SmallVec::new();
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        while let ([first, rest @ ..], true) = (self.slices, left > 0) {
            let here = first.len().saturating_sub(self.skip).min(left);
            if let Ok(part) = first.subslice(self.skip, here)
                && here > 0
            {
                taken.push(part);
            }
            left -= here;
            self.skip += here;
            if self.skip >= first.len() {
                (self.slices, self.skip) = (rest, 0);
            }
        }
        taken
    }
}

#[cfg(test)]
pub(in crate::virtio::block) mod tests;
