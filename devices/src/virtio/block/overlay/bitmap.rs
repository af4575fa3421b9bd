//! Which clusters are in an overlay's own file, in memory: pages that exist once a bit in them is set, and which of
//! their sectors on disk are behind.

use std::ops::Range;

use super::format::{CLUSTERS_PER_BITMAP_PAGE, PAGE};

/// 64-bit words in a page.
const WORDS: usize = PAGE as usize / 8;
/// Bytes of the unit that is written.
pub(super) const SECTOR: usize = 512;
const SECTORS: usize = PAGE as usize / SECTOR;
const WORDS_PER_SECTOR: usize = WORDS / SECTORS;

#[derive(Clone)]
struct Page {
    words: [u64; WORDS],
    /// One bit per sector of the page that has bits which are not on disk.
    dirty: u8,
}

impl Page {
    fn new() -> Box<Self> {
        Box::new(Page {
            words: [0; WORDS],
            dirty: 0,
        })
    }

    fn sector(&self, sector: usize) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        let words = self.words.iter().skip(sector * WORDS_PER_SECTOR);
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Sectors of the bitmap as they were at one moment: each with its number.
pub(in crate::virtio::block) type Sectors = Vec<(u64, [u8; SECTOR])>;

/// A set of clusters.
pub(super) struct Bitmap {
    pages: Vec<Option<Box<Page>>>,
    count: u64,
    is_dirty: bool,
}

impl Bitmap {
    /// The empty set, for a disk of so many clusters.
    pub(super) fn new(clusters: u64) -> Self {
        let pages = clusters.div_ceil(CLUSTERS_PER_BITMAP_PAGE) as usize;
        Bitmap {
            pages: vec![None; pages],
            count: 0,
            is_dirty: false,
        }
    }

    /// Clusters in the set.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether there is something that is not on disk.
    pub(super) fn is_dirty(&self) -> bool {
        self.is_dirty
    }

    /// Takes the page of number `page` from disk. Bits behind the disk's last cluster are forgotten.
    pub(super) fn set_page(&mut self, page: u64, bytes: &[u8; PAGE as usize], clusters: u64) {
        let Some(place) = self.pages.get_mut(page as usize) else {
            return;
        };
        let mut new = Page::new();
        let first = page * CLUSTERS_PER_BITMAP_PAGE;
        for (n, (word, bytes)) in new.words.iter_mut().zip(bytes.chunks_exact(8)).enumerate() {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            let left = clusters.saturating_sub(first + n as u64 * 64);
            *word = u64::from_le_bytes(value) & mask(0, left.min(64));
        }
        let count: u32 = new.words.iter().map(|word| word.count_ones()).sum();
        self.count += u64::from(count);
        *place = (count > 0).then_some(new);
    }

    fn word(&self, word: u64) -> u64 {
        let page = self.pages.get((word / WORDS as u64) as usize);
        match page {
            Some(Some(page)) => page.words[(word % WORDS as u64) as usize],
            _ => 0,
        }
    }

    /// Whether `cluster` is in the set.
    pub(super) fn has(&self, cluster: u64) -> bool {
        self.word(cluster / 64) & (1 << (cluster % 64)) != 0
    }

    /// Whether all of `clusters` are.
    pub(super) fn has_all(&self, clusters: Range<u64>) -> bool {
        clusters.is_empty() || {
            let (is_in, end) = self.run(clusters.start, clusters.end);
            is_in && end == clusters.end
        }
    }

    /// Whether the cluster `start` is in the set, and how far those after it are too, or are not; at most to `end`.
    pub(super) fn run(&self, start: u64, end: u64) -> (bool, u64) {
        let is_in = self.has(start);
        let mut at = start;
        while at < end {
            // Ones where it is otherwise.
            let word = self.word(at / 64) ^ if is_in { u64::MAX } else { 0 };
            let other = (word >> (at % 64)).trailing_zeros();
            if other < 64 {
                at += u64::from(other);
                break;
            }
            at = (at / 64 + 1) * 64;
        }
        (is_in, at.clamp(start, end))
    }

    /// Adds `clusters`.
    pub(super) fn insert(&mut self, clusters: Range<u64>) {
        let mut at = clusters.start;
        while at < clusters.end {
            let end = ((at / 64 + 1) * 64).min(clusters.end);
            let bits = mask(at % 64, end - (at / 64) * 64);
            let word = at / 64;
            let Some(page) = self.pages.get_mut((word / WORDS as u64) as usize) else {
                return;
            };
            let page = page.get_or_insert_with(Page::new);
            let index = (word % WORDS as u64) as usize;
            let new = bits & !page.words[index];
            if new != 0 {
                page.words[index] |= new;
                page.dirty |= 1 << (index / WORDS_PER_SECTOR);
                self.count += u64::from(new.count_ones());
                self.is_dirty = true;
            }
            at = end;
        }
    }

    /// Takes all out, on disk too.
    pub(super) fn clear(&mut self) {
        self.pages.fill_with(|| None);
        self.count = 0;
        self.is_dirty = false;
    }

