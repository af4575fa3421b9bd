//! Guests of a few instructions: ELF images with the 64-bit entry of the Linux boot protocol.

use std::io;
use std::path::{Path, PathBuf};

/// Where the code is loaded, and where its bytes lie in the file.
const LOAD: u64 = 0x10_0000;
const OFFSET: u64 = 0x1000;

/// What a guest does.
#[derive(Clone, Copy)]
pub enum Program {
    /// Resets the machine by its first instructions.
    Reset,
    /// Writes [`MARKER`] to the serial port, then resets.
    Mark,
    /// Nothing, for ever.
    Idle,
}

/// What [`Program::Mark`] writes; no log line has it.
pub const MARKER: u8 = 0x01;

impl Program {
    fn code(self) -> Vec<u8> {
        // mov al, 0xfe; out 0x64, al; hlt
        let reset = [0xb0, 0xfe, 0xe6, 0x64, 0xf4];
        match self {
            Program::Reset => reset.to_vec(),
            // mov dx, 0x3f8; mov al, MARKER; out dx, al
            Program::Mark => [&[0x66, 0xba, 0xf8, 0x03, 0xb0, MARKER, 0xee][..], &reset].concat(),
            // hlt; jmp back
            Program::Idle => vec![0xf4, 0xeb, 0xfd],
        }
    }

    /// Writes the image into `folder`.
    pub fn write(self, folder: &Path) -> io::Result<PathBuf> {
        let code = self.code();
        let mut image = b"\x7fELF\x02\x01\x01".to_vec();
        image.resize(16, 0);
        image.extend(2u16.to_le_bytes()); // executable
        image.extend(62u16.to_le_bytes()); // x86-64
        image.extend(1u32.to_le_bytes());
        image.extend(LOAD.to_le_bytes()); // entry
        image.extend(64u64.to_le_bytes()); // program headers
        image.extend([0; 12]); // no sections, no flags
        for half in [64u16, 56, 1, 0, 0, 0] {
            image.extend(half.to_le_bytes());
        }
        image.extend(1u32.to_le_bytes()); // PT_LOAD
        image.extend(5u32.to_le_bytes()); // readable, executable
        let size = code.len() as u64;
        for word in [OFFSET, LOAD, LOAD, size, size, 0x1000] {
            image.extend(word.to_le_bytes());
        }
        image.resize(OFFSET as usize, 0);
        image.extend(code);
        let path = folder.join("guest.elf");
        std::fs::write(&path, image)?;
        Ok(path)
    }
}
