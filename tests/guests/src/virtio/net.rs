//! A network device (VIRTIO 1.3, 5.1), and the few protocols it takes to be a neighbour: Ethernet, ARP, IPv4, UDP.

use super::buffers::{Places, Receiver};
use super::find::{Kind, device};
use super::mmio::{Mmio, register};
use super::queue::{Descriptor, Queue};
use crate::arguments;
use crate::memory::Region;

/// `VIRTIO_NET_F_CSUM`: frames without checksums may be sent.
pub const CSUM: u64 = 1;
/// `VIRTIO_NET_F_GUEST_CSUM`: frames without checksums may come.
pub const GUEST_CSUM: u64 = 1 << 1;
/// `VIRTIO_NET_F_MAC`.
pub const MAC: u64 = 1 << 5;
/// `VIRTIO_NET_F_GUEST_TSO4`: segments of up to 64 KiB may come.
pub const GUEST_TSO4: u64 = 1 << 7;
/// `VIRTIO_NET_F_HOST_TSO4`: segments of up to 64 KiB may be sent.
pub const HOST_TSO4: u64 = 1 << 11;
/// `VIRTIO_NET_F_MRG_RXBUF`: a frame may come in several buffers.
pub const MRG_RXBUF: u64 = 1 << 15;

/// Bytes of `struct virtio_net_hdr`.
pub const HEADER: u64 = 12;
/// Most bytes of a frame, with its Ethernet header.
pub const MAX_FRAME: u64 = 65535 + ETHERNET;
/// Most bytes of a frame that is not cut into segments.
pub const MAX_PLAIN_FRAME: u64 = 1500 + ETHERNET;

/// Bytes of the Ethernet header.
pub const ETHERNET: u64 = 14;
const IPV4: u64 = 20;
const UDP: u64 = 8;
const TCP: u64 = 20;
/// Where UDP's payload begins in a frame.
pub const UDP_PAYLOAD: u64 = ETHERNET + IPV4 + UDP;
/// Where TCP's payload begins in a frame.
pub const TCP_PAYLOAD: u64 = ETHERNET + IPV4 + TCP;

const TYPE_IPV4: u16 = 0x0800;
const TYPE_ARP: u16 = 0x0806;
const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_TCP: u8 = 6;
const GSO_TCPV4: u8 = 1;
const NEEDS_CSUM: u8 = 1;
const SEGMENT: u16 = 1448;

/// Where frames come from and go to.
#[derive(Clone, Copy)]
pub struct Address {
    /// Ethernet's.
    pub mac: [u8; 6],
    /// IP's.
    pub ip: [u8; 4],
    /// UDP's.
    pub port: u16,
}

impl Address {
    /// The IP address given as argument `name`.
    pub fn ip_argument(name: &str, default: [u8; 4]) -> [u8; 4] {
        let Some(text) = arguments::text(name) else {
            return default;
        };
        let mut ip = [0; 4];
        let mut parts = text.split('.');
        for byte in &mut ip {
            match parts.next().and_then(|part| part.parse().ok()) {
                Some(part) => *byte = part,
                None => panic!("{name}: {text} is not an IPv4 address"),
            }
        }
        ip
    }

    /// The hardware address given as argument `name`.
    pub fn mac_argument(name: &str) -> Option<[u8; 6]> {
        let text = arguments::text(name)?;
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            match parts
                .next()
                .and_then(|part| u8::from_str_radix(part, 16).ok())
            {
                Some(part) => *byte = part,
                None => panic!("{name}: {text} is not a hardware address"),
            }
        }
        Some(mac)
    }
}

fn put16(frame: Region, at: u64, value: u16) {
    frame.put(at, value.to_be());
}

fn get16(frame: Region, at: u64) -> u16 {
    u16::from_be(frame.get(at))
}

fn bytes<const N: usize>(frame: Region, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    frame.copy_to(at, &mut bytes);
    bytes
}

/// Sum of 16-bit words for a checksum, not folded.
fn sum(words: impl Iterator<Item = u16>) -> u32 {
    words.map(u32::from).sum()
}

fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

fn write_ethernet(frame: Region, from: &Address, to: &Address, kind: u16) {
    frame.copy_from(0, &to.mac);
    frame.copy_from(6, &from.mac);
    put16(frame, 12, kind);
}

