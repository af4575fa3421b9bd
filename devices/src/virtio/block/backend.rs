//! What is behind a drive, and doing to it at once what a request asks for.

use std::fs::File;
use std::io;

use lepton_hostio::file::{self, Allocation, Disk, SECTOR_SIZE};

use super::overlay::Overlay;
use super::request::{HEADER_SIZE, Request};
use crate::Memory;
use crate::virtio::queue::{Chain, QueueError};

/// What a guest's disk is on the host.
pub enum Image {
    /// A raw image.
    Raw(Disk),
    /// An overlay over a base image.
    Overlay(Box<Overlay>),
}

impl From<Disk> for Image {
    fn from(disk: Disk) -> Self {
        Image::Raw(disk)
    }
}

impl From<Overlay> for Image {
    fn from(overlay: Overlay) -> Self {
        Image::Overlay(Box::new(overlay))
    }
}

impl Image {
    /// The file that is written.
    pub fn disk(&self) -> &Disk {
        match self {
            Image::Raw(disk) => disk,
            Image::Overlay(overlay) => overlay.disk(),
        }
    }

    /// Whether it was opened read-only.
    pub fn read_only(&self) -> bool {
        self.disk().read_only()
    }

    /// Its size in whole sectors.
    pub fn sectors(&self) -> u64 {
        match self {
            Image::Raw(disk) => disk.sectors(),
            Image::Overlay(overlay) => overlay.geometry().size() / SECTOR_SIZE,
        }
    }

    /// Smallest unit in bytes that the host reads and writes.
    pub fn block_size(&self) -> u32 {
        self.disk().block_size()
    }

    /// Whether the host can free part of it.
    pub fn can_deallocate(&self) -> bool {
        self.disk().can_deallocate()
    }

    /// Its files, the one that is written first.
    pub(super) fn files(&self) -> Vec<&File> {
        match self {
            Image::Raw(disk) => vec![disk.file()],
            Image::Overlay(overlay) => overlay.files(),
        }
    }
}

/// The disk image with what was found out about it.
pub(super) struct Backend {
    pub image: Image,
    /// What GET_ID answers.
    pub serial: [u8; 20],
    /// Each write must be on stable storage when it ends, because the driver does not flush.
    pub durable_writes: bool,
    /// The host said that it cannot make zeroes without writing them.
    pub no_zero_range: bool,
}

/// Why a request failed that made sense.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The host's word.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The image ends early: it was truncated after it was opened.
    #[error("{done} of {wanted} bytes: the image was cut short")]
    Short { done: u64, wanted: u64 },
    /// The host cannot do this at all.
    #[error("the host does not support it")]
    Unsupported,
}

/// Bytes that a request put in its chain's writable part before the status.
pub(super) type Outcome = Result<u64, Failure>;

impl Backend {
    pub(super) fn new(image: Image, serial: Option<[u8; 20]>) -> Self {
        Backend {
            serial: serial.unwrap_or(image.disk().serial()),
            image,
            durable_writes: false,
            no_zero_range: false,
        }
    }

    /// Does `request` to its end. The outer error is the queue's, after which the device needs a reset.
    pub(super) fn execute(
        &mut self,
        request: &Request,
        chain: &Chain,
        memory: &Memory,
    ) -> Result<Outcome, QueueError> {
        let outcome = match *request {
            Request::Read { offset, len } => {
                let slices = chain.writable.slices(memory, 0..len)?;
                match &mut self.image {
                    Image::Raw(disk) => {
                        let done = file::read_vectored_at(disk.file(), &slices, offset);
                        complete(done.map(|done| done as u64), len)
                    }
                    Image::Overlay(overlay) => complete(overlay.read(&slices, offset), len),
                }
            }
            Request::Write { offset, len } => {
                let slices = chain.readable.slices(memory, data_out(len))?;
                let done = match &mut self.image {
                    Image::Raw(disk) => {
                        let done = file::write_vectored_at(disk.file(), &slices, offset);
                        complete(done.map(|done| done as u64), len)
                    }
                    Image::Overlay(overlay) => nothing_or(len, || {
                        complete(overlay.write(&slices, offset), len).map(drop)
                    }),
                };
                done.and_then(|_| self.make_durable())
            }
            Request::Flush => self.flush().map(|()| 0).map_err(Failure::from),
            Request::Discard { offset, len } => nothing_or(len, || {
                let result = match &mut self.image {
                    Image::Raw(disk) => file::deallocate(disk.file(), offset, len),
                    Image::Overlay(overlay) => overlay.discard(offset, len),
                };
                result.map_err(unsupported)
            }),
            Request::WriteZeroes { offset, len, unmap } => {
                nothing_or(len, || self.write_zeroes(offset, len, unmap))
                    .and_then(|_| self.make_durable())
            }
            Request::GetId => {
                chain.writable.write_at(memory, 0, &self.serial)?;
                Ok(self.serial.len() as u64)
            }
        };
        Ok(outcome)
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.image {
            Image::Raw(disk) => disk.file().sync_data(),
            Image::Overlay(overlay) => overlay.flush(),
        }
    }

    fn make_durable(&mut self) -> Outcome {
        if self.durable_writes {
            self.flush()?;
        }
        Ok(0)
    }

    /// The cheapest way that the host has.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<(), Failure> {
        while let Some(what) = self.zero_by(unmap) {
            let result = match (&mut self.image, what) {
                (Image::Raw(disk), Allocation::Deallocate) => {
                    file::deallocate(disk.file(), offset, len)
                }
                (Image::Raw(disk), Allocation::ZeroRange) => {
                    file::zero_range(disk.file(), offset, len)
                }
                (Image::Overlay(overlay), what) => overlay.zero_by(what, offset, len),
            };
            match result {
                Err(error) if is_unsupported(&error) && what == Allocation::ZeroRange => {
                    self.no_zero_range = true;
                }
                Err(error) if is_unsupported(&error) => break,
                result => return result.map_err(Failure::from),
            }
        }
        match &mut self.image {
            Image::Raw(disk) => file::write_zeroes(disk.file(), offset, len),
            Image::Overlay(overlay) => overlay.write_zeroes(offset, len),
        }
        .map_err(Failure::from)
    }

    /// How zeroes are made without writing them, if the host can. A freed range reads as zeroes.
    pub(super) fn zero_by(&self, unmap: bool) -> Option<Allocation> {
        if unmap && self.image.can_deallocate() {
            Some(Allocation::Deallocate)
        } else if self.no_zero_range {
            None
        } else {
            Some(Allocation::ZeroRange)
        }
    }
}

/// The data of a write in the readable part.
pub(super) fn data_out(len: u64) -> std::ops::Range<u64> {
    HEADER_SIZE..HEADER_SIZE.saturating_add(len)
}

fn complete(result: io::Result<u64>, wanted: u64) -> Outcome {
    match result? {
        done if done == wanted => Ok(done),
        done => Err(Failure::Short { done, wanted }),
    }
}

/// The host refuses empty ranges; for a driver they are done.
fn nothing_or(len: u64, work: impl FnOnce() -> Result<(), Failure>) -> Outcome {
    if len > 0 {
        work()?;
    }
    Ok(0)
}

pub(super) fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

pub(super) fn unsupported(error: io::Error) -> Failure {
    if is_unsupported(&error) {
        return Failure::Unsupported;
    }
    Failure::Io(error)
}
