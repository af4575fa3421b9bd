//! The host's side of a connection as the state machine sees it.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::io::retry_on_intr;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use vm_memory::VolatileSlice;

/// A non-blocking byte stream.
pub trait HostStream {
    /// Reads into guest memory. 0 bytes: the other side will send no more.
    fn read_into(&mut self, slices: &[VolatileSlice]) -> io::Result<usize>;

    /// Writes from guest memory, or what was kept of it.
    fn write_from(&mut self, slices: &[VolatileSlice]) -> io::Result<usize>;

    /// Writes a line of our own.
    fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Gives up a direction.
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()>;
}

impl HostStream for UnixStream {
    fn read_into(&mut self, slices: &[VolatileSlice]) -> io::Result<usize> {
        lepton_hostio::stream::read_vectored(&*self, slices)
    }

    fn write_from(&mut self, slices: &[VolatileSlice]) -> io::Result<usize> {
        lepton_hostio::stream::send_vectored(&*self, slices)
    }

    fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(retry_on_intr(|| {
            // The call that guest memory is sent with, too.
            rustix::net::sendmsg(
                &*self,
                &[IoSlice::new(bytes)],
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            )
        })?)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        UnixStream::shutdown(self, how)
    }
}
