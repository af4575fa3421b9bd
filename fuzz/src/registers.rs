//! Register pages, and devices that come from a file.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use lepton_devices::Memory;
use lepton_devices::virtio::device::{DeviceKind, VirtioDevice};
use lepton_devices::virtio::interrupt::Interrupt;
use lepton_devices::virtio::state::TransportState;
use lepton_devices::virtio::testing::{CountingLine, TestDriver};
use lepton_devices::virtio::transport::mmio::{MmioTransport, SharedDevice, lock};
use lepton_snapshot::codec::{decode, encode};
use lepton_vmm::machine::state::SavedDevice;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::drive::Form;
use crate::virtio::host::{Host, Kind};

const MAX_STEPS: usize = 300;
/// Registers (VIRTIO 1.3, 4.2.2).
const FEATURES: u16 = 0x20;
const FEATURES_SELECT: u16 = 0x24;
const QUEUE_SELECT: u16 = 0x30;
const QUEUE_SIZE: u16 = 0x38;
const QUEUE_READY: u16 = 0x44;
const STATUS: u16 = 0x70;
const QUEUE_ADDRESSES: [u16; 3] = [0x80, 0x90, 0xa0];
const CONFIG: u16 = 0x100;
/// Bits of the status (VIRTIO 1.3, 2.1).
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A register by its number, as it should be written.
    Write(u8, u32),
    /// Any bytes anywhere.
    WriteAny(u16, &'a [u8]),
    Read(u16, u8),
    /// What a driver does from reset to DRIVER_OK.
    Boot {
        features: u64,
        size: u8,
    },
    /// Into the rings.
    Poke(u8, u16, &'a [u8]),
    Kick(u8),
    Event(u8),
    /// The machine is saved and goes on elsewhere.
    Move,
}

struct Page {
    kind: Kind,
    device: SharedDevice,
    transport: MmioTransport,
    interrupt: Arc<Interrupt>,
    memory: Arc<Memory>,
    initial: TransportState,
    _host: Host,
}

impl Page {
    fn new(kind: Kind, memory: Arc<Memory>) -> Self {
        let (device, host) = Host::make(kind);
        let queues = lock(&device).queue_sizes().len();
        let interrupt = Arc::new(Interrupt::new(Arc::new(CountingLine::default())));
        let kicks = (0..queues).map(|_| EventFd::new(0x800).expect("an eventfd"));
        let transport = MmioTransport::new(
            device.clone(),
            memory.clone(),
            interrupt.clone(),
            kicks.collect(),
        );
        Page {
            kind,
            device,
            initial: transport.save(),
            transport,
            interrupt,
            memory,
            _host: host,
        }
    }

    /// Lets the device do something, as the event loop would.
    fn work(&self, work: impl Fn(&mut dyn VirtioDevice) -> bool) {
        if self.interrupt.is_broken() {
            return;
        }
        let mut device = lock(&self.device);
        if !work(&mut *device) {
            self.interrupt.needs_reset();
        }
    }

    fn write(&mut self, offset: u16, bytes: &[u8]) {
        let before = self.transport.save();
        self.transport.write(offset.into(), bytes);
        let after = self.transport.save();
        let value = <[u8; 4]>::try_from(bytes).map(u32::from_le_bytes);
        match value {
            Ok(0) if offset == STATUS => {
                // The generation only ever goes on (VIRTIO 1.3, 2.5.1).
                let mut wanted = self.initial.clone();
                wanted.interrupt.config_generation = before.interrupt.config_generation;
                assert_eq!(after, wanted, "a reset leaves something");
            }
            Ok(value) if offset < CONFIG && offset.is_multiple_of(4) => {
                check(&before, &after, offset, value)
            }
            // Another width, a crooked place, or configuration: no register changes.
            _ => assert_eq!(
                (
                    before.status,
                    before.queues,
                    before.driver_features,
                    before.queue_select
                ),
                (
                    after.status,
                    after.queues,
                    after.driver_features,
                    after.queue_select
                )
            ),
        }
    }

    fn register(&mut self, offset: u16, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn boot(&mut self, features: u64, size: u8) {
        self.register(STATUS, 0);
        self.register(STATUS, 1);
        self.register(STATUS, 3);
        let features = features | 1 << 32;
        for half in 0..2 {
            self.register(FEATURES_SELECT, half);
            let mut offered = [0; 4];
            self.register(0x14, half);
            self.transport.read(0x10, &mut offered);
            let taken = (features >> (32 * half)) as u32 & u32::from_le_bytes(offered);
            self.register(FEATURES, taken);
        }
        self.register(STATUS, 11);
        let size = 1u32 << (size % 5);
        for queue in 0..self.transport.save().queues.len() as u32 {
            let base = queue * 0x8_0000;
            self.register(QUEUE_SELECT, queue);
            self.register(QUEUE_SIZE, size);
            for (place, address) in
                QUEUE_ADDRESSES
                    .into_iter()
                    .zip([base, base + 0x1000, base + 0x2000])
            {
                self.register(place, address);
                self.register(place + 4, 0);
            }
            self.register(QUEUE_READY, 1);
        }
        self.register(STATUS, 15);
        assert_eq!(
            self.transport.save().status,
            15,
            "a good driver was refused"
        );
        assert!(!self.interrupt.is_broken());
    }

    /// The same machine in another process.
    fn moved(&self) -> Self {
        self.work(|device| device.quiesce().is_ok());
        let state = self.transport.save();
        let device = lock(&self.device).save();
        let mut new = Page::new(self.kind, self.memory.clone());
        let loaded = lock(&new.device).load(&device);
        loaded.expect("a device takes what it saved");
        new.transport
            .load(&state)
            .expect("a page takes what it saved");
        assert_eq!(new.transport.save(), state);
        new
    }
}

/// What a write of a register must not do.
fn check(before: &TransportState, after: &TransportState, offset: u16, value: u32) {
    assert_eq!(
        before.status & !after.status,
        0,
        "status bits were taken back"
    );
    assert_eq!(after.status & !0xcf, 0, "status {:#x}", after.status);
    if before.status & FEATURES_OK != 0 {
        assert_eq!(before.driver_features, after.driver_features);
    }
    if before.status & DRIVER_OK != 0 || before.status & FEATURES_OK == 0 {
        assert_eq!(before.queues, after.queues, "{value:#x} at {offset:#x}");
    }
    for (number, (old, new)) in before.queues.iter().zip(&after.queues).enumerate() {
        if old.ready && new.ready {
            assert_eq!(old, new, "a queue that is ready changed");
        }
        if u32::try_from(number) != Ok(before.queue_select) {
            assert_eq!(old, new, "a queue that is not selected changed");
        }
        assert!(new.size.is_power_of_two() && new.size <= 256);
    }
}

/// The first byte chooses the device.
pub fn registers(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else {
        return;
    };
    let kind = [Kind::Block(Form::RAW), Kind::Net, Kind::Vsock][usize::from(choice % 3)];
    let mut input = Unstructured::new(rest);
    let mut page = Page::new(kind, TestDriver::new(&[]).memory);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut input) else {
            break;
        };
        match step {
            Step::Write(number, value) => page.register(u16::from(number % 64) * 4, value),
            Step::WriteAny(offset, bytes) => {
                page.write(offset % 0x1000, bytes.get(..16).unwrap_or(bytes));
            }
            Step::Read(offset, width) => {
                let mut bytes = vec![0xaa; usize::from(width % 17)];
                page.transport.read(u64::from(offset % 0x1000), &mut bytes);
            }
            Step::Boot { features, size } => page.boot(features, size),
            Step::Poke(queue, offset, bytes) => {
                let at = u64::from(queue % 3) * 0x8_0000 + u64::from(offset % 0x3000);
                let written = page.memory.write_slice(bytes, GuestAddress(at));
                written.expect("memory");
            }
            Step::Kick(queue) => page.work(|device| {
                let queues = device.queue_sizes().len();
                device.process_queue(usize::from(queue) % queues).is_ok()
            }),
            Step::Event(source) => page.work(|device| {
                let sources = device.sources().len().max(1);
                device.process_source(usize::from(source) % sources).is_ok()
            }),
            Step::Move => page = page.moved(),
        }
    }
    // A driver that follows the rules can always begin again.
    let zeroes = vec![0; 0x3000];
    for queue in 0..3 {
        let written = page
            .memory
            .write_slice(&zeroes, GuestAddress(queue * 0x8_0000));
        written.expect("memory");
    }
    page.boot(0, 4);
}

/// A saved device and its registers.
pub fn device_state(data: &[u8]) {
    let Ok(saved) = decode::<SavedDevice>(data) else {
        return;
    };
    let again = encode(&saved).expect("a state that was read");
    assert_eq!(decode::<SavedDevice>(&again).as_ref(), Ok(&saved));
    let kind = match saved.device.kind() {
        DeviceKind::Block => Kind::Block(Form::RAW),
        DeviceKind::Net => Kind::Net,
        DeviceKind::Vsock => Kind::Vsock,
    };
    let mut page = Page::new(kind, TestDriver::new(&[]).memory);
    let loaded = lock(&page.device).load(&saved.device);
    if let Err(error) = loaded {
        return assert!(!error.to_string().is_empty());
    }
    if let Err(error) = page.transport.load(&saved.transport) {
        return assert!(!error.to_string().is_empty());
    }
    assert_eq!(page.transport.save(), saved.transport);
    for _ in 0..3 {
        for number in 0..3 {
            page.work(|device| {
                let queues = device.queue_sizes().len();
                number >= queues || device.process_queue(number).is_ok()
            });
            page.work(|device| {
                let sources = device.sources().len();
                number >= sources || device.process_source(number).is_ok()
            });
        }
    }
    page.boot(0, 4);
}
