//! Frames whose headers lie, and buffers that no frame fits in.

use guest::memory::Region;
use guest::random::Random;
use guest::virtio::queue::{Descriptor, WRITE};

use crate::raw::{Chains, PATIENCE, Raw};
use crate::sandbox::{SIZES, Sandbox};

const RX: usize = 0;
const TX: usize = 1;

/// One round: buffers for what may come, and a table full of frames.
pub fn attack(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    raw.ensure_active(random);
    offer_buffers(raw, sandbox, random);
    let queue = raw.queue(TX);
    let before = queue.index;
    let mut chains = Chains::new(queue.size);
    loop {
        let len = 12
            + match random.below(4) {
                0 => 14 + random.below(1500),
                1 => u64::from(random.one_of(&SIZES[..26])),
                _ => 14 + random.below(100),
            };
        let frame = sandbox.some(random, len);
        fill(frame, random);
        let mut parts = [Descriptor::of(frame, 0); 8];
        // Cut anywhere.
        let mut count = 1;
        while count < parts.len() && random.once_in(2) {
            let last = parts[count - 1];
            let here = random.below(u64::from(last.len) + 1) as u32;
            parts[count - 1].len = here;
            parts[count] = Descriptor {
                address: last.address + u64::from(here),
                len: last.len - here,
                ..last
            };
            count += 1;
        }
        if random.once_in(64) {
            parts[count - 1].flags |= WRITE;
        }
        if random.once_in(512) {
            parts[0] = sandbox.descriptor(random, queue.size);
        }
        if !chains.add(queue, &parts[..count]) {
            break;
        }
    }
    if queue.index == before {
        raw.forget();
        return 0;
    }
    raw.publish(TX);
    raw.wait(TX, before, PATIENCE, |_| ()).cases()
}

fn fill(frame: Region, random: &mut Random) {
    let header = [random.number(), random.number()];
    for (word, at) in header.into_iter().zip([0, 6]) {
        if at + 8 <= frame.len() {
            frame.put(at, word);
        }
    }
    if frame.len() < 30 {
        return;
    }
    // Flags and segmentation that exist, mostly; then lengths and offsets that may or may not fit.
    frame.put(0, random.one_of(&[0_u8, 1, 2, 3, 4, 0xff]));
    frame.put(1, random.one_of(&[0_u8, 0, 1, 3, 4, 5, 0x80, 0x81, 0xff]));
    for at in [2, 4, 6, 8] {
        if random.once_in(2) {
            frame.put(
                at,
                random.one_of(&[0_u16, 1, 14, 34, 54, 1448, 0x7fff, u16::MAX]),
            );
        }
    }
    // To nobody, from nobody, so that the host need not answer.
    frame.put(12, 0x9900_0000_0002_u64);
    frame.put(
        24,
        random.one_of(&[0x0008_u16, 0xdd86, 0x0608, 0x0081, 0xffff]),
    );
}

/// Puts buffers of any size, and chains of them, where frames come in.
fn offer_buffers(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) {
    let queue = raw.queue(RX);
    if queue.used.get::<u16>(2) != queue.index && !random.once_in(16) {
        return;
    }
    let mut chains = Chains::new(queue.size);
    loop {
        let len = random.one_of(&[12, 13, 60, 1526, 4096, 65562, 1 << 20]);
        let mut parts = [Descriptor::of(sandbox.some(random, len), WRITE); 4];
        let count = 1 + random.below(4) as usize;
        for part in &mut parts {
            let len = random.one_of(&[0, 1, 12, 100, 4096]);
            *part = Descriptor::of(sandbox.some(random, len), WRITE);
        }
        parts[0] = Descriptor::of(sandbox.some(random, len), WRITE);
        if random.once_in(512) {
            parts[0].flags = 0;
        }
        if !chains.add(queue, &parts[..count]) {
            break;
        }
    }
    raw.publish(RX);
}
