//! What a driver asks for in one descriptor chain (VIRTIO 1.3, 5.2.6).
//!
//! The readable part holds a header of 16 bytes and what is to be written; the writable part holds room for what is
//! read and, as its last byte, the status. How either part is cut into buffers means nothing (VIRTIO 1.3, 2.7.4).

use lepton_hostio::file::SECTOR_SIZE;
use virtio_bindings::bindings::virtio_blk::*;

use crate::Memory;
use crate::virtio::queue::{Chain, QueueError};

/// Bytes of the header: type, 32 reserved bits, sector.
pub(super) const HEADER_SIZE: u64 = 16;
/// Bytes of the answer to [`Request::GetId`].
pub(super) const ID_SIZE: u64 = VIRTIO_BLK_ID_BYTES as u64;
/// Bytes that describe a range to discard or to zero: sector, number of sectors, flags.
const RANGE_SIZE: u64 = 16;

/// Most sectors in one discard: 1 GiB, which a file system frees in some milliseconds.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors in one write-zeroes: 32 MiB, because some file systems can only write them.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;

/// A request that makes sense for the disk. Every range lies inside it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Read `len` bytes at `offset` into the writable part's first `len` bytes.
    Read { offset: u64, len: u64 },
    /// Write `len` bytes at `offset` from the readable part's bytes behind the header.
    Write { offset: u64, len: u64 },
    /// Put on stable storage what was written.
    Flush,
    /// Forget these bytes.
    Discard { offset: u64, len: u64 },
    /// Make these bytes zeroes; `unmap`: their room on the host may be freed.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
    /// Read the serial number.
    GetId,
}

impl Request {
    /// The bytes that count against a limit on bandwidth.
    pub(super) fn cost(&self) -> u64 {
        match *self {
            Request::Read { len, .. }
            | Request::Write { len, .. }
            | Request::WriteZeroes { len, .. } => len,
            Request::Flush | Request::Discard { .. } | Request::GetId => 0,
        }
    }
}

/// Why a well-formed request is answered with an error status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("{sectors} sectors at sector {sector} are past the end of the disk")]
    OutOfRange { sector: u64, sectors: u64 },
    #[error("{0} bytes are not whole sectors")]
    PartialSector(u64),
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("{0} bytes of ranges, not one range of 16")]
    RangeSize(u64),
    #[error("{0} sectors in one range")]
    RangeTooLong(u32),
    #[error("{0} bytes of room for the serial number of 20")]
    NoRoomForId(u64),
    #[error("flags {0:#x} in a range")]
    Flags(u32),
    #[error("request type {0}")]
    Unsupported(u32),
}

impl Refusal {
    /// The status byte that says so (VIRTIO 1.3, 5.2.6).
    pub(super) fn status(self) -> u8 {
        match self {
            Refusal::Flags(_) | Refusal::Unsupported(_) => status::UNSUPPORTED,
            _ => status::IO_ERROR,
        }
    }
}

/// The status byte's values (VIRTIO 1.3, 5.2.6).
pub(super) mod status {
    use virtio_bindings::bindings::virtio_blk as spec;

    pub(in super::super) const OK: u8 = spec::VIRTIO_BLK_S_OK as u8;
    pub(in super::super) const IO_ERROR: u8 = spec::VIRTIO_BLK_S_IOERR as u8;
    pub(in super::super) const UNSUPPORTED: u8 = spec::VIRTIO_BLK_S_UNSUPP as u8;
}

/// What a request is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    /// The disk's size in sectors.
    pub sectors: u64,
    /// Whether the disk must not be written, whatever the driver negotiated.
    pub read_only: bool,
    /// The negotiated features.
    pub features: u64,
}

impl Rules {
    fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    /// Bytes of a range of sectors, if the disk has them all.
    fn range(&self, sector: u64, sectors: u64) -> Result<(u64, u64), Refusal> {
        let refusal = Refusal::OutOfRange { sector, sectors };
        let end = sector.checked_add(sectors).ok_or(refusal)?;
        if end > self.sectors {
            return Err(refusal);
        }
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(refusal)?;
        let len = sectors.checked_mul(SECTOR_SIZE).ok_or(refusal)?;
        Ok((offset, len))
    }

    fn writable(&self) -> Result<(), Refusal> {
        if self.read_only {
            return Err(Refusal::ReadOnly);
        }
        Ok(())
    }
}

