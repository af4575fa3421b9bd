//! The guest kernel's ELF file, reduced to what a loader reads.
//!
//! The linker pads the file so that each segment lies at an offset that is congruent to its address modulo 2 MiB, and
//! fills the alignment gaps inside segments with zeros. A loader copies all of that, and each byte copied is a byte
//! of guest memory touched. So the file is written anew: no sections, no symbols, and no pages of zeros, as one more read
//! for each run of them costs less than a page that the host would have to make. Guest memory is zero before the kernel
//! is loaded, and the ELF format says the same of a segment's bytes past its file size.

use std::ops::Range;

use object::LittleEndian;
use object::elf::{FileHeader64, PT_LOAD, PT_NOTE, ProgramHeader64, SHN_UNDEF};
use object::pod::bytes_of;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{U16, U64};
use thiserror::Error;

/// A page: what a loader and a host touch as one.
const PAGE: usize = 4096;

type Header = FileHeader64<LittleEndian>;
type Segment = ProgramHeader64<LittleEndian>;

/// Why a kernel image cannot be packed.
#[derive(Debug, Error)]
pub enum PackError {
    /// It is not a readable ELF file.
    #[error("not a readable 64-bit ELF file: {0}")]
    Elf(#[from] object::read::Error),
    /// A segment's data is not in the file.
    #[error("segment {0}: its data lies outside of the file")]
    Truncated(usize),
    /// A note that is not part of a loaded segment.
    #[error("segment {0}: a note outside of the loaded segments")]
    LooseNote(usize),
    /// More segments than an ELF header can count.
    #[error("{0} segments")]
    TooMany(usize),
}

/// Part of a segment as it is written.
struct Piece<'a> {
    /// Distance from the start of the original segment.
    from: u64,
    data: &'a [u8],
    header: Segment,
}

/// Writes `elf` anew, with the loaded segments and the notes alone.
///
/// # Errors
/// If `elf` is not a 64-bit little-endian ELF file with whole segments.
pub fn pack(elf: &[u8]) -> Result<Vec<u8>, PackError> {
    let endian = LittleEndian;
    let header = Header::parse(elf)?;
    let mut pieces = Vec::new();
    let mut notes = Vec::new();
    for (index, segment) in header.program_headers(endian, elf)?.iter().enumerate() {
        match segment.p_type(endian) {
            PT_LOAD => {
                let data = segment
                    .data(endian, elf)
                    .map_err(|()| PackError::Truncated(index))?;
                split(segment, data, &mut pieces);
            }
            PT_NOTE => notes.push((index, *segment)),
            _ => {}
        }
    }

    let count = pieces.len() + notes.len();
    let number = u16::try_from(count).map_err(|_| PackError::TooMany(count))?;
    let mut out = vec![0; size_of::<Header>() + count * size_of::<Segment>()];
    for piece in &mut pieces {
        out.resize(out.len().next_multiple_of(PAGE), 0);
        piece.header.p_offset = U64::new(endian, out.len() as u64);
        out.extend_from_slice(piece.data);
    }
    for (index, note) in &mut notes {
        let offset = moved(note, &pieces).ok_or(PackError::LooseNote(*index))?;
        note.p_offset = U64::new(endian, offset);
    }

    let mut new = *header;
    new.e_phoff = U64::new(endian, size_of::<Header>() as u64);
    new.e_phnum = U16::new(endian, number);
    new.e_shoff = U64::new(endian, 0);
    new.e_shnum = U16::new(endian, 0);
    new.e_shstrndx = U16::new(endian, SHN_UNDEF);
    let mut at = 0;
    let headers = pieces
        .iter()
        .map(|piece| &piece.header)
        .chain(notes.iter().map(|(_, note)| note));
    for bytes in std::iter::once(bytes_of(&new)).chain(headers.map(bytes_of)) {
        out[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    }
    Ok(out)
}

/// Splits a loaded segment at its zero pages.
fn split<'a>(segment: &Segment, data: &'a [u8], pieces: &mut Vec<Piece<'a>>) {
    let endian = LittleEndian;
    let memory = segment.p_memsz(endian);
    let runs = occupied(data);
    for (index, run) in runs.iter().enumerate() {
        let end = runs.get(index + 1).map_or(memory, |next| next.start as u64);
        let from = run.start as u64;
        let mut header = *segment;
        header.p_vaddr = U64::new(endian, segment.p_vaddr(endian) + from);
        header.p_paddr = U64::new(endian, segment.p_paddr(endian) + from);
        header.p_filesz = U64::new(endian, run.len() as u64);
        header.p_memsz = U64::new(endian, end - from);
        header.p_align = U64::new(endian, PAGE as u64);
        pieces.push(Piece {
            from: segment.p_offset(endian) + from,
            data: &data[run.clone()],
            header,
        });
    }
}

