//! Doing what requests ask for through io_uring.
//!
//! A raw image has one file, and each request is one operation of the ring. On an overlay
//! - a read is an operation for each file that has part of it,
//! - a write, once the clusters at its ends are copied up, is one operation, and its clusters become the overlay's when it
//!   has ended; until then they are *claimed*, and whatever else touches them waits,
//! - a flush is up to two syncs with the bits written between them. Flushes that come meanwhile share the next one.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use lepton_hostio::file::Allocation;
use lepton_hostio::uring::{Completion, FileNumber, FileRing, PushError};
use smallvec::SmallVec;

use super::backend::{Backend, Failure, Image, Outcome, data_out, is_unsupported, unsupported};
use super::overlay::{MAX_LAYERS, Overlay, Piece, clusters_of};
use super::request::Request;
use crate::Memory;
use crate::virtio::queue::{Chain, QueueError};

mod flushing;

use self::flushing::{FLUSH, Flushing};

/// How a drive does its I/O, `io_engine` in the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// System calls that block the event loop.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// Files of a drive: its own, its base, its layers.
const PLACES: u8 = MAX_LAYERS as u8 + 2;
/// Most operations for one read; one in more pieces is better done at once.
const MAX_PIECES: usize = 16;

/// A request in the ring.
struct Pending {
    chain: Chain,
    request: Request,
    /// Operations that have not ended.
    parts: usize,
    /// Bytes that were transferred.
    done: u64,
    failed: Option<io::Error>,
}

/// A request that is over.
type Ended = (Chain, Request, Outcome);

/// An io_uring and the chains that are in it.
pub(super) struct AsyncEngine {
    ring: FileRing,
    /// By the chain's head, which the queue guarantees to be in flight only once.
    pending: Vec<Option<Pending>>,
    /// Over, and not given back.
    ended: VecDeque<Ended>,
    /// Clusters that will be the overlay's own when the chain of that head is over.
    claims: Vec<(u16, Range<u64>)>,
    flushing: Option<Flushing>,
    /// Chains that wait for the next flush.
    next_flush: Vec<u16>,
}

impl AsyncEngine {
    /// An engine for a queue of up to `queue_size` descriptors: as many requests can be in flight, so it is never full.
    pub(super) fn new(image: &Image, queue_size: u16) -> io::Result<Self> {
        Self::with_places(image, queue_size, PLACES)
    }

    /// The same, with room for so many files.
    pub(super) fn with_places(image: &Image, queue_size: u16, places: u8) -> io::Result<Self> {
        // Reads in several pieces take what is left of twice as many places.
        let depth = match image {
            Image::Raw(_) => queue_size,
            Image::Overlay(_) => queue_size.saturating_mul(2),
        };
        Ok(AsyncEngine {
            ring: FileRing::with_places(&image.files(), places, depth)?,
            pending: (0..queue_size).map(|_| None).collect(),
            ended: VecDeque::new(),
            claims: Vec::new(),
            flushing: None,
            next_flush: Vec::new(),
        })
    }

    pub(super) fn ring(&self) -> &FileRing {
        &self.ring
    }

    pub(super) fn set_image(&mut self, image: &Image) -> io::Result<()> {
        self.ring.set_files(&image.files())
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
        if let Image::Overlay(_) = backend.image {
            return self.start_on_overlay(backend, request, chain, memory);
        }
        match self.push(backend, &request, &chain, memory, 0)? {
            Some(Ok(())) => {
                self.keep(chain, request, 1);
                Ok(None)
            }
            Some(Err(error)) => refused(chain, error),
            None => {
                let outcome = backend.execute(&request, &chain, memory)?;
                Ok(Some((chain, outcome)))
            }
        }
    }

    fn keep(&mut self, chain: Chain, request: Request, parts: usize) {
        if let Some(place) = self.pending.get_mut(usize::from(chain.head())) {
            *place = Some(Pending {
                chain,
                request,
                parts,
                done: 0,
                failed: None,
            });
        }
    }

