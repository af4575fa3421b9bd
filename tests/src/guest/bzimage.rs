//! bzImages, whole and damaged ones (Linux, Documentation/arch/x86/boot.rst).

use super::LOAD;

/// Offsets of the setup header's fields.
pub mod header {
    /// Size of the setup in sectors of 512 bytes, without the first. 8 bits.
    pub const SETUP_SECTS: usize = 0x1f1;
    /// `HdrS`.
    pub const MAGIC: usize = 0x202;
    /// Version of the protocol. 16 bits.
    pub const VERSION: usize = 0x206;
    /// Bit 0: the protected-mode code is loaded high. 8 bits.
    pub const LOADFLAGS: usize = 0x211;
    /// Where the protected-mode code is loaded. 32 bits.
    pub const CODE32_START: usize = 0x214;
    /// Bit 0: there is a 64-bit entry. 16 bits.
    pub const XLOADFLAGS: usize = 0x236;
}

/// The 64-bit entry, from where the protected-mode code is loaded.
const ENTRY_64: usize = 0x200;
const SETUP_SECTS: u8 = 1;

/// An image of `code`, entered in 64-bit mode.
pub fn of(code: &[u8]) -> Vec<u8> {
    let setup = (usize::from(SETUP_SECTS) + 1) * 512;
    let mut image = vec![0; setup + ENTRY_64];
    image[header::SETUP_SECTS] = SETUP_SECTS;
    for (field, value) in [
        (0x1fe, &0xaa55_u16.to_le_bytes()[..]),
        (header::MAGIC, b"HdrS"),
        (header::VERSION, &0x020f_u16.to_le_bytes()),
        (header::LOADFLAGS, &[1]),
        (header::CODE32_START, &(LOAD as u32).to_le_bytes()),
        (header::XLOADFLAGS, &1_u16.to_le_bytes()),
    ] {
        image[field..field + value.len()].copy_from_slice(value);
    }
    image.extend(code);
    image
}
