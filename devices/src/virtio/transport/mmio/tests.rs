use super::*;

use std::os::fd::RawFd;

use proptest::prelude::*;

use crate::virtio::device::{DeviceError, Progress};
use crate::virtio::queue::QueueError;
use crate::virtio::state::{DeviceState, RestoreError};
use crate::virtio::testing::TestDriver;
use crate::virtio::vsock::VsockState;

const QUEUE_SIZE: u16 = 16;
const DEVICE_FEATURE: u64 = 1 << 5;
const POSITION: QueuePosition = QueuePosition {
    next_avail: 65535,
    next_used: 65534,
};

/// What happened to a device.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    activations: usize,
    resets: usize,
    features: u64,
    config_writes: Vec<(u64, Vec<u8>)>,
}

struct Probe {
    seen: Arc<Mutex<Seen>>,
    refuse: bool,
}

impl VirtioDevice for Probe {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }
    fn features(&self) -> u64 {
        DEVICE_FEATURE
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut seen = self.seen.lock().unwrap();
        seen.config_writes.push((offset, data.to_vec()));
    }
    fn activate(&mut self, resources: Resources) -> Result<(), DeviceError> {
        let mut seen = self.seen.lock().unwrap();
        seen.activations += 1;
        seen.features = resources.features;
        if self.refuse {
            return Err(DeviceError::Queue {
                index: 0,
                source: QueueError::InFlight(0),
            });
        }
        Ok(())
    }
    fn reset(&mut self) {
        self.seen.lock().unwrap().resets += 1;
    }
    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }
    fn process_queue(&mut self, _: usize) -> Result<Progress, DeviceError> {
        Ok(Progress::Done)
    }
    fn process_source(&mut self, _: usize) -> Result<Progress, DeviceError> {
        Ok(Progress::Done)
    }
    fn quiesce(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState { cid: 3 })
    }
    fn positions(&self) -> Option<Vec<QueuePosition>> {
        let active = self.seen.lock().unwrap().activations > 0;
        active.then(|| vec![POSITION; 2])
    }
    fn load(&mut self, _: &DeviceState) -> Result<(), RestoreError> {
        Ok(())
    }
}

struct Bench {
    transport: MmioTransport,
    seen: Arc<Mutex<Seen>>,
    kicks: Vec<EventFd>,
    driver: TestDriver,
}

impl Bench {
    fn new(refuse: bool) -> Self {
        let driver = TestDriver::new(&[QUEUE_SIZE, QUEUE_SIZE]);
        let seen = Arc::<Mutex<Seen>>::default();
        let device = Probe {
            seen: seen.clone(),
            refuse,
        };
        let kicks: Vec<_> = (0..2)
            .map(|_| EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap())
            .collect();
        let watched = kicks.iter().map(|k| k.try_clone().unwrap()).collect();
        let transport = MmioTransport::new(
            Arc::new(Mutex::new(device)),
            driver.memory.clone(),
            driver.interrupt.clone(),
            watched,
        );
        Bench {
            transport,
            seen,
            kicks,
            driver,
        }
    }

    fn get(&mut self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(u64::from(register), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&mut self, register: u32, value: u32) {
        self.transport
            .write(u64::from(register), &value.to_le_bytes());
    }

    fn negotiate(&mut self, features: u64) -> u32 {
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for select in 0..2 {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, half(features, select));
        }
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.get(VIRTIO_MMIO_STATUS)
    }

    fn set_up_queue(&mut self, index: u32, base: u32) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, index);
        self.set(VIRTIO_MMIO_QUEUE_NUM, u32::from(QUEUE_SIZE));
        self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, base);
        self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x1000);
        self.set(VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x2000);
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn start(&mut self) {
        let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.negotiate(1 << VIRTIO_F_VERSION_1 | DEVICE_FEATURE);
        self.set_up_queue(0, 0x1_0000);
        self.set_up_queue(1, 0x2_0000);
        self.set(VIRTIO_MMIO_STATUS, all);
    }
}

