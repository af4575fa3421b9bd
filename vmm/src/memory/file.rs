//! A file's bytes put into guest memory.
#![allow(unsafe_code)] // madvise on the mapping

use std::fs::File;
use std::io::{self, Seek};

use lepton_devices::Memory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// A run of a file and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePart {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Guest physical address of the first one.
    pub address: u64,
}

/// Copies `part` of `file` into `memory`.
///
/// The bytes are copied, not mapped: a private mapping would be faster, but a file that somebody truncates takes even
/// its private copies with it, and the guest with them.
pub fn load(memory: &Memory, file: &File, part: FilePart) -> io::Result<()> {
    if part.length == 0 {
        return Ok(());
    }
    let length = usize::try_from(part.length).map_err(io::Error::other)?;
    populate(memory, part.address, length);
    let mut file = file;
    file.seek(io::SeekFrom::Start(part.offset))?;
    memory
        .read_exact_volatile_from(GuestAddress(part.address), &mut file, length)
        .map_err(io::Error::other)
}

/// Has the host make the pages in one go, instead of one fault each during the copy.
fn populate(memory: &Memory, address: u64, length: usize) {
    const PAGE: usize = 4096;
    let Ok(slice) = memory.get_slice(GuestAddress(address), length) else {
        return;
    };
    let host = slice.ptr_guard_mut();
    let start = host.as_ptr() as usize & !(PAGE - 1);
    let end = (host.as_ptr() as usize + length).next_multiple_of(PAGE);
    // SAFETY: the pages hold the bytes of `slice`, so they belong to a mapping of guest memory; populating them
    // changes no byte. Linux 5.14; an older one does it fault by fault.
    unsafe {
        libc::madvise(
            start as *mut libc::c_void,
            end - start,
            libc::MADV_POPULATE_WRITE,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use vmm_sys_util::tempfile::TempFile;

    const PAGE: u64 = 4096;
    const BYTES: usize = 5 * PAGE as usize + 123;

    fn content(at: u64) -> u8 {
        ((at * 31) >> 3) as u8
    }

    proptest! {
        #[test]
        fn every_byte_arrives_and_no_other_changes(
            offset in 0u64..3 * PAGE,
            length in 0u64..2 * PAGE + 123,
            address in PAGE..3 * PAGE,
        ) {
            let mut file = TempFile::new().unwrap().into_file();
            let bytes: Vec<u8> = (0..BYTES as u64).map(content).collect();
            file.write_all(&bytes).unwrap();
            let memory = Memory::from_ranges(&[(GuestAddress(0), 8 * PAGE as usize)]).unwrap();
            memory.write_slice(&[0xee; 8 * PAGE as usize], GuestAddress(0)).unwrap();
            load(&memory, &file, FilePart { offset, length, address }).unwrap();
            // What happens to the file later does not matter.
            file.set_len(0).unwrap();
            let mut now = vec![0; 8 * PAGE as usize];
            memory.read_slice(&mut now, GuestAddress(0)).unwrap();
            for (at, byte) in (0u64..).zip(now) {
                let expected = match at.checked_sub(address) {
                    Some(within) if within < length => content(offset + within),
                    _ => 0xee,
                };
                prop_assert_eq!(byte, expected, "at {:#x}", at);
            }
        }
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(PAGE).unwrap();
        let memory = Memory::from_ranges(&[(GuestAddress(0), 8 * PAGE as usize)]).unwrap();
        let part = FilePart {
            offset: 0,
            length: 3 * PAGE,
            address: PAGE,
        };
        assert!(load(&memory, &file, part).is_err());
    }
}
