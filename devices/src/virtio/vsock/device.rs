//! The socket device's queues (VIRTIO 1.3, 5.10.2) and configuration space.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

use super::exchange::Exchange;
use super::muxer::{Muxer, Rx};
use super::packet::{
    ConnectionKey, HEADER_LEN, PacketError, TxPacket, rx_data, rx_room, write_header,
};
use super::{Cid, VsockMetrics};
use crate::Memory;
use crate::virtio::device::{DeviceError, DeviceKind, Progress, Resources, VirtioDevice};
use crate::virtio::queue::{Chain, Flow, QueueError, VirtQueue};
use crate::virtio::state::{DeviceState, QueuePosition, RestoreError};

/// The queues' size if nobody asks for another.
pub const QUEUE_SIZE: u16 = 256;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// VIRTIO_VSOCK_F_STREAM (VIRTIO 1.3, 5.10.3).
const FEATURE_STREAM: u64 = 1 << 0;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (VIRTIO 1.3, 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Packets taken from the guest before other devices get their turn: at 64 KiB each about a millisecond of copying.
const TX_BUDGET: usize = 64;
/// Buffers filled for the guest before other devices get their turn.
const RX_BUDGET: usize = 256;
/// Buffers filled with one read.
const READ_BUFFERS: usize = 32;
/// Bytes read from one host before another gets its turn.
const READ_BYTES: u32 = 128 << 10;

/// For how long nothing of the host reaches a guest that has not heard yet that its connections are gone: it would take
/// new ones for lost ones. A driver hears of it as soon as the guest runs, which may take long on a host that is busy; one
/// that does not listen gets its connections all the same.
const RESET_PATIENCE: Duration = Duration::from_secs(30);

/// What a socket device is made of.
#[derive(Debug)]
pub struct VsockConfig {
    /// The guest's context ID.
    pub guest_cid: Cid,
    /// Where host clients connect to; see [`lepton_hostio::listener::bind`]. Made non-blocking.
    pub listener: UnixListener,
    /// Host servers listen at this path with `_PORT` behind it.
    pub uds_path: PathBuf,
    /// Size of each queue, a power of two up to 32768; normally [`QUEUE_SIZE`].
    pub queue_size: u16,
}

/// A socket device.
pub struct Vsock {
    pub(super) cid: Cid,
    pub(super) queue_sizes: [u16; 3],
    pub(super) muxer: Muxer,
    pub(super) metrics: Arc<VsockMetrics>,
    pub(super) active: Option<Active>,
    /// Its state was loaded: the driver, if there is one, has connections that are gone.
    pub(super) restored: bool,
    /// [`RESET_PATIENCE`].
    pub(super) reset_patience: Duration,
}

/// What a device has between activation and reset.
pub(super) struct Active {
    pub(super) rx: VirtQueue,
    pub(super) tx: VirtQueue,
    pub(super) event: VirtQueue,
    /// Packets were left in the transmit queue, because the guest does not take our answers.
    tx_stopped: bool,
    /// The driver is asked to kick the receive queue. Only while there is something for it and no buffer.
    rx_kicks: bool,
    /// Nothing of the host was looked at yet.
    fresh: bool,
    /// The guest is to be told that all its connections are gone.
    transport_reset: bool,
    /// It was told in the event queue, and gives the buffer back once it has read it: how many it had given before.
    reset_told: Option<u16>,
    /// When its time for that is over.
    reset_over: Option<Instant>,
    /// Buffers of one read. Empty between reads; kept for its memory.
    buffers: Vec<(Chain, u32)>,
}

impl Vsock {
    /// A device that is not active. Clients that connect before the driver is ready wait in the socket's backlog.
    pub fn new(config: VsockConfig) -> io::Result<Self> {
        let VsockConfig {
            guest_cid,
            listener,
            uds_path,
            queue_size,
        } = config;
        let metrics = Arc::new(VsockMetrics::default());
        Ok(Vsock {
            cid: guest_cid,
            queue_sizes: [queue_size; 3],
            muxer: Muxer::new(guest_cid, listener, uds_path, metrics.clone())?,
            metrics,
            active: None,
            restored: false,
            reset_patience: RESET_PATIENCE,
        })
    }

    /// What the device counts.
    pub fn metrics(&self) -> &Arc<VsockMetrics> {
        &self.metrics
    }

    /// Ends all connections and tells the driver so (VIRTIO 1.3, 5.10.6.7). To be called after the machine was
    /// restored: the hosts at the other ends are not those that the guest talked to. Listening sockets in the guest stay.
    pub fn transport_reset(&mut self) -> Result<(), DeviceError> {
        self.muxer.reset();
        match &mut self.active {
            Some(active) => {
                active.fresh = true;
                active.transport_reset = true;
                active.reset_over = None;
                active.send_event()
            }
            None => Ok(()),
        }
    }

    /// Lets the guest talk to nobody, or to anybody again. After the latter the device is to look at everything.
    pub fn hold(&mut self, held: bool) {
        self.muxer.hold(held, Instant::now());
    }

    /// Asks the guest something, as soon as it can be reached, held or not.
    pub fn ask(&mut self, exchange: Exchange) {
        self.muxer.ask(exchange, Instant::now());
    }

    /// Moves packets both ways.
    fn service(&mut self, kicked: Option<usize>) -> Result<Progress, DeviceError> {
        let now = Instant::now();
        let Some(active) = &mut self.active else {
            self.muxer.tick(now);
            return Ok(Progress::Done);
        };
        let mut more = false;
        if active.is_resetting(&mut self.muxer, now, self.reset_patience) {
            active.fresh = true;
            self.muxer.tick(now);
        } else if kicked.is_none() || active.fresh {
            active.fresh = false;
            more |= self.muxer.poll(now) == Progress::Again;
        }
        if kicked == Some(TX) || active.tx_stopped {
            self.metrics.tx_queue_event_count.inc();
            let result = active.drain_tx(&mut self.muxer, now);
            more |= counted(result, &self.metrics.tx_queue_event_fails)? == Progress::Again;
        }
        self.metrics.rx_queue_event_count.inc();
        let result = active.fill_rx(&mut self.muxer, &self.metrics, now);
        more |= counted(result, &self.metrics.rx_queue_event_fails)? == Progress::Again;
        more |= active.tx_stopped && !self.muxer.is_congested();
        Ok(if more {
            Progress::Again
        } else {
            Progress::Done
        })
    }
}

fn counted<T>(
    result: Result<T, DeviceError>,
    fails: &crate::metrics::Counter,
) -> Result<T, DeviceError> {
    if result.is_err() {
        fails.inc();
    }
    result
}

impl Active {
    /// Whether the guest is about to hear that its connections are gone.
    fn is_resetting(&mut self, muxer: &mut Muxer, now: Instant, patience: Duration) -> bool {
        if !self.transport_reset && self.reset_told.is_none() {
            return false;
        }
        let over = *self.reset_over.get_or_insert_with(|| {
            let over = now + patience;
            muxer.wake_at(over, now);
            over
        });
        if now >= over {
            self.reset_told = None;
        }
        now < over
    }

    /// Looks whether the guest has given back the buffer in which it was told of the reset.
    fn look_for_reset(&mut self) -> Result<(), DeviceError> {
        if let Some(before) = self.reset_told {
            let made = self.event.made_available();
            if made.map_err(|error| self.event.fail(error))? != before {
                self.reset_told = None;
            }
        }
        Ok(())
    }

    fn drain_tx(&mut self, muxer: &mut Muxer, now: Instant) -> Result<Progress, DeviceError> {
        self.tx_stopped = muxer.is_congested();
        if self.tx_stopped {
            return Ok(Progress::Done);
        }
        muxer.begin_pass();
        let stopped = &mut self.tx_stopped;
        let memory = self.tx.memory().clone();
        self.tx.drain(TX_BUDGET, |queue, chain| {
            match TxPacket::parse(&memory, &chain) {
                Ok(packet) => muxer.on_packet(&packet.header, &packet.data(&memory)?, now),
                Err(PacketError::Length { header, room }) => {
                    guest_warn!("vsock: {}", PacketError::Length { header, room });
                    muxer.on_truncated(&header, now);
                }
                Err(PacketError::Queue(error)) => return Err(error),
                Err(error @ PacketError::NoHeader(_)) => guest_warn!("vsock: {error}"),
            }
            queue.complete(chain.head(), 0)?;
            *stopped = muxer.is_congested();
            Ok(if *stopped { Flow::Stop } else { Flow::Continue })
        })
    }

    fn fill_rx(
        &mut self,
        muxer: &mut Muxer,
        metrics: &VsockMetrics,
        now: Instant,
    ) -> Result<Progress, DeviceError> {
        self.try_fill_rx(muxer, metrics, now)
            .map_err(|error| self.rx.fail(error))
    }

    fn try_fill_rx(
        &mut self,
        muxer: &mut Muxer,
        metrics: &VsockMetrics,
        now: Instant,
    ) -> Result<Progress, QueueError> {
        let mut filled = 0;
        let mut progress = Progress::Done;
        let mut starved = false;
        while muxer.has_rx() {
            if filled >= RX_BUDGET {
                progress = Progress::Again;
                break;
            }
            let Some((chain, room)) = next_buffer(&mut self.rx)? else {
                self.rx_kicks = true;
                if self.rx.enable_kicks()? {
                    continue;
                }
                starved = true;
                break;
            };
            filled += match muxer.next_rx() {
                None => {
                    self.rx.undo_pop(chain);
                    break;
                }
                Some(Rx::Packet(header)) => {
                    write_header(self.rx.memory(), &chain, &header)?;
                    // A driver that saw the first of many credits at once would send while the others are written, and this
                    // thread would find its packet instead of making way for the hosts.
                    self.rx.complete_later(chain.head(), HEADER_LEN as u32)?;
                    1
                }
                Some(Rx::Data { key, credit }) => {
                    self.buffers.push((chain, room));
                    self.read(muxer, key, credit, now)?
                }
            };
        }
        if self.rx_kicks && !starved {
            self.rx_kicks = false;
            self.rx.disable_kicks()?;
        }
        if filled > 0 {
            metrics.rx_packets_count.add(filled as u64);
            self.rx.signal()?;
        }
        Ok(progress)
    }

    /// Reads from one host into as many buffers as its bytes may need, the first of which is there. Returns how many
    /// were filled.
    fn read(
        &mut self,
        muxer: &mut Muxer,
        key: ConnectionKey,
        credit: u32,
        now: Instant,
    ) -> Result<usize, QueueError> {
        let want = credit.min(READ_BYTES);
        let mut room: u32 = self.buffers.iter().map(|&(_, room)| room).sum();
        while room < want && self.buffers.len() < READ_BUFFERS {
            let Some(buffer) = next_buffer(&mut self.rx)? else {
                break;
            };
            room = room.saturating_add(buffer.1);
            self.buffers.push(buffer);
        }
        let memory = self.rx.memory().clone();
        let header = muxer.read(key, &gather(&memory, &self.buffers, want)?, now);
        let mut left = header.map_or(0, |header| header.len);
        let mut filled = 0;
        for (chain, room) in &self.buffers {
            let (Some(header), true) = (header, left > 0) else {
                break;
            };
            let len = left.min(*room);
            left -= len;
            write_header(&memory, chain, &super::packet::Header { len, ..header })?;
            self.rx.complete(chain.head(), HEADER_LEN as u32 + len)?;
            filled += 1;
        }
        // The last popped goes back first.
        for (chain, _) in self.buffers.drain(filled..).rev() {
            self.rx.undo_pop(chain);
        }
        self.buffers.clear();
        Ok(filled)
    }

    fn send_event(&mut self) -> Result<(), DeviceError> {
        self.try_send_event()
            .map_err(|error| self.event.fail(error))
    }

    fn try_send_event(&mut self) -> Result<(), QueueError> {
        while self.transport_reset {
            let Some(chain) = self.event.pop()? else {
                if self.event.enable_kicks()? {
                    continue;
                }
                return Ok(());
            };
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            let fits = chain.writable.len() >= event.len() as u64;
            if fits {
                // Before the guest sees the buffer: it may give it back at once.
                self.reset_told = Some(self.event.enable_kicks_for_more()?);
                chain.writable.write_at(self.event.memory(), 0, &event)?;
                self.transport_reset = false;
            } else {
                guest_warn!("vsock: event buffer of {} bytes", chain.writable.len());
            }
            let written = if fits { event.len() as u32 } else { 0 };
            self.event.complete(chain.head(), written)?;
            self.event.signal()?;
        }
        Ok(())
    }
}

/// The next buffer of the receive queue. One without room for data is of no use: a driver that offers it is broken.
fn next_buffer(rx: &mut VirtQueue) -> Result<Option<(Chain, u32)>, QueueError> {
    let Some(chain) = rx.pop()? else {
        return Ok(None);
    };
    match rx_room(&chain) {
        Some(room) => Ok(Some((chain, room))),
        None => Err(QueueError::Malformed { head: chain.head() }),
    }
}

/// Where up to `want` bytes of data go in `buffers`.
fn gather<'m>(
    memory: &'m Memory,
    buffers: &[(Chain, u32)],
    want: u32,
) -> Result<SmallVec<[VolatileSlice<'m>; 2 * READ_BUFFERS]>, QueueError> {
    let mut slices = SmallVec::new();
    let mut left = want;
    for (chain, room) in buffers {
        // More would not go in one read.
        if slices.len() >= 2 * READ_BUFFERS {
            break;
        }
        let here = left.min(*room);
        left -= here;
        slices.extend(rx_data(memory, chain, here)?);
    }
    Ok(slices)
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // One field: guest_cid, 64 bits (VIRTIO 1.3, 5.10.4).
        let config = self.cid.get().to_le_bytes();
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = config.iter().copied().skip(skip);
        for (byte, value) in data.iter_mut().zip(rest.chain(std::iter::repeat(0))) {
            *byte = value;
        }
    }

    fn write_config(&mut self, offset: u64, _data: &[u8]) {
        self.metrics.cfg_fails.inc();
        guest_warn!("vsock: write to read-only configuration at {offset:#x}");
    }

    fn activate(&mut self, resources: Resources) -> Result<(), DeviceError> {
        let Ok([rx, tx, event]) = <[VirtQueue; 3]>::try_from(resources.queues) else {
            self.metrics.activate_fails.inc();
            return Err(DeviceError::Fatal("vsock needs 3 queues".to_owned()));
        };
        self.active = Some(Active {
            rx,
            tx,
            event,
            tx_stopped: false,
            rx_kicks: true,
            fresh: true,
            transport_reset: std::mem::take(&mut self.restored),
            reset_told: None,
            reset_over: None,
            buffers: Vec::with_capacity(READ_BUFFERS),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.restored = false;
        self.active = None;
        self.muxer.reset();
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.muxer.as_raw_fd()]
    }

    fn process_queue(&mut self, queue: usize) -> Result<Progress, DeviceError> {
        match (queue, &mut self.active) {
            (EVENT, Some(active)) => {
                let result = active.look_for_reset().and_then(|()| active.send_event());
                counted(result, &self.metrics.ev_queue_event_fails)?;
                // What was held back meanwhile.
                if active.fresh {
                    return self.service(None);
                }
                Ok(Progress::Done)
            }
            (RX | TX, Some(_)) => self.service(Some(queue)),
            _ => Ok(Progress::Done),
        }
    }

    fn process_source(&mut self, _source: usize) -> Result<Progress, DeviceError> {
        self.service(None)
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        // Every chain is completed, or put back, within the call that takes it.
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(self.saved())
    }

    fn positions(&self) -> Option<Vec<QueuePosition>> {
        self.queue_positions()
    }

    fn load(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.take(state)
    }
}