    /// A request that is one operation on the first file, in which the disk starts at `base`. None: it is better done
    /// at once.
    fn push(
        &mut self,
        backend: &Backend,
        request: &Request,
        chain: &Chain,
        memory: &Arc<Memory>,
        base: u64,
    ) -> Result<Option<Result<(), PushError>>, QueueError> {
        let token = u64::from(chain.head());
        let durable = backend.durable_writes;
        Ok(match *request {
            Request::Read { offset, len } if len > 0 => {
                let parts = chain.writable.clip(0..len)?;
                let parts = parts.map(|part| (part.addr, part.len as usize));
                let place = (FileNumber::FIRST, offset);
                Some(self.ring.read(token, place, memory, parts))
            }
            Request::Write { offset, len } if len > 0 => {
                let parts = chain.readable.clip(data_out(len))?;
                let parts = parts.map(|part| (part.addr, part.len as usize));
                let offset = base.saturating_add(offset);
                Some(self.ring.write(token, offset, memory, parts, durable))
            }
            Request::Flush => Some(self.ring.sync(token)),
            Request::Discard { offset, len } if len > 0 => {
                let what = Allocation::Deallocate;
                let offset = base.saturating_add(offset);
                Some(self.ring.allocate(token, what, offset, len))
            }
            Request::WriteZeroes { offset, len, unmap } if len > 0 && !durable => {
                let offset = base.saturating_add(offset);
                backend
                    .zero_by(unmap)
                    .map(|what| self.ring.allocate(token, what, offset, len))
            }
            _ => None,
        })
    }

    fn start_on_overlay(
        &mut self,
        backend: &mut Backend,
        request: Request,
        chain: Chain,
        memory: &Arc<Memory>,
    ) -> Result<Option<(Chain, Outcome)>, QueueError> {
        let (offset, len) = match request {
            Request::Read { offset, len }
            | Request::Write { offset, len }
            | Request::Discard { offset, len }
            | Request::WriteZeroes { offset, len, .. } => (offset, len),
            Request::Flush => {
                let head = chain.head();
                self.keep(chain, request, 1);
                self.next_flush.push(head);
                self.begin_flush(backend);
                return Ok(None);
            }
            Request::GetId => (0, 0),
        };
        let clusters = match len {
            0 => 0..0,
            _ => clusters_of(offset, len),
        };
        if self.is_claimed(&clusters)
            && let Err(error) = self.settle_all(backend, memory)?
        {
            return Ok(Some((chain, Err(error.into()))));
        }
        if let Request::Read { .. } = request {
            return self.start_read(backend, request, chain, memory);
        }
        let pushed = match &mut backend.image {
            // With the bits that have to be durable too, it is no single operation.
            Image::Overlay(_) if backend.durable_writes || len == 0 => None,
            Image::Overlay(overlay) => {
                if let Err(error) = overlay.prepare(offset, len) {
                    return Ok(Some((chain, Err(error.into()))));
                }
                let (base, adds) = (overlay.own_offset(0), overlay.would_add(offset, len));
                let pushed = self.push(backend, &request, &chain, memory, base)?;
                if adds && let Some(Ok(())) = pushed {
                    self.claims.push((chain.head(), clusters));
                }
                pushed
            }
            Image::Raw(_) => None,
        };
        match pushed {
            Some(Ok(())) => {
                self.keep(chain, request, 1);
                Ok(None)
            }
            Some(Err(error)) => refused(chain, error),
            None => {
                let outcome = backend.execute(&request, &chain, memory)?;
                Ok(Some((chain, outcome)))
            }
        }
    }

    fn is_claimed(&self, clusters: &Range<u64>) -> bool {
        let mut claims = self.claims.iter();
        claims.any(|(_, claim)| claim.start < clusters.end && clusters.start < claim.end)
    }

    /// Queues an operation for each piece of a read.
    fn start_read(
        &mut self,
        backend: &mut Backend,
        request: Request,
        chain: Chain,
        memory: &Arc<Memory>,
    ) -> Result<Option<(Chain, Outcome)>, QueueError> {
        let pieces = match (&mut backend.image, request) {
            (Image::Overlay(overlay), Request::Read { offset, len }) => {
                match pieces(overlay, offset..offset.saturating_add(len)) {
                    Ok(pieces) => pieces,
                    Err(error) => return Ok(Some((chain, Err(error.into())))),
                }
            }
            _ => None,
        };
        // Each request that is still to come has a place of its own.
        let running = self.pending.iter().flatten().count();
        let reserved = self.pending.len().saturating_sub(running + 1);
        let spare = self.ring.room().saturating_sub(reserved);
        let Some(pieces) = pieces.filter(|pieces| (1..=spare).contains(&pieces.len())) else {
            let outcome = backend.execute(&request, &chain, memory)?;
            return Ok(Some((chain, outcome)));
        };
        let (token, mut at) = (u64::from(chain.head()), 0u64);
        for piece in &pieces {
            let end = at.saturating_add(piece.len);
            let parts = chain.writable.clip(at..end)?;
            let parts = parts.map(|part| (part.addr, part.len as usize));
            let place = (piece.file, piece.offset);
            if let Err(error) = self.ring.read(token, place, memory, parts) {
                // Pieces that are in the ring come back without a chain.
                return refused(chain, error);
            }
            at = end;
        }
        self.keep(chain, request, pieces.len());
        Ok(None)
    }

