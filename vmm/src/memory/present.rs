//! Which pages of a mapping are there.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, openat};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, VolatileMemory};

const PAGE: usize = 4096;
/// Entries read at once: 32 MiB of memory.
const BATCH: usize = 8192;
/// In memory, or swapped out (Documentation/admin-guide/mm/pagemap.rst).
const THERE: u64 = 1 << 63 | 1 << 62;
/// Of a file, or shared memory.
const FILE: u64 = 1 << 61;

/// Tells pages that were touched from those that never were, by `/proc/self/pagemap`.
pub struct Pagemap<'a> {
    /// None where there is no /proc: then every page counts as touched.
    file: Option<&'a File>,
    entries: Vec<u8>,
    /// Number of the first page in `entries`.
    first: usize,
}

/// That of this process.
static OURS: OnceLock<Option<File>> = OnceLock::new();

/// Opens it for [`open`]: in `process`, this process's folder in a /proc elsewhere, or in /proc. To be called while the
/// process is dumpable: after that, the file is root's. Where it cannot be had, the process goes on without.
pub fn prepare(process: Option<OwnedFd>) {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let handed = process.and_then(|folder| openat(folder, "pagemap", flags, Mode::empty()).ok());
    let handed = handed.map(File::from).filter(is_ours);
    OURS.get_or_init(|| handed.or_else(by_path));
}

/// That of this process, for [`Pagemap::new`].
pub fn open() -> Option<File> {
    OURS.get_or_init(by_path).as_ref()?.try_clone().ok()
}

fn by_path() -> Option<File> {
    File::open("/proc/self/pagemap").ok()
}

/// Whether it tells of this process: that of another one would have a clone without what its guest has written.
fn is_ours(file: &File) -> bool {
    let page = MmapRegionBuilder::<()>::new(PAGE)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build();
    let Ok(page) = page else {
        return false;
    };
    let is_there = || {
        let mut bytes = [0; 8];
        let at = (page.as_ptr() as usize / PAGE * 8) as u64;
        file.read_exact_at(&mut bytes, at).ok()?;
        Some(u64::from_le_bytes(bytes) & THERE != 0)
    };
    is_there() == Some(false)
        && page.as_volatile_slice().write_obj(1u8, 0).is_ok()
        && is_there() == Some(true)
}

impl<'a> Pagemap<'a> {
    /// By what [`open`] gave.
    pub fn new(file: Option<&'a File>) -> Self {
        Pagemap {
            file,
            entries: Vec::new(),
            first: 0,
        }
    }

    /// Whether any page of the `length` bytes at `address` was touched. Both are multiples of the page size; asking in
    /// ascending order is cheap.
    pub fn is_touched(&mut self, address: usize, length: usize) -> bool {
        let (first, count) = (address / PAGE, length / PAGE);
        (first..first + count).any(|page| self.entry(page).is_none_or(|entry| entry & THERE != 0))
    }

    /// Whether the page at `address` is this process's alone: of no file, and not shared.
    pub fn is_private(&mut self, address: usize) -> bool {
        let entry = self.entry(address / PAGE);
        entry.is_none_or(|entry| entry & THERE != 0 && entry & FILE == 0)
    }

    /// What the file says of a page. Where it says nothing, who asks takes the page: better once too often.
    fn entry(&mut self, page: usize) -> Option<u64> {
        let file = self.file?;
        let known = self.first..self.first + self.entries.len() / 8;
        if !known.contains(&page) {
            self.entries.resize(BATCH * 8, 0);
            self.first = page;
            let read = file.read_at(&mut self.entries, page as u64 * 8);
            self.entries.truncate(read.unwrap_or(0));
        }
        let at = (page - self.first) * 8;
        let bytes = self.entries.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use crate::memory::{MemorySize, allocate};
    use lepton_api::types::HugePages;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    #[test]
    fn what_is_of_another_process_is_told_from_ours() {
        assert!(is_ours(&by_path().unwrap()));
        let mut other = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let of_other = File::open(format!("/proc/{}/pagemap", other.id())).unwrap();
        let is_ours_too = is_ours(&of_other);
        drop(other.stdin.take());
        other.wait().unwrap();
        assert!(!is_ours_too);
        assert!(!is_ours(&File::open("/dev/zero").unwrap()));
        assert!(!is_ours(&File::open("/dev/null").unwrap()));
    }

    #[test]
    fn touched_pages_are_told_from_untouched_ones() {
        let size = MemorySize::new(128, HugePages::None).unwrap();
        let memory = allocate(size, HugePages::None).unwrap();
        let base = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        let pagemap = open();
        let mut map = Pagemap::new(pagemap.as_ref());
        assert!(!map.is_touched(base, 128 << 20));
        memory.write_obj(1u8, GuestAddress(0x40_5000)).unwrap();
        let mut map = Pagemap::new(pagemap.as_ref());
        assert!(map.is_touched(base + 0x40_0000, 0x1_0000));
        assert!(map.is_touched(base + 0x40_5000, PAGE));
        assert!(!map.is_touched(base + 0x40_6000, 0x1_0000));
        assert!(!map.is_touched(base, 0x40_0000));
        let mut blind = Pagemap::new(None);
        assert!(blind.is_touched(base, PAGE) && blind.is_private(base));
    }
}