#[test]
fn a_driver_finds_the_device_and_starts_it() {
    let mut bench = Bench::new(false);
    assert_eq!(bench.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(bench.get(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(bench.get(VIRTIO_MMIO_DEVICE_ID), 2);
    assert_eq!(bench.get(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(QUEUE_SIZE));
    bench.start();
    assert_eq!(bench.get(VIRTIO_MMIO_STATUS), 0xf);
    {
        let seen = bench.seen.lock().unwrap();
        assert_eq!(seen.activations, 1);
        assert_eq!(seen.features, 1 << VIRTIO_F_VERSION_1 | DEVICE_FEATURE);
    }
    // Each queue is kicked once, since what was offered before had no kick.
    for kick in &bench.kicks {
        assert_eq!(kick.read().unwrap(), 1);
    }
    bench.set(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    assert_eq!(bench.kicks[1].read().unwrap(), 1);
}

#[test]
fn reset_gives_everything_back_and_the_driver_can_start_again() {
    let mut bench = Bench::new(false);
    bench.start();
    bench.driver.interrupt.used_buffer();
    bench.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(bench.seen.lock().unwrap().resets, 1);
    assert_eq!(bench.get(VIRTIO_MMIO_STATUS), 0);
    assert_eq!(bench.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    bench.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(bench.get(VIRTIO_MMIO_QUEUE_READY), 0);
    bench.start();
    assert_eq!(bench.seen.lock().unwrap().activations, 2);
    // A reset of a device that was never started does not reach it.
    let mut idle = Bench::new(false);
    idle.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(idle.seen.lock().unwrap().resets, 0);
}

#[test]
fn features_must_be_offered_and_have_version_1() {
    for bad in [
        0,
        DEVICE_FEATURE,
        1 << VIRTIO_F_VERSION_1 | 1 << 40,
        u64::MAX,
    ] {
        let mut bench = Bench::new(false);
        assert_eq!(bench.negotiate(bad) & FEATURES_OK, 0, "{bad:#x}");
    }
    // A bit past the 64th is one that was never offered.
    let mut bench = Bench::new(false);
    bench.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    bench.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    bench.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    bench.set(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    bench.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
    bench.set(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    bench.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(bench.get(VIRTIO_MMIO_STATUS) & FEATURES_OK, 0);
}

#[test]
fn status_bits_come_one_after_the_other() {
    let mut bench = Bench::new(false);
    bench.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    assert_eq!(bench.get(VIRTIO_MMIO_STATUS), 0);
    bench.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    assert_eq!(bench.get(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER);
    bench.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    assert_eq!(
        bench.get(VIRTIO_MMIO_STATUS),
        ACKNOWLEDGE | DRIVER,
        "a bit is never cleared"
    );
    bench.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FAILED);
    bench.set(
        VIRTIO_MMIO_STATUS,
        ACKNOWLEDGE | DRIVER | FAILED | FEATURES_OK,
    );
    assert_eq!(bench.get(VIRTIO_MMIO_STATUS) & FEATURES_OK, 0);
    assert_eq!(bench.seen.lock().unwrap().activations, 0);
}

/// CVE-2026-5747: a queue's size rewritten after the device was activated.
#[test]
fn cve_2026_5747_queue_size_after_activation() {
    let mut bench = Bench::new(false);
    bench.start();
    let before = bench.transport.queues.clone();
    for register in [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
        VIRTIO_MMIO_DRIVER_FEATURES,
    ] {
        for value in [0, 1, 4, 0xffff_ffff] {
            bench.set(register, value);
        }
    }
    assert_eq!(bench.transport.queues, before);
    assert_eq!(bench.seen.lock().unwrap().activations, 1);
}

#[test]
fn a_ready_queue_keeps_its_registers() {
    let mut bench = Bench::new(false);
    bench.negotiate(1 << VIRTIO_F_VERSION_1);
    bench.set_up_queue(0, 0x1_0000);
    bench.set(VIRTIO_MMIO_QUEUE_NUM, 4);
    bench.set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x5000);
    let queue = bench.transport.queues[0];
    assert_eq!((queue.size, queue.desc_table), (QUEUE_SIZE, 0x1_0000));
    bench.set(VIRTIO_MMIO_QUEUE_READY, 0);
    for bad in [0, 3, 32, 0x1_0004, u32::MAX] {
        bench.set(VIRTIO_MMIO_QUEUE_NUM, bad);
    }
    assert_eq!(bench.transport.queues[0].size, QUEUE_SIZE);
    bench.set(VIRTIO_MMIO_QUEUE_NUM, 4);
    assert_eq!(bench.transport.queues[0].size, 4);
}

#[test]
fn rings_outside_memory_need_a_reset_which_helps() {
    let mut bench = Bench::new(false);
    bench.negotiate(1 << VIRTIO_F_VERSION_1);
    bench.set_up_queue(0, 0x1_0000);
    bench.set_up_queue(1, 0xffff_0000);
    bench.set(VIRTIO_MMIO_STATUS, 0xf);
    assert_ne!(bench.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
    assert_ne!(bench.get(VIRTIO_MMIO_INTERRUPT_STATUS) & 2, 0);
    assert_eq!(bench.seen.lock().unwrap().activations, 0);
    bench.set(VIRTIO_MMIO_STATUS, 0);
    bench.start();
    assert_eq!(bench.get(VIRTIO_MMIO_STATUS), 0xf);
}

#[test]
fn a_device_that_refuses_needs_a_reset() {
    let mut bench = Bench::new(true);
    bench.start();
    assert_ne!(bench.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
    bench.transport.write(u64::from(VIRTIO_MMIO_CONFIG), &[1]);
    assert!(bench.seen.lock().unwrap().config_writes.is_empty());
}

#[test]
fn configuration_is_read_at_any_width_and_written_once_there_is_a_driver() {
    let mut bench = Bench::new(false);
    let mut odd = [0; 3];
    bench
        .transport
        .read(u64::from(VIRTIO_MMIO_CONFIG) + 7, &mut odd);
    assert_eq!(odd, [7; 3]);
    let at = u64::from(VIRTIO_MMIO_CONFIG) + 2;
    bench.transport.write(at, &[9]);
    bench.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    bench.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    bench.transport.write(at, &[8]);
    assert_eq!(bench.seen.lock().unwrap().config_writes, [(2, vec![8])]);
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let mut bench = Bench::new(false);
    bench.start();
    let interrupt = bench.driver.interrupt.clone();
    interrupt.used_buffer();
    let generation = bench.get(VIRTIO_MMIO_CONFIG_GENERATION);
    interrupt.config_changed();
    assert_eq!(bench.get(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_ne!(bench.get(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    bench.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(bench.get(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert_eq!(bench.driver.interrupts(), 2);
}

proptest! {
    /// Whatever is written where, at whatever width, the registers stay consistent and a well-behaved driver can
    /// still start the device after a reset.
    #[test]
    fn any_register_sequence_leaves_a_device_that_works_after_reset(
        accesses in prop::collection::vec(
            (0u64..0x140, prop::collection::vec(any::<u8>(), 0..9), any::<bool>(), any::<bool>()),
            0..200,
        ),
    ) {
        let mut bench = Bench::new(false);
        for (offset, mut bytes, write, aligned) in accesses {
            let offset = if aligned { offset & !3 } else { offset };
            if aligned {
                bytes.resize(4, 0);
            }
            if write {
                bench.transport.write(offset, &bytes);
            } else {
                bench.transport.read(offset, &mut bytes);
            }
            for queue in &bench.transport.queues {
                prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max_size);
            }
        }
        bench.set(VIRTIO_MMIO_STATUS, 0);
        let before = bench.seen.lock().unwrap().activations;
        bench.start();
        prop_assert_eq!(bench.get(VIRTIO_MMIO_STATUS), 0xf);
        prop_assert_eq!(bench.seen.lock().unwrap().activations, before + 1);
    }
}
