//! Resets while requests are under way, and what a device must not take once it is active.

use guest::random::Random;
use guest::time::{Deadline, pause};
use guest::virtio::mmio::register;
use guest::virtio::queue::{Descriptor, WRITE};

use crate::raw::{Chains, PATIENCE, Raw};
use crate::sandbox::Sandbox;

const MARK: u8 = 0xa5;
/// Ticks in which a device that still writes after its reset would be seen to.
const QUIET: u64 = 2_000_000;

/// One round.
pub fn attack(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    raw.start(random);
    let cases = match random.below(3) {
        0 => change_while_active(raw, sandbox, random),
        _ => reset_under_load(raw, sandbox, random),
    };
    raw.forget();
    cases
}

/// Fills every queue with buffers as its driver would, kicks, and resets at some moment soon after.
fn reset_under_load(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    let size = random.one_of(&[4096, 65536, 1 << 18]);
    let data = sandbox.data().part(0, size * 8);
    let headers = sandbox.some(random, 16 * 8);
    headers.fill(0);
    let sectors = raw.device().config64(0).max(size / 512);
    let mut cases = 1;
    for index in 0..raw.queue_count() {
        let is_drive = raw.kind() == 2;
        let queue = raw.queue(index);
        let mut chains = Chains::new(queue.size);
        for part in 0..8 {
            let buffer = Descriptor::of(data.part(part * size, size), WRITE);
            let fits = match is_drive {
                true => {
                    let header = headers.part(part * 16, 16);
                    header.put(8, random.below(sectors - size / 512 + 1));
                    let status = Descriptor::of(sandbox.some(random, 1), WRITE);
                    chains.add(queue, &[Descriptor::of(header, 0), buffer, status])
                }
                false => chains.add(queue, &[buffer]),
            };
            cases += u64::from(fits);
        }
        raw.publish(index);
    }
    let moment = Deadline::after(random.below(200_000));
    while !moment.is_over() {
        pause();
    }
    raw.device().reset();
    // From now on nobody writes there but us.
    data.fill(MARK);
    let quiet = Deadline::after(QUIET);
    while !quiet.is_over() {
        pause();
    }
    let step = 512;
    for at in (0..data.len()).step_by(step) {
        assert!(
            data.get::<u8>(at) == MARK,
            "a device wrote to memory after its reset"
        );
    }
    cases
}

/// Tells an active device other queues, sizes and features. It has to go on with those it has.
fn change_while_active(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    let device = raw.device();
    let index = random.below(raw.queue_count() as u64) as u32;
    device.write(register::QUEUE_SEL, index);
    for _ in 0..8 {
        let value = random.one_of(&[0, 1, 2, 7, 0x8000, 0xffff, 0x1_0000, u32::MAX]);
        match random.below(6) {
            0..3 => device.write(register::QUEUE_NUM, value),
            3 => device.write(register::QUEUE_READY, value & 1),
            4 => {
                device.write(register::DRIVER_FEATURES_SEL, value & 1);
                device.write(register::DRIVER_FEATURES, value);
            }
            _ => {
                let address = sandbox.rings().address() as u32;
                let which = random.one_of(&[
                    register::QUEUE_DESC,
                    register::QUEUE_DRIVER,
                    register::QUEUE_DEVICE,
                ]);
                device.write(which, address);
            }
        }
    }
    // The ring that it has is still the one: a chain without any bytes comes back from it, or breaks it.
    if raw.kind() == 2 {
        let header = sandbox.some(random, 16);
        header.fill(0);
        let status = sandbox.some(random, 1);
        status.fill(MARK);
        let queue = raw.queue(0);
        let before = queue.index;
        if queue.size < 2 {
            return 8;
        }
        Chains::new(queue.size).add(
            queue,
            &[Descriptor::of(header, 0), Descriptor::of(status, WRITE)],
        );
        raw.publish(0);
        let outcome = raw.wait(0, before, PATIENCE, |_| ());
        assert!(
            outcome.used == 1 && status.get::<u8>(0) != MARK,
            "an active device took another queue"
        );
    }
    9
}
