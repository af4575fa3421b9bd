//! Which pages of guest memory this process has written, since it was mapped from a base.
#![allow(unsafe_code)] // ioctl on /proc/self/pagemap, and reading guest memory

use std::fs::File;
use std::io;
use std::sync::Arc;

use lepton_devices::Memory;
use lepton_devices::dirty::PAGE;
use vm_memory::VolatileSlice;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::base::{Base, Part, Places};
use super::present::Pagemap;

/// The argument of PAGEMAP_SCAN (Linux 6.7, `struct pm_scan_arg`).
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO: u64 = 1 << 5;
/// Runs that are asked for at once.
const BATCH: usize = 512;
/// Bytes that are looked at with one call, which keeps others of this process from changing mappings.
const STRETCH: u64 = 64 << 20;

ioctl_iowr_nr!(PAGEMAP_SCAN, 0x66, 16, Scan);

/// Runs, each (first byte, bytes), counted as in [`super::base::Extent`], in ascending order.
pub type Runs = Vec<(u64, u64)>;

/// The pages that are not as in `base`, which `memory` was mapped from. Nobody writes meanwhile.
///
/// The host kernel tells in one call. One before 6.7 is asked for each page. Where there is no /proc, as in a jail, the
/// pages are compared, which takes as long as reading all of memory.
pub fn runs(memory: &Memory, base: &Base, pagemap: Option<&File>) -> io::Result<Runs> {
    let places = Places::new(memory);
    let Some(file) = pagemap else {
        return compare(&places, base);
    };
    let mut runs = Runs::new();
    each(&places, file, &mut |at, bytes| add(&mut runs, at, bytes))?;
    Ok(runs)
}

/// How much of memory is this process's alone, and how much it has in common with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// Bytes in pages that only this process has.
    pub private: u64,
    /// Bytes of `base` that this process sees, touched or not.
    pub shared: u64,
}

/// What has to be counted to know shares. It keeps what it needs, so any thread can, and at any time.
pub enum Count {
    /// Nothing; None where the host does not tell.
    Known(Option<Shares>),
    /// The pages that are there.
    Pages {
        /// Memory.
        memory: Arc<Memory>,
        /// What it was mapped from.
        base: Base,
        /// What tells of its pages.
        pagemap: File,
    },
}

impl Count {
    /// Counts.
    pub fn finish(self) -> io::Result<Option<Shares>> {
        match self {
            Count::Known(shares) => Ok(shares),
            Count::Pages {
                memory,
                base,
                pagemap,
            } => shares(&memory, &base, &pagemap).map(Some),
        }
    }
}

/// The shares of `memory`, which was mapped from `base`. Guests may run: then a page that is written meanwhile counts as
/// before or as after. It takes a time that grows with the pages that are there, and no memory.
fn shares(memory: &Memory, base: &Base, pagemap: &File) -> io::Result<Shares> {
    let all: u64 = base.extents().iter().map(|extent| extent.bytes).sum();
    let (mut private, mut hidden) = (0u64, 0u64);
    // Runs come in ascending order, as extents are.
    let mut extents = base.extents().iter().peekable();
    each(&Places::new(memory), pagemap, &mut |at, bytes| {
        private = private.saturating_add(bytes);
        let end = at.saturating_add(bytes);
        while let Some(extent) = extents.peek() {
            let extent_end = extent.at.saturating_add(extent.bytes);
            let overlap = extent_end.min(end).saturating_sub(extent.at.max(at));
            hidden = hidden.saturating_add(overlap);
            if extent_end > end {
                break;
            }
            extents.next();
        }
    })?;
    Ok(Shares {
        private,
        shared: all.saturating_sub(hidden),
    })
}

