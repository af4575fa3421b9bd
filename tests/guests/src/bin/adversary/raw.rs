//! A device with rings that anything can be written to.

use guest::memory::Region;
use guest::random::Random;
use guest::time::{Deadline, pause};
use guest::virtio::mmio::{Mmio, register, status};
use guest::virtio::queue::Descriptor;
use guest::virtio::{EVENT_IDX, INDIRECT_DESC, VERSION_1};

use crate::sandbox::Sandbox;

/// Most queues of a device.
pub const MAX_QUEUES: usize = 3;
/// Ticks to wait for a device that makes no progress, until it is asked whether it is broken.
const GLANCE: u64 = 400_000;
/// Ticks for [`Raw::wait`] that a device needs for a whole table in any case, however busy the host.
pub const PATIENCE: u64 = 2_000_000_000;

/// A queue's memory.
#[derive(Clone, Copy)]
pub struct RawQueue {
    /// Descriptors.
    pub table: Region,
    /// What is available.
    pub avail: Region,
    /// What is used.
    pub used: Region,
    /// Entries now.
    pub size: u16,
    /// Entries at most.
    pub max: u16,
    /// The index published last.
    pub index: u16,
}

impl RawQueue {
    /// Puts a head in the next place; [`Raw::publish`] counts it.
    pub fn offer(&mut self, head: u16) {
        let place = u64::from(self.index % self.size);
        self.avail.put(4 + place * 2, head);
        self.index = self.index.wrapping_add(1);
    }

    fn used_index(&self) -> u16 {
        self.used.get(2)
    }
}

/// What became of what was offered.
pub struct Outcome {
    /// Chains that the device gave back, as the used ring says, which may have been written to by anybody.
    pub used: u16,
    /// It needs a reset.
    pub broken: bool,
}

impl Outcome {
    /// Chains dealt with: those given back, and the one that broke the device.
    pub fn cases(&self) -> u64 {
        u64::from(self.used) + u64::from(self.broken)
    }
}

/// A device.
pub struct Raw {
    device: Mmio,
    kind: u32,
    offered: u64,
    queues: [Option<RawQueue>; MAX_QUEUES],
    /// The features agreed on.
    pub features: u64,
    active: bool,
}

impl Raw {
    /// Takes memory for the rings of `device`.
    pub fn new(device: Mmio, sandbox: &mut Sandbox) -> Self {
        device.reset();
        let mut queues = [None; MAX_QUEUES];
        for (queue, index) in queues.iter_mut().zip(0..) {
            device.write(register::QUEUE_SEL, index);
            let max = device.read(register::QUEUE_NUM_MAX) as u16;
            if max > 0 {
                let entries = u64::from(max);
                *queue = Some(RawQueue {
                    table: sandbox.take_ring(entries * Descriptor::SIZE),
                    avail: sandbox.take_ring(6 + entries * 2),
                    used: sandbox.take_ring(6 + entries * 8),
                    size: max,
                    max,
                    index: 0,
                });
            }
        }
        Self {
            device,
            kind: device.read(register::DEVICE_ID),
            offered: device.offered(),
            queues,
            features: 0,
            active: false,
        }
    }

    /// The device.
    pub fn device(&self) -> Mmio {
        self.device
    }

    /// Its kind.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// How many queues it has.
    pub fn queue_count(&self) -> usize {
        self.queues.iter().flatten().count()
    }

    /// A queue.
    pub fn queue(&mut self, index: usize) -> &mut RawQueue {
        match &mut self.queues[index] {
            Some(queue) => queue,
            None => panic!("there is no queue {index}"),
        }
    }

    /// The device is no longer as [`Raw::start`] left it.
    pub fn forget(&mut self) {
        self.active = false;
    }

    /// Sees to it that the device is active, by a reset and a good negotiation if it was not.
    pub fn ensure_active(&mut self, random: &mut Random) {
        if !self.active {
            self.start(random);
        }
    }

    /// Resets and starts the device: some of its features, queues of some size, everything as it should be.
    pub fn start(&mut self, random: &mut Random) {
        self.agree(random);
        for index in 0..self.queue_count() {
            self.set_queue(index, random);
        }
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.device.write(register::STATUS, all);
        self.active = true;
    }

