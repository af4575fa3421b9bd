//! One epoll descriptor for everything the muxer waits for: to the event loop, a device is a single descriptor.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::packet::ConnectionKey;

/// Events taken at once.
pub const BATCH: usize = 64;

/// No socket has this port: it means "any" (VIRTIO 1.3, 5.10.6 leaves it out of addresses). So it is free for what is
/// not a connection.
pub const PORT_ANY: u32 = u32::MAX;

/// What an event is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// The listening socket.
    Listener,
    /// The timer.
    Timer,
    /// A client that has not sent its line.
    Waiting(u32),
    /// A connection.
    Connection(ConnectionKey),
}

impl Token {
    fn pack(self) -> u64 {
        let (high, low) = match self {
            Token::Listener => (PORT_ANY, PORT_ANY),
            Token::Timer => (PORT_ANY, 0),
            Token::Waiting(id) => (id, PORT_ANY),
            Token::Connection(key) => (key.guest_port, key.host_port),
        };
        u64::from(high) << 32 | u64::from(low)
    }

    fn unpack(data: u64) -> Token {
        match ((data >> 32) as u32, data as u32) {
            (PORT_ANY, PORT_ANY) => Token::Listener,
            (PORT_ANY, _) => Token::Timer,
            (id, PORT_ANY) => Token::Waiting(id),
            (guest_port, host_port) => Token::Connection(ConnectionKey {
                guest_port,
                host_port,
            }),
        }
    }
}

/// What the host's socket is ready for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Bytes, an end or an error are there to be read.
    pub readable: bool,
    /// Bytes can be written.
    pub writable: bool,
    /// The host can no longer be written to.
    pub hung_up: bool,
}

/// An epoll instance. Everything in it is edge triggered and leaves it when its descriptor is closed.
pub struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        Ok(Poller {
            epoll: Epoll::new()?,
            events: vec![EpollEvent::default(); BATCH],
        })
    }

    /// Watches `fd` for reading.
    pub fn add(&self, fd: RawFd, token: Token) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, token, false)
    }

    /// Gives `fd` a new token, and watches it for writing as well or not any more. What it is ready for is reported
    /// anew.
    pub fn modify(&self, fd: RawFd, token: Token, writing: bool) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, token, writing)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        token: Token,
        writing: bool,
    ) -> io::Result<()> {
        let mut events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if writing {
            events |= EventSet::OUT;
        }
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, token.pack()))
    }

    /// Takes up to [`BATCH`] events without waiting; [`Poller::event`] tells them. Returns how many.
    pub fn poll(&mut self) -> io::Result<usize> {
        match self.epoll.wait(0, &mut self.events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            result => result,
        }
    }

    /// Event `index` of the last [`Poller::poll`].
    pub fn event(&self, index: usize) -> Option<(Token, Readiness)> {
        let event = self.events.get(index)?;
        let set = event.event_set();
        let readiness = Readiness {
            readable: set.intersects(
                EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR,
            ),
            writable: set.contains(EventSet::OUT),
            hung_up: set.contains(EventSet::HANG_UP),
        };
        Some((Token::unpack(event.data()), readiness))
    }
}

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        let connection = |guest_port, host_port| {
            Token::Connection(ConnectionKey {
                guest_port,
                host_port,
            })
        };
        for token in [
            Token::Listener,
            Token::Timer,
            Token::Waiting(0),
            Token::Waiting(7),
            connection(0, 0),
            connection(1, PORT_ANY - 1),
            connection(PORT_ANY - 1, 0),
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
