//! The loop that serves every client from one thread.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::Errno;
use rustix::net::SocketFlags;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::connection::{Connection, Verdict};
use crate::action::{Action, Fault, Reply};

/// Largest body taken unless [`Server::set_max_payload`] says otherwise, in bytes.
pub const DEFAULT_MAX_PAYLOAD: usize = 51200;
/// Clients served at once unless [`Server::set_max_connections`] says otherwise.
pub const DEFAULT_MAX_CONNECTIONS: usize = 1024;

/// Clients past the limit that are kept until they have read why they are refused. More are dropped at once.
const MAX_REFUSED: usize = 64;
/// Clients accepted before those already connected get their turn again.
const ACCEPT_BURST: usize = 64;
/// Events taken from the kernel at a time.
const EVENTS: usize = 64;
/// Bytes read from a client per turn.
const READ_SIZE: usize = 16 << 10;
/// Time before accepting is tried again when the process is out of file descriptors, in milliseconds.
const ACCEPT_RETRY_MS: i32 = 100;

/// Serves the API on a Unix socket.
pub struct Server {
    listener: UnixListener,
    epoll: Epoll,
    stop: EventFd,
    connections: BTreeMap<RawFd, Connection>,
    max_payload: usize,
    max_connections: usize,
    /// Given up for a moment when the process is out of file descriptors, so that a client can be told.
    spare: Option<OwnedFd>,
    /// Whether the listener is left out of the epoll instance for want of file descriptors.
    accept_paused: bool,
}

/// Ends the loop of a [`Server`] from another thread.
#[derive(Debug)]
pub struct StopHandle(EventFd);

impl StopHandle {
    /// Makes [`Server::serve`] return once it has dealt with the clients that were ready before.
    pub fn stop(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Server {
    /// Serves on this listening socket. Nothing is served before [`Server::serve`], but clients can connect and wait.
    pub fn from_listener(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let server = Self {
            epoll: Epoll::new()?,
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            connections: BTreeMap::new(),
            max_payload: DEFAULT_MAX_PAYLOAD,
            max_connections: DEFAULT_MAX_CONNECTIONS,
            spare: None,
            accept_paused: false,
            listener,
        };
        server.watch(server.stop.as_raw_fd(), EventSet::IN)?;
        server.watch(server.listener.as_raw_fd(), EventSet::IN)?;
        Ok(server)
    }

    /// Sets the largest body taken, in bytes.
    pub fn set_max_payload(&mut self, bytes: usize) {
        self.max_payload = bytes;
    }

    /// Sets how many clients are served at once; more are told so with a 503.
    pub fn set_max_connections(&mut self, connections: usize) {
        self.max_connections = connections;
    }

    /// A handle that ends the loop.
    pub fn stop_handle(&self) -> io::Result<StopHandle> {
        self.stop.try_clone().map(StopHandle)
    }

    /// Serves until stopped. The handler is called with one action at a time and may block; every client then waits.
    ///
    /// Fails only if the epoll instance does; a client's failures end that client's connection.
    pub fn serve(
        &mut self,
        mut handler: impl FnMut(Action) -> Result<Reply, Fault>,
    ) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS];
        let mut scratch = [0; READ_SIZE];
        loop {
            let timeout = if self.accept_paused {
                ACCEPT_RETRY_MS
            } else {
                -1
            };
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            let ready = events.get(..count).unwrap_or_default();
            if ready
                .iter()
                .any(|event| event.fd() == self.stop.as_raw_fd())
            {
                // Taken off, so that serving can begin again.
                let _ = self.stop.read();
                return Ok(());
            }
            let mut accept = self.resume_accepting()?;
            for event in ready {
                if event.fd() == self.listener.as_raw_fd() {
                    accept = true;
                } else {
                    self.turn(event, &mut scratch, &mut handler)?;
                }
            }
            // Last, so that no event above can be meant for a closed connection whose number a new one took over.
            if accept {
                self.accept()?;
            }
        }
    }

    fn turn(
        &mut self,
        event: &EpollEvent,
        scratch: &mut [u8],
        handler: &mut impl FnMut(Action) -> Result<Reply, Fault>,
    ) -> io::Result<()> {
        let fd = event.fd();
        let Some(connection) = self.connections.get_mut(&fd) else {
            return Ok(());
        };
        match connection.turn(event.event_set(), scratch, self.max_payload, handler) {
            // Closing the stream takes it out of the epoll instance.
            Verdict::Drop => drop(self.connections.remove(&fd)),
            Verdict::Keep => {
                let wanted = connection.wanted();
                if wanted != connection.interest {
                    connection.interest = wanted;
                    let event = EpollEvent::new(wanted, fd as u64);
                    self.epoll.ctl(ControlOperation::Modify, fd, event)?;
                }
            }
        }
        Ok(())
    }

    fn watch(&self, fd: RawFd, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(events, fd as u64),
        )
    }

    fn accept(&mut self) -> io::Result<()> {
        if self.spare.is_none() {
            self.spare = self.listener.as_fd().try_clone_to_owned().ok();
        }
        for _ in 0..ACCEPT_BURST {
            match self.accept_one() {
                Ok(stream) => self.admit(stream),
                Err(Errno::AGAIN) => break,
                Err(Errno::MFILE | Errno::NFILE) => return self.refuse_without_descriptors(),
                // The client gave up, a signal came, or memory is short: the next turn tries again.
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn accept_one(&self) -> Result<UnixStream, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::accept_with(&self.listener, flags).map(UnixStream::from)
    }

    fn admit(&mut self, stream: UnixStream) {
        let connection = if self.connections.len() < self.max_connections {
            Connection::new(stream)
        } else if self.connections.len() < self.max_connections.saturating_add(MAX_REFUSED) {
            Connection::refused(stream, self.too_many())
        } else {
            return;
        };
        let fd = connection.stream.as_raw_fd();
        match self.watch(fd, connection.interest) {
            Ok(()) => drop(self.connections.insert(fd, connection)),
            Err(error) => log::error!("Cannot watch an API connection: {error}"),
        }
    }

    fn too_many(&self) -> Fault {
        Fault {
            status: 503,
            message: format!(
                "Too many open connections: the limit is {}.",
                self.max_connections
            ),
        }
    }

    /// Tells one waiting client that it cannot be served, and leaves the others in the queue for a while: the kernel
    /// would report the listener as ready again and again.
    fn refuse_without_descriptors(&mut self) -> io::Result<()> {
        log::error!("Out of file descriptors: an API connection is refused.");
        self.spare = None;
        if let Ok(stream) = self.accept_one() {
            let fault = Fault {
                status: 503,
                message: "The process is out of file descriptors.".to_owned(),
            };
            let mut connection = Connection::refused(stream, fault);
            // One try: there is no descriptor to keep it with.
            connection.turn(EventSet::OUT, &mut [], 0, &mut |_| Ok(Reply::NoContent));
        }
        self.spare = self.listener.as_fd().try_clone_to_owned().ok();
        if !self.accept_paused {
            let fd = self.listener.as_raw_fd();
            self.epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default())?;
            self.accept_paused = true;
        }
        Ok(())
    }

    /// Watches the listener again if it was not; returns whether it may have clients waiting.
    fn resume_accepting(&mut self) -> io::Result<bool> {
        if !self.accept_paused {
            return Ok(false);
        }
        self.watch(self.listener.as_raw_fd(), EventSet::IN)?;
        self.accept_paused = false;
        Ok(true)
    }
}
