//! Devices, by drivers that do what they like: chains well made or not, rings and descriptors written over, kicks and
//! events in any order, resets. Afterwards a driver that follows the rules has to find the device working.

pub mod drive;
mod good;
pub mod host;

use std::collections::HashMap;
use std::sync::MutexGuard;

use arbitrary::{Arbitrary, Result, Unstructured};
use lepton_devices::virtio::block::EngineKind;
use lepton_devices::virtio::device::{DeviceError, Progress, VirtioDevice};
use lepton_devices::virtio::testing::{
    Buffer, HOLE_END, HOLE_START, MEMORY_SIZE, RawDescriptor, TestDriver,
};
use lepton_devices::virtio::transport::mmio::{SharedDevice, lock};
use vm_memory::{Bytes, GuestAddress};

use drive::Form;
use host::{Host, Kind};

/// Rings are small, so that they go round.
const QUEUE_SIZE: u16 = 16;
/// Bytes of buffers between two resets.
const MAX_HEAP: usize = 4 << 20;
/// A device that still has work after so many calls, with nothing new, never ends.
const MAX_TURNS: usize = 64;
const MAX_STEPS: usize = 200;

/// A place in guest memory.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Place {
    /// In the rings of a queue.
    Ring(u8, u16),
    /// In a buffer.
    Heap(u16),
    /// At an edge of memory, or of the hole.
    Edge(u8, i8),
    Any(u64),
}

impl Place {
    fn address(self) -> u64 {
        let end = MEMORY_SIZE + (HOLE_END - HOLE_START);
        match self {
            Place::Ring(queue, offset) => u64::from(queue % 4) * 0x8_0000 + u64::from(offset),
            Place::Heap(offset) => (4 << 20) + u64::from(offset),
            Place::Edge(edge, offset) => {
                let edges = [0, HOLE_START, HOLE_END, end, 1 << 32];
                edges[usize::from(edge) % edges.len()].wrapping_add_signed(i64::from(offset) * 16)
            }
            Place::Any(address) => address,
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Part<'a> {
    is_writable: bool,
    /// Bytes to write, or the length of the bytes to read if there are none.
    len: u16,
    bytes: &'a [u8],
}

/// What a driver, or the host, does.
#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A chain as it should be; with a header of the device's kind in front, if it has one.
    Offer {
        queue: u8,
        has_header: bool,
        is_indirect: bool,
        parts: Vec<Part<'a>>,
    },
    Descriptor {
        queue: u8,
        index: u8,
        place: Place,
        len: u32,
        flags: u16,
        next: u16,
    },
    Publish {
        queue: u8,
        head: u16,
    },
    AvailableIndex {
        queue: u8,
        index: u16,
    },
    Poke {
        place: Place,
        bytes: &'a [u8],
    },
    Kick(u8),
    Event(u8),
    /// Something comes from the host.
    Host {
        what: u8,
        bytes: &'a [u8],
    },
    Quiesce,
    Reset {
        features: u64,
    },
    Config {
        offset: u16,
        bytes: &'a [u8],
    },
}

pub struct Rig {
    device: SharedDevice,
    pub driver: TestDriver,
    pub host: Host,
    kind: Kind,
    is_broken: bool,
    /// The rings may have been written over: what is in them tells nothing.
    is_tampered: bool,
    room: HashMap<(usize, u16), u64>,
    allocated: usize,
}

impl Rig {
    fn new(kind: Kind) -> Self {
        let (device, host) = Host::make(kind);
        let sizes = vec![QUEUE_SIZE; lock(&device).queue_sizes().len()];
        let mut rig = Rig {
            device,
            driver: TestDriver::new(&sizes),
            host,
            kind,
            is_broken: false,
            is_tampered: false,
            room: HashMap::new(),
            allocated: 0,
        };
        rig.activate(u64::MAX);
        rig
    }

    /// The device.
    fn device(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        lock(&self.device)
    }

    fn activate(&mut self, features: u64) {
        // Event indices are the transport's affair; VERSION_1 is never missing.
        let features = features & self.device().features() | 1 << 32;
        let resources = self.driver.resources(features);
        let activated = self.device().activate(resources);
        self.is_broken = activated.is_err();
    }

    pub fn reset(&mut self, features: u64) {
        self.device().reset();
        self.driver.reset();
        self.room.clear();
        self.is_tampered = false;
        self.allocated = 0;
        self.activate(features);
    }

    /// Lets the device work as the event loop does: not once it broke down.
    fn work(&mut self, work: impl Fn(&mut dyn VirtioDevice) -> Outcome) {
        for turn in 0.. {
            if self.is_broken {
                return;
            }
            let outcome = work(&mut *self.device());
            match outcome {
                Ok(Progress::Done) => break,
                Ok(Progress::Again) => assert!(turn < MAX_TURNS, "the device works for ever"),
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    self.is_broken = true;
                }
            }
        }
        self.check_used();
    }

    /// What comes back was offered, and no more was written than there was room for.
    fn check_used(&mut self) {
        if self.is_tampered {
            return;
        }
        for (number, queue) in self.driver.queues.iter_mut().enumerate() {
            for (head, written) in queue.used() {
                let room = self.room.remove(&(number, head));
                let room = room.unwrap_or_else(|| panic!("queue {number}: {head} was not offered"));
                assert!(u64::from(written) <= room, "{written} bytes in {room}");
            }
        }
    }

    fn queue(&self, queue: u8) -> usize {
        usize::from(queue) % self.driver.queues.len()
    }

