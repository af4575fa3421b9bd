//! Doing what a request asks for, at once or through io_uring.

use std::io;
use std::sync::Arc;

use lepton_hostio::file::{self, Allocation, Disk};
use lepton_hostio::uring::{FileRing, PushError};

use super::request::{HEADER_SIZE, Request};
use crate::Memory;
use crate::virtio::queue::{Chain, QueueError};

/// How a drive does its I/O, `io_engine` in the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// System calls that block the event loop.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// The disk image with what was found out about it.
pub(super) struct Backend {
    pub disk: Disk,
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
    pub(super) fn new(disk: Disk, serial: Option<[u8; 20]>) -> Self {
        Backend {
            serial: serial.unwrap_or(disk.serial()),
            disk,
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
        let file = self.disk.file();
        let outcome = match *request {
            Request::Read { offset, len } => {
                let slices = chain.writable.slices(memory, 0..len)?;
                complete(file::read_vectored_at(file, &slices, offset), len)
            }
            Request::Write { offset, len } => {
                let slices = chain.readable.slices(memory, data_out(len))?;
                complete(file::write_vectored_at(file, &slices, offset), len)
                    .and_then(|_| self.make_durable())
            }
            Request::Flush => file.sync_data().map(|()| 0).map_err(Failure::from),
            Request::Discard { offset, len } => nothing_or(len, || {
                file::deallocate(file, offset, len).map_err(unsupported)
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

    fn make_durable(&self) -> Outcome {
        if self.durable_writes {
            self.disk.file().sync_data()?;
        }
        Ok(0)
    }

    /// The cheapest way that the host has.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<(), Failure> {
        let file = self.disk.file();
        while let Some(what) = self.zero_by(unmap) {
            let result = match what {
                Allocation::Deallocate => file::deallocate(file, offset, len),
                Allocation::ZeroRange => file::zero_range(file, offset, len),
            };
            match result {
                Err(error) if is_unsupported(&error) && what == Allocation::ZeroRange => {
                    self.no_zero_range = true;
                }
                Err(error) if is_unsupported(&error) => break,
                result => return result.map_err(Failure::from),
            }
        }
        file::write_zeroes(file, offset, len).map_err(Failure::from)
    }

    /// How zeroes are made without writing them, if the host can. A freed range reads as zeroes.
    fn zero_by(&self, unmap: bool) -> Option<Allocation> {
        if unmap && self.disk.can_deallocate() {
            Some(Allocation::Deallocate)
        } else if self.no_zero_range {
            None
        } else {
            Some(Allocation::ZeroRange)
        }
    }
}

/// An io_uring and the chains that are in it.
pub(super) struct AsyncEngine {
    ring: FileRing,
    /// By the chain's head, which the queue guarantees to be in flight only once.
    pending: Vec<Option<(Chain, Request)>>,
}

impl AsyncEngine {
    /// An engine for a queue of up to `queue_size` descriptors: as many requests can be in flight, so it is never full.
    pub(super) fn new(disk: &Disk, queue_size: u16) -> io::Result<Self> {
        Ok(AsyncEngine {
            ring: FileRing::new(disk.file(), queue_size)?,
            pending: (0..queue_size).map(|_| None).collect(),
        })
    }

    pub(super) fn ring(&self) -> &FileRing {
        &self.ring
    }

    pub(super) fn set_disk(&mut self, disk: &Disk) -> io::Result<()> {
        self.ring.set_file(disk.file())
    }

    /// Queues `request`; [`AsyncEngine::submit`] starts it, and [`AsyncEngine::reap`] tells its end. What is better
    /// done at once is over when this returns: the chain comes back with its outcome.
    pub(super) fn start(
        &mut self,
        backend: &mut Backend,
        request: Request,
        chain: Chain,
        memory: &Arc<Memory>,
    ) -> Result<Option<(Chain, Outcome)>, QueueError> {
        match self.push(backend, &request, &chain, memory)? {
            Some(Ok(())) => {
                if let Some(place) = self.pending.get_mut(usize::from(chain.head())) {
                    *place = Some((chain, request));
                }
                Ok(None)
            }
            Some(Err(PushError::Memory(error))) => Err(QueueError::Memory(error.to_string())),
            Some(Err(PushError::Offset(error))) => Ok(Some((chain, Err(error.into())))),
            Some(Err(error @ PushError::Full)) => {
                Ok(Some((chain, Err(io::Error::other(error).into()))))
            }
            None => {
                let outcome = backend.execute(&request, &chain, memory)?;
                Ok(Some((chain, outcome)))
            }
        }
    }

    /// None: the request is better done at once.
    fn push(
        &mut self,
        backend: &Backend,
        request: &Request,
        chain: &Chain,
        memory: &Arc<Memory>,
    ) -> Result<Option<Result<(), PushError>>, QueueError> {
        let token = u64::from(chain.head());
        let durable = backend.durable_writes;
        Ok(match *request {
            Request::Read { offset, len } if len > 0 => {
                let parts = chain.writable.clip(0..len)?;
                let parts = parts.map(|part| (part.addr, part.len as usize));
                Some(self.ring.read(token, offset, memory, parts))
            }
            Request::Write { offset, len } if len > 0 => {
                let parts = chain.readable.clip(data_out(len))?;
                let parts = parts.map(|part| (part.addr, part.len as usize));
                Some(self.ring.write(token, offset, memory, parts, durable))
            }
            Request::Flush => Some(self.ring.sync(token)),
            Request::Discard { offset, len } if len > 0 => {
                let what = Allocation::Deallocate;
                Some(self.ring.allocate(token, what, offset, len))
            }
            Request::WriteZeroes { offset, len, unmap } if len > 0 && !durable => backend
                .zero_by(unmap)
                .map(|what| self.ring.allocate(token, what, offset, len)),
            _ => None,
        })
    }

    /// Starts what is queued, with one system call.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    /// Asks for an event when something ends. True: submit and reap once more first.
    pub(super) fn watch(&mut self) -> bool {
        self.ring.watch()
    }

    /// Waits until something in flight has ended.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.ring.wait()
    }

    /// Takes the next request that has ended.
    pub(super) fn reap(
        &mut self,
        backend: &mut Backend,
        memory: &Memory,
    ) -> Result<Option<(Chain, Request, Outcome)>, QueueError> {
        let Some(completion) = self.ring.reap() else {
            return Ok(None);
        };
        let index = usize::try_from(completion.token).unwrap_or(usize::MAX);
        let Some((chain, request)) = self.pending.get_mut(index).and_then(Option::take) else {
            // Tokens come back as they were given.
            return Ok(None);
        };
        let outcome = match (request, completion.result) {
            (Request::Read { len, .. } | Request::Write { len, .. }, Ok(done)) if done != len => {
                Err(Failure::Short { done, wanted: len })
            }
            (Request::Read { .. }, Ok(done)) => Ok(done),
            (_, Ok(_)) => Ok(0),
            // The host cannot make zeroes this way: find another.
            (Request::WriteZeroes { .. }, Err(error)) if is_unsupported(&error) => {
                backend.execute(&request, &chain, memory)?
            }
            (Request::Discard { .. }, Err(error)) => Err(unsupported(error)),
            (_, Err(error)) => Err(error.into()),
        };
        Ok(Some((chain, request, outcome)))
    }

    /// Waits for everything in flight and forgets it.
    pub(super) fn abandon(&mut self) -> io::Result<()> {
        while self.ring.in_flight() > 0 {
            self.ring.wait()?;
            while self.ring.reap().is_some() {}
        }
        self.pending.fill_with(|| None);
        Ok(())
    }
}

/// The data of a write in the readable part.
fn data_out(len: u64) -> std::ops::Range<u64> {
    HEADER_SIZE..HEADER_SIZE.saturating_add(len)
}

fn complete(result: io::Result<usize>, wanted: u64) -> Outcome {
    match result? as u64 {
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

fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

fn unsupported(error: io::Error) -> Failure {
    if is_unsupported(&error) {
        return Failure::Unsupported;
    }
    Failure::Io(error)
}