/// The parts of `data`, in whole pages, between zero pages.
fn occupied(data: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, page) in data.chunks(PAGE).enumerate() {
        if page.iter().all(|&byte| byte == 0) {
            continue;
        }
        let (start, end) = (index * PAGE, index * PAGE + page.len());
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Where the note's bytes are now.
fn moved(note: &Segment, pieces: &[Piece]) -> Option<u64> {
    let endian = LittleEndian;
    let (offset, size) = (note.p_offset(endian), note.p_filesz(endian));
    let piece = pieces.iter().find(|piece| {
        piece.from <= offset && offset.saturating_add(size) <= piece.from + piece.data.len() as u64
    })?;
    Some(piece.header.p_offset(endian) + (offset - piece.from))
}

#[cfg(test)]
mod tests {
    use object::elf::ProgramType;

    use super::*;

    fn segment(
        kind: ProgramType,
        offset: usize,
        address: u64,
        file: usize,
        memory: usize,
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(kind.0.to_le_bytes());
        bytes.extend(5u32.to_le_bytes());
        for field in [
            offset as u64,
            address,
            address,
            file as u64,
            memory as u64,
            0x20_0000,
        ] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    }

    /// An ELF file with the segments given and `data` at 0x1000.
    fn file(segments: &[Vec<u8>], data: &[u8]) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for field in [0x100_0000u64, 64, 0x7777] {
            elf.extend(field.to_le_bytes());
        }
        elf.extend([0; 4]);
        for field in [64, 56, u16::try_from(segments.len()).unwrap(), 64, 9, 8] {
            elf.extend(field.to_le_bytes());
        }
        elf.extend(segments.concat());
        elf.resize(0x1000, 0);
        elf.extend(data);
        elf
    }

    /// What a loader leaves in memory, from the lowest address on.
    fn load(elf: &[u8]) -> (u64, Vec<u8>) {
        let endian = LittleEndian;
        let header = Header::parse(elf).unwrap();
        let segments: Vec<_> = header
            .program_headers(endian, elf)
            .unwrap()
            .iter()
            .filter(|segment| segment.p_type(endian) == PT_LOAD)
            .collect();
        let base = segments.iter().map(|s| s.p_paddr(endian)).min().unwrap();
        let end = segments
            .iter()
            .map(|s| s.p_paddr(endian) + s.p_memsz(endian))
            .max()
            .unwrap();
        let mut memory = vec![0; usize::try_from(end - base).unwrap()];
        for segment in segments {
            let data = segment.data(endian, elf).unwrap();
            let at = usize::try_from(segment.p_paddr(endian) - base).unwrap();
            memory[at..at + data.len()].copy_from_slice(data);
        }
        (base, memory)
    }

    fn sample() -> Vec<u8> {
        let mut data = vec![0; 80 * PAGE];
        data[..PAGE].fill(1);
        data[3 * PAGE + 7] = 2;
        data[60 * PAGE..61 * PAGE + 100].fill(3);
        file(
            &[
                segment(PT_LOAD, 0x1000, 0x100_0000, data.len(), 100 * PAGE),
                segment(
                    PT_NOTE,
                    0x1000 + 60 * PAGE + 8,
                    0x100_0000 + 60 * PAGE as u64 + 8,
                    32,
                    32,
                ),
            ],
            &data,
        )
    }

    #[test]
    fn the_same_memory_from_a_smaller_file() {
        let elf = sample();
        let packed = pack(&elf).unwrap();
        assert_eq!(packed.len(), 5 * PAGE, "headers, and what is not zero");
        assert_eq!(load(&elf), load(&packed));
    }

    #[test]
    fn the_note_follows_its_bytes() {
        let endian = LittleEndian;
        let elf = sample();
        let packed = pack(&elf).unwrap();
        let header = Header::parse(&*packed).unwrap();
        let note = header
            .program_headers(endian, &*packed)
            .unwrap()
            .iter()
            .find(|segment| segment.p_type(endian) == PT_NOTE)
            .unwrap();
        assert_eq!(note.data(endian, &*packed).unwrap(), [3; 32]);
        assert_eq!(header.e_entry(endian), 0x100_0000);
    }

    #[test]
    fn segments_outside_of_the_file_are_refused() {
        let elf = file(&[segment(PT_LOAD, 0x1000, 0, 4097, 4097)], &[1; 4096]);
        assert!(matches!(pack(&elf), Err(PackError::Truncated(0))));
        let loose = file(
            &[
                segment(PT_LOAD, 0x1000, 0, 4096, 4096),
                segment(PT_NOTE, 0x800, 0, 32, 32),
            ],
            &[1; 4096],
        );
        assert!(matches!(pack(&loose), Err(PackError::LooseNote(1))));
        assert!(matches!(pack(b"#!/bin/sh"), Err(PackError::Elf(_))));
    }
}
