//! From the network to the driver.
//!
//! Buffers are taken from the ring ahead of time, so that a frame is read straight into them whatever its size. A
//! frame that was read but cannot be delivered yet stays where it is, in guest memory that the driver has not got
//! back: while the rate limiter forbids it, or while the ring has no room for the part that went into `overflow`.
//! Reading goes on with the next event that may have changed this: a kick, the limiter's timer, the tap.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use lepton_hostio::tap::{MAX_SLICES, Offloads};
use smallvec::SmallVec;
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::backend::Backend;
use super::frame::{self, ETHERNET_LEN, HEADER_LEN, MAX_FRAME_LEN, NUM_BUFFERS_OFFSET};
use super::{BYTES_PER_TURN, FRAMES_PER_TURN, NetMetrics};
use crate::Memory;
use crate::rate_limiter::RateLimiter;
use crate::virtio::device::{DeviceError, Progress};
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::state::QueuePosition;

/// Most bytes one read yields.
const MAX_READ: u64 = HEADER_LEN + MAX_FRAME_LEN;
/// Bytes to have at hand beyond the MTU: virtio header and Ethernet header with a VLAN tag.
const LINK_LEN: u64 = HEADER_LEN + ETHERNET_LEN + 4;
/// The MTU of an Ethernet that nobody said anything about.
const ETHERNET_MTU: u16 = 1500;
/// Frames after which the driver is told, if there are more to come.
const FRAMES_PER_SIGNAL: usize = 32;
/// Reads that may fail in a row before the next event is waited for.
const FAILURES_PER_TURN: u32 = 4;

/// Events after which a frame for which there is no more room than before is dropped. A driver gives buffers back
/// within a few; this is for one that never will.
pub(super) const PATIENCE: u32 = 64;

/// Views on all buffers held, in order.
type Views<'m> = SmallVec<[VolatileSlice<'m>; 64]>;

/// The receive queue at work.
pub(super) struct Receiver {
    queue: VirtQueue,
    offloads: Offloads,
    is_mergeable: bool,
    /// Bytes to have room for before a read, if the ring allows: the largest frame to expect.
    wanted: u64,
    /// Buffers taken from the ring and not used yet. Without mergeable buffers at most one.
    held: VecDeque<Chain>,
    /// Bytes in `held`.
    room: u64,
    /// The most that `room` has ever been.
    most_room: u64,
    /// A frame that was read and not delivered.
    waiting: Option<Waiting>,
    /// The part of the waiting frame that found no room in `held`. Empty until it is needed for the first time.
    overflow: Vec<u8>,
    kicks_wanted: bool,
}

/// A frame at the start of the buffers held.
#[derive(Clone, Copy)]
struct Waiting {
    /// Bytes with the header.
    len: u64,
    /// Bytes of them that are in the buffers; the rest is in `overflow`.
    in_place: u64,
    /// The room there was when it was tried last, and how often there was no more.
    room: u64,
    tries: u32,
}

/// What came of trying to read a frame.
enum Read {
    Frame(Waiting),
    /// One was read and dropped, or could not be read.
    Failed,
    Empty,
}

/// What came of trying to deliver a frame.
enum Delivery {
    /// It is gone: delivered, or dropped. So many bytes were delivered.
    Over(u64),
    /// It waits for an event.
    Waits,
}

impl Receiver {
    pub(super) fn new(queue: VirtQueue, features: u64, mtu: Option<u16>) -> Self {
        let offloads = frame::to_driver(features);
        let mtu = mtu.unwrap_or(ETHERNET_MTU).max(ETHERNET_MTU);
        let wanted = match offloads.has_large_frames() {
            true => MAX_READ,
            false => LINK_LEN + u64::from(mtu),
        };
        Receiver {
            queue,
            offloads,
            wanted,
            is_mergeable: features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0,
            held: VecDeque::new(),
            room: 0,
            most_room: 0,
            waiting: None,
            overflow: Vec::new(),
            kicks_wanted: true,
        }
    }

