//! A guest's driver and a device with sockets in a folder of its own.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use crate::virtio::device::{DeviceError, Progress, VirtioDevice};
use crate::virtio::testing::{Buffer, TestDriver};
use crate::virtio::vsock::packet::{Header, Op, TYPE_STREAM};
use crate::virtio::vsock::*;

pub const GUEST_CID: u64 = 3;
pub const RX: usize = 0;
pub const TX: usize = 1;
pub const EVENT: usize = 2;
/// Data bytes of a receive buffer, as Linux has it.
pub const RX_DATA: usize = 4096;
/// Receive buffers there are.
pub const RX_BUFFERS: usize = 64;
const TX_BUFFERS: usize = 32;
const TX_DATA: usize = 64 << 10;

pub type Packet = (Header, Vec<u8>);

pub struct Rig {
    pub driver: TestDriver,
    pub device: Vsock,
    pub dir: TempDir,
    /// Offer receive buffers again as soon as they are used.
    pub refill: bool,
    pub inbox: VecDeque<Packet>,
    free_rx: Vec<[Buffer; 2]>,
    used_rx: HashMap<u16, [Buffer; 2]>,
    free_tx: Vec<GuestAddress>,
    used_tx: HashMap<u16, GuestAddress>,
}

impl Rig {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("v.sock");
        let device = Vsock::new(VsockConfig {
            guest_cid: Cid::try_from(GUEST_CID).unwrap(),
            listener: UnixListener::bind(&path).unwrap(),
            uds_path: path,
            queue_size: 256,
        })
        .unwrap();
        let mut rig = Rig {
            driver: TestDriver::new(&[256, 256, 256]),
            device,
            dir,
            refill: true,
            inbox: VecDeque::new(),
            free_rx: Vec::new(),
            used_rx: HashMap::new(),
            free_tx: Vec::new(),
            used_tx: HashMap::new(),
        };
        rig.activate();
        rig
    }

    /// What a driver does from reset to DRIVER_OK.
    pub fn activate(&mut self) {
        self.driver.reset();
        self.inbox.clear();
        self.used_rx.clear();
        self.used_tx.clear();
        let driver = &mut self.driver;
        self.free_rx = (0..RX_BUFFERS)
            .map(|_| [driver.writable(44), driver.writable(RX_DATA)])
            .collect();
        self.free_tx = (0..TX_BUFFERS)
            .map(|_| driver.alloc(44 + TX_DATA))
            .collect();
        let resources = driver.resources(0);
        self.device.activate(resources).unwrap();
        self.run();
    }

    pub fn path(&self) -> PathBuf {
        self.dir.as_path().join("v.sock")
    }

    /// A host's server for `port`.
    pub fn serve(&self, port: u32) -> UnixListener {
        let listener =
            UnixListener::bind(self.dir.as_path().join(format!("v.sock_{port}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// A host's client that has just connected.
    pub fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.path()).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// Offers up to `count` free receive buffers.
    pub fn offer_rx(&mut self, count: usize) {
        for _ in 0..count.min(self.free_rx.len()) {
            let buffers = self.free_rx.pop().unwrap();
            let head = self.driver.queues[RX].offer(&buffers);
            self.used_rx.insert(head, buffers);
        }
    }

    /// Lets the device work until nothing is left to do.
    pub fn run(&mut self) {
        self.try_run().unwrap();
    }

    pub fn try_run(&mut self) -> Result<(), DeviceError> {
        loop {
            if self.refill {
                self.offer_rx(RX_BUFFERS);
            }
            let mut more = self.device.process_source(0)? == Progress::Again;
            more |= self.device.process_queue(TX)? == Progress::Again;
            more |= self.device.process_queue(RX)? == Progress::Again;
            let received = self.collect();
            let refilled = self.refill && received;
            if !more && !refilled {
                return Ok(());
            }
        }
    }

    /// Takes what the device used. True: there was something to receive.
    pub fn collect(&mut self) -> bool {
        for (head, written) in self.driver.queues[TX].used() {
            assert_eq!(written, 0);
            // Chains of tests' own making are not ours.
            self.free_tx.extend(self.used_tx.remove(&head));
        }
        let used = self.driver.queues[RX].used();
        for &(head, written) in &used {
            let buffers = self.used_rx.remove(&head).unwrap();
            let header = self.driver.bytes(buffers[0]);
            let header = Header::parse(header.as_slice().try_into().unwrap());
            let mut data = self.driver.bytes(buffers[1]);
            assert_eq!(written, 44 + header.len);
            data.truncate(header.len as usize);
            assert_eq!(header.dst_cid, GUEST_CID);
            self.free_rx.push(buffers);
            self.inbox.push_back((header, data));
        }
        !used.is_empty()
    }

    /// Puts a packet in the transmit queue.
    pub fn queue(&mut self, header: &Header, data: &[u8]) {
        let addr = self.free_tx.pop().expect("transmit buffers are used up");
        let memory = &self.driver.memory;
        memory.write_slice(&header.to_bytes(), addr).unwrap();
        let at = GuestAddress(addr.0 + 44);
        memory.write_slice(data, at).unwrap();
        let head = Buffer {
            addr,
            len: 44,
            writable: false,
        };
        let data = Buffer {
            addr: at,
            len: data.len() as u32,
            writable: false,
        };
        let head = if data.len > 0 {
            self.driver.queues[TX].offer(&[head, data])
        } else {
            self.driver.queues[TX].offer(&[head])
        };
        self.used_tx.insert(head, addr);
    }

    pub fn free_tx(&self) -> usize {
        self.free_tx.len()
    }

    /// Sends a packet and lets the device work.
    pub fn send(&mut self, header: &Header, data: &[u8]) {
        self.queue(header, data);
        self.run();
    }

    /// The next packet received, which must be there.
    pub fn expect(&mut self, op: Op) -> Packet {
        let packet = self
            .inbox
            .pop_front()
            .unwrap_or_else(|| panic!("no {op:?}"));
        assert_eq!(packet.0.op, Some(op), "{packet:?}");
        packet
    }

    /// A connection made by the guest to a server of the host.
    pub fn connect(
        &mut self,
        guest_port: u32,
        listener: &UnixListener,
        host_port: u32,
    ) -> UnixStream {
        self.send(&packet(Op::Request, guest_port, host_port), b"");
        let (header, _) = self.expect(Op::Response);
        assert_eq!((header.src_port, header.dst_port), (host_port, guest_port));
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }
}

/// A packet from the guest with 256 KiB of buffer.
pub fn packet(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: 0,
        kind: TYPE_STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: 256 << 10,
        fwd_cnt: 0,
    }
}

/// A data packet.
pub fn data_packet(guest_port: u32, host_port: u32, len: usize) -> Header {
    Header {
        len: len as u32,
        ..packet(Op::Rw, guest_port, host_port)
    }
}
