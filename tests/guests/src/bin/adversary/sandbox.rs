//! The memory that devices may be made to write to, and the numbers that are worth trying.

use guest::memory::{self, Region};
use guest::random::Random;
use guest::virtio::queue::{Descriptor, INDIRECT, NEXT, WRITE};

/// Bytes of the sandbox. Few, because the first touch of a page costs more than most cases.
const SIZE: u64 = 6 << 20;
/// Bytes at its start for rings.
const RINGS: u64 = 1 << 20;
/// Bytes at its end where only attacks on the edge of memory go.
pub const EDGE: u64 = 1 << 20;

/// Sizes at which something begins or ends: headers, sectors, pages, frames, what a field can hold.
pub const SIZES: [u32; 32] = [
    0,
    1,
    2,
    4,
    8,
    11,
    12,
    13,
    15,
    16,
    17,
    26,
    43,
    44,
    45,
    60,
    511,
    512,
    513,
    1514,
    4095,
    4096,
    4097,
    65_535,
    65_536,
    65_561,
    65_562,
    1 << 20,
    1 << 24,
    1 << 31,
    (1 << 31) + 1,
    u32::MAX,
];

/// The last memory of the machine. Nothing of this program lies in it: whatever a device writes does no harm.
pub struct Sandbox {
    all: Region,
    rings_left: Region,
}

impl Sandbox {
    /// Takes it.
    pub fn new() -> Self {
        let all = memory::take_last(SIZE);
        Self {
            all,
            rings_left: all.part(0, RINGS),
        }
    }

    /// Memory for a part of a ring, a multiple of pages. Devices may be made to write there as well.
    pub fn take_ring(&mut self, len: u64) -> Region {
        let len = len.next_multiple_of(4096);
        let ring = self.rings_left.part(0, len);
        self.rings_left = self.rings_left.part(len, self.rings_left.len() - len);
        ring
    }

    /// Where data goes.
    pub fn data(&self) -> Region {
        self.all.part(RINGS, SIZE - RINGS - EDGE)
    }

    /// Where rings are. All that looks like a descriptor there is one of [`Sandbox::descriptor`].
    pub fn rings(&self) -> Region {
        self.all.part(0, RINGS)
    }

    /// `len` bytes somewhere in [`Sandbox::data`].
    pub fn some(&self, random: &mut Random, len: u64) -> Region {
        let data = self.data();
        data.part(random.below(data.len() - len + 1), len)
    }

    /// An address where memory begins or ends, or is not, and now and then one that is good. A device that writes there
    /// writes into the sandbox, or nowhere: see [`Sandbox::descriptor`].
    fn address(&self, random: &mut Random) -> u64 {
        let end = self.all.address() + SIZE;
        match random.below(16) {
            0..8 => self.some(random, 1).address(),
            8 => self.all.address() + random.below(RINGS),
            9 => end - random.below(64),
            10 => end - random.below(EDGE),
            11 => end + random.below(1 << 20),
            12 => u64::MAX - random.below(1 << 17),
            13 => random.one_of(&[
                0xc000_0000,
                0xc000_1000,
                0xfec0_0000,
                0xfee0_0000,
                0xffff_f000,
                0xffff_ffff,
            ]),
            14 => random.one_of(&[1 << 32, 1 << 40, 1 << 51, 1 << 52, 1 << 63]),
            _ => random.number() | 1 << 40,
        }
    }

    /// A descriptor of anything. What is writable lies behind this program and ends in the sandbox or outside of
    /// memory, where a device must not write.
    pub fn descriptor(&self, random: &mut Random, table: u16) -> Descriptor {
        let descriptor = self.shifting(random, table);
        if descriptor.flags & WRITE == 0 && random.once_in(8) {
            // To be read, everything is fair.
            let address = random.below(self.all.address() + SIZE);
            return Descriptor {
                address,
                ..descriptor
            };
        }
        descriptor
    }

    /// The same for a table that is changed while the device reads it: it may see the address of one descriptor and the flags of
    /// another, so no address is fair only to be read.
    pub fn shifting(&self, random: &mut Random, table: u16) -> Descriptor {
        let mut flags = random.below(8) as u16;
        if random.once_in(4) {
            flags |= NEXT;
        }
        if flags & INDIRECT != 0 && !random.once_in(3) {
            flags &= !INDIRECT;
        }
        if random.once_in(64) {
            flags = random.number() as u16;
        }
        Descriptor {
            address: self.address(random),
            len: self.len(random),
            flags,
            next: self.index(random, table),
        }
    }

    /// A length.
    pub fn len(&self, random: &mut Random) -> u32 {
        match random.below(8) {
            0 => random.number() as u32,
            1..4 => random.below(70_000) as u32,
            _ => random.one_of(&SIZES),
        }
    }

    /// An index in a table of `size`, or beyond it.
    pub fn index(&self, random: &mut Random, size: u16) -> u16 {
        match random.below(16) {
            0 => random.number() as u16,
            1 => size,
            2 => size.wrapping_sub(1),
            _ => random.below(u64::from(size)) as u16,
        }
    }
}
