//! One connection: a state machine between packets of the guest and a byte stream of the host.
//!
//! ```text
//!  host asks: Connecting --RESPONSE--> Open          guest asks: Open (RESPONSE is sent)
//!
//!  Open --guest gave up both directions, or RST--> Draining, or Closed if nothing is left to write to the host
//!  Open --host gave up both directions, guest does not answer SHUTDOWN with RST in time--> Closed
//!  Connecting --RST, no answer in time, host hung up--> Closed
//!  any --protocol broken--> Closed
//!  Draining --all written, host hung up, no progress for long--> Closed
//! ```
//!
//! In Draining the guest has been told that the connection is over, and what it sent before still goes to a slow host.
//!
//! The time is an argument everywhere: nothing here reads a clock.

use std::io;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use super::backlog::{Backlog, Spare};
use super::credit::{CreditError, ReceiveCredit, SendCredit};
use super::packet::{ConnectionKey, Header, Op, ShutdownFlags, TYPE_STREAM};
use super::poller::Readiness;
use super::stream::HostStream;
use super::{Cid, HOST_CID, VsockMetrics};

mod to_host;

/// How long the guest may take to answer a REQUEST.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the guest may take to end a connection that the host has left.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a host may leave a finished connection's last bytes unread, without reading any.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// See the diagram above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Connecting,
    Open,
    Draining,
    Closed,
}

/// Packets other than data that are due to the guest.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
}

/// What a connection works with when something happens, besides its own state.
pub struct Turn<'a> {
    /// The time.
    pub now: Instant,
    /// Counters of the device.
    pub metrics: &'a VsockMetrics,
    /// For what the host does not take at once.
    pub spare: &'a mut Spare,
    /// Bytes that the guest may send ahead of the host, at most: [`ReceiveCredit::set_window`].
    pub window: u32,
}

/// What a connection has for the guest next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Nothing,
    /// A packet without data: [`Connection::control`].
    Control,
    /// Up to so many bytes, perhaps none: [`Connection::read`].
    Data(u32),
}

/// One connection.
#[derive(Debug)]
pub struct Connection<S> {
    key: ConnectionKey,
    cid: Cid,
    stream: S,
    phase: Phase,
    due: Due,
    /// The guest has not been told with an RST that the connection is over, and must be.
    rst_due: bool,
    /// What the guest gave up.
    guest: ShutdownFlags,
    /// What the host gave up.
    host: ShutdownFlags,
    /// The socket may have something to read. It is watched edge triggered, so this is remembered until a read says no.
    readable: bool,
    /// The guest was asked for credit, and has not given any since.
    credit_asked: bool,
    send: SendCredit,
    receive: ReceiveCredit,
    backlog: Backlog,
    deadline: Option<Instant>,
}

impl<S: HostStream> Connection<S> {
    /// A connection that a host's client asked for. The guest gets a REQUEST.
    pub fn from_host(
        key: ConnectionKey,
        cid: Cid,
        stream: S,
        buf_alloc: u32,
        now: Instant,
    ) -> Self {
        let mut connection = Self::new(key, cid, stream, buf_alloc, Phase::Connecting);
        connection.due.request = true;
        connection.deadline = Some(now + REQUEST_TIMEOUT);
        connection
    }

    /// A connection that the guest asked for with the packet `request`, made to the host already. The guest gets a
    /// RESPONSE.
    pub fn from_guest(
        request: &Header,
        cid: Cid,
        stream: S,
        buf_alloc: u32,
    ) -> Result<Self, CreditError> {
        let mut connection = Self::new(request.key(), cid, stream, buf_alloc, Phase::Open);
        connection.due.response = true;
        connection.send.update(request.buf_alloc, request.fwd_cnt)?;
        Ok(connection)
    }

    fn new(key: ConnectionKey, cid: Cid, stream: S, buf_alloc: u32, phase: Phase) -> Self {
        Connection {
            key,
            cid,
            stream,
            phase,
            due: Due::default(),
            rst_due: false,
            guest: ShutdownFlags::default(),
            host: ShutdownFlags::default(),
            // Bytes may have come before the socket was watched.
            readable: true,
            credit_asked: false,
            send: SendCredit::default(),
            receive: ReceiveCredit::new(buf_alloc),
            backlog: Backlog::default(),
            deadline: None,
        }
    }

