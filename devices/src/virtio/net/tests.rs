//! The device against a driver and a network that are both in memory.

mod native;
mod property;
mod receive;
mod transmit;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use lepton_hostio::tap::{Offloads, VNET_HEADER_LEN};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::*;
use vm_memory::{Bytes, VolatileSlice};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::rx::PATIENCE;
use super::*;
use crate::rate_limiter::{BucketConfig, RateLimiterConfig};
use crate::virtio::device::{DeviceKind, Progress, VirtioDevice};
use crate::virtio::testing::{Buffer, TestDriver};

const MAC: Mac = [2, 0, 0, 0, 0, 9];
const RX: usize = 0;
const TX: usize = 1;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const MERGEABLE: u64 = VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;
const HEADER: usize = VNET_HEADER_LEN;

/// The network's side.
struct Wire {
    /// Frames with their headers, to be read by the device.
    incoming: VecDeque<Vec<u8>>,
    /// Errors that reads give before anything else.
    read_errors: VecDeque<i32>,
    /// Frames with their headers, written by the device.
    sent: Vec<Vec<u8>>,
    /// What each write fails with.
    write_error: Option<i32>,
    offloads: Offloads,
    supported: Offloads,
    event: EventFd,
}

#[derive(Clone)]
struct TestNet(Arc<Mutex<Wire>>);

impl Backend for TestNet {
    fn read_frame(&mut self, guest: &[VolatileSlice<'_>], rest: &mut [u8]) -> io::Result<usize> {
        let mut wire = self.0.lock().unwrap();
        if let Some(errno) = wire.read_errors.pop_front() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let Some(frame) = wire.incoming.pop_front() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let mut left = frame.as_slice();
        for slice in guest {
            let (now, later) = left.split_at(left.len().min(slice.len()));
            slice.write_slice(now, 0).unwrap_or(());
            left = later;
        }
        let lost = left.len().saturating_sub(rest.len());
        left = &left[..left.len() - lost];
        rest[..left.len()].copy_from_slice(left);
        Ok(frame.len() - lost)
    }

    fn write_frame(
        &mut self,
        header: &[u8; VNET_HEADER_LEN],
        guest: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        let mut wire = self.0.lock().unwrap();
        if let Some(errno) = wire.write_error {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut frame = header.to_vec();
        for slice in guest {
            let start = frame.len();
            frame.resize(start + slice.len(), 0);
            slice.read_slice(&mut frame[start..], 0).unwrap();
        }
        wire.sent.push(frame);
        Ok(())
    }

    fn supported_offloads(&self) -> Offloads {
        self.0.lock().unwrap().supported
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.0.lock().unwrap().offloads = offloads;
        Ok(())
    }

    fn event_fd(&self) -> RawFd {
        self.0.lock().unwrap().event.as_raw_fd()
    }
}

/// A device between a driver and a network.
struct Bench {
    net: Net<TestNet>,
    driver: TestDriver,
    wire: TestNet,
}

impl Bench {
    /// Active with these features, and kicked.
    fn new(features: u64) -> Self {
        Self::with(features, 256, Default::default(), Default::default())
    }

    fn with(features: u64, size: u16, rx: RateLimiterConfig, tx: RateLimiterConfig) -> Self {
        let wire = TestNet(Arc::new(Mutex::new(Wire {
            incoming: VecDeque::new(),
            read_errors: VecDeque::new(),
            sent: Vec::new(),
            write_error: None,
            offloads: Offloads::default(),
            supported: Offloads::ALL,
            event: EventFd::new(0).unwrap(),
        })));
        let net = Net::new(NetConfig {
            tap: wire.clone(),
            mac: Some(MAC),
            mtu: None,
            queue_size: size,
            rx_rate_limiter: rx,
            tx_rate_limiter: tx,
        })
        .unwrap();
        let driver = TestDriver::new(&[size, size]);
        let mut bench = Bench { net, driver, wire };
        bench.activate(features);
        bench
    }

    fn activate(&mut self, features: u64) {
        self.net.activate(self.driver.resources(features)).unwrap();
        assert_eq!(self.kick(RX), Progress::Done);
        assert_eq!(self.kick(TX), Progress::Done);
    }

    fn kick(&mut self, queue: usize) -> Progress {
        self.net.process_queue(queue).unwrap()
    }

    fn tap_event(&mut self) -> Progress {
        self.net.process_source(0).unwrap()
    }

    /// Puts a frame with an empty header on the network.
    fn arrive(&mut self, frame: &[u8]) {
        self.arrive_with(&[0; HEADER], frame);
    }

    fn arrive_with(&mut self, header: &[u8; HEADER], frame: &[u8]) {
        let mut bytes = header.to_vec();
        bytes.extend_from_slice(frame);
        self.wire.0.lock().unwrap().incoming.push_back(bytes);
    }

    fn still_on_the_wire(&self) -> usize {
        self.wire.0.lock().unwrap().incoming.len()
    }

    /// Frames sent since the last call, with their headers.
    fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.wire.0.lock().unwrap().sent)
    }

    /// Makes a receive buffer available, in descriptors of these sizes.
    fn offer(&mut self, sizes: &[usize]) -> (u16, Vec<Buffer>) {
        let buffers: Vec<_> = sizes.iter().map(|&n| self.driver.writable(n)).collect();
        (self.driver.queues[RX].offer(&buffers), buffers)
    }

    /// Makes a frame available for sending, in one descriptor.
    fn send(&mut self, bytes: &[u8]) -> u16 {
        let buffer = self.driver.readable(bytes);
        self.driver.queues[TX].offer(&[buffer])
    }

