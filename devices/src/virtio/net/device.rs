//! The device: features, configuration space, and which event makes which queue work.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use lepton_hostio::tap::{Offloads, Tap};
use virtio_bindings::bindings::virtio_net::*;

use super::NetMetrics;
use super::backend::Backend;
use super::frame;
use super::mac::{self, Mac};
use super::rx::Receiver;
use super::tx::Transmitter;
use crate::rate_limiter::{RateLimiter, RateLimiterConfig};
use crate::virtio::device::{DeviceError, DeviceKind, Progress, Resources, VirtioDevice};
use crate::virtio::state::{DeviceState, QueuePosition, RestoreError};

/// Queue 0 takes frames to the driver, queue 1 from it (VIRTIO 1.3, 5.1.2).
const RX: usize = 0;
const TX: usize = 1;
/// Descriptors per queue unless told otherwise.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Most descriptors per queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Least MTU: what IPv4 asks of every link, and VIRTIO 1.3, 5.1.4.1.
pub const MIN_MTU: u16 = 68;

/// Bytes of the configuration space: up to and with `mtu` (VIRTIO 1.3, 5.1.4).
const CONFIG_LEN: usize = 12;

/// What an interface is made of.
pub struct NetConfig<B: Backend = Tap> {
    /// The network.
    pub tap: B,
    /// The guest's address; none: a random one.
    pub mac: Option<Mac>,
    /// MTU the guest is told, at least [`MIN_MTU`]; none: it is told nothing and takes 1500.
    pub mtu: Option<u16>,
    /// Largest size of each queue, a power of two up to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// Limits on what the guest receives.
    pub rx_rate_limiter: RateLimiterConfig,
    /// Limits on what the guest sends.
    pub tx_rate_limiter: RateLimiterConfig,
}

/// Why an interface cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The MTU is below [`MIN_MTU`].
    #[error("mtu {0} is less than {MIN_MTU}")]
    Mtu(u16),
    /// The queue size is not one.
    #[error("queue size {0} is not a power of two up to {MAX_QUEUE_SIZE}")]
    QueueSize(u16),
    /// The host has no timer for a rate limiter.
    #[error("rate limiter: {0}")]
    RateLimiter(#[source] io::Error),
}

/// A network interface.
///
/// STATUS is not offered: without it a driver takes the link to be up, which it always is. Nor is a control queue.
pub struct Net<B: Backend = Tap> {
    pub(super) backend: B,
    pub(super) mac: Mac,
    pub(super) mtu: Option<u16>,
    pub(super) queue_sizes: [u16; 2],
    pub(super) rx_limiter: RateLimiter,
    pub(super) tx_limiter: RateLimiter,
    pub(super) metrics: Arc<NetMetrics>,
    pub(super) active: Option<Active>,
    /// It neither receives, nor does what the driver sends leave.
    pub(super) held: bool,
}

pub(super) struct Active {
    pub(super) rx: Receiver,
    pub(super) tx: Transmitter,
}

impl<B: Backend> Net<B> {
    /// An inactive interface.
    pub fn new(config: NetConfig<B>) -> Result<Self, NetError> {
        if let Some(mtu) = config.mtu.filter(|&mtu| mtu < MIN_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        let size = config.queue_size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(NetError::QueueSize(size));
        }
        Ok(Net {
            backend: config.tap,
            mac: config.mac.unwrap_or_else(mac::random),
            mtu: config.mtu,
            queue_sizes: [size; 2],
            rx_limiter: RateLimiter::new(config.rx_rate_limiter).map_err(NetError::RateLimiter)?,
            tx_limiter: RateLimiter::new(config.tx_rate_limiter).map_err(NetError::RateLimiter)?,
            metrics: Arc::new(NetMetrics::default()),
            active: None,
            held: false,
        })
    }

    /// The guest's address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// The MTU the guest is told.
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// The network.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// What the interface has done so far.
    pub fn metrics(&self) -> &Arc<NetMetrics> {
        &self.metrics
    }

    /// Replaces the buckets that are given, full; the others stay as they are. Frames that wait are tried again.
    pub fn update_rate_limiters(&mut self, rx: RateLimiterConfig, tx: RateLimiterConfig) {
        // A limiter that refused something lets its timer expire at once.
        self.rx_limiter.update(rx.bandwidth, rx.ops);
        self.tx_limiter.update(tx.bandwidth, tx.ops);
    }

    /// Holds the guest back from its network, or no more. What it sends meanwhile is dropped: it would leave under a name
    /// that is not its own. What comes for it waits. When it is let go, the device is to look at everything.
    pub fn hold(&mut self, held: bool) {
        if !held {
            // What the driver has sent until now. An error will be there again.
            drop(self.discard());
        }
        self.held = held;
    }

    fn discard(&mut self) -> Result<Progress, DeviceError> {
        match &mut self.active {
            Some(active) => active.tx.discard(),
            None => Ok(Progress::Done),
        }
    }

