//! All connections of a device, the listening socket, and what they wait for.
//!
//! Every bound here protects the host from a guest or a client that asks for too much: of connections
//! ([`MAX_CONNECTIONS`]), of bytes held for slow hosts ([`LARGE_BUFFER`]), of clients that never say what they want
//! ([`super::handshake::MAX_WAITING`]) and of refusals that the guest does not take ([`Muxer::is_congested`]).

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::VolatileSlice;
use vmm_sys_util::timerfd::TimerFd;

use super::backlog::Spare;
use super::connection::{Connection, Next, Turn};
use super::exchange::{Exchange, HostEnd};
use super::handshake::Waiting;
use super::packet::{ConnectionKey, Header, Op, TYPE_STREAM};
use super::poller::{BATCH, PORT_ANY, Poller, Readiness, Token};
use super::{Cid, HOST_CID, VsockMetrics};
use crate::virtio::device::Progress;

use self::crowd::{Crowd, Pass};

mod alarms;
mod crowd;
mod held;
mod opening;

/// Most connections at once. More are refused.
pub const MAX_CONNECTIONS: usize = 1023;
/// Bytes of receive buffer (`buf_alloc`) of the first [`LARGE_BUFFERS`] connections: how much a guest may send to a
/// host that does not read.
pub const LARGE_BUFFER: u32 = 256 << 10;
/// Connections that get a [`LARGE_BUFFER`]. What many of them hold would not stay in a processor's cache until the hosts
/// read it. Those on which the guest sends at the same time share one: see [`Crowd`].
pub const LARGE_BUFFERS: usize = 8;
/// Bytes of receive buffer of all others. Together 66 MiB, and 64 MiB more in chunks that are not full, if every host is
/// slow and the guest floods all of them.
pub const SMALL_BUFFER: u32 = 64 << 10;

/// Refusals waiting for the guest at which no more of its packets are taken.
const MAX_REPLIES: usize = 256;
/// Ports given to clients, as other implementations of this protocol do: 2^30 to 2^31 - 1.
const FIRST_CLIENT_PORT: u32 = 1 << 30;

/// What goes into the guest's next receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rx {
    /// A packet without data.
    Packet(Header),
    /// Data of a connection: call [`Muxer::read`] with buffers for up to `credit` bytes.
    Data {
        /// The connection.
        key: ConnectionKey,
        /// Bytes the guest takes, at least 1.
        credit: u32,
    },
}

struct Slot {
    connection: Connection<HostEnd>,
    /// In `Muxer::ready`.
    queued: bool,
    /// As it stands in `Muxer::deadlines`.
    deadline: Option<Instant>,
    /// Watched for writing.
    writing: bool,
    /// When the guest sent on it last.
    sent: Option<Pass>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Alarm {
    Accept,
    /// Before the connection's own.
    Exchange,
    Connection(ConnectionKey),
}

/// See the module.
pub struct Muxer {
    cid: Cid,
    uds_path: PathBuf,
    listener: UnixListener,
    poller: Poller,
    timer: TimerFd,
    /// When the timer goes off.
    armed: Option<Instant>,
    connections: HashMap<ConnectionKey, Slot>,
    waiting: Waiting,
    /// Packets for ports that have no connection (any more).
    replies: VecDeque<Header>,
    /// Connections with something for the guest, each at most once, in turn.
    ready: VecDeque<ConnectionKey>,
    deadlines: BTreeSet<(Instant, Alarm)>,
    last_port: u32,
    /// For what hosts do not take at once.
    spare: Spare,
    /// Those on which the guest sends.
    crowd: Crowd,
    /// There may be clients to accept.
    accepting: bool,
    /// The guest is to talk to nobody but us.
    held: bool,
    /// What it is to be asked, once it can be.
    question: Option<Exchange>,
    /// Where it was asked, and by when it has to answer.
    asked: Option<ConnectionKey>,
    metrics: Arc<VsockMetrics>,
}

impl Muxer {
    /// A muxer for the guest `cid`, whose clients come to `listener` and whose servers are at `uds_path` with `_PORT`
    /// behind it.
    pub fn new(
        cid: Cid,
        listener: UnixListener,
        uds_path: PathBuf,
        metrics: Arc<VsockMetrics>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let poller = Poller::new()?;
        let timer = TimerFd::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        poller.add(listener.as_raw_fd(), Token::Listener)?;
        poller.add(timer.as_raw_fd(), Token::Timer)?;
        Ok(Muxer {
            cid,
            uds_path,
            listener,
            poller,
            timer,
            armed: None,
            connections: HashMap::new(),
            waiting: Waiting::default(),
            replies: VecDeque::new(),
            ready: VecDeque::new(),
            deadlines: BTreeSet::new(),
            last_port: FIRST_CLIENT_PORT,
            spare: Spare::default(),
            crowd: Crowd::default(),
            accepting: true,
            held: false,
            question: None,
            asked: None,
            metrics,
        })
    }

