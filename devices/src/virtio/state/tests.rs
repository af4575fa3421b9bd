//! Whole devices behind their registers: saved, encoded, and loaded by devices of another making; and hostile bytes.

use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use lepton_hostio::file::open_disk;
use lepton_snapshot::codec::{decode, encode};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::legacy::i8042::{I8042, I8042State};
use crate::legacy::ioapic::{IoApic, IoApicState, MsiSink};
use crate::legacy::serial::{SerialPort, SerialPortState, Wiring};
use crate::rate_limiter::{BucketConfig, RateLimiterConfig};
use crate::virtio::block::{Block, BlockConfig, CacheType, EngineKind};
use crate::virtio::testing::{CountingLine, TestDriver};
use crate::virtio::transport::mmio::{MmioTransport, SharedDevice, lock};
use crate::virtio::vsock::{Cid, Vsock, VsockConfig};

/// A device behind its registers.
struct Bench {
    folder: TempDir,
    driver: TestDriver,
    transport: MmioTransport,
    device: SharedDevice,
}

fn limits() -> RateLimiterConfig {
    let bucket = |size| BucketConfig {
        size,
        one_time_burst: 3,
        refill_time_ms: 3_600_000,
    };
    RateLimiterConfig {
        bandwidth: Some(bucket(1 << 30)),
        ops: Some(bucket(100)),
    }
}

fn block(folder: &TempDir, sectors: u64, read_only: bool) -> SharedDevice {
    let path = folder.as_path().join("image");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(sectors * 512).unwrap();
    let block = Block::new(BlockConfig {
        image: open_disk(&path, read_only).unwrap().into(),
        serial: None,
        cache: CacheType::Writeback,
        engine: EngineKind::Sync,
        queue_size: 256,
        rate_limiter: limits(),
    });
    Arc::new(Mutex::new(block.unwrap()))
}

fn vsock(folder: &TempDir, cid: u64) -> SharedDevice {
    let path = folder.as_path().join("v.sock");
    let vsock = Vsock::new(VsockConfig {
        guest_cid: Cid::try_from(cid).unwrap(),
        listener: UnixListener::bind(&path).unwrap(),
        uds_path: path,
        queue_size: 256,
    });
    Arc::new(Mutex::new(vsock.unwrap()))
}

