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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::tempfile::TempFile;

    use super::super::format::CLUSTER;
    use super::*;

    /// Three pages of the map and a bit.
    const CLUSTERS: u64 = 3 * PAGE + 100;

    fn range() -> impl Strategy<Value = (u64, u64)> {
        let near = prop_oneof![
            0..CLUSTERS,
            PAGE - 3..PAGE + 3,
            2 * PAGE - 3..2 * PAGE + 3,
            CLUSTERS - 3..CLUSTERS,
        ];
        let len = prop_oneof![1..10u64, 1..2 * PAGE];
        (near, len).prop_map(|(start, len)| (start, (start + len).min(CLUSTERS)))
    }

    /// What a map says, run by run.
    fn said(map: &mut Map) -> Vec<u8> {
        let mut layers = Vec::new();
        while (layers.len() as u64) < CLUSTERS {
            let at = layers.len() as u64;
            let (layer, end) = map.run(at, CLUSTERS).unwrap();
            assert!(at < end && end <= CLUSTERS);
            layers.resize(end as usize, layer);
        }
        layers
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// The model: one number per cluster, over which each layer puts its own.
        #[test]
        fn the_topmost_layer_that_has_a_cluster_has_it(
            layers in prop::collection::vec(prop::collection::vec(range(), 0..5), 0..6),
            asked in prop::collection::vec(range(), 1..20),
        ) {
            let geometry = Geometry::new(CLUSTERS * CLUSTER).unwrap();
            let mut model = vec![0; CLUSTERS as usize];
            let mut map = Map::of_base();
            for (number, ranges) in layers.iter().enumerate() {
                let mut has = Bitmap::new(CLUSTERS);
                for &(start, end) in ranges {
                    has.insert(start..end);
                    model[start as usize..end as usize].fill(number as u8 + 1);
                }
                map = map.with_layer(geometry, &has).unwrap();
            }
            // As it is found in a file, too, and with the file's pages shared or not read yet.
            let file = TempFile::new().unwrap().into_file();
            file.set_len(geometry.map_pages() * PAGE).unwrap();
            map.each_page(|at, page| file.write_all_at(&page[..], at)).unwrap();
            let mut read = Map::in_file(geometry, layers.len() as u8, Arc::new(file), 0);
            prop_assert_eq!(said(&mut map.clone()), &model[..]);
            for (start, end) in asked {
                for map in [&mut map, &mut read] {
                    let (layer, to) = map.run(start, end).unwrap();
                    let same = model[start as usize..end as usize].iter().take_while(|&&other| other == layer);
                    prop_assert!(to > start && to - start == same.count() as u64);
                }
            }
            prop_assert_eq!(said(&mut read), model);
        }

        /// A file may say anything: no number of a layer that is not there comes out of it.
        #[test]
        fn no_layer_is_made_up(bytes in prop::collection::vec(0u8..5, 200), at in 0..4 * PAGE - 200, layers in 0u8..4) {
            let geometry = Geometry::new(CLUSTERS * CLUSTER).unwrap();
            let file = TempFile::new().unwrap().into_file();
            file.set_len(geometry.map_pages() * PAGE).unwrap();
            file.write_all_at(&bytes, at).unwrap();
            let mut map = Map::in_file(geometry, layers, Arc::new(file), 0);
            let mut next = 0;
            while next < CLUSTERS {
                match map.run(next, CLUSTERS) {
                    Ok((layer, end)) => {
                        prop_assert!(layer <= layers && end > next);
                        next = end;
                    }
                    Err(error) => {
                        prop_assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                        next = (next / PAGE + 1) * PAGE;
                    }
                }
            }
        }
    }
}
