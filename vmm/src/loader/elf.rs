//! An ELF image: checked whole, then put into guest memory.
//!
//! linux-loader's ELF loader reads every segment and every note that the headers name, so that a few hostile bytes
//! keep it busy for hours, and does not look where the entry lies. Here the headers are checked first, so that each
//! byte of the file is used at most once and there is something to run.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::Entry;
use crate::arch::x86_64::layout;
use crate::memory::file::{self, FilePart};
use lepton_devices::Memory;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// Kernels have four or five.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// A kernel's notes take a few hundred bytes.
const MAX_NOTES: u64 = 64 << 10;

/// An image whose headers make sense.
struct Image {
    entry: u64,
    /// Where the segments go.
    segments: Vec<Range<u64>>,
    /// What is read from the file for them.
    parts: Vec<FilePart>,
    /// The entry of the PVH protocol, if a note names one.
    pvh_entry: Option<u64>,
}

/// Loads the image in `file`. It starts by PVH if it has that entry, else by the 64-bit Linux boot protocol.
pub fn load(memory: &Memory, file: &File) -> Result<Entry, String> {
    let image = check(memory, file)?;
    for entry in [Some(image.entry), image.pvh_entry].into_iter().flatten() {
        if !image
            .segments
            .iter()
            .any(|segment| segment.contains(&entry))
        {
            return Err(format!("its entry {entry:#x} is in none of its segments"));
        }
    }
    for part in image.parts {
        file::load(memory, file, part)
            .map_err(|e| format!("{} bytes at {:#x}: {e}", part.length, part.offset))?;
    }
    Ok(match image.pvh_entry {
        Some(rip) => Entry::Pvh { rip },
        None => Entry::Linux64 {
            rip: image.entry,
            header: None,
        },
    })
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    (word(bytes, at) & 0xffff) as u16
}

fn read(file: &File, bytes: &mut [u8], at: u64, what: &str) -> Result<(), String> {
    file.read_exact_at(bytes, at).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => format!("it ends within its {what}"),
        _ => format!("its {what}: {e}"),
    })
}

/// The entry, and the program headers.
fn headers(file: &File) -> Result<(u64, Vec<ProgramHeader>), String> {
    let mut header = [0; HEADER];
    read(file, &mut header, 0, "ELF header")?;
    if header[4] != CLASS_64 {
        return Err(format!("ELF class {} is not 64-bit", header[4]));
    }
    if header[5] != LITTLE_ENDIAN {
        return Err(format!("ELF byte order {} is not little-endian", header[5]));
    }
    let machine = half(&header, 18);
    if machine != MACHINE_X86_64 {
        return Err(format!("ELF machine {machine} is not x86-64"));
    }
    let (start, size, count) = (word(&header, 32), half(&header, 54), half(&header, 56));
    if usize::from(size) != PROGRAM_HEADER {
        return Err(format!("program headers of {size} bytes"));
    }
    if count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(format!(
            "{count} program headers are not between 1 and {MAX_PROGRAM_HEADERS}"
        ));
    }
    let mut table = vec![0; usize::from(count) * PROGRAM_HEADER];
    read(file, &mut table, start, "program headers")?;
    let headers = table
        .chunks_exact(PROGRAM_HEADER)
        .map(|bytes| ProgramHeader {
            kind: (word(bytes, 0) & 0xffff_ffff) as u32,
            offset: word(bytes, 8),
            address: word(bytes, 24),
            file_size: word(bytes, 32),
            memory_size: word(bytes, 40),
        })
        .collect();
    Ok((word(&header, 24), headers))
}

