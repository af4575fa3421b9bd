//! Devices between a driver on plain memory and a host that does nothing.

use std::hint::black_box;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use lepton_devices::rate_limiter::RateLimiterConfig;
use lepton_devices::virtio::block::{Block, BlockConfig, CacheType, EngineKind};
use lepton_devices::virtio::device::VirtioDevice;
use lepton_devices::virtio::net::{Backend, Net, NetConfig};
use lepton_devices::virtio::testing::{Buffer, TestDriver};
use lepton_devices::virtio::vsock::packet;
use lepton_hostio::file::open_disk;
use lepton_hostio::tap::{Offloads, VNET_HEADER_LEN};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

/// Chains that are offered at once.
const BATCH: usize = 32;
const QUEUE_SIZE: u16 = 256;
const VERSION_1: u64 = 1 << 32;

/// Makes as many copies of a chain as are offered at once.
fn batch(
    driver: &mut TestDriver,
    mut chain: impl FnMut(&mut TestDriver) -> Vec<Buffer>,
) -> Vec<Vec<Buffer>> {
    (0..BATCH).map(|_| chain(driver)).collect()
}

fn offer(driver: &mut TestDriver, queue: usize, chains: &[Vec<Buffer>]) {
    for chain in chains {
        driver.queues[queue].offer(chain);
    }
}

fn take(driver: &mut TestDriver, queue: usize) {
    assert_eq!(
        driver.queues[queue].used().len(),
        BATCH,
        "not all chains came back"
    );
}

/// Chains of three buffers, popped, read and completed.
pub fn queue_drain() -> Box<dyn FnMut()> {
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    let mut queue = driver.resources(VERSION_1).queues.remove(0);
    let chains = batch(&mut driver, |driver| {
        vec![
            driver.readable(&[1; 16]),
            driver.writable(512),
            driver.writable(1),
        ]
    });
    Box::new(move || {
        offer(&mut driver, 0, &chains);
        while let Some(chain) = queue.pop().expect("a good queue") {
            black_box(chain.readable.len());
            queue.complete(chain.head(), 513).expect("a good queue");
        }
        queue.signal().expect("a good queue");
        take(&mut driver, 0);
    })
}

/// Reads of 4 KiB, by blocking system calls.
pub fn blk_read() -> Box<dyn FnMut()> {
    let image = tempfile::NamedTempFile::new().expect("a temporary file");
    image.as_file().set_len(1 << 20).expect("a sparse file");
    let mut block = Block::new(BlockConfig {
        image: open_disk(image.path(), true).expect("an image").into(),
        serial: None,
        cache: CacheType::Unsafe,
        engine: EngineKind::Sync,
        queue_size: QUEUE_SIZE,
        rate_limiter: RateLimiterConfig::default(),
    })
    .expect("a drive");
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    let resources = driver.resources(VERSION_1);
    block.activate(resources).expect("a good driver");
    let mut sector = 0u64;
    let chains = batch(&mut driver, |driver| {
        // Type (read), reserved, sector (VIRTIO 1.3, 5.2.6).
        let mut header = [0; 16];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        sector += 8;
        vec![
            driver.readable(&header),
            driver.writable(4096),
            driver.writable(1),
        ]
    });
    Box::new(move || {
        let _keep = &image;
        offer(&mut driver, 0, &chains);
        let _ = black_box(block.process_queue(0).expect("good requests"));
        take(&mut driver, 0);
    })
}

/// A network that takes every frame and always has another.
struct Nowhere {
    frame: Vec<u8>,
    event: EventFd,
}

impl Backend for Nowhere {
    fn read_frame(&mut self, guest: &[VolatileSlice<'_>], _rest: &mut [u8]) -> io::Result<usize> {
        let mut left = self.frame.as_slice();
        for slice in guest {
            let (now, later) = left.split_at(left.len().min(slice.len()));
            slice.copy_from(now);
            left = later;
        }
        Ok(self.frame.len())
    }

    fn write_frame(
        &mut self,
        header: &[u8; VNET_HEADER_LEN],
        guest: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        black_box((header, guest));
        Ok(())
    }

    fn supported_offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

fn interface() -> (Net<Nowhere>, TestDriver) {
    let tap = Nowhere {
        frame: vec![0; VNET_HEADER_LEN + 1514],
        event: EventFd::new(0).expect("an eventfd"),
    };
    let mut net = Net::new(NetConfig {
        tap,
        mac: None,
        mtu: None,
        queue_size: QUEUE_SIZE,
        rx_rate_limiter: RateLimiterConfig::default(),
        tx_rate_limiter: RateLimiterConfig::default(),
    })
    .expect("an interface");
    let driver = TestDriver::new(&[QUEUE_SIZE; 2]);
    net.activate(driver.resources(VERSION_1))
        .expect("a good driver");
    (net, driver)
}

/// Frames of 1514 bytes from the guest.
pub fn net_transmit() -> Box<dyn FnMut()> {
    let (mut net, mut driver) = interface();
    let chains = batch(&mut driver, |driver| {
        vec![driver.readable(&[0; VNET_HEADER_LEN + 1514])]
    });
    Box::new(move || {
        offer(&mut driver, 1, &chains);
        let _ = black_box(net.process_queue(1).expect("good frames"));
        take(&mut driver, 1);
    })
}

/// Frames of 1514 bytes to the guest.
pub fn net_receive() -> Box<dyn FnMut()> {
    let (mut net, mut driver) = interface();
    let chains = batch(&mut driver, |driver| {
        vec![driver.writable(VNET_HEADER_LEN + 1514)]
    });
    Box::new(move || {
        offer(&mut driver, 0, &chains);
        let _ = black_box(net.process_queue(0).expect("good buffers"));
        take(&mut driver, 0);
    })
}

/// Packets with data from the guest: what is done before a connection sees them.
pub fn vsock_packet() -> Box<dyn FnMut()> {
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    let mut queue = driver.resources(VERSION_1).queues.remove(0);
    let chains = batch(&mut driver, |driver| {
        // VIRTIO 1.3, 5.10.6: from CID 3 to 2, 4096 bytes, a stream, RW.
        let mut header = [0; packet::HEADER_LEN as usize];
        header[0] = 3;
        header[8] = 2;
        header[24..28].copy_from_slice(&4096u32.to_le_bytes());
        header[28] = 1;
        header[30] = 5;
        vec![driver.readable(&header), driver.readable(&[0; 4096])]
    });
    Box::new(move || {
        offer(&mut driver, 0, &chains);
        while let Some(chain) = queue.pop().expect("a good queue") {
            let packet = packet::TxPacket::parse(&driver.memory, &chain).expect("a good packet");
            black_box(packet.data(&driver.memory).expect("good memory").len());
            queue.complete(chain.head(), 0).expect("a good queue");
        }
        queue.signal().expect("a good queue");
        take(&mut driver, 0);
    })
}