    /// The stream to the host.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// The stream to the host, to be told something.
    pub fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Lets the guest take until `deadline` to answer the REQUEST.
    #[must_use]
    pub fn answered_by(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Whether nothing is left to do: drop it.
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Whether the guest has been told, or has told us, that the connection is over.
    pub fn is_over_for_guest(&self) -> bool {
        matches!(self.phase, Phase::Draining | Phase::Closed)
    }

    /// When [`Connection::expire`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether to watch for the host's socket becoming writable.
    pub fn wants_writable(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The RST to send if the connection just ended on our side. Once.
    pub fn take_rst(&mut self) -> Option<Header> {
        std::mem::take(&mut self.rst_due).then(|| self.header(Op::Rst, 0, 0))
    }

    /// What there is for the guest.
    pub fn next(&self) -> Next {
        let due = &self.due;
        if self.is_over_for_guest() {
            return Next::Nothing;
        }
        if due.request || due.response {
            return Next::Control;
        }
        if self.can_read() {
            match self.send.available() {
                0 if !self.credit_asked => return Next::Control,
                0 => {}
                credit => return Next::Data(credit),
            }
        }
        if due.shutdown || due.credit_update {
            return Next::Control;
        }
        Next::Nothing
    }

    /// Takes the packet that [`Next::Control`] announced.
    pub fn control(&mut self) -> Option<Header> {
        let due = &mut self.due;
        let (op, flags) = if std::mem::take(&mut due.request) {
            (Op::Request, 0)
        } else if std::mem::take(&mut due.response) {
            (Op::Response, 0)
        } else if self.can_read() && self.send.available() == 0 && !self.credit_asked {
            self.credit_asked = true;
            (Op::CreditRequest, 0)
        } else if std::mem::take(&mut self.due.shutdown) {
            (Op::Shutdown, self.host.bits())
        } else if self.due.credit_update {
            (Op::CreditUpdate, 0)
        } else {
            return None;
        };
        Some(self.header(op, 0, flags))
    }

    /// Reads from the host into `slices`, which hold no more than [`Next::Data`] said. Returns how many bytes are to be
    /// sent to the guest, with headers from [`Connection::data_header`]; 0 is not an error.
    pub fn read(&mut self, slices: &[VolatileSlice], now: Instant, metrics: &VsockMetrics) -> u32 {
        match self.stream.read_into(slices) {
            Ok(0) => {
                self.readable = false;
                self.host_gave_up(
                    ShutdownFlags {
                        receive: false,
                        send: true,
                    },
                    now,
                );
                0
            }
            Ok(len) => {
                // The slices' length came from a u32.
                let len = u32::try_from(len).unwrap_or(u32::MAX);
                self.send.sent(len);
                metrics.rx_bytes_count.add(u64::from(len));
                len
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            Err(_) => {
                // ECONNRESET: the host closed with bytes of ours unread. What it sent was read before.
                metrics.rx_read_fails.inc();
                self.readable = false;
                self.host_gave_up(ShutdownFlags::BOTH, now);
                0
            }
        }
    }

    /// The header of a packet with `len` of the bytes that [`Connection::read`] returned.
    pub fn data_header(&mut self, len: u32) -> Header {
        self.header(Op::Rw, len, 0)
    }

    /// Takes a packet from the guest; `data` is its data.
    pub fn on_packet(&mut self, packet: &Header, data: &[VolatileSlice], turn: &mut Turn<'_>) {
        let known = self.take_credit(packet);
        let now = turn.now;
        match (self.phase, packet.op) {
            // The guest answers what it may have sent before it saw our RST.
            (Phase::Draining | Phase::Closed, _) => {}
            _ if known.is_err() => self.abort(now),
            (Phase::Connecting, Some(Op::Response)) => self.accepted(now),
            (_, Some(Op::Rst)) => self.end(now),
            (Phase::Open, Some(Op::Rw)) => {
                self.on_data(packet.len, data, turn);
            }
            (Phase::Open, Some(Op::Shutdown)) => {
                self.guest = self.guest.or(ShutdownFlags::parse(packet.flags));
                self.settle(now);
            }
            (Phase::Open, Some(Op::CreditUpdate)) => {}
            (Phase::Open, Some(Op::CreditRequest)) => self.due.credit_update = true,
            (Phase::Connecting | Phase::Open, _) => self.abort(now),
        }
    }

    /// Takes news of the host's socket.
    pub fn on_host(&mut self, ready: Readiness, turn: &mut Turn<'_>) {
        let now = turn.now;
        self.readable |= ready.readable;
        if ready.hung_up {
            if self.phase == Phase::Connecting {
                self.abort(now);
                return;
            }
            // A guest that does not receive will not have the socket read to its end.
            let send = self.guest.receive;
            self.host_gave_up(
                ShutdownFlags {
                    receive: true,
                    send,
                },
                now,
            );
        }
        if ready.writable {
            self.flush(turn);
        }
    }

    /// The deadline has come.
    pub fn expire(&mut self, now: Instant, metrics: &VsockMetrics) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            metrics.conns_killed.inc();
            self.backlog.clear();
            self.abort(now);
        }
    }

    /// Ends the connection at once and has the guest told so. What it sent before still goes to the host.
    pub fn abort(&mut self, now: Instant) {
        self.rst_due |= !self.is_over_for_guest();
        self.end(now);
    }

    fn can_read(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.host.send && !self.guest.receive
    }

    fn header(&mut self, op: Op, len: u32, flags: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.receive.tell();
        // Every packet tells our credit.
        self.due.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid.get(),
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            kind: TYPE_STREAM,
            op: Some(op),
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    fn take_credit(&mut self, packet: &Header) -> Result<(), CreditError> {
        // An RST need not tell anything.
        if packet.op == Some(Op::Rst) {
            return Ok(());
        }
        self.send.update(packet.buf_alloc, packet.fwd_cnt)?;
        if self.send.available() > 0 {
            self.credit_asked = false;
        }
        Ok(())
    }

    fn accepted(&mut self, now: Instant) {
        self.phase = Phase::Open;
        self.deadline = None;
        let answer = format!("OK {}\n", self.key.host_port);
        // Nothing was written to this socket before: if it does not take a line whole, the client is gone.
        match self.stream.write_bytes(answer.as_bytes()) {
            Ok(len) if len == answer.len() => {}
            _ => self.abort(now),
        }
    }

    fn host_gave_up(&mut self, what: ShutdownFlags, now: Instant) {
        let before = self.host;
        self.host = self.host.or(what);
        if self.host.receive {
            self.backlog.clear();
            // The socket takes nothing, and nothing is held back any more.
            self.receive.forward(self.receive.held());
        }
        // A guest that sends no more need not hear that nobody would receive it: both directions closed look like a host
        // that is gone, while bytes of it may still be on their way.
        self.due.shutdown |= self.host.send != before.send
            || (self.host.receive != before.receive && !self.guest.send);
        self.settle(now);
    }

    /// Draws the consequences of what either side gave up.
    fn settle(&mut self, now: Instant) {
        match self.phase {
            Phase::Open if self.guest == ShutdownFlags::BOTH => {
                self.rst_due = true;
                self.end(now);
            }
            Phase::Open => {
                if self.guest.send && self.backlog.is_empty() && !self.host.receive {
                    // The host reads an end of file. A failure means that it is gone: its hang-up is on the way.
                    let _ = self.stream.shutdown(Shutdown::Write);
                }
                if self.guest.receive && !self.host.send {
                    // The host's writes fail with EPIPE. As above.
                    let _ = self.stream.shutdown(Shutdown::Read);
                }
                if self.host == ShutdownFlags::BOTH && self.deadline.is_none() {
                    self.deadline = Some(now + SHUTDOWN_TIMEOUT);
                }
            }
            Phase::Draining if self.backlog.is_empty() => self.phase = Phase::Closed,
            Phase::Connecting | Phase::Draining | Phase::Closed => {}
        }
    }

    /// The guest is out. The host still gets what is held for it.
    fn end(&mut self, now: Instant) {
        if self.backlog.is_empty() {
            self.phase = Phase::Closed;
            self.deadline = None;
        } else if self.phase != Phase::Draining {
            self.phase = Phase::Draining;
            self.deadline = Some(now + DRAIN_TIMEOUT);
        }
    }
}

#[cfg(test)]
mod tests;