/// Checks the image's headers against the file's length and guest memory.
fn check(memory: &Memory, file: &File) -> Result<Image, String> {
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let (entry, headers) = headers(file)?;
    let mut image = Image {
        entry,
        segments: Vec::new(),
        parts: Vec::new(),
        pvh_entry: None,
    };
    for header in headers {
        let (offset, size) = (header.offset, header.file_size);
        let in_file = offset.checked_add(size).is_some_and(|end| end <= length);
        match header.kind {
            NOTE if size > MAX_NOTES => return Err(format!("notes of {size} bytes")),
            LOAD | NOTE if !in_file => {
                return Err(format!(
                    "a segment of {size} bytes at {offset:#x} of a file of {length}"
                ));
            }
            LOAD if header.memory_size > 0 => {
                let range = place(memory, &header, &image.segments)?;
                image.parts.push(FilePart {
                    offset,
                    length: size,
                    address: range.start,
                });
                image.segments.push(range);
            }
            NOTE => {
                // At most MAX_NOTES.
                let mut notes = vec![0; size as usize];
                file.read_exact_at(&mut notes, offset)
                    .map_err(|e| format!("its notes: {e}"))?;
                image.pvh_entry = image.pvh_entry.or(pvh_entry(&notes)?);
            }
            _ => {}
        }
    }
    if image.segments.is_empty() {
        return Err("it has nothing to load".into());
    }
    Ok(image)
}

/// The entry that a Xen note of type XEN_ELFNOTE_PHYS32_ENTRY names. A note: the lengths of its name and its value
/// and its type, 32 bits each, then both, each padded to 4 bytes.
fn pvh_entry(notes: &[u8]) -> Result<Option<u64>, String> {
    const PHYS32_ENTRY: u64 = 18;
    let mut rest = notes;
    while rest.len() >= 12 {
        let field = |at| word(rest, at) & 0xffff_ffff;
        let (name_length, length, kind) = (field(0), field(4), field(8));
        // Each is below 2^32: the sums do not overflow.
        let value_at = 12 + (name_length as usize).next_multiple_of(4);
        let next = value_at + (length as usize).next_multiple_of(4);
        let Some(value) = rest.get(value_at..value_at + length as usize) else {
            return Err("a note ends behind the notes".into());
        };
        if kind == PHYS32_ENTRY && name_length == 4 && rest.get(12..16) == Some(b"Xen\0") {
            return match length {
                4 => Ok(Some(word(value, 0) & 0xffff_ffff)),
                8 => Ok(Some(word(value, 0))),
                _ => Err(format!("a PVH entry of {length} bytes")),
            };
        }
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}

/// Where a segment goes, if it may go there.
fn place(
    memory: &Memory,
    header: &ProgramHeader,
    others: &[Range<u64>],
) -> Result<Range<u64>, String> {
    let (address, size) = (header.address, header.memory_size);
    let refuse = |why: &str| Err(format!("a segment of {size} bytes for {address:#x} {why}"));
    if header.file_size > size {
        return refuse("is shorter than its part of the file");
    }
    let in_ram = usize::try_from(size)
        .is_ok_and(|size| GuestMemoryBackend::check_range(memory, GuestAddress(address), size));
    if !in_ram || address < layout::HIGH_MEMORY {
        return refuse("does not lie in guest memory above 1 MiB");
    }
    // In memory, so the sum does not overflow.
    let range = address..address + size;
    if others
        .iter()
        .any(|other| other.start < range.end && range.start < other.end)
    {
        return refuse("overlaps another");
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        note.extend((name.len() as u32).to_le_bytes());
        note.extend((value.len() as u32).to_le_bytes());
        note.extend(kind.to_le_bytes());
        for part in [name, value] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn the_pvh_entry_is_found_among_other_notes() {
        let other = note(b"GNU\0", 3, &[1; 20]);
        let four = note(b"Xen\0", 18, &0x123_4567u32.to_le_bytes());
        let eight = note(b"Xen\0", 18, &0x123_4567u64.to_le_bytes());
        for entry in [four, eight] {
            let notes = [other.clone(), note(b"Linux\0", 18, b"x"), entry].concat();
            assert_eq!(pvh_entry(&notes), Ok(Some(0x123_4567)));
        }
        assert_eq!(pvh_entry(&other), Ok(None));
        assert!(pvh_entry(&note(b"Xen\0", 18, b"123")).is_err());
        assert!(pvh_entry(&other[..other.len() - 4]).is_err());
    }

    proptest! {
        #[test]
        fn any_notes_are_read_to_an_end(notes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = pvh_entry(&notes);
        }
    }
}