    fn buffer(&mut self, part: &Part<'_>) -> Option<Buffer> {
        let len = match part.bytes.len() {
            0 => usize::from(part.len),
            len => len,
        };
        self.allocated += len + 16;
        if self.allocated > MAX_HEAP {
            return None;
        }
        Some(match (part.is_writable, part.bytes.is_empty()) {
            (true, _) => self.driver.writable(len),
            (false, true) => self.driver.readable(&vec![0; len]),
            (false, false) => self.driver.readable(part.bytes),
        })
    }

    fn offer(&mut self, queue: usize, is_indirect: bool, mut buffers: Vec<Buffer>) {
        // Readable ones first.
        buffers.sort_by_key(|buffer| buffer.writable);
        let free = self.driver.queues[queue].free_descriptors();
        if buffers.is_empty() || free == 0 || (!is_indirect && buffers.len() > free) {
            return;
        }
        let room = buffers.iter().filter(|buffer| buffer.writable);
        let room = room.map(|buffer| u64::from(buffer.len)).sum();
        let head = match is_indirect {
            true => {
                self.allocated += 16 * buffers.len() + 16;
                if self.allocated > MAX_HEAP {
                    return;
                }
                let table = self.driver.alloc(16 * buffers.len());
                self.driver.queues[queue].offer_indirect(table, &buffers)
            }
            false => self.driver.queues[queue].offer(&buffers),
        };
        self.room.insert((queue, head), room);
    }

    fn step(&mut self, step: Step<'_>, input: &mut Unstructured<'_>) -> Result<()> {
        match step {
            Step::Offer {
                queue,
                has_header,
                is_indirect,
                parts,
            } => {
                let mut buffers = Vec::new();
                if has_header {
                    let header = self.host.header(self.kind, input)?;
                    buffers.push(self.driver.readable(&header));
                    self.allocated += header.len() + 16;
                }
                buffers.extend(parts.iter().filter_map(|part| self.buffer(part)));
                self.offer(self.queue(queue), is_indirect, buffers);
            }
            Step::Descriptor {
                queue,
                index,
                place,
                len,
                flags,
                next,
            } => {
                self.is_tampered = true;
                let queue = self.queue(queue);
                let descriptor = RawDescriptor {
                    addr: place.address(),
                    len,
                    flags: flags % 8,
                    next: next % (QUEUE_SIZE * 2),
                };
                let index = u16::from(index) % QUEUE_SIZE;
                self.driver.queues[queue].write_descriptor(index, descriptor);
            }
            Step::Publish { queue, head } => {
                self.is_tampered = true;
                let queue = self.queue(queue);
                self.driver.queues[queue].publish(head % (QUEUE_SIZE * 2));
            }
            Step::AvailableIndex { queue, index } => {
                self.is_tampered = true;
                let queue = self.queue(queue);
                self.driver.queues[queue].set_avail_idx(index);
            }
            Step::Poke { place, bytes } => {
                self.is_tampered = true;
                // Outside of memory there is nothing to be written.
                let _ = self
                    .driver
                    .memory
                    .write_slice(bytes, GuestAddress(place.address()));
            }
            Step::Kick(queue) => {
                let queue = self.queue(queue);
                self.work(|device| device.process_queue(queue));
            }
            Step::Event(source) => {
                let source = usize::from(source) % self.device().sources().len().max(1);
                self.work(|device| device.process_source(source));
            }
            Step::Host { what, bytes } => self.host.act(what, bytes),
            Step::Quiesce => self.work(|device| device.quiesce().map(|()| Progress::Done)),
            Step::Reset { features } => self.reset(features),
            Step::Config { offset, bytes } => {
                self.device().write_config(offset.into(), bytes);
                let mut config = vec![0xaa; bytes.len().min(256)];
                self.device().read_config(offset.into(), &mut config);
            }
        }
        Ok(())
    }
}

/// Of one call of a device.
type Outcome = std::result::Result<Progress, DeviceError>;

fn run(kind: Kind, data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut rig = Rig::new(kind);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut input) else {
            break;
        };
        if rig.step(step, &mut input).is_err() {
            break;
        }
    }
    // A device that is saved between two steps tells where it is, and a broken one need not.
    if !rig.is_broken && rig.device().quiesce().is_ok() {
        let _ = rig.device().save();
        assert!(rig.device().positions().is_some());
    }
    // Without any feature, and with all of them.
    for features in [0, u64::MAX] {
        rig.reset(features);
        good::driver(&mut rig, kind);
    }
    let Rig { device, host, .. } = rig;
    drop(device);
    if let Host::Block(drive) = host {
        drive.check();
    }
}

/// virtio-blk, a raw image.
pub fn blk(data: &[u8]) {
    run(Kind::Block(Form::RAW), data);
}

/// The same by io_uring.
pub fn blk_async(data: &[u8]) {
    let form = Form {
        engine: EngineKind::Async,
        ..Form::RAW
    };
    run(Kind::Block(form), data);
}

/// virtio-blk, an overlay. The first byte says by which engine.
pub fn blk_overlay(data: &[u8]) {
    let Some((&first, data)) = data.split_first() else {
        return;
    };
    let form = Form {
        is_overlay: true,
        engine: match first & 1 {
            0 => EngineKind::Async,
            _ => EngineKind::Sync,
        },
    };
    run(Kind::Block(form), data);
}

/// virtio-net.
pub fn net(data: &[u8]) {
    run(Kind::Net, data);
}

/// virtio-vsock.
pub fn vsock(data: &[u8]) {
    run(Kind::Vsock, data);
}