    /// Delivers frames until there are no more, or no buffers, or the limiter or the bound on work says stop.
    pub(super) fn run<B: Backend>(
        &mut self,
        backend: &mut B,
        limiter: &mut RateLimiter,
        metrics: &NetMetrics,
    ) -> Result<Progress, DeviceError> {
        if limiter.is_blocked() {
            return Ok(Progress::Done);
        }
        self.receive(backend, limiter, metrics)
            .and_then(|progress| self.queue.signal().map(|()| progress))
            .map_err(|source| self.queue.fail(source))
    }

    /// Where the queue is, after [`Receiver::quiesce`].
    pub(super) fn position(&self) -> QueuePosition {
        self.queue.position()
    }

    /// Gives every buffer held back to the ring. A waiting frame is delivered if it fits, whatever the limiter says.
    pub(super) fn quiesce(&mut self, metrics: &NetMetrics) -> Result<(), DeviceError> {
        self.settle(metrics)
            .map_err(|source| self.queue.fail(source))
    }

    fn settle(&mut self, metrics: &NetMetrics) -> Result<(), QueueError> {
        let memory = Arc::clone(self.queue.memory());
        if let Some(frame) = self.waiting.take() {
            let mut views = self.views(&memory)?;
            self.take_buffers(frame.len, usize::MAX, &memory, &mut views)?;
            if frame.len <= self.room {
                self.hand_over(frame, &memory, metrics)?;
            } else {
                metrics.rx_fails.inc();
            }
        }
        while let Some(chain) = self.held.pop_back() {
            self.queue.undo_pop(chain);
        }
        self.room = 0;
        self.queue.signal()
    }

    fn receive<B: Backend>(
        &mut self,
        backend: &mut B,
        limiter: &mut RateLimiter,
        metrics: &NetMetrics,
    ) -> Result<Progress, QueueError> {
        let memory = Arc::clone(self.queue.memory());
        let mut views = self.views(&memory)?;
        let mut bytes = 0;
        let mut failures = 0;
        for turn in 1..=FRAMES_PER_TURN {
            let frame = match self.waiting {
                Some(frame) => frame,
                None => {
                    if !self.prepare(&memory, &mut views)? {
                        metrics.no_rx_avail_buffer.inc();
                        return Ok(Progress::Done);
                    }
                    match self.read(backend, &memory, &views, metrics)? {
                        Read::Frame(frame) => frame,
                        Read::Empty => return Ok(Progress::Done),
                        Read::Failed if failures == FAILURES_PER_TURN => return Ok(Progress::Done),
                        Read::Failed => {
                            failures += 1;
                            continue;
                        }
                    }
                }
            };
            failures = 0;
            self.waiting = Some(frame);
            match self.deliver(frame, limiter, &memory, &mut views, metrics)? {
                Delivery::Over(delivered) => bytes += delivered,
                Delivery::Waits => return Ok(Progress::Done),
            }
            self.waiting = None;
            if turn % FRAMES_PER_SIGNAL == 0 {
                self.queue.signal()?;
            }
            if bytes >= BYTES_PER_TURN {
                break;
            }
        }
        Ok(Progress::Again)
    }