    /// Resets the device and goes as far as FEATURES_OK.
    pub fn agree(&mut self, random: &mut Random) {
        use status::*;
        let device = self.device;
        device.write(register::STATUS, 0);
        device.write(register::STATUS, ACKNOWLEDGE);
        device.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        let mut wanted = VERSION_1 | INDIRECT_DESC | EVENT_IDX;
        wanted |= random.number() & 0xff_ffff;
        if random.once_in(4) {
            wanted &= !(EVENT_IDX | INDIRECT_DESC);
        }
        // Offloads of the network need checksums, and what a driver must not ask for is not asked for here.
        if self.kind == 1 {
            wanted |= 0b11;
        }
        self.features = self.offered & wanted;
        device.write(register::DRIVER_FEATURES_SEL, 1);
        device.write(register::DRIVER_FEATURES, (self.features >> 32) as u32);
        device.write(register::DRIVER_FEATURES_SEL, 0);
        device.write(register::DRIVER_FEATURES, self.features as u32);
        device.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Makes queue `index` ready, in its own memory.
    fn set_queue(&mut self, index: usize, random: &mut Random) {
        let device = self.device;
        let queue = self.queue(index);
        queue.size = queue.max;
        queue.index = 0;
        queue.avail.fill(0);
        queue.used.fill(0);
        device.write(register::QUEUE_SEL, index as u32);
        if random.once_in(4) {
            queue.size = (1 << random.below(u64::from(queue.max.ilog2()) + 1)) as u16;
            device.write(register::QUEUE_NUM, u32::from(queue.size));
        }
        // After a reset the high halves are 0, and all of this lies below 4 GiB.
        device.write(register::QUEUE_DESC, queue.table.address() as u32);
        device.write(register::QUEUE_DRIVER, queue.avail.address() as u32);
        device.write(register::QUEUE_DEVICE, queue.used.address() as u32);
        device.write(register::QUEUE_READY, 1);
    }

    /// Lets the device see what was offered in queue `index`.
    pub fn publish(&mut self, index: usize) {
        let queue = self.queue(index);
        let new = queue.index;
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        queue.avail.put(2, new);
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        self.device.write(register::QUEUE_NOTIFY, index as u32);
    }

    /// Starts the device, and offers more than its first queue has places for: it asks for a reset, in a moment.
    pub fn spoil(&mut self, random: &mut Random) {
        self.start(random);
        let queue = self.queue(0);
        queue.index = queue.index.wrapping_add(queue.size).wrapping_add(1);
        self.publish(0);
        let moment = Deadline::after(GLANCE);
        while self.device.status() & status::NEEDS_RESET == 0 && !moment.is_over() {
            pause();
        }
        self.active = false;
    }

    /// Waits until the device has dealt with all that queue `index` has, or is broken, or `patience` is over. `meanwhile` is done again and again. A broken device is started anew the next time.
    pub fn wait(
        &mut self,
        index: usize,
        before: u16,
        patience: u64,
        mut meanwhile: impl FnMut(&mut RawQueue),
    ) -> Outcome {
        let device = self.device;
        let queue = self.queue(index);
        let give_up = Deadline::after(patience);
        let mut glance = Deadline::after(GLANCE);
        let mut seen = before;
        let mut broken = false;
        while queue.used_index() != queue.index {
            if queue.used_index() != seen {
                seen = queue.used_index();
                glance = Deadline::after(GLANCE);
            }
            if glance.is_over() {
                broken = device.status() & status::NEEDS_RESET != 0;
                if broken || give_up.is_over() {
                    break;
                }
                glance = Deadline::after(GLANCE);
            }
            meanwhile(queue);
            pause();
        }
        let used = queue.used_index().wrapping_sub(before);
        let offered = queue.index.wrapping_sub(before);
        if broken {
            self.active = false;
        }
        Outcome {
            used: used.min(offered),
            broken,
        }
    }
}

/// Chains of descriptors, each in places of its own.
pub struct Chains {
    next: u16,
    size: u16,
}

impl Chains {
    /// None yet, in a table of `size`.
    pub fn new(size: u16) -> Self {
        Self { next: 0, size }
    }

    /// Stores a chain of `parts` and offers it. False: there is no room left in the table.
    pub fn add(&mut self, queue: &mut RawQueue, parts: &[Descriptor]) -> bool {
        let len = parts.len() as u16;
        if len > self.size - self.next {
            return false;
        }
        let head = self.next;
        for part in parts {
            let last = self.next + 1 == head + len;
            let part = if last {
                *part
            } else {
                part.then(self.next + 1)
            };
            part.store(queue.table, self.next);
            self.next += 1;
        }
        queue.offer(head);
        true
    }
}
