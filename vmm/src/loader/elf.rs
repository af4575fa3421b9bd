//! Checks of an ELF image before it is loaded.
//!
//! The loader reads every segment and every note that the headers name, so a few hostile bytes could keep it busy for
//! hours or leave the guest with nothing to run. After these checks each byte of the file is read at most once.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::arch::x86_64::layout;
use lepton_devices::Memory;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CLASS_64: u8 = 2;
const MACHINE_X86_64: u16 = 62;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// Kernels have four or five.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// A kernel's notes take a few hundred bytes.
const MAX_NOTES: u64 = 64 << 10;

/// The guest-physical runs that an image's segments fill.
pub struct Segments(Vec<Range<u64>>);

impl Segments {
    /// Whether an entry at `address` has something to run.
    pub fn hold(&self, address: u64) -> bool {
        self.0.iter().any(|segment| segment.contains(&address))
    }
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

fn read<const N: usize>(file: &File, at: u64, what: &str) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at)
        .map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => format!("it ends within its {what}"),
            _ => format!("its {what}: {e}"),
        })?;
    Ok(bytes)
}

fn program_headers(file: &File) -> Result<Vec<ProgramHeader>, String> {
    let header: [u8; HEADER] = read(file, 0, "ELF header")?;
    if header[4] != CLASS_64 {
        return Err(format!("ELF class {} is not 64-bit", header[4]));
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
    (0..u64::from(count))
        .map(|index| {
            let at = start
                .checked_add(index * PROGRAM_HEADER as u64)
                .ok_or_else(|| format!("program headers at {start:#x}"))?;
            let bytes: [u8; PROGRAM_HEADER] = read(file, at, "program headers")?;
            Ok(ProgramHeader {
                kind: (word(&bytes, 0) & 0xffff_ffff) as u32,
                offset: word(&bytes, 8),
                address: word(&bytes, 24),
                file_size: word(&bytes, 32),
                memory_size: word(&bytes, 40),
            })
        })
        .collect()
}

/// Checks the image's headers against the file's length and guest memory.
pub fn check(memory: &Memory, file: &File) -> Result<Segments, String> {
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut segments: Vec<Range<u64>> = Vec::new();
    for header in program_headers(file)? {
        let in_file = header
            .offset
            .checked_add(header.file_size)
            .is_some_and(|end| end <= length);
        match header.kind {
            NOTE if header.file_size > MAX_NOTES => {
                return Err(format!("notes of {} bytes", header.file_size));
            }
            LOAD | NOTE if !in_file => {
                return Err(format!(
                    "a segment of {} bytes at {:#x} of a file of {length}",
                    header.file_size, header.offset
                ));
            }
            LOAD if header.memory_size > 0 => {
                segments.push(place(memory, &header, &segments)?);
            }
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err("it has nothing to load".into());
    }
    let entry = word(&read::<HEADER>(file, 0, "ELF header")?, 24);
    let segments = Segments(segments);
    if segments.hold(entry) {
        Ok(segments)
    } else {
        Err(format!("its entry {entry:#x} is in none of its segments"))
    }
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