    /// Starts what is queued, with one system call.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    /// Whether nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.ring.in_flight() == 0
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
    ) -> Result<Option<Ended>, QueueError> {
        loop {
            if let Some(ended) = self.ended.pop_front() {
                return Ok(Some(ended));
            }
            let Some(completion) = self.ring.reap() else {
                return Ok(None);
            };
            if let Some(ended) = self.settle(completion, backend, memory)? {
                return Ok(Some(ended));
            }
        }
    }

    /// Takes note of an operation's end; gives the request if that was the last of it.
    fn settle(
        &mut self,
        completion: Completion,
        backend: &mut Backend,
        memory: &Memory,
    ) -> Result<Option<Ended>, QueueError> {
        let Completion { token, result } = completion;
        if token == FLUSH {
            self.go_on_flushing(backend, result.map(drop));
            return Ok(None);
        }
        let place = self
            .pending
            .get_mut(usize::try_from(token).unwrap_or(usize::MAX));
        let Some(place) = place else {
            // Tokens come back as they were given.
            return Ok(None);
        };
        let Some(pending) = place else {
            return Ok(None);
        };
        match result {
            Ok(done) => pending.done = pending.done.saturating_add(done),
            Err(error) => pending.failed = Some(error),
        }
        pending.parts = pending.parts.saturating_sub(1);
        if pending.parts > 0 {
            return Ok(None);
        }
        let Some(Pending {
            chain,
            request,
            done,
            failed,
            ..
        }) = place.take()
        else {
            return Ok(None);
        };
        if let Image::Overlay(_) = backend.image {
            self.claims.retain(|(head, _)| *head != chain.head());
        }
        let outcome = match (request, failed) {
            (Request::Read { len, .. } | Request::Write { len, .. }, None) if done != len => {
                Err(Failure::Short { done, wanted: len })
            }
            (Request::Read { .. }, None) => Ok(done),
            (_, None) => match &mut backend.image {
                Image::Raw(_) => Ok(0),
                Image::Overlay(overlay) => now_own(overlay, &request),
            },
            // The host cannot make zeroes this way: find another.
            (Request::WriteZeroes { .. }, Some(error)) if is_unsupported(&error) => {
                backend.execute(&request, &chain, memory)?
            }
            (Request::Discard { .. }, Some(error)) => Err(unsupported(error)),
            (_, Some(error)) => Err(error.into()),
        };
        Ok(Some((chain, request, outcome)))
    }

    /// Waits for everything in flight; what is over is kept to be given back.
    fn settle_all(
        &mut self,
        backend: &mut Backend,
        memory: &Memory,
    ) -> Result<io::Result<()>, QueueError> {
        while self.ring.in_flight() > 0 {
            if let Err(error) = self.ring.wait() {
                return Ok(Err(error));
            }
            while let Some(completion) = self.ring.reap() {
                let ended = self.settle(completion, backend, memory)?;
                self.ended.extend(ended);
            }
        }
        Ok(Ok(()))
    }

    /// Waits for everything in flight and forgets it.
    pub(super) fn abandon(&mut self, backend: &mut Backend, memory: &Memory) -> io::Result<()> {
        // What the ring has done, the overlay has to know; the queue is none any more.
        let result = match self.settle_all(backend, memory) {
            Ok(result) => result,
            Err(error) => Err(io::Error::other(error)),
        };
        self.pending.fill_with(|| None);
        self.ended.clear();
        self.claims.clear();
        self.next_flush.clear();
        result
    }
}

/// The pieces of a read, unless there are too many.
fn pieces(
    overlay: &mut Overlay,
    mut range: Range<u64>,
) -> io::Result<Option<SmallVec<[Piece; 4]>>> {
    let mut pieces = SmallVec::new();
    while !range.is_empty() {
        if pieces.len() == MAX_PIECES {
            return Ok(None);
        }
        let piece = overlay.piece(range.clone())?;
        range.start = range.start.saturating_add(piece.len);
        pieces.push(piece);
    }
    Ok(Some(pieces))
}

/// The clusters that `request` has written are the overlay's own.
fn now_own(overlay: &mut Overlay, request: &Request) -> Outcome {
    match *request {
        Request::Write { offset, len }
        | Request::Discard { offset, len }
        | Request::WriteZeroes { offset, len, .. } => overlay.written(offset, len)?,
        Request::Read { .. } | Request::Flush | Request::GetId => {}
    }
    Ok(0)
}

/// What could not be queued, as far as the driver is concerned.
fn refused(chain: Chain, error: PushError) -> Result<Option<(Chain, Outcome)>, QueueError> {
    match error {
        PushError::Memory(error) => Err(QueueError::Memory(error.to_string())),
        PushError::Io(error) => Ok(Some((chain, Err(error.into())))),
        PushError::Full => Ok(Some((chain, Err(io::Error::other(error).into())))),
    }
}
