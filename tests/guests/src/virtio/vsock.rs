//! A socket device (VIRTIO 1.3, 5.10).

use super::buffers::{Places, Receiver};
use super::find::{Kind, device};
use super::mmio::Mmio;
use super::queue::{Descriptor, Queue};
use crate::memory::Region;

/// The host's CID.
pub const HOST: u64 = 2;
/// Bytes of a packet's header.
pub const HEADER: u64 = 44;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const STREAM: u16 = 1;

/// What a packet is for.
pub mod operation {
    #![allow(missing_docs)]
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// From.
    pub src_cid: u64,
    /// To.
    pub dst_cid: u64,
    /// From.
    pub src_port: u32,
    /// To.
    pub dst_port: u32,
    /// Bytes behind the header.
    pub len: u32,
    /// [`STREAM`].
    pub kind: u16,
    /// See [`operation`].
    pub operation: u16,
    /// Of SHUTDOWN: 1 receives no more, 2 sends no more.
    pub flags: u32,
    /// The sender's room.
    pub buf_alloc: u32,
    /// Bytes the sender has taken from it.
    pub fwd_cnt: u32,
}

impl Header {
    /// Writes it.
    pub fn store(&self, to: Region) {
        to.put(0, self.src_cid);
        to.put(8, self.dst_cid);
        to.put(16, self.src_port);
        to.put(20, self.dst_port);
        to.put(24, self.len);
        to.put(28, self.kind);
        to.put(30, self.operation);
        to.put(32, self.flags);
        to.put(36, self.buf_alloc);
        to.put(40, self.fwd_cnt);
    }

    /// Reads one.
    pub fn load(from: Region) -> Self {
        Self {
            src_cid: from.get(0),
            dst_cid: from.get(8),
            src_port: from.get(16),
            dst_port: from.get(20),
            len: from.get(24),
            kind: from.get(28),
            operation: from.get(30),
            flags: from.get(32),
            buf_alloc: from.get(36),
            fwd_cnt: from.get(40),
        }
    }
}

const QUEUE_SIZE: u16 = 128;
const RX_SIZE: u64 = 4096;
/// Bytes of an event (VIRTIO 1.3, 5.10.6.7).
const EVENT: u64 = 4;

/// A socket device.
pub struct Vsock {
    device: Mmio,
    cid: u64,
    rx: Receiver,
    tx: Queue,
    /// Nothing comes of what the device says here but that it was read.
    events: Receiver,
    places: Places,
}

impl Vsock {
    /// Starts the device, with places to send packets of up to `size` bytes from.
    pub fn start(size: u64) -> Option<Self> {
        Some(Self::on(device(Kind::Vsock, 0)?, size))
    }

    /// As [`Vsock::start`], for a known device.
    pub fn on(device: Mmio, size: u64) -> Self {
        let features = device.negotiate(0);
        let rx = device.queue(0, QUEUE_SIZE, features);
        let tx = device.queue(1, QUEUE_SIZE, features);
        let events = device.queue(2, QUEUE_SIZE, features);
        let mut vsock = Self {
            device,
            cid: device.config64(0),
            rx: Receiver::new(rx, HEADER + RX_SIZE),
            // A header and its data take two descriptors.
            places: Places::new(tx.size() / 2, HEADER + size),
            tx,
            events: Receiver::new(events, EVENT),
        };
        device.start();
        vsock.rx.publish();
        vsock.events.publish();
        vsock
    }

    /// The device.
    pub fn device(&self) -> Mmio {
        self.device
    }

    /// Our CID.
    pub fn cid(&self) -> u64 {
        self.cid
    }

    /// Hands the next packet that came to `each`: header and data. False: none came.
    pub fn receive(&mut self, each: impl FnOnce(&mut Self, Header, Region)) -> bool {
        if let Some((place, _, _)) = self.events.pop() {
            self.events.offer(place);
            self.events.publish();
        }
        let Some((place, buffer, len)) = self.rx.pop() else {
            return false;
        };
        assert!(u64::from(len) >= HEADER, "a packet of {len} bytes");
        let header = Header::load(buffer);
        assert!(
            u64::from(header.len) <= u64::from(len) - HEADER,
            "a packet of {len} bytes says that it has {} of data",
            header.len
        );
        each(self, header, buffer.part(HEADER, u64::from(header.len)));
        self.rx.offer(place);
        true
    }

    /// Lets the device have the buffers that packets came in.
    pub fn give_back(&mut self) {
        self.rx.publish();
    }

    /// A place to send from, and room for the data there. None: all are under way.
    pub fn place(&mut self) -> Option<(u16, Region)> {
        let (place, buffer) = self.places.take()?;
        Some((place, buffer.part(HEADER, buffer.len() - HEADER)))
    }

    /// Offers a packet whose data lies at `place` already; [`Vsock::publish`] lets the device see it.
    pub fn offer(&mut self, place: u16, header: &Header) {
        let Some(buffer) = self.places.buffer(place) else {
            panic!("there is no place {place} for a packet");
        };
        header.store(buffer);
        let (first, second) = (place * 2, place * 2 + 1);
        let head = Descriptor::of(buffer.part(0, HEADER), 0);
        if header.len > 0 {
            head.then(second).store(self.tx.table(), first);
            let data = buffer.part(HEADER, u64::from(header.len));
            Descriptor::of(data, 0).store(self.tx.table(), second);
        } else {
            head.store(self.tx.table(), first);
        }
        self.tx.offer(first);
    }

    /// Lets the device see what was offered.
    pub fn publish(&mut self) {
        self.tx.publish();
    }

    /// A place whose packet was sent. It is free again.
    pub fn sent(&mut self) -> Option<u16> {
        let (head, _) = self.tx.pop()?;
        let place = head / 2;
        self.places.give(place);
        Some(place)
    }
}