impl Bench {
    fn new(make: impl FnOnce(&TempDir) -> SharedDevice) -> Self {
        let folder = TempDir::new().unwrap();
        let device = make(&folder);
        let queues = lock(&device).queue_sizes().len();
        let driver = TestDriver::new(&vec![256; queues]);
        let kicks = (0..queues).map(|_| EventFd::new(0).unwrap()).collect();
        let (memory, interrupt) = (driver.memory.clone(), driver.interrupt.clone());
        Bench {
            transport: MmioTransport::new(device.clone(), memory, interrupt, kicks),
            folder,
            driver,
            device,
        }
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// What a driver does until DRIVER_OK (VIRTIO 1.3, 3.1.1).
    fn start(&mut self) {
        for status in [1, 3] {
            self.set(0x70, status);
        }
        self.set(0x24, 1);
        self.set(0x20, 1);
        self.set(0x70, 0xb);
        for queue in 0..self.driver.queues.len() as u32 {
            self.set(0x30, queue);
            self.set(0x38, 128);
            for (register, offset) in [(0x80, 0), (0x90, 0x4000), (0xa0, 0x8000)] {
                self.set(register, 0x10_0000 + queue * 0x1_0000 + offset);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 0xf);
        assert!(lock(&self.device).positions().is_some(), "not active");
    }

    fn save(&self) -> (TransportState, DeviceState) {
        (self.transport.save(), lock(&self.device).save())
    }

    fn load(&mut self, saved: &(TransportState, DeviceState)) -> Result<(), RestoreError> {
        lock(&self.device).load(&saved.1)?;
        self.transport.load(&saved.0)
    }
}

fn makes() -> [fn(&TempDir) -> SharedDevice; 2] {
    [|f| block(f, 8, false), |f| vsock(f, 3)]
}

#[test]
fn a_device_comes_back_as_it_was() {
    for make in makes() {
        let mut bench = Bench::new(make);
        let idle = bench.save();
        assert_eq!(idle.0.positions, None);
        let mut other = Bench::new(make);
        other.load(&idle).unwrap();
        assert_eq!(other.save().0, idle.0);
        bench.start();
        bench.driver.interrupt.config_changed();
        let saved = bench.save();
        let bytes = encode(&saved).unwrap();
        let mut other = Bench::new(make);
        other.load(&decode(&bytes).unwrap()).unwrap();
        assert_eq!(other.save(), saved);
        assert_eq!(other.driver.interrupts(), 0);
        // It can be reset and started again, like the first.
        other.set(0x70, 0);
        other.start();
    }
}

#[test]
fn a_queue_goes_on_where_it_was() {
    let mut bench = Bench::new(|f| block(f, 8, false));
    bench.start();
    // Two requests for the serial number, each a header, 20 bytes and a status.
    let memory = bench.driver.memory.clone();
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
    let descriptor = |addr: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    put(0x5000, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    put(0x10_0000, &descriptor(0x5000, 16, 1, 1));
    put(0x10_0010, &descriptor(0x6000, 20, 3, 2));
    put(0x10_0020, &descriptor(0x7000, 1, 2, 0));
    let offer = |index: u16| put(0x10_4002, &index.to_le_bytes());
    offer(1);
    let _ = lock(&bench.device).process_queue(0).unwrap();
    lock(&bench.device).quiesce().unwrap();
    let used = || memory.read_obj::<u16>(GuestAddress(0x10_8002)).unwrap();
    assert_eq!(used(), 1);
    let serial = memory.read_obj::<[u8; 20]>(GuestAddress(0x6000)).unwrap();
    let saved = bench.save();
    assert_eq!(
        saved.0.positions,
        Some(vec![QueuePosition {
            next_avail: 1,
            next_used: 1
        }])
    );
    drop(bench.transport);
    drop(bench.device);

    // Another device, another image, the same memory.
    let folder = TempDir::new().unwrap();
    let device = block(&folder, 8, false);
    lock(&device).load(&saved.1).unwrap();
    let (kick, interrupt) = (EventFd::new(0).unwrap(), bench.driver.interrupt.clone());
    let mut transport = MmioTransport::new(device.clone(), memory.clone(), interrupt, vec![kick]);
    transport.load(&saved.0).unwrap();
    put(0x6000, &[0; 20]);
    offer(2);
    let _ = lock(&device).process_queue(0).unwrap();
    assert_eq!(used(), 2);
    let again = memory.read_obj::<[u8; 20]>(GuestAddress(0x6000)).unwrap();
    assert_eq!(again, serial, "the guest knows its disk by this");
    drop(bench.folder);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let mut bench = Bench::new(|f| block(f, 8, false));
    bench.start();
    let saved = bench.save();
    let refused = |make: fn(&TempDir) -> SharedDevice,
                   change: &dyn Fn(&mut TransportState, &mut DeviceState)| {
        let mut state = saved.clone();
        change(&mut state.0, &mut state.1);
        let result = Bench::new(make).load(&state);
        result.unwrap_err().to_string()
    };
    let same: fn(&TempDir) -> SharedDevice = |f| block(f, 8, false);
    let unchanged = |_: &mut TransportState, _: &mut DeviceState| {};
    assert!(refused(|f| block(f, 9, false), &unchanged).contains("9 sectors, the guest knows 8"));
    assert!(refused(|f| block(f, 8, true), &unchanged).contains("the other way"));
    assert!(refused(|f| vsock(f, 3), &unchanged).contains("a Block device, this is Vsock"));
    assert!(refused(same, &|t, _| t.status = 0xd).contains("status 0xd"));
    assert!(refused(same, &|t, _| t.driver_features |= 1 << 50).contains("0x4000000000000"));
    assert!(refused(same, &|t, _| t.queues[0].size = 3).contains("size 3"));
    assert!(refused(same, &|t, _| t.queues[0].size = 512).contains("size 512"));
    assert!(refused(same, &|t, _| t.queues.clear()).contains("0 queues"));
    assert!(refused(same, &|t, _| t.positions = Some(vec![])).contains("0 queues"));
    assert!(refused(same, &|t, _| t.positions = None).contains("status 0xf"));
    assert!(refused(same, &|t, _| t.queues[0].desc_table = 7).contains("queue 0"));
    assert!(refused(same, &|t, _| t.queues[0].used_ring = u64::MAX - 3).contains("queue 0"));
    assert!(refused(same, &|t, _| t.interrupt.status = 4).contains("interrupt status 4"));
    // A device that broke down stays so until its driver resets it.
    let mut broken = saved.clone();
    (broken.0.interrupt.needs_reset, broken.0.positions) = (true, None);
    let mut other = Bench::new(same);
    other.load(&broken).unwrap();
    assert!(lock(&other.device).positions().is_none());
    other.set(0x70, 0);
    other.start();
    let mut vsock_state = Bench::new(|f| vsock(f, 3)).save();
    vsock_state.1 = DeviceState::Vsock(VsockState { cid: 2 });
    let error = Bench::new(|f| vsock(f, 3)).load(&vsock_state).unwrap_err();
    assert!(error.to_string().contains("guest CID 2"), "{error}");
}

struct Nowhere;

impl MsiSink for Nowhere {
    fn send(&self, _: u64, _: u32) {}
}

fn wiring() -> Wiring {
    Wiring {
        line: Arc::new(CountingLine::default()),
        out: Box::new(Vec::new()),
        limit: None,
        room: None,
    }
}

#[test]
fn chips_come_back_as_they_were() {
    let chip = IoApic::new(Box::new(Nowhere), 8);
    for (register, value) in [(0x12, 0x1_0031u32), (0x13, 3 << 24), (0, 5 << 24)] {
        chip.write(0, &u32::to_le_bytes(register));
        chip.write(0x10, &value.to_le_bytes());
    }
    chip.raise(2);
    let saved = chip.save();
    let other = IoApic::new(Box::new(Nowhere), 8);
    other
        .load(&decode(&encode(&saved).unwrap()).unwrap())
        .unwrap();
    assert_eq!(other.save(), saved);
    assert!(saved.pins[2].pending);
    let error = IoApic::new(Box::new(Nowhere), 9).load(&saved).unwrap_err();
    assert!(error.to_string().contains("pins 8"), "{error}");

    let mut port = SerialPort::new(wiring());
    port.write(7, 0x5a);
    assert_eq!(port.input(b"typed").unwrap(), 5);
    let saved = port.save();
    let mut other = SerialPort::restored(&saved, wiring()).unwrap();
    assert_eq!(other.save(), saved);
    assert_eq!((other.read(7), other.read(0)), (0x5a, b't'));
    let mut long = saved;
    long.input = vec![0; 65];
    assert!(SerialPort::restored(&long, wiring()).is_err());

    let mut keys = I8042::new(Arc::new(CountingLine::default()));
    assert!(keys.ctrl_alt_del());
    let _ = keys.write(4, 0x60);
    let saved = keys.save();
    let mut other = I8042::new(Arc::new(CountingLine::default()));
    other.load(&saved).unwrap();
    assert_eq!(other.save(), saved);
    let mut long = saved;
    long.output = vec![0; 17];
    assert!(other.load(&long).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_states_never_panic(which in 0usize..2, at: prop::sample::Index, noise: Vec<u8>, kick in 0usize..3) {
        let make = makes()[which];
        let mut bench = Bench::new(make);
        bench.start();
        let mut bytes = encode(&bench.save()).unwrap();
        let at = at.index(bytes.len());
        for (to, from) in bytes.iter_mut().skip(at).zip(&noise) {
            *to ^= *from;
        }
        if let Ok(saved) = decode::<(TransportState, DeviceState)>(&bytes) {
            let mut other = Bench::new(make);
            if other.load(&saved).is_ok() {
                // Whatever it believes now, it works or breaks down.
                let mut device = lock(&other.device);
                let _ = device.process_queue(kick);
                let _ = device.process_source(0);
                let _ = device.quiesce();
                device.reset();
            }
        }
    }

    #[test]
    fn damaged_chips_never_panic(bytes: Vec<u8>) {
        if let Ok(state) = decode::<IoApicState>(&bytes) {
            let chip = IoApic::new(Box::new(Nowhere), 8);
            let _ = chip.load(&state);
            (0..8).for_each(|pin| chip.raise(pin));
        }
        if let Ok(state) = decode::<I8042State>(&bytes) {
            let mut keys = I8042::new(Arc::new(CountingLine::default()));
            let _ = keys.load(&state);
            keys.read(0);
            let _ = keys.write(0, 1);
        }
        if let Ok(state) = decode::<SerialPortState>(&bytes)
            && let Ok(mut port) = SerialPort::restored(&state, wiring())
        {
            (0..8).for_each(|register| {
                port.read(register);
                port.write(register, 0xff);
            });
        }
    }
}
