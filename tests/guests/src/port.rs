//! Ports of the x86 I/O space.

use core::arch::asm;

/// Writes a byte.
pub fn write(port: u16, value: u8) {
    // SAFETY: no port gives a device access to memory that this program uses: it sets none of them up to.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Reads a byte.
pub fn read(port: u16) -> u8 {
    let value;
    // SAFETY: as in `write`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Writes 16 bits.
pub fn write16(port: u16, value: u16) {
    // SAFETY: as in `write`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

/// Writes 32 bits.
pub fn write32(port: u16, value: u32) {
    // SAFETY: as in `write`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}
