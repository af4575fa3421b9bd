//! The signals that a person or the host sends to us.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::low_level::pipe;

/// Signals that ask us to end. On a terminal in raw mode Ctrl-C is not one of them, but a byte.
const ENDING: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// The signals, each readable where the event loops wait.
pub struct HostSignals {
    resized: UnixStream,
    ending: [(u8, UnixStream); 4],
}

impl HostSignals {
    /// Takes the signals over. From here on they do nothing by themselves.
    pub fn take() -> io::Result<Self> {
        let mut ending = Vec::with_capacity(ENDING.len());
        for signal in ENDING {
            ending.push((signal.unsigned_abs() as u8, readable(signal)?));
        }
        Ok(Self {
            resized: readable(SIGWINCH)?,
            ending: ending
                .try_into()
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?,
        })
    }

    /// What to wait for: readable when one of the two methods below has news.
    pub fn poll_fds(&self) -> [PollFd<'_>; 5] {
        let [a, b, c, d] = &self.ending;
        [&self.resized, &a.1, &b.1, &c.1, &d.1].map(|fd| PollFd::new(fd, PollFlags::IN))
    }

    /// The terminal has another size since the last call.
    pub fn resized(&self) -> bool {
        taken(&self.resized)
    }

    /// A signal by which somebody wants us to end, if one has come since the last call.
    pub fn ending(&self) -> Option<u8> {
        self.ending
            .iter()
            .find_map(|(signal, stream)| taken(stream).then_some(*signal))
    }
}

fn readable(signal: i32) -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    pipe::register(signal, write)?;
    Ok(read)
}

/// Takes all that has come so far, as one.
fn taken(mut stream: &UnixStream) -> bool {
    let mut any = false;
    while let Ok(1..) = stream.read(&mut [0; 64]) {
        any = true;
    }
    any
}