    /// Number of connections, with those that only finish writing to their host.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Whether there is something for the guest. It may turn out to be nothing.
    pub fn has_rx(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Whether to take no more packets from the guest until it takes some.
    pub fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// Ends all connections, and forgets clients that have not said what they want.
    pub fn reset(&mut self) {
        self.metrics
            .conns_removed
            .add(self.connections.len() as u64);
        self.connections.clear();
        self.spare.clear();
        self.waiting.clear();
        self.replies.clear();
        self.ready.clear();
        self.deadlines.clear();
        self.question = None;
        self.asked = None;
        // A timer that goes off for nothing does nothing.
        self.accepting = true;
    }

    /// Gives clients other ports than a process before this one may have given: the guest may still know of those.
    pub fn scatter_ports(&mut self) {
        // Keys of the standard hasher come from the host's random source and differ each time.
        let random = RandomState::new().build_hasher().finish() as u32;
        self.last_port = random % FIRST_CLIENT_PORT + FIRST_CLIENT_PORT;
    }

    /// Looks at what became ready. Bounded.
    pub fn poll(&mut self, now: Instant) -> Progress {
        let events = self.poller.poll().unwrap_or_else(|error| {
            self.metrics.muxer_event_fails.inc();
            guest_warn!("vsock: epoll: {error}");
            0
        });
        for index in 0..events {
            match self.poller.event(index) {
                Some((Token::Listener, _)) => self.accepting = true,
                Some((Token::Timer, _)) => self.armed = None,
                Some((Token::Waiting(id), _)) => self.on_line(id, now),
                Some((Token::Connection(key), ready)) => self.on_host(key, ready, now),
                None => {}
            }
        }
        self.expire(now);
        if let Some(exchange) = self.question.take() {
            self.begin_exchange(exchange, now);
        }
        let accepted = self.accept(now);
        self.arm_timer(now);
        if events == BATCH || accepted > 0 {
            Progress::Again
        } else {
            Progress::Done
        }
    }

    /// Packets of the guest that come together follow, by [`Muxer::on_packet`].
    pub fn begin_pass(&mut self) {
        self.crowd.begin_pass();
    }

    /// Takes a packet from the guest. `data` is its data, as long as its header says.
    pub fn on_packet(&mut self, packet: &Header, data: &[VolatileSlice], now: Instant) {
        self.metrics.tx_packets_count.inc();
        if packet.src_cid != self.cid.get() {
            guest_warn!("vsock: packet from CID {} dropped", packet.src_cid);
            return;
        }
        let key = packet.key();
        let acceptable = packet.dst_cid == HOST_CID
            && packet.kind == TYPE_STREAM
            && key.guest_port != PORT_ANY
            && key.host_port != PORT_ANY;
        if !acceptable {
            self.refuse(packet);
            return;
        }
        match self.connections.get_mut(&key) {
            Some(slot) if !slot.connection.is_over_for_guest() => {
                if packet.op == Some(Op::Rw) {
                    self.crowd.note(&mut slot.sent);
                }
                let mut turn = Turn {
                    now,
                    metrics: &self.metrics,
                    spare: &mut self.spare,
                    window: self.crowd.window(),
                };
                slot.connection.on_packet(packet, data, &mut turn);
                if self.asked == Some(key) {
                    // What we say comes from no descriptor that would tell.
                    let ready = Readiness {
                        readable: true,
                        ..Default::default()
                    };
                    slot.connection.on_host(ready, &mut turn);
                }
                self.sync(key);
            }
            None if packet.op == Some(Op::Request) && !self.held => {
                if let Err(error) = self.connect(packet) {
                    log::debug!("vsock: guest to host port {}: {error}", key.host_port);
                    self.refuse(packet);
                }
            }
            _ => self.refuse(packet),
        }
        self.arm_timer(now);
    }

    /// Takes a packet from the guest whose data is not all there. Bytes of a stream are missing, so it ends.
    pub fn on_truncated(&mut self, packet: &Header, now: Instant) {
        let garbage = Header {
            op: None,
            len: 0,
            ..*packet
        };
        self.on_packet(&garbage, &[], now);
    }

    /// What goes to the guest next.
    pub fn next_rx(&mut self) -> Option<Rx> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(Rx::Packet(reply));
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(slot) = self.connections.get_mut(&key) else {
                continue;
            };
            slot.queued = false;
            match slot.connection.next() {
                Next::Nothing => {}
                Next::Data(credit) => return Some(Rx::Data { key, credit }),
                Next::Control => {
                    let packet = slot.connection.control();
                    self.sync(key);
                    if let Some(packet) = packet {
                        return Some(Rx::Packet(packet));
                    }
                }
            }
        }
        None
    }