    /// The sectors that are not on disk, which from now on count as if they were; [`Bitmap::not_written`] takes it
    /// back.
    pub(super) fn take_dirty(&mut self) -> Sectors {
        let mut sectors = Sectors::new();
        if !self.is_dirty {
            return sectors;
        }
        for (number, page) in self.pages.iter_mut().enumerate() {
            let Some(page) = page else { continue };
            for sector in 0..SECTORS {
                if page.dirty & (1 << sector) != 0 {
                    let number = (number * SECTORS + sector) as u64;
                    sectors.push((number, page.sector(sector)));
                }
            }
            page.dirty = 0;
        }
        self.is_dirty = false;
        sectors
    }

    /// These could not be written.
    pub(super) fn not_written(&mut self, sectors: &Sectors) {
        for (number, _) in sectors {
            let page = self.pages.get_mut(*number as usize / SECTORS);
            if let Some(Some(page)) = page {
                page.dirty |= 1 << (*number as usize % SECTORS);
                self.is_dirty = true;
            }
        }
    }

    /// Its runs of clusters, in order.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let all = self.pages.len() as u64 * CLUSTERS_PER_BITMAP_PAGE;
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < all {
                if at.is_multiple_of(CLUSTERS_PER_BITMAP_PAGE)
                    && let Some(None) = self.pages.get((at / CLUSTERS_PER_BITMAP_PAGE) as usize)
                {
                    at += CLUSTERS_PER_BITMAP_PAGE;
                    continue;
                }
                let page_end = (at / CLUSTERS_PER_BITMAP_PAGE + 1) * CLUSTERS_PER_BITMAP_PAGE;
                let (start, (is_in, end)) = (at, self.run(at, page_end));
                at = end;
                if is_in {
                    return Some(start..end);
                }
            }
            None
        })
    }
}

/// The bits from `start` to before `end`, both at most 64.
fn mask(start: u64, end: u64) -> u64 {
    let below = |bit: u64| match bit {
        0..=63 => (1 << bit) - 1,
        _ => u64::MAX,
    };
    below(end) & !below(start)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const CLUSTERS: u64 = 2 * CLUSTERS_PER_BITMAP_PAGE + 100;

    fn range() -> impl Strategy<Value = Range<u64>> {
        // Near the borders of words, sectors and pages.
        let place = prop_oneof![
            0..200u64,
            4000..4200u64,
            CLUSTERS_PER_BITMAP_PAGE - 100..CLUSTERS_PER_BITMAP_PAGE + 100,
            CLUSTERS - 200..CLUSTERS,
        ];
        (place, 1..300u64).prop_map(|(start, len)| start..(start + len).min(CLUSTERS))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_is_a_set(ranges in prop::collection::vec(range(), 0..8), asked in range()) {
            let mut set = Bitmap::new(CLUSTERS);
            let mut model = BTreeSet::new();
            for range in &ranges {
                set.insert(range.clone());
                model.extend(range.clone());
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert!(set.runs().flatten().eq(model.iter().copied()));
            for cluster in asked.clone() {
                prop_assert_eq!(set.has(cluster), model.contains(&cluster));
            }
            prop_assert_eq!(set.has_all(asked.clone()), asked.clone().all(|c| model.contains(&c)));
            let (is_in, end) = set.run(asked.start, asked.end);
            prop_assert!(asked.start < end && end <= asked.end);
            prop_assert!((asked.start..end).all(|c| model.contains(&c) == is_in));
            prop_assert!(end == asked.end || model.contains(&end) != is_in);

            // What is written is the same set.
            let mut pages = vec![[0u8; PAGE as usize]; 3];
            prop_assert_eq!(set.is_dirty(), !model.is_empty());
            let sectors = set.take_dirty();
            prop_assert!(!set.is_dirty() && set.take_dirty().is_empty());
            for (number, bytes) in &sectors {
                let at = *number as usize * SECTOR;
                let page = &mut pages[at / PAGE as usize];
                page[at % PAGE as usize..][..SECTOR].copy_from_slice(bytes);
            }
            let mut again = Bitmap::new(CLUSTERS);
            for (number, page) in pages.iter().enumerate() {
                again.set_page(number as u64, page, CLUSTERS);
            }
            prop_assert!(again.runs().flatten().eq(model.iter().copied()));
            prop_assert_eq!(again.count(), set.count());
            set.not_written(&sectors);
            prop_assert_eq!(set.take_dirty(), sectors);
        }
    }

    #[test]
    fn bits_behind_the_end_are_not_believed() {
        let mut set = Bitmap::new(70);
        set.set_page(0, &[0xff; PAGE as usize], 70);
        set.set_page(1, &[0xff; PAGE as usize], 70);
        assert_eq!(set.count(), 70);
        assert!(set.runs().eq(std::iter::once(0..70)));
    }

    #[test]
    fn only_new_bits_are_to_be_written() {
        let mut set = Bitmap::new(CLUSTERS);
        set.insert(0..8);
        assert_eq!(set.take_dirty().len(), 1);
        set.insert(2..5);
        assert!(!set.is_dirty());
        set.insert(7..9);
        assert_eq!(set.take_dirty()[0].1[..2], [0xff, 1]);
        set.clear();
        assert_eq!((set.count(), set.has(0), set.is_dirty()), (0, false, false));
    }
}
