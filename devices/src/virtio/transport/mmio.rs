//! The MMIO transport (VIRTIO 1.3, 4.2): one page of registers per device.
//!
//! Register writes follow a state machine (VIRTIO 1.3, 3.1.1): features only between DRIVER and FEATURES_OK, queue
//! addresses and sizes only between FEATURES_OK and DRIVER_OK and never while the queue is ready. Everything else is
//! ignored and logged: a queue's size cannot change under a device that uses it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::Memory;
use crate::dirty::DirtyPages;
use crate::virtio::device::{DeviceKind, Resources, VirtioDevice};
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::VirtQueue;
use crate::virtio::state::QueuePosition;

/// Bytes of register space per device: one page, so that a guest may map each device apart.
pub const REGISTER_SPACE: u64 = 0x1000;
/// Offset of the register whose writes are kicks; the value written is the queue's number.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// "LPTN"; a driver must not depend on it (VIRTIO 1.3, 4.2.2).
const VENDOR: u32 = u32::from_le_bytes(*b"LPTN");

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// Feature bits of the transport and the rings, offered for every device.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device as the transport, the event loop and the API share it.
pub type SharedDevice = Arc<Mutex<dyn VirtioDevice>>;

/// A queue as the driver sets it up, before the device gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct QueueRegisters {
    max_size: u16,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        QueueRegisters {
            max_size,
            size: max_size,
            ready: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
        }
    }

    fn to_queue(
        self,
        event_idx: bool,
        position: QueuePosition,
    ) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(self.max_size)?;
        queue.set_next_avail(position.next_avail);
        queue.set_next_used(position.next_used);
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(GuestAddress(self.desc_table))?;
        queue.try_set_avail_ring_address(GuestAddress(self.avail_ring))?;
        queue.try_set_used_ring_address(GuestAddress(self.used_ring))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(self.ready);
        Ok(queue)
    }
}

/// The register page of one device.
pub struct MmioTransport {
    kind: DeviceKind,
    device: SharedDevice,
    memory: Arc<Memory>,
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    offered: u64,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    /// Where what the device writes is noted.
    dirty: Option<Arc<DirtyPages>>,
}

impl MmioTransport {
    /// A register page in its reset state. `kicks` has one descriptor per queue of the device; writing to it is what
    /// a kick does.
    pub fn new(
        device: SharedDevice,
        memory: Arc<Memory>,
        interrupt: Arc<Interrupt>,
        kicks: Vec<EventFd>,
    ) -> Self {
        let (kind, offered, queues) = {
            let device = lock(&device);
            let queues: Vec<_> = device
                .queue_sizes()
                .iter()
                .map(|&size| QueueRegisters::new(size))
                .collect();
            (device.kind(), device.features() | COMMON_FEATURES, queues)
        };
        debug_assert_eq!(queues.len(), kicks.len());
        MmioTransport {
            kind,
            device,
            memory,
            interrupt,
            kicks,
            offered,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            dirty: None,
        }
    }

    /// Lets what the device writes be noted in `dirty`, from its next activation on.
    pub fn track(&mut self, dirty: Option<Arc<DirtyPages>>) {
        self.dirty = dirty;
    }

