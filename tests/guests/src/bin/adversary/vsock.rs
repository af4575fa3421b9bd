//! Packets that lie about their length, their ports, their credit and what they are.

use guest::arguments;
use guest::random::Random;
use guest::virtio::queue::{Descriptor, WRITE};
use guest::virtio::vsock::{HEADER, HOST, Header, STREAM, operation};

use crate::raw::{Chains, Raw};
use crate::sandbox::Sandbox;

const RX: usize = 0;
const TX: usize = 1;
/// Ticks to wait for a device that may have answers that nobody takes, and takes no packets until then.
const PATIENCE: u64 = 40_000_000;

/// One round: buffers for answers, and a table full of packets.
pub fn attack(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    raw.ensure_active(random);
    offer_buffers(raw, sandbox, random);
    let cid = raw.device().config64(0);
    let flood = random.once_in(8);
    let queue = raw.queue(TX);
    let before = queue.index;
    let mut chains = Chains::new(queue.size);
    loop {
        let len = random.one_of(&[0, 0, 0, 1, 16, 4096, 65536]);
        let packet = sandbox.some(random, HEADER + len);
        let header = if flood {
            request(cid, random)
        } else {
            anything(cid, len as u32, random)
        };
        header.store(packet);
        let data = packet.part(HEADER, len);
        let mut parts = [
            Descriptor::of(packet.part(0, HEADER), 0),
            Descriptor::of(data, 0),
        ];
        if random.once_in(64) {
            parts[0].len = random.below(HEADER) as u32;
        }
        if random.once_in(64) {
            parts[1].flags |= WRITE;
        }
        if random.once_in(512) {
            parts[1] = sandbox.descriptor(random, queue.size);
        }
        let count = if len == 0 { 1 } else { 2 };
        if !chains.add(queue, &parts[..count]) {
            break;
        }
    }
    if queue.index == before {
        raw.forget();
        return 0;
    }
    raw.publish(TX);
    let mut cases = 0;
    let outcome = raw.wait(TX, before, PATIENCE, |_| ());
    cases += outcome.cases();
    if !outcome.broken && outcome.used == 0 {
        // It has answers that nobody takes. That is its right.
        raw.forget();
        cases += 1;
    }
    cases
}

fn host_port(random: &mut Random) -> u32 {
    match random.below(4) {
        0 => random.number() as u32,
        1 => arguments::number("port", 5000) as u32,
        2 => random.one_of(&[0, u32::MAX, 1 << 30]),
        _ => random.below(8) as u32,
    }
}

/// A connection to be made from a port that is not used yet, in all likelihood.
fn request(cid: u64, random: &mut Random) -> Header {
    Header {
        src_cid: cid,
        dst_cid: HOST,
        src_port: random.number() as u32,
        dst_port: arguments::number("port", 5000) as u32,
        kind: STREAM,
        operation: operation::REQUEST,
        buf_alloc: random.one_of(&[0, 1, 65536, u32::MAX]),
        ..Header::default()
    }
}

fn anything(cid: u64, len: u32, random: &mut Random) -> Header {
    let said = match random.below(8) {
        0 => random.number() as u32,
        1 => u32::MAX,
        2 => len.wrapping_add(1),
        3 => len.wrapping_sub(1),
        _ => len,
    };
    let src_cid = match random.once_in(16) {
        true => random.number(),
        false => cid,
    };
    let dst_cid = match random.once_in(16) {
        true => random.one_of(&[0, 1, cid, u64::MAX, 1 << 32 | 2]),
        false => HOST,
    };
    Header {
        src_cid,
        dst_cid,
        src_port: random.one_of(&[0, 1, 2, 3, 4, 5, 6, u32::MAX]),
        dst_port: host_port(random),
        len: said,
        kind: random.one_of(&[STREAM, STREAM, STREAM, STREAM, STREAM, 0, 2, u16::MAX]),
        operation: random.one_of(&[1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 0, 8, u16::MAX]),
        flags: random.one_of(&[0, 1, 2, 3, u32::MAX]),
        buf_alloc: random.one_of(&[0, 1, 4096, 65536, 1 << 31, u32::MAX]),
        fwd_cnt: random.one_of(&[0, 0, 1, 4096, 1 << 31, u32::MAX]),
    }
}

/// Gives the device room for what it has to say, now and then of no use.
fn offer_buffers(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) {
    let queue = raw.queue(RX);
    let under_way = queue.index.wrapping_sub(queue.used.get(2));
    if under_way > queue.size / 2 {
        return;
    }
    // Each buffer in the place that its head had, so that no head is twice under way unless it is meant to be.
    let free = queue.size - under_way;
    for _ in 0..free {
        let place = queue.index % queue.size;
        let len = random.one_of(&[HEADER + 1, HEADER + 64, HEADER + 4096, HEADER + 65536]);
        let mut buffer = Descriptor::of(sandbox.some(random, len), WRITE);
        if random.once_in(4096) {
            buffer = sandbox.descriptor(random, queue.size);
        }
        buffer.store(queue.table, place);
        queue.offer(place);
    }
    raw.publish(RX);
}
