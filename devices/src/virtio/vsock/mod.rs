//! The socket device (VIRTIO 1.3, 5.10): stream sockets between the guest and Unix sockets of the host.
//!
//! ```text
//!  guest AF_VSOCK            device                                  host AF_UNIX
//!  connect(2, PORT)  -> tx -> muxer: connect to  <uds_path>_PORT  -> a server's socket
//!  listen(PORT)      <- rx <- muxer: accept on   <uds_path>       <- a client: "CONNECT PORT\n", answer "OK N\n"
//! ```
//!
//! | file | what it does |
//! |---|---|
//! | [`packet`] | the 44-byte header, from and to descriptor chains |
//! | [`credit`] | flow control: how much each side may send |
//! | [`connection`] | one connection's state machine over a byte stream |
//! | [`handshake`] | the `CONNECT` line |
//! | [`muxer`] | all connections, the listening socket, timeouts |
//! | [`poller`] | one epoll descriptor for all of them |
//! | [`exchange`] | a question of the VMM's own to the guest |
//! | [`stream`] | the byte stream a connection runs over |
//! | [`device`] | queues |

mod backlog;
pub mod connection;
pub mod credit;
pub mod device;
pub mod exchange;
pub mod handshake;
pub mod muxer;
pub mod packet;
pub mod poller;
mod state;
pub mod stream;

pub use device::{Vsock, VsockConfig};
pub use exchange::{Exchange, ExchangeError};
pub use state::VsockState;

/// The host's context ID (VIRTIO 1.3, 5.10.4).
pub const HOST_CID: u64 = 2;

/// A guest's context ID: 3 to 2^32 - 2. 0 to 2 are reserved, 2^32 - 1 means "any" (VIRTIO 1.3, 5.10.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cid(u32);

/// A number that cannot be a guest's context ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest CID {0} is not between 3 and 4294967294")]
pub struct InvalidCid(pub u64);

impl Cid {
    /// The number, as the guest reads it from configuration space.
    pub fn get(self) -> u64 {
        u64::from(self.0)
    }
}

impl TryFrom<u64> for Cid {
    type Error = InvalidCid;

    fn try_from(cid: u64) -> Result<Self, InvalidCid> {
        match u32::try_from(cid) {
            Ok(small) if (3..u32::MAX).contains(&small) => Ok(Cid(small)),
            _ => Err(InvalidCid(cid)),
        }
    }
}

counters! {
    /// What a socket device counts.
    pub struct VsockMetrics {
        /// Activations that failed.
        activate_fails,
        /// Configuration space accesses that were refused.
        cfg_fails,
        /// Receive queue passes that failed.
        rx_queue_event_fails,
        /// Transmit queue passes that failed.
        tx_queue_event_fails,
        /// Event queue passes that failed.
        ev_queue_event_fails,
        /// Times the host's readiness could not be asked for.
        muxer_event_fails,
        /// Host sockets that could not be watched, or whose events were for nothing.
        conn_event_fails,
        /// Receive queue passes.
        rx_queue_event_count,
        /// Transmit queue passes.
        tx_queue_event_count,
        /// Bytes from the host to the guest.
        rx_bytes_count,
        /// Bytes from the guest to the host.
        tx_bytes_count,
        /// Packets to the guest.
        rx_packets_count,
        /// Packets from the guest.
        tx_packets_count,
        /// Connections made.
        conns_added,
        /// Connections ended because an answer did not come in time.
        conns_killed,
        /// Connections ended, for whatever reason.
        conns_removed,
        /// Always 0: deadlines are kept exactly, there is nothing to resynchronize.
        killq_resync,
        /// Buffered bytes that could not be written to a host socket.
        tx_flush_fails,
        /// Packets that could not be written to a host socket.
        tx_write_fails,
        /// Reads from a host socket that failed.
        rx_read_fails,
    }
}

#[cfg(test)]
mod tests;
