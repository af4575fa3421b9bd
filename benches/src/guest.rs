//! The guests: a few instructions each, in one image that every VMM boots.
//!
//! The image has the 64-bit entry of the Linux boot protocol and the PVH entry, and the code means the same in both
//! modes.

use std::io;
use std::path::{Path, PathBuf};

use lepton_tests::guest::{Entry, Program};

/// What a guest writes to the serial port when it has come up; no log line has this byte.
pub const MARKER: u8 = 0x01;

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Resets the machine by its first instructions.
    Reset,
    /// Writes [`MARKER`] to the serial port, then resets.
    Mark,
    /// Writes [`MARKER`], then halts for ever.
    Idle,
    /// Writes [`MARKER`] again and again.
    Beat,
    /// Halts until it is told that it is a copy, then writes [`MARKER`] again and again.
    Doze,
}

/// The interrupt by which a machine is told that it is a copy, of our own VMM (its ACPI tables have it).
const GENERATION: u32 = 3;

/// mov dx, 0x3f8; mov al, MARKER; out dx, al
const MARK: [u8; 7] = [0x66, 0xba, 0xf8, 0x03, 0xb0, MARKER, 0xee];
/// mov al, 0xfe; out 0x64, al: the keyboard controller pulls the reset line.
const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];
/// cli; hlt; jmp to the hlt: nothing more happens, whether the machine is to end or to stay.
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

impl Guest {
    fn code(self) -> Vec<u8> {
        match self {
            Guest::Reset => [RESET, HALT].concat(),
            Guest::Mark => [&MARK[..], &RESET, &HALT].concat(),
            // jmp to the out
            Guest::Beat => [&MARK[..], &[0xeb, 0xfd]].concat(),
            Guest::Doze => {
                let beat = Program::new(&Guest::Beat.code());
                let program = Program::once_interrupted(GENERATION, &beat);
                program.code().to_vec()
            }
            Guest::Idle => [&MARK[..], &HALT].concat(),
        }
    }

    /// Writes the image into `folder`.
    pub fn write(self, folder: &Path) -> io::Result<PathBuf> {
        let path = folder.join("guest.elf");
        std::fs::write(&path, Program::new(&self.code()).elf(Entry::Pvh))?;
        Ok(path)
    }
}
