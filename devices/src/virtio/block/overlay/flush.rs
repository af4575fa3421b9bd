//! Making durable what was written, in the order that a crash at any moment needs; emptying; freezing.

use std::fs::File;
use std::io;
use std::mem;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lepton_hostio::file::{Disk, disk_of, open_disk};

use super::Overlay;
use super::bitmap::{SECTOR, Sectors};
use super::chain::Chain;
use super::error::OverlayError;
use super::format::{Geometry, MAX_LAYERS, State};
use super::lock;
use super::store::Store;

impl Overlay {
    /// Whether something that was written would be lost with this process, and need not be.
    pub fn is_behind(&self) -> bool {
        !self.is_unnamed() && (self.bitmap.is_dirty() || !self.pending.is_empty())
    }

    /// Puts on stable storage what was written before.
    ///
    /// An own file without a name is gone with this process, whatever was flushed.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.is_unnamed() {
            return Ok(());
        }
        let bits = self.begin_flush()?;
        let result = self.own.sync().and_then(|()| self.write_bits(&bits));
        match result {
            Ok(false) => Ok(()),
            Ok(true) => {
                let result = self.own.sync();
                self.end_flush(bits, result)
            }
            Err(error) => self.end_flush(bits, Err(error)),
        }
    }

    /// The first step of a flush: what has to be done once only, and what the bitmap has to say once the data that
    /// was written before now is on stable storage. The next step is that the caller puts it there.
    pub(in crate::virtio::block) fn begin_flush(&mut self) -> io::Result<Sectors> {
        if self.disk().read_only() {
            return Ok(Sectors::new());
        }
        self.check_usable()?;
        self.finish_layers()?;
        self.chain.sync()?;
        self.write_map()?;
        Ok(self.bitmap.take_dirty())
    }

    /// The third step: writes the bits. True: they have to be put on stable storage too, and that is the last step.
    pub(in crate::virtio::block) fn write_bits(&mut self, bits: &Sectors) -> io::Result<bool> {
        let mut again = !bits.is_empty();
        write_sectors(&self.own, self.header.geometry, bits)?;
        if self.header.layers > 0 && !self.header.has_map && !self.disk().read_only() {
            // The map was written in the first step, and is on stable storage since the second.
            self.header.has_map = true;
            self.own.write_all(&self.header.to_bytes(), 0)?;
            again = true;
        }
        if let Some(folder) = self.folder.take() {
            folder.sync_all()?;
        }
        Ok(again)
    }

    /// After the last step, or one that failed.
    pub(in crate::virtio::block) fn end_flush(
        &mut self,
        bits: Sectors,
        result: io::Result<()>,
    ) -> io::Result<()> {
        if result.is_err() {
            self.bitmap.not_written(&bits);
        }
        result
    }

    /// Writes the bits that are not written, in no order with the data. For guests that do not flush.
    pub(super) fn write_bits_through(&mut self) -> io::Result<()> {
        if !self.bitmap.is_dirty() {
            return Ok(());
        }
        self.write_map()?;
        let bits = self.bitmap.take_dirty();
        let result = self.write_bits(&bits).map(drop);
        self.end_flush(bits, result)
    }

    /// Writes the map, if there is one and it is not in the file.
    fn write_map(&mut self) -> io::Result<()> {
        if self.header.layers == 0 || self.header.has_map {
            return Ok(());
        }
        let at = self.header.geometry.map().start;
        let own = &self.own;
        self.map
            .each_page(|offset, page| own.write_all(page, at + offset))
    }

    /// Puts on stable storage the own files of before the freezes, and then into their bitmaps what those lack.
    fn finish_layers(&mut self) -> io::Result<()> {
        while let Some((layer, bits)) = self.pending.first() {
            layer.sync()?;
            write_sectors(layer, self.header.geometry, bits)?;
            layer.sync()?;
            self.pending.remove(0);
            if self.pending.is_empty() {
                self.chain.top_is_synced();
            }
        }
        Ok(())
    }

    /// Throws away all that was written, and gives its room on the host back. Nothing may be in flight. If it is
    /// interrupted, it is finished when the overlay is next opened.
    pub fn reset(&mut self) -> io::Result<()> {
        self.set_state(State::Resetting)?;
        self.bitmap.clear();
        let geometry = self.header.geometry;
        let bitmap = geometry.bitmap();
        let len = bitmap.end - bitmap.start;
        match self.disk().can_deallocate() {
            true => {
                self.own.deallocate(bitmap.start, len)?;
                self.own.deallocate(geometry.data(), geometry.size())?;
            }
            // What stays behind no bit leads to.
            false => self.own.write_zeroes(bitmap.start, len)?,
        }
        self.own.sync()?;
        self.set_state(State::Own)
    }

    /// Changes what the file is, on stable storage.
    pub(super) fn set_state(&mut self, state: State) -> io::Result<()> {
        self.header.state = state;
        self.own.write_all(&self.header.to_bytes(), 0)?;
        self.own.sync()
    }

    /// The own file open for reading only: those who share it as a layer must not have a descriptor by which they could
    /// write it.
    fn reader(&self) -> Result<Disk, OverlayError> {
        let path = self.disk().path();
        let reader = match &self.reader {
            Some(file) => {
                let file = file.try_clone().map_err(|e| OverlayError::io(path, e))?;
                disk_of(file, path, true)?
            }
            None => open_disk(path, true)?,
        };
        // The path may lead elsewhere by now.
        let identity = |disk: &Disk| -> Result<_, OverlayError> {
            let metadata = disk.file().metadata();
            let metadata = metadata.map_err(|e| OverlayError::io(path, e))?;
            Ok((metadata.dev(), metadata.ino()))
        };
        match identity(&reader)? == identity(self.disk())? {
            true => Ok(reader),
            false => Err(OverlayError::Moved(path.to_owned())),
        }
    }

    /// Nothing can be written any more, because who has the file open does so by an old descriptor.
    pub(in crate::virtio::block) fn break_off(&mut self) {
        self.header.state = State::Layer;
    }

    /// Whether it was emptied to the end, if that was begun.
    pub(super) fn check_usable(&self) -> io::Result<()> {
        match self.header.state {
            State::Own => Ok(()),
            State::Resetting | State::Layer | State::Committing => {
                Err(io::Error::other("the overlay was not emptied to the end"))
            }
        }
    }

    /// What lies below, with what is known of where clusters are.
    pub fn below(&self) -> Chain {
        let mut chain = self.chain.clone();
        chain.set_map(self.map.clone());
        chain
    }

    /// Freezes what was written so far: the own file becomes a layer, which is never written again, and this overlay
    /// goes on in `next`, an empty file. Returns what any number of other machines can go on from, each in an empty
    /// file of its own: in this process by [`Overlay::make`], in another one from the files of the chain
    /// ([`Chain::files`], [`Chain::write_map`], [`Chain::of_files`]). Nothing may be in flight.
    ///
    /// It takes a time that grows with what was written since the last freeze, and writes no data. If nothing was, no
    /// layer is made, and `next` stays empty. What the guest has flushed is on stable storage as before; what it
    /// flushes next includes what the layer has. On an error the overlay is as it was.
    pub fn freeze(&mut self, next: File, path: &Path) -> Result<Chain, OverlayError> {
        let own = self.disk().path().to_owned();
        let failed = |source| OverlayError::io(&own, source);
        if self.bitmap.count() == 0 {
            return Ok(self.below());
        }
        if self.chain.layers() >= MAX_LAYERS {
            return Err(OverlayError::TooManyLayers(self.chain.layers() + 1));
        }
        let layer = self.reader()?;
        let mut header = self.header;
        header.state = State::Layer;
        let chain = self.chain.clone();
        let chain = chain
            .with_layer(layer, header, self.map.clone(), &self.bitmap)
            .map_err(failed)?;
        let mut next = Overlay::make(chain.clone(), next, path)?;
        next.writes_through = self.writes_through;
        // From here on nobody writes it, so its lock is one that its readers share.
        lock::shared(&self.holder, &own)?;
        chain.lock_top()?;
        self.own.write_all(&header.to_bytes(), 0).map_err(failed)?;
        let bits = self.bitmap.take_dirty();
        let before = mem::replace(self, next);
        if before.reader.is_none() {
            self.pending = before.pending;
            self.pending.push((before.own, bits));
        }
        Ok(chain)
    }
}

/// Writes sectors of the bitmap, neighbours together.
fn write_sectors(own: &Store, geometry: Geometry, sectors: &Sectors) -> io::Result<()> {
    let mut at = 0;
    while let Some((first, _)) = sectors.get(at) {
        let mut bytes = Vec::with_capacity(SECTOR);
        while let Some((number, sector)) = sectors.get(at)
            && *number == first + (bytes.len() / SECTOR) as u64
        {
            bytes.extend_from_slice(sector);
            at += 1;
        }
        own.write_all(&bytes, geometry.bitmap().start + first * SECTOR as u64)?;
    }
    Ok(())
}
