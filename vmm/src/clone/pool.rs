//! VMMs that were jailed ahead of time, taken from `lepton-jailer --pool`, where what both say is described.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lepton_hostio::packet::{Packet, PacketSocket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::hand_over::CloneError;

const MAX_MESSAGE: usize = 64;
const HERE: &[u8] = b"here";
const DONE: &[u8] = b"done";

/// A pool that was asked for processes.
pub struct Asked {
    pool: PacketSocket,
    path: PathBuf,
    count: usize,
    patience: Duration,
}

/// Processes of a pool. Dropped before [`Taken::keep`], they end, and their jails go.
pub struct Taken(PacketSocket);

impl Asked {
    /// Asks the pool at `path` for `count` processes, which it is to give within `patience`. Does not wait
    /// for them.
    pub fn new(path: &Path, count: usize, patience: Duration) -> Result<Self, CloneError> {
        let connected = PacketSocket::connect(path).and_then(|pool| {
            pool.send(format!("take {count}").as_bytes(), &[])?;
            Ok(pool)
        });
        match connected {
            Ok(pool) => Ok(Asked {
                pool,
                path: path.to_owned(),
                count,
                patience,
            }),
            Err(source) => Err(CloneError::Pool {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Whether it has said something.
    pub fn has_answered(&self) -> bool {
        let now = Timespec::default();
        poll(&mut [PollFd::new(&self.pool, PollFlags::IN)], Some(&now)) == Ok(1)
    }

    /// Waits for a connection to each, while the pool starts those that it does not have.
    pub fn wait(self) -> Result<(Vec<PacketSocket>, Taken), CloneError> {
        match self.receive() {
            Ok(links) => Ok((links, Taken(self.pool))),
            Err(source) => Err(CloneError::Pool {
                path: self.path,
                source,
            }),
        }
    }

    fn receive(&self) -> io::Result<Vec<PacketSocket>> {
        let end = Instant::now() + self.patience;
        let mut links = Vec::with_capacity(self.count);
        while links.len() < self.count {
            let packet = self.next(end.saturating_duration_since(Instant::now()))?;
            if packet.bytes != HERE || packet.files.is_empty() {
                return Err(io::Error::other("it is no pool"));
            }
            for file in packet.files {
                links.push(PacketSocket::received(file)?);
            }
        }
        links.truncate(self.count);
        Ok(links)
    }

    fn next(&self, patience: Duration) -> io::Result<Packet> {
        let left = Timespec::try_from(patience).map_err(io::Error::other)?;
        loop {
            if let Some(packet) = self.pool.receive(MAX_MESSAGE)? {
                return Ok(packet);
            }
            match poll(&mut [PollFd::new(&self.pool, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Taken {
    /// They are machines now, and like any others in a jail.
    pub fn keep(self) {
        if let Err(error) = self.0.send(DONE, &[]) {
            log::warn!("the pool has ended, and may have ended the copies: {error}");
        }
    }
}
