//! How connections come to be: by clients of the host, and by the guest.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with,
};

use super::super::connection::Connection;
use super::super::exchange::HostEnd;
use super::super::handshake::Line;
use super::super::packet::{ConnectionKey, Header};
use super::super::poller::Token;
use super::{
    Alarm, FIRST_CLIENT_PORT, LARGE_BUFFER, LARGE_BUFFERS, MAX_CONNECTIONS, Muxer, SMALL_BUFFER,
    Slot,
};

/// Clients accepted at once.
const ACCEPT_BATCH: usize = 64;
/// When to try again after the host ran out of descriptors or memory for a client.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

impl Muxer {
    /// A client that waits has said which port it wants, or something else.
    pub(super) fn on_line(&mut self, id: u32, now: Instant) {
        let Some((stream, line)) = self.waiting.take(id) else {
            return;
        };
        match line {
            Ok(Line::Connect { port, .. }) => {
                if let Err(error) = self.request(stream, port, now) {
                    log::warn!("vsock: client for guest port {port}: {error}");
                }
            }
            Ok(_) => log::warn!("vsock: a client did not begin with \"CONNECT <port>\""),
            Err(error) => log::debug!("vsock: a client left before it asked for a port: {error}"),
        }
    }

    /// Passes a client's wish on to the guest.
    fn request(&mut self, stream: UnixStream, guest_port: u32, now: Instant) -> io::Result<()> {
        self.check_room()?;
        let key = self.free_key(guest_port);
        self.poller
            .modify(stream.as_raw_fd(), Token::Connection(key), false)?;
        let stream = HostEnd::Socket(stream);
        let connection = Connection::from_host(key, self.cid, stream, self.buf_alloc(), now);
        self.insert(key, connection);
        Ok(())
    }

    /// Makes the connection to a host's server that the guest asks for.
    pub(super) fn connect(&mut self, packet: &Header) -> io::Result<()> {
        self.check_room()?;
        let key = packet.key();
        let mut path = OsString::from(&self.uds_path);
        path.push(format!("_{}", key.host_port));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Does not wait: a server whose backlog is full refuses.
        connect(&socket, &SocketAddrUnix::new(path.as_os_str())?)?;
        let stream = UnixStream::from(socket);
        self.poller
            .add(stream.as_raw_fd(), Token::Connection(key))?;
        let stream = HostEnd::Socket(stream);
        let connection = Connection::from_guest(packet, self.cid, stream, self.buf_alloc())
            .map_err(io::Error::other)?;
        self.insert(key, connection);
        Ok(())
    }

    fn check_room(&self) -> io::Result<()> {
        if self.connections.len() < MAX_CONNECTIONS {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "there are {MAX_CONNECTIONS} connections already"
            )))
        }
    }

    pub(super) fn buf_alloc(&self) -> u32 {
        if self.connections.len() < LARGE_BUFFERS {
            LARGE_BUFFER
        } else {
            SMALL_BUFFER
        }
    }

    pub(super) fn free_key(&mut self, guest_port: u32) -> ConnectionKey {
        // Ends: far fewer connections than ports.
        loop {
            self.last_port = (self.last_port + 1) % FIRST_CLIENT_PORT + FIRST_CLIENT_PORT;
            let key = ConnectionKey {
                guest_port,
                host_port: self.last_port,
            };
            if !self.connections.contains_key(&key) {
                return key;
            }
        }
    }

    pub(super) fn insert(&mut self, key: ConnectionKey, connection: Connection<HostEnd>) {
        let slot = Slot {
            connection,
            queued: false,
            deadline: None,
            writing: false,
            sent: None,
        };
        self.connections.insert(key, slot);
        self.metrics.conns_added.inc();
        self.sync(key);
    }

    /// Accepts clients. Returns how many.
    pub(super) fn accept(&mut self, now: Instant) -> usize {
        let mut accepted = 0;
        while self.accepting && !self.held && accepted < ACCEPT_BATCH {
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    accepted += 1;
                    let stream = UnixStream::from(socket);
                    let token = Token::Waiting(self.waiting.next_id());
                    match self.poller.add(stream.as_raw_fd(), token) {
                        Ok(()) => self.waiting.push(stream),
                        Err(error) => {
                            self.metrics.conn_event_fails.inc();
                            log::warn!("vsock: cannot watch a client: {error}");
                        }
                    }
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => {
                    self.accepting = false;
                    if error != rustix::io::Errno::AGAIN {
                        // The client is still there, and will not be announced again.
                        guest_warn!("vsock: cannot accept a client: {error}");
                        self.deadlines.insert((now + ACCEPT_RETRY, Alarm::Accept));
                    }
                }
            }
        }
        accepted
    }
}