fn write_ipv4(frame: Region, from: &Address, to: &Address, protocol: u8) {
    let packet = frame.part(ETHERNET, frame.len() - ETHERNET);
    packet.put(0, 0x45_u16);
    put16(packet, 2, packet.len() as u16);
    packet.put(4, 0_u32);
    packet.put(8, 64_u8);
    packet.put(9, protocol);
    put16(packet, 10, 0);
    packet.copy_from(12, &from.ip);
    packet.copy_from(16, &to.ip);
    let words = (0..10).map(|word| get16(packet, word * 2));
    put16(packet, 10, !fold(sum(words)));
}

/// Makes a buffer an unfragmented UDP frame that fills it. The payload is left alone.
pub fn write_udp(buffer: Region, from: &Address, to: &Address) {
    buffer.part(0, HEADER).fill(0);
    let frame = buffer.part(HEADER, buffer.len() - HEADER);
    write_ethernet(frame, from, to, TYPE_IPV4);
    write_ipv4(frame, from, to, PROTOCOL_UDP);
    let datagram = frame.part(ETHERNET + IPV4, frame.len() - ETHERNET - IPV4);
    put16(datagram, 0, from.port);
    put16(datagram, 2, to.port);
    put16(datagram, 4, datagram.len() as u16);
    // No checksum.
    put16(datagram, 6, 0);
}

/// Makes a buffer a TCP frame to be cut into segments. The payload is left alone.
pub fn write_tcp(buffer: Region, from: &Address, to: &Address) {
    let header = buffer.part(0, HEADER);
    header.fill(0);
    header.put(0, NEEDS_CSUM);
    header.put(1, GSO_TCPV4);
    header.put(2, TCP_PAYLOAD as u16);
    header.put(4, SEGMENT);
    header.put(6, (ETHERNET + IPV4) as u16);
    header.put(8, 16_u16);
    let frame = buffer.part(HEADER, buffer.len() - HEADER);
    write_ethernet(frame, from, to, TYPE_IPV4);
    write_ipv4(frame, from, to, PROTOCOL_TCP);
    let segment = frame.part(ETHERNET + IPV4, frame.len() - ETHERNET - IPV4);
    segment.part(0, TCP).fill(0);
    put16(segment, 0, from.port);
    put16(segment, 2, to.port);
    // Data offset 5, ACK.
    put16(segment, 12, 0x5010);
    put16(segment, 14, u16::MAX);
    // The pseudo header's sum, to which the rest is added later.
    let words = (0..4).map(|word| get16(frame, ETHERNET + 12 + word * 2));
    let length = segment.len() as u32;
    put16(
        segment,
        16,
        fold(sum(words) + u32::from(PROTOCOL_TCP) + length),
    );
}

/// What a frame is.
#[derive(Clone, Copy)]
pub enum Frame {
    /// An ARP request for our address, from this neighbour.
    ArpRequest(Address),
    /// An ARP reply of this neighbour.
    ArpReply(Address),
    /// A UDP datagram to our port, from there.
    Udp(Address),
    /// Something else.
    Other,
}

/// Most buffers in a queue.
const QUEUE_SIZE: u16 = 256;

/// A network device.
pub struct Net {
    device: Mmio,
    /// Ours.
    pub address: Address,
    features: u64,
    rx: Receiver,
    tx: Queue,
    places: Places,
}

impl Net {
    /// Starts interface number `index`, with `depth` places to send frames of up to `size` bytes from; fewer if the
    /// queue is shorter.
    pub fn start(index: usize, depth: u64, size: u64) -> Option<Self> {
        Some(Self::on(device(Kind::Net, index)?, depth, size))
    }

    /// As [`Net::start`], for a known device.
    pub fn on(device: Mmio, depth: u64, size: u64) -> Self {
        let mut wanted = MAC | MRG_RXBUF;
        if arguments::number("offload", 1) == 1 {
            wanted |= CSUM | GUEST_CSUM | HOST_TSO4 | GUEST_TSO4;
        }
        let features = device.negotiate(wanted);
        let rx = device.queue(0, QUEUE_SIZE, features);
        let tx = device.queue(1, QUEUE_SIZE, features);
        let rx_size = match (features & MRG_RXBUF != 0, features & GUEST_TSO4 != 0) {
            (true, _) => 4096,
            (false, true) => HEADER + MAX_FRAME,
            (false, false) => HEADER + MAX_PLAIN_FRAME,
        };
        let rx = Receiver::new(rx, rx_size);
        let depth = depth.clamp(1, u64::from(tx.size())) as u16;
        let mut net = Self {
            device,
            address: Address {
                mac: [0x02, 0, 0, 0, 0, 0x02],
                ip: Address::ip_argument("ip", [172, 30, 1, 2]),
                port: arguments::number("port", 5000) as u16,
            },
            features,
            rx,
            tx,
            places: Places::new(depth, HEADER + size),
        };
        if features & MAC != 0 {
            for (byte, at) in net.address.mac.iter_mut().zip(0..) {
                *byte = device.read8(register::CONFIG + at);
            }
        }
        device.start();
        net.rx.publish();
        net
    }

