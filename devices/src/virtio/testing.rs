//! The driver's side of a device, for tests: guest memory, rings and an interrupt line that counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::device::Resources;
use super::interrupt::{Interrupt, IrqLine};
use super::queue::VirtQueue;
use crate::Memory;

/// Bytes of guest memory: 32 MiB in two regions with a hole between them.
pub const MEMORY_SIZE: u64 = 32 << 20;
/// First address of the hole.
pub const HOLE_START: u64 = 16 << 20;
/// One past the last address of the hole.
pub const HOLE_END: u64 = 24 << 20;
/// Where buffers are allocated from; rings lie below.
const HEAP_START: u64 = 4 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Counts the edges.
#[derive(Debug, Default)]
pub struct CountingLine(AtomicUsize);

impl IrqLine for CountingLine {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Where it is.
    pub addr: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device may write it, not read it.
    pub writable: bool,
}

/// One raw descriptor, as hostile as a test likes.
#[derive(Debug, Clone, Copy)]
pub struct RawDescriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A driver with its guest memory.
pub struct TestDriver {
    pub memory: Arc<Memory>,
    pub interrupt: Arc<Interrupt>,
    pub queues: Vec<TestQueue>,
    line: Arc<CountingLine>,
    heap: u64,
}

impl TestDriver {
    /// A driver whose rings have these sizes.
    pub fn new(queue_sizes: &[u16]) -> Self {
        let low = (GuestAddress(0), HOLE_START as usize);
        let high = (GuestAddress(HOLE_END), (MEMORY_SIZE - HOLE_START) as usize);
        let memory = Arc::new(Memory::from_ranges(&[low, high]).unwrap());
        let line = Arc::new(CountingLine::default());
        let queues = queue_sizes
            .iter()
            .enumerate()
            .map(|(index, &size)| TestQueue::new(memory.clone(), index as u64 * 0x8_0000, size))
            .collect();
        TestDriver {
            interrupt: Arc::new(Interrupt::new(line.clone())),
            memory,
            queues,
            line,
            heap: HEAP_START,
        }
    }

    /// What the transport hands to a device with these negotiated features.
    pub fn resources(&self, features: u64) -> Resources {
        let queue = |(index, queue): (usize, &TestQueue)| {
            let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
            VirtQueue::new(queue.device_side(), index, memory, interrupt).unwrap()
        };
        Resources {
            memory: self.memory.clone(),
            queues: self.queues.iter().enumerate().map(queue).collect(),
            interrupt: self.interrupt.clone(),
            features,
        }
    }

    /// Forgets rings and buffers, as a driver does around a device reset.
    pub fn reset(&mut self) {
        self.heap = HEAP_START;
        self.interrupt.reset();
        for queue in &mut self.queues {
            *queue = TestQueue::new(self.memory.clone(), queue.base, queue.size);
        }
    }

    /// Interrupts raised since the last call.
    pub fn interrupts(&self) -> usize {
        self.line.0.swap(0, Ordering::SeqCst)
    }

    /// `len` bytes of guest memory that no one else uses, 16-byte aligned, filled with 0xaa.
    pub fn alloc(&mut self, len: usize) -> GuestAddress {
        let addr = self.heap;
        self.heap = (self.heap + len as u64).next_multiple_of(16);
        assert!(self.heap <= HOLE_START, "test heap is full");
        self.memory
            .write_slice(&vec![0xaa; len], GuestAddress(addr))
            .unwrap();
        GuestAddress(addr)
    }

    /// Gives all buffers free again.
    pub fn free_all(&mut self) {
        self.heap = HEAP_START;
    }

    /// A buffer for the device to read, holding `bytes`.
    pub fn readable(&mut self, bytes: &[u8]) -> Buffer {
        let addr = self.alloc(bytes.len());
        self.memory.write_slice(bytes, addr).unwrap();
        Buffer {
            addr,
            len: bytes.len() as u32,
            writable: false,
        }
    }

    /// A buffer of `len` bytes for the device to write.
    pub fn writable(&mut self, len: usize) -> Buffer {
        Buffer {
            addr: self.alloc(len),
            len: len as u32,
            writable: true,
        }
    }

    /// What a buffer holds now.
    pub fn bytes(&self, buffer: Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.len as usize];
        self.memory.read_slice(&mut bytes, buffer.addr).unwrap();
        bytes
    }
}

/// The driver's side of one split queue.
pub struct TestQueue {
    memory: Arc<Memory>,
    base: u64,
    size: u16,
    free: Vec<u16>,
    /// Descriptors of each chain in flight, by its head.
    chains: Vec<Vec<u16>>,
    avail_idx: u16,
    used_idx: u16,
}

impl TestQueue {
    fn new(memory: Arc<Memory>, base: u64, size: u16) -> Self {
        let queue = TestQueue {
            memory,
            base,
            size,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            avail_idx: 0,
            used_idx: 0,
        };
        let len = queue.used_ring().0 + 6 + 8 * u64::from(size) - base;
        queue
            .memory
            .write_slice(&vec![0; len as usize], GuestAddress(base))
            .unwrap();
        queue
    }

    /// The queue as the device sees it.
    pub fn device_side(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue.try_set_avail_ring_address(self.avail_ring()).unwrap();
        queue.try_set_used_ring_address(self.used_ring()).unwrap();
        queue.set_ready(true);
        queue
    }