/// Tells each run of pages that are this process's alone, in ascending order.
fn each(places: &Places, file: &File, tell: &mut impl FnMut(u64, u64)) -> io::Result<()> {
    for part in places.all() {
        match scan(file, *part, tell) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => ask(file, *part, tell),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn add(runs: &mut Runs, at: u64, bytes: u64) {
    match runs.last_mut() {
        Some((first, length)) if *first + *length == at => *length += bytes,
        _ => runs.push((at, bytes)),
    }
}

fn scan(file: &File, part: Part, tell: &mut impl FnMut(u64, u64)) -> io::Result<()> {
    let mut found = [Found::default(); BATCH];
    let host = part.host as u64;
    let end = host + part.bytes;
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        walk_end: host,
        vec: found.as_mut_ptr() as u64,
        vec_len: BATCH as u64,
        category_inverted: IS_FILE | IS_ZERO,
        category_mask: IS_FILE | IS_ZERO,
        category_anyof_mask: IS_PRESENT | IS_SWAPPED,
        return_mask: IS_FILE,
        ..Default::default()
    };
    while scan.walk_end < end {
        scan.start = scan.walk_end;
        scan.end = scan.start.saturating_add(STRETCH).min(end);
        // SAFETY: the kernel reads and writes one `pm_scan_arg`, and writes at most `vec_len` elements of `found`.
        let count = unsafe { ioctl_with_mut_ref(file, PAGEMAP_SCAN(), &mut scan) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for run in found.iter().take(count) {
            tell(part.at + (run.start - host), run.end - run.start);
        }
        if scan.walk_end <= scan.start {
            return Err(io::Error::other("PAGEMAP_SCAN does not go on"));
        }
    }
    Ok(())
}

fn ask(file: &File, part: Part, tell: &mut impl FnMut(u64, u64)) {
    let mut map = Pagemap::new(Some(file));
    for offset in (0..part.bytes).step_by(PAGE as usize) {
        if map.is_private(part.host + offset as usize) {
            tell(part.at + offset, PAGE);
        }
    }
}

fn compare(places: &Places, base: &Base) -> io::Result<Runs> {
    let mut runs = Runs::new();
    let mut was = [0; PAGE as usize];
    let mut is = was;
    for part in places.all() {
        for offset in (0..part.bytes).step_by(PAGE as usize) {
            base.read(part.at + offset, &mut was)?;
            let host = (part.host + offset as usize) as *mut u8;
            // SAFETY: the page lies in a mapping of guest memory that stays mapped.
            let page = unsafe { VolatileSlice::new(host, PAGE as usize) };
            page.copy_to(&mut is);
            if is != was {
                add(&mut runs, part.at + offset, PAGE);
            }
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::present;
    use crate::memory::{MemorySize, allocate};
    use lepton_api::types::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn what_was_written_is_found_in_each_way() {
        let size = MemorySize::new(64, HugePages::None).unwrap();
        let memory = allocate(size, HugePages::None).unwrap();
        for at in [0, 0x5000, 0x6008, 0x300_0000, size.bytes() - 8] {
            memory.write_obj(7u64, GuestAddress(at)).unwrap();
        }
        // Read only.
        memory.read_obj::<u64>(GuestAddress(0x9000)).unwrap();
        let wanted = vec![
            (0, PAGE),
            (0x5000, 2 * PAGE),
            (0x300_0000, PAGE),
            (size.bytes() - PAGE, PAGE),
        ];
        let base = Base::zero(size.bytes());
        assert_eq!(
            runs(&memory, &base, present::open().as_ref()).unwrap(),
            wanted
        );
        let places = Places::new(&memory);
        let mut asked = Runs::new();
        places.all().iter().for_each(|part| {
            let pagemap = present::open().unwrap();
            ask(&pagemap, *part, &mut |at, bytes| add(&mut asked, at, bytes));
        });
        assert_eq!(compare(&places, &base).unwrap(), wanted);
        let pages = |runs: &Runs| -> Vec<u64> {
            let pages = runs
                .iter()
                .flat_map(|(at, bytes)| (*at..at + bytes).step_by(4096));
            pages.collect()
        };
        // An older kernel does not tell the page of zeroes that was only read, which may be a huge one.
        assert!(
            pages(&wanted)
                .iter()
                .all(|page| pages(&asked).contains(page))
        );
        assert!(!pages(&asked).contains(&0x200_0000));
    }

    #[test]
    fn shares_are_what_was_written_and_what_is_left_of_the_base() {
        let size = MemorySize::new(64, HugePages::None).unwrap();
        let memory = allocate(size, HugePages::None).unwrap();
        let pagemap = present::open().unwrap();
        let of = |base: &Base| {
            let Shares { private, shared } = shares(&memory, base, &pagemap).unwrap();
            (private / PAGE, shared / PAGE)
        };
        let zero = Base::zero(size.bytes());
        assert_eq!(of(&zero), (0, 0));
        let file = crate::memory::base::new_file(size.bytes()).unwrap();
        let base = zero.with(file, &[(0x10000, 4 * PAGE), (0x100_0000, 2 * PAGE)]);
        base.map(&memory, None).unwrap();
        assert_eq!(of(&base), (0, 6));
        // Two pages of the base, one beside it.
        for at in [0x11000, 0x13000, 0x14000, 0x20_0000] {
            memory.write_obj(7u64, GuestAddress(at)).unwrap();
        }
        assert_eq!(of(&base), (4, 4));
        memory.write_obj(7u64, GuestAddress(0x100_1000)).unwrap();
        assert_eq!(of(&base), (5, 3));
    }
}
