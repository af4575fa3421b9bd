//! ELF images, whole and damaged ones (System V ABI, chapters 4 and 5; 64-bit, little-endian).

use super::LOAD;

/// Offsets of the header's fields.
pub mod header {
    /// Class: 2 is 64-bit.
    pub const CLASS: usize = 4;
    /// Byte order: 1 is little-endian.
    pub const DATA: usize = 5;
    /// Machine: 62 is x86-64. 16 bits.
    pub const MACHINE: usize = 18;
    /// Entry. 64 bits.
    pub const ENTRY: usize = 24;
    /// Place of the program headers. 64 bits.
    pub const PHOFF: usize = 32;
    /// Size of a program header. 16 bits.
    pub const PHENTSIZE: usize = 54;
    /// Number of program headers. 16 bits.
    pub const PHNUM: usize = 56;
    /// Size of the header.
    pub const SIZE: usize = 64;
}

/// Offsets of a program header's fields.
pub mod program_header {
    /// Place of its bytes in the file. 64 bits.
    pub const OFFSET: usize = 8;
    /// Physical address. 64 bits.
    pub const PADDR: usize = 24;
    /// Bytes in the file. 64 bits.
    pub const FILESZ: usize = 32;
    /// Bytes in memory. 64 bits.
    pub const MEMSZ: usize = 40;
    /// Size of a program header.
    pub const SIZE: usize = 56;
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Where the bytes of the segments begin.
const CONTENT: usize = 0x1000;

/// A segment.
#[derive(Debug, Clone)]
pub struct Segment {
    kind: u32,
    /// Physical address.
    pub address: u64,
    /// Its bytes in the file.
    pub bytes: Vec<u8>,
}

impl Segment {
    /// Bytes to be loaded.
    pub fn load(address: u64, bytes: &[u8]) -> Self {
        Self {
            kind: PT_LOAD,
            address,
            bytes: bytes.to_vec(),
        }
    }

    /// A note with these bytes.
    pub fn note(bytes: Vec<u8>) -> Self {
        Self {
            kind: PT_NOTE,
            address: 0,
            bytes,
        }
    }

    /// The note by which an image says that it has the PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`).
    pub fn pvh_note(entry: u32) -> Self {
        const PHYS32_ENTRY: u32 = 18;
        let mut bytes = Vec::new();
        // Length of the name, length of the descriptor, type; then both.
        for word in [4, 4, PHYS32_ENTRY] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(b"Xen\0");
        bytes.extend(entry.to_le_bytes());
        Self::note(bytes)
    }
}

/// An image.
#[derive(Debug, Clone)]
pub struct Elf {
    /// Address of its first instruction.
    pub entry: u64,
    /// What is loaded, and notes.
    pub segments: Vec<Segment>,
}

impl Elf {
    /// An image of code that is loaded and entered at [`LOAD`].
    pub fn of(code: &[u8]) -> Self {
        Self {
            entry: LOAD,
            segments: vec![Segment::load(LOAD, code)],
        }
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        image.resize(16, 0);
        const EXECUTABLE: u16 = 2;
        const X86_64: u16 = 62;
        image.extend(EXECUTABLE.to_le_bytes());
        image.extend(X86_64.to_le_bytes());
        image.extend(1u32.to_le_bytes());
        image.extend(self.entry.to_le_bytes());
        image.extend((header::SIZE as u64).to_le_bytes());
        // No section headers, no flags.
        image.extend(0u64.to_le_bytes());
        image.extend(0u32.to_le_bytes());
        image.extend((header::SIZE as u16).to_le_bytes());
        image.extend((program_header::SIZE as u16).to_le_bytes());
        image.extend((self.segments.len() as u16).to_le_bytes());
        image.resize(header::SIZE, 0);

        let mut offset = CONTENT;
        for segment in &self.segments {
            const ALL: u32 = 7;
            image.extend(segment.kind.to_le_bytes());
            image.extend(ALL.to_le_bytes());
            let length = segment.bytes.len() as u64;
            // A note's alignment is that of its parts, which QEMU takes at its word.
            let alignment = if segment.kind == PT_NOTE { 4 } else { 0x1000 };
            for field in [
                offset as u64,
                segment.address,
                segment.address,
                length,
                length,
                alignment,
            ] {
                image.extend(field.to_le_bytes());
            }
            offset += segment.bytes.len();
        }
        assert!(image.len() <= CONTENT, "too many segments");
        image.resize(CONTENT, 0);
        for segment in &self.segments {
            image.extend(&segment.bytes);
        }
        image
    }
}

/// Overwrites a field of the header.
pub fn set_header<const N: usize>(image: &mut [u8], field: usize, value: [u8; N]) {
    image[field..field + N].copy_from_slice(&value);
}

/// Overwrites a field of program header `index`.
pub fn set_segment(image: &mut [u8], index: usize, field: usize, value: u64) {
    let at = header::SIZE + index * program_header::SIZE + field;
    set_header(image, at, value.to_le_bytes());
}
