//! Guest memory: mapped, given to KVM, and handed to the devices.
#![allow(unsafe_code)] // madvise on the mapping

pub mod base;
pub mod file;
pub mod freeze;
pub mod image;
pub mod pager;
pub mod place;
pub mod present;
pub mod private;
pub mod small_pages;
pub mod userfault;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, OnceLock};

use lepton_api::types::HugePages;
use lepton_devices::Memory;
use lepton_devices::dirty::DirtyPages;
use lepton_snapshot::Leaves;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use self::base::{Base, Sharing};
use self::pager::{Paging, Source};
use self::private::{Count, Shares};
use self::userfault::Userfault;
use crate::arch::x86_64::layout;
use crate::arch::x86_64::paging::Fetch;

const MIB: u64 = 1 << 20;
/// Largest guest in MiB: 1 TiB. A host may be smaller, which [`allocate`] checks.
pub const MAX_MIB: u64 = 1 << 20;

/// A size a guest can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize {
    bytes: u64,
}

impl MemorySize {
    /// `mib` MiB, 1 to [`MAX_MIB`]; with 2 MiB pages an even number.
    pub fn new(mib: u64, huge_pages: HugePages) -> Result<Self, MemoryError> {
        if mib == 0 || mib > MAX_MIB {
            return Err(MemoryError::Size { mib });
        }
        if huge_pages == HugePages::Hugetlbfs2M && !mib.is_multiple_of(2) {
            return Err(MemoryError::Odd { mib });
        }
        Ok(MemorySize { bytes: mib * MIB })
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.bytes
    }
}

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is 0 or absurd.
    #[error("mem_size_mib {mib} is not between 1 and {MAX_MIB}")]
    Size {
        /// As asked for.
        mib: u64,
    },
    /// The size is no whole number of huge pages.
    #[error("mem_size_mib {mib} is odd, and huge_pages is 2M")]
    Odd {
        /// As asked for.
        mib: u64,
    },
    /// More than the host has. Refused by us: KVM would first fill the host with its own tables for it.
    #[error(
        "mem_size_mib {mib} is more than the {host_mib} MiB of memory and swap that this host has"
    )]
    Host {
        /// As asked for.
        mib: u64,
        /// What there is.
        host_mib: u64,
    },
    /// The host has not enough huge pages reserved.
    #[error(
        "huge_pages 2M: cannot map {bytes} bytes of guest memory: {reason}; reserve huge pages by \
         /proc/sys/vm/nr_hugepages"
    )]
    HugePages {
        /// Bytes of the region that failed.
        bytes: u64,
        /// The host's reason.
        reason: String,
    },
    /// The host refused.
    #[error("cannot map {bytes} bytes of guest memory: {reason}")]
    Map {
        /// Bytes of the region that failed.
        bytes: u64,
        /// The host's reason.
        reason: String,
    },
}

/// What untouched memory holds.
pub enum Origin {
    /// Zeroes.
    Zeroes,
    /// What is at its place in a memory file.
    File(Mutex<Source>),
    /// What another process gives, to which the descriptor was handed.
    Elsewhere(Userfault),
    /// What is in this file, which is all of memory: nothing is this process's alone.
    Shared(File),
    /// What machines have in common that were cloned from each other. What was written since is this process's alone.
    Base(Base),
}

/// A machine's memory, and where it comes from.
pub struct Ram {
    /// The memory, as KVM and the devices have it.
    pub memory: Arc<Memory>,
    /// What it holds where nobody has touched it.
    pub origin: Origin,
    /// What was written since the last snapshot, if a record is kept.
    pub tracking: Option<Tracking>,
    /// The hashes of the last snapshot that this process wrote.
    pub last: Option<Leaves>,
    /// What tells which pages are there.
    pub pagemap: Option<File>,
    /// What fills it when it is touched.
    pager: Option<Paging>,
    /// Whether parts of [`Origin::Shared`] may be this process's alone already.
    is_parting: bool,
}

/// The record of written pages.
pub struct Tracking {
    /// What devices write.
    pub devices: Arc<DirtyPages>,
    /// What was asked of KVM and of the devices and is not in a snapshot yet: one bit per page, region after region.
    pub pending: Vec<u64>,
}

impl Ram {
    /// Memory that no snapshot was made of.
    pub fn new(memory: Arc<Memory>, origin: Origin) -> Self {
        Ram {
            memory,
            origin,
            tracking: None,
            last: None,
            pagemap: present::open(),
            pager: None,
            is_parting: false,
        }
    }

    /// Keeps a record of written pages from now on.
    #[must_use]
    pub fn tracked(mut self, on: bool) -> Self {
        self.tracking = on.then(|| Tracking {
            devices: Arc::new(DirtyPages::new(&self.memory)),
            pending: Vec::new(),
        });
        self
    }