    /// The first `len` bytes that the device wrote to `buffers`.
    fn received(&self, buffers: &[Buffer], len: u32) -> Vec<u8> {
        let mut bytes: Vec<u8> = buffers.iter().flat_map(|&b| self.driver.bytes(b)).collect();
        bytes.truncate(len as usize);
        bytes
    }

    /// Waits until the timer of a rate limiter has expired, and handles it.
    fn wait_for_timer(&mut self, source: usize) -> Progress {
        let epoll = Epoll::new().unwrap();
        let fd = self.net.sources()[source];
        epoll
            .ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0),
            )
            .unwrap();
        let mut events = [EpollEvent::default()];
        assert_eq!(epoll.wait(10_000, &mut events).unwrap(), 1);
        self.net.process_source(source).unwrap()
    }
}

/// A frame of `len` bytes from the interface's own address, all different from its neighbours' by `seed`.
fn frame(len: usize, seed: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len)
        .map(|i| (i.wrapping_mul(31) ^ (i >> 8) ^ seed.wrapping_mul(97)) as u8)
        .collect();
    frame[6..12].copy_from_slice(&MAC);
    frame
}

/// The same with an empty virtio header in front.
fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER], frame].concat()
}

/// The header of a received frame in `buffers` buffers.
fn rx_header(buffers: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[10..].copy_from_slice(&buffers.to_le_bytes());
    header
}

/// `count` operations, and no more for an hour.
fn only(count: u64) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: None,
        ops: Some(BucketConfig {
            size: count,
            one_time_burst: 0,
            refill_time_ms: 3_600_000 * count,
        }),
    }
}

const UNLIMITED: RateLimiterConfig = RateLimiterConfig {
    bandwidth: None,
    ops: Some(BucketConfig {
        size: 0,
        one_time_burst: 0,
        refill_time_ms: 0,
    }),
};

fn config(mtu: Option<u16>, queue_size: u16) -> NetConfig<TestNet> {
    let bench = Bench::new(VERSION_1);
    NetConfig {
        tap: bench.wire,
        mac: None,
        mtu,
        queue_size,
        rx_rate_limiter: Default::default(),
        tx_rate_limiter: Default::default(),
    }
}

#[test]
fn configuration_space_and_features() {
    let net = Net::new(config(Some(9000), 1024)).unwrap();
    assert_eq!(net.kind(), DeviceKind::Net);
    assert_eq!(net.queue_sizes(), [1024, 1024]);
    let mut space = [0xff; 16];
    net.read_config(0, &mut space);
    assert_eq!(space[..6], net.mac());
    assert_eq!(space[6..], [0, 0, 0, 0, 0x28, 0x23, 0, 0, 0, 0]);
    let mut far = [1; 4];
    net.read_config(u64::MAX - 1, &mut far);
    assert_eq!(far, [0; 4]);
    assert_ne!(net.features() & 1 << VIRTIO_NET_F_MTU, 0);
    assert_eq!(net.features() & 1 << VIRTIO_NET_F_STATUS, 0);

    let net = Net::new(config(None, 256)).unwrap();
    assert_eq!(net.features() & 1 << VIRTIO_NET_F_MTU, 0);
    net.wire_supports(Offloads::default(), |features| {
        assert_eq!(features & 1 << VIRTIO_NET_F_GUEST_TSO4, 0);
        assert_ne!(features & 1 << VIRTIO_NET_F_HOST_TSO4, 0);
    });
}

impl Net<TestNet> {
    fn wire_supports(&self, offloads: Offloads, check: impl Fn(u64)) {
        self.backend().0.lock().unwrap().supported = offloads;
        check(self.features());
    }
}

#[test]
fn impossible_configurations_name_the_value() {
    let text = |mtu, size| Net::new(config(mtu, size)).err().unwrap().to_string();
    assert_eq!(text(Some(67), 256), "mtu 67 is less than 68");
    for size in [0, 3, 255, 2048] {
        let expected = format!("queue size {size} is not a power of two up to 1024");
        assert_eq!(text(Some(68), size), expected);
    }
}

#[test]
fn the_address_cannot_be_written() {
    let mut bench = Bench::new(VERSION_1);
    bench.net.write_config(0, &[1, 2, 3, 4, 5, 6]);
    assert_eq!(bench.net.mac(), MAC);
    assert_eq!(bench.net.metrics().cfg_fails.get(), 1);
}

#[test]
fn offloads_follow_the_negotiation() {
    let mut bench = Bench::new(VERSION_1);
    assert_eq!(bench.wire.0.lock().unwrap().offloads, Offloads::default());
    bench.net.reset();
    bench.driver.reset();
    bench.activate(VERSION_1 | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4);
    let expected = Offloads {
        csum: true,
        tso4: true,
        ..Offloads::default()
    };
    assert_eq!(bench.wire.0.lock().unwrap().offloads, expected);
}

#[test]
fn events_without_a_driver_do_nothing() {
    let mut bench = Bench::new(VERSION_1);
    bench.net.reset();
    bench.arrive(&frame(60, 1));
    for source in 0..4 {
        assert_eq!(bench.net.process_source(source).unwrap(), Progress::Done);
    }
    for queue in 0..3 {
        assert_eq!(bench.net.process_queue(queue).unwrap(), Progress::Done);
    }
    bench.net.quiesce().unwrap();
    assert_eq!(bench.still_on_the_wire(), 1);
}

#[test]
fn a_wrong_number_of_queues_is_refused() {
    let mut bench = Bench::new(VERSION_1);
    bench.net.reset();
    let mut resources = bench.driver.resources(VERSION_1);
    resources.queues.pop();
    assert!(bench.net.activate(resources).is_err());
    assert_eq!(bench.net.metrics().activate_fails.get(), 1);
}
