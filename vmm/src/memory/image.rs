//! Guest memory that lies in a memory file: mapped privately, so that the file stays as it is.

use std::fs::File;
use std::sync::Arc;

use lepton_api::types::HugePages;
use lepton_devices::Memory;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::{MemoryError, MemorySize, Origin, Ram, protect};
use crate::arch::x86_64::layout;

/// Maps the memory file `file`, whose first bytes are a memory of `size`. Pages are read when they are touched, and
/// copied when they are written; nothing checks them. Who truncates the file kills the machine by SIGBUS.
pub fn map_unverified(
    file: &File,
    size: MemorySize,
    huge_pages: HugePages,
) -> Result<Ram, MemoryError> {
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, bytes) in layout::ram(size.bytes()) {
        let fail = |reason: String| MemoryError::Map { bytes, reason };
        let length = usize::try_from(bytes).map_err(|e| fail(e.to_string()))?;
        let file = file.try_clone().map_err(|e| fail(e.to_string()))?;
        let mapping = MmapRegionBuilder::new_with_bitmap(length, ())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, offset))
            .build()
            .map_err(|e| fail(e.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| fail("its end overflows".into()))?;
        regions.push(region);
        offset += bytes;
    }
    let memory = Memory::from_regions(regions).map_err(|e| MemoryError::Map {
        bytes: size.bytes(),
        reason: e.to_string(),
    })?;
    protect(&memory, huge_pages);
    Ok(Ram {
        memory: Arc::new(memory),
        origin: Origin::File,
    })
}
