//! virtio-net: frames between the guest and a tap (VIRTIO 1.3, 5.1).
//!
//! ```text
//!              queue 0 (rx)               queue 1 (tx)
//!   driver  <---------------- Receiver      Transmitter <---------------- driver
//!                                 ^              |
//!                          readv  |              |  header checked, writev
//!                                 +---- tap <----+
//! ```
//!
//! Both ways a frame is copied once, by the host's kernel, straight from or to guest memory.

pub mod backend;
pub mod device;
pub mod frame;
pub mod mac;
mod rx;
mod state;
mod tx;

pub use backend::Backend;
pub use device::{Net, NetConfig, NetError};
pub use mac::Mac;
pub use state::NetState;

/// Most frames moved in one go before other events have their turn.
const FRAMES_PER_TURN: usize = 256;
/// Most bytes moved in one go: about a millisecond of copying.
const BYTES_PER_TURN: u64 = 4 << 20;

counters! {
    /// What one interface has done. Frames are counted without their virtio header.
    pub struct NetMetrics {
        /// Activations that failed.
        activate_fails,
        /// Reads past the configuration space's end and writes to it.
        cfg_fails,
        /// Events that ended in a broken ring.
        event_fails,
        /// Times that a frame may have waited because the receive queue had no or not enough buffers.
        no_rx_avail_buffer,
        /// Kicks of the transmit queue that found nothing in it.
        no_tx_avail_buffer,
        /// Kicks of the receive queue.
        rx_queue_event_count,
        /// Events of the receive rate limiter's timer.
        rx_event_rate_limiter_count,
        /// Frames that waited for the receive rate limiter.
        rx_rate_limiter_throttled,
        /// Events of the tap.
        rx_tap_event_count,
        /// Bytes given to the guest.
        rx_bytes_count,
        /// Frames given to the guest.
        rx_packets_count,
        /// Frames read and then dropped: no buffer of the driver ever had room, or they need what it did not negotiate.
        rx_fails,
        /// Successful reads from the tap.
        rx_count,
        /// Reads from the tap that failed.
        tap_read_fails,
        /// Frames dropped because the tap did not take them: it is down, gone, or full.
        tap_write_fails,
        /// Bytes sent by the guest.
        tx_bytes_count,
        /// Frames refused: their header or length cannot be right.
        tx_malformed_frames,
        /// Rings found broken while sending.
        tx_fails,
        /// Successful writes to the tap.
        tx_count,
        /// Frames sent by the guest.
        tx_packets_count,
        /// Kicks of the transmit queue.
        tx_queue_event_count,
        /// Events of the transmit rate limiter's timer.
        tx_rate_limiter_event_count,
        /// Times that the transmit queue waited for its rate limiter.
        tx_rate_limiter_throttled,
        /// Frames sent with another source address than the interface's.
        tx_spoofed_mac_count,
    }
}

#[cfg(test)]
mod tests;
