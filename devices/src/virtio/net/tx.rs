//! From the driver to the network.

use std::sync::Arc;

use lepton_hostio::tap::{MAX_SLICES, Offloads, VNET_HEADER_LEN};
use vm_memory::VolatileSlice;

use super::backend::Backend;
use super::frame::{self, ETHERNET_LEN, HEADER_LEN};
use super::mac::{MAC_LEN, Mac};
use super::{BYTES_PER_TURN, FRAMES_PER_TURN, NetMetrics};
use crate::Memory;
use crate::rate_limiter::RateLimiter;
use crate::virtio::device::{DeviceError, Progress};
use crate::virtio::queue::{Chain, Flow, QueueError, Slices, VirtQueue};
use crate::virtio::state::QueuePosition;

/// What is read of a frame besides handing it on: its virtio header and both addresses.
const PEEK_LEN: usize = VNET_HEADER_LEN + 2 * MAC_LEN;

/// The transmit queue at work.
pub(super) struct Transmitter {
    queue: VirtQueue,
    offloads: Offloads,
    mac: Mac,
}

/// A frame that may go to the host.
struct Checked {
    header: [u8; VNET_HEADER_LEN],
    len: u64,
    is_spoofed: bool,
}

impl Transmitter {
    pub(super) fn new(queue: VirtQueue, features: u64, mac: Mac) -> Self {
        Transmitter {
            queue: queue.lingering(),
            offloads: frame::from_driver(features),
            mac,
        }
    }

    /// Where the queue is.
    pub(super) fn position(&self) -> QueuePosition {
        self.queue.position()
    }

    /// Drops what the driver made available, a whole ring of it.
    pub(super) fn discard(&mut self) -> Result<Progress, DeviceError> {
        let ring = usize::from(super::device::MAX_QUEUE_SIZE);
        self.queue.drain(ring, |queue, chain| {
            queue.complete(chain.head(), 0)?;
            Ok(Flow::Continue)
        })
    }

    /// Sends what the driver made available, as far as the limiter and the bound on work allow.
    pub(super) fn run<B: Backend>(
        &mut self,
        backend: &mut B,
        limiter: &mut RateLimiter,
        metrics: &NetMetrics,
    ) -> Result<Progress, DeviceError> {
        if limiter.is_blocked() {
            return Ok(Progress::Done);
        }
        let memory = Arc::clone(self.queue.memory());
        let (offloads, mac) = (self.offloads, self.mac);
        let mut body = Slices::new();
        let mut found = false;
        let mut bytes = 0u64;
        let progress = self.queue.drain(FRAMES_PER_TURN, |queue, chain| {
            found = true;
            if bytes >= BYTES_PER_TURN {
                queue.undo_pop(chain);
                return Ok(Flow::Stop);
            }
            match check(&memory, &chain, offloads, mac, &mut body)? {
                Some(frame) if !limiter.try_take(frame.len) => {
                    metrics.tx_rate_limiter_throttled.inc();
                    queue.undo_pop(chain);
                    return Ok(Flow::Stop);
                }
                Some(frame) => {
                    bytes += frame.len;
                    send(backend, &frame, &body, metrics);
                }
                None => metrics.tx_malformed_frames.inc(),
            }
            queue.complete_soon(&[(chain.head(), 0)])?;
            Ok(Flow::Continue)
        })?;
        if !found {
            metrics.no_tx_avail_buffer.inc();
        }
        if bytes >= BYTES_PER_TURN && !limiter.is_blocked() {
            return Ok(Progress::Again);
        }
        Ok(progress)
    }
}

/// Parses one chain. What follows its virtio header is then in `body`. None: it is no frame, or not one that was
/// negotiated.
fn check<'m>(
    memory: &'m Memory,
    chain: &Chain,
    offloads: Offloads,
    mac: Mac,
    body: &mut Slices<'m>,
) -> Result<Option<Checked>, QueueError> {
    let buffer = &chain.readable;
    if !chain.writable.is_empty() || buffer.len() < HEADER_LEN + ETHERNET_LEN {
        guest_warn!(
            "virtio-net: a frame in {} readable and {} writable bytes dropped",
            buffer.len(),
            chain.writable.len()
        );
        return Ok(None);
    }
    buffer.slices_into(memory, 0..buffer.len(), body)?;
    // A copy: the driver cannot change it between this check and the host's use.
    let mut peek = [0; PEEK_LEN];
    match body.first() {
        Some(first) if first.len() >= PEEK_LEN => {
            first.copy_to(&mut peek);
        }
        _ => buffer.read_at(memory, 0, &mut peek)?,
    }
    let [header @ .., _, _, _, _, _, _, _, _, _, _, _, _] = peek;
    let [.., a, b, c, d, e, f] = peek;
    let len = buffer.len() - HEADER_LEN;
    let header = match frame::check(&header, len, offloads) {
        Ok(header) => header,
        Err(error) => {
            guest_warn!("virtio-net: a frame was dropped: {error}");
            return Ok(None);
        }
    };
    match body.first_mut() {
        Some(first) if first.len() > VNET_HEADER_LEN => {
            if let Ok(rest) = first.offset(VNET_HEADER_LEN) {
                *first = rest;
            }
        }
        _ => buffer.slices_into(memory, HEADER_LEN..buffer.len(), body)?,
    }
    if body.len() > MAX_SLICES {
        guest_warn!("virtio-net: a frame in {} pieces dropped", body.len());
        return Ok(None);
    }
    Ok(Some(Checked {
        header,
        len,
        is_spoofed: mac != [a, b, c, d, e, f],
    }))
}

/// A network loses frames: one that the host does not take now is lost.
fn send<B: Backend>(
    backend: &mut B,
    frame: &Checked,
    body: &[VolatileSlice<'_>],
    metrics: &NetMetrics,
) {
    if frame.is_spoofed {
        metrics.tx_spoofed_mac_count.inc();
    }
    match backend.write_frame(&frame.header, body) {
        Ok(()) => {
            metrics.tx_count.inc();
            metrics.tx_packets_count.inc();
            metrics.tx_bytes_count.add(frame.len);
        }
        Err(error) => {
            metrics.tap_write_fails.inc();
            guest_warn!("virtio-net: the host did not take a frame: {error}");
        }
    }
}