    /// Number of descriptors not in use.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain of `buffers` available and returns its head.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let at = self.free.len() - buffers.len();
        let indices: Vec<u16> = self.free.drain(at..).rev().collect();
        for (i, buffer) in buffers.iter().enumerate() {
            let more = i + 1 < buffers.len();
            self.write_descriptor(
                indices[i],
                RawDescriptor {
                    addr: buffer.addr.0,
                    len: buffer.len,
                    flags: if buffer.writable { WRITE } else { 0 } | if more { NEXT } else { 0 },
                    next: if more { indices[i + 1] } else { 0 },
                },
            );
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.publish(head);
        head
    }

    /// The same with an indirect table written at `table`.
    pub fn offer_indirect(&mut self, table: GuestAddress, buffers: &[Buffer]) -> u16 {
        for (i, buffer) in buffers.iter().enumerate() {
            let more = i + 1 < buffers.len();
            let descriptor = RawDescriptor {
                addr: buffer.addr.0,
                len: buffer.len,
                flags: if buffer.writable { WRITE } else { 0 } | if more { NEXT } else { 0 },
                next: if more { i as u16 + 1 } else { 0 },
            };
            self.store(table.unchecked_add(16 * i as u64), descriptor);
        }
        let head = self.free.pop().unwrap();
        self.write_descriptor(
            head,
            RawDescriptor {
                addr: table.0,
                len: 16 * buffers.len() as u32,
                flags: INDIRECT,
                next: 0,
            },
        );
        self.chains[usize::from(head)] = vec![head];
        self.publish(head);
        head
    }

    /// Writes one descriptor as it is.
    pub fn write_descriptor(&mut self, index: u16, descriptor: RawDescriptor) {
        self.store(GuestAddress(self.base + 16 * u64::from(index)), descriptor);
    }

    fn store(&self, addr: GuestAddress, descriptor: RawDescriptor) {
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&descriptor.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        self.memory.write_slice(&bytes, addr).unwrap();
    }

    /// Puts `head` in the available ring, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        let ring = self.avail_ring();
        self.memory
            .write_obj(head.to_le(), ring.unchecked_add(4 + 2 * slot))
            .unwrap();
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Writes the available ring's index, whatever it is.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.memory
            .write_obj(index.to_le(), self.avail_ring().unchecked_add(2))
            .unwrap();
    }

    /// Sets or clears the available ring's NO_INTERRUPT flag.
    pub fn set_no_interrupt(&mut self, on: bool) {
        self.memory
            .write_obj(u16::from(on).to_le(), self.avail_ring())
            .unwrap();
    }

    /// Whether the device asked not to be kicked.
    pub fn kicks_suppressed(&self) -> bool {
        let flags: u16 = self.memory.read_obj(self.used_ring()).unwrap();
        u16::from_le(flags) & 1 != 0
    }

    /// Takes what the device used since the last call: each chain's head and the bytes written to it.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let ring = self.used_ring();
        let end: u16 = self.memory.read_obj(ring.unchecked_add(2)).unwrap();
        let mut used = Vec::new();
        while self.used_idx != u16::from_le(end) {
            let slot = u64::from(self.used_idx % self.size);
            let [head, len]: [u32; 2] = self
                .memory
                .read_obj(ring.unchecked_add(4 + 8 * slot))
                .unwrap();
            let head = u32::from_le(head) as u16;
            let indices = std::mem::take(&mut self.chains[usize::from(head)]);
            self.free.extend(indices.into_iter().rev());
            used.push((head, u32::from_le(len)));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        used
    }

    fn avail_ring(&self) -> GuestAddress {
        GuestAddress(self.base + 16 * u64::from(self.size))
    }

    fn used_ring(&self) -> GuestAddress {
        let end = self.avail_ring().0 + 6 + 2 * u64::from(self.size);
        GuestAddress(end.next_multiple_of(4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_and_device_side_agree() {
        let mut driver = TestDriver::new(&[8]);
        let mut queue = driver.resources(0).queues.remove(0);
        for round in 0..20u16 {
            driver.free_all();
            let out = driver.readable(&[round as u8; 3]);
            let room = driver.writable(5);
            let head = driver.queues[0].offer(&[out, room]);
            let chain = queue.pop().unwrap().unwrap();
            assert_eq!(chain.head(), head);
            let mut read = [0; 3];
            chain
                .readable
                .read_at(&driver.memory, 0, &mut read)
                .unwrap();
            assert_eq!(read, [round as u8; 3]);
            chain.writable.write_at(&driver.memory, 1, &[7, 8]).unwrap();
            queue.complete(head, 3).unwrap();
            assert_eq!(driver.queues[0].used(), [(head, 3)]);
            assert_eq!(driver.bytes(room), [0xaa, 7, 8, 0xaa, 0xaa]);
            assert_eq!(driver.queues[0].free_descriptors(), 8);
        }
        assert!(queue.pop().unwrap().is_none());
    }

    #[test]
    fn an_indirect_chain_is_one_descriptor() {
        let mut driver = TestDriver::new(&[1]);
        let mut queue = driver.resources(0).queues.remove(0);
        let buffers = [
            driver.readable(b"ab"),
            driver.readable(b"c"),
            driver.writable(4),
        ];
        let table = driver.alloc(48);
        let head = driver.queues[0].offer_indirect(table, &buffers);
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(
            (chain.head(), chain.readable.len(), chain.writable.len()),
            (head, 3, 4)
        );
    }
}