    /// Sees to it that there is a buffer, and if possible room for the largest frame to expect. False: there is none,
    /// and a kick will come.
    fn prepare<'m>(
        &mut self,
        memory: &'m Memory,
        views: &mut Views<'m>,
    ) -> Result<bool, QueueError> {
        loop {
            self.take_buffers(self.wanted, MAX_SLICES, memory, views)?;
            if !self.held.is_empty() {
                return Ok(true);
            }
            if !self.want_kick()? {
                return Ok(false);
            }
        }
    }

    /// Takes buffers from the ring until `bytes` fit in those held, or they are in `max_pieces` pieces, or the ring is
    /// empty. Without mergeable buffers it takes but one.
    fn take_buffers<'m>(
        &mut self,
        bytes: u64,
        max_pieces: usize,
        memory: &'m Memory,
        views: &mut Views<'m>,
    ) -> Result<(), QueueError> {
        while self.held.is_empty()
            || (self.is_mergeable && self.room < bytes && views.len() < max_pieces)
        {
            if self.kicks_wanted {
                self.queue.disable_kicks()?;
                self.kicks_wanted = false;
            }
            let Some(chain) = self.queue.pop()? else {
                break;
            };
            let len = chain.writable.len();
            if len < HEADER_LEN {
                // A buffer must hold at least the header (VIRTIO 1.3, 5.1.6.3.1).
                return Err(QueueError::Bounds {
                    start: 0,
                    end: HEADER_LEN,
                    len,
                });
            }
            add_views(&chain, memory, views)?;
            self.held.push_back(chain);
            self.room += len;
        }
        self.most_room = self.most_room.max(self.room);
        Ok(())
    }

    /// Asks for a kick with the next buffer. True: one has come already.
    fn want_kick(&mut self) -> Result<bool, QueueError> {
        self.kicks_wanted = true;
        self.queue.enable_kicks()
    }

    fn views<'m>(&self, memory: &'m Memory) -> Result<Views<'m>, QueueError> {
        let mut views = Views::new();
        for chain in &self.held {
            add_views(chain, memory, &mut views)?;
        }
        Ok(views)
    }

    fn read<B: Backend>(
        &mut self,
        backend: &mut B,
        memory: &Memory,
        views: &Views<'_>,
        metrics: &NetMetrics,
    ) -> Result<Read, QueueError> {
        let used = views.get(..MAX_SLICES).unwrap_or(views);
        let room = if used.len() < views.len() {
            used.iter().map(|view| view.len() as u64).sum()
        } else {
            self.room
        };
        // At most 65565.
        let missing = MAX_READ.saturating_sub(room) as usize;
        if missing > 0 && self.overflow.is_empty() {
            self.overflow = vec![0; MAX_READ as usize];
        }
        let rest = self.overflow.get_mut(..missing).unwrap_or_default();
        let len = match backend.read_frame(used, rest) {
            Ok(len) => len as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Read::Empty),
            Err(error) => {
                // The interface may be down or gone; it may also come back.
                metrics.tap_read_fails.inc();
                guest_warn!("virtio-net: cannot read a frame: {error}");
                return Ok(Read::Failed);
            }
        };
        metrics.rx_count.inc();
        if len <= HEADER_LEN || !self.accept_header(memory)? {
            metrics.rx_fails.inc();
            return Ok(Read::Failed);
        }
        let in_place = len.min(room);
        Ok(Read::Frame(Waiting {
            len,
            in_place,
            room: 0,
            tries: 0,
        }))
    }

    /// Whether the driver is prepared for the frame just read. The host may still have one from before the driver said
    /// what it takes.
    fn accept_header(&self, memory: &Memory) -> Result<bool, QueueError> {
        let Some(first) = self.held.front() else {
            return Ok(false);
        };
        let mut bytes = [0; 2];
        first.writable.read_at(memory, 0, &mut bytes)?;
        let [flags, gso_type] = bytes;
        if !frame::is_negotiated(flags, gso_type, self.offloads) {
            return Ok(false);
        }
        // Without GUEST_CSUM the flags must be 0 (VIRTIO 1.3, 5.1.6.4.1); the host may say that a checksum is right.
        debug_assert!(self.offloads.csum || u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0);
        if !self.offloads.csum && flags != 0 {
            first.writable.write_at(memory, 0, &[0])?;
        }
        Ok(true)
    }

    fn deliver<'m>(
        &mut self,
        frame: Waiting,
        limiter: &mut RateLimiter,
        memory: &'m Memory,
        views: &mut Views<'m>,
        metrics: &NetMetrics,
    ) -> Result<Delivery, QueueError> {
        loop {
            // However small the pieces: this ends with an empty ring, so that waiting is for the driver.
            self.take_buffers(frame.len, usize::MAX, memory, views)?;
            if frame.len <= self.room {
                break;
            }
            // To wait for more room than the driver ever had could be to wait for ever.
            if !self.is_mergeable || frame.len > self.most_room {
                metrics.rx_fails.inc();
                return Ok(Delivery::Over(0));
            }
            if !self.want_kick()? {
                return Ok(self.wait_for_room(frame, metrics));
            }
        }
        if !limiter.try_take(frame.len - HEADER_LEN) {
            metrics.rx_rate_limiter_throttled.inc();
            return Ok(Delivery::Waits);
        }
        let mut used = self.hand_over(frame, memory, metrics)?;
        let count = views
            .iter()
            .take_while(|view| {
                let is_used = used > 0;
                used = used.saturating_sub(view.len() as u64);
                is_used
            })
            .count();
        views.drain(..count);
        Ok(Delivery::Over(frame.len))
    }

    fn wait_for_room(&mut self, frame: Waiting, metrics: &NetMetrics) -> Delivery {
        let tries = match self.room > frame.room {
            true => 0,
            false => frame.tries + 1,
        };
        if tries > PATIENCE {
            metrics.rx_fails.inc();
            return Delivery::Over(0);
        }
        metrics.no_rx_avail_buffer.inc();
        self.waiting = Some(Waiting {
            room: self.room,
            tries,
            ..frame
        });
        Delivery::Waits
    }

    /// Gives the driver the buffers that hold `frame`, which fits in those held. Returns the bytes of these buffers.
    fn hand_over(
        &mut self,
        frame: Waiting,
        memory: &Memory,
        metrics: &NetMetrics,
    ) -> Result<u64, QueueError> {
        let mut used: SmallVec<[(u16, u32); 64]> = SmallVec::new();
        let mut first: Option<Chain> = None;
        // The bytes of the frame, and of the buffers, up to here.
        let (mut start, mut taken) = (0u64, 0u64);
        while start < frame.len {
            let Some(chain) = self.held.pop_front() else {
                break;
            };
            let buffer = &chain.writable;
            let end = frame.len.min(start + buffer.len());
            let copied = start.max(frame.in_place);
            if copied < end {
                let from = (copied - frame.in_place) as usize;
                let to = (end - frame.in_place) as usize;
                let part = self.overflow.get(from..to).unwrap_or_default();
                buffer.write_at(memory, copied - start, part)?;
            }
            // Both are at most the frame's length, 65565.
            used.push((chain.head(), (end - start) as u32));
            taken += buffer.len();
            start = end;
            first.get_or_insert(chain);
        }
        if let Some(first) = first {
            // Without mergeable buffers it is 1 as well (VIRTIO 1.3, 5.1.6.4.1).
            let count = (used.len() as u16).to_le_bytes();
            first
                .writable
                .write_at(memory, NUM_BUFFERS_OFFSET, &count)?;
        }
        self.room -= taken;
        self.queue.complete_soon(&used)?;
        metrics.rx_packets_count.inc();
        metrics.rx_bytes_count.add(frame.len - HEADER_LEN);
        Ok(taken)
    }
}

/// Adds views on all of a chain's buffers.
fn add_views<'m>(
    chain: &Chain,
    memory: &'m Memory,
    views: &mut Views<'m>,
) -> Result<(), QueueError> {
    let buffer = &chain.writable;
    let start = views.len();
    for segment in buffer.iter() {
        match memory.get_slice(segment.addr, segment.len as usize) {
            Ok(view) => views.push(view),
            // It crosses a border between two regions of memory.
            Err(_) => {
                views.truncate(start);
                views.extend(buffer.slices(memory, 0..buffer.len())?);
                break;
            }
        }
    }
    Ok(())
}
