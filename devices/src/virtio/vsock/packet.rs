//! Packets: a 44-byte header and up to `len` bytes of data (VIRTIO 1.3, 5.10.6).
//!
//! Everything a header says is a claim. Its `len` is compared to what the chain holds before any byte is touched.

use crate::Memory;
use crate::virtio::queue::{Chain, QueueError, Segments, Slices};

/// Bytes of a header. It may be split over descriptors in any way (VIRTIO 1.3, 2.7.4).
pub const HEADER_LEN: u64 = 44;

/// Socket type of byte streams (VIRTIO 1.3, 5.10.6.1). The only one offered.
pub const TYPE_STREAM: u16 = 1;

/// What a packet is for (VIRTIO 1.3, 5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Ends or refuses a connection.
    Rst = 3,
    /// The sender will not send, or not receive, any more.
    Shutdown = 4,
    /// Data.
    Rw = 5,
    /// Tells the sender's credit.
    CreditUpdate = 6,
    /// Asks for the receiver's credit.
    CreditRequest = 7,
}

impl Op {
    fn parse(raw: u16) -> Option<Op> {
        Some(match raw {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// Which directions the sender of a SHUTDOWN gives up (VIRTIO 1.3, 5.10.6.6).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShutdownFlags {
    /// Bit 0: the sender will not receive any more.
    pub receive: bool,
    /// Bit 1: the sender will not send any more.
    pub send: bool,
}

impl ShutdownFlags {
    /// Both directions.
    pub const BOTH: ShutdownFlags = ShutdownFlags {
        receive: true,
        send: true,
    };

    /// The flags of a header; other bits mean nothing.
    pub fn parse(flags: u32) -> Self {
        ShutdownFlags {
            receive: flags & 1 != 0,
            send: flags & 2 != 0,
        }
    }

    /// The flags as a header has them.
    pub fn bits(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// What either gives up. It cannot be taken back.
    pub fn or(self, other: Self) -> Self {
        ShutdownFlags {
            receive: self.receive || other.receive,
            send: self.send || other.send,
        }
    }
}

/// What names a connection: there is one guest and one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionKey {
    /// The guest's port.
    pub guest_port: u32,
    /// The host's port.
    pub host_port: u32,
}

/// A header, with host byte order. Guest values are unchecked but for the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Context ID of the sender.
    pub src_cid: u64,
    /// Context ID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation; `None` is one that does not exist.
    pub op: Option<Op>,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes of receive buffer the sender has for this connection.
    pub buf_alloc: u32,
    /// Bytes of that buffer the sender has emptied since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header from its bytes.
    pub fn parse(bytes: &[u8; HEADER_LEN as usize]) -> Header {
        let mut rest: &[u8] = bytes;
        Header {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: Op::parse(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The header's bytes. An operation that does not exist is written as 0, "invalid".
    pub fn to_bytes(&self) -> [u8; HEADER_LEN as usize] {
        let mut bytes = [0; HEADER_LEN as usize];
        let mut rest: &mut [u8] = &mut bytes;
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.map_or(0, |op| op as u16).to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The connection a packet from the guest belongs to.
    pub fn key(&self) -> ConnectionKey {
        ConnectionKey {
            guest_port: self.src_port,
            host_port: self.dst_port,
        }
    }

    /// The RST that answers this packet when there is no connection for it (VIRTIO 1.3, 5.10.6.4).
    pub fn refusal(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Some(Op::Rst),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

/// Takes the next `N` bytes. The callers' widths add up to the header's, so there are always enough.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((now, later)) => {
            *rest = later;
            *now
        }
        None => [0; N],
    }
}

fn put<const N: usize>(rest: &mut &mut [u8], bytes: [u8; N]) {
    if let Some((now, later)) = std::mem::take(rest).split_first_chunk_mut() {
        *now = bytes;
        *rest = later;
    }
}

/// Why a chain of the transmit queue holds no packet.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// Fewer readable bytes than a header has.
    #[error("{0} readable bytes do not hold a header of 44")]
    NoHeader(u64),
    /// The data is not all there.
    #[error("header says {} bytes of data, the buffer holds {room}", header.len)]
    Length {
        /// The header, whose `len` is a lie.
        header: Header,
        /// Bytes behind the header.
        room: u64,
    },
    /// Guest memory refused an access that was checked before.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

/// A packet from the guest: a header and where its data lies.
#[derive(Debug, Clone, Copy)]
pub struct TxPacket<'c> {
    /// The header. `len` bytes of data are there.
    pub header: Header,
    buffer: &'c Segments,
}

impl<'c> TxPacket<'c> {
    /// Finds the packet in a chain of the transmit queue. Bytes past `len` mean nothing.
    pub fn parse(memory: &Memory, chain: &'c Chain) -> Result<Self, PacketError> {
        let buffer = &chain.readable;
        let Some(room) = buffer.len().checked_sub(HEADER_LEN) else {
            return Err(PacketError::NoHeader(buffer.len()));
        };
        let mut bytes = [0; HEADER_LEN as usize];
        buffer.read_at(memory, 0, &mut bytes)?;
        let header = Header::parse(&bytes);
        if u64::from(header.len) > room {
            return Err(PacketError::Length { header, room });
        }
        Ok(TxPacket { header, buffer })
    }

    /// The data, `header.len` bytes.
    pub fn data<'m>(&self, memory: &'m Memory) -> Result<Slices<'m>, QueueError> {
        self.buffer
            .slices(memory, HEADER_LEN..HEADER_LEN + u64::from(self.header.len))
    }
}

/// Bytes of data a chain of the receive queue has room for behind the header. `None`: not even one.
pub fn rx_room(chain: &Chain) -> Option<u32> {
    let room = chain.writable.len().checked_sub(HEADER_LEN)?;
    // The used ring counts the header as well, in 32 bits.
    let room = room.min(u64::from(u32::MAX) - HEADER_LEN);
    u32::try_from(room).ok().filter(|&room| room > 0)
}

/// Where the first `len` bytes of data of a packet to the guest go.
pub fn rx_data<'m>(memory: &'m Memory, chain: &Chain, len: u32) -> Result<Slices<'m>, QueueError> {
    chain
        .writable
        .slices(memory, HEADER_LEN..HEADER_LEN + u64::from(len))
}

/// Writes the header of a packet to the guest.
pub fn write_header(memory: &Memory, chain: &Chain, header: &Header) -> Result<(), QueueError> {
    chain.writable.write_at(memory, 0, &header.to_bytes())
}
