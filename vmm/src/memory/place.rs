//! Addresses for the memory of a machine that is yet to come.
//!
//! KVM has its slots there ahead, and nothing is mapped. Where something were, the host's kernel would have to tell KVM that it goes
//! when the machine's memory comes, and KVM would look at each page of the slot: 60 us for 128 MiB, in which a copy of a machine could
//! have been running.
#![allow(unsafe_code)] // munmap of addresses that are ours

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lepton_api::types::HugePages;
use lepton_devices::Memory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::base::{Base, Places, map_zeroes};
use super::{MemoryError, MemorySize, allocate, bytes, protect};

/// Where nothing is mapped yet.
#[derive(Clone)]
pub struct Place(Arc<Memory>);

impl Place {
    /// Finds some for memory of this size, without huge pages.
    pub fn find(size: MemorySize) -> Result<Self, MemoryError> {
        let above = Addresses::take();
        let memory = allocate(size, HugePages::None)?;
        if above.is_some() {
            for region in memory.iter() {
                // SAFETY: the mapping is the region's, and nobody knows of it. When the region goes it unmaps what is there by
                // then: nothing, or what `fill` has mapped. Nothing else comes there, see `Addresses`.
                unsafe { libc::munmap(region.as_ptr().cast(), region.len() as usize) };
            }
        }
        Ok(Place(memory))
    }

    /// The addresses. There may be nothing to read or write.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.0
    }

    /// Whether it is for such a memory.
    pub fn suits(&self, size: MemorySize, huge_pages: HugePages) -> bool {
        huge_pages == HugePages::None && bytes(&self.0) == size.bytes()
    }

    /// Empty memory here.
    pub fn clear(self) -> Result<Arc<Memory>, MemoryError> {
        for part in Places::new(&self.0).all() {
            // SAFETY: the addresses are kept for guest memory, to which there are no references.
            let cleared = unsafe { map_zeroes(part.host, part.bytes) };
            cleared.map_err(|source| MemoryError::Map {
                bytes: part.bytes,
                reason: source.to_string(),
            })?;
        }
        protect(&self.0, HugePages::None);
        Ok(self.0)
    }

    /// Maps `base` here, which is as large.
    pub fn fill(self, base: &Base) -> Result<Arc<Memory>, MemoryError> {
        let memory = match base.has_gaps() {
            true => self.clear()?,
            false => self.0,
        };
        let bytes = base.bytes();
        let mapped = base.map(&memory, None);
        mapped.map_err(|source| MemoryError::Map {
            bytes,
            reason: source.to_string(),
        })?;
        Ok(memory)
    }
}

/// Very many addresses. What is mapped while they are taken comes below them; once they are free again the kernel, which begins
/// at the top, has room there for all that this process will ever map.
struct Addresses {
    start: *mut libc::c_void,
    bytes: usize,
}

impl Addresses {
    /// None if the kernel does not give so many: a process has 128 TiB, which is enough for a few dozen places.
    fn take() -> Option<Self> {
        const TIB: usize = 1 << 40;
        /// How many were taken. Each time more are, by more than a guest has memory: two places are not to be one.
        static TAKEN: AtomicUsize = AtomicUsize::new(0);
        let taken = TAKEN.fetch_add(1, Ordering::Relaxed).min(64);
        let bytes = (8 + 2 * taken) * TIB;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: new addresses, that nobody has yet.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        (start != libc::MAP_FAILED).then_some(Addresses { start, bytes })
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        // SAFETY: they are this value's, and there is nothing to be read or written.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::base;
    use std::fs;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const MIB: u64 = 1 << 20;

    fn place(mib: u64) -> Place {
        Place::find(MemorySize::new(mib, HugePages::None).unwrap()).unwrap()
    }

    /// Whether something is mapped in the first region of `memory`.
    fn is_mapped(memory: &Memory) -> bool {
        let region = memory.iter().next().unwrap();
        let (start, end) = (
            region.as_ptr() as usize,
            region.as_ptr() as usize + region.len() as usize,
        );
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().any(|line| {
            let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let address = |digits| usize::from_str_radix(digits, 16).unwrap();
            address(from) < end && start < address(to)
        })
    }

    #[test]
    fn nothing_is_mapped_and_nothing_comes_there() {
        let place = place(64);
        assert!(!is_mapped(place.memory()));
        let _next = self::place(64);
        let others: Vec<_> = (0..100)
            .map(|_| {
                allocate(
                    MemorySize::new(64, HugePages::None).unwrap(),
                    HugePages::None,
                )
            })
            .collect();
        assert!(!is_mapped(place.memory()));
        assert!(others.iter().all(Result::is_ok));
    }

    #[test]
    fn what_is_in_no_file_is_zero() {
        let file = base::new_file(4096 * MIB).unwrap();
        file.write_all_at(&7u64.to_le_bytes(), 8 * MIB).unwrap();
        file.write_all_at(&9u64.to_le_bytes(), 4000 * MIB).unwrap();
        base::seal(&file).unwrap();
        let runs = [(8 * MIB, 4096), (4000 * MIB, 4096)];
        let base = Base::zero(4096 * MIB).with(file, &runs);
        let memory = place(4096).fill(&base).unwrap();
        let behind_hole =
            4000 * MIB - crate::arch::x86_64::layout::HOLE + crate::arch::x86_64::layout::HOLE_END;
        for (at, value) in [(0, 0u64), (8 * MIB, 7), (9 * MIB, 0), (behind_hole, 9)] {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), value);
        }
        memory.write_obj(1u64, GuestAddress(9 * MIB)).unwrap();
    }

    #[test]
    fn it_is_unmapped_with_its_memory() {
        let file = base::new_file(64 * MIB).unwrap();
        base::seal(&file).unwrap();
        let base = Base::whole(file, 64 * MIB);
        let memory = place(64).fill(&base).unwrap();
        let start = memory.iter().next().unwrap().as_ptr() as usize;
        drop(memory);
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.contains(&format!("{start:x}-")));
    }
}