    /// Bytes of memory.
    pub fn memory_bytes(&self) -> u64 {
        bytes(&self.memory)
    }

    /// What is to be counted to know how much of memory is this process's alone, and how much it has in common with
    /// others. None where the host does not tell, for want of /proc. The machine may run.
    pub fn count(&self) -> io::Result<Count> {
        let base = match &self.origin {
            Origin::Shared(file) => {
                // All that is there, in units of 512 bytes.
                let private = file.metadata()?.blocks().saturating_mul(512);
                return Ok(Count::Known(Some(Shares { private, shared: 0 })));
            }
            Origin::Base(base) => base.clone(),
            Origin::Zeroes | Origin::File(_) | Origin::Elsewhere(_) => {
                Base::zero(self.memory_bytes())
            }
        };
        Ok(match &self.pagemap {
            Some(pagemap) => Count::Pages {
                memory: self.memory.clone(),
                base,
                pagemap: pagemap.try_clone()?,
            },
            None => Count::Known(None),
        })
    }

    /// What every mapping of memory gets: also one that has taken the place of another.
    pub fn protect(&self) {
        for region in self.memory.iter() {
            // Secrets of the guest do not belong in the VMM's core dump.
            advise(region, libc::MADV_DONTDUMP);
        }
    }

    /// Puts `bytes` into memory, at a place below the hole for devices that nobody has touched yet. They lie in one chunk of
    /// 64 KiB.
    pub fn put(&self, at: GuestAddress, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        if let Some(pager) = &self.pager {
            // To touch it would be to wait for it.
            pager.lay_over(at.0, bytes, self.dirty());
            return Ok(());
        }
        self.memory.write_slice(bytes, at)?;
        if let Some(dirty) = self.dirty() {
            dirty.mark(at.0, bytes.len() as u64);
        }
        Ok(())
    }

    /// Has memory that comes from a file filled when it is touched, from now on: to be called before it is. What the processor needs
    /// for `fetch` is filled in at once.
    pub fn serve(&mut self, fetch: Option<Fetch>) -> io::Result<()> {
        match &mut self.pager {
            Some(pager) => pager.begin(fetch),
            None => Ok(()),
        }
    }

    /// Where devices note what they write.
    pub fn dirty(&self) -> Option<Arc<DirtyPages>> {
        Some(self.tracking.as_ref()?.devices.clone())
    }
}

/// Bytes of memory.
pub fn bytes(memory: &Memory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

/// Maps guest memory. Pages cost nothing until the guest touches them.
pub fn allocate(size: MemorySize, huge_pages: HugePages) -> Result<Arc<Memory>, MemoryError> {
    check_host(size)?;
    let huge = huge_pages == HugePages::Hugetlbfs2M;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let flags = flags
        | match huge {
            // Reserved now: a guest that touches a page there is none for would kill the VMM by SIGBUS.
            true => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            false => libc::MAP_NORESERVE,
        };
    map(size, huge_pages, flags)
}

/// The same in a file, which is the second result, so that it need not be copied to stand still (see [`freeze`]).
/// `huge_pages` is not `2M`.
pub fn allocate_shared(
    size: MemorySize,
    huge_pages: HugePages,
) -> Result<(Arc<Memory>, File), MemoryError> {
    check_host(size)?;
    let fail = |reason: std::io::Error| MemoryError::Map {
        bytes: size.bytes,
        reason: reason.to_string(),
    };
    let file = base::new_file(size.bytes).map_err(fail)?;
    // The host kernel lays large anonymous mappings on 2 MiB boundaries, and those of files not: page tables are moved
    // whole only from one boundary to another.
    let memory = allocate(size, huge_pages)?;
    base::map_file(&memory, &file, Sharing::Shared).map_err(fail)?;
    protect(&memory, huge_pages);
    Ok((memory, file))
}

fn check_host(size: MemorySize) -> Result<(), MemoryError> {
    let host = host_bytes();
    if size.bytes > host {
        return Err(MemoryError::Host {
            mib: size.bytes / MIB,
            host_mib: host / MIB,
        });
    }
    Ok(())
}

fn map(
    size: MemorySize,
    huge_pages: HugePages,
    flags: libc::c_int,
) -> Result<Arc<Memory>, MemoryError> {
    let huge = huge_pages == HugePages::Hugetlbfs2M;
    let mut regions = Vec::new();
    for (start, bytes) in layout::ram(size.bytes) {
        let fail = |reason: String| match huge {
            true => MemoryError::HugePages { bytes, reason },
            false => MemoryError::Map { bytes, reason },
        };
        let build = |length| {
            let builder = MmapRegionBuilder::new_with_bitmap(length, ())
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags)
                .with_hugetlbfs(huge);
            builder.build().map_err(|e| fail(e.to_string()))
        };
        let length = usize::try_from(bytes).map_err(|e| fail(e.to_string()))?;
        let mapping = aligned(length, build)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| fail("its end overflows".into()))?;
        regions.push(region);
    }
    let memory = Memory::from_regions(regions).map_err(|e| MemoryError::Map {
        bytes: size.bytes,
        reason: e.to_string(),
    })?;
    protect(&memory, huge_pages);
    Ok(Arc::new(memory))
}

