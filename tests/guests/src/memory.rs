//! Memory that devices see: runs of bytes that are read and written as if somebody else did so, too.

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{Ordering, fence};

use crate::boot;

/// Types of which every pattern of bits is a value.
///
/// # Safety
/// That must be so.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($kind:ty)*) => {$(
        // SAFETY: integers have no other patterns.
        unsafe impl Plain for $kind {}
    )*};
}
plain!(u8 u16 u32 u64);

/// A run of guest-physical bytes, mapped one to one.
#[derive(Clone, Copy)]
pub struct Region {
    address: u64,
    len: u64,
}

impl Region {
    /// Bytes that were never given out before, at a multiple of `alignment`, a power of two.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn take(len: u64, alignment: u64) -> Self {
        let start = ARENA.next.get().next_multiple_of(alignment);
        let end = start.saturating_add(len);
        assert!(
            end <= ARENA.end.get(),
            "{len} more bytes of memory are not there"
        );
        ARENA.next.set(end);
        Self {
            address: start,
            len,
        }
    }

    /// Bytes at a place that somebody else named, such as a table of the firmware.
    ///
    /// # Safety
    /// They are mapped, and nothing that Rust knows lies in them.
    pub unsafe fn at(address: u64, len: u64) -> Self {
        Self { address, len }
    }

    /// Guest-physical address of the first byte.
    pub fn address(self) -> u64 {
        self.address
    }

    /// How many bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// A part.
    pub fn part(self, offset: u64, len: u64) -> Self {
        assert!(offset <= self.len && len <= self.len - offset);
        Self {
            address: self.address + offset,
            len,
        }
    }

    fn pointer<T>(self, offset: u64) -> *mut T {
        let size = size_of::<T>() as u64;
        assert!(offset <= self.len && size <= self.len - offset);
        (self.address + offset) as *mut T
    }

    /// Reads what is at `offset`.
    pub fn get<T: Plain>(self, offset: u64) -> T {
        // SAFETY: inside, mapped, and any bytes are a T.
        unsafe { ptr::read_volatile(self.pointer::<[u8; 0]>(offset).cast::<Unaligned<T>>()).0 }
    }

    /// Writes to `offset`.
    pub fn put<T: Plain>(self, offset: u64, value: T) {
        let place = self.pointer::<Unaligned<T>>(offset);
        // SAFETY: inside, mapped, and not Rust's.
        unsafe { ptr::write_volatile(place, Unaligned(value)) }
    }

    /// Writes `len` bytes of `value`.
    pub fn fill(self, value: u8) {
        // SAFETY: inside, mapped, and not Rust's.
        unsafe { ptr::write_bytes(self.address as *mut u8, value, self.len as usize) }
        fence(Ordering::SeqCst);
    }

    /// Writes bytes to `offset`.
    pub fn copy_from(self, offset: u64, bytes: &[u8]) {
        let to = self.part(offset, bytes.len() as u64);
        // SAFETY: inside, mapped, and not Rust's.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to.address as *mut u8, bytes.len()) }
        fence(Ordering::SeqCst);
    }

    /// Reads bytes from `offset`.
    pub fn copy_to(self, offset: u64, bytes: &mut [u8]) {
        let from = self.part(offset, bytes.len() as u64);
        fence(Ordering::SeqCst);
        // SAFETY: inside and mapped.
        unsafe {
            ptr::copy_nonoverlapping(from.address as *const u8, bytes.as_mut_ptr(), bytes.len());
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// What is left of the memory behind the program.
struct Arena {
    next: Cell<u64>,
    end: Cell<u64>,
}

// SAFETY: one processor runs this, and there are no interrupts.
unsafe impl Sync for Arena {}

static ARENA: Arena = Arena {
    next: Cell::new(0),
    end: Cell::new(0),
};

/// Gives out the bytes from `start` to `end` from now on.
pub(crate) fn give(start: u64, end: u64) {
    ARENA.next.set(start);
    ARENA.end.set(end);
}

/// Takes the last `len` bytes: right behind them, memory ends.
///
/// # Panics
/// If there are not as many.
pub fn take_last(len: u64) -> Region {
    let start = ARENA.end.get().saturating_sub(len);
    assert!(
        start >= ARENA.next.get(),
        "{len} bytes of memory are not there"
    );
    ARENA.end.set(start);
    Region {
        address: start,
        len,
    }
}

/// Lets `what` take memory, and takes all of it back when it has ended. No region may survive in a device.
pub fn scope<T>(what: impl FnOnce() -> T) -> T {
    let next = ARENA.next.get();
    let result = what();
    ARENA.next.set(next);
    result
}

/// Bytes that can still be taken, without regard to alignment.
pub fn left() -> u64 {
    ARENA.end.get().saturating_sub(ARENA.next.get())
}

/// All that can still be taken, and all other memory that the boot protocol told of, mapped.
pub fn everything_left() -> impl Iterator<Item = Region> {
    let alignment = 1 << 21;
    let start = ARENA.next.get().next_multiple_of(alignment);
    let arena = Region {
        address: start,
        len: ARENA.end.get().saturating_sub(start),
    };
    let elsewhere = boot::memory_map()
        .iter()
        .filter(|range| range.start >= 1 << 32)
        .map(|range| {
            boot::map(range.start, range.end);
            Region {
                address: range.start,
                len: range.end - range.start,
            }
        });
    core::iter::once(arena).chain(elsewhere)
}

/// What compilers call. `rep` moves whole lines at a time on every processor of the last decade.
mod compiler {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: the caller names two runs of `len` bytes.
        unsafe {
            asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= len {
            // SAFETY: as for `memcpy`; going upwards overwrites nothing that is still to be read.
            return unsafe { memcpy(to, from, len) };
        }
        // SAFETY: as for `memcpy`, downwards from the last byte.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
                inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _, inout("rcx") len => _, options(nostack));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
        // SAFETY: the caller names a run of `len` bytes.
        unsafe {
            asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") len => _,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
        for at in 0..len {
            // SAFETY: the caller names two runs of `len` bytes.
            let (a, b) = unsafe { (*one.add(at), *other.add(at)) };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
        // SAFETY: as for `memcmp`.
        unsafe { memcmp(one, other, len) }
    }
}