    fn receive(&mut self) -> Result<Progress, DeviceError> {
        if self.held {
            return Ok(Progress::Done);
        }
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        active
            .rx
            .run(&mut self.backend, &mut self.rx_limiter, &self.metrics)
            .inspect_err(|_| {
                self.metrics.event_fails.inc();
            })
    }

    fn transmit(&mut self) -> Result<Progress, DeviceError> {
        if self.held {
            return self.discard();
        }
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        active
            .tx
            .run(&mut self.backend, &mut self.tx_limiter, &self.metrics)
            .inspect_err(|_| {
                self.metrics.event_fails.inc();
                self.metrics.tx_fails.inc();
            })
    }

    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let [a, b, c, d, e, f] = self.mac;
        let [m, n] = self.mtu.unwrap_or(0).to_le_bytes();
        // mac, status, max_virtqueue_pairs, mtu.
        [a, b, c, d, e, f, 0, 0, 0, 0, m, n]
    }
}

fn offered(supported: Offloads, has_mtu: bool) -> u64 {
    let mut features = 0;
    for (on, bit) in [
        (true, VIRTIO_NET_F_MAC),
        (true, VIRTIO_NET_F_MRG_RXBUF),
        (has_mtu, VIRTIO_NET_F_MTU),
        // The host segments and sums whatever it is given.
        (true, VIRTIO_NET_F_CSUM),
        (true, VIRTIO_NET_F_HOST_TSO4),
        (true, VIRTIO_NET_F_HOST_TSO6),
        (true, VIRTIO_NET_F_HOST_ECN),
        (true, VIRTIO_NET_F_HOST_UFO),
        (supported.csum, VIRTIO_NET_F_GUEST_CSUM),
        (supported.tso4, VIRTIO_NET_F_GUEST_TSO4),
        (supported.tso6, VIRTIO_NET_F_GUEST_TSO6),
        (supported.ecn, VIRTIO_NET_F_GUEST_ECN),
        (supported.ufo, VIRTIO_NET_F_GUEST_UFO),
    ] {
        if on {
            features |= 1 << bit;
        }
    }
    features
}

impl<B: Backend> VirtioDevice for Net<B> {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        offered(self.backend.supported_offloads(), self.mtu.is_some())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = space.get(start..).unwrap_or_default();
        if found.len() < data.len() {
            self.metrics.cfg_fails.inc();
        }
        data.fill(0);
        for (to, from) in data.iter_mut().zip(found) {
            *to = *from;
        }
    }

    /// Every field offered is read-only for a driver that took VERSION_1 (VIRTIO 1.3, 5.1.4).
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.metrics.cfg_fails.inc();
        guest_warn!(
            "virtio-net: write of {} bytes at {offset:#x} of the configuration ignored",
            data.len()
        );
    }

    fn activate(&mut self, resources: Resources) -> Result<(), DeviceError> {
        let features = resources.features;
        let queues = <[_; 2]>::try_from(resources.queues).map_err(|queues| {
            self.metrics.activate_fails.inc();
            DeviceError::Fatal(format!("{} queues instead of 2", queues.len()))
        })?;
        let [rx, tx] = queues;
        self.backend
            .set_offloads(frame::to_driver(features))
            .map_err(|error| {
                self.metrics.activate_fails.inc();
                DeviceError::Fatal(format!("the tap refuses its offloads: {error}"))
            })?;
        self.active = Some(Active {
            rx: Receiver::new(rx, features, self.mtu),
            tx: Transmitter::new(tx, features, self.mac),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![
            self.backend.event_fd(),
            self.rx_limiter.timer_fd(),
            self.tx_limiter.timer_fd(),
        ]
    }

    fn process_queue(&mut self, queue: usize) -> Result<Progress, DeviceError> {
        match queue {
            RX => {
                self.metrics.rx_queue_event_count.inc();
                self.receive()
            }
            TX => {
                self.metrics.tx_queue_event_count.inc();
                self.transmit()
            }
            _ => Ok(Progress::Done),
        }
    }

    fn process_source(&mut self, source: usize) -> Result<Progress, DeviceError> {
        match source {
            0 => {
                self.metrics.rx_tap_event_count.inc();
                self.receive()
            }
            // Also if it is a stale event, or the second turn for one: while the limiter holds back, nothing is done.
            1 => {
                if self.rx_limiter.on_timer() {
                    self.metrics.rx_event_rate_limiter_count.inc();
                }
                self.receive()
            }
            2 => {
                if self.tx_limiter.on_timer() {
                    self.metrics.tx_rate_limiter_event_count.inc();
                }
                self.transmit()
            }
            _ => Ok(Progress::Done),
        }
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        match &mut self.active {
            Some(active) => active.rx.quiesce(&self.metrics),
            None => Ok(()),
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(self.saved())
    }

    fn positions(&self) -> Option<Vec<QueuePosition>> {
        self.queue_positions()
    }

    fn load(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.take(state)
    }
}
