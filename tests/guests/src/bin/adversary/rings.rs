//! Rings of nonsense: heads, descriptors and indices that follow no rule, changed while the device reads them.

use guest::memory::Region;
use guest::random::Random;
use guest::virtio::INDIRECT_DESC;
use guest::virtio::queue::{Descriptor, INDIRECT, WRITE};

use crate::raw::{Raw, RawQueue};
use crate::sandbox::Sandbox;

/// Ticks to wait for a device that may have nothing to do with what it was given.
const PATIENCE: u64 = 1_000_000;

/// One round: a device's queue filled with nonsense, and a kick.
pub fn attack(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    raw.ensure_active(random);
    if raw.kind() == 2 && raw.features & INDIRECT_DESC != 0 && random.once_in(4) {
        return long_chains(raw, sandbox, random);
    }
    let index = random.below(raw.queue_count() as u64) as usize;
    let queue = raw.queue(index);
    let before = queue.index;
    let indirect = change_table(queue.table, queue.size, sandbox, random);
    let heads = match random.below(8) {
        0 => queue.size,
        1 => queue.size.saturating_add(1),
        _ => 1 + random.below(8) as u16,
    };
    for _ in 0..heads {
        let head = sandbox.index(random, queue.size);
        queue.offer(head);
    }
    if random.once_in(16) {
        // More than there are places for.
        queue.index = queue.index.wrapping_add(random.number() as u16);
    }
    if random.once_in(8) {
        queue.avail.put(0, random.number() as u16);
        queue
            .avail
            .put(4 + u64::from(queue.size) * 2, random.number() as u16);
    }
    if random.once_in(8) {
        // A device that is told not to look is kicked all the same.
        queue.used.put(0, random.number() as u16);
        queue
            .used
            .put(4 + u64::from(queue.size) * 8, random.number() as u16);
    }
    raw.publish(index);
    let outcome = raw.wait(index, before, PATIENCE, |queue| {
        change(queue, sandbox, random);
        if let Some(table) = indirect {
            change_entry(table, sandbox, random);
        }
    });
    if outcome.used == 0 && !outcome.broken {
        // It waits for something, such as a frame. A ring that says otherwise than the device is of no more use.
        raw.forget();
        return 1;
    }
    outcome.cases()
}

/// Writes nonsense into a part of the table; what was there before is no better. Returns one of the indirect tables that it
/// leads to now.
fn change_table(
    table: Region,
    size: u16,
    sandbox: &Sandbox,
    random: &mut Random,
) -> Option<Region> {
    let mut found = None;
    for _ in 0..size.min(32) {
        let index = random.below(u64::from(size)) as u16;
        let mut descriptor = sandbox.shifting(random, size);
        if descriptor.flags & INDIRECT != 0 && !random.once_in(4) {
            let (of_table, table) = indirect(descriptor, sandbox, random);
            descriptor = of_table;
            found = Some(table);
        }
        descriptor.store(table, index);
    }
    found
}

/// A descriptor of a table of more nonsense, and that table.
fn indirect(
    descriptor: Descriptor,
    sandbox: &Sandbox,
    random: &mut Random,
) -> (Descriptor, Region) {
    let entries = random.one_of(&[1, 2, 3, 16, 256, 1024]);
    let table = sandbox.some(random, entries * Descriptor::SIZE);
    for index in 0..entries.min(16) as u16 {
        sandbox.shifting(random, entries as u16).store(table, index);
    }
    let wrong = if random.once_in(4) {
        random.below(17) as u32
    } else {
        0
    };
    let descriptor = Descriptor {
        address: table.address(),
        len: (table.len() as u32).wrapping_add(wrong),
        ..descriptor
    };
    (descriptor, table)
}

/// Writes something else where the device may be reading.
fn change(queue: &mut RawQueue, sandbox: &Sandbox, random: &mut Random) {
    let index = random.below(u64::from(queue.size)) as u16;
    sandbox
        .shifting(random, queue.size)
        .store(queue.table, index);
    if random.once_in(4) {
        let place = random.below(u64::from(queue.size));
        queue
            .avail
            .put(4 + place * 2, sandbox.index(random, queue.size));
    }
}

/// Writes another descriptor into an indirect table, where the device may be reading.
fn change_entry(table: Region, sandbox: &Sandbox, random: &mut Random) {
    let entries = table.len() / Descriptor::SIZE;
    let index = random.below(entries) as u16;
    sandbox.shifting(random, entries as u16).store(table, index);
}

/// Reads in pieces, as many as an indirect table can name: work and memory for the device out of all proportion to the
/// driver's own.
fn long_chains(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    let entries = random.one_of(&[257, 1025, 2048, 2049, 65_535]);
    let table = sandbox.data().part(0, entries * Descriptor::SIZE);
    let header = sandbox.data().part(2 << 20, 16);
    header.fill(0);
    let data = sandbox.data().part(3 << 20, 8192);
    let pieces = (entries - 2) / 4 * 4;
    for piece in 1..=pieces {
        let part = data.part((piece - 1) % 64 * 128, 128);
        Descriptor::of(part, WRITE)
            .then(piece as u16 + 1)
            .store(table, piece as u16);
    }
    Descriptor::of(header, 0).then(1).store(table, 0);
    Descriptor::of(data.part(0, 1), WRITE).store(table, pieces as u16 + 1);
    let queue = raw.queue(0);
    let before = queue.index;
    for head in 0..queue.size {
        Descriptor::of(table, INDIRECT).store(queue.table, head);
        queue.offer(head);
    }
    raw.publish(0);
    let changes = random.once_in(2);
    let outcome = raw.wait(0, before, 10 * PATIENCE, |_| {
        if changes {
            change_entry(table, sandbox, random);
        }
    });
    // Whatever is left is over with a reset.
    raw.forget();
    outcome.cases().max(1)
}
