//! Which pages of guest memory devices have written, for snapshots that hold only what changed. What vCPUs write, KVM
//! knows.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::Memory;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

struct Region {
    start: u64,
    len: u64,
    /// Number of its first page among all pages of memory.
    first: u64,
}

/// One bit per page of guest memory, region after region. Set by devices on any thread.
pub struct DirtyPages {
    regions: Vec<Region>,
    bits: Vec<AtomicU64>,
}

impl DirtyPages {
    /// No page of `memory` is dirty.
    pub fn new(memory: &Memory) -> Self {
        let mut regions = Vec::new();
        let mut first = 0;
        for region in memory.iter() {
            let (start, len) = (region.start_addr().0, region.len());
            regions.push(Region { start, len, first });
            first += len / PAGE;
        }
        let words = usize::try_from(first.div_ceil(64)).unwrap_or(0);
        DirtyPages {
            regions,
            bits: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Says that any of the `len` bytes at guest physical address `addr` may be written. Bytes outside memory are
    /// nobody's.
    pub fn mark(&self, addr: u64, len: u64) {
        let end = addr.saturating_add(len);
        for region in &self.regions {
            let from = addr.max(region.start);
            let to = end.min(region.start + region.len);
            if from >= to {
                continue;
            }
            let first = region.first + (from - region.start) / PAGE;
            let last = region.first + (to - 1 - region.start) / PAGE;
            for page in first..=last {
                if let Some(word) = self.bits.get((page / 64) as usize) {
                    word.fetch_or(1 << (page % 64), Ordering::Relaxed);
                }
            }
        }
    }

    /// The pages marked since the last call, one bit each. Devices are at rest.
    pub fn take(&self) -> Vec<u64> {
        let take = |word: &AtomicU64| word.swap(0, Ordering::SeqCst);
        self.bits.iter().map(take).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn pages_are_marked_in_all_regions_and_taken_once() {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 20), 1 << 20)];
        let pages = DirtyPages::new(&Memory::from_ranges(&ranges).unwrap());
        pages.mark(4095, 2);
        pages.mark((1 << 20) - 1, 3 << 20);
        pages.mark((4 << 20) + 4096, 1);
        pages.mark(u64::MAX - 1, 100);
        pages.mark(2 << 20, 4096);
        pages.mark(0x5000, 0);
        let taken = pages.take();
        assert_eq!(taken[0], 0b11);
        assert_eq!(taken[3], 1 << 63);
        assert_eq!(taken[4], 0b10);
        assert_eq!(taken.iter().map(|w| w.count_ones()).sum::<u32>(), 4);
        assert!(pages.take().iter().all(|word| *word == 0));
    }
}
