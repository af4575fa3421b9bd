//! One question of the VMM's own to a port of the guest, and the guest's answer, a line. Without a socket on the host: the
//! host's end of the connection is here.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::stream::HostStream;

/// Most bytes of an answer, with its newline.
pub const MAX_ANSWER: usize = 256;

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// Nobody listens on that port, or who does has left without an answer.
    #[error("nobody in the guest listens on vsock port {0}, or answers there")]
    Ended(u32),
    /// It took too long.
    #[error("the guest did not answer on vsock port {port} within {patience:?}")]
    TimedOut {
        /// The guest's port.
        port: u32,
        /// For how long it was awaited.
        patience: Duration,
    },
    /// The answer never ends.
    #[error("the guest's answer on vsock port {0} has more than {MAX_ANSWER} bytes")]
    Long(u32),
}

/// Told of the answer, once.
pub type Answered = Box<dyn FnOnce(Result<Vec<u8>, ExchangeError>) + Send>;

/// A question to the guest.
pub struct Exchange {
    /// The guest's port.
    pub port: u32,
    /// How long it may take in all.
    pub patience: Duration,
    /// Made when the guest is ready to take it.
    pub question: Box<dyn FnOnce() -> Vec<u8> + Send>,
    /// Told of the answer, with its newline.
    pub answered: Answered,
}

/// The VMM's end of the connection. Dropped without an answer, it says that there is none.
pub struct OwnEnd {
    port: u32,
    patience: Duration,
    question: Option<Box<dyn FnOnce() -> Vec<u8> + Send>>,
    outgoing: Vec<u8>,
    sent: usize,
    incoming: Vec<u8>,
    answered: Option<Answered>,
}

impl From<Exchange> for OwnEnd {
    fn from(exchange: Exchange) -> Self {
        let Exchange {
            port,
            patience,
            question,
            answered,
        } = exchange;
        OwnEnd {
            port,
            patience,
            question: Some(question),
            outgoing: Vec::new(),
            sent: 0,
            incoming: Vec::new(),
            answered: Some(answered),
        }
    }
}

impl OwnEnd {
    /// It has taken too long, unless there was an answer: then this is false.
    pub fn time_out(&mut self) -> bool {
        let (port, patience) = (self.port, self.patience);
        let late = self.answered.is_some();
        self.finish(Err(ExchangeError::TimedOut { port, patience }));
        late
    }

    fn finish(&mut self, result: Result<Vec<u8>, ExchangeError>) {
        if let Some(answered) = self.answered.take() {
            answered(result);
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        if self.answered.is_none() {
            return;
        }
        self.incoming.extend_from_slice(bytes);
        match self.incoming.iter().position(|byte| *byte == b'\n') {
            Some(end) if end < MAX_ANSWER => {
                self.incoming.truncate(end + 1);
                let line = std::mem::take(&mut self.incoming);
                self.finish(Ok(line));
            }
            None if self.incoming.len() < MAX_ANSWER => {}
            _ => self.finish(Err(ExchangeError::Long(self.port))),
        }
    }
}

impl Drop for OwnEnd {
    fn drop(&mut self) {
        self.finish(Err(ExchangeError::Ended(self.port)));
    }
}

impl HostStream for OwnEnd {
    fn read_into(&mut self, slices: &[VolatileSlice]) -> io::Result<usize> {
        let mut read = 0;
        for slice in slices {
            let rest = self.outgoing.get(self.sent..).unwrap_or_default();
            let len = slice.len().min(rest.len());
            slice.copy_from(rest.get(..len).unwrap_or_default());
            self.sent += len;
            read += len;
        }
        match read {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            read => Ok(read),
        }
    }

    fn write_from(&mut self, slices: &[VolatileSlice]) -> io::Result<usize> {
        let mut written = 0;
        for slice in slices {
            // More is not looked at.
            let mut bytes = [0; MAX_ANSWER];
            let len = slice.copy_to(&mut bytes);
            self.take(bytes.get(..len).unwrap_or_default());
            written += slice.len();
        }
        Ok(written)
    }

    /// A client would read "OK": the guest is ready.
    fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(question) = self.question.take() {
            self.outgoing = question();
        }
        Ok(bytes.len())
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        // The guest sends no more, or takes no more of the question.
        if how == Shutdown::Write || self.sent < self.outgoing.len() {
            self.finish(Err(ExchangeError::Ended(self.port)));
        }
        Ok(())
    }
}

/// The host's end of any connection.
pub enum HostEnd {
    /// Of a client or a server.
    Socket(UnixStream),
    /// The VMM's own.
    Own(OwnEnd),
}

impl HostStream for HostEnd {
    fn read_into(&mut self, slices: &[VolatileSlice]) -> io::Result<usize> {
        match self {
            HostEnd::Socket(stream) => stream.read_into(slices),
            HostEnd::Own(end) => end.read_into(slices),
        }
    }

    fn write_from(&mut self, slices: &[VolatileSlice]) -> io::Result<usize> {
        match self {
            HostEnd::Socket(stream) => stream.write_from(slices),
            HostEnd::Own(end) => end.write_from(slices),
        }
    }

    fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            HostEnd::Socket(stream) => stream.write_bytes(bytes),
            HostEnd::Own(end) => end.write_bytes(bytes),
        }
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        match self {
            HostEnd::Socket(stream) => HostStream::shutdown(stream, how),
            HostEnd::Own(end) => end.shutdown(how),
        }
    }
}
