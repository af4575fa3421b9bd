//! Registers at every width, in every order and in every state.

use guest::random::Random;
use guest::virtio::mmio::{Mmio, register, status};

use crate::raw::Raw;
use crate::sandbox::{EDGE, Sandbox};

const WRITTEN: [u64; 17] = [
    register::DEVICE_FEATURES_SEL,
    register::DRIVER_FEATURES,
    register::DRIVER_FEATURES_SEL,
    register::QUEUE_SEL,
    register::QUEUE_NUM,
    register::QUEUE_READY,
    register::QUEUE_NOTIFY,
    register::INTERRUPT_ACK,
    register::STATUS,
    register::QUEUE_DESC,
    register::QUEUE_DESC + 4,
    register::QUEUE_DRIVER,
    register::QUEUE_DRIVER + 4,
    register::QUEUE_DEVICE,
    register::QUEUE_DEVICE + 4,
    register::CONFIG,
    register::CONFIG + 8,
];

/// One round: some steps of a good negotiation, or of one that went wrong, then a dozen accesses of any kind.
pub fn attack(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    let device = raw.device();
    match random.below(16) {
        0..4 => device.write(register::STATUS, 0),
        4..8 => raw.agree(random),
        8..13 => raw.start(random),
        13 if raw.queue_count() > 0 => raw.spoil(random),
        14 => {
            raw.start(random);
            device.write(register::STATUS, device.status() | status::FAILED);
        }
        _ => {}
    }
    raw.forget();
    let accesses = 12 + random.below(12);
    for _ in 0..accesses {
        access(device, sandbox, random);
    }
    if raw.queue_count() > 0 {
        // Whatever the registers were told, the rings are as they were: there may be work in them now.
        device.write(register::QUEUE_NOTIFY, random.below(4) as u32);
    }
    device.write(register::STATUS, 0);
    accesses + 1
}

fn offset(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.below(0x1000 - 8),
        1 => random.below(0x140),
        _ => random.one_of(&WRITTEN),
    }
}

/// A value for a register, so that a device whose queue it becomes part of writes into the sandbox, or nowhere.
fn value(offset: u64, sandbox: &Sandbox, random: &mut Random) -> u32 {
    const QUEUES: core::ops::Range<u64> = register::QUEUE_DESC..register::QUEUE_DEVICE + 8;
    if QUEUES.contains(&offset) {
        let address = match random.below(4) {
            0 => sandbox.rings().address() + (random.below(sandbox.rings().len() - 65536) & !0xfff),
            1 => sandbox.rings().address() + random.below(sandbox.rings().len() - 65536),
            2 => sandbox.data().address() + sandbox.data().len() + EDGE - random.below(4096),
            _ => random.one_of(&[0xc000_0000, 0xc000_1000, 0xfee0_0000, 0xffff_fff0]),
        };
        return address as u32;
    }
    match random.below(8) {
        0 => random.number() as u32,
        1 => u32::MAX,
        2 => 1 << random.below(32),
        _ => random.below(16) as u32,
    }
}

fn access(device: Mmio, sandbox: &Sandbox, random: &mut Random) {
    let offset = offset(random);
    let value = value(offset, sandbox, random);
    // A wide or crooked write must not make half an address that leads into this program: it is ignored, or it is a
    // part of what is written here, which is an address in the sandbox.
    match random.below(16) {
        0 => drop(device.read8(offset)),
        1 => drop(device.read16(offset)),
        2 | 3 => drop(device.read(offset)),
        4 => drop(device.read64(offset)),
        5 => device.write8(offset, value as u8),
        6 => device.write16(offset, value as u16),
        7 => device.write64(offset, u64::from(value)),
        _ => device.write(offset, value),
    }
}
