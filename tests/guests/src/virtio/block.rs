//! A block device (VIRTIO 1.3, 5.2).

use super::INDIRECT_DESC;
use super::find::{Kind, device};
use super::mmio::Mmio;
use super::queue::{Descriptor, INDIRECT, Queue, WRITE};
use crate::memory::Region;
use crate::time;

/// `VIRTIO_BLK_F_RO`.
pub const READ_ONLY: u64 = 1 << 5;
/// `VIRTIO_BLK_F_FLUSH`.
pub const FLUSH: u64 = 1 << 9;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Reads.
    Read = 0,
    /// Writes.
    Write = 1,
    /// Puts on stable storage what was written.
    Flush = 4,
}

/// A request's place: its header, its data, its status.
#[derive(Clone, Copy)]
struct Slot {
    header: Region,
    data: Region,
    status: Region,
    /// The indirect table, if there is one.
    table: Option<Region>,
}

/// Most requests at once.
pub const MAX_SLOTS: usize = 128;

/// A drive, with up to [`MAX_SLOTS`] requests at once.
pub struct Block {
    device: Mmio,
    queue: Queue,
    features: u64,
    slots: [Option<Slot>; MAX_SLOTS],
    depth: u16,
}

impl Block {
    /// Starts drive number `index`, with `depth` places for requests of up to `size` bytes; fewer if its queue is too
    /// short for as many.
    pub fn start(index: usize, depth: u64, size: u64) -> Option<Self> {
        Some(Self::on(device(Kind::Block, index)?, depth, size))
    }

    /// As [`Block::start`], for a known device.
    pub fn on(device: Mmio, depth: u64, size: u64) -> Self {
        let features = device.negotiate(FLUSH | INDIRECT_DESC);
        let queue = device.queue(0, 1024, features);
        let depth = depth.clamp(1, MAX_SLOTS as u64) as u16;
        let indirect = depth * 3 > queue.size() && features & INDIRECT_DESC != 0;
        let depth = match indirect {
            true => depth.min(queue.size()),
            false => depth.min(queue.size() / 3),
        };
        let mut block = Self {
            device,
            queue,
            features,
            slots: [None; MAX_SLOTS],
            depth,
        };
        for slot in block.slots.iter_mut().take(usize::from(depth)) {
            *slot = Some(Slot {
                header: Region::take(16, 16),
                data: Region::take(size, 4096),
                status: Region::take(1, 1),
                table: indirect.then(|| Region::take(3 * Descriptor::SIZE, 16)),
            });
        }
        block.device.start();
        block
    }

    /// The device.
    pub fn device(&self) -> Mmio {
        self.device
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.device.config64(0)
    }

    /// The features agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// How many requests there can be at once.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    fn slot(&self, index: u16) -> Slot {
        match self.slots[usize::from(index)] {
            Some(slot) => slot,
            None => panic!("there is no place {index} for a request"),
        }
    }

    /// The data of the request in place `index`.
    pub fn data(&self, index: u16) -> Region {
        self.slot(index).data
    }

    /// Offers a request from place `index`; [`Block::publish`] lets the device see it.
    pub fn offer(&mut self, index: u16, operation: Operation, sector: u64, len: u64) {
        const PENDING: u8 = 0xff;
        let slot = self.slot(index);
        slot.header.put(0, operation as u32 as u64);
        slot.header.put(8, sector);
        slot.status.put(0, PENDING);
        let (table, first, head) = match slot.table {
            Some(table) => (table, 0, index),
            None => (self.queue.table(), index * 3, index * 3),
        };
        Descriptor::of(slot.header, 0)
            .then(if len == 0 { first + 2 } else { first + 1 })
            .store(table, first);
        let direction = if operation == Operation::Read {
            WRITE
        } else {
            0
        };
        if len > 0 {
            Descriptor::of(slot.data.part(0, len), direction)
                .then(first + 2)
                .store(table, first + 1);
        }
        Descriptor::of(slot.status, WRITE).store(table, first + 2);
        if slot.table.is_some() {
            Descriptor::of(table, INDIRECT).store(self.queue.table(), index);
        }
        self.queue.offer(head);
    }

    /// Lets the device see what was offered.
    pub fn publish(&mut self) {
        self.queue.publish();
    }

    /// A request that is done: its place and its status, 0 if all is well.
    pub fn done(&mut self) -> Option<(u16, u8)> {
        let (head, _) = self.queue.pop()?;
        let index = match self.slots[0].is_some_and(|slot| slot.table.is_some()) {
            true => head,
            false => head / 3,
        };
        Some((index, self.slot(index).status.get(0)))
    }

    /// Does one request, and waits for it. None: it was not done in time.
    pub fn do_one(&mut self, operation: Operation, sector: u64, len: u64) -> Option<u8> {
        self.offer(0, operation, sector, len);
        self.publish();
        let deadline = time::Deadline::after(PATIENCE);
        loop {
            if let Some((_, status)) = self.done() {
                return Some(status);
            }
            if deadline.is_over() {
                return None;
            }
            time::pause();
        }
    }
}

/// How long a request may take: some seconds on any processor.
pub const PATIENCE: u64 = 40_000_000_000;

/// What 64-bit word `word` of `sector` is on a drive written by the probe, or for it, with `seed`.
pub fn pattern(seed: u64, sector: u64, word: u64) -> u64 {
    let place = sector.wrapping_mul(SECTOR / 8).wrapping_add(word);
    place.wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Writes the pattern of the sectors from `sector` on into `data`.
pub fn write_pattern(data: Region, seed: u64, sector: u64) {
    for word in 0..data.len() / 8 {
        data.put(word * 8, pattern(seed, sector, word));
    }
}

/// How many words of `data` are not the pattern of the sectors from `sector` on.
pub fn differences(data: Region, seed: u64, sector: u64) -> u64 {
    (0..data.len() / 8)
        .filter(|&word| data.get::<u64>(word * 8) != pattern(seed, sector, word))
        .count() as u64
}