/// A mapping of this length on a boundary of 2 MiB, if that can be had: elsewhere KVM maps a huge page of the host's by 512 small
/// ones. Linux lays large mappings there by itself since 6.7. Before, it lays one below the other; so what is too much is taken
/// first, and given back.
fn aligned<E>(
    length: usize,
    build: impl Fn(usize) -> Result<MmapRegion, E>,
) -> Result<MmapRegion, E> {
    const HUGE: usize = 2 << 20;
    let mapping = build(length)?;
    let place = mapping.as_ptr() as usize;
    if length < HUGE || place.is_multiple_of(HUGE) {
        return Ok(mapping);
    }
    drop(mapping);
    // In small gaps above there may be room for what is too much; then they are full, and it comes below.
    let mut above = Vec::new();
    for _ in 0..8 {
        let Ok(filler) = build(place % HUGE) else {
            break;
        };
        let is_there = filler.as_ptr() as usize == place + length - place % HUGE;
        above.push(filler);
        if is_there {
            break;
        }
    }
    build(length)
}

fn protect(memory: &Memory, huge_pages: HugePages) {
    for region in memory.iter() {
        // Secrets of the guest do not belong in the VMM's core dump.
        advise(region, libc::MADV_DONTDUMP);
        if huge_pages == HugePages::Transparent {
            advise(region, libc::MADV_HUGEPAGE);
        }
    }
}

/// Asks what the host has. To be called before the filter, which has no sysinfo.
pub fn measure_host() {
    host_bytes();
}

/// Memory and swap of the host in bytes, when it was first asked for.
fn host_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit.max(1));
        info.totalram
            .saturating_add(info.totalswap)
            .saturating_mul(unit)
    })
}

/// Advice only: a host kernel that does not know it changes nothing.
fn advise(region: &GuestRegionMmap, advice: libc::c_int) {
    let length = region.len() as usize;
    // SAFETY: the range is the whole of a mapping that `region` owns and keeps, and neither advice used changes its
    // contents or its protection.
    unsafe { libc::madvise(region.as_ptr().cast(), length, advice) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_sizes_are_refused_before_any_arithmetic() {
        for mib in [0, MAX_MIB + 1, 1 << 44, 1 << 63, u64::MAX] {
            let refused = MemorySize::new(mib, HugePages::None).unwrap_err();
            assert!(refused.to_string().contains(&mib.to_string()));
        }
        let most = MemorySize::new(MAX_MIB, HugePages::None).unwrap();
        if most.bytes() > host_bytes() {
            let refused = allocate(most, HugePages::None).unwrap_err();
            assert!(refused.to_string().contains(&MAX_MIB.to_string()));
        }
        assert!(MemorySize::new(3, HugePages::Hugetlbfs2M).is_err());
        assert_eq!(
            MemorySize::new(MAX_MIB, HugePages::None).unwrap().bytes(),
            MAX_MIB * MIB
        );
    }

    #[test]
    fn memory_lies_where_huge_pages_can() {
        // So that by chance it would lie elsewhere.
        let _other = allocate(
            MemorySize::new(1, HugePages::None).unwrap(),
            HugePages::None,
        );
        for mib in [2, 3, 128, 4096] {
            let size = MemorySize::new(mib, HugePages::None).unwrap();
            for region in allocate(size, HugePages::None).unwrap().iter() {
                assert!((region.as_ptr() as usize).is_multiple_of(2 << 20), "{mib}");
            }
        }
    }

    #[test]
    fn memory_goes_on_behind_the_hole() {
        let size = MemorySize::new(4096, HugePages::None).unwrap();
        let memory = allocate(size, HugePages::None).unwrap();
        assert_eq!(memory.num_regions(), 2);
        for at in [
            0,
            layout::HOLE - 8,
            layout::HOLE_END,
            layout::HOLE_END + (1 << 30) - 8,
        ] {
            memory.write_obj(at, GuestAddress(at)).unwrap();
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), at);
        }
        assert!(memory.read_obj::<u8>(GuestAddress(layout::HOLE)).is_err());
    }
}