    /// A read of `data.len()` bytes at `offset` of the page. Registers are 32 bits wide and aligned (VIRTIO 1.3,
    /// 4.2.2.2); anything else reads as 0. Configuration space is read at any width.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            lock(&self.device).read_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
        } else if let (Ok(bytes), 0) = (<&mut [u8; 4]>::try_from(&mut *data), offset % 4) {
            *bytes = self.read_register(offset as u32).to_le_bytes();
        } else {
            guest_warn!(
                "virtio-mmio: read of {} bytes at register {offset:#x} ignored",
                data.len()
            );
        }
    }

    /// A write at `offset` of the page, with the same rule of widths as [`MmioTransport::read`].
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            if self.status & DRIVER != 0 && !self.is_broken() {
                lock(&self.device).write_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
            }
        } else if let (Ok(bytes), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset as u32, u32::from_le_bytes(bytes));
        } else {
            guest_warn!(
                "virtio-mmio: write of {} bytes at register {offset:#x} ignored",
                data.len()
            );
        }
    }

    /// Whether the driver has set DRIVER_OK and the device works.
    pub fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    fn is_broken(&self) -> bool {
        self.interrupt.is_broken() || self.status & FAILED != 0
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.kind as u32,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, self.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |q| u32::from(q.max_size)),
            VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |q| u32::from(q.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status(),
            // A shared memory region that does not exist has length -1 (VIRTIO 1.3, 4.2.2.1).
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => {
                guest_warn!("virtio-mmio: read of register {offset:#x} ignored");
                0
            }
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_SHM_SEL => {}
            _ => self.set_queue_register(offset, value),
        }
    }

    fn status(&self) -> u32 {
        if self.interrupt.is_broken() {
            self.status | NEEDS_RESET
        } else {
            self.status
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            guest_warn!(
                "virtio-mmio: driver features written at status {:#x} ignored",
                self.status
            );
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | value,
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | (value << 32),
            _ if value == 0 => {}
            // Bits 64 and up are never offered: remember only that the driver took too many.
            _ => self.driver_features |= !self.offered,
        }
    }

    fn set_queue_register(&mut self, offset: u32, value: u32) {
        let status = self.status;
        let select = self.queue_select;
        let configuring = status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK;
        let selected = usize::try_from(select)
            .ok()
            .and_then(|index| self.queues.get_mut(index));
        let Some(queue) = selected.filter(|_| configuring) else {
            guest_warn!(
                "virtio-mmio: write of {value:#x} to register {offset:#x} of queue {select} at status {status:#x} \
                 ignored"
            );
            return;
        };
        // A queue may be unready again before DRIVER_OK; nothing else may change while it is ready.
        if queue.ready && offset != VIRTIO_MMIO_QUEUE_READY {
            guest_warn!(
                "virtio-mmio: write to register {offset:#x} of ready queue {select} ignored"
            );
            return;
        }
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && size <= queue.max_size => queue.size = size,
                _ => guest_warn!("virtio-mmio: queue {select} size {value} refused"),
            },
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 == 1,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used_ring, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used_ring, value),
            _ => guest_warn!("virtio-mmio: write to register {offset:#x} ignored"),
        }
    }

    fn kick(&self, queue: u32) {
        // Normally KVM turns this write into the event itself; this is the way without that.
        let kick = usize::try_from(queue).ok().and_then(|i| self.kicks.get(i));
        match kick {
            // The counter cannot overflow in practice, and a full counter is a pending kick all the same.
            Some(kick) => drop(kick.write(1)),
            None => guest_warn!("virtio-mmio: kick of queue {queue}, which does not exist"),
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.status;
        let added = value & !old;
        // Bits are only ever added; a driver clears them by a reset.
        if old & !value & !NEEDS_RESET != 0 || old & FAILED != 0 {
            guest_warn!("virtio-mmio: status {old:#x} -> {value:#x} ignored");
            return;
        }
        for bit in [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED] {
            if added & bit != 0 && !self.add_status(bit) {
                guest_warn!(
                    "virtio-mmio: status bit {bit:#x} refused at {:#x}",
                    self.status
                );
                return;
            }
        }
    }

    /// Sets one status bit if it is its turn. False: refused, and the status is as before.
    fn add_status(&mut self, bit: u32) -> bool {
        let expected = match bit {
            ACKNOWLEDGE => 0,
            DRIVER => ACKNOWLEDGE,
            FEATURES_OK => ACKNOWLEDGE | DRIVER,
            DRIVER_OK => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            _ => self.status,
        };
        if self.status != expected {
            return false;
        }
        if bit == FEATURES_OK && !self.features_acceptable() {
            return false;
        }
        self.status |= bit;
        if bit == DRIVER_OK {
            self.activate();
        }
        true
    }

    /// VERSION_1 is required: there is no legacy interface (VIRTIO 1.3, 6.2).
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn activate(&mut self) {
        let start = QueuePosition {
            next_avail: 0,
            next_used: 0,
        };
        let positions = vec![start; self.queues.len()];
        if let Err(reason) = self.try_activate(&positions) {
            guest_warn!("virtio {:?}: activation failed: {reason}", self.kind);
            self.interrupt.needs_reset();
            return;
        }
        // What the driver made available before DRIVER_OK had no kick.
        for kick in &self.kicks {
            drop(kick.write(1));
        }
    }

    fn try_activate(&self, positions: &[QueuePosition]) -> Result<(), String> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, (registers, position)) in self.queues.iter().zip(positions).enumerate() {
            let queue = registers
                .to_queue(event_idx, *position)
                .map_err(|e| format!("queue {index}: {e}"))?;
            let queue = VirtQueue::new(queue, index, self.memory.clone(), self.interrupt.clone())
                .map_err(|e| format!("queue {index}: {e}"))?;
            queues.push(queue.tracked(self.dirty.clone()));
        }
        let resources = Resources {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.driver_features,
        };
        lock(&self.device)
            .activate(resources)
            .map_err(|e| e.to_string())
    }

    fn reset(&mut self) {
        if self.status & DRIVER_OK != 0 {
            lock(&self.device).reset();
        }
        self.interrupt.reset();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
}

/// Locks a device. A panic while it was locked aborts the process in release; in tests its state is still readable.
pub fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

mod saved;

#[cfg(test)]
mod tests;
