//! Where a cluster is that is not in an overlay's own file: one byte per cluster, 0 for the base, else the number of a
//! layer. Pages are read when they are first asked for, and shared by whoever goes on from the same layers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::bitmap::Bitmap;
use super::format::{Geometry, PAGE};

const PAGE_BYTES: usize = PAGE as usize;

type Page = [u8; PAGE_BYTES];

#[derive(Clone)]
enum Slot {
    /// It is in the file, if there is one, and else all zero.
    Unread,
    /// All zero: the base.
    Base,
    Page(Arc<Page>),
}

/// The map over some layers.
#[derive(Clone)]
pub(super) struct Map {
    /// None where there are no layers.
    slots: Vec<Slot>,
    /// A file, and where in it the map starts.
    source: Option<(Arc<File>, u64)>,
    layers: u8,
}

impl Map {
    /// The map where there is only the base.
    pub(super) fn of_base() -> Self {
        Map {
            slots: Vec::new(),
            source: None,
            layers: 0,
        }
    }

    /// The map of `layers` that is in `file` at `offset`. Its bytes are checked when they are read.
    pub(super) fn in_file(geometry: Geometry, layers: u8, file: Arc<File>, offset: u64) -> Self {
        if layers == 0 {
            return Map::of_base();
        }
        Map {
            slots: vec![Slot::Unread; geometry.map_pages() as usize],
            source: Some((file, offset)),
            layers,
        }
    }

    /// The map with one more layer, which has the clusters `has`.
    pub(super) fn with_layer(mut self, geometry: Geometry, has: &Bitmap) -> io::Result<Self> {
        self.slots
            .resize(geometry.map_pages() as usize, Slot::Unread);
        self.layers = self.layers.saturating_add(1);
        for run in has.runs() {
            let mut at = run.start;
            while at < run.end {
                let end = ((at / PAGE + 1) * PAGE).min(run.end);
                self.read(at / PAGE)?;
                let Some(slot) = self.slots.get_mut((at / PAGE) as usize) else {
                    break;
                };
                let mut page = match slot {
                    Slot::Page(page) => page.clone(),
                    _ => Arc::new([0; PAGE_BYTES]),
                };
                let places = (at % PAGE) as usize..((end - 1) % PAGE) as usize + 1;
                if let Some(places) = Arc::make_mut(&mut page).get_mut(places) {
                    places.fill(self.layers);
                }
                *slot = Slot::Page(page);
                at = end;
            }
        }
        Ok(self)
    }

    /// Which layer has cluster `start`, and how far those after it are in the same; at most to `end`.
    pub(super) fn run(&mut self, start: u64, end: u64) -> io::Result<(u8, u64)> {
        if self.slots.is_empty() {
            return Ok((0, end));
        }
        let (layer, mut at) = self.run_in_page(start, end)?;
        while at < end && at.is_multiple_of(PAGE) {
            match self.run_in_page(at, end)? {
                (same, further) if same == layer => at = further,
                _ => break,
            }
        }
        Ok((layer, at))
    }

    fn run_in_page(&mut self, start: u64, end: u64) -> io::Result<(u8, u64)> {
        let end = end.min((start / PAGE + 1) * PAGE);
        self.read(start / PAGE)?;
        let Some(Slot::Page(page)) = self.slots.get((start / PAGE) as usize) else {
            return Ok((0, end));
        };
        let rest = page.get((start % PAGE) as usize..).unwrap_or_default();
        let layer = rest.first().copied().unwrap_or_default();
        let same = rest.iter().take_while(|&&other| other == layer).count();
        Ok((layer, (start + same as u64).min(end)))
    }

    /// Sees to it that page `page` is not unread.
    fn read(&mut self, page: u64) -> io::Result<()> {
        let Some(slot @ Slot::Unread) = self.slots.get_mut(page as usize) else {
            return Ok(());
        };
        *slot = match &self.source {
            None => Slot::Base,
            Some((file, offset)) => {
                let mut bytes = [0; PAGE_BYTES];
                file.read_exact_at(&mut bytes, offset + page * PAGE)?;
                if let Some(wrong) = bytes.iter().find(|&&byte| byte > self.layers) {
                    let layers = self.layers;
                    let text = format!("the map names layer {wrong} of {layers}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                match bytes.iter().all(|&byte| byte == 0) {
                    true => Slot::Base,
                    false => Slot::Page(Arc::new(bytes)),
                }
            }
        };
        Ok(())
    }

    /// Hands each page that is not all zero to `write`, with its place in the map.
    pub(super) fn each_page(
        &mut self,
        mut write: impl FnMut(u64, &Page) -> io::Result<()>,
    ) -> io::Result<()> {
        for page in 0..self.slots.len() as u64 {
            self.read(page)?;
            if let Some(Slot::Page(bytes)) = self.slots.get(page as usize) {
                write(page * PAGE, bytes)?;
            }
        }
        Ok(())
    }
}