    /// Reads from a connection's host what [`Rx::Data`] announced. The connection then waits for its next turn. Returns
    /// a header whose `len` is the number of bytes; `None` if there are none now.
    pub fn read(
        &mut self,
        key: ConnectionKey,
        slices: &[VolatileSlice],
        now: Instant,
    ) -> Option<Header> {
        let slot = self.connections.get_mut(&key)?;
        let len = slot.connection.read(slices, now, &self.metrics);
        let header = (len > 0).then(|| slot.connection.data_header(len));
        self.sync(key);
        self.arm_timer(now);
        header
    }

    fn on_host(&mut self, key: ConnectionKey, ready: Readiness, now: Instant) {
        if let Some(slot) = self.connections.get_mut(&key) {
            let mut turn = Turn {
                now,
                metrics: &self.metrics,
                spare: &mut self.spare,
                window: self.crowd.window(),
            };
            slot.connection.on_host(ready, &mut turn);
            self.sync(key);
        }
    }

    fn refuse(&mut self, packet: &Header) {
        // An RST has no answer, or two sides could go on forever.
        if packet.op != Some(Op::Rst) {
            self.replies.push_back(packet.refusal());
        }
    }

    /// Does what the state of connection `key` asks for, after it may have changed.
    fn sync(&mut self, key: ConnectionKey) {
        let Some(slot) = self.connections.get_mut(&key) else {
            return;
        };
        let connection = &mut slot.connection;
        self.replies.extend(connection.take_rst());
        let writing = connection.wants_writable();
        if let HostEnd::Socket(stream) = connection.stream()
            && writing != slot.writing
            && !connection.is_closed()
        {
            let token = Token::Connection(key);
            match self.poller.modify(stream.as_raw_fd(), token, writing) {
                Ok(()) => slot.writing = writing,
                // Cannot happen with a descriptor that is watched. Should it, the next change tries again.
                Err(_) => self.metrics.conn_event_fails.inc(),
            }
        }
        let deadline = connection.deadline();
        if deadline != slot.deadline {
            let alarm = Alarm::Connection(key);
            if let Some(old) = slot.deadline {
                self.deadlines.remove(&(old, alarm));
            }
            self.deadlines.extend(deadline.map(|new| (new, alarm)));
            slot.deadline = deadline;
        }
        if connection.is_closed() {
            self.remove(key);
        } else if !slot.queued && connection.next() != Next::Nothing {
            slot.queued = true;
            self.ready.push_back(key);
        }
    }

    fn remove(&mut self, key: ConnectionKey) {
        let Some(slot) = self.connections.remove(&key) else {
            return;
        };
        self.metrics.conns_removed.inc();
        if self.connections.is_empty() {
            self.spare.clear();
        }
        if slot.queued {
            self.ready.retain(|&other| other != key);
        }
        if let Some(deadline) = slot.deadline {
            self.deadlines.remove(&(deadline, Alarm::Connection(key)));
        }
    }
}

impl AsRawFd for Muxer {
    /// Readable (edge triggered) when [`Muxer::poll`] has something to do.
    fn as_raw_fd(&self) -> RawFd {
        self.poller.as_raw_fd()
    }
}
