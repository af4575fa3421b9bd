//! Requests that make no sense, to a drive.

use guest::random::Random;
use guest::virtio::queue::{Descriptor, WRITE};

use crate::raw::{Chains, PATIENCE, Raw};
use crate::sandbox::Sandbox;

const TYPES: [u32; 12] = [0, 0, 0, 1, 1, 1, 8, 2, 3, 5, 0x8000_0000, u32::MAX];
/// What a host may take its time for: flush, discard, secure erase, write zeroes.
const SLOW: [u32; 4] = [4, 11, 14, 13];
const HEADER: u64 = 16;

/// One round: as many chains as the table has room for.
pub fn attack(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    raw.ensure_active(random);
    let sectors = raw.device().config64(0);
    let queue = raw.queue(0);
    let before = queue.index;
    let mut chains = Chains::new(queue.size);
    loop {
        let header = sandbox.some(random, HEADER);
        header.put(0, kind(random));
        header.put(4, random.number() as u32);
        header.put(8, sector(sectors, random));
        let mut parts = [Descriptor::of(header, 0); 6];
        let mut len = 1;
        let direction = random.one_of(&[0, WRITE]);
        for part in parts.iter_mut().skip(1).take(random.below(4) as usize) {
            let size = data_len(random);
            let data = sandbox.some(random, size);
            if random.once_in(2) {
                // A range to discard or to zero.
                data_range(data, sectors, random);
            }
            *part = Descriptor::of(data, direction);
            len += 1;
        }
        if !random.once_in(512) {
            let room = random.one_of(&[1, 1, 1, 2, 513]);
            parts[len] = Descriptor::of(sandbox.some(random, room), WRITE);
            len += 1;
        }
        if random.once_in(512) {
            parts[random.below(len as u64) as usize] = sandbox.descriptor(random, queue.size);
        }
        if !chains.add(queue, &parts[..len]) {
            break;
        }
    }
    if queue.index == before {
        raw.forget();
        return 0;
    }
    raw.publish(0);
    raw.wait(0, before, PATIENCE, |_| ()).cases()
}

fn kind(random: &mut Random) -> u32 {
    match random.below(64) {
        0 => random.one_of(&SLOW),
        1..4 => random.number() as u32,
        _ => random.one_of(&TYPES),
    }
}

fn sector(sectors: u64, random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.number(),
        1 => sectors.wrapping_add(random.below(3)).wrapping_sub(1),
        2 => u64::MAX - random.below(4096),
        3 => (u64::MAX / 512).wrapping_add(random.below(3)),
        4 => 1 << random.below(64),
        _ => random.below(sectors.max(1)),
    }
}

fn data_len(random: &mut Random) -> u64 {
    random.one_of(&[
        1, 15, 16, 17, 20, 511, 512, 513, 1024, 4096, 4097, 65536, 512, 4096,
    ])
}

fn data_range(data: guest::memory::Region, sectors: u64, random: &mut Random) {
    if data.len() >= 16 {
        data.put(0, sector(sectors, random));
        let count = random.one_of(&[0, 1, 8, 0x1_0000, 0x1_0001, 1 << 21, u32::MAX]);
        data.put(8, count);
        data.put(12, random.one_of(&[0_u32, 1, 2, u32::MAX]));
    }
}