/// Understands one chain. The outer error is a chain without a whole header or without room for a status: there is no
/// way to answer it, and the device needs a reset.
pub(super) fn parse(
    chain: &Chain,
    memory: &Memory,
    rules: &Rules,
) -> Result<Result<Request, Refusal>, QueueError> {
    let malformed = QueueError::Malformed { head: chain.head() };
    let (Some(data_out), Some(data_in)) = (
        chain.readable.len().checked_sub(HEADER_SIZE),
        chain.writable.len().checked_sub(1),
    ) else {
        return Err(malformed);
    };
    let mut header = [0; HEADER_SIZE as usize];
    chain.readable.read_at(memory, 0, &mut header)?;
    let [request_type, _reserved] = halves(header);
    let [_, sector] = words(header);

    let parsed = match request_type {
        VIRTIO_BLK_T_IN => {
            transfer(rules, sector, data_in).map(|(offset, len)| Request::Read { offset, len })
        }
        VIRTIO_BLK_T_OUT => rules
            .writable()
            .and_then(|()| transfer(rules, sector, data_out))
            .map(|(offset, len)| Request::Write { offset, len }),
        VIRTIO_BLK_T_FLUSH if rules.has(VIRTIO_BLK_F_FLUSH) => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID if data_in < ID_SIZE => Err(Refusal::NoRoomForId(data_in)),
        VIRTIO_BLK_T_GET_ID => Ok(Request::GetId),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if rules.read_only => {
            Err(Refusal::ReadOnly)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if data_out != RANGE_SIZE => {
            Err(Refusal::RangeSize(data_out))
        }
        VIRTIO_BLK_T_DISCARD if rules.has(VIRTIO_BLK_F_DISCARD) => {
            discard(rules, read_range(chain, memory)?)
        }
        VIRTIO_BLK_T_WRITE_ZEROES if rules.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
            write_zeroes(rules, read_range(chain, memory)?)
        }
        other => Err(Refusal::Unsupported(other)),
    };
    Ok(parsed)
}

fn transfer(rules: &Rules, sector: u64, bytes: u64) -> Result<(u64, u64), Refusal> {
    if !bytes.is_multiple_of(SECTOR_SIZE) {
        return Err(Refusal::PartialSector(bytes));
    }
    rules.range(sector, bytes / SECTOR_SIZE)
}

/// `struct virtio_blk_discard_write_zeroes`.
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

fn read_range(chain: &Chain, memory: &Memory) -> Result<Range, QueueError> {
    let mut bytes = [0; RANGE_SIZE as usize];
    chain.readable.read_at(memory, HEADER_SIZE, &mut bytes)?;
    let [sector, _] = words(bytes);
    let [_, _, sectors, flags] = quarters(bytes);
    Ok(Range {
        sector,
        sectors,
        flags,
    })
}

/// The unmap flag means nothing to a discard and must be refused (VIRTIO 1.3, 5.2.6.2).
fn discard(rules: &Rules, range: Range) -> Result<Request, Refusal> {
    if range.flags != 0 {
        return Err(Refusal::Flags(range.flags));
    }
    if range.sectors > MAX_DISCARD_SECTORS {
        return Err(Refusal::RangeTooLong(range.sectors));
    }
    let (offset, len) = rules.range(range.sector, range.sectors.into())?;
    Ok(Request::Discard { offset, len })
}

fn write_zeroes(rules: &Rules, range: Range) -> Result<Request, Refusal> {
    if range.flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
        return Err(Refusal::Flags(range.flags));
    }
    if range.sectors > MAX_WRITE_ZEROES_SECTORS {
        return Err(Refusal::RangeTooLong(range.sectors));
    }
    let (offset, len) = rules.range(range.sector, range.sectors.into())?;
    Ok(Request::WriteZeroes {
        offset,
        len,
        unmap: range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
    })
}

/// All fields are little-endian (VIRTIO 1.3, 2.5.3).
fn quarters(bytes: [u8; 16]) -> [u32; 4] {
    let all = u128::from_le_bytes(bytes);
    [0, 32, 64, 96].map(|shift| (all >> shift) as u32)
}

fn halves(bytes: [u8; 16]) -> [u32; 2] {
    let [first, second, ..] = quarters(bytes);
    [first, second]
}

fn words(bytes: [u8; 16]) -> [u64; 2] {
    let all = u128::from_le_bytes(bytes);
    [all as u64, (all >> 64) as u64]
}

#[cfg(test)]
mod tests;