    /// The device.
    pub fn device(&self) -> Mmio {
        self.device
    }

    /// The features agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Hands the next frame that came to `each`: its bytes in one buffer, or their beginning, and how many there are.
    /// False: none came.
    pub fn receive(&mut self, each: impl FnOnce(&mut Self, Region, u64)) -> bool {
        let Some((first, buffer, len)) = self.rx.pop() else {
            return false;
        };
        let mut total = u64::from(len);
        let buffers: u16 = match self.features & MRG_RXBUF != 0 {
            true => buffer.get(10),
            false => 1,
        };
        let mut more = [0; 32];
        for place in more.iter_mut().take(usize::from(buffers.saturating_sub(1))) {
            loop {
                if let Some((head, _, len)) = self.rx.pop() {
                    *place = head;
                    total += u64::from(len);
                    break;
                }
            }
        }
        let there = (u64::from(len) - HEADER).min(buffer.len() - HEADER);
        each(self, buffer.part(HEADER, there), total - HEADER);
        self.rx.offer(first);
        for place in more.iter().take(usize::from(buffers.saturating_sub(1))) {
            self.rx.offer(*place);
        }
        true
    }

    /// Lets the device have the buffers that frames came in.
    pub fn give_back(&mut self) {
        self.rx.publish();
    }

    /// A place to send from, and its buffer: header, then frame. None: all are under way.
    pub fn place(&mut self) -> Option<(u16, Region)> {
        self.places.take()
    }

    /// The buffer of a place.
    pub fn buffer(&self, place: u16) -> Option<Region> {
        self.places.buffer(place)
    }

    /// Offers the first `len` bytes of the buffer at `place`; [`Net::publish`] lets the device see them.
    pub fn offer(&mut self, place: u16, len: u64) {
        if let Some(buffer) = self.places.buffer(place) {
            Descriptor::of(buffer.part(0, len), 0).store(self.tx.table(), place);
            self.tx.offer(place);
        }
    }

    /// Lets the device see what was offered.
    pub fn publish(&mut self) {
        self.tx.publish();
    }

    /// A place whose frame was sent. It is free again.
    pub fn sent(&mut self) -> Option<u16> {
        let (place, _) = self.tx.pop()?;
        self.places.give(place);
        Some(place)
    }

    /// How many frames are under way.
    pub fn under_way(&self) -> usize {
        self.places.under_way()
    }

    /// What `frame` is to us.
    pub fn parse(&self, frame: Region) -> Frame {
        if frame.len() < UDP_PAYLOAD {
            return Frame::Other;
        }
        let from = |ip| Address {
            mac: bytes(frame, 6),
            ip: bytes(frame, ip),
            port: get16(frame, ETHERNET + IPV4),
        };
        match get16(frame, 12) {
            TYPE_ARP if bytes::<4>(frame, 38) == self.address.ip => match get16(frame, 20) {
                1 => Frame::ArpRequest(from(28)),
                2 => Frame::ArpReply(from(28)),
                _ => Frame::Other,
            },
            TYPE_IPV4
                if frame.get::<u8>(23) == PROTOCOL_UDP && get16(frame, 36) == self.address.port =>
            {
                Frame::Udp(from(26))
            }
            _ => Frame::Other,
        }
    }

    /// Sends an ARP packet: a reply to `to`, or a request for its IP address.
    pub fn send_arp(&mut self, to: &Address, reply: bool) {
        let Some((place, buffer)) = self.place() else {
            return;
        };
        buffer.part(0, HEADER).fill(0);
        let frame = buffer.part(HEADER, 42);
        let mut target = *to;
        if !reply {
            target.mac = [0xff; 6];
        }
        write_ethernet(frame, &self.address, &target, TYPE_ARP);
        // Ethernet, IPv4, and the sizes of their addresses.
        put16(frame, 14, 1);
        put16(frame, 16, TYPE_IPV4);
        put16(frame, 18, 0x0604);
        put16(frame, 20, if reply { 2 } else { 1 });
        frame.copy_from(22, &self.address.mac);
        frame.copy_from(28, &self.address.ip);
        frame.copy_from(32, if reply { &to.mac } else { &[0; 6] });
        frame.copy_from(38, &to.ip);
        self.offer(place, HEADER + 42);
        self.publish();
    }
}
